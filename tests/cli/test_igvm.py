"""IGVM files on the command line: built, shown, measured, checked and run."""

from __future__ import annotations

import json
import os
import re
import shlex
import struct
import subprocess
from pathlib import Path

import pytest

from tests.cli.command import Cli, page_events, shown
from tests.guests import HALT
from tests.images import igvm_files as f

SIM = ("run", "--platform", "sim")


def digest(cli: Cli, *args: object) -> str:
    done = cli("-q", "measure", *args)
    assert (done.code, done.err) == (0, "")
    return done.out.strip()


@pytest.mark.parametrize("version", [1, 2])
def test_igvm_when_an_image_goes_all_the_way_has_one_digest(
    cli: Cli, halt: Path, tmp_path: Path, version: int
) -> None:
    file, log = tmp_path / "halt.igvm", tmp_path / "log.jsonl"
    options = ("--vmsa-mode", "direct", "--vcpus", 2, "--vmsa-gpa", "0x9000")
    image = digest(cli, *options, halt)
    built = cli("igvm", "build", *options, halt, "-o", file, "--igvm-version", version)
    assert (built.code, built.out) == (0, f"{image}\n")
    found = shown(cli, file)
    assert found["version"] == version
    assert found["digests"][0] == {"order": "file", "digest": image, "why": []}
    assert digest(cli, "--igvm", file) == digest(cli, "--igvm", file, "--order", "file") == image
    assert digest(cli, file) == image
    done = cli(*SIM, "--vcpus", 2, "--igvm", file, "--log", log)
    assert done.code == 0
    assert f"launch digest {image}" in done.err.splitlines()
    assert page_events(log)[-1]["digest"] == image


def test_run_when_the_vmsa_is_before_the_pages_gives_the_files_digest(
    cli: Cli, halting: Path
) -> None:
    file_order = digest(cli, "--order", "file", halting)
    for mode in ("direct", "page"):
        done = cli(*SIM, "--vmsa-mode", mode, halting)
        assert done.code == 0
        assert f"launch digest {file_order}" in done.err.splitlines()
        assert "policy 0xb0000" in done.err
    assert digest(cli, "--order", "kvm", halting) != file_order


def test_run_when_the_kernel_makes_the_vmsas_refuses_or_names_what_changes(
    cli: Cli, halting: Path
) -> None:
    refused = cli(*SIM, "--sim", "6.12", halting)
    assert (refused.code, refused.out) == (1, "")
    assert "the launch digest changes from" in refused.err
    done = cli(*SIM, "--sim", "6.12", "--allow-digest-change", halting)
    assert done.code == 0
    kvm = digest(cli, "--order", "kvm", halting)
    assert f"launch digest {kvm}" in done.err.splitlines()
    assert digest(cli, "--vmsa-mode", "sync", halting) == kvm


@pytest.mark.parametrize("vcpus", [1, 4])
def test_run_when_one_id_block_is_for_any_number_of_vcpus_is_confirmed(
    cli: Cli, halt: Path, tmp_path: Path, keys: tuple[Path, Path], vcpus: int
) -> None:
    file = tmp_path / "signed.igvm"
    id_key, author_key = keys
    built = cli(
        *("igvm", "build", "--vmsa-mode", "direct", halt, "-o", file, "--id-key", id_key),
        *("--author-key", author_key, "--guest-svn", 7, "--family-id", "abcd" + "00" * 14),
    )
    assert built.code == 0, built.err
    (block,) = (row for row in shown(cli, file)["headers"] if row["type"] == "SNP_ID_BLOCK")
    assert (block["ld"], block["guest_svn"]) == (built.out.strip(), 7)
    assert block["family_id"] == "abcd".ljust(32, "0")
    assert cli(*SIM, "--vcpus", vcpus, file).code == 0
    # Another policy than the signed one, and another digest.
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    done = cli(*SIM, "--vcpus", vcpus, file)
    assert done.code == 1
    assert "'Bad measurement'" in done.errors[0]


def test_run_when_the_command_line_contradicts_the_file_shows_both(cli: Cli, halting: Path) -> None:
    for command in ("run", "measure", "inspect"):
        done = cli(command, "--policy", "0x30000", halting)
        assert (done.code, done.out) == (2, "")
        assert "the policy is 0xb0000, but --policy says 0x30000" in done.errors[0]


