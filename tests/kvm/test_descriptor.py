"""Life cycle of the objects that own a descriptor."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from kvmlaunch.errors import ClosedError, IoctlError, KvmLaunchError
from kvmlaunch.kvm import HostMemory, Kvm, SevDevice
from kvmlaunch.kvm.descriptor import Descriptor
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import peek
from tests.host import require_kvm
from tests.kvm.machines import PAGE, Denying, recorded
from tests.kvm.methods import (
    CLASSES,
    HARMLESS_WHEN_CLOSED,
    METHODS,
    Method,
    World,
    public_names,
    world,
)

_OBJECTS = ("kvm", "vm", "vcpu", "memfd", "sev")


@pytest.fixture
def sim() -> SimPlatform:
    return SimPlatform()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as exits:
        yield exits


@pytest.fixture
def opened(sim: SimPlatform, stack: ExitStack) -> World:
    return world(sim, stack)


def _close_all(opened: World) -> None:
    for item in opened:
        item.close()


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_table_when_compared_with_the_class_has_each_public_method(
    kind: type[Descriptor],
) -> None:
    listed = {method.name for method in METHODS if method.kind is kind}
    assert listed == public_names(kind) - HARMLESS_WHEN_CLOSED


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_method_when_object_is_closed_is_closed_error(opened: World, method: Method) -> None:
    _close_all(opened)
    with pytest.raises(ClosedError, match="is closed"):
        method.call(opened)


@pytest.mark.parametrize("name", _OBJECTS)
def test_closed_when_asked_tells(opened: World, name: str) -> None:
    item: Descriptor = getattr(opened, name)
    before = item.closed
    item.close()
    assert (before, item.closed) == (False, True)


def test_closed_error_when_raised_names_the_object(opened: World) -> None:
    opened.vcpu.close()
    with pytest.raises(ClosedError) as caught:
        opened.vcpu.get_regs()
    assert (str(caught.value), caught.value.what) == ("vCPU 0 is closed", "vCPU 0")


def test_request_exit_when_closed_does_nothing(opened: World) -> None:
    """It may come from another thread, which can't know."""
    opened.vcpu.close()
    opened.vcpu.request_exit()
    assert opened.vcpu.closed


@pytest.mark.parametrize("name", _OBJECTS)
def test_close_when_called_twice_closes_once(sim: SimPlatform, stack: ExitStack, name: str) -> None:
    platform, names = recorded(sim)
    item: Descriptor = getattr(world(platform, stack), name)
    names.clear()
    item.close()
    item.close()
    assert names == (["munmap", "close"] if name == "vcpu" else ["close"])


@pytest.mark.parametrize("name", _OBJECTS)
def test_fileno_when_open_is_a_descriptor_of_the_platform(
    sim: SimPlatform, opened: World, name: str
) -> None:
    item: Descriptor = getattr(opened, name)
    assert item.fileno() in sim.open_fds


@pytest.mark.parametrize("name", _OBJECTS)
def test_with_when_entered_is_the_object(opened: World, name: str) -> None:
    item: Descriptor = getattr(opened, name)
    with item as entered:
        assert entered is item


@pytest.mark.parametrize("name", _OBJECTS)
def test_with_when_left_by_an_error_closes_and_passes_it_on(opened: World, name: str) -> None:
    item: Descriptor = getattr(opened, name)
    with pytest.raises(AttributeError, match="KVM_NOTHING"), item:
        item.ioctl("KVM_NOTHING")
    assert item.closed


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("kvm", "<Kvm /dev/kvm fd=10000 platform=sim>"),
        ("vm", "<Vm VM (type 4) fd=10001 platform=sim>"),
        ("vcpu", "<Vcpu vCPU 0 fd=10002 platform=sim>"),
        ("memfd", "<GuestMemfd guest_memfd fd=10004 platform=sim>"),
        ("sev", "<SevDevice /dev/sev fd=10005 platform=sim>"),
    ],
)
def test_repr_when_open_has_the_fd(opened: World, name: str, text: str) -> None:
    assert repr(getattr(opened, name)) == text


@pytest.mark.parametrize("name", _OBJECTS)
def test_repr_when_closed_says_so(opened: World, name: str) -> None:
    item: Descriptor = getattr(opened, name)
    item.close()
    assert " CLOSED platform=sim>" in repr(item)


def test_world_when_all_is_closed_leaves_no_descriptor(sim: SimPlatform) -> None:
    with ExitStack() as stack:
        assert len(world(sim, stack)) == len(sim.open_fds) + 1  # memory has none
    assert sim.open_fds == ()


@pytest.mark.parametrize("failing", ["KVM_GET_VCPU_MMAP_SIZE", "mmap"])
def test_create_vcpu_when_its_next_step_fails_closes_the_fd(
    sim: SimPlatform, opened: World, failing: str
) -> None:
    before = sim.open_fds
    platform = Denying(sim, lambda name: errno.ENOMEM if name == failing else 0)
    opened.vm.platform = opened.kvm.platform = platform
    with pytest.raises(IoctlError) as caught:
        opened.vm.create_vcpu(1)
    assert caught.value.errno == errno.ENOMEM
    assert sim.open_fds == before


def test_create_vcpu_when_interrupted_by_the_user_closes_the_fd(
    sim: SimPlatform, opened: World
) -> None:
    before = sim.open_fds

    def interrupt(name: str) -> int:
        if name == "mmap":
            raise KeyboardInterrupt
        return 0

    opened.vm.platform = Denying(sim, interrupt)
    with pytest.raises(KeyboardInterrupt):
        opened.vm.create_vcpu(1)
    assert sim.open_fds == before


