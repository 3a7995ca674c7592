"""The guests of examples/guests, built from source; and tiny ones as bytes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

# Flat images that start in real mode.
HALT = b"\xf4"  # hlt
SPIN = b"\xeb\xfe"  # jmp .
LINE_THEN_SPIN = b"\xba\xf8\x03\xb0\x0a\xee\xeb\xfe"  # mov dx,0x3f8; mov al,10; out dx,al; jmp .
ENDS_BADLY = b"\xb0\x01\xe6\xf4"  # mov al,1; out 0xf4,al


def build(into: Path) -> Path:
    """Assemble every example guest in ``into`` by the script that users run; returns it.

    Skips where there is no assembler or linker.
    """
    require_binutils()
    for file in (EXAMPLES / "guests").iterdir():
        if file.suffix in (".s", ".sh"):
            shutil.copy(file, into)
    subprocess.run(["sh", "build.sh"], cwd=into, check=True, stdout=subprocess.DEVNULL, timeout=60)
    return into


def require_binutils() -> None:
    """Skip where the example guests can't be built."""
    for tool in ("as", "ld"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool} to build guests with (apt install binutils)")
