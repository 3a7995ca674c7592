"""The selftest's payloads: bytes against their source, and what they report when they run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from kvmlaunch.abi.segment import Segment
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.images import LaunchPlan, VmsaChoice, VmsaMode
from kvmlaunch.images.vmsas import supply_vmsas
from kvmlaunch.selftest import payloads
from kvmlaunch.sim import SimPlatform
from tests.host import require_simulated_cpu
from tests.payloads import payload_plan, report_of, run_payload

C_BIT = 51
SOURCE = Path(payloads.__file__).with_name("payloads.S")
GHCB = 0x107000


@pytest.fixture
def host() -> SimPlatform:
    return require_simulated_cpu()


@pytest.fixture
def direct_host() -> SimPlatform:
    """A kernel of the proposal: VMSAs by user space, and the GHCB event APIC_ID_LIST."""
    return require_simulated_cpu("direct-vmsa")


# Bytes and pages


def test_code_when_assembled_is_that_of_the_pages(tmp_path: Path) -> None:
    for tool in ("gcc", "as"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool} to assemble with (apt install gcc binutils)")
    target = tmp_path / "payloads.o"
    subprocess.run(["gcc", "-c", "-o", target, SOURCE], check=True, timeout=60)
    with target.open("rb") as file:
        elf = ELFFile(file)
        text = elf.get_section_by_name(".text")
        assert elf.get_section_by_name(".rela.text") is None
        code = text.data()
        entries = {
            symbol.name: 0x100000 + symbol["st_value"]
            for symbol in elf.get_section_by_name(".symtab").iter_symbols()
            if symbol["st_info"]["bind"] == "STB_GLOBAL"
        }
    assert payloads.build(C_BIT)[0x100000] == code.ljust(4096, b"\0")
    assert entries == {
        "report_bl": payloads.report_bl(0).rip,
        "report_vmsa_state": payloads.report_vmsa_state(C_BIT).rip,
        "start_ap": payloads.start_ap(C_BIT).rip,
        "apic_ids": payloads.apic_ids(C_BIT).rip,
    }


def test_pages_when_built_are_nine_in_a_row() -> None:
    pages = payloads.build(C_BIT)
    assert list(pages) == [0x100000 + n * 0x1000 for n in range(9)]
    assert {len(page) for page in pages.values()} == {4096}
    assert payloads.SIZE == 9 * 4096


def mapping(cbitpos: int, address: int) -> tuple[int, bool]:
    """GPA and C-bit that the page tables give an address in the lowest 2 MiB."""
    pages = payloads.build(cbitpos)
    table = payloads.start_ap(cbitpos).cr3
    for shift in (39, 30, 21, 12):
        assert table >> cbitpos & 1  # the tables themselves are private
        at = (address >> shift & 511) * 8
        page = pages[table & (1 << cbitpos) - 4096]
        table = int.from_bytes(page[at : at + 8], "little")
        assert table & 3 == 3
    return table & (1 << cbitpos) - 4096, bool(table >> cbitpos & 1)


@pytest.mark.parametrize("cbitpos", [39, 47, 51])
@pytest.mark.parametrize(
    ("address", "gpa", "private"),
    [
        (0x100000, 0x100000, True),
        (0x106000, 0x106000, True),
        (0x107000, 0x107000, False),
        (0x108000, 0x108000, False),
        (0x109000, 0x109000, True),
        (0x1FF000, 0x1FF000, True),
        (0x007000, 0x107000, True),
        (0x008000, 0x108000, True),
        (0, 0x100000, True),
    ],
)
def test_tables_when_built_share_only_ghcb_and_list(
    cbitpos: int, address: int, gpa: int, private: bool
) -> None:
    assert mapping(cbitpos, address) == (gpa, private)


def test_ap_vmsa_when_built_has_the_features_of_the_vm() -> None:
    page = payloads.build(C_BIT, sev_features=0x21)[0x106000]
    # SEV_FEATURES at 0x3b0 (APM volume 2, table B-4).
    assert int.from_bytes(page[0x3B0:0x3B8], "little") == 0x21


def test_report_when_made_has_set_14() -> None:
    assert payloads.reported(0xA9) == 0xA9E100
    assert payloads.reported(1, 0x12345678) == 0x12345678_0001E100


# report_bl


@pytest.mark.parametrize("bl", [0, 1, 0x80, 0xFF])
def test_report_bl_when_run_reports_the_register_of_its_vmsa(host: SimPlatform, bl: int) -> None:
    outcome = run_payload(payload_plan(payloads.report_bl(bl), cbitpos=C_BIT), host)
    assert report_of(outcome) == (0, 0xE100 | bl << 16)
    assert "reason set 14 (kvmlaunch's selftest)" in str(outcome)


# report_vmsa_state

# What the payload reported on mainline KVM's own SNP code (tests/mainline), with its C-bit.
KNOWN_C_BIT, KNOWN_CHECKSUM = 39, 0xBDFB5C71


def test_checksum_of_the_state_that_is_given_is_known() -> None:
    state = payloads.report_vmsa_state(KNOWN_C_BIT)
    assert payloads.state_checksum(state) == KNOWN_CHECKSUM


FIELDS = {
    **dict.fromkeys(("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp"), 90),
    **{f"r{n}": 0x5A for n in range(8, 16)},
    "rsp": 0x101FF0,
    "rflags": 0x2,
    "cr0": 0x80000011,
    "cr4": 0x60,
    "efer": 0x1500,
    "es": Segment(0x50, 0xC93, 0xFFFFFFFF, 0),
    "cs": Segment(0x50, 0xA9B, 0xFFFFFFFF, 0),
    "ss": Segment(0x50, 0xC93, 0xFFFFFFFF, 0),
    "ds": Segment(0x50, 0xC93, 0xFFFFFFFF, 0),
    "fs": Segment(0x28, 0xC93, 0xFFFFFFFF, 0x1000),
    "gs": Segment(0x30, 0xC93, 0xFFFFFFFF, 0x1000),
    "ldtr": Segment(0x50, 0x82, 0x67, 0x9000),
    "tr": Segment(0x50, 0x8B, 0x67, 0xA000),
    "gdtr": Segment(limit=0x80, base=0xFFFF_8000_0000_5000),
    "idtr": Segment(limit=0xFFF, base=0x7000),
    "star": 0x001B_0008_0000_0000,
    "lstar": 0x1000,
    "cstar": 0x1000,
    "sfmask": 0x200,
    "kernel_gs_base": 0x1000,
    "sysenter_cs": 0x10,
    "x87_fcw": 0x37F,
}


@pytest.mark.parametrize("field", [None, *FIELDS])
def test_state_when_reported_is_that_of_the_vmsa(host: SimPlatform, field: str | None) -> None:
    """KVM makes the VMSA here, of the same registers; CR2 isn't among those that it can set."""
    given = payloads.report_vmsa_state(C_BIT)
    state = given.replace(**{field: FIELDS[field]}) if field else given
    checksum = payloads.state_checksum(state)
    assert (checksum == payloads.state_checksum(given)) == (field is None)
    outcome = run_payload(payload_plan(state, cbitpos=C_BIT), host)
    assert report_of(outcome) == (0, checksum << 32 | (checksum & 0xFF) << 16 | 0xE100)


