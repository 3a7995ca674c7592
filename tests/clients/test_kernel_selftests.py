"""The kernel's selftests as programs, and what is said where they can't be built."""

from __future__ import annotations

import re
import shlex
import tarfile
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from tests.clients import kernel_selftests
from tests.debian import Unavailable
from tests.kernel_packages import KernelPackages
from tests.stubs import stub

BUILD = pytest.mark.timeout(300)
RELEASE = "6.12.9+deb12-amd64"


@BUILD
@pytest.mark.parametrize("name", ["sev_init2_tests", "guest_memfd_test", "set_memory_region_test"])
def test_selftest_when_built_needs_no_libraries(kernel_selftests: Path, name: str) -> None:
    path = kernel_selftests / name
    assert path.stat().st_mode & 0o111
    with path.open("rb") as file:
        elf = ELFFile(file)
        kinds = {segment["p_type"] for segment in elf.iter_segments()}
        assert elf.get_machine_arch() == "x64"
    assert "PT_LOAD" in kinds
    assert not kinds & {"PT_INTERP", "PT_DYNAMIC"}


@BUILD
def test_selftests_when_built_are_programs_only(kernel_selftests: Path) -> None:
    """6.12's Makefile names 85 of them for x86; later ones have more."""
    programs = list(kernel_selftests.iterdir())
    assert len(programs) >= 85
    assert {path.read_bytes()[:4] for path in programs} == {b"\x7fELF"}


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH where ``make`` does nothing, and a source package with nothing in it."""
    folder = tmp_path / "bin"
    stub(folder, "make", "exit 0")
    archive = tmp_path / "linux-source-6.12.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        for part in kernel_selftests._SOURCES:
            entry = tarfile.TarInfo(f"linux-source-6.12/{part}")
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
    monkeypatch.setattr(KernelPackages, "newest", lambda: KernelPackages(RELEASE))
    monkeypatch.setattr(KernelPackages, "source", archive)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.mark.parametrize(
    "said",
    [
        "lib/elf.c:1:10: fatal error: x.h: No such file or directory",
        "/usr/bin/ld: lib/elf.o: in function `f': elf.c:(.text+0x5): undefined reference to `g'",
        "/usr/bin/ld: cannot find -lc: No such file or directory",
    ],
)
def test_selftests_when_the_compiler_fails_tell_its_first_error(tools: Path, said: str) -> None:
    last = "echo 'make: *** [Makefile:3] Error 1' >&2"
    stub(tools, "make", f"echo {shlex.quote(said)} >&2; {last}; exit 2")
    message = f"the KVM selftests can't be built: {said}"
    with pytest.raises(Unavailable, match=f"^{re.escape(message)}$"):
        kernel_selftests.selftests()


def test_selftests_when_built_leave_the_library_out(tools: Path) -> None:
    """This make builds one program and one object of the library."""
    build = 'mkdir -p "$output/lib"; touch "$output/a_test" "$output/a_test.o" "$output/lib/elf.o"'
    stub(
        tools,
        "make",
        f"for word; do case $word in OUTPUT=*) output=${{word#*=}};{build};; esac; done",
    )
    folder = kernel_selftests.selftests()
    assert folder.name == f"kvm-selftests-{RELEASE}"
    assert [path.name for path in folder.iterdir()] == ["a_test"]


def test_selftests_when_there_is_no_compiler_names_the_package(
    tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tool in ("tar", "xz", "ld"):
        stub(tools, tool, "exit 1")
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(Unavailable, match=r"^there is no gcc \(apt install gcc\)$"):
        kernel_selftests.selftests()
