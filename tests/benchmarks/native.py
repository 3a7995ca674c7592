"""The C programs that stand for "as fast as it gets", compiled where they are needed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_HERE = Path(__file__).resolve().parent


class NoCompiler(Exception):
    """There is no C compiler here, or not what it needs."""


def compiled(name: str, work: Path, *libraries: str) -> Path:
    """The program of ``name``.c beside this file, built in ``work``. Raises NoCompiler."""
    if shutil.which("cc") is None:
        raise NoCompiler("there is no cc to build the C side with")
    program = work / name
    source = _HERE / f"{name}.c"
    words = ["cc", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-o", program, source, *libraries]
    try:
        subprocess.run(words, check=True, timeout=60)
    except subprocess.CalledProcessError:
        if not libraries:
            raise
        needed = " and ".join(libraries)
        raise NoCompiler(f"{source.name} can't be built, which needs {needed}") from None
    return program
