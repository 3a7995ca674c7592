"""Traces, registers and last exits: on the simulated host, and on a real one what it tells."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from kvmlaunch.errors import FormatError
from kvmlaunch.images import PlanOptions, load_image
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.run import Outcome, run_guest
from kvmlaunch.launch.symbols import Symbols
from kvmlaunch.launch.trace import Trace
from kvmlaunch.uapi import Platform
from tests import guest_ends
from tests.host import require_kvm, require_simulated_cpu
from tests.images.builders import Seg, elf64

START = 0x100000
# mov al, 0; out 0xf4, al
ENDS = elf64([Seg(START, bytes.fromhex("b000 e6f4"))])
# The GHCB MSR's answer to HV_FEATURES, asked in 64-bit code: mov ecx, 0xc0010130; mov eax, 0x80;
# xor edx, edx; wrmsr; rep vmmcall; hlt
FEATURES = elf64([Seg(START, bytes.fromhex("b9300101c0 b880000000 31d2 0f30 f30f01d9 f4"))])
VMGEXIT_AT = START + 14
# mov al, [0x300000]: accepted by nobody
UNVALIDATED = elf64([Seg(START, bytes.fromhex("8a042500003000"))])


def traced(
    image: bytes, platform: Platform, *kinds: str, confidential: bool = False
) -> tuple[Outcome, list[dict[str, Any]]]:
    """How a guest ends, and its trace."""
    lines: list[str] = []
    options = PlanOptions(memory=4 << 20, confidential=confidential)
    with Guest(load_image(image, options), platform) as guest:
        if confidential:
            guest.launch()
        trace = Trace(kinds, lines.append, as_json=True)
        outcome = run_guest(guest, console=lambda text: None, timeout=20, trace=trace)
    assert all(line.endswith("\n") for line in lines)
    return outcome, [json.loads(line) for line in lines]


def test_exits_when_host_is_real_come_with_rip_of_a_plain_guest() -> None:
    outcome, events = traced(ENDS, require_kvm(), "exits")
    assert outcome.ok
    assert [event["name"] for event in events] == ["KVM_EXIT_IO"]
    assert events[0]["vcpu"] == 0
    assert events[0]["detail"] == "out port=0xf4 size=1 count=1 data=00"
    assert events[0]["rip"] in (hex(START + 2), hex(START + 4))


def test_console_when_traced_has_the_lines_of_several_vcpus_in_order(guests: Path) -> None:
    plan = load_image(guests / "smp.elf", PlanOptions(memory=guest_ends.MEMORY, vcpus=4))
    console = bytearray()
    with Guest(plan, require_simulated_cpu()) as guest:
        guest.launch()
        trace = Trace(["exits"], lambda line: None)
        outcome = run_guest(guest, console=console.extend, timeout=20, trace=trace)
    assert (outcome.ok, console.decode()) == (True, guest_ends.SNP["smp"].text)


def test_exits_when_console_is_used_show_each_byte() -> None:
    # mov dx, 0x3f8; mov al, 'x'; out dx, al; mov al, 0; out 0xf4, al
    image = elf64([Seg(START, bytes.fromhex("66baf803 b078 ee b000 e6f4"))])
    for platform in (require_kvm(), require_simulated_cpu()):
        _, events = traced(image, platform, "exits")
        assert [event["detail"].split(" size")[0] for event in events] == [
            "out port=0x3f8",
            "out port=0xf4",
        ]


def test_exits_when_guest_is_snp_show_what_it_asks_of_its_hypervisor() -> None:
    _, events = traced(FEATURES, require_simulated_cpu(), "exits", confidential=True)
    assert events[0] == {
        "trace": "exits",
        "vcpu": 0,
        "rip": hex(VMGEXIT_AT + 4),
        "name": "VMGEXIT msr HV_FEATURES",
    }


def test_insn_when_traced_shows_each_instruction_once_with_its_bytes() -> None:
    _, events = traced(FEATURES, require_simulated_cpu(), "insn", confidential=True)
    assert [(event["rip"], event["bytes"]) for event in events[:6]] == [
        (hex(START), "b9300101c0"),
        (hex(START + 5), "b880000000"),
        (hex(START + 10), "31d2"),
        (hex(START + 12), "0f30"),
        (hex(START + 14), "f30f01d9"),
        (hex(START + 18), "f4"),
    ]


def test_pages_when_page_is_not_validated_show_vc_0x404() -> None:
    outcome, events = traced(UNVALIDATED, require_simulated_cpu(), "pages", confidential=True)
    assert outcome.kind == "shutdown"
    names = [(event["name"], event.get("gpa")) for event in events]
    assert ("assigned", "0x300000") in names
    assert names[-1][0] == "#VC 0x404"
    assert events[-1]["rip"] == hex(START)
    assigned = next(event for event in events if event["name"] == "assigned")
    assert (assigned["old"], assigned["new"]) == ("Hypervisor", "Guest-Invalid")


@pytest.mark.parametrize("kind", ["pages", "insn"])
def test_trace_when_host_is_real_tells_only_exits(kind: str) -> None:
    with pytest.raises(FormatError, match=f"--trace {kind} is for the simulated host"):
        traced(ENDS, require_kvm(), kind)


def test_trace_when_kind_is_unknown_names_those_there_are() -> None:
    with pytest.raises(FormatError, match="known are exits, pages, insn"):
        Trace(["calls"], print)


def test_trace_when_it_cant_be_written_stops_and_keeps_the_error() -> None:
    def full(line: str) -> None:
        raise OSError(28, "No space left on device")

    with Guest(
        load_image(ENDS, PlanOptions(memory=4 << 20, confidential=False)), require_simulated_cpu()
    ) as guest:
        trace = Trace(["exits", "insn"], full)
        assert run_guest(guest, console=print, timeout=20, trace=trace).ok
    assert trace.error is not None
    assert trace.error.errno == 28


def test_trace_when_run_is_over_hears_nothing_more() -> None:
    _, events = traced(FEATURES, require_simulated_cpu(), "pages", confidential=True)
    assert not [event for event in events if event.get("new") == "Hypervisor"]


def test_text_when_written_is_a_line_for_people() -> None:
    lines: list[str] = []
    with Guest(
        load_image(ENDS, PlanOptions(memory=4 << 20, confidential=False)), require_simulated_cpu()
    ) as guest:
        run_guest(guest, console=print, timeout=20, trace=Trace(["insn", "exits"], lines.append))
    assert lines[0] == "insn vcpu0 0x100000 b000\n"
    assert lines[-1].endswith("KVM_EXIT_IO out port=0xf4 size=1 count=1 data=00\n")


@pytest.mark.parametrize("confidential", [False, True])
def test_registers_when_guest_is_simulated_are_those_it_starts_with(confidential: bool) -> None:
    options = PlanOptions(memory=4 << 20, confidential=confidential)
    with Guest(load_image(ENDS, options), require_simulated_cpu()) as guest:
        if confidential:
            guest.launch()
        found = guest.registers(0)
        assert found is not None
        assert found["rip"] == guest.plan.vcpus[0].rip
        assert found["cr3"] == guest.plan.vcpus[0].cr3
        assert found["mxcsr"] == 0x1F80


def test_registers_when_both_hosts_are_asked_agree() -> None:
    options = PlanOptions(memory=4 << 20, confidential=False)
    found = []
    for platform in (require_kvm(), require_simulated_cpu()):
        with Guest(load_image(ENDS, options), platform) as guest:
            found.append(guest.registers(0))
    real, simulated = found
    assert real is not None
    assert simulated is not None
    same = [name for name in real if not name.startswith("st") and name not in ("ftag", "efer")]
    assert {name: real[name] for name in same} == {name: simulated[name] for name in same}


def test_last_exits_when_many_are_the_latest_eight() -> None:
    # mov ecx, 20; 1: out 0x80, al; dec ecx; jnz 1b; mov al, 1; out 0xf4, al
    image = elf64([Seg(START, bytes.fromhex("b914000000 e680 ffc9 75fa b001 e6f4"))])
    outcome, _ = traced(image, require_simulated_cpu(), "exits")
    assert len(outcome.last_exits) == 8
    assert outcome.last_exits[-1] == (0, outcome.exit)
    assert {exit_.reason for _, exit_ in outcome.last_exits} == {"KVM_EXIT_IO"}


def test_symbols_when_image_has_none_know_no_address() -> None:
    plan = load_image(ENDS, PlanOptions(memory=4 << 20))
    assert Symbols.of_plan(plan).name(START) is None


def test_symbols_when_address_is_in_code_give_name_and_offset() -> None:
    symbols = Symbols({0x1000: "start", 0x1010: "main"}, [(0x1000, 0x1020)])
    assert symbols.name(0x1000) == "start"
    assert symbols.name(0x101F) == "main+0xf"
    assert symbols.name(0x1020) is None
    assert symbols.name(0xFFF) is None


def test_symbols_when_section_headers_are_hostile_is_no_error(guests: Path) -> None:
    image = (guests / "hello.elf").read_bytes()
    (table,), (count,) = struct.unpack_from("<Q", image, 40), struct.unpack_from("<H", image, 60)
    options = PlanOptions(memory=guest_ends.MEMORY)
    start = load_image(image, options).vcpus[0].rip
    assert Symbols.of_plan(load_image(image, options)).name(start) == "start"
    for at in range(table, table + 64 * count, 4):
        for word in (bytes(4), b"\xff" * 4):
            plan = load_image(image[:at] + word + image[at + 4 :], options)
            assert isinstance(Symbols.of_plan(plan).name(start), str | None)
