"""Which kernel is taken, and how packages are kept; apt is a program of our own here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import debian
from tests.debian import DiskFull, Unavailable
from tests.kernel_packages import KernelPackages
from tests.stubs import stub

# An apt that knows these packages, and whose archives hold one file each.
GET = """
case "$*" in
*--print-uris*) echo "'http://x/y' ${3%%=*}_1_all.deb 1 SHA256:0" ;;
*) shift; for name; do echo "$name" >"${name%%=*}_1_all.deb"; done ;;
esac
"""
UNPACK = 'mkdir -p "$3/usr" && cp "$2" "$3/usr"'


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the programs; ``known`` in it lists the packages."""
    folder = tmp_path / "bin"
    stub(folder, "apt-get", GET)
    stub(folder, "dpkg", UNPACK)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("KVMLAUNCH_FETCH", "1")
    debian.unpacked.cache_clear()
    return folder


def knows(apt: Path, *names: str) -> None:
    stub(apt, "apt-cache", f"printf '%s\\n' {' '.join(names)}")


def both(release: str) -> tuple[str, str]:
    return f"linux-image-{release}", f"linux-headers-{release}"


def test_kernel_when_a_newer_one_is_out_is_the_newest(apt: Path) -> None:
    knows(apt, *both("6.12.9+deb12-amd64"), *both("6.12.10+deb12-amd64"))
    assert KernelPackages.newest().release == "6.12.10+deb12-amd64"


def test_kernel_when_other_flavours_are_newer_is_the_plain_one(apt: Path) -> None:
    knows(
        apt,
        *both("6.12.9+deb12-amd64"),
        *both("6.12.11+deb12-cloud-amd64"),
        *both("6.12.11+deb12-rt-amd64"),
        *both("6.12-amd64"),
    )
    assert KernelPackages.newest().release == "6.12.9+deb12-amd64"


def test_kernel_when_the_newest_has_no_image_yet_is_the_one_before(apt: Path) -> None:
    knows(apt, *both("6.12.9+deb13-amd64"), "linux-headers-6.12.10+deb13-amd64")
    assert KernelPackages.newest().release == "6.12.9+deb13-amd64"


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (both("6.11.9+deb12-amd64"), "apt knows no package linux-image-6.12"),
        (
            ("linux-headers-6.12.9+deb12-amd64", "linux-image-6.12.10+deb12-amd64"),
            "apt knows no 6.12 kernel with both",
        ),
    ],
)
def test_kernel_when_there_is_none_says_so(apt: Path, names: tuple[str, ...], why: str) -> None:
    knows(apt, *names)
    with pytest.raises(Unavailable, match=why):
        KernelPackages.newest()


def test_source_when_a_newer_one_is_out_is_of_the_kernels_version(apt: Path) -> None:
    versions = "6.12.10-1~deb12u1", "6.12.9-2~deb12u1", "6.12.9-1~deb12u1"
    lines = (
        f"'linux-source-6.12 | {version} | http://x main amd64 Packages'" for version in versions
    )
    stub(apt, "apt-cache", f"printf '%s\\n' {' '.join(lines)}")
    source = KernelPackages("6.12.9+deb12-amd64").source
    assert source.name == "linux-source-6.12.tar.xz"
    fetched = source.parents[1] / "linux-source-6.12_1_all.deb"
    assert fetched.read_text() == "linux-source-6.12=6.12.9-2~deb12u1\n"


def test_headers_when_fetched_lie_together(apt: Path) -> None:
    packages = KernelPackages("6.12.9+deb12-amd64")
    usr = packages.build_tree.parents[1]
    assert packages.common_headers.parents[1] == usr
    assert sorted(path.name for path in usr.iterdir()) == [
        "linux-headers-6.12.9+deb12-amd64_1_all.deb",
        "linux-headers-6.12.9+deb12-common_1_all.deb",
        "linux-kbuild-6.12.9+deb12_1_all.deb",
    ]


def test_package_when_fetched_before_is_not_fetched_again(apt: Path) -> None:
    first = debian.unpacked("ovmf")
    debian.unpacked.cache_clear()
    stub(apt, "dpkg", "exit 1")
    assert debian.unpacked("ovmf") == first


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("apt-get", "Error writing to file - write (28: No space left on device)"),
        ("dpkg", "tar: ./usr/x.xz: Cannot write: No space left on device"),
        ("dpkg", "tar: ./usr/x.xz: Wrote only 1536 of 10240 bytes"),
    ],
)
def test_package_when_the_disk_is_full_says_so_and_leaves_nothing(
    apt: Path, tmp_path: Path, program: str, said: str
) -> None:
    full = f"echo '{said}' >&2; echo 'E: it failed' >&2; exit 2"
    uris = f'case "$*" in *--print-uris*) ;; *) {full} ;; esac'
    stub(apt, program, f"{uris}\n{GET}" if program == "apt-get" else full)
    message = f"package ovmf can't be fetched, the disk is full: {said}"
    with pytest.raises(DiskFull, match=f"^{re.escape(message)}$"):
        debian.unpacked("ovmf")
    assert list((tmp_path / "cache/kvmlaunch").iterdir()) == []


def test_package_when_the_user_speaks_another_language_is_asked_for_in_english(
    apt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a full disk is called depends on it."""
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    stub(apt, "apt-get", 'echo "$LC_ALL" >&2; exit 1')
    with pytest.raises(Unavailable, match=r"ovmf can't be fetched: C\.UTF-8$"):
        debian.unpacked("ovmf")
