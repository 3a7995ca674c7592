"""SNP_LAUNCH_UPDATE: progress, repetition, page types, and the corrected CPUID page."""

from __future__ import annotations

import mmap
import struct
import tempfile
from typing import Any

import pytest

from kvmlaunch.errors import FirmwareError, FormatError, IoctlError
from kvmlaunch.snp import CpuidRejected, Started, launch
from kvmlaunch.uapi import RealPlatform, Result, RunResult, lib
from tests.abi import vectors

from .rig import (
    CPUID,
    GPA,
    NORMAL,
    PAGE,
    POLICY,
    SECRETS,
    SLOT_PAGES,
    UNMEASURED,
    VMSA,
    ZERO,
    Rig,
    snp_vm,
)

UPDATE = "KVM_SEV_SNP_LAUNCH_UPDATE"
EIO, EAGAIN, EINTR, EINVAL = 5, 11, 4, 22


def all_of(rig: Rig, state: Started, npages: int, *, gpa: int = GPA, type_: int = NORMAL) -> Any:
    return list(state.update_all(gpa, type_, rig.source.address, npages * PAGE))


def fill(rig: Rig) -> None:
    for number in range(2 * SLOT_PAGES):
        rig.page(number, bytes([number + 1]) * PAGE)


def digest(rig: Rig) -> bytes:
    value = rig.host.launch_digest(rig.vm.fd)  # type: ignore[attr-defined]
    assert isinstance(value, bytes)
    return value


def undisturbed(npages: int) -> bytes:
    with snp_vm() as rig:
        fill(rig)
        all_of(rig, rig.started(), npages)
        return digest(rig)


def cpuid_page(*entries: tuple[int, int, int, int, int, int], count: int | None = None) -> bytes:
    """A CPUID page of (leaf, index, eax, ebx, ecx, edx), packed by hand (AMD 56860)."""
    body = b"".join(struct.pack("<IIQQIIIIQ", e[0], e[1], 0, 0, *e[2:], 0) for e in entries)
    return struct.pack("<I12x", len(entries) if count is None else count) + body


# A hypervisor leaf, which no firmware looks at.
FREE_ENTRY = (0x40000000, 0, 1, 2, 3, 4)


# Progress


def test_update_when_nothing_fails_does_the_whole_range_at_once() -> None:
    with snp_vm() as rig:
        assert all_of(rig, rig.started(), 4) == [4 * PAGE]


@pytest.mark.parametrize("pages", [1, 2, 3])
def test_update_when_the_kernel_stops_early_returns_the_bytes_done(pages: int) -> None:
    with snp_vm(faults=[f"SNP_LAUNCH_UPDATE:partial={pages}"]) as rig:
        done = rig.started().update(GPA, NORMAL, rig.source.address, 4 * PAGE)
        assert done == pages * PAGE


@pytest.mark.parametrize("pages", [1, 2, 3])
def test_update_all_when_the_kernel_stops_early_goes_on_from_there(pages: int) -> None:
    with snp_vm(faults=[f"SNP_LAUNCH_UPDATE:partial={pages}"]) as rig:
        assert all_of(rig, rig.started(), 4) == [pages * PAGE, (4 - pages) * PAGE]


@pytest.mark.parametrize("pages", [1, 2, 3])
def test_update_all_when_the_kernel_stops_early_gives_the_same_digest(pages: int) -> None:
    with snp_vm(faults=[f"SNP_LAUNCH_UPDATE:partial={pages}"]) as rig:
        fill(rig)
        all_of(rig, rig.started(), 4)
        assert digest(rig) == undisturbed(4)


def test_update_all_when_it_stops_at_every_page_gives_the_same_digest() -> None:
    with snp_vm(faults=["SNP_LAUNCH_UPDATE:partial=1@1+"]) as rig:
        fill(rig)
        assert all_of(rig, rig.started(), 5) == [PAGE] * 5
        assert digest(rig) == undisturbed(5)


