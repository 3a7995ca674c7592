"""What an emulated machine is made of, ready to boot; fetched and built once, and kept."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests import debian
from tests.kernel_packages import KernelPackages
from tests.mainline import module
from tests.mainline.machine import Parts

_HERE = Path(__file__).parent
# Command -> Debian package.
_TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "gcc": "gcc",
    "make": "make",
    "strip": "binutils",
    "tar": "tar",
    "xz": "xz-utils",
}


def check_tools() -> None:
    """Raises Unavailable, naming every tool that is missing and how to get it."""
    debian.check_commands(_TOOLS)


def prepare(say: Callable[[str], object] = lambda text: None) -> Parts:
    """Fetch and build what isn't there yet; ``say`` gets a line per step.

    Raises Unavailable for what the machine lacks, StepFailed for what broke.
    """
    check_tools()
    packages = KernelPackages.newest()
    say(f"kernel {packages.release}")
    image = packages.image
    kvm_amd = home() / f"kvm-amd-{packages.release}-{_fingerprint()}.ko"
    if not kvm_amd.is_file():
        say("building kvm-amd.ko")
        _build(packages, kvm_amd)
    return Parts(packages.release, image, kvm_amd)


def home() -> Path:
    """The folder in the cache for all of this."""
    folder = debian.cache_dir() / "mainline"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _fingerprint() -> str:
    """A digest of all that goes into the module beside the packages."""
    digest = hashlib.sha256()
    for path in (*sorted((_HERE / "kernel").glob("*.h")), _HERE / "module.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _build(packages: KernelPackages, target: Path) -> None:
    """Build and strip the module; the work is kept only where it fails."""
    tree, source = packages.build_tree, packages.source
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix="build-"))
    built = module.build(source, tree, work)
    subprocess.run(["strip", "--strip-debug", str(built)], check=True)
    built.rename(target)
    shutil.rmtree(work)
