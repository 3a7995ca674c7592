"""What the kernel is handed: each argument of a method in its field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvmlaunch.kvm import GuestMemfd, Kvm, Vcpu, Vm
from kvmlaunch.kvm.descriptor import struct_to_dict
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import lib
from tests.kvm.machines import PAGE, Captured


@pytest.fixture
def kernel() -> Any:
    return Captured()


@pytest.fixture
def vm(kernel: Any) -> Vm:
    return Vm(kernel, 4, lib.KVM_X86_SNP_VM, lambda: PAGE)


@pytest.fixture
def vcpu(kernel: Any) -> Vcpu:
    return Vcpu(kernel, 5, 0)


def _sent(kernel: Any, name: str) -> dict[str, Any]:
    """The struct's fields that are not zero."""
    fields = struct_to_dict(kernel.args[name])
    return {field: value for field, value in fields.items() if _is_set(value)}


def _is_set(value: Any) -> bool:
    return any(map(_is_set, value)) if isinstance(value, (list, bytes)) else bool(value)


@pytest.mark.parametrize(
    ("name", "call", "fields"),
    [
        (
            "KVM_ENABLE_CAP",
            lambda vm: vm.enable_cap(201, 1, 2, 3, 4, flags=5),
            {"cap": 201, "flags": 5, "args": [1, 2, 3, 4]},
        ),
        (
            "KVM_ENABLE_CAP",
            lambda vm: vm.split_irqchip(),
            {"cap": lib.KVM_CAP_SPLIT_IRQCHIP, "args": [24, 0, 0, 0]},
        ),
        (
            "KVM_ENABLE_CAP",
            lambda vm: vm.split_irqchip(48),
            {"cap": lib.KVM_CAP_SPLIT_IRQCHIP, "args": [48, 0, 0, 0]},
        ),
        (
            "KVM_CREATE_GUEST_MEMFD",
            lambda vm: vm.create_guest_memfd(PAGE, flags=3),
            {"size": PAGE, "flags": 3},
        ),
        (
            "KVM_SET_USER_MEMORY_REGION",
            lambda vm: vm.set_user_memory_region(1, 2, 3, 4, flags=5),
            {
                "slot": 1,
                "guest_phys_addr": 2,
                "memory_size": 3,
                "userspace_addr": 4,
                "flags": 5,
            },
        ),
        (
            "KVM_SET_USER_MEMORY_REGION2",
            lambda vm: vm.set_user_memory_region2(
                1, 2, 3, 4, memfd=GuestMemfd(vm.platform, 77, PAGE), memfd_offset=6
            ),
            {
                "slot": 1,
                "guest_phys_addr": 2,
                "memory_size": 3,
                "userspace_addr": 4,
                "guest_memfd": 77,
                "guest_memfd_offset": 6,
                "flags": lib.KVM_MEM_GUEST_MEMFD,
            },
        ),
        (
            "KVM_SET_MEMORY_ATTRIBUTES",
            lambda vm: vm.set_memory_attributes(1, 2, private=True),
            {"address": 1, "size": 2, "attributes": lib.KVM_MEMORY_ATTRIBUTE_PRIVATE},
        ),
        (
            "KVM_SET_MEMORY_ATTRIBUTES",
            lambda vm: vm.set_memory_attributes(1, 2, private=False),
            {"address": 1, "size": 2},
        ),
    ],
)
def test_vm_struct_when_sent_has_each_argument_in_its_field(
    kernel: Any, vm: Vm, name: str, call: Callable[[Vm], Any], fields: dict[str, Any]
) -> None:
    call(vm)
    assert _sent(kernel, name) == fields


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("KVM_CHECK_EXTENSION", lambda kvm: kvm.check_extension(234)),
        ("KVM_CREATE_VM", lambda kvm: kvm.create_vm(234)),
    ],
)
def test_kvm_value_when_sent_is_the_argument(
    kernel: Any, name: str, call: Callable[[Kvm], Any]
) -> None:
    call(Kvm(kernel, 3, "/dev/kvm"))
    assert kernel.values[name] == 234


