"""Python as those have it who install a package, for the time that whole commands take.

What an editable installation hooks into every start of Python imports half of what commands do,
ours and others', and hides it from a comparison.
"""

from __future__ import annotations

import sys
import venv
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def installed_python(work: Path) -> str:
    """A Python with the packages of this one and this checkout, in a new environment."""
    folder = work / "python"
    venv.create(folder, symlinks=True)
    packages = [path for path in sys.path if path.endswith("-packages")]
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text("\n".join([str(_ROOT), *packages]), encoding="utf-8")
    return str(folder / "bin" / "python")
