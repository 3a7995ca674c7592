"""decode_exit() on hand-filled run pages."""

from __future__ import annotations

from typing import Any

import pytest

from kvmlaunch.kvm.exits import (
    ApResetHoldExit,
    DebugExit,
    Exit,
    FailEntryExit,
    HltExit,
    HypercallExit,
    InternalErrorExit,
    InterruptedExit,
    IoExit,
    MemoryFaultExit,
    MmioExit,
    ReqCertsExit,
    ShutdownExit,
    SystemEventExit,
    UnknownExit,
    decode_exit,
    exit_name,
)
from kvmlaunch.uapi import ffi, lib

_DATA = 4096


class _Page:
    """Run pages that hold one exit."""

    def __init__(self, name: str, data: bytes = b"", **members: Any) -> None:
        self.memory = ffi.new("char[]", 3 * 4096)
        self.run = ffi.cast("struct kvm_run *", self.memory)
        self.run.exit_reason = getattr(lib, name)
        for member, value in members.items():
            setattr(self.run, member, value)
        ffi.memmove(self.memory + _DATA, data, len(data))

    def decode(self) -> Exit:
        return decode_exit(self.run)


def _io(direction: int, size: int, count: int, data: bytes = b"") -> Exit:
    io = {"direction": direction, "size": size, "port": 0x3F8, "count": count}
    return _Page("KVM_EXIT_IO", data, io={**io, "data_offset": _DATA}).decode()


def test_io_when_out_has_the_data() -> None:
    exit_ = _io(lib.KVM_EXIT_IO_OUT, 2, 2, b"\x01\x02\x03\x04\x05")
    assert exit_ == IoExit(0x3F8, 2, 2, True, b"\x01\x02\x03\x04")


def test_io_when_in_has_no_data() -> None:
    assert _io(lib.KVM_EXIT_IO_IN, 1, 1, b"old") == IoExit(0x3F8, 1, 1, False, b"")


def test_io_when_shown_names_port_and_data() -> None:
    text = str(_io(lib.KVM_EXIT_IO_OUT, 1, 2, b"\xab\xcd"))
    assert text == "KVM_EXIT_IO out port=0x3f8 size=1 count=2 data=abcd"


def test_io_when_in_is_shown_has_no_data() -> None:
    assert str(_io(lib.KVM_EXIT_IO_IN, 4, 1)) == "KVM_EXIT_IO in port=0x3f8 size=4 count=1"


def _mmio(**values: Any) -> Exit:
    return _Page("KVM_EXIT_MMIO", mmio=values).decode()


def test_mmio_when_written_has_the_bytes_of_its_length() -> None:
    exit_ = _mmio(phys_addr=0xFED0_0000, data=b"\x01\x02\x03\x04\x05", len=4, is_write=1)
    assert exit_ == MmioExit(0xFED0_0000, 4, True, b"\x01\x02\x03\x04")


def test_mmio_when_read_has_no_data() -> None:
    exit_ = _mmio(phys_addr=0xFED0_0000, data=b"\xff", len=8, is_write=0)
    assert exit_ == MmioExit(0xFED0_0000, 8, False, b"")


def test_mmio_when_length_is_more_than_the_field_stays_inside() -> None:
    exit_ = _mmio(phys_addr=0, data=b"12345678", len=200, is_write=1)
    assert exit_ == MmioExit(0, 8, True, b"12345678")


@pytest.mark.parametrize(
    ("is_write", "text"),
    [
        (1, "KVM_EXIT_MMIO write gpa=0xfed00000 size=2 data=0102"),
        (0, "KVM_EXIT_MMIO read gpa=0xfed00000 size=2"),
    ],
)
def test_mmio_when_shown_names_gpa_and_data(is_write: int, text: str) -> None:
    assert str(_mmio(phys_addr=0xFED0_0000, data=b"\1\2", len=2, is_write=is_write)) == text


def test_debug_when_decoded_has_vector_address_and_dr6() -> None:
    arch = {"exception": 1, "pc": 0x100000, "dr6": 0xFFFF4FF0, "dr7": 0x400}
    exit_ = _Page("KVM_EXIT_DEBUG", debug={"arch": arch}).decode()
    assert exit_ == DebugExit(1, 0x100000, 0xFFFF4FF0)
    assert str(exit_) == "KVM_EXIT_DEBUG exception=1 pc=0x100000"


