"""An emulated machine: Debian's kernel with our kvm-amd module, running one command.

QEMU without KVM, so that the host needs no virtualization and no root. The machine's
root file system is the host's own (over 9p, never written to); the command talks with
the host by lines over a virtio port, ``PORT`` inside.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.mainline.errors import StepFailed

PORT = "/dev/vport0p1"
"""The port, as the command sees it."""

_REPOSITORY = Path(__file__).resolve().parents[2]
_INIT = Path(__file__).with_name("init")
_APPLETS = ("cat", "chroot", "insmod", "mkdir", "mount", "poweroff", "sh")
# In the order of their dependencies; kvm-amd is ours.
_STOCK_MODULES = (
    "fs/netfs/netfs",
    "net/9p/9pnet",
    "net/9p/9pnet_virtio",
    "fs/9p/9p",
    "fs/overlayfs/overlay",
    "virt/lib/irqbypass",
    "drivers/crypto/ccp/ccp",
    "arch/x86/kvm/kvm",
)
# One CPU: with threads for several the kernel's text patching panics now and then, and in one
# thread they are slower than one. EPYC-Milan: the SNP code looks at the CPU's family.
_QEMU = (
    *("qemu-system-x86_64", "-accel", "tcg", "-machine", "pc"),
    *("-cpu", "EPYC-Milan,+svm", "-smp", "1", "-m", "2048"),
    *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-nic", "none"),
    *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=port"),
    *("-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"),
    *("-device", "virtio-9p-pci,fsdev=host,mount_tag=host"),
)
# Expedited: KVM waits for RCU at each memory slot.
_KERNEL_ARGUMENTS = "console=ttyS0 panic=-1 tsc=reliable quiet rcupdate.rcu_expedited=1"
_GAVE_UP = re.compile(r"machine: (.* failed)")
_BEGINS = "machine: the command begins"
_COMMAND_ENDED = re.compile(r"the command ended with (\d+)")
_PANIC = re.compile(r"(Kernel panic.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Parts:
    """What a machine is made of: an unpacked kernel image package and our module."""

    release: str
    image: Path
    kvm_amd: Path

    @property
    def kernel(self) -> Path:
        """The kernel to boot."""
        return self.image / f"boot/vmlinuz-{self.release}"


class Machine:
    """One boot, running ``command`` (argv; from the repository, with ``environment``).

    A context manager: on leaving, the machine is switched off. The console is kept in
    ``log``. Everything is over after ``seconds``: then, and when the machine dies,
    reading raises StepFailed with the reason.
    """

    def __init__(
        self,
        parts: Parts,
        command: Sequence[str],
        *,
        log: Path,
        seconds: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        with ExitStack() as stack:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="machine-")))
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(work / "port"))
            listener.listen()
            initrd = _initrd(work, parts, _script(command, environment or {}))
            self._qemu = self._start(stack, parts, initrd, work / "port")
            self._socket = stack.enter_context(self._connection(listener))
            self._port = stack.enter_context(
                self._socket.makefile("r", encoding="utf-8", errors="replace")
            )
            self._stack = stack.pop_all()

    def _start(
        self, stack: ExitStack, parts: Parts, initrd: Path, port: Path
    ) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as log:
            qemu = subprocess.Popen(
                [
                    *_QEMU,
                    *("-chardev", f"socket,id=port,path={port}"),
                    *("-chardev", f"file,id=console,path={self.log},append=on"),
                    *("-serial", "chardev:console"),
                    *("-kernel", str(parts.kernel), "-initrd", str(initrd)),
                    *("-append", _KERNEL_ARGUMENTS),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        stack.enter_context(qemu)  # waits
        stack.callback(qemu.kill)
        return qemu

    def _connection(self, listener: socket.socket) -> socket.socket:
        """QEMU connects as soon as it starts."""
        listener.settimeout(0.1)
        while time.monotonic() < self._deadline and self._qemu.poll() is None:
            with suppress(TimeoutError):
                return listener.accept()[0]
        raise self._failed()

    def ask(self, request: Any) -> Any:
        """Send one JSON line, wait for the line that answers it. Raises StepFailed."""
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError:
            raise self._failed() from None
        return json.loads(self._line() or self._gone())

    def lines(self) -> Iterator[str]:
        """The lines that the command writes, until the machine goes off.

        Raises StepFailed where the command did not come to its end.
        """
        while line := self._line():
            yield line.rstrip("\n")
        if self.status is None:
            raise self._failed()

    @property
    def status(self) -> int | None:
        """The exit status of the command; None as long as it has not ended."""
        found = _COMMAND_ENDED.search(self._console())
        return int(found[1]) if found else None

    def _line(self) -> str:
        self._socket.settimeout(max(self._deadline - time.monotonic(), 0.001))
        try:
            return self._port.readline()
        except OSError:
            raise self._failed() from None

    def _gone(self) -> str:
        raise self._failed()

    def _failed(self) -> StepFailed:
        """Why the machine says nothing more, from its console."""
        console = self._console()
        if panic := _PANIC.search(console):
            why = panic[1].strip()
        elif self.status is not None:
            why = f"the command ended with {self.status}"
        elif gave_up := _GAVE_UP.search(console):
            why = gave_up[1].strip()
        elif self._qemu.poll() is not None:
            why = f"QEMU ended with {self._qemu.returncode}"
        else:
            why = f"no end after {self._seconds:g} s"
        return StepFailed("running the machine" if _BEGINS in console else "booting", self.log, why)

    def _console(self) -> str:
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        """Switch the machine off; nothing happens the second time."""
        self._stack.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _script(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """What the machine's shell runs."""
    given = {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "HOME": "/tmp",
        "PYTHONDONTWRITEBYTECODE": "1",
        **environment,
    }
    settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in given.items())
    return f"cd {shlex.quote(str(_REPOSITORY))} && exec env -i {settings} {shlex.join(command)}"


def _initrd(work: Path, parts: Parts, script: str) -> Path:
    """The first file system: busybox, modules, init and the command."""
    root = work / "initrd"
    for folder in ("bin", "modules", "proc", "sys", "dev"):
        (root / folder).mkdir(parents=True)
    shutil.copy(_busybox(), root / "bin/busybox")
    for applet in _APPLETS:
        (root / "bin" / applet).symlink_to("busybox")
    modules = parts.image / f"lib/modules/{parts.release}/kernel"
    names = []
    for module in _STOCK_MODULES:
        names.append(f"{Path(module).name}.ko")
        packed = (modules / f"{module}.ko.xz").read_bytes()
        (root / "modules" / names[-1]).write_bytes(lzma.decompress(packed))
    shutil.copy(parts.kvm_amd, root / "modules/kvm-amd.ko")
    # What the simulated kernel has: no nested virtualization.
    (root / "modules/order").write_text("\n".join([*names, "kvm-amd.ko nested=0", ""]))
    (root / "command").write_text(script)
    shutil.copy(_INIT, root / "init")
    (root / "init").chmod(0o755)
    files = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    archive = subprocess.run(
        [_busybox(), "cpio", "-o", "-H", "newc", "-R", "0:0"],
        cwd=root,
        input=files.encode(),
        capture_output=True,
        check=True,
    ).stdout
    packed = work / "initrd.gz"
    packed.write_bytes(gzip.compress(archive, compresslevel=1))
    return packed


def _busybox() -> str:
    return shutil.which("busybox") or "busybox"
