"""A guest from its plan to its close: witness, steps, CPUID page, building, conversion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kvmlaunch.errors import (
    ClosedError,
    FirmwareError,
    FormatError,
    IoctlError,
    LaunchStateError,
    MissingCapability,
)
from kvmlaunch.launch.guest import Guest
from kvmlaunch.sim import SimPlatform
from kvmlaunch.snp import CpuidRejected
from kvmlaunch.uapi import Call, MeasuredPage, Recorder, lib

from .rig import PAGE, Wrapped, plan, small_plan, step

UPDATE = "KVM_SEV_SNP_LAUNCH_UPDATE"

# Witness


class Tampered(Wrapped):
    """Its host remembers pages that ``change`` has been at."""

    def __init__(
        self,
        inner: SimPlatform,
        change: Callable[[list[MeasuredPage]], Sequence[MeasuredPage] | None],
    ) -> None:
        super().__init__(inner)
        self.change = change

    def measured_pages(self, vm_fd: int) -> Any:
        return self.change(list(self.inner.measured_pages(vm_fd) or []))


def witness(change: Callable[[list[MeasuredPage]], Sequence[MeasuredPage] | None]) -> Any:
    with (
        SimPlatform() as platform,
        Guest(small_plan(), Tampered(platform, change)) as guest,
    ):
        return guest.launch().witness()


def changed(at: int, **fields: Any) -> Callable[[list[MeasuredPage]], list[MeasuredPage]]:
    def change(pages: list[MeasuredPage]) -> list[MeasuredPage]:
        pages[at] = pages[at]._replace(**fields)
        return pages

    return change


@pytest.mark.parametrize("at", range(7))
@pytest.mark.parametrize(
    "fields", [{"contents": b"\1" * 48}, {"digest": b"\1" * 48}, {"gpa": 0x9000}, {"type": 9}]
)
def test_witness_when_a_page_differs_names_that_page(at: int, fields: dict[str, Any]) -> None:
    report = witness(changed(at, **fields))
    assert (report.agrees, report.first_difference.seq) == (False, at)


def test_witness_when_several_pages_differ_names_the_first() -> None:
    report = witness(lambda pages: [page._replace(contents=b"\1" * 48) for page in pages[:2]])
    assert report.first_difference.seq == 0


def test_witness_when_the_host_has_fewer_pages_names_the_missing_one() -> None:
    difference = witness(lambda pages: pages[:-1]).first_difference
    assert (difference.seq, difference.predicted.vcpu, difference.host) == (6, 0, None)


def test_witness_when_the_host_has_more_pages_names_the_surplus_one() -> None:
    difference = witness(lambda pages: [*pages, pages[0]]).first_difference
    assert (difference.seq, difference.predicted) == (7, None)
    assert difference.host.startswith("0x1000 type 1 ")


def test_witness_when_the_host_has_pages_in_another_order_names_the_first_in_the_wrong_place() -> (
    None
):
    report = witness(lambda pages: [pages[0], pages[2], pages[1], *pages[3:]])
    assert report.first_difference.seq == 1


def test_witness_when_the_host_can_not_be_asked_is_undecided() -> None:
    report = witness(lambda pages: None)
    assert report.agrees is None
    assert "ID block" in str(report)


def test_witness_when_it_agrees_says_on_how_many_pages() -> None:
    assert str(witness(lambda pages: pages)) == "prediction and host agree on all 7 pages"


def test_witness_when_it_differs_says_both() -> None:
    text = str(witness(changed(0, gpa=0x9000)))
    assert "differ first at page 0" in text
    assert "image.bin+0x0" in text
    assert "0x9000 type 1" in text


def test_witness_when_asked_in_the_middle_covers_what_the_kernel_took() -> None:
    with SimPlatform() as platform, Guest(small_plan(), platform) as guest:
        guest.start()
        next(guest.update())
        # The first call took both pages of the range.
        assert str(guest.witness()) == "prediction and host agree on all 2 pages"


# Steps


def test_guest_when_launched_step_by_step_gives_records_in_order() -> None:
    with SimPlatform() as platform, Guest(small_plan(vcpus=2), platform) as guest:
        guest.start()
        pages = list(guest.update())
        vmsas = guest.finish()
        assert [record.seq for record in [*pages, *vmsas]] == list(range(8))
        assert guest.records == [*pages, *vmsas]


def test_guest_when_launched_is_returned() -> None:
    with SimPlatform() as platform, Guest(small_plan(), platform) as guest:
        assert guest.launch() is guest


@pytest.mark.parametrize(
    ("wrong", "have", "need"),
    [
        (lambda guest: list(guest.update()), "New", "Started"),
        (lambda guest: guest.finish(), "New", "Started"),
    ],
)
def test_guest_when_not_started_names_both_states(
    wrong: Callable[[Guest], Any], have: str, need: str
) -> None:
    with SimPlatform() as platform, Guest(small_plan(), platform) as guest:
        with pytest.raises(LaunchStateError) as caught:
            wrong(guest)
        assert (caught.value.have, caught.value.need) == (have, need)


def test_guest_when_started_twice_names_both_states() -> None:
    with SimPlatform() as platform, Guest(small_plan(), platform) as guest:
        guest.start()
        with pytest.raises(LaunchStateError) as caught:
            guest.start()
        assert (caught.value.have, caught.value.need) == ("Started", "New")


def test_prediction_when_finish_was_called_too_early_stays_right() -> None:
    with SimPlatform() as platform, Guest(small_plan(), platform) as guest:
        with pytest.raises(LaunchStateError):
            guest.finish()
        guest.launch()
        assert guest.witness().agrees is True


def test_digest_when_finish_is_called_twice_stays_the_same() -> None:
    with SimPlatform() as platform, Guest(small_plan(), platform) as guest:
        digest = guest.launch().digest
        with pytest.raises(LaunchStateError):
            guest.finish()
        assert guest.digest == digest


def test_records_when_finish_fails_have_no_vmsas() -> None:
    with (
        SimPlatform(faults=["SNP_LAUNCH_FINISH:fw=0x02"]) as platform,
        Guest(small_plan(), platform) as guest,
    ):
        with pytest.raises(FirmwareError):
            guest.launch()
        assert [record.vcpu for record in guest.records] == [None] * 6


def test_records_when_an_update_fails_are_those_of_the_pages_done() -> None:
    with (
        SimPlatform(faults=["SNP_LAUNCH_UPDATE:fw=0x1a@4"]) as platform,
        Guest(small_plan(), platform) as guest,
    ):
        with pytest.raises(FirmwareError):
            guest.launch()
        assert [record.gpa for record in guest.records] == [0x1000, 0x2000, 0x4000]


def test_error_when_an_update_fails_names_page_range_and_source() -> None:
    with (
        SimPlatform(faults=["SNP_LAUNCH_UPDATE:fw=0x1a@2+"]) as platform,
        Guest(small_plan(), platform) as guest,
        pytest.raises(FirmwareError) as caught,
    ):
        guest.launch()
    assert "page 1 of image (image.bin+0x1000)" in str(caught.value)
    assert "gpa=0x2000" in str(caught.value)


# The CPUID page


def launch_with(*faults: str, retry: bool) -> tuple[Guest, list[Call]]:
    calls: list[Call] = []
    with (
        SimPlatform(faults=faults) as host,
        Guest(small_plan(), Recorder(host, calls.append)) as guest,
    ):
        guest.launch(retry_cpuid=retry)
        assert guest.witness().agrees is True
    return guest, [c for c in calls if c.name == UPDATE and c.sent["data"]["type"] == 6]


CORRECTED = "CPUID:correct=0x1.ecx"


def test_cpuid_page_when_accepted_is_sent_once() -> None:
    assert len(launch_with(retry=True)[1]) == 1


def test_cpuid_page_when_refused_is_not_repeated_unless_asked() -> None:
    with pytest.raises(CpuidRejected):
        launch_with(CORRECTED, retry=False)


def test_cpuid_page_when_refused_and_asked_is_repeated_once() -> None:
    assert [call.ret for call in launch_with(CORRECTED, retry=True)[1]] == [-1, 0]


def test_cpuid_page_when_refused_twice_is_an_error_even_if_asked() -> None:
    with pytest.raises(CpuidRejected, match="leaf 0x1 index 0x0 ECX"):
        launch_with(f"{CORRECTED}@1+", retry=True)


def test_cpuid_page_when_the_correction_is_taken_shows_the_difference() -> None:
    (correction,) = launch_with(CORRECTED, retry=True)[0].corrections
    (line,) = correction.differences()
    assert line.startswith("leaf 0x1 index 0x0 ECX: sent ")


def test_corrections_when_the_page_was_accepted_are_none() -> None:
    assert launch_with(retry=True)[0].corrections == []


def test_cpuid_pages_when_the_second_is_refused_are_retried_one_by_one() -> None:
    launch_plan = plan([step(0x1000, [None, None], 6)])
    with (
        SimPlatform(faults=[f"{CORRECTED}@2"]) as platform,
        Guest(launch_plan, platform) as guest,
    ):
        guest.launch(retry_cpuid=True)
        assert guest.witness().agrees is True
        assert len(guest.corrections) == 1


# Building


def test_guest_when_the_plan_is_for_a_plain_vm_is_plain() -> None:
    with SimPlatform() as platform, Guest(small_plan(confidential=False), platform) as guest:
        assert (guest.state, guest.sev, guest.vm.vm_type) == (None, None, lib.KVM_X86_DEFAULT_VM)


def test_guest_when_ghcb_version_is_one_is_taken_by_6_12() -> None:
    with SimPlatform("6.12") as platform, Guest(small_plan(), platform, ghcb_version=1) as guest:
        assert guest.launch().witness().agrees is True


def test_guest_when_ghcb_version_is_one_is_refused_by_6_18() -> None:
    """So the number does reach KVM_SEV_INIT2."""
    with SimPlatform("6.18") as platform, pytest.raises(IoctlError, match="KVM_SEV_INIT2 ret=-22"):
        Guest(small_plan(), platform, ghcb_version=1)


class Lacking(Wrapped):
    """A host without one capability."""

    def __init__(self, inner: SimPlatform, cap: int) -> None:
        super().__init__(inner)
        self.cap = cap

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Any:
        if request == lib.KVM_CHECK_EXTENSION and arg == self.cap:
            return self.inner.ioctl(fd, request, 0x7FFFFFFF)
        return super().ioctl(fd, request, arg)


@pytest.mark.parametrize(
    ("cap", "name"),
    [
        ("KVM_CAP_VM_TYPES", "SEV-SNP"),
        ("KVM_CAP_GUEST_MEMFD", "KVM_CAP_GUEST_MEMFD"),
        ("KVM_CAP_MEMORY_ATTRIBUTES", "KVM_CAP_MEMORY_ATTRIBUTES"),
        ("KVM_CAP_USER_MEMORY2", "KVM_CAP_USER_MEMORY2"),
    ],
)
def test_guest_when_the_host_lacks_a_capability_names_it(cap: str, name: str) -> None:
    with SimPlatform() as platform, pytest.raises(MissingCapability, match=name):
        Guest(small_plan(), Lacking(platform, getattr(lib, cap)))


def test_guest_when_built_asks_for_hypercall_exits() -> None:
    """Without KVM_CAP_EXIT_HYPERCALL every page state change of the guest fails."""
    calls: list[Call] = []
    with SimPlatform() as host, Guest(small_plan(), Recorder(host, calls.append)):
        pass
    enabled = [call.sent for call in calls if call.name == "KVM_ENABLE_CAP"]
    assert [sent["cap"] for sent in enabled] == [lib.KVM_CAP_EXIT_HYPERCALL]
    assert enabled[0]["args"].startswith("0010000000000000")


def test_guest_when_it_expects_apics_gets_them_before_the_vcpus() -> None:
    calls: list[Call] = []
    with SimPlatform() as host, Guest(small_plan(apic=True), Recorder(host, calls.append)):
        pass
    names = [
        "irqchip" if call.sent.get("cap") == lib.KVM_CAP_SPLIT_IRQCHIP else call.name
        for call in calls
    ]
    assert names.index("irqchip") < names.index("KVM_CREATE_VCPU")


@pytest.mark.parametrize(
    ("options", "state"),
    [
        ({"apic": True}, "KVM_MP_STATE_AP_RESET_HOLD"),
        ({}, "KVM_MP_STATE_RUNNABLE"),
        ({"apic": True, "confidential": False}, "KVM_MP_STATE_UNINITIALIZED"),
    ],
)
def test_vcpus_when_the_guest_starts_them_are_held_in_reset_but_the_first(
    options: dict[str, bool], state: str
) -> None:
    """KVM 6.12 looks for AP creation in this state, and in UNINITIALIZED it doesn't."""
    with SimPlatform() as host, Guest(small_plan(vcpus=3, **options), host) as guest:
        states = [vcpu.get_mp_state() for vcpu in guest.vcpus]
    assert states == [lib.KVM_MP_STATE_RUNNABLE, getattr(lib, state), getattr(lib, state)]