def test_update_all_when_a_later_page_is_refused_names_that_page() -> None:
    # The first call stops at page 2 with success, the second tells the status.
    with snp_vm(faults=["SNP_LAUNCH_UPDATE:fw=0x1a@3+"]) as rig:
        state = rig.started()
        steps = state.update_all(GPA, NORMAL, rig.source.address, 4 * PAGE)
        assert next(steps) == 2 * PAGE
        with pytest.raises(FirmwareError) as caught:
            next(steps)
    assert caught.value.fields["gpa"] == GPA + 2 * PAGE
    assert caught.value.fw_error == 0x1A


def test_update_all_when_the_range_crosses_a_slot_end_goes_on_in_the_next_slot() -> None:
    slots = [(GPA, SLOT_PAGES), (GPA + SLOT_PAGES * PAGE, SLOT_PAGES)]
    with snp_vm(slots=slots) as rig:
        fill(rig)
        state = rig.started()
        sizes = all_of(rig, state, SLOT_PAGES, gpa=GPA + 5 * PAGE)
        assert sizes == [3 * PAGE, 5 * PAGE]
        assert [gpa for _, gpa in rig.measured()] == [GPA + n * PAGE for n in range(5, 13)]


def test_update_all_when_the_range_leaves_the_last_slot_names_the_first_page_outside() -> None:
    with snp_vm() as rig:
        steps = rig.started().update_all(
            GPA + 6 * PAGE, NORMAL, rig.source.address, 4 * PAGE, what=lambda gpa: f"tail {gpa:#x}"
        )
        assert next(steps) == 2 * PAGE
        with pytest.raises(IoctlError) as caught:
            next(steps)
    assert caught.value.errno == EINVAL
    assert caught.value.fields["gpa"] == GPA + SLOT_PAGES * PAGE
    assert f"Page: tail {GPA + SLOT_PAGES * PAGE:#x}. " in str(caught.value)


class Idle:
    """A kernel that says success and does nothing."""

    name = "kvm"
    profile = ""

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
        return Result(0, 0)

    def run(self, fd: int, run: Any, uart: Any) -> RunResult:
        raise AssertionError


def test_update_when_success_comes_without_progress_is_an_error() -> None:
    with snp_vm() as rig:
        state = rig.started()
        state.vm.platform = Idle()  # type: ignore[assignment]
        with pytest.raises(IoctlError, match="has done no page"):
            state.update(GPA, NORMAL, rig.source.address, PAGE)
        state.vm.platform = rig.kvm.platform


# EAGAIN, EINTR, signals


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_EAGAIN_PAUSE_SECONDS", 0)


@pytest.mark.parametrize("name", ["EAGAIN", "EINTR"])
def test_update_when_told_to_try_again_tries_again(name: str) -> None:
    with snp_vm(faults=[f"SNP_LAUNCH_UPDATE:errno={name}"]) as rig:
        assert all_of(rig, rig.started(), 2) == [2 * PAGE]
        assert rig.count(UPDATE) == 2


@pytest.mark.parametrize("name", ["EAGAIN", "EINTR"])
def test_update_when_told_to_try_again_gives_the_same_digest(name: str) -> None:
    with snp_vm(faults=[f"SNP_LAUNCH_UPDATE:errno={name}"]) as rig:
        fill(rig)
        all_of(rig, rig.started(), 2)
        assert digest(rig) == undisturbed(2)


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize(("name", "number"), [("EAGAIN", EAGAIN), ("EINTR", EINTR)])
def test_update_when_told_to_try_again_for_ever_gives_up(name: str, number: int) -> None:
    with snp_vm(faults=[f"SNP_LAUNCH_UPDATE:errno={name}@1+"]) as rig:
        with pytest.raises(IoctlError) as caught:
            all_of(rig, rig.started(), 2)
        assert caught.value.errno == number
        assert 1 < rig.count(UPDATE) <= 1000


