"""Bad input: one clear sentence, exit code 2, nothing on stdout, nothing written."""

from __future__ import annotations

import base64
import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import Cli, refused
from tests.images.builders import (
    AMDSEV_SECTIONS,
    METADATA_FROM_END,
    Seg,
    elf64,
    metadata_bytes,
    ovmf,
    standard_entries,
)

COMMANDS = ("measure", "inspect", "run")
PAGE = 4096
GOOD_ELF = elf64([Seg(0x100000, b"\xf4" * 16)])


IMAGES = {
    "empty": (b"", "the image is empty"),
    "elf-cut-in-its-header": (GOOD_ELF[:40], "the ELF header needs 0x40 bytes"),
    "elf-cut-in-a-segment": (GOOD_ELF[:-4], "segment 0 (0x100000..0x100010) ends at file offset"),
    "elf-overlapping": (
        elf64([Seg(0x100000, b"a" * 32), Seg(0x100010, b"b" * 32)]),
        "the file's bytes of segment 1 (0x100010..0x100030) overlap those of segment 0 "
        "(0x100000..0x100020)",
    ),
    "elf-beyond-memory": (
        elf64([Seg(0x4000_0000, b"\xf4")], entry=0x4000_0000),
        "segment 0 (0x40000000..0x40000001) is outside the guest's memory (0x0..0x10000000)",
    ),
    "elf-32-bit": (
        elf64([Seg(0x100000, b"\xf4")], ei_class=1),
        "32-bit ELF file; only ELF64 is loaded",
    ),
    "elf-of-arm64": (
        elf64([Seg(0x100000, b"\xf4")], machine=183),
        "an ELF file for EM_AARCH64, not EM_X86_64",
    ),
    "elf-object": (
        elf64([Seg(0x100000, b"\xf4")], etype=1),
        "an ELF file of type ET_REL, not an executable (ET_EXEC)",
    ),
    "elf-without-segments": (elf64([]), "no PT_LOAD segment, so there is nothing to load"),
    "elf-entry-nowhere": (
        elf64([Seg(0x100000, b"\xf4")], entry=0x200000),
        "the entry point 0x200000 is in no loaded segment",
    ),
    "firmware-without-metadata": (
        ovmf(entries=standard_entries(metadata=None)),
        "the GUIDed table has no SEV metadata",
    ),
    "firmware-of-odd-size": (
        bytes(100) + ovmf(),
        "firmware of 0x4064 bytes: the size must be a multiple of 4 KiB",
    ),
    "firmware-sections-overlap": (
        ovmf(metadata=metadata_bytes([(0x800000, 0x2000, 1), (0x801000, 0x1000, 2)])),
        "metadata section 1 (secrets, 0x801000..0x802000) overlaps metadata section 0 "
        "(sec-mem, 0x800000..0x802000)",
    ),
    "firmware-section-unaligned": (
        ovmf(metadata=metadata_bytes([(0x800001, 0x1000, 1)])),
        "is not a positive number of 4 KiB pages",
    ),
    "firmware-section-beyond-memory": (
        ovmf(metadata=metadata_bytes([(0x8000_0000, 0x1000, 1)])),
        "metadata section 0 (sec-mem, 0x80000000..0x80001000) is outside the guest's memory",
    ),
    "firmware-metadata-cut": (
        ovmf(metadata=metadata_bytes(AMDSEV_SECTIONS, count=0x1000)),
        "SEV metadata",
    ),
    "firmware-metadata-of-another-version": (
        ovmf(metadata=metadata_bytes(AMDSEV_SECTIONS, version=2)),
        f"offset {0x4000 - METADATA_FROM_END + 8:#x}: SEV metadata version 2 is not 1",
    ),
    "igvm": (b"IGVM" + bytes(100), "offset 0x4: format version 0 is neither 1 nor 2"),
    "linux": (bytes(0x1FE) + b"\x55\xaa\0\0HdrS" + bytes(512), "Linux kernels (bzImage) can't be"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", IMAGES)
def test_image_that_breaks_a_rule_is_refused_by_name_and_rule(
    cli: Cli, tmp_path: Path, command: str, name: str
) -> None:
    data, rule = IMAGES[name]
    path = tmp_path / "image"
    path.write_bytes(data)
    sentence = refused(cli(command, path))
    assert sentence.startswith(f"{path}: ")
    assert rule in sentence


@pytest.mark.parametrize("command", COMMANDS)
def test_image_that_is_missing_is_refused(cli: Cli, tmp_path: Path, command: str) -> None:
    path = tmp_path / "nosuch"
    assert refused(cli(command, path)) == f"{path}: can't be read: No such file or directory"


@pytest.mark.parametrize("command", COMMANDS)
def test_image_that_is_a_directory_is_refused(cli: Cli, tmp_path: Path, command: str) -> None:
    assert refused(cli(command, tmp_path)) == f"{tmp_path}: can't be read: Is a directory"


def test_image_that_may_not_be_read_is_refused(
    cli: Cli, halt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halt.chmod(0)

    def refuse(path: object, *args: Any) -> Any:
        if path == str(halt):
            raise PermissionError(13, "Permission denied", path)
        return opened(path, *args)

    opened = open

    with contextlib.suppress(PermissionError):
        halt.read_bytes()  # as root may: then only a fake refuses
        monkeypatch.setattr("builtins.open", refuse)
    assert refused(cli("measure", halt)) == f"{halt}: can't be read: Permission denied"


def test_image_with_a_name_in_no_encoding_is_refused_by_that_name(cli: Cli, tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    assert refused(cli("measure", path)).startswith(f"{tmp_path}/\\udcff: can't be read")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--vcpus", "0"), "a guest needs at least one vCPU"),
        (("--vcpus=-1",), "a guest needs at least one vCPU"),
        (("--vcpus", "4097"), "a guest has at most 4096 vCPUs, not 4097"),
        (("--policy", "0x10000"), "policy 0x10000 has bit 17 clear, which must be 1"),
        (("--policy", "0x4030000"), "policy 0x4030000 sets reserved bits: 26"),
        (
            ("--policy", "0x8000000000030000"),
            "policy 0x8000000000030000 sets reserved bits: 63",
        ),
        (("--policy", "0x10000000000030000"), " does not fit in 64 bits"),
        (
            ("--guest-features", "0x10000000000000001"),
            "the SEV features 0x10000000000000001 doesn't fit into 64 bits",
        ),
        (("--host-data", "11" * 31), "--host-data is 31 bytes, it must be 32"),
        (("--host-data", "11" * 33), "--host-data is 33 bytes, it must be 32"),
        (("--host-data", "zz" * 32), "--host-data is not hex"),
        (("--memory", "1000"), "guest memory of 1000 bytes is not a positive number of 4 KiB"),
        (("--memory", "0"), "guest memory of 0 bytes is not a positive number of 4 KiB pages"),
        (("--memory", "3000T"), "beyond the C-bit (bit 51)"),
        (("--cbitpos", "31"), "the C-bit is one of the address bits 32 to 63, not 31"),
        (("--load-addr", "0x1001"), "the load address 0x1001 is not aligned to 4 KiB pages"),
        (
            ("--load-addr", "0x10000000"),
            "the image (0x10000000..0x10001000) is outside the guest's memory (0x0..0x10000000)",
        ),
        (("--load-addr", "0xfffffffffffff000"), "ends beyond the 52 physical address bits"),
        (("--entry", "0x5000"), "the entry point 0x5000 is outside the image"),
        (("--vcpu-sig", "0x100000000"), "the CPU signature 0x100000000 doesn't fit into 32 bits"),
        (
            ("--vcpu-type", "EPYC", "--vcpu-sig", "1"),
            "give the CPU once: --vcpu-type, or --vcpu-sig, or --vcpu-family/-model/-stepping",
        ),
        (
            ("--vcpu-sig", "1", "--vcpu-family", "1", "--vcpu-model", "0", "--vcpu-stepping", "0"),
            "give the CPU once: --vcpu-type, or --vcpu-sig, or --vcpu-family/-model/-stepping",
        ),
        (
            ("--vcpu-family", "25", "--vcpu-model", "17"),
            "--vcpu-family, --vcpu-model and --vcpu-stepping go together",
        ),
        (("--initrd", "initrd"), "an initrd goes with a kernel, and there is none"),
        (("--append", "quiet"), "a kernel command line goes with a kernel, and there is none"),
        (("--vcpu-type", "EPYC-Rom"), "unknown CPU type 'EPYC-Rom'; near to it: EPYC-Rome, "),
        (("--vmm-type", "ec3"), "unknown VMM 'ec3'; near to it: ec2; known are QEMU, "),
        (("--vmm-type", "ec2"), "a VMM profile is for OVMF firmware, this image is flat"),
        (("--native-zero",), "ZERO for pages without data is for IGVM files, this image is flat"),
        (("--igvm", "x.igvm"), "name one image: IMAGE, --ovmf FILE, or --igvm FILE"),
        (("--ovmf", "OVMF.fd"), "name one image: IMAGE, --ovmf FILE, or --igvm FILE"),
        (("--image-type", "ovmf"), "firmware of 0x1 bytes: the size must be a multiple of 4 KiB"),
        (("--image-type", "elf"), "not an ELF file: it doesn't begin with 7f 45 4c 46"),
    ],
)
@pytest.mark.parametrize("command", ["measure", "run"])
def test_option_out_of_its_range_is_refused_with_its_rule(
    cli: Cli, halt: Path, command: str, options: tuple[str, ...], sentence: str
) -> None:
    assert sentence in refused(cli(command, *options, halt))


@pytest.mark.parametrize("command", COMMANDS)
def test_no_image_is_refused(cli: Cli, command: str) -> None:
    assert refused(cli(command)) == "name one image: IMAGE, --ovmf FILE, or --igvm FILE"


def test_ovmf_with_another_image_type_is_refused(cli: Cli, halt: Path) -> None:
    sentence = refused(cli("measure", "--ovmf", halt, "--image-type", "elf"))
    assert sentence == "--ovmf and --image-type elf contradict each other"


def test_load_address_of_an_elf_is_refused(cli: Cli, guests: Path) -> None:
    sentence = refused(cli("measure", "--load-addr", "0x100000", guests / "hello.elf"))
    assert "an ELF image says itself where it is loaded" in sentence


@pytest.mark.parametrize(
    ("option", "size", "what"),
    [("--id-block", 96, "an ID block"), ("--id-auth", 4096, "an ID authentication")],
)
@pytest.mark.parametrize("change", [-1, 1, None])
def test_id_file_of_a_wrong_size_is_refused(
    cli: Cli, halt: Path, tmp_path: Path, option: str, size: int, what: str, change: int | None
) -> None:
    path = tmp_path / "id.bin"
    there = 0 if change is None else size + change
    path.write_bytes(bytes(there))
    assert refused(cli("run", option, path, halt)) == (
        f"{path}: {what} is {size} bytes, raw, hex or base64; this is {there} bytes"
    )


@pytest.mark.parametrize(("option", "size"), [("--id-block", 96), ("--id-auth", 4096)])
def test_id_file_without_its_partner_is_refused(
    cli: Cli, halt: Path, tmp_path: Path, option: str, size: int
) -> None:
    path = tmp_path / "id.b64"
    path.write_bytes(base64.b64encode(bytes(size)))
    sentence = refused(cli("run", option, path, halt))
    assert sentence == "an ID block and its ID authentication are given together"


def test_id_file_without_an_end_is_refused(cli: Cli, halt: Path) -> None:
    sentence = refused(cli("run", "--id-block", "/dev/zero", halt))
    assert sentence == "/dev/zero: is larger than 65536 bytes"


def test_id_file_that_is_missing_is_refused(cli: Cli, halt: Path, tmp_path: Path) -> None:
    path = tmp_path / "nosuch"
    sentence = refused(cli("run", "--id-auth", path, halt))
    assert sentence == f"{path}: can't be read: No such file or directory"


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("", "it doesn't have the form"),
        ("SNP_LAUNCH_UPDATE", "it doesn't have the form"),
        ("SNP_LAUNCH_UPDATE:fw=0x1a@0", "calls are counted from 1"),
        ("SNP_LAUNCH_UPDATE:fw=x", "'x' is no number"),
        ("SNP_LAUNCH_UPDATE:partial=0", "partial progress is at least one page"),
        ("KVM_CREATE_VM:errno=ENOSUCH", "'ENOSUCH' is no number"),
        ("KVM_NO_SUCH:errno=EIO", "'errno' doesn't exist for KVM_NO_SUCH"),
        ("CPUID:correct=eax", "a correction is CPUID:correct=LEAF[/SUBLEAF].REG[=VALUE]"),
    ],
)
def test_fault_that_is_not_in_the_grammar_is_refused(
    cli: Cli, halt: Path, fault: str, why: str
) -> None:
    sentence = refused(cli("run", "--platform", "sim", "--sim-fault", fault, halt))
    assert sentence.startswith(f"fault {fault!r}: {why}; the grammar is ")


