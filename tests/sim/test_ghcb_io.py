"""Port and memory I/O by the GHCB page: the exits to user space, and what comes back."""

from __future__ import annotations

import errno

import pytest

from kvmlaunch.uapi import ffi, lib

from .driver import PAGE, Guest
from .scripted import (
    BUFFER,
    GHCB_GPA,
    IN_BUFFER,
    INVALID_INPUT,
    INVALID_SCRATCH,
    RAX,
    SHARED_PAGE,
    Rig,
    answered,
    asks,
    io_data,
    ioio,
)

OK = (0, 0)
EINVAL = (-1, errno.EINVAL)
EFAULT = (-1, errno.EFAULT)


# Port I/O


def test_out_exits_with_the_bytes_of_rax():
    rig = asks(ioio(0x3F8, 2, rax=0x11223344))
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_IO)
    io = rig.run.io
    assert (io.direction, io.size, io.port, io.count, io.data_offset) == (1, 2, 0x3F8, 1, 0x1000)
    assert io_data(rig.run, 2) == b"\x44\x33"
    assert answered(rig).error == (0, 0)


def test_out_with_bits_above_the_port_is_the_same():
    """exit_info_1 of IOIO has 32 bits in KVM (io_interception)."""
    out = ioio(0x3F8, 1, rax=0x41)
    rig = asks({**out, "info_1": 0x55 << 32 | out["info_1"]})
    assert (rig.enter(), rig.run.exit_reason, rig.run.io.port) == (OK, lib.KVM_EXIT_IO, 0x3F8)


@pytest.mark.parametrize(
    ("size", "rax"), [(1, 0x11223344556677AB), (2, 0x112233445566CDAB), (4, 0x89EFCDAB)]
)
def test_in_merges_small_items_into_rax(size, rax):
    rig = asks(ioio(0x60, size, is_in=True, rax=0x1122334455667788))
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_IO)
    io = rig.run.io
    assert (io.direction, io.size, io.port, io.count) == (0, size, 0x60, 1)
    assert io_data(rig.run, 4) == bytes(4)
    ffi.buffer(ffi.cast("char *", rig.run) + 0x1000, 4)[:] = b"\xab\xcd\xef\x89"
    assert answered(rig).field(RAX) == rax


def test_io_without_a_size_goes_on():
    assert answered(asks(ioio(0x60, 0, is_in=True))).error == (0, 0)


def test_io_with_an_odd_size_is_done_as_kvm_does_it():
    rig = asks(ioio(0x60, 3, rax=0x112233))
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_IO)
    assert (rig.run.io.size, io_data(rig.run, 3)) == (3, b"\x33\x22\x11")


def test_string_out_exits_once_with_all_items():
    rig = asks(ioio(0x3F8, 1, string=True, count=5, scratch=IN_BUFFER + 3))
    request = rig.request

    def with_text(**fields):
        request(**fields)
        rig.put(BUFFER + 3, b"hello")

    rig.request = with_text
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_IO)
    assert (rig.run.io.count, io_data(rig.run, 5)) == (5, b"hello")
    answered(rig)


def test_string_in_fills_the_scratch_area():
    rig = asks(ioio(0x60, 2, is_in=True, string=True, count=3, scratch=IN_BUFFER))
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_IO)
    assert (rig.run.io.direction, rig.run.io.size, rig.run.io.count) == (0, 2, 3)
    ffi.buffer(ffi.cast("char *", rig.run) + 0x1000, 6)[:] = b"abcdef"
    assert answered(rig).shared(BUFFER, 7) == b"abcdef\0"


def test_string_io_of_version_1_takes_a_page_at_a_time_from_memory():
    out = ioio(0x3F8, 1, string=True, count=PAGE + 2, scratch=SHARED_PAGE)
    rig = asks(out, ghcb_version=1)
    rig.guest.ram.write(b"a" * PAGE + b"bc", SHARED_PAGE - Guest.GPA)
    assert (rig.enter(), rig.run.io.count) == (OK, PAGE)
    assert io_data(rig.run, PAGE) == b"a" * PAGE
    assert (rig.enter(), rig.run.io.count, io_data(rig.run, 2)) == (OK, 2, b"bc")
    answered(rig)


def test_string_in_of_version_1_is_written_back():
    rig = asks(ioio(0x60, 4, is_in=True, string=True, count=1, scratch=SHARED_PAGE), ghcb_version=1)
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_IO)
    ffi.buffer(ffi.cast("char *", rig.run) + 0x1000, 4)[:] = b"data"
    answered(rig)
    assert rig.guest.ram.read(4, SHARED_PAGE - Guest.GPA) == b"data"


