"""Every example runs, is short, and prints what it promises; every guest ends as it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvmlaunch.uapi import RealPlatform
from tests import guest_ends
from tests.guests import EXAMPLES, require_build_tools

SCRIPTS = sorted(EXAMPLES.glob("*.py"))
GUESTS = sorted(path.stem for path in (EXAMPLES / "guests").glob("*.[cs]"))
MAX_LINES = 40
SECONDS = 60
PLAIN = ("--platform", "kvm", "--vm-type", "plain")

# What each script prints, line by line, as a pattern; ... repeats the one before it.
PRINTS: dict[str, list[Any]] = {
    "first_difference.py": [
        r"milan [0-9a-f]{96}",
        r"genoa [0-9a-f]{96}",
        r"first difference: VMSA 0xfffffffff000 kvm-sync",
        r"rdx \(offset 0x310\): 0xa00f11 != 0xa10f10",
    ],
    "one_igvm_file.py": [
        r"built: [0-9]+ bytes, launch digest [0-9a-f]{96}",
        r"1 vCPUs: hello from a kvmlaunch guest; vCPU 0: the guest wrote 0x0 to the exit port",
        r"4 vCPUs: hello from a kvmlaunch guest; vCPU 0: the guest wrote 0x0 to the exit port",
    ],
    "order_a_fault.py": [
        r"SNP_LAUNCH_UPDATE ret=-5 fw_error=26 'RMP page state is incorrect' gpa=0x3000 type=0x1",
        r"Page: page 2 of image .*",
        r"2 pages were taken before; the launch is <Started .*>",
    ],
    "vmsa_page_type.py": [
        r"platform: sim",
        r"sync   [0-9a-f]{96}",
        r"       kernel 7\.0; depends on number of vCPUs, CPU model",
        r"page   [0-9a-f]{96}",
        r"       kernel vmsa-page; depends on CPU model, GPA of the VMSA, a register of the VMSA",
        r"direct [0-9a-f]{96}",
        r"       kernel direct-vmsa; depends on CPU model, GPA of the VMSA, a register of the VMSA",
    ],
    "walk.py": [
        r".*hello\.elf \(elf\): [0-9]+ pages in 3 steps, 1 vCPU, 256 MiB, policy 0x30000",
        r"  0x1000 1 NORMAL start-info",
        r"  0x100000 [0-9]+ NORMAL segment",
        r"  0x10[0-9]000 [0-9]+ ZERO bss",
        r"predicted [0-9a-f]{96}",
        r" +0 0x000000001000 NORMAL .* start-info \(kvmlaunch:start-info\)",
        r" +1 0x000000100000 NORMAL .* segment \(hello\.elf\+0x[0-9a-f]+\)",
        r" +[0-9]+ 0x0000001[0-9a-f]{5} (NORMAL|ZERO) .* (segment|bss) \(hello\.elf.*\)",
        ...,
        r" +[0-9]+ 0xfffffffff000 VMSA .* vmsa 0 \(kvm-sync\)",
        r"<Finished .*>",
        r"prediction and host agree on all [0-9]+ pages",
    ],
}


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    """Build the guests in place, as the README says: examples find them there."""
    require_build_tools()
    subprocess.run(["sh", str(EXAMPLES / "guests" / "build.sh")], check=True, timeout=SECONDS)


def cli(*args: object) -> subprocess.CompletedProcess[str]:
    """Run the command line as a process."""
    return run("-m", "kvmlaunch.cli", *args)


def run(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder that isn't the repository's."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
        cwd=cwd,
    )


def guest(name: str) -> Path:
    """The built guest."""
    return EXAMPLES / "guests" / f"{name}.elf"


def test_every_script_has_its_output_here() -> None:
    assert [path.name for path in SCRIPTS] == sorted(PRINTS)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_prints_what_it_promises(path: Path, tmp_path: Path) -> None:
    done = run(path, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    wanted = list(PRINTS[path.name])
    lines = done.stdout.splitlines()
    if ... in wanted:
        # How many pages a guest has is the compiler's affair.
        at = wanted.index(...)
        wanted[at : at + 1] = [wanted[at - 1]] * (len(lines) - len(wanted) + 1)
    for line, pattern in zip(lines, wanted, strict=True):
        assert re.fullmatch(pattern, line)


def test_walk_measures_what_the_command_line_measures(tmp_path: Path) -> None:
    (line,) = [
        line
        for line in run(EXAMPLES / "walk.py", cwd=tmp_path).stdout.splitlines()
        if line.startswith("predicted ")
    ]
    assert cli("measure", guest("hello")).stdout == line.removeprefix("predicted ") + "\n"


@pytest.mark.parametrize("name", GUESTS)
def test_guest_on_the_simulated_host_ends_with_its_exit_code(name: str) -> None:
    end = guest_ends.end_of(name, "sim")
    done = run_guest(name, end, "--platform", "sim")
    assert re.search(r"^prediction and host agree on all [0-9]+ pages$", done.stderr, re.MULTILINE)
    assert end.detail in done.stderr


@pytest.mark.parametrize("name", GUESTS)
def test_guest_on_kvm_ends_with_its_exit_code(real_kvm: RealPlatform, name: str) -> None:
    end = guest_ends.end_of(name, "plain")
    done = run_guest(name, end, *PLAIN)
    # The first line is the platform.
    assert end.detail in done.stderr.splitlines()[1]
    assert done.stderr.splitlines()[1].startswith("kvmlaunch: ") == (end.code != 0)


def run_guest(name: str, end: guest_ends.End, *how: str) -> subprocess.CompletedProcess[str]:
    """Run a guest, whose text and exit code must be those of its end."""
    vcpus = guest_ends.VCPUS.get(name, 1)
    seconds = guest_ends.ENDLESS_SECONDS if end.kind == "timeout" else 20
    done = cli("run", *how, "--timeout", seconds, "--vcpus", vcpus, guest(name))
    assert done.returncode == end.code
    assert re.fullmatch(end.text, done.stdout)
    return done


def test_guests_when_built_in_another_folder_are_the_same(guests: Path) -> None:
    for name in GUESTS:
        assert (guests / f"{name}.elf").read_bytes() == guest(name).read_bytes()


@pytest.mark.parametrize("name", GUESTS)
def test_guest_says_in_its_head_how_it_ends(name: str) -> None:
    (source,) = (EXAMPLES / "guests").glob(f"{name}.[cs]")
    head = source.read_text().partition("*/")[0] if source.suffix == ".c" else source.read_text()
    ends = {kind: guest_ends.end_of(name, kind) for kind in ("plain", "snp")}
    for kind, end in ends.items():
        assert f"exit code {end.code}" in head, kind
        assert f'"{end.kind}"' in head, kind


def test_misbehaving_guest_when_entered_elsewhere_dies_of_a_triple_fault(
    real_kvm: RealPlatform,
) -> None:
    done = cli("run", *PLAIN, "--timeout", 20, "--entry", "0x100100", guest("misbehave"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "kvmlaunch: vCPU 0: KVM_EXIT_SHUTDOWN: triple fault" in done.stderr