def _hypercall(nr: int, *args: int) -> Exit:
    return _Page("KVM_EXIT_HYPERCALL", hypercall={"nr": nr, "args": list(args)}).decode()


def test_hypercall_when_decoded_has_all_arguments() -> None:
    assert _hypercall(99, 1, 2**64 - 1) == HypercallExit(99, (1, 2**64 - 1, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("attributes", "to"),
    [("KVM_MAP_GPA_RANGE_ENCRYPTED", "private"), ("KVM_MAP_GPA_RANGE_DECRYPTED", "shared")],
)
def test_hypercall_when_mapping_a_range_is_explained(attributes: str, to: str) -> None:
    exit_ = _hypercall(lib.KVM_HC_MAP_GPA_RANGE, 0x1000, 2, getattr(lib, attributes))
    assert str(exit_) == f"KVM_EXIT_HYPERCALL MAP_GPA_RANGE gpa=0x1000 pages=2 to={to}"


def test_hypercall_when_unknown_shows_its_number() -> None:
    assert str(_hypercall(99)).startswith("KVM_EXIT_HYPERCALL nr=99 args=['0x0',")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("KVM_EXIT_HLT", HltExit),
        ("KVM_EXIT_AP_RESET_HOLD", ApResetHoldExit),
        ("KVM_EXIT_SHUTDOWN", ShutdownExit),
        ("KVM_EXIT_INTR", InterruptedExit),
    ],
)
def test_exit_when_it_has_no_payload_is_its_name(name: str, kind: type[Exit]) -> None:
    exit_ = _Page(name).decode()
    assert (exit_, str(exit_)) == (kind(), name)


def test_fail_entry_when_decoded_has_reason_and_cpu() -> None:
    fail = {"hardware_entry_failure_reason": 0xFFFFFFFF, "cpu": 3}
    exit_ = _Page("KVM_EXIT_FAIL_ENTRY", fail_entry=fail).decode()
    assert exit_ == FailEntryExit(0xFFFFFFFF, 3)
    assert str(exit_) == "KVM_EXIT_FAIL_ENTRY hardware_reason=0xffffffff cpu=3"


def _internal(**values: Any) -> Exit:
    return _Page("KVM_EXIT_INTERNAL_ERROR", internal=values).decode()


def test_internal_error_when_decoded_has_its_words() -> None:
    exit_ = _internal(suberror=lib.KVM_INTERNAL_ERROR_DELIVERY_EV, ndata=3, data=[7, 8, 9])
    assert exit_ == InternalErrorExit(3, (7, 8, 9), b"")


def test_internal_error_when_ndata_is_above_16_stays_inside() -> None:
    exit_ = _internal(suberror=4, ndata=1000, data=list(range(16)))
    assert exit_ == InternalErrorExit(4, tuple(range(16)), b"")


def _emulation_failure(ndata: int, flags: int, insn_size: int, insn: bytes) -> Exit:
    values = {"suberror": lib.KVM_INTERNAL_ERROR_EMULATION, "ndata": ndata, "flags": flags}
    values |= {"insn_size": insn_size, "insn_bytes": insn}
    return _Page("KVM_EXIT_INTERNAL_ERROR", emulation_failure=values).decode()


@pytest.mark.parametrize(
    ("insn_size", "expected"), [(3, b"\x0f\x01\xd9"), (99, b"\x0f\x01\xd9\x90" + bytes(11))]
)
def test_internal_error_when_emulation_failed_has_the_instruction(
    insn_size: int, expected: bytes
) -> None:
    exit_ = _emulation_failure(4, 1, insn_size, b"\x0f\x01\xd9\x90")
    assert isinstance(exit_, InternalErrorExit)
    assert exit_.insn == expected


@pytest.mark.parametrize(("ndata", "flags"), [(4, 0), (4, 2), (0, 1)])
def test_internal_error_when_no_instruction_is_flagged_has_none(ndata: int, flags: int) -> None:
    exit_ = _emulation_failure(ndata, flags, 3, b"\x0f\x01\xd9")
    assert isinstance(exit_, InternalErrorExit)
    assert exit_.insn == b""