def test_device_attr_when_sent_has_group_attr_and_an_address(kernel: Any) -> None:
    Kvm(kernel, 3, "/dev/kvm").device_attr(7, 8)
    sent = _sent(kernel, "KVM_GET_DEVICE_ATTR")
    assert (sent["group"], sent["attr"], sent["addr"] > 0) == (7, 8, True)


def test_device_attr_when_the_host_has_it_is_its_value() -> None:
    with Kvm.open(SimPlatform()) as kvm:
        assert kvm.device_attr(0, lib.KVM_X86_XCOMP_GUEST_SUPP) == 0x207


def test_supported_cpuid_when_read_has_exactly_the_fields_of_a_leaf() -> None:
    with Kvm.open(SimPlatform()) as kvm:
        leaf = kvm.supported_cpuid()[0]
    assert list(leaf) == ["function", "index", "flags", "eax", "ebx", "ecx", "edx"]


def test_vm_type_when_given_is_kept(vm: Vm) -> None:
    assert vm.vm_type == lib.KVM_X86_SNP_VM


@pytest.mark.parametrize(
    ("call", "mode"),
    [(GuestMemfd.allocate, 1), (GuestMemfd.punch_hole, 3)],
    ids=["allocate keeps the size", "punch_hole keeps the size"],
)
def test_memfd_when_fallocated_sends_mode_and_range(
    kernel: Any, call: Callable[[GuestMemfd, int, int], None], mode: int
) -> None:
    call(GuestMemfd(kernel, 6, 4 * PAGE), PAGE, 2 * PAGE)
    assert kernel.args["fallocate"] == (mode, PAGE, 2 * PAGE)


@pytest.mark.parametrize(
    ("name", "call", "fields"),
    [
        ("KVM_SET_REGS", lambda vcpu: vcpu.set_regs({"rip": 1, "r9": 2}), {"rip": 1, "r9": 2}),
        ("KVM_SET_FPU", lambda vcpu: vcpu.set_fpu({"fcw": 0x37F}), {"fcw": 0x37F}),
        ("KVM_SET_DEBUGREGS", lambda vcpu: vcpu.set_debugregs({"dr7": 0x400}), {"dr7": 0x400}),
        ("KVM_SET_MP_STATE", lambda vcpu: vcpu.set_mp_state(3), {"mp_state": 3}),
    ],
)
def test_vcpu_struct_when_sent_has_what_was_given_and_zeroes(
    kernel: Any, vcpu: Vcpu, name: str, call: Callable[[Vcpu], None], fields: dict[str, Any]
) -> None:
    call(vcpu)
    assert _sent(kernel, name) == fields


def test_xcr0_when_sent_is_the_one_register(kernel: Any, vcpu: Vcpu) -> None:
    vcpu.set_xcr0(7)
    sent = struct_to_dict(kernel.args["KVM_SET_XCRS"])
    assert (sent["nr_xcrs"], sent["xcrs"][0]) == (1, {"xcr": 0, "reserved": 0, "value": 7})


def test_msrs_when_set_are_sent_in_order(kernel: Any, vcpu: Vcpu) -> None:
    assert vcpu.set_msrs({0x277: 1, 0x10: 2, 0x174: 3}) == 3
    assert list(kernel.msrs.items()) == [(0x277, 1), (0x10, 2), (0x174, 3)]


def test_msrs_when_kvm_takes_fewer_say_how_many(kernel: Any, vcpu: Vcpu) -> None:
    kernel.msrs_taken = 1
    assert vcpu.set_msrs({0x277: 1, 0x10: 2}) == 1


def test_msrs_when_kvm_reads_fewer_end_before_the_refused_one(kernel: Any, vcpu: Vcpu) -> None:
    kernel.msrs_taken = 2
    assert vcpu.get_msrs([0x277, 0x10, 0x174]) == {0x277: 0, 0x10: 0}


@pytest.mark.parametrize("size", [0, 4095, 4097])
def test_xsave_when_its_size_is_wrong_is_value_error(kernel: Any, vcpu: Vcpu, size: int) -> None:
    with pytest.raises(ValueError, match="length"):
        vcpu.set_xsave(bytes(size))