def test_run_when_the_guest_reads_parameters_gets_the_launch_at_hand(
    cli: Cli, tmp_path: Path
) -> None:
    # mov al,[0x3000]; movzx eax,al; shl eax,16; or ax,0x100; xor edx,edx; mov ecx,0xc0010130;
    # wrmsr; vmgexit: a termination request by the GHCB MSR protocol with the count as its code.
    code = bytes.fromhex("a00030 660fb6c0 66c1e010 0d0001 6631d2 66b9300101c0 0f30 f30f01d9")
    headers = (
        *(f.area(0), f.parameter(0x307, 0), f.insert(0x3000, 0), f.page(0x1000, 0)),
        f.context(0x5000, 0x1000),
    )
    file = f.write(tmp_path / "count.igvm", *headers, data=code.ljust(4096, b"\0") + f.vmsa())
    for vcpus in (3, 4):
        done = cli(*SIM, "--vcpus", vcpus, file)
        assert (done.code, f"code {vcpus} " in done.errors[0]) == (1, True), done.errors
    assert digest(cli, "--vcpus", 3, file) == digest(cli, "--vcpus", 4, file)


def test_run_when_a_page_is_shared_with_its_bytes_launches_it_not(cli: Cli, tmp_path: Path) -> None:
    headers = (
        *(f.page(0x1000, 0), f.page(0x6000, 0, flags=4), f.error_range(0x8000, 0x1000)),
        f.context(0x5000, 0x1000),
    )
    file = f.write(tmp_path / "shared.igvm", *headers, data=HALT.ljust(4096, b"\0") + f.vmsa())
    done = cli(*SIM, file)
    assert done.code == 0
    assert f"launched {file}: 2 pages measured" in done.err
    text = cli("inspect", file).out
    assert re.search(
        r"0x000000006000\.\.0x000000007000 +1 shared \(shared\.igvm header\[2\]\)", text
    )
    shared = json.loads(cli("inspect", "--json", file).out)["shared"]
    assert [(part["gpa"], part["label"]) for part in shared] == [
        ("0x6000", "shared"),
        ("0x8000", "error-range"),
    ]


def test_show_when_orders_differ_says_which_header_is_why(cli: Cli, tmp_path: Path) -> None:
    headers = (
        *(f.area(0), f.page(0x1000, 0), f.insert(0x10000, 0), f.context(0x5000, 0x1000)),
        f.page(0x2000, 0),
    )
    file = f.write(tmp_path / "orders.igvm", *headers, data=f.pattern(1) + f.vmsa())
    orders = shown(cli, file)["digests"]
    assert [order["order"] for order in orders] == ["file", "kvm", "qemu"]
    assert len({order["digest"] for order in orders}) == 3
    for order in orders:
        assert digest(cli, "--order", order["order"], file) == order["digest"]
    gpa = "header 4 (VP_CONTEXT) is measured at GPA 0x5000, but KVM measures every VMSA at "
    last = "header 4 (VP_CONTEXT) is before the pages of header 5, but KVM measures VMSAs last"
    insert = (
        "header 3 (PARAMETER_INSERT) is measured before the pages of header 2, which QEMU keeps "
        "back until the next page"
    )
    assert orders[0]["why"] == []
    assert orders[1]["why"] == [f"{gpa}0xfffffffff000", last]
    assert orders[2]["why"] == [insert, f"{gpa}0xfffffffff000", last]
    text = cli("igvm", "show", file).out
    for line in (f"file  {orders[0]['digest']}", f"      {insert}"):
        assert line in text.splitlines()


def test_show_when_fields_are_lost_or_vcpus_have_no_context_says_so(
    cli: Cli, tmp_path: Path
) -> None:
    raw = bytearray(f.vmsa())
    raw[0xCB] = 3  # cpl, which KVM takes from SS
    file = f.write(tmp_path / "lost.igvm", f.context(f.KVM_GPA, 0), data=bytes(raw))
    (kvm,) = (
        order for order in shown(cli, file, "--vcpus", 2)["digests"] if order["order"] == "kvm"
    )
    assert kvm["why"] == [
        "vCPU 1 has no VP_CONTEXT, but KVM measures a VMSA of each vCPU",
        "header 1 (VP_CONTEXT): KVM can't carry cpl (offset 0xcb): 0x3 != 0x0",
    ]