@pytest.mark.parametrize(("count", "size"), [(1 << 31, 1), (1 << 30, 2), (1 << 63, 4)])
def test_string_io_of_too_many_bytes_fails_the_run(count, size):
    rig = asks(ioio(0x60, size, string=True, count=count, scratch=IN_BUFFER))
    assert rig.enter() == EINVAL


def test_string_io_of_nothing_goes_on():
    assert answered(asks(ioio(0x60, 1, string=True, scratch=IN_BUFFER))).error == (0, 0)


@pytest.mark.parametrize(
    "scratch",
    [0, GHCB_GPA, GHCB_GPA + 0x7FF, GHCB_GPA + 0xFEF, SHARED_PAGE, (1 << 64) - 1],
    ids=["none", "save area", "before the buffer", "behind the buffer", "outside", "wraps"],
)
def test_scratch_area_outside_the_buffer_is_refused(scratch):
    rig = answered(asks(ioio(0x60, 2, string=True, count=1, scratch=scratch)))
    assert rig.error == (2, INVALID_SCRATCH)


@pytest.mark.parametrize("at", [BUFFER, 0xFEE], ids=["first bytes", "last bytes"])
def test_scratch_area_that_just_fits_is_taken(at):
    rig = asks(ioio(0x60, 2, string=True, count=1, scratch=GHCB_GPA + at))
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_IO)


def test_scratch_area_of_version_1_of_16_pages_is_taken():
    rig = asks(ioio(0x60, 1, string=True, count=16 * PAGE, scratch=Guest.GPA), ghcb_version=1)
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_IO)


def test_scratch_area_of_version_1_that_is_only_read_stays_as_it_is():
    rig = asks(ioio(0x3F8, 1, string=True, count=4, scratch=SHARED_PAGE), ghcb_version=1)
    rig.guest.ram.write(b"text", SHARED_PAGE - Guest.GPA)
    assert (rig.enter(), io_data(rig.run, 4)) == (OK, b"text")
    # The guest may go on with that memory meanwhile.
    rig.guest.ram.write(b"next", SHARED_PAGE - Guest.GPA)
    answered(rig)
    assert rig.guest.ram.read(4, SHARED_PAGE - Guest.GPA) == b"next"


def test_scratch_area_of_version_1_is_not_longer_than_16_pages():
    too_long = ioio(0x60, 1, string=True, count=16 * PAGE + 1, scratch=Guest.GPA)
    assert answered(asks(too_long, ghcb_version=1)).error == (2, INVALID_SCRATCH)


def test_scratch_area_of_version_1_up_to_the_last_address_wraps():
    wraps = ioio(0x60, 2, string=True, count=1, scratch=(1 << 64) - 2)
    assert answered(asks(wraps, ghcb_version=1)).error == (2, INVALID_SCRATCH)


def test_scratch_area_of_version_1_where_nothing_is_fails_the_run():
    rig = asks(ioio(0x60, 1, string=True, count=1, scratch=0x40000000), ghcb_version=1)
    assert rig.enter() == EFAULT


# MMIO

DEVICE = 0xD0000004


def test_mmio_read_exits_and_fills_the_buffer():
    rig = asks({"code": 0x80000001, "info_1": DEVICE, "info_2": 3, "scratch": IN_BUFFER + 8})
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_MMIO)
    mmio = rig.run.mmio
    assert (mmio.phys_addr, mmio.len, mmio.is_write) == (DEVICE, 3, 0)
    ffi.buffer(mmio.data)[:] = b"ABCDEFGH"
    assert answered(rig).shared(BUFFER + 8, 4) == b"ABC\0"


def test_mmio_write_exits_with_the_bytes_of_the_buffer():
    rig = asks({"code": 0x80000002, "info_1": DEVICE, "info_2": 8, "scratch": IN_BUFFER})
    request = rig.request

    def with_data(**fields):
        request(**fields)
        rig.put(BUFFER, b"12345678")

    rig.request = with_data
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_MMIO)
    mmio = rig.run.mmio
    assert (mmio.phys_addr, mmio.len, mmio.is_write) == (DEVICE, 8, 1)
    assert bytes(ffi.buffer(mmio.data)) == b"12345678"
    assert answered(rig).error == (0, 0)


