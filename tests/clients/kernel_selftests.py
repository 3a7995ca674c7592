"""The kernel's own KVM selftests, built from Debian's source package as static programs."""

from __future__ import annotations

import os
from pathlib import Path

from tests import debian
from tests.clients.kept import made_once
from tests.kernel_packages import KernelPackages

# Command -> Debian package. A static program needs libc6-dev, too, which only gcc can tell.
_COMMANDS = {"gcc": "gcc", "make": "make", "ld": "binutils", "tar": "tar", "xz": "xz-utils"}
_SELFTESTS = "tools/testing/selftests"
_KVM = f"{_SELFTESTS}/kvm"
# What `make headers` reads, then what the selftests are built from.
_SOURCES = (
    *("Makefile", "scripts", "usr", "include/uapi", "include/asm-generic", "arch/x86"),
    *("tools/arch/x86", "tools/build", "tools/include", "tools/lib/rbtree.c", "tools/scripts"),
    *(f"{_SELFTESTS}/{name}" for name in ("lib.mk", "kselftest.h", "kselftest_harness.h")),
    *(_KVM, f"{_SELFTESTS}/rseq"),
)
_FAILURE = "the KVM selftests can't be built"
_SECONDS = 600


def selftests() -> Path:
    """A folder with all x86 programs of tools/testing/selftests/kvm, of the newest kernel.

    Where they aren't there yet they are built, which takes half a minute. Raises Unavailable.
    """
    packages = KernelPackages.newest()
    return made_once(f"kvm-selftests-{packages.release}", lambda work: _build(packages, work))


def _build(packages: KernelPackages, work: Path) -> Path:
    debian.check_commands(_COMMANDS)
    archive = packages.source
    root = archive.name.removesuffix(".tar.xz")
    sources = [f"{root}/{part}" for part in _SOURCES]
    _run(work, "tar", "--use-compress-program=xz -T0", "-xf", str(archive), *sources)
    tree, output = work / root, work / "output"
    make = ("make", f"-j{os.cpu_count()}", "ARCH=x86", "LLVM=", "CROSS_COMPILE=")
    _run(tree, *make, "headers")
    # Their backtraces need symbols, but no debug information.
    _run(tree / _KVM, *make, f"OUTPUT={output}", "EXTRA_CFLAGS=-static -g0")
    return _programs(output, work / "programs")


def _run(folder: Path, *command: str) -> None:
    debian.run(_FAILURE, *command, cwd=folder, seconds=_SECONDS)


def _programs(output: Path, folder: Path) -> Path:
    """Move the programs out of a build: no two have the same name."""
    folder.mkdir()
    for program in [path.with_suffix("") for path in output.rglob("*.o")]:
        if program.is_file():  # else an object of the library
            program.rename(folder / program.name)
    return folder