def test_update_when_another_errno_comes_is_not_repeated() -> None:
    with snp_vm(faults=["SNP_LAUNCH_UPDATE:errno=ENOMEM"]) as rig:
        with pytest.raises(IoctlError):
            all_of(rig, rig.started(), 2)
        assert rig.count(UPDATE) == 1


def test_update_all_when_a_signal_comes_in_the_middle_goes_on() -> None:
    with snp_vm(faults=["SNP_LAUNCH_UPDATE:signal=2"]) as rig:
        fill(rig)
        assert all_of(rig, rig.started(), 4) == [2 * PAGE, 2 * PAGE]
        assert digest(rig) == undisturbed(4)


def test_update_when_a_signal_comes_before_the_first_page_names_a_signal_as_possible() -> None:
    with snp_vm(faults=["SNP_LAUNCH_UPDATE:signal=0"]) as rig:
        with pytest.raises(IoctlError, match="a signal is pending") as caught:
            all_of(rig, rig.started(), 4)
        assert caught.value.errno == EIO


# Alignment and sources


@pytest.mark.parametrize(
    ("gpa", "size"),
    [(GPA + 1, PAGE), (GPA + 0x800, PAGE), (GPA, PAGE - 1), (GPA, 1), (GPA, 0), (GPA, -PAGE)],
)
def test_update_when_it_is_not_whole_pages_is_refused_before_the_kernel(
    gpa: int, size: int
) -> None:
    with snp_vm() as rig:
        state = rig.started()
        with pytest.raises(FormatError, match="not whole pages"):
            state.update(gpa, NORMAL, rig.source.address, size)
        assert rig.count(UPDATE) == 0


@pytest.mark.parametrize("profile", ["6.12", "6.18"])
def test_update_when_the_source_is_unaligned_works_on_older_kernels(profile: str) -> None:
    with snp_vm(profile) as rig:
        done = rig.started().update(GPA, NORMAL, rig.source.address + 8, PAGE)
        assert done == PAGE


def test_update_when_the_source_is_unaligned_is_einval_on_7_0() -> None:
    with snp_vm("7.0") as rig:
        with pytest.raises(IoctlError, match="source not page aligned") as caught:
            rig.started().update(GPA, NORMAL, rig.source.address + 8, PAGE)
        assert caught.value.errno == EINVAL


@pytest.mark.parametrize("type_", [NORMAL, UNMEASURED, SECRETS, CPUID])
@pytest.mark.parametrize("address", [0, PAGE, (1 << 47) - PAGE])
def test_update_when_the_source_is_unreadable_says_so_among_the_causes(
    type_: int, address: int
) -> None:
    with snp_vm() as rig:
        with pytest.raises(IoctlError, match="the source can't be read") as caught:
            rig.started().update(GPA, type_, address, PAGE)
        assert (caught.value.errno, caught.value.fw_error) == (EIO, 0)


def test_update_all_when_a_later_source_page_is_unreadable_names_that_page() -> None:
    with snp_vm() as rig, tempfile.TemporaryFile() as file:
        # The third page of the mapping lies behind the end of the file.
        file.truncate(2 * PAGE)
        address = RealPlatform().mmap(file.fileno(), 3 * PAGE, mmap.PROT_READ, mmap.MAP_SHARED).ret
        steps = rig.started().update_all(GPA, NORMAL, address, 3 * PAGE)
        assert next(steps) == 2 * PAGE
        with pytest.raises(IoctlError) as caught:
            next(steps)
        RealPlatform().munmap(address, 3 * PAGE)
    assert caught.value.fields["gpa"] == GPA + 2 * PAGE


# Page types


@pytest.mark.parametrize("type_", [NORMAL, ZERO, UNMEASURED, SECRETS])
def test_update_when_a_type_is_known_is_measured_as_that_type(type_: int) -> None:
    with snp_vm() as rig:
        rig.started().update(GPA, type_, rig.source.address, PAGE)
        assert rig.measured() == [(type_, GPA)]