def test_guest_when_built_makes_all_of_its_memory_private() -> None:
    calls: list[Call] = []
    launch_plan = small_plan(memory=[(0, 64 * PAGE), (1 << 32, 16 * PAGE)])
    with SimPlatform() as host, Guest(launch_plan, Recorder(host, calls.append)):
        pass
    attributes = [call.sent for call in calls if call.name == "KVM_SET_MEMORY_ATTRIBUTES"]
    assert [(sent["address"], sent["size"], sent["attributes"]) for sent in attributes] == [
        (0, 64 * PAGE, 8),
        (1 << 32, 16 * PAGE, 8),
    ]


def test_guest_when_closed_can_be_closed_again() -> None:
    with SimPlatform() as platform:
        guest = Guest(small_plan(), platform)
        guest.close()
        guest.close()
        assert platform.open_fds == ()


def test_guest_when_closed_can_not_be_entered() -> None:
    with SimPlatform() as platform:
        guest = Guest(small_plan(), platform)
        guest.close()
        with pytest.raises(ClosedError), guest:
            pass


# Conversion


@pytest.mark.parametrize(
    ("gpa", "size"),
    [(0x1001, PAGE), (0x1000, 1), (0x1000, 0), (0x1000, -PAGE), (64 * PAGE, PAGE), (0, 65 * PAGE)],
)
def test_convert_when_the_range_is_no_guest_memory_is_refused_before_the_kernel(
    gpa: int, size: int
) -> None:
    calls: list[Call] = []
    with SimPlatform() as host, Guest(small_plan(), Recorder(host, calls.append)) as guest:
        before = len(calls)
        with pytest.raises(FormatError):
            guest.convert(gpa, size, private=True)
        assert len(calls) == before


