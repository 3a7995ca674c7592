"""``igvm check``: what a launch would refuse, and where known loaders differ."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import Cli, shown
from tests.images import igvm_files as f


def checked(cli: Cli, *args: object) -> tuple[int, list[dict[str, Any]]]:
    done = cli("igvm", "check", "--json", *args)
    return done.code, json.loads(done.out)["findings"]


def rules(findings: list[dict[str, Any]], *, refused: bool) -> list[tuple[str, str]]:
    return [(found["by"], found["rule"]) for found in findings if found["refused"] is refused]


def test_check_when_all_is_well_says_so(cli: Cli, tmp_path: Path) -> None:
    headers = (f.policy(), f.page(0x1000, 0), f.context(f.KVM_GPA, 0x1000))
    file = f.write(tmp_path / "well.igvm", *headers, data=f.pattern(1) + f.vmsa())
    for profile in ("6.12", "7.0", "vmsa-page", "direct-vmsa"):
        done = cli("igvm", "check", "--sim", profile, file)
        assert (done.code, done.out) == (0, "nothing would be refused, and known loaders agree\n")


def test_check_when_the_kernel_makes_the_vmsas_names_the_change(cli: Cli, halting: Path) -> None:
    assert checked(cli, halting)[0] == 0
    code, findings = checked(cli, "--sim", "6.12", halting)
    assert code == 1
    ((by, rule),) = rules(findings, refused=True)
    assert (by, "the launch digest changes from" in rule) == ("kernel", True)


BAD: dict[str, tuple[tuple[f.Header, ...], bytes, str, str]] = {
    "format": ((f.page(0x1001),), b"", "kvmlaunch", "GPA 0x1001 is not aligned"),
    "policy": ((f.policy(0),), bytes(8), "firmware", "POLICY_FAILURE: policy 0x0 has bit 17 clear"),
    "vmpl": ((f.context(0x5000, 0),), f.vmsa(vmpl=1), "kernel", "vmpl is 1, but a guest starts"),
    "2mib": ((f.context(0x200000, 0),), f.vmsa(), "kernel", "aligned to 2 MiB, where no vCPU"),
    "features": (
        (f.context(0x5000, 0),),
        f.vmsa(sev_features=0x9),
        "kernel",
        "KVM_SEV_INIT2: SEV features 0x8 are not among the host's",
    ),
    "id-block-version": (
        (f.policy(), (0x30B, b"\1" + bytes(695))),
        bytes(8),
        "firmware",
        "INVALID_PARAM: the ID block's version is 0, not 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_check_when_a_launch_is_refused_names_who_and_by_which_rule(
    cli: Cli, tmp_path: Path, name: str
) -> None:
    headers, data, by, rule = BAD[name]
    code, findings = checked(cli, f.write(tmp_path / "bad.igvm", *headers, data=data))
    assert code == 1
    assert any(who == by and rule in what for who, what in rules(findings, refused=True))


def test_check_when_kvm_refuses_the_registers_names_the_field(cli: Cli, tmp_path: Path) -> None:
    raw = bytearray(f.vmsa())
    struct.pack_into("<Q", raw, 0x160, 0x401)  # dr7
    file = f.write(tmp_path / "dr7.igvm", f.context(f.KVM_GPA, 0), data=bytes(raw))
    assert checked(cli, file)[0] == 0
    code, findings = checked(cli, "--sim", "6.12", file)
    ((by, rule),) = rules(findings, refused=True)
    assert (code, by) == (1, "kernel")
    assert rule.startswith("dr7 0x401 has bits besides 0x400, which SNP_LAUNCH_FINISH refuses")


def test_check_when_the_id_block_is_wrong_names_the_status(
    cli: Cli, halt: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    file = tmp_path / "signed.igvm"
    options = ("--vmsa-mode", "direct", "--id-key", keys[0], "--author-key", keys[1])
    assert cli("igvm", "build", *options, halt, "-o", file).code == 0
    assert checked(cli, file)[0] == 0
    whole = file.read_bytes()
    (row,) = (row for row in shown(cli, file)["headers"] if row["type"] == "SNP_ID_BLOCK")
    at = int(row["offset"], 16) + 8
    for offset, status in ((8, "BAD_MEASUREMENT"), (104, "BAD_SIGNATURE"), (400, "BAD_SIGNATURE")):
        raw = bytearray(whole)
        raw[at + offset] ^= 1
        file.write_bytes(with_checksum(bytes(raw)))
        code, findings = checked(cli, file)
        assert code == 1
        assert any(status in rule for _, rule in rules(findings, refused=True)), status


def with_checksum(image: bytes) -> bytes:
    import zlib

    offset, size = struct.unpack_from("<II", image, 8)
    crc = zlib.crc32(image[:20] + bytes(4) + image[offset : offset + size])
    return image[:20] + struct.pack("<I", crc) + image[24:]


# What known loaders do: image-formats 1.3 to 1.12.
WARNED: dict[str, tuple[tuple[f.Header, ...], str, str]] = {
    "no-policy": ((f.page(0x1000, 0),), "OpenVMM and Microsoft's", "no GUEST_POLICY"),
    "optional": (((1 << 31 | 0x3FF, b""),), "Microsoft's parser", "optional headers of unknown"),
    "large": ((f.page(0x200000, flags=1),), "Microsoft's parser", "takes 4 KiB of a 2 MiB page"),
    "shared": ((f.page(0x1000, 0, flags=4),), "igvmmeasure", "measures a shared page as NORMAL"),
    "both": ((f.page(0x1000, 0, flags=6),), "the format", "both unmeasured and shared"),
    "zero": ((f.page(0x1000),), "Cloud Hypervisor", "launches a page without data as ZERO"),
    "cpuid-xf": ((f.page(0x1000, kind=3),), "OpenVMM on KVM", "CPUID_XF"),
    "area-data": ((f.area(0, 0x1000, 0), f.insert(0x1000, 0)), "QEMU", "leaves out the area's"),
    "area-size": ((f.area(0, 0x2000), f.insert(0x1000, 0)), "igvmmeasure", "only the first page"),
    "slit": ((f.area(0), f.parameter(0x30F, 0), f.insert(0x1000, 0)), "QEMU", "(SLIT)"),
    "map-offset": (
        (f.area(0), f.parameter(0x30C, 0, 24), f.insert(0x1000, 0)),
        "QEMU",
        "writes it to the area's start instead of 0x18",
    ),
    "map": (
        (f.area(0), f.parameter(0x30C, 0), f.insert(0x1000, 0)),
        "a guest's memory map",
        "so validated already",
    ),
    "gpa": ((f.context(0x5000, 0x1000),), "QEMU", "a VMSA at GPA 0x5000, it wants 0xfffffffff000"),
    "several": (
        (f.context(0x5000, 0x1000), f.context(0x6000, 0x1000, 1)),
        "OpenVMM (older ones)",
        "header 2 (VP_CONTEXT): vCPU 1",
    ),
    "error-range": ((f.error_range(0x1000, 0x1000),), "QEMU", "(ERROR_RANGE)"),
    "order": (
        (f.area(0), f.page(0x1000, 0), f.insert(0x5000, 0)),
        "QEMU",
        "header 3 (PARAMETER_INSERT) is measured before header 2's pages",
    ),
}


@pytest.mark.parametrize("name", WARNED)
def test_check_when_loaders_differ_warns_and_names_the_loader(
    cli: Cli, tmp_path: Path, name: str
) -> None:
    headers, by, rule = WARNED[name]
    data = f.pattern(1) + f.vmsa()
    code, findings = checked(cli, f.write(tmp_path / "file.igvm", *headers, data=data))
    assert code == 0
    assert any(who.startswith(by) and rule in what for who, what in rules(findings, refused=False))


def test_check_when_the_platform_header_is_for_more_warns(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "vtl.igvm"
    path.write_bytes(f.igvm([f.platform(vtl=2, border=1 << 40), f.policy()], b""))
    code, findings = checked(cli, path)
    assert code == 0
    assert [rule for _, rule in rules(findings, refused=False)] == [
        "doesn't take a file without data",
        "doesn't take highest VTL 2, it takes 0",
        "doesn't take shared GPA boundary 0x10000000000, it takes 0",
    ]


def test_check_when_the_host_is_real_asks_it(cli: Cli, halting: Path, no_snp_here: None) -> None:
    done = cli("igvm", "check", "--platform", "kvm", halting)
    assert (done.code, done.out) == (4, "")


@pytest.fixture
def no_snp_here() -> None:
    """Skips where there is a real SNP host, which would answer."""
    if Path("/dev/sev").exists():
        pytest.skip("this machine has /dev/sev")
