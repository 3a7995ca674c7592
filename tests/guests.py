"""The guests of examples/guests, built from source; and tiny ones as bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
BUILT = os.environ.get("KVMLAUNCH_GUESTS")
SOURCES = Path(__file__).resolve().parent / "guest_sources"

# Flat images that start in real mode.
HALT = b"\xf4"  # hlt
SPIN = b"\xeb\xfe"  # jmp .
LINE_THEN_SPIN = b"\xba\xf8\x03\xb0\x0a\xee\xeb\xfe"  # mov dx,0x3f8; mov al,10; out dx,al; jmp .
ENDS_BADLY = b"\xb0\x01\xe6\xf4"  # mov al,1; out 0xf4,al


def build(into: Path) -> Path:
    """Build every example guest in ``into`` by the script that users run; returns it.

    Skips where there is no compiler, assembler or linker. KVMLAUNCH_GUESTS names a folder
    where all guests are built already, for machines that are slow at it.
    """
    if BUILT:
        return Path(BUILT)
    require_build_tools()
    copied = shutil.copytree(
        EXAMPLES / "guests", into, ignore=shutil.ignore_patterns("*.elf"), dirs_exist_ok=True
    )
    subprocess.run(["sh", copied / "build.sh"], check=True, stdout=subprocess.DEVNULL, timeout=60)
    return into


def build_tests(into: Path) -> Path:
    """Build the guests of tests/guest_sources in ``into``; returns it. As :func:`build`."""
    if BUILT:
        return Path(BUILT)
    require_build_tools()
    for header in SOURCES.glob("*.h"):
        shutil.copy(header, into)
    sources = [shutil.copy(source, into) for source in sorted(SOURCES.glob("*.c"))]
    script = EXAMPLES / "guests" / "build.sh"
    subprocess.run(["sh", script, *sources], check=True, stdout=subprocess.DEVNULL, timeout=60)
    return into


def require_build_tools() -> None:
    """Skip where the guests can't be built."""
    for tool in ("gcc", "as", "ld"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool} to build guests with (apt install gcc binutils)")
