"""The host's side of an emulated machine, with a program of our own in QEMU's place."""

from __future__ import annotations

import lzma
import shutil
import sys
from pathlib import Path

import pytest

from tests.mainline import machine
from tests.mainline.errors import StepFailed
from tests.mainline.machine import Machine, Parts

# Stands for QEMU: gets at console and port as it would, then plays a part.
QEMU = """#!{python}
import socket, sys, time
text = " ".join(sys.argv)
port = socket.socket(socket.AF_UNIX)
console = open(text.split("id=console,path=")[1].split(",")[0], "a", buffering=1)
def connect():
    port.connect(text.split("id=port,path=")[1].split()[0])
    console.write("machine: the command begins\\n")
    return port.makefile("rw", buffering=1)
{part}
"""
ANSWERS = """
channel = connect()
for line in channel:
    channel.write(line.upper())
    channel.flush()
"""
LINES = """
channel = connect()
channel.write("one\\ntwo\\n")
channel.flush()
console.write("machine: the command ended with 3\\n")
"""
PANIC = """
channel = connect()
channel.write("one\\n")
channel.flush()
console.write("[ 1.0] Kernel panic - not syncing: sysrq triggered crash\\n")
"""
NO_MODULE = 'console.write("machine: insmod kvm.ko failed\\\\n")'
HANGS = "channel = connect(); time.sleep(60)"
REFUSES = "sys.exit(1)"


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    """A kernel package with modules that hold nothing."""
    if shutil.which("busybox") is None:
        pytest.skip("there is no busybox to make an initial file system with")
    image = tmp_path / "image"
    for name in machine._STOCK_MODULES:
        path = image / f"lib/modules/6.12.1/kernel/{name}.ko.xz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lzma.compress(b"module"))
    (tmp_path / "kvm-amd.ko").write_bytes(b"ours")
    return Parts("6.12.1", image, tmp_path / "kvm-amd.ko")


@pytest.fixture
def boot(tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch):
    """``boot(part)`` starts a machine whose QEMU plays that part."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def start(part: str, seconds: float = 20) -> Machine:
        qemu = tmp_path / "qemu-system-x86_64"
        qemu.write_text(QEMU.format(python=sys.executable, part=part))
        qemu.chmod(0o755)
        return Machine(parts, ["true"], log=tmp_path / "console.log", seconds=seconds)

    return start


def test_ask_when_the_machine_answers_gives_the_answer(boot) -> None:
    with boot(ANSWERS) as booted:
        assert booted.ask({"a": "b"}) == {"A": "B"}
        assert booted.ask(["c"]) == ["C"]


def test_lines_when_the_command_ends_come_with_its_status(boot) -> None:
    with boot(LINES) as booted:
        assert list(booted.lines()) == ["one", "two"]
        assert booted.status == 3


def test_lines_when_the_kernel_panics_say_so_and_name_the_log(boot, tmp_path: Path) -> None:
    with boot(PANIC) as booted:
        lines = booted.lines()
        assert next(lines) == "one"
        with pytest.raises(StepFailed) as caught:
            next(lines)
    assert str(caught.value) == (
        f"running the machine failed: Kernel panic - not syncing: sysrq triggered crash "
        f"(the log is {tmp_path}/console.log)"
    )


def test_ask_when_the_machine_is_gone_says_why(boot) -> None:
    with boot(PANIC) as booted:
        next(booted.lines())
        with pytest.raises(StepFailed, match="Kernel panic"):
            booted.ask({})


def test_lines_when_the_machine_hangs_end_at_the_time_limit(boot) -> None:
    with (
        boot(HANGS, seconds=0.5) as booted,
        pytest.raises(StepFailed, match=r"no end after 0\.5 s"),
    ):
        list(booted.lines())


@pytest.mark.parametrize(
    ("part", "why"),
    [(NO_MODULE, r"insmod kvm\.ko failed"), (REFUSES, "QEMU ended with 1")],
)
def test_boot_when_it_gets_nowhere_says_why(boot, part: str, why: str) -> None:
    with pytest.raises(StepFailed, match=f"^booting failed: {why}"):
        boot(part)
