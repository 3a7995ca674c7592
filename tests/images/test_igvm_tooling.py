"""Against Microsoft's igvm-tooling: we read what it builds, and it reads what we build.

It is on no package registry: ``KVMLAUNCH_IGVM_TOOLING`` names a checkout of
github.com/microsoft/igvm-tooling. It needs ecdsa, cstruct, libclang, cached_property and
frozendict of PyPI, and ACPICA's iasl (Debian: acpica-tools). Tried with revision 53656dd.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmlaunch.abi.idblock import IdAuth, IdBlock
from kvmlaunch.abi.idblock_sign import check_signatures
from kvmlaunch.images import PlanOptions, load_image
from kvmlaunch.images.igvm.build import build, for_igvm
from kvmlaunch.launch.measure import measure
from tests.host import require
from tests.images.builders import Seg, elf64

VARIABLE = "KVMLAUNCH_IGVM_TOOLING"
GENERATE = "from igvm.igvmgen import main; main()"
DUMP = """
import sys
from igvm.igvmfile import IGVMFile
print(IGVMFile.dump(open(sys.argv[1], "rb").read()))
"""
TOOLING = Path(os.environ.get(VARIABLE, "/nonexistent"))


@pytest.fixture
def tooling(tmp_path: Path) -> Callable[..., str]:
    """Runs a program with igvm-tooling at hand; gives what it prints."""
    if not (TOOLING / "src" / "igvm").is_dir():
        require("igvm-tooling", f"{VARIABLE} names no checkout of microsoft/igvm-tooling")

    def run(program: str, *args: object) -> str:
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, args)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
            timeout=100,
            env={**os.environ, "PYTHONPATH": str(TOOLING / "src")},
        )
        if "ModuleNotFoundError" in done.stderr:
            require("igvm-tooling", done.stderr.splitlines()[-1])
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize(
    ("kind", "source", "level"),
    [
        ("elf", "test_elf", 2),
        ("elf", "test_elf", 4),
        ("bzImage", "test_bzImage", 4),
    ],
)
def test_measure_when_igvm_tooling_built_the_file_is_the_digest_that_it_signed(
    tooling: Callable[..., str], tmp_path: Path, kind: str, source: str, level: int
) -> None:
    if shutil.which("iasl") is None:
        require("igvm-tooling", "there is no iasl (Debian: acpica-tools)")
    file = tmp_path / "theirs.igvm"
    tests, acpi = TOOLING / "test" / "tests", TOOLING / "src" / "igvm" / "acpi" / "acpi-test"
    tooling(
        *(GENERATE, "-o", file, "-inform", kind, "-kernel", tests / source, "-append", "a=b"),
        *("-vtl", 2, "-boot_mode", "x64", "-pgtable_level", level, "-acpi_dir", acpi),
        *("-svme", 1, "-pvalidate_opt", 1),
    )
    plan = load_image(file)
    assert plan.id_block is not None
    assert plan.id_auth is not None
    block, auth = IdBlock.decode(plan.id_block), IdAuth.decode(plan.id_auth)
    assert measure(plan).digest == block.ld
    assert check_signatures(block, auth) == []


def test_build_when_igvm_tooling_reads_the_file_says_what_we_wrote(
    tooling: Callable[..., str], tmp_path: Path
) -> None:
    contents = hashlib.shake_128(b"kvmlaunch").digest(3 * 4096)
    image = elf64([Seg(0x100000, contents, memsz=0x5000)])
    plan = for_igvm(load_image(image, PlanOptions(vmsa_mode="direct", policy=0xB0000)))
    file = tmp_path / "ours.igvm"
    file.write_bytes(b"".join(bytes(part) for part in build(plan)))
    dump = tooling(DUMP, file)
    vmsa = plan.steps[-1]
    wanted = [step.gpa + n * 4096 for step, n in plan.pages() if step is not vmsa]
    pages = re.findall(r"PAGE_DATA\(\w+\)\{ GPA:(0x\w+) CompatibilityMask:0x1 .* Flags:0x0", dump)
    assert [int(gpa, 16) for gpa in pages] == wanted
    contexts = re.findall(r"IGVM_VHT_VP_CONTEXT\(\w+\)\{ GPA:(0x\w+) ", dump)
    assert {int(gpa, 16) for gpa in contexts} == {vmsa.gpa}
    assert "Policy:0xb0000 " in dump
