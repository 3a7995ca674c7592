"""kvmlaunch inspect: the plan, for people and for machines."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.command import Cli


def test_inspect_debian_ovmf_counts_its_pages(cli: Cli, ovmf: Path) -> None:
    # 2 MiB of firmware; the sections of edk2's OvmfPkgX64 build, edk2-stable202211.
    done = cli("inspect", ovmf)
    assert done.code == 0
    assert "pages: 512 NORMAL, 29 ZERO, 1 SECRETS, 1 CPUID, 1 VMSA" in done.out.splitlines()


def test_inspect_debian_ovmf_lists_steps_in_qemus_order(cli: Cli, ovmf: Path) -> None:
    plan = json.loads(cli("inspect", "--json", ovmf).out)
    assert [(s["gpa"], s["pages"], s["type"]) for s in plan["steps"]] == [
        ("0xffe00000", 512, "NORMAL"),
        ("0x800000", 9, "ZERO"),
        ("0x80a000", 3, "ZERO"),
        ("0x80d000", 1, "SECRETS"),
        ("0x80e000", 1, "CPUID"),
        ("0x80f000", 17, "ZERO"),
    ]


def test_inspect_ovmf_without_metadata_says_what_is_missing(cli: Cli, ovmf_code_4m: Path) -> None:
    done = cli("inspect", ovmf_code_4m)
    assert (done.code, done.out, len(done.errors)) == (2, "", 1)
    assert done.errors[0].startswith(
        f"kvmlaunch: {ovmf_code_4m}: the GUIDed table has no SEV metadata "
        "(GUID dc886566-984a-4798-a75e-5585a7bf67cc with at least one section), "
        "so SEV-SNP can't launch this build"
    )


def test_inspect_flat_shows_memory_pages_and_start(cli: Cli, halt: Path) -> None:
    lines = cli("inspect", halt).out.splitlines()
    assert lines[0] == f"{halt}: flat"
    assert "  0x000000000000..0x000010000000    262144 KiB  ram" in lines
    assert "  0x000000001000..0x000000002000      1 NORMAL     image (halt.bin)" in lines
    assert "  rip              0x1000" in lines


def test_inspect_names_equal_vcpus_once(cli: Cli, halt: Path) -> None:
    lines = cli("inspect", "--vcpus", 4, halt).out.splitlines()
    assert [line for line in lines if line.startswith("vCPU")] == [
        "vCPU 0-3 (fields that are not 0)"
    ]


def test_inspect_explains_the_policy(cli: Cli, halt: Path) -> None:
    done = cli("inspect", "--policy", "smt,debug", halt)
    assert "policy 0xb0000" in done.out.splitlines()
    assert "bit 19 DEBUG = 1" in done.out


def test_inspect_json_holds_the_plan(cli: Cli, halt: Path) -> None:
    plan = json.loads(cli("inspect", "--json", "--memory", "2M", "--vcpus", 2, halt).out)
    assert plan["schema"] == "kvmlaunch.plan/1"
    assert plan["image_type"] == "flat"
    assert plan["policy"] == "0x30000"
    assert plan["memory"] == [{"gpa": "0x0", "size": "0x200000", "label": "ram"}]
    assert plan["steps"] == [
        {"gpa": "0x1000", "pages": 1, "type": "NORMAL", "label": "image", "origin": "halt.bin"}
    ]
    assert plan["pages"] == {"NORMAL": 1, "VMSA": 2}
    assert [vcpu["rip"] for vcpu in plan["vcpus"]] == ["0x1000", "0x1000"]


def test_inspect_talks_on_stdout_only(cli: Cli, halt: Path) -> None:
    assert cli("inspect", halt).err == ""


def test_inspect_uses_no_colour_when_not_on_a_terminal(cli: Cli, halt: Path) -> None:
    assert "\x1b" not in cli("inspect", halt).out


def test_inspect_takes_no_log_since_nothing_is_measured(cli: Cli, halt: Path) -> None:
    done = cli("inspect", "--log", "x.jsonl", halt)
    assert done.code == 2
    assert "unrecognized arguments: --log" in done.err


def test_inspect_64_bit_guest_says_where_its_c_bit_is(cli: Cli, guests: Path) -> None:
    lines = cli("inspect", guests / "halt.elf").out.splitlines()
    assert "C-bit 51, in the page tables" in lines
    assert (
        json.loads(cli("inspect", "--json", "--cbitpos", 47, guests / "halt.elf").out)["cbitpos"]
        == 47
    )


def test_inspect_32_bit_guest_has_no_c_bit(cli: Cli, guests: Path) -> None:
    assert "C-bit" not in cli("inspect", guests / "hello.elf").out
    assert json.loads(cli("inspect", "--json", guests / "hello.elf").out)["cbitpos"] is None