def test_update_when_the_page_is_cpuid_is_measured_as_cpuid() -> None:
    with snp_vm() as rig:
        address = rig.page(0, cpuid_page(FREE_ENTRY))
        rig.started().update(GPA, CPUID, address, PAGE)
        assert rig.measured() == [(CPUID, GPA)]


@pytest.mark.parametrize("type_", [0, VMSA, 7, 255])
def test_update_when_mainline_does_not_take_the_type_names_it(type_: int) -> None:
    with snp_vm() as rig:
        with pytest.raises(IoctlError, match=rf"page type {type_}\b") as caught:
            rig.started().update(GPA, type_, rig.source.address, PAGE)
        assert caught.value.errno == EINVAL


def test_update_when_the_page_is_zero_needs_no_source() -> None:
    with snp_vm() as rig:
        assert list(rig.started().update_all(GPA, ZERO, 0, 3 * PAGE)) == [3 * PAGE]


@pytest.mark.parametrize("type_", [ZERO, UNMEASURED, SECRETS])
def test_update_when_the_type_is_not_measured_ignores_the_contents(type_: int) -> None:
    digests = set()
    for content in (b"one", b"two"):
        with snp_vm() as rig:
            rig.started().update(GPA, type_, rig.page(0, content), PAGE)
            digests.add(digest(rig))
    assert len(digests) == 1


def test_update_when_the_type_is_normal_depends_on_the_contents() -> None:
    digests = set()
    for content in (b"one", b"two"):
        with snp_vm() as rig:
            rig.started().update(GPA, NORMAL, rig.page(0, content), PAGE)
            digests.add(digest(rig))
    assert len(digests) == 2


def test_update_when_types_follow_each_other_gives_the_known_digest() -> None:
    """V12, steps a to e: every type, at the GPAs of the fact sheet."""
    slots = [(0x800000, 0x200), (0xFFFFE000, 2)]
    with snp_vm(slots=slots) as rig:
        state = rig.started()
        for type_, pages, _ in list(vectors.V12_STEPS.values())[:5]:
            for gpa, page in pages:
                content = page or (cpuid_page(FREE_ENTRY) if type_ == CPUID else b"")
                state.update(gpa, type_, rig.page(0, content), PAGE)
        assert digest(rig).hex() == vectors.V12_STEPS["e"][2]


# The CPUID page


CORRECTED = "CPUID:correct=0x40000000.ecx=0x7"


def test_update_when_the_cpuid_page_is_refused_shows_what_firmware_changed() -> None:
    with snp_vm(faults=[CORRECTED]) as rig:
        address = rig.page(0, cpuid_page(FREE_ENTRY))
        with pytest.raises(CpuidRejected) as caught:
            rig.started().update(GPA, CPUID, address, PAGE)
    assert caught.value.differences() == [
        "leaf 0x40000000 index 0x0 ECX: sent 0x3, corrected 0x7, differing bits 2"
    ]


def test_update_when_the_cpuid_page_is_refused_has_the_differences_in_the_text() -> None:
    with snp_vm(faults=[CORRECTED]) as rig:
        address = rig.page(0, cpuid_page(FREE_ENTRY))
        with pytest.raises(CpuidRejected) as caught:
            rig.started().update(GPA, CPUID, address, PAGE, what="cpuid")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("SNP_LAUNCH_UPDATE ret=-5 fw_error=22 'Invalid parameter' ")
    assert lines[-1].startswith("leaf 0x40000000 index 0x0 ECX: ")


def test_update_when_the_cpuid_page_is_refused_keeps_both_pages() -> None:
    with snp_vm(faults=[CORRECTED]) as rig:
        address = rig.page(0, cpuid_page(FREE_ENTRY))
        with pytest.raises(CpuidRejected) as caught:
            rig.started().update(GPA, CPUID, address, PAGE)
    wanted = cpuid_page((0x40000000, 0, 1, 2, 7, 4)).ljust(PAGE, b"\0")
    assert caught.value.sent == cpuid_page(FREE_ENTRY).ljust(PAGE, b"\0")
    assert caught.value.corrected == wanted


