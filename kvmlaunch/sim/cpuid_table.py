"""KVM_SET_CPUID2 and KVM_GET_CPUID2 of a vCPU (arch/x86/kvm/cpuid.c)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from kvmlaunch.sim.cpumodel import xsave_size
from kvmlaunch.sim.uaccess import copy_in, copy_out, refuse
from kvmlaunch.sim.vcpu_state import reserved_gpa_bits
from kvmlaunch.uapi import ffi

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["answer", "find_leaf", "get_cpuid", "set_cpuid"]

_MAX_ENTRIES = 256
_HEADER = ffi.sizeof("struct kvm_cpuid2")
_ENTRY = ffi.sizeof("struct kvm_cpuid_entry2")
_XSAVE, _ADDRESS_SIZES, _SEV = 0xD, 0x80000008, 0x8000001F
_VIRTUAL_BITS = (0, 48, 57)
_DEFAULT_WIDTH = 36
_TOPOLOGY = (0xB, 0x1F)
_OSXSAVE, _APIC, _OSPKE = 27, 9, 4
_CR4_OSXSAVE, _CR4_PKE = 1 << 18, 1 << 22
_APIC_ENABLE = 1 << 11
_XSAVES_OR_XSAVEC = 1 << 3 | 1 << 1


def set_cpuid(vcpu: Vcpu, arg: int) -> int:
    """KVM_SET_CPUID2: free until the first run, then only the same table again."""
    user = vcpu.vm.host.user
    header = copy_in(user, "kvm_cpuid2", arg)
    if header.nent > _MAX_ENTRIES:
        refuse(errno.E2BIG)
    table = user.read(arg + _HEADER, header.nent * _ENTRY)
    if vcpu.has_run:
        if table != vcpu.cpuid:
            refuse(errno.EINVAL)
        return 0
    sizes = find_leaf(table, _ADDRESS_SIZES)
    if sizes is not None and sizes.eax >> 8 & 0xFF not in _VIRTUAL_BITS:
        refuse(errno.EINVAL)
    vcpu.cpuid = table
    _apply(vcpu, sizes)
    return 0


def get_cpuid(vcpu: Vcpu, arg: int) -> int:
    """KVM_GET_CPUID2: what was set."""
    user = vcpu.vm.host.user
    header = copy_in(user, "kvm_cpuid2", arg)
    count = len(vcpu.cpuid) // _ENTRY
    if header.nent < count:
        refuse(errno.E2BIG)
    user.write(arg + _HEADER, vcpu.cpuid)
    header.nent = count
    copy_out(user, arg, header)
    return 0


def answer(
    vcpu: Vcpu, function: int, index: int, *, cr4: int, xcr0: int
) -> tuple[int, int, int, int]:
    """kvm_cpuid(): EAX, EBX, ECX, EDX for the guest, with what depends on its registers."""
    entry = find_leaf(vcpu.cpuid, function, index)
    if entry is None:
        known = find_leaf(vcpu.cpuid, function, 1) if function in _TOPOLOGY else None
        return (0, 0, 0, 0) if known is None else (0, 0, index & 0xFF, known.edx)
    eax, ebx, ecx, edx = entry.eax, entry.ebx, entry.ecx, entry.edx
    # kvm_update_cpuid_runtime()
    if function == 1:
        ecx = _with_bit(ecx, _OSXSAVE, bool(cr4 & _CR4_OSXSAVE))
        edx = _with_bit(edx, _APIC, bool(vcpu.state.apic_base & _APIC_ENABLE))
    elif (function, index) == (7, 0):
        ecx = _with_bit(ecx, _OSPKE, bool(cr4 & _CR4_PKE))
    elif (function, index) == (_XSAVE, 0):
        ebx = xsave_size(xcr0, compacted=False)
    elif (function, index) == (_XSAVE, 1) and eax & _XSAVES_OR_XSAVEC:
        ebx = xsave_size(xcr0, compacted=True)
    return eax, ebx, ecx, edx


def _with_bit(word: int, bit: int, value: bool) -> int:
    return word | 1 << bit if value else word & ~(1 << bit)


def _apply(vcpu: Vcpu, sizes: Any) -> None:
    """What KVM takes from the table for its own checks."""
    state = vcpu.state
    xsave = find_leaf(vcpu.cpuid, _XSAVE)
    given = xsave.eax | xsave.edx << 32 if xsave is not None else 0
    state.guest_xcr0 = given & vcpu.vm.host.supported_xcr0
    head = find_leaf(vcpu.cpuid, 0x80000000)
    known = sizes is not None and head is not None and head.eax >= _ADDRESS_SIZES
    width = sizes.eax & 0xFF if known else _DEFAULT_WIDTH
    sev = find_leaf(vcpu.cpuid, _SEV)
    c_bit = sev.ebx & 0x3F if sev is not None and vcpu.vm.sev.active else None
    state.reserved_gpa_bits = reserved_gpa_bits(width, c_bit)


def find_leaf(table: bytes, function: int, index: int = 0) -> Any:
    """The first entry of a leaf in a KVM_SET_CPUID2 table, or None."""
    entries = ffi.new("struct kvm_cpuid_entry2[]", len(table) // _ENTRY)
    ffi.buffer(entries)[:] = table
    for entry in entries:
        significant = entry.flags & 1
        if entry.function == function and (not significant or entry.index == index):
            out = ffi.new("struct kvm_cpuid_entry2 *")
            ffi.memmove(out, ffi.addressof(entry), _ENTRY)
            return out
    return None
