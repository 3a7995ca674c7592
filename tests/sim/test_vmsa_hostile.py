"""User space that says anything to the kernels of the proposals: an errno or success, no crash."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmlaunch.uapi import ffi, lib

from .driver import PAGE, RAM_PAGES, Guest, Memory, simulated, struct
from .vmsa_pages import DIRECT_VMSA, GET, OK, SET, VCPU_STATE, VmsaGuest, vmsa_page

SETTINGS = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
ERRNOS = {errno.EINVAL, errno.EIO, errno.EFAULT, errno.ENOTTY, errno.EPERM, errno.EBADF}
EXITS = {lib.KVM_EXIT_FAIL_ENTRY, lib.KVM_EXIT_SHUTDOWN, lib.KVM_EXIT_HLT}

u32, u64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
gpas = st.one_of(
    st.integers(0, RAM_PAGES).map(lambda page: Guest.GPA + page * PAGE),
    st.sampled_from([0, 1, 0x200000, (1 << 64) - 1, (1 << 64) - PAGE]),
    u64,
)
states = st.fixed_dictionaries(
    {
        "valid_fields": st.one_of(st.integers(0, 3), u64),
        "vmsa_gpa": gpas,
        "ghcb_gpa": gpas,
        "pad": st.one_of(st.just([0] * 5), st.lists(u64, min_size=5, max_size=5)),
    }
)
vmsas = st.one_of(
    st.just(vmsa_page()),
    st.builds(lambda vmpl, features: vmsa_page(vmpl=vmpl, o_3b0=features), st.integers(0, 4), u64),
    st.binary(min_size=PAGE, max_size=PAGE),
)
updates = st.fixed_dictionaries(
    {
        "gfn_start": st.one_of(st.integers(0xFF, 0x111), u64),
        "uaddr": st.one_of(st.none(), u64),
        "len": st.one_of(st.sampled_from([0, 1, PAGE, 2 * PAGE]), st.integers(0, 1 << 20)),
        "type": st.one_of(st.just(2), st.integers(0, 255)),
        "flags": st.one_of(st.just(0), st.integers(0, 0xFFFF)),
    }
)
commands = st.one_of(st.sampled_from([GET, SET, 100, 101, 102, 103]), u32)
calls = st.one_of(
    st.tuples(st.just("enable"), st.sampled_from([DIRECT_VMSA, VCPU_STATE]), u32, u64),
    st.tuples(st.just("update"), updates, vmsas),
    st.tuples(st.just("state"), commands, states),
    st.tuples(st.just("command"), commands, u64, u32),
    st.tuples(st.just("raw"), u64),
    st.tuples(st.just("vcpu")),
    st.tuples(st.just("shared"), st.integers(0, RAM_PAGES - 1), st.booleans()),
    st.tuples(st.just("finish")),
    st.tuples(st.just("run")),
)


def call(guest: VmsaGuest, name: str, *what: Any) -> Any:
    """One of `calls`: its result."""
    vcpu = guest.vcpus[-1]
    if name == "enable":
        number, flags, arg = what
        return guest.enable(number, flags=flags % 2, args=[arg % 2, 0, 0, arg % 3])
    if name == "update":
        fields, page = dict(what[0]), what[1]
        guest.source.write(page)
        if fields["uaddr"] is None:
            fields["uaddr"] = guest.source.address
        return guest.update(struct("kvm_sev_snp_launch_update", **fields))[0]
    if name == "state":
        return guest.sev(vcpu, what[0], struct("kvm_sev_snp_vcpu_state", **what[1]))[0]
    if name == "command":
        return guest.sev(vcpu, what[0], what[1], what[2])[0]
    if name == "raw":
        return guest.ioctl(vcpu, lib.KVM_MEMORY_ENCRYPT_OP, what[0])
    if name == "vcpu":
        result = guest.ioctl(guest.vm, lib.KVM_CREATE_VCPU, len(guest.vcpus))
        guest.vcpus.append(result.ret)
        return OK
    if name == "shared":
        return guest.set_attributes(guest.gpa(what[0]), PAGE, 8 * what[1])
    if name == "finish":
        return guest.finish()[0]
    result, reason = guest.enter(len(guest.vcpus) - 1)
    assert result != OK or reason in EXITS
    return result


@SETTINGS
@pytest.mark.parametrize("kernel", ["direct-vmsa", "vmsa-page"])
@given(st.booleans(), st.booleans(), st.lists(calls, max_size=12))
def test_any_calls_in_any_order_are_an_errno_or_success(kernel, direct, start, sequence):
    with simulated(kernel) as platform:
        direct = direct and kernel == "direct-vmsa"
        guest = VmsaGuest(platform, direct=direct, start=start)
        for name, *what in sequence:
            result = call(guest, name, *what)
            assert result == OK or (result[0] == -1 and result[1] in ERRNOS), (name, what)
        assert guest.capability(lib.KVM_CAP_USER_MEMORY) == 1


@SETTINGS
@given(st.binary(min_size=64, max_size=64), st.booleans())
def test_any_struct_of_set_is_an_errno_or_what_get_says(data, finished):
    with simulated("direct-vmsa") as platform:
        guest = VmsaGuest(platform)
        if finished:
            guest.ok(guest.finish()[0])
        before = guest.get_state()
        memory = Memory(PAGE)
        memory.write(data)
        result = guest.sev(guest.vcpus[0], SET, memory.address)[0]
        state = struct("kvm_sev_snp_vcpu_state")
        ffi.buffer(state)[:] = data
        if result != OK:
            assert result == (-1, errno.EINVAL)
            assert guest.get_state() == before
        else:
            assert not finished
            assert state.valid_fields < 4
        assert memory.read(64) == data


@SETTINGS
@given(u32, u64, st.integers(-64, 64))
def test_any_command_near_the_end_of_memory_is_an_errno(command, data, offset):
    """Structs that reach out of the mapping are EFAULT, whatever they ask for."""
    with simulated("direct-vmsa") as platform:
        guest = VmsaGuest(platform)
        at = platform.mmap(-1, 2 * PAGE, 3, 0x22).ret
        guest.ok(platform.munmap(at + PAGE, PAGE))
        cmd = struct("kvm_sev_cmd", id=command, data=data)
        inside = at + PAGE + offset
        if offset <= -24:
            ffi.memmove(ffi.cast("char *", inside), ffi.buffer(cmd), 24)
        result = guest.ioctl(guest.vcpus[0], lib.KVM_MEMORY_ENCRYPT_OP, inside)
        guest.ok(platform.munmap(at, PAGE))
        assert result[0] == -1
        assert result[1] in (errno.EINVAL, errno.EFAULT)
