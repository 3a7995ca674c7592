"""The C programs that stand for "as fast as it gets", compiled where they are needed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_HERE = Path(__file__).resolve().parent


class NoCompiler(Exception):
    """There is no C compiler here."""


def compiled(name: str, work: Path) -> Path:
    """The program of ``name``.c beside this file, built in ``work``. Raises NoCompiler."""
    if shutil.which("cc") is None:
        raise NoCompiler("there is no cc to build the C side with")
    program = work / name
    source = _HERE / f"{name}.c"
    subprocess.run(
        ["cc", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-o", program, source],
        check=True,
        timeout=60,
    )
    return program