@pytest.mark.parametrize("option", ["--sim-fault", "--fault"])
def test_fault_for_a_real_host_is_refused(cli: Cli, halt: Path, option: str) -> None:
    fault = (option, "KVM_CREATE_VM:errno=EIO")
    sentence = refused(cli("run", "--platform", "kvm", *fault, halt))
    assert sentence == "--sim-fault is for the simulated host: add --platform sim"


def test_profile_that_does_not_exist_is_refused(cli: Cli, halt: Path) -> None:
    sentence = refused(cli("run", "--platform", "sim", "--sim", "5.15,seed=1", halt))
    assert sentence.startswith(
        "no kernel profile is named '5.15'; known are 6.12, 6.18, 7.0, multi-vmpl"
    )


def test_ioctls_without_a_log_are_refused(cli: Cli, halt: Path) -> None:
    assert refused(cli("run", "--ioctls", halt)) == "--ioctls needs --log FILE"


@pytest.mark.parametrize("command", ["measure", "run"])
@pytest.mark.parametrize("role", ["image", "id-block", "id-auth"])
def test_log_over_a_file_of_the_launch_is_refused_and_leaves_it(
    cli: Cli, halt: Path, tmp_path: Path, command: str, role: str
) -> None:
    files = {"image": halt, "id-block": tmp_path / "block", "id-auth": tmp_path / "auth"}
    files["id-block"].write_bytes(bytes(96))
    files["id-auth"].write_bytes(bytes(4096))
    link = tmp_path / "log"
    link.symlink_to(files[role])
    before = files[role].read_bytes()
    ids = ("--id-block", files["id-block"], "--id-auth", files["id-auth"])
    sentence = refused(cli(command, "--log", link, *ids, halt))
    assert sentence == f"--log {link} would overwrite {files[role]}, which is launched from"
    assert files[role].read_bytes() == before