def test_memory_view_when_written_is_read_back() -> None:
    with SimPlatform() as platform, Guest(small_plan(), platform) as guest:
        guest.memory_view(0x3000, 4)[:] = b"abcd"
        assert bytes(guest.memory_view(0x3001, 2)) == b"bc"


def test_memory_view_when_outside_is_a_format_error() -> None:
    with (
        SimPlatform() as platform,
        Guest(small_plan(), platform) as guest,
        pytest.raises(FormatError, match="0x40000"),
    ):
        guest.memory_view(64 * PAGE, 1)


# The C-bit in page tables (51 on each simulated host)


def test_guest_when_its_page_tables_have_another_c_bit_than_the_host_is_refused() -> None:
    with (
        SimPlatform() as platform,
        pytest.raises(FormatError) as caught,
        Guest(small_plan(cbitpos=47), platform),
    ):
        pass
    assert str(caught.value) == (
        "the page tables of test.bin have the C-bit at bit 47, but on this host it is bit 51: "
        "plan for that (--cbitpos, PlanOptions.cbitpos)"
    )


@pytest.mark.parametrize("position", [None, 51])
def test_guest_when_its_page_tables_suit_the_host_is_built(position: int | None) -> None:
    with SimPlatform() as platform, Guest(small_plan(cbitpos=position), platform) as guest:
        assert guest.launch().witness().agrees


def test_guest_when_the_host_does_not_tell_the_c_bit_is_built(
    silent_cpuid: None,
) -> None:
    # Without a CPUID page, which the firmware would correct.
    planned = plan([step(0x1000, [b"a" * PAGE])], cbitpos=39)
    with SimPlatform() as platform, Guest(planned, platform) as guest:
        assert guest.launch().witness().agrees
