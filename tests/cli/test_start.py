"""What the start of a command imports: as little as it needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvmlaunch
from kvmlaunch.cli.talk import help_width
from tests.images.builders import ovmf

# What measuring firmware has no use for, and what takes longer than the measurement.
IDLE = {
    *("base64", "difflib", "hashlib", "pathlib", "platform", "shutil", "tempfile", "typing"),
    *("argparse", "bisect", "collections", "copy", "dataclasses", "enum", "functools", "gettext"),
    *("importlib", "inspect", "json", "locale", "operator", "types"),
    *("re", "warnings", "weakref", "kvmlaunch.cli.parser", "kvmlaunch.images.vmm_file"),
    *("uuid", "kvmlaunch.abi.policy", "kvmlaunch.launch.legacy", "kvmlaunch.launch.pagelog"),
    *("kvmlaunch.launch.records", "kvmlaunch.launch.sync_fallback"),
    *("kvmlaunch.images.elf", "kvmlaunch.images.flat", "kvmlaunch.images.ovmf_hashes"),
    *("kvmlaunch.images.svsm", "kvmlaunch.images.pvh", "kvmlaunch.images.igvm"),
    *("kvmlaunch.images.vmsas", "kvmlaunch.launch.explain", "kvmlaunch.launch.files"),
    "kvmlaunch.abi.blob",
}

HEAVY = {
    *("_cffi_backend", "cryptography", "elftools", "psutil", "unicorn"),
    *("kvmlaunch.uapi", "kvmlaunch.kvm", "kvmlaunch.sim", "kvmlaunch.selftest", "kvmlaunch.snp"),
}


def imported(*args: object) -> set[str]:
    """The modules that a command has imported by its end, beside those of a bare Python.

    Without site, since what an editable installation hooks in there imports half of them.
    """
    words = [str(arg) for arg in args]
    path = [str(Path(kvmlaunch.__file__).parents[1]), *sys.path]
    program = (
        f"import sys; before = set(sys.modules); sys.path = {path!r}\n"
        "from kvmlaunch.cli import main\n"
        "try:\n"
        f"    code = main({words!r})\n"
        "except SystemExit as end:\n"
        "    code = end.code\n"
        "print(code, *sorted(set(sys.modules) - before), file=sys.stderr)\n"
    )
    command = [sys.executable, "-S", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    code, *modules = done.stderr.splitlines()[-1].split()
    assert code == "0"
    return set(modules)


def test_version_imports_nothing_but_the_version() -> None:
    ours = {"kvmlaunch", "kvmlaunch.cli", "kvmlaunch.version"}
    assert imported("--version") - {"__future__"} == ours


def test_version_when_options_stand_beside_it_is_printed_all_the_same() -> None:
    assert "argparse" in imported("-q", "--version")


@pytest.mark.parametrize("command", ["measure", "inspect"])
def test_command_that_needs_no_host_imports_no_host(halt: Path, command: str) -> None:
    modules = imported(command, halt)
    # What hashes the pages is compiled, too.
    assert HEAVY & modules <= ({"_cffi_backend"} if command == "measure" else set())
    assert {"kvmlaunch.cli.run", "kvmlaunch.cli.selftest"} & modules == set()


def test_measure_of_firmware_imports_nothing_idle(tmp_path: Path) -> None:
    firmware = tmp_path / "OVMF.fd"
    firmware.write_bytes(ovmf())
    modules = imported("measure", "--ovmf", firmware)
    assert modules & (HEAVY | IDLE) <= {"_cffi_backend"}


def test_igvm_show_and_build_import_no_host(halt: Path, tmp_path: Path) -> None:
    file = tmp_path / "halt.igvm"
    for words in (("igvm", "build", halt, "-o", file), ("igvm", "show", file)):
        assert HEAVY & imported("-q", *words) <= {"_cffi_backend"}


@pytest.mark.parametrize("command", ["run", "measure", "inspect", "selftest"])
def test_help_of_a_command_imports_no_other(command: str) -> None:
    others = {"run", "measure", "inspect", "selftest"} - {command}
    modules = imported(command, "--help")
    assert {f"kvmlaunch.cli.{name}" for name in others} & modules == set()


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        pytest.param("main()", "True True", id="the process's own command"),
        pytest.param("main(sys.argv[1:])", "True False", id="a command of another program"),
    ],
)
def test_collector_when_a_command_has_run_is_on(halt: Path, call: str, answer: str) -> None:
    program = (
        "import gc, sys; from kvmlaunch.cli import main\n"
        f"sys.argv = ['kvmlaunch', 'measure', {str(halt)!r}]\n"
        f"{call}; print(gc.isenabled(), gc.get_freeze_count() > 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.splitlines()[1:] == [answer]


@pytest.mark.parametrize("columns", ["50", "0", "-1", "x", "", None])
def test_width_of_help_is_that_of_argparse(
    columns: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert help_width() == shutil.get_terminal_size().columns - 2