@pytest.mark.parametrize("output", ["--log", "--report-out", "--chain-out"])
@pytest.mark.parametrize("option", ["--certs", "--vmsa"])
def test_output_over_certificates_or_a_vmsa_is_refused_and_leaves_them(
    cli: Cli, halt: Path, tmp_path: Path, output: str, option: str
) -> None:
    given = tmp_path / "given"
    given.write_bytes(bytes(4096))
    sentence = refused(cli("run", option, given, output, given, halt))
    assert sentence == f"{output} {given} would overwrite {given}, which is launched from"
    assert given.read_bytes() == bytes(4096)


@pytest.mark.parametrize("name", ["page", "a:b", "a@b"])
@pytest.mark.parametrize("there", ["", ":0", ":none", "@0x5000", ":0@0x5000"])
def test_log_over_a_vmsa_is_refused_and_leaves_it(
    cli: Cli, halt: Path, tmp_path: Path, name: str, there: str
) -> None:
    page = tmp_path / name
    page.write_bytes(bytes(4096))
    sentence = refused(cli("measure", "--log", page, "--vmsa", f"{tmp_path / name}{there}", halt))
    assert sentence == f"--log {page} would overwrite {page}, which is launched from"
    assert page.read_bytes() == bytes(4096)


@pytest.mark.parametrize("name", ["mine.json", "mine"])
def test_log_over_a_vmm_profile_is_refused_and_leaves_it(
    cli: Cli, halt: Path, tmp_path: Path, name: str
) -> None:
    profile = tmp_path / name
    profile.write_text('{"format": "kvmlaunch.vmm/1", "name": "mine", "base": "QEMU"}')
    before = profile.read_bytes()
    sentence = refused(cli("measure", "--log", profile, "--vmm-type", profile, halt))
    assert sentence == f"--log {profile} would overwrite {profile}, which is launched from"
    assert profile.read_bytes() == before