# start_ap


def test_ap_when_started_by_the_guest_reports_itself(host: SimPlatform) -> None:
    waiting = payloads.report_bl(0x11)  # what KVM makes, and AP creation replaces
    launch_plan = payload_plan(payloads.start_ap(C_BIT), waiting, cbitpos=C_BIT, apic=True)
    assert report_of(run_payload(launch_plan, host)) == (1, 0xA9E100)


def test_ap_when_there_is_none_is_refused(host: SimPlatform) -> None:
    launch_plan = payload_plan(payloads.start_ap(C_BIT), cbitpos=C_BIT)
    # GHCB error 5: invalid input.
    assert report_of(run_payload(launch_plan, host)) == (0, 0x5_00E5E100)


def test_ghcb_page_when_not_launched_is_told(host: SimPlatform) -> None:
    launch_plan = payload_plan(payloads.start_ap(C_BIT), cbitpos=C_BIT, without=[GHCB])
    assert report_of(run_payload(launch_plan, host)) == (0, 0xE1E100)


# apic_ids


@pytest.mark.parametrize(("vcpus", "mask"), [(1, 0b1), (2, 0b11), (5, 0b11111)])
def test_apic_ids_when_listed_are_counted(direct_host: SimPlatform, vcpus: int, mask: int) -> None:
    states = [payloads.apic_ids(C_BIT)] * vcpus
    launch_plan = payload_plan(*states, cbitpos=C_BIT, apic=True)
    report = report_of(run_payload(launch_plan, direct_host))
    assert report == (0, mask << 32 | vcpus << 16 | 0xE100)


def test_apic_ids_when_the_host_has_no_list_tells_its_features(host: SimPlatform) -> None:
    outcome = run_payload(payload_plan(payloads.apic_ids(C_BIT), cbitpos=C_BIT), host)
    # SNP and AP creation.
    assert report_of(outcome) == (0, 0x3_00E6E100)


# With VMSAs that user space supplies


def direct(launch_plan: LaunchPlan, *states: Vmsa) -> LaunchPlan:
    """The plan with a VMSA page for each of the first vCPUs, behind the payloads' memory."""
    choices = [
        VmsaChoice(vcpu, 0x109000 + vcpu * 0x1000, state.encode())
        for vcpu, state in enumerate(states)
    ]
    return supply_vmsas(launch_plan, VmsaMode.DIRECT, choices)


def test_state_when_user_space_made_the_vmsa_is_that_of_the_page(direct_host: SimPlatform) -> None:
    """CR2 as well, which KVM can't be told."""
    state = payloads.report_vmsa_state(C_BIT).replace(cr2=0xDEAD000)
    checksum = payloads.state_checksum(state)
    assert checksum != payloads.state_checksum(state.replace(cr2=0))
    launch_plan = direct(payload_plan(state, cbitpos=C_BIT), state)
    outcome = run_payload(launch_plan, direct_host)
    assert report_of(outcome) == (0, payloads.reported(checksum & 0xFF, checksum))


def test_ap_when_it_has_no_vmsa_is_started_by_the_guest(direct_host: SimPlatform) -> None:
    bsp, ap = payloads.start_ap(C_BIT), payloads.report_bl(0x11)
    launch_plan = direct(payload_plan(bsp, ap, cbitpos=C_BIT, apic=True), bsp)
    assert report_of(run_payload(launch_plan, direct_host)) == (1, 0xA9E100)


def test_apic_ids_when_only_the_first_vcpu_has_a_vmsa_are_all(direct_host: SimPlatform) -> None:
    bsp = payloads.apic_ids(C_BIT)
    launch_plan = direct(payload_plan(bsp, bsp, bsp, cbitpos=C_BIT, apic=True), bsp)
    assert report_of(run_payload(launch_plan, direct_host)) == (0, 0x7_0003E100)
