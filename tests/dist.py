"""tox -e dist: an sdist, a wheel made from it alone, and that wheel at work in a fresh venv.

Usage: python tests/dist.py FOLDER (everything is made in it, and removed at the end)
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 600
PROFILES = tuple(
    path.relative_to(ROOT).as_posix()
    for path in sorted((ROOT / "kvmlaunch/images/vmms").glob("*.json"))
)

NEEDED = (
    *("pyproject.toml", "README.md", "LICENSE", "PKG-INFO"),
    "csrc/build_backend.py",
    *(
        f"csrc/{path.name}"
        for path in sorted((ROOT / "csrc").glob("*.[ch]"))
        if not path.name.startswith("_generated_")
    ),
    *("kvmlaunch/__init__.py", "kvmlaunch/py.typed", "kvmlaunch/uapi/_ext.pyi"),
    *("kvmlaunch/softcpu/_hooks.pyi", "kvmlaunch/selftest/payloads.S"),
    *("kvmlaunch/hashing/_ext.pyi", "kvmlaunch/abi/record.pyi", "kvmlaunch/abi/enums.pyi"),
    *PROFILES,
)
JUNK = re.compile(
    r"(^|/)(__pycache__|_generated_\w+\.c|\.[a-z_]+_cache|\.tox|build|dist)(/|$)"
    r"|\.(so|o|elf|pyc)$"
)
IN_WHEEL = (
    *("kvmlaunch/cli/__init__.py", "kvmlaunch/py.typed"),
    *("kvmlaunch/uapi/_ext.abi3.so", "kvmlaunch/softcpu/_hooks.abi3.so"),
    *("kvmlaunch/hashing/_ext.abi3.so", "kvmlaunch/abi/record.pyi", "kvmlaunch/abi/enums.pyi"),
    *PROFILES,
)


class Failure(Exception):
    """One sentence: what is wrong with the distribution."""


def main(base: Path) -> int:
    """Run every step; 1 and a sentence at the first that fails."""
    base.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=base.resolve()))
    try:
        sdist = make_sdist(folder)
        unpacked = check_sdist(sdist, folder)
        wheel = make_wheel(unpacked, folder)
        check_wheel(wheel)
        use_wheel(wheel, folder)
    except Failure as failure:
        print(f"dist: {failure}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def make_sdist(folder: Path) -> Path:
    """Build the sdist from the working tree."""
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT)
    sdist = only(folder.glob("*.tar.gz"), "sdist")
    step(f"built {sdist.name} ({sdist.stat().st_size >> 10} KiB)")
    return sdist


def check_sdist(sdist: Path, folder: Path) -> Path:
    """Check what is in the sdist; returns the folder where it is unpacked."""
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
        archive.extractall(folder / "sdist", filter="data")
    missing = [name for name in NEEDED if name not in names]
    if missing:
        raise Failure(f"the sdist lacks {', '.join(missing)}")
    junk = [name for name in names if JUNK.search(name)]
    if junk:
        raise Failure(f"the sdist has what a build makes itself: {', '.join(junk)}")
    step(f"the sdist has {len(names)} entries: C sources, headers and build backend, nothing built")
    return only((folder / "sdist").iterdir(), "folder in the sdist")


def make_wheel(unpacked: Path, folder: Path) -> Path:
    """Build the wheel from the unpacked sdist."""
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, unpacked)
    wheel = only(folder.glob("*.whl"), "wheel")
    step(f"built {wheel.name} from the sdist")
    return wheel


def check_wheel(wheel: Path) -> None:
    """One wheel for every Python from 3.10 on."""
    if not re.fullmatch(r"kvmlaunch-[^-]+-cp310-abi3-\w*linux\w*\.whl", wheel.name):
        raise Failure(f"the wheel is {wheel.name}, not tagged cp310-abi3-…linux…")
    names = run(sys.executable, "-m", "zipfile", "-l", wheel)
    missing = [name for name in IN_WHEEL if name not in names]
    if missing:
        raise Failure(f"the wheel lacks {', '.join(missing)}")
    step("the wheel is tagged cp310-abi3 and has the extension")


def use_wheel(wheel: Path, folder: Path) -> None:
    """Install the wheel where nothing else is, and use it from another folder."""
    environment = folder / "an environment"  # with a blank, which not every first line takes
    run(sys.executable, "-m", "venv", environment)
    commands = environment / "bin"
    run(commands / "python", "-m", "pip", "install", "--quiet", wheel)
    step("installed the wheel in a fresh venv")
    with tempfile.TemporaryDirectory(dir=folder) as elsewhere:
        version = run(commands / "kvmlaunch", "--version", cwd=elsewhere).strip()
        if not wheel.name.startswith(version.replace(" ", "-") + "-"):
            raise Failure(f"kvmlaunch --version says {version!r}, the wheel is {wheel.name}")
        step(version)
        image = Path(elsewhere, "halt.bin")
        image.write_bytes(b"\xf4")
        digest = run(commands / "kvmlaunch", "measure", image, cwd=elsewhere).strip()
        if not re.fullmatch("[0-9a-f]{96}", digest):
            raise Failure(f"kvmlaunch measure printed {digest!r}, not a digest")
        step(f"measured a page: {digest[:16]}…")
        extra = f"{wheel}[softcpu]"
        run(commands / "python", "-m", "pip", "install", "--quiet", extra, cwd=elsewhere)
        run(commands / "kvmlaunch", "run", "--platform", "sim", image, cwd=elsewhere)
        step("ran it on the simulated host")


def step(text: str) -> None:
    """Say what has been done."""
    print(text, flush=True)


def only(paths: Iterable[Path], what: str) -> Path:
    """The one path that there must be."""
    found = list(paths)
    if len(found) != 1:
        raise Failure(f"there are {len(found)} of what should be one {what}")
    return found[0]


def run(*command: object, cwd: str | None = None) -> str:
    """Run a command; its output, or a Failure with the end of what it said."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, check=False, timeout=SECONDS
    )
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-2000:]
        raise Failure(f"`{' '.join(words)}` ended with {done.returncode}:\n{said}")
    return done.stdout


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