def test_create_vcpu_when_kvm_is_closed_leaves_no_fd(sim: SimPlatform, opened: World) -> None:
    opened.kvm.close()
    before = sim.open_fds
    with pytest.raises(ClosedError, match="/dev/kvm"):
        opened.vm.create_vcpu(1)
    assert sim.open_fds == before


@pytest.mark.parametrize("kind", [Kvm, SevDevice])
def test_open_when_it_fails_leaves_no_fd(kind: Any) -> None:
    sim = SimPlatform()
    with pytest.raises(IoctlError):
        kind.open(sim, "/dev/none")
    assert sim.open_fds == ()


def _real_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_real_objects_when_closed_leave_no_fd() -> None:
    platform = require_kvm()
    before = _real_fds()
    with Kvm.open(platform) as kvm, kvm.create_vm() as vm, vm.create_vcpu(0):
        assert len(_real_fds()) == len(before) + 3
    assert _real_fds() == before


@pytest.mark.parametrize("failing", ["KVM_GET_VCPU_MMAP_SIZE", "mmap"])
def test_real_create_vcpu_when_its_next_step_fails_leaves_no_fd(failing: str) -> None:
    denied: set[str] = set()
    platform = Denying(require_kvm(), lambda name: errno.ENOMEM if name in denied else 0)
    with Kvm.open(platform) as kvm, kvm.create_vm() as vm:
        before = _real_fds()
        denied.add(failing)
        with pytest.raises(IoctlError):
            vm.create_vcpu(0)
        denied.clear()
        assert _real_fds() == before


def test_real_fds_when_open_are_closed_on_exec() -> None:
    with Kvm.open(require_kvm()) as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        assert [os.get_inheritable(item.fd) for item in (kvm, vm, vcpu)] == [False] * 3


def test_close_when_vcpu_is_real_unmaps_its_run_page() -> None:
    with Kvm.open(require_kvm()) as kvm, kvm.create_vm() as vm:
        vcpu = vm.create_vcpu(0)
        address = vcpu._run_address
        assert len(peek(address, 8)) == 8
        vcpu.close()
        with pytest.raises(OSError, match="EFAULT"):
            peek(address, 8)


@pytest.fixture
def memory(sim: SimPlatform) -> Iterator[HostMemory]:
    with HostMemory(sim, 4 * PAGE) as opened:
        yield opened


def test_memory_when_new_is_zero(memory: HostMemory) -> None:
    assert bytes(memory.view) == bytes(4 * PAGE)


def test_memory_when_written_by_its_view_has_it_at_its_address(memory: HostMemory) -> None:
    memory.view[PAGE : PAGE + 5] = b"hello"
    assert peek(memory.address + PAGE, 5) == b"hello"


def test_memory_when_discarded_is_zero_there_only(memory: HostMemory) -> None:
    memory.view[:] = b"x" * 4 * PAGE
    memory.discard(PAGE, 2 * PAGE)
    assert bytes(memory.view) == b"x" * PAGE + bytes(2 * PAGE) + b"x" * PAGE


def test_memory_when_discarding_unaligned_is_an_error_with_the_range(memory: HostMemory) -> None:
    with pytest.raises(IoctlError) as caught:
        memory.discard(1, PAGE)
    assert caught.value.errno == errno.EINVAL
    assert caught.value.fields == {"offset": 1, "size": PAGE}


def test_memory_when_it_cannot_be_mapped_is_an_error_with_the_size(sim: SimPlatform) -> None:
    with pytest.raises(IoctlError) as caught:
        HostMemory(sim, 0)
    assert (caught.value.errno, caught.value.fields) == (errno.EINVAL, {"size": 0})


@pytest.mark.parametrize("use", ["address", "view", "discard"])
def test_memory_when_closed_is_closed_error(memory: HostMemory, use: str) -> None:
    memory.close()
    with pytest.raises(ClosedError, match="guest memory"):
        memory.discard(0, PAGE) if use == "discard" else getattr(memory, use)


def test_memory_when_closed_twice_unmaps_once(sim: SimPlatform) -> None:
    platform, names = recorded(sim)
    memory = HostMemory(platform, PAGE)
    memory.close()
    memory.close()
    assert names == ["mmap", "munmap"]


def test_closed_error_when_caught_as_ours_or_value_error_is_both() -> None:
    assert {KvmLaunchError, ValueError} <= set(ClosedError.__mro__)


def test_ioctl_raw_when_it_fails_gives_errno_and_raises_nothing(opened: World) -> None:
    result = opened.kvm.ioctl_raw("KVM_CREATE_VM", 31)
    assert result == (-1, errno.EINVAL)


def test_set_when_the_struct_lacks_a_field_is_key_error(opened: World) -> None:
    with pytest.raises(KeyError, match="eip"):
        opened.vcpu.set_regs({"eip": 1})


def test_ioctl_when_the_define_is_unknown_is_attribute_error(opened: World) -> None:
    with pytest.raises(AttributeError, match="KVM_NOTHING"):
        opened.kvm.ioctl("KVM_NOTHING")


def test_get_when_struct_is_nested_gives_dicts_bytes_and_lists(opened: World) -> None:
    sregs, fpu = opened.vcpu.get_sregs(), opened.vcpu.get_fpu()
    assert sregs["cs"]["selector"] == 0xF000
    assert sregs["interrupt_bitmap"] == [0, 0, 0, 0]
    assert fpu["fpr"] == [bytes(16)] * 8