def test_update_when_the_cpuid_page_is_refused_is_not_repeated() -> None:
    with snp_vm(faults=[CORRECTED]) as rig:
        with pytest.raises(CpuidRejected):
            rig.started().update(GPA, CPUID, rig.page(0, cpuid_page(FREE_ENTRY)), PAGE)
        assert rig.count(UPDATE) == 1


def test_update_when_the_corrected_cpuid_page_is_sent_is_taken() -> None:
    with snp_vm(faults=[CORRECTED]) as rig:
        state = rig.started()
        address = rig.page(0, cpuid_page(FREE_ENTRY))
        with pytest.raises(CpuidRejected):
            state.update(GPA, CPUID, address, PAGE)
        assert state.update(GPA, CPUID, address, PAGE) == PAGE


def test_update_when_firmware_refuses_a_leaf_that_the_cpu_lacks_shows_zeros() -> None:
    """No fault ordered: the simulated firmware's own check."""
    with snp_vm() as rig:
        address = rig.page(0, cpuid_page((0x7, 0, 0, 0, 0, 1 << 26)))
        with pytest.raises(CpuidRejected) as caught:
            rig.started().update(GPA, CPUID, address, PAGE)
    (line,) = caught.value.differences()
    assert line.startswith("leaf 0x7 index 0x0 EDX: sent 0x4000000, corrected 0x0")


def test_update_when_the_cpuid_page_is_none_at_all_still_has_a_text() -> None:
    with snp_vm() as rig:
        address = rig.page(0, cpuid_page(FREE_ENTRY, count=65))
        with pytest.raises(CpuidRejected, match="COUNT 65 is above 64"):
            rig.started().update(GPA, CPUID, address, PAGE)


def test_update_when_there_are_two_cpuid_pages_sends_them_one_by_one() -> None:
    with snp_vm() as rig:
        for number in range(2):
            rig.page(number, cpuid_page(FREE_ENTRY))
        assert all_of(rig, rig.started(), 2, type_=CPUID) == [PAGE, PAGE]


def test_update_when_the_second_cpuid_page_is_refused_never_sends_the_correction() -> None:
    """In one call of two pages the kernel would correct the second one behind a success."""
    with snp_vm(faults=[f"{CORRECTED}@2"]) as rig:
        for number in range(2):
            rig.page(number, cpuid_page(FREE_ENTRY))
        steps = rig.started().update_all(GPA, CPUID, rig.source.address, 2 * PAGE)
        assert next(steps) == PAGE
        with pytest.raises(CpuidRejected) as caught:
            next(steps)
    assert caught.value.fields["gpa"] == GPA + PAGE


def test_update_when_another_page_is_an_invalid_parameter_is_no_cpuid_error() -> None:
    with snp_vm(faults=["SNP_LAUNCH_UPDATE:fw=0x16"]) as rig:
        with pytest.raises(FirmwareError) as caught:
            rig.started(POLICY).update(GPA, NORMAL, rig.source.address, PAGE)
        assert not isinstance(caught.value, CpuidRejected)


def test_update_numbers_are_the_kernels() -> None:
    assert (NORMAL, ZERO, UNMEASURED, SECRETS, CPUID) == (
        lib.KVM_SEV_SNP_PAGE_TYPE_NORMAL,
        lib.KVM_SEV_SNP_PAGE_TYPE_ZERO,
        lib.KVM_SEV_SNP_PAGE_TYPE_UNMEASURED,
        lib.KVM_SEV_SNP_PAGE_TYPE_SECRETS,
        lib.KVM_SEV_SNP_PAGE_TYPE_CPUID,
    )