@pytest.mark.parametrize("option", ["--trace-out", "--report-out"])
def test_other_output_over_the_image_is_refused_and_leaves_it(
    cli: Cli, halt: Path, option: str
) -> None:
    sentence = refused(cli("run", "--trace", "exits", option, halt, halt))
    assert sentence == f"{option} {halt} would overwrite {halt}, which is launched from"
    assert halt.read_bytes() == b"\xf4"


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    ("first", "second"),
    [("--log", "--trace-out"), ("--log", "--report-out"), ("--trace-out", "--report-out")],
)
def test_outputs_that_are_one_file_are_refused(
    cli: Cli, halt: Path, tmp_path: Path, first: str, second: str, there: bool
) -> None:
    out = tmp_path / "out"
    if there:
        out.write_text("kept\n")
    sentence = refused(
        cli("run", "--trace", "exits", first, out, second, f"{tmp_path}/./out", halt)
    )
    assert sentence == f"{second} {tmp_path}/./out would overwrite {out}, where {first} goes"
    assert out.exists() == there


def test_outputs_that_are_one_device_are_taken(cli: Cli, halt: Path) -> None:
    null = ("--log", "/dev/null", "--trace", "exits", "--trace-out", "/dev/null")
    assert cli("run", "--platform", "sim", "--vm-type", "plain", *null, halt).code == 0