def test_show_when_kvm_would_refuse_the_state_has_no_digest_for_it(
    cli: Cli, tmp_path: Path
) -> None:
    raw = bytearray(f.vmsa())
    struct.pack_into("<Q", raw, 0x160, 0x401)  # dr7
    file = f.write(tmp_path / "dr7.igvm", f.context(f.KVM_GPA, 0), data=bytes(raw))
    file_order, kvm, qemu = shown(cli, file)["digests"]
    assert (bool(file_order["digest"]), kvm["digest"], qemu["digest"]) == (True, None, None)
    assert "dr7 0x401 has bits besides 0x400" in kvm["why"][0]


def test_show_when_contexts_are_all_at_kvms_gpa_has_one_digest(
    cli: Cli, halt: Path, tmp_path: Path
) -> None:
    file = tmp_path / "sync.igvm"
    assert cli("igvm", "build", "--vcpus", 3, halt, "-o", file).code == 0
    orders = shown(cli, file)["digests"]
    assert {order["digest"] for order in orders} == {digest(cli, "--vcpus", 3, halt)}
    assert all(order["why"] == [] for order in orders)


def test_show_text_has_a_line_for_each_run_of_pages(cli: Cli, tmp_path: Path) -> None:
    headers = (
        *(f.policy(), f.area(0), f.parameter(0x307, 0, 8), f.insert(0x9000, 0)),
        *(f.page(0x1000 * n, 0) for n in range(1, 4)),
        *(f.page(0x4000), (1 << 31 | 0x3FF, b"?")),
    )
    file = f.write(tmp_path / "rows.igvm", *headers, data=f.pattern(1))
    lines = cli("igvm", "show", file).out.splitlines()
    size = file.stat().st_size
    assert lines[:2] == [
        f"{file}: IGVM version 1, {size} bytes",
        "platform type=SEV_SNP mask=0x1 highest_vtl=0 shared_gpa_boundary=0x0",
    ]
    rows = [re.sub(r" +", " ", line).strip() for line in lines[2:9]]
    base = size - 4096
    assert rows == [
        "1 0x30 GUEST_POLICY mask=0x1 policy=0x30000",
        "2 0x48 PARAMETER_AREA number_of_bytes=0x1000 area=0",
        "3 0x60 VP_COUNT_PARAMETER area=0 byte_offset=0x8",
        "4 0x70 PARAMETER_INSERT mask=0x1 gpa=0x9000 area=0",
        "5..7 0x88 PAGE_DATA mask=0x1 gpa=0x1000 size=0x3000 data_type=NORMAL "
        f"file_offset={base:#x}",
        "8 0xe8 PAGE_DATA mask=0x1 gpa=0x4000 size=0x1000 data_type=NORMAL",
        "skipped: 1 headers of unknown optional types",
    ]


def test_measure_when_pages_have_no_data_may_read_them_as_zero(cli: Cli, tmp_path: Path) -> None:
    file = f.write(tmp_path / "zero.igvm", f.page(0x1000), data=bytes(8))
    assert digest(cli, file) != digest(cli, "--native-zero", file)
    assert shown(cli, file, "--native-zero")["digests"][0]["digest"] == digest(
        cli, "--native-zero", file
    )


def test_build_when_zero_pages_become_normal_says_so(
    cli: Cli, guests: Path, tmp_path: Path
) -> None:
    file, options = tmp_path / "hello.igvm", ("--vmsa-mode", "direct", guests / "hello.elf")
    done = cli("igvm", "build", *options, "-o", file)
    assert done.code == 0
    assert re.search(r"IGVM has no pages of type ZERO: [0-9]+ become NORMAL", done.err)
    assert done.out.strip() == digest(cli, file) != digest(cli, *options)
    native = cli("igvm", "build", "--native-zero", *options, "-o", file)
    assert "ZERO" not in native.err
    assert native.out.strip() == digest(cli, "--native-zero", file) == digest(cli, *options)
    assert cli(*SIM, "--native-zero", file).out.startswith("hello from a kvmlaunch guest\n")


