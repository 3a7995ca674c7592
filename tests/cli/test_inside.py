"""run --trace, --gdb with the GDB of this machine, and what a failed guest leaves on stderr."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cli.command import Cli, command
from tests.guests import build
from tests.host import require_kvm, require_simulated_cpu
from tests.images.builders import Seg, elf64

SECONDS = 40


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example guests."""
    require_simulated_cpu()
    return build(tmp_path_factory.mktemp("guests"))


def debug(image: Path, *commands: str, options: tuple[str, ...]) -> tuple[str, str]:
    """What GDB and the guest say: a run that waits for it, and GDB in batch mode."""
    if shutil.which("gdb") is None:
        pytest.skip("there is no gdb (apt install gdb)")
    run = subprocess.Popen(
        command("run", *options, "--gdb", "0", "--timeout", SECONDS, image),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert run.stderr is not None
        for line in run.stderr:
            found = re.search(r"target remote (127\.0\.0\.1:\d+)", line)
            if found:
                break
        else:
            raise AssertionError("the run doesn't say where it listens")
        script = ["-ex", f"target remote {found[1]}"]
        for text in commands:
            script += ["-ex", text]
        gdb = subprocess.run(
            ["gdb", "-nx", "-batch", *script, str(image)],
            check=False,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        out, _ = run.communicate(timeout=SECONDS)
    finally:
        run.kill()
        run.communicate()
    return gdb.stdout + gdb.stderr, f"{out}rc={run.returncode}"


@pytest.mark.parametrize("host", ["sim snp", "sim plain", "kvm plain"])
def test_gdb_when_stock_walks_through_hello(guests: Path, host: str) -> None:
    platform, vm_type = host.split()
    if platform == "kvm":
        require_kvm()
    told, ran = debug(
        guests / "hello.elf",
        "info threads",
        "stepi",
        "print/x $cr0",
        "break guest_main",
        "continue",
        "print/x $efer & 0x400",
        "x/i $pc",
        "print $xmm0",
        "stepi",
        "delete",
        "continue",
        options=("--platform", platform, "--vm-type", vm_type),
    )
    assert "Thread 1 (vCPU 0)" in told
    assert "in start ()" in told, "symbols in the 32-bit stage"
    assert "$1 = 0x11" in told, "protected mode, no paging"
    assert re.search(r"Breakpoint 1, 0x[0-9a-f]+ in guest_main \(\)", told)
    assert "$2 = 0x400" in told, "long mode"
    assert "exited normally" in told
    assert ran.startswith("hello from a kvmlaunch guest\n")
    assert ran.endswith("rc=0")


def test_gdb_when_breakpoints_are_neighbours_leaves_rip_where_it_is(tmp_path: Path) -> None:
    """Unless told otherwise it moves RIP back by the length of INT3, onto the first of them."""
    require_simulated_cpu()
    image = tmp_path / "jump.elf"
    # jmp 1f; nop; 1: nop; mov al, 0; out 0xf4, al
    image.write_bytes(elf64([Seg(0x100000, bytes.fromhex("eb01 90 90 b000 e6f4"))]))
    told, ran = debug(
        image,
        *("break *0x100002", "break *0x100003", "continue", "print/x $rip", "continue"),
        options=("--platform", "sim", "--vm-type", "plain"),
    )
    assert "$1 = 0x100003" in told
    assert ran.endswith("rc=0")


def test_gdb_when_guest_is_protected_by_hardware_is_bad_input(cli: Cli, halt: Path) -> None:
    done = cli("run", "--platform", "kvm", "--gdb", "0", halt)
    assert done.code == 2
    assert len(done.errors) == 1
    assert "protected guest" in done.err


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_gdb_when_port_is_none_is_bad_input(cli: Cli, halt: Path, port: str) -> None:
    done = cli("run", "--platform", "sim", f"--gdb={port}", halt)
    assert (done.code, len(done.errors)) == (2, 1)


@pytest.mark.parametrize("kind", ["pages", "insn"])
def test_trace_when_host_is_real_is_bad_input(cli: Cli, halt: Path, kind: str) -> None:
    done = cli("run", "--platform", "kvm", "--vm-type", "plain", "--trace", kind, halt)
    assert (done.code, len(done.errors)) == (2, 1)
    assert f"--trace {kind}" in done.err


def test_trace_when_written_as_json_has_all_kinds_with_symbols(
    cli: Cli, guests: Path, tmp_path: Path
) -> None:
    out = tmp_path / "trace"
    kinds = [word for kind in ("exits", "pages", "insn") for word in ("--trace", kind)]
    done = cli(
        *("run", "--platform", "sim", *kinds, "--trace-format", "json"),
        *("--trace-out", out, guests / "hello.elf"),
    )
    assert done.code == 0
    assert done.out.startswith("hello from a kvmlaunch guest\n")
    events = [json.loads(line) for line in out.read_text().splitlines()]
    assert {event["trace"] for event in events} == {"exits", "pages", "insn"}
    assert events[0]["symbol"] == "start"
    names = {event["name"] for event in events}
    assert {"VMGEXIT msr HV_FEATURES", "VMGEXIT IOIO", "KVM_EXIT_HYPERCALL", "page-state"} <= names


def test_trace_when_no_file_is_named_goes_to_stderr(cli: Cli, guests: Path) -> None:
    done = cli("-q", "run", "--platform", "sim", "--trace", "exits", guests / "hello.elf")
    assert done.code == 0
    lines = done.err.splitlines()
    assert all(line.startswith("exits vcpu0 0x") for line in lines)
    assert any("<ghcb_msr+" in line and "HV_FEATURES" in line for line in lines)


@pytest.mark.parametrize("name", ["", "folder", "folder/none/trace"])
def test_trace_when_its_file_cant_be_made_is_one_sentence(
    cli: Cli, halt: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "folder").mkdir()
    out = f"{tmp_path}/{name}" if name else ""
    done = cli(
        *("-q", "run", "--platform", "sim", "--vm-type", "plain"),
        *("--trace", "exits", "--trace-out", out, halt),
    )
    assert (done.code, len(done.errors)) == (1, 1)
    assert done.err.startswith(f"kvmlaunch: trace {out}: ")


def test_trace_out_when_nothing_is_traced_is_bad_input(cli: Cli, halt: Path) -> None:
    assert cli("run", "--platform", "sim", "--trace-out", "x", halt).code == 2


def test_trace_when_disk_is_full_says_so_and_the_guest_goes_on(cli: Cli, guests: Path) -> None:
    done = cli(
        *("run", "--platform", "sim", "--trace", "insn", "--trace-out", "/dev/full"),
        guests / "hello.elf",
    )
    assert done.code == 0
    assert "trace /dev/full: No space left on device" in done.err


@pytest.mark.parametrize("platform", ["sim", "kvm"])
def test_end_when_guest_fails_shows_last_exits_and_registers(
    cli: Cli, tmp_path: Path, platform: str
) -> None:
    if platform == "kvm":
        require_kvm()
    else:
        require_simulated_cpu()
    path = tmp_path / "spin.bin"
    # mov ax, 0x1234; out 0x80, al; jmp .
    path.write_bytes(bytes.fromhex("b83412 e680 ebfe"))
    done = cli("run", "--platform", platform, "--vm-type", "plain", "--timeout", "1", path)
    assert done.code == 124
    assert "last exits:\n  vCPU 0: KVM_EXIT_IO out port=0x80" in done.err
    assert re.search(r"rax 0000000000001234", done.err)
    assert "registers of vCPU 0:" in done.err


def test_end_when_guest_ends_well_shows_nothing_more(cli: Cli, halt: Path) -> None:
    require_simulated_cpu()
    done = cli("run", "--platform", "sim", "--vm-type", "plain", halt)
    assert done.code == 0
    assert "registers" not in done.err
