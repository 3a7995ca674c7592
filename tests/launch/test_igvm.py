"""Guests from IGVM files, at the ioctl line: what is launched, shared, bound and measured."""

from __future__ import annotations

from typing import Any

import pytest

from kvmlaunch import Guest, PlanOptions, Recorder, SimPlatform, load_image, measure
from kvmlaunch.errors import MissingCapability
from kvmlaunch.images import LaunchPlan, VmsaMode
from kvmlaunch.images.igvm.build import build, for_igvm
from kvmlaunch.launch.vmsa_mode import settle_vmsa_mode
from kvmlaunch.uapi import Call
from tests.guests import HALT
from tests.images import igvm_files as f
from tests.images.builders import ovmf

DATA = HALT.ljust(4096, b"\0") + f.pattern(1) + f.vmsa() + f.vmsa(rbx=1)
AT_CODE, AT_PATTERN, AT_VMSA, AT_OTHER = 0, 0x1000, 0x2000, 0x3000
EVERYTHING = (
    *(f.policy(0xB0000), f.area(0, 0x2000), f.parameter(0x307, 0), f.context(0x9000, AT_VMSA)),
    *(f.page(0x1000, AT_CODE), f.page(0x2000), f.insert(0x20000, 0), f.page(0x3000, kind=1)),
    *(f.page(0x4000, kind=2), f.page(0x5000, AT_PATTERN, flags=2), f.page(0x6000, AT_CODE)),
    *(f.page(0xFFFFF000, AT_PATTERN), f.page(0x80_0000_0000, AT_PATTERN)),
    *(f.page(0x8000, AT_PATTERN, flags=4), f.error_range(0xA000, 0x1000)),
    *(f.required(0, 0x200000), f.page(0x200000, flags=1), f.context(0xB000, AT_OTHER, 1)),
)


def plan(*headers: f.Header, **options: Any) -> LaunchPlan:
    return load_image(f.igvm([f.platform(), *headers], DATA), PlanOptions(**options))


def launched(made: LaunchPlan, profile: str) -> bytes:
    """The digest that the simulated firmware agreed on, page by page."""
    with SimPlatform(profile) as platform, Guest(made, platform) as guest:
        guest.launch()
        report = guest.witness()
        assert report.agrees, report
        return guest.digest


def test_launch_when_a_file_has_everything_gives_the_files_digest() -> None:
    made = plan(*EVERYTHING, vcpus=2)
    assert launched(made, "direct-vmsa") == measure(made).digest


def test_launch_when_the_kernel_makes_the_vmsas_gives_its_orders_digest() -> None:
    made = plan(*EVERYTHING, vcpus=2, order="kvm")
    assert made.vmsa_mode is VmsaMode.SYNC
    for profile in ("6.12", "6.18", "7.0"):
        assert launched(made, profile) == measure(made).digest
    assert measure(made).digest != measure(plan(*EVERYTHING, vcpus=2)).digest


def test_launch_when_a_file_is_kvms_is_the_same_with_and_without_vmsa_pages() -> None:
    image = load_image(HALT)
    file = b"".join(bytes(part) for part in build(for_igvm(image)))
    made = load_image(file)
    assert made.vmsa_mode is VmsaMode.DIRECT
    digests = {launched(made, "direct-vmsa"), launched(load_image(file, SYNC), "7.0")}
    assert digests == {measure(image).digest}
    with SimPlatform("7.0") as platform:
        settled = settle_vmsa_mode(made, platform)
    assert (settled.plan.vmsa_mode, settled.changes) == (VmsaMode.SYNC, ())


SYNC = PlanOptions(order="kvm")


def test_launch_when_firmware_is_in_the_file_is_the_images_launch() -> None:
    image = load_image(ovmf(), PlanOptions(vmsa_mode="direct", vmsas=()))
    file = b"".join(
        bytes(part) for part in build(for_igvm(image, native_zero=True), native_zero=True)
    )
    made = load_image(file, PlanOptions(native_zero=True))
    assert launched(made, "direct-vmsa") == launched(image, "direct-vmsa")
    assert made.apic


def test_settle_when_the_kernel_has_no_vmsa_pages_names_what_is_lost() -> None:
    vmsa = bytearray(f.vmsa())
    vmsa[0xCB] = 3  # cpl
    made = load_image(f.igvm([f.platform(), f.context(f.KVM_GPA, 0)], bytes(vmsa)))
    with SimPlatform("6.12") as platform:
        with pytest.raises(MissingCapability) as caught:
            settle_vmsa_mode(made, platform)
        settled = settle_vmsa_mode(made, platform, allow_digest_change=True)
    lost = "vCPU 0: KVM can't carry cpl (offset 0xcb): 0x3 in the VMSA, 0x0 measured"
    assert lost in str(caught.value)
    assert settled.changes[0] == lost


def test_guest_when_pages_are_shared_makes_them_so_and_fills_them() -> None:
    made = plan(
        *(f.page(0x1000, AT_CODE), f.page(0x8000, AT_PATTERN, flags=4)),
        *(f.error_range(0xA000, 0x2000), f.context(0x9000, AT_VMSA)),
    )
    calls: list[Call] = []
    with SimPlatform("direct-vmsa") as sim, Guest(made, Recorder(sim, calls.append)) as guest:
        assert bytes(guest.memory_view(0x8000, 0x1000)) == f.pattern(1)
        assert bytes(guest.memory_view(0xA000, 0x2000)) == bytes(0x2000)
        guest.launch()
        assert [record.gpa for record in guest.records] == [0x1000, 0x9000]
    private = 1 << 3  # KVM_MEMORY_ATTRIBUTE_PRIVATE
    attributes = [
        (call.sent["address"], call.sent["size"], call.sent["attributes"])
        for call in calls
        if call.name == "KVM_SET_MEMORY_ATTRIBUTES"
    ]
    shared = [(gpa, size) for gpa, size, bits in attributes if bits != private]
    assert shared == [(0x8000, 0x1000), (0xA000, 0x2000)]


def test_guest_when_contexts_are_for_two_vcpus_binds_each_to_its_own() -> None:
    made = plan(
        *(f.page(0x1000, AT_CODE), f.context(0xB000, AT_OTHER, 1), f.context(0x9000, AT_VMSA)),
        vcpus=2,
    )
    with SimPlatform("direct-vmsa") as platform, Guest(made, platform) as guest:
        guest.launch()
        states = [guest.registers(vcpu) for vcpu in (0, 1)]
    assert [state and state["rbx"] for state in states] == [0, 1]