def test_build_when_parameters_are_asked_for_has_them(cli: Cli, halt: Path, tmp_path: Path) -> None:
    file = tmp_path / "parameters.igvm"
    values = "vp-count,memory-map,madt@0x80000"
    assert cli("igvm", "build", halt, "-o", file, "--parameters", values).code == 0
    kinds = [row["type"] for row in shown(cli, file)["headers"]]
    assert kinds[1:6] == [
        *("PARAMETER_AREA", "VP_COUNT_PARAMETER", "MEMORY_MAP", "MADT", "PARAMETER_INSERT")
    ]


BAD_BUILD: dict[str, tuple[tuple[object, ...], str]] = {
    "parameter-name": (("--parameters", "cpus@0x1000"), "no value is named 'cpus'; vp-count, "),
    "parameter-gpa": (("--parameters", "madt"), "--parameters madt: not KIND[,KIND...]@GPA"),
    "parameter-overlap": (("--parameters", "madt@0x1000"), "overlaps"),
    "author-alone": (("--author-key", "x.pem"), "--author-key needs --id-key FILE"),
    "no-key": (("--id-key", "/nonexistent.pem"), "/nonexistent.pem: can't be read"),
    "family-alone": (("--family-id", "00" * 16), "--family-id needs --id-key FILE"),
    "order": (("--vm-type", "plain"), "unrecognized arguments"),
}


@pytest.mark.parametrize("name", BAD_BUILD)
def test_build_when_options_make_no_sense_writes_nothing(
    cli: Cli, halt: Path, tmp_path: Path, name: str
) -> None:
    options, sentence = BAD_BUILD[name]
    file = tmp_path / "bad.igvm"
    done = cli("igvm", "build", halt, "-o", file, *options)
    assert (done.code, done.out) == (2, "")
    assert sentence in done.err
    assert sorted(tmp_path.iterdir()) == [halt]


def test_build_when_the_image_has_an_id_block_makes_no_other(
    cli: Cli, halt: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    signed, again = tmp_path / "signed.igvm", tmp_path / "again.igvm"
    assert cli("igvm", "build", halt, "-o", signed, "--id-key", keys[0]).code == 0
    for command in (("igvm", "build", "-o", again), SIM):
        done = cli(*command, "--id-key", keys[0], signed)
        assert done.code == 2
        assert "--id-key makes an ID block, but" in done.errors[0]
    # Without a key the one that it has stays.
    assert cli("igvm", "build", signed, "-o", again).code == 0
    assert again.read_bytes() == signed.read_bytes()


def test_build_when_the_output_is_the_image_is_refused(cli: Cli, halt: Path) -> None:
    before = halt.read_bytes()
    done = cli("igvm", "build", halt, "-o", halt)
    assert done.code == 2
    assert "would overwrite" in done.errors[0]
    assert halt.read_bytes() == before


def test_build_when_there_is_no_room_leaves_nothing_half_written(
    cli: Cli, halt: Path, tmp_path: Path
) -> None:
    done = cli("igvm", "build", halt, "-o", tmp_path / "missing" / "x.igvm")
    assert (done.code, len(done.errors)) == (1, 1)
    done = cli("igvm", "build", halt, "-o", tmp_path)
    assert done.code == 1
    assert done.errors[0].endswith("is a folder")
    full = cli("igvm", "build", halt, "-o", "/dev/full")
    assert full.code == 1
    assert full.errors == ["kvmlaunch: /dev/full: is not a file"]
    assert sorted(tmp_path.iterdir()) == [halt]


def test_build_when_a_file_is_there_replaces_it_with_the_usual_mode(
    cli: Cli, halt: Path, tmp_path: Path
) -> None:
    file = tmp_path / "x.igvm"
    file.write_bytes(b"old")
    assert cli("igvm", "build", halt, "-o", file).code == 0
    assert file.read_bytes()[:4] == b"IGVM"
    mask = os.umask(0)
    os.umask(mask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask


def test_igvm_without_a_way_is_a_usage_error(cli: Cli) -> None:
    assert cli("igvm").code == 2


def test_show_when_stdout_is_closed_ends_quietly(halting: Path) -> None:
    from tests.cli.command import command

    pipe = subprocess.run(
        f"{shlex.join(command('igvm', 'show', halting))} | head -c 1",
        shell=True,
        capture_output=True,
        timeout=30,
        check=True,
    )
    assert pipe.stderr == b""