@pytest.mark.parametrize("code", [0x80000001, 0x80000002])
@pytest.mark.parametrize(("size", "error"), [(0, (0, 0)), (9, (2, INVALID_INPUT))])
def test_mmio_of_a_size_that_can_not_be_does_not_exit(code, size, error):
    rig = asks({"code": code, "info_1": DEVICE, "info_2": size, "scratch": IN_BUFFER})
    assert answered(rig).error == error


def test_mmio_read_of_version_1_goes_on_in_pieces():
    rig = asks(
        {"code": 0x80000001, "info_1": DEVICE, "info_2": 11, "scratch": SHARED_PAGE},
        ghcb_version=1,
    )
    assert (rig.enter(), rig.run.mmio.phys_addr, rig.run.mmio.len) == (OK, DEVICE, 8)
    ffi.buffer(rig.run.mmio.data)[:] = b"01234567"
    assert (rig.enter(), rig.run.mmio.phys_addr, rig.run.mmio.len) == (OK, DEVICE + 8, 3)
    ffi.buffer(rig.run.mmio.data)[:] = b"89A-----"
    answered(rig)
    assert rig.guest.ram.read(12, SHARED_PAGE - Guest.GPA) == b"0123456789A\0"


def test_mmio_write_of_version_1_is_a_write_in_its_first_piece_only():
    """kvm_sev_es_mmio_write() leaves vcpu->mmio_is_write as it was: 0."""
    rig = asks(
        {"code": 0x80000002, "info_1": DEVICE, "info_2": 11, "scratch": SHARED_PAGE},
        ghcb_version=1,
    )
    rig.guest.ram.write(b"0123456789A", SHARED_PAGE - Guest.GPA)
    mmio = rig.run.mmio
    assert (rig.enter(), mmio.phys_addr, mmio.len, mmio.is_write) == (OK, DEVICE, 8, 1)
    assert bytes(ffi.buffer(mmio.data)) == b"01234567"
    ffi.buffer(mmio.data)[:] = b"--------"
    assert (rig.enter(), mmio.phys_addr, mmio.len, mmio.is_write) == (OK, DEVICE + 8, 3, 0)
    answered(rig)
    # Of a write nothing goes back to the guest.
    assert rig.guest.ram.read(11, SHARED_PAGE - Guest.GPA) == b"0123456789A"


APIC = 0xFEE00000
APIC_PRIORITY = APIC + 0x80


def finished(rig: Rig) -> Rig:
    """KVM_RUN completes the exit and stops; without it a guest with an APIC would block."""
    rig.run.immediate_exit = 1
    assert rig.enter() == (-1, errno.EINTR)
    return rig


def test_mmio_of_the_apic_in_the_kernel_does_not_exit():
    write = {"code": 0x80000002, "info_1": APIC_PRIORITY, "info_2": 4, "scratch": IN_BUFFER}
    device = {"code": 0x80000002, "info_1": DEVICE, "info_2": 4, "scratch": IN_BUFFER}
    rig = asks(write, {**write, "code": 0x80000001}, device, split=True)
    request, seen = rig.request, []

    def with_data(**fields):
        seen.append(rig.shared(BUFFER, 4))
        request(**fields)
        if len(seen) == 1:
            rig.put(BUFFER, b"\x20\0\0\0")

    rig.request = with_data
    assert (rig.enter(), rig.run.mmio.phys_addr) == (OK, DEVICE)
    assert seen[2] == b"\x20\0\0\0"


# vcpu_mmio_read() asks the APIC again for each 8 bytes, until it is another's turn;
# complete_sev_es_emulated_mmio() doesn't.
@pytest.mark.parametrize("code", [0x80000001, 0x80000002])
@pytest.mark.parametrize(
    ("gpa", "exits"),
    [(APIC + 0xFF8, [(APIC + 0x1000, 8)]), (APIC - 8, [(APIC - 8, 8), (APIC, 8)])],
    ids=["ends behind", "begins before"],
)
def test_mmio_of_version_1_that_is_partly_the_apics_exits_for_the_rest(code, gpa, exits):
    rig = asks(
        {"code": code, "info_1": gpa, "info_2": 16, "scratch": SHARED_PAGE},
        ghcb_version=1,
        split=True,
    )
    seen = []
    for _ in exits:
        assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_MMIO)
        seen.append((rig.run.mmio.phys_addr, rig.run.mmio.len))
    assert seen == exits
    finished(rig)