def test_internal_error_when_suberror_is_another_has_no_instruction() -> None:
    exit_ = _internal(suberror=lib.KVM_INTERNAL_ERROR_SIMUL_EX, ndata=2, data=[1, 0x90 << 8 | 1])
    assert isinstance(exit_, InternalErrorExit)
    assert exit_.insn == b""


@pytest.mark.parametrize(
    ("suberror", "text"),
    [
        (1, "KVM_EXIT_INTERNAL_ERROR suberror=1 (emulation failed)"),
        (77, "KVM_EXIT_INTERNAL_ERROR suberror=77 (unknown)"),
    ],
)
def test_internal_error_when_shown_explains_the_suberror(suberror: int, text: str) -> None:
    assert str(_internal(suberror=suberror)) == text


def test_internal_error_when_shown_has_the_instruction() -> None:
    assert str(_emulation_failure(4, 1, 2, b"\x0f\x0b")).endswith("(emulation failed) insn=0f0b")


def _system_event(type_: int, *data: int, ndata: int | None = None) -> SystemEventExit:
    event = {"type": type_, "ndata": len(data) if ndata is None else ndata, "data": list(data)}
    exit_ = _Page("KVM_EXIT_SYSTEM_EVENT", system_event=event).decode()
    assert isinstance(exit_, SystemEventExit)
    return exit_


def test_system_event_when_sev_term_has_name_and_word() -> None:
    event = _system_event(lib.KVM_SYSTEM_EVENT_SEV_TERM, 0x1234)
    assert (event.type_name, event.data) == ("SEV_TERM", (0x1234,))
    assert str(event) == "KVM_EXIT_SYSTEM_EVENT SEV_TERM data=['0x1234']"


def test_system_event_when_ndata_is_above_16_stays_inside() -> None:
    assert _system_event(1, *range(16), ndata=2**32 - 1).data == tuple(range(16))


def test_system_event_when_type_is_unknown_is_its_number() -> None:
    assert _system_event(77).type_name == "77"


@pytest.mark.parametrize(("flags", "private"), [(8, True), (0, False), (7, False)])
def test_memory_fault_when_decoded_tells_what_was_wanted(flags: int, private: bool) -> None:
    fault = {"flags": flags, "gpa": 0x5000, "size": 0x1000}
    exit_ = _Page("KVM_EXIT_MEMORY_FAULT", memory_fault=fault).decode()
    assert exit_ == MemoryFaultExit(0x5000, 0x1000, private, 0)
    wanted = "private" if private else "shared"
    assert str(exit_) == f"KVM_EXIT_MEMORY_FAULT gpa=0x5000 size=0x1000 access={wanted}"


def test_req_certs_when_decoded_has_the_guests_buffer() -> None:
    page = _Page("KVM_EXIT_SNP_REQ_CERTS")
    # 7.0: gpa at 0x20, npages at 0x28 (kernel-snp-abi 3.7)
    ffi.memmove(page.memory + 0x20, (0x5000).to_bytes(8, "little") + b"\x03".ljust(8, b"\0"), 16)
    exit_ = page.decode()
    assert exit_ == ReqCertsExit(0x5000, 3)
    assert str(exit_) == "KVM_EXIT_SNP_REQ_CERTS gpa=0x5000 pages=3"


def _unknown(reason: int) -> Exit:
    page = _Page("KVM_EXIT_UNKNOWN")
    page.run.exit_reason = reason
    return page.decode()


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        (lib.KVM_EXIT_UNKNOWN, "KVM_EXIT_UNKNOWN"),
        (999, "KVM_EXIT_999"),
        (2**32 - 1, "KVM_EXIT_4294967295"),
    ],
)
def test_exit_when_it_has_no_type_is_unknown_with_the_kernels_name(reason: int, text: str) -> None:
    exit_ = _unknown(reason)
    assert (exit_, str(exit_)) == (UnknownExit(reason), text)


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in dir(lib)
        if n.startswith("KVM_EXIT_") and not n.startswith(("KVM_EXIT_IO_", "KVM_EXIT_HYPERCALL_"))
    ],
)
def test_exit_name_when_the_kernel_has_one_is_it(name: str) -> None:
    assert exit_name(getattr(lib, name)) == name


def test_exit_name_when_the_directions_of_io_share_a_number_is_the_exits() -> None:
    assert exit_name(lib.KVM_EXIT_IO_OUT) == "KVM_EXIT_EXCEPTION"