@pytest.mark.parametrize("command", ["measure", "run"])
def test_bad_input_leaves_an_older_log_alone(
    cli: Cli, halt: Path, tmp_path: Path, command: str
) -> None:
    log = tmp_path / "old.jsonl"
    log.write_text("kept\n")
    cli(command, "--log", log, "--vcpus", 0, halt)
    assert log.read_text() == "kept\n"


@pytest.mark.parametrize("command", ["measure", "run"])
def test_bad_input_makes_no_log(cli: Cli, halt: Path, tmp_path: Path, command: str) -> None:
    log = tmp_path / "new.jsonl"
    cli(command, "--log", log, "--policy", "0", halt)
    assert not log.exists()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--vcpus", "two"), "'two' is not a number"),
        (("--load-addr", "1000h"), "'1000h' is not a number"),
        (("--memory", "much"), "'much' is not a size, as 512M or 2G"),
        (("--memory", "-1"), "'-1' is not a size, as 512M or 2G"),
        (("--image-type", "pe"), "invalid choice: 'pe'"),
        # Older Pythons' argparse makes [] of it.
        (("--image-type=--",), "invalid choice: '--'"),
        (("--vcpus=--",), "'--' is not a number"),
        (("--vmsa-mode", "none"), "invalid choice: 'none'"),
        (("--output-format", "octal"), "--output-format"),
        (("--no-such-option",), "unrecognized arguments: --no-such-option"),
    ],
)
def test_option_that_cannot_be_read_is_a_usage_error(
    cli: Cli, halt: Path, options: tuple[str, ...], what: str
) -> None:
    done = cli("measure", *options, halt)
    assert (done.code, done.out) == (2, "")
    assert what in done.err.splitlines()[-1]


@pytest.mark.parametrize("command", ["measure", "run", "inspect"])
def test_file_named_by_two_dashes_is_a_file(cli: Cli, command: str) -> None:
    done = cli("-v", command, "--ovmf=--")
    assert done.code == 2
    assert done.errors == ["kvmlaunch: --: can't be read: No such file or directory"]


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "nan", "inf", "1e999"])
def test_timeout_that_is_no_time_is_a_usage_error(cli: Cli, halt: Path, seconds: str) -> None:
    done = cli("run", f"--timeout={seconds}", halt)
    assert done.code == 2
    assert f"{seconds!r} is not a positive number of seconds" in done.err


def test_number_of_thousands_of_digits_is_a_usage_error(cli: Cli, halt: Path) -> None:
    done = cli("measure", "--vcpus", "9" * 5000, halt)
    assert done.code == 2
