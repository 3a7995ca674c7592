"""KVM_SET_CPUID2 and KVM_GET_CPUID2 of a vCPU (arch/x86/kvm/cpuid.c)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from kvmlaunch.sim.cpumodel import xsave_size
from kvmlaunch.sim.guest_limits import limits
from kvmlaunch.sim.uaccess import copy_in, copy_out, refuse
from kvmlaunch.sim.vcpu_state import reserved_gpa_bits
from kvmlaunch.uapi import ffi, lib

if TYPE_CHECKING:
    from kvmlaunch.sim.vcpu import Vcpu

__all__ = ["answer", "find_leaf", "get_cpuid", "kvm_features", "set_cpuid"]

_MAX_ENTRIES = 256
_HEADER = ffi.sizeof("struct kvm_cpuid2")
_ENTRY = ffi.sizeof("struct kvm_cpuid_entry2")
_XSAVE, _ADDRESS_SIZES, _SEV = 0xD, 0x80000008, 0x8000001F
_OSXSAVE, _MONITOR, _OSPKE, _APIC = 27, 3, 4, 9
_XSAVEC, _XSAVES = 1 << 1, 1 << 3
_XFEATURES_EXTENDED = ((1 << 64) - 1) & ~0x3
_MISC_ENABLE = 0x1A0
_VIRTUAL_BITS = (0, 48, 57)
_DEFAULT_WIDTH = 36
_HYPERVISOR_BASES = range(0x40000000, 0x40010000, 0x100)
_KVM_SIGNATURE = b"KVMKVMKVM\0\0\0"
_PV_UNHALT = 7
_TOPOLOGY = (0xB, 0x1F)


def set_cpuid(vcpu: Vcpu, arg: int) -> int:
    """KVM_SET_CPUID2: free until the first run, then only the same table again."""
    user = vcpu.vm.host.user
    header = copy_in(user, "kvm_cpuid2", arg)
    if header.nent > _MAX_ENTRIES:
        refuse(errno.E2BIG)
    table = user.read(arg + _HEADER, header.nent * _ENTRY)
    if vcpu.has_run:
        if _comparable(vcpu, table) != _comparable(vcpu, vcpu.cpuid):
            refuse(errno.EINVAL)
        return 0
    entries = _entries(table)
    sizes = _find(entries, _ADDRESS_SIZES)
    if sizes is not None and sizes.eax >> 8 & 0xFF not in _VIRTUAL_BITS:
        refuse(errno.EINVAL)
    vcpu.cpuid = table
    _apply(vcpu, entries, sizes)
    return 0


def get_cpuid(vcpu: Vcpu, arg: int) -> int:
    """KVM_GET_CPUID2: what was set, but for what follows other state."""
    user = vcpu.vm.host.user
    header = copy_in(user, "kvm_cpuid2", arg)
    count = len(vcpu.cpuid) // _ENTRY
    if header.nent < count:
        refuse(errno.E2BIG)
    entries = _at_runtime(vcpu, vcpu.cpuid, cr4=vcpu.state.cr4, xcr0=vcpu.state.xcr0)
    user.write(arg + _HEADER, bytes(ffi.buffer(entries)))
    header.nent = count
    copy_out(user, arg, header)
    return 0


def answer(
    vcpu: Vcpu, function: int, index: int, *, cr4: int, xcr0: int
) -> tuple[int, int, int, int]:
    """kvm_cpuid(): EAX, EBX, ECX, EDX for the guest, whose CR4 and XCR0 are these."""
    entries = _at_runtime(vcpu, vcpu.cpuid, cr4=cr4, xcr0=xcr0)
    entry = _find(entries, function, index)
    if entry is None and not vcpu.state.guest.amd:
        function = _redirected(entries, function)
        entry = _find(entries, function, index)
    if entry is not None:
        return int(entry.eax), int(entry.ebx), int(entry.ecx), int(entry.edx)
    known = _find(entries, function, 1) if function in _TOPOLOGY else None
    return (0, 0, 0, 0) if known is None else (0, 0, index & 0xFF, int(known.edx))


def _redirected(entries: Any, function: int) -> int:
    """get_out_of_range_cpuid_entry(): an Intel CPU answers with its last basic leaf."""
    basic = _find(entries, 0)
    mask = 0xFFFFFF00 if 0x40000000 <= function <= 0x4FFFFFFF else 0x80000000
    head = _find(entries, 0xC0000000 if function >= 0xC0000000 else function & mask)
    in_range = head is not None and function <= head.eax
    return function if basic is None or in_range else int(basic.eax)


def find_leaf(table: bytes, function: int, index: int = 0) -> Any:
    """The first entry of a leaf in a KVM_SET_CPUID2 table, or None."""
    entries = _entries(table)
    entry = _find(entries, function, index)
    # Not a view: the table would go with it.
    return None if entry is None else ffi.new("struct kvm_cpuid_entry2 *", entry)


def kvm_features(table: bytes) -> int:
    """EAX of KVM's own feature leaf; 0 where the table has no KVM signature."""
    found = _kvm_features(_entries(table))
    return 0 if found is None else int(found.eax)


def _kvm_features(entries: Any) -> Any:
    """kvm_find_kvm_cpuid_features()."""
    for base in _HYPERVISOR_BASES:
        entry = _find(entries, base)
        if entry is None:
            continue
        words = (entry.ebx, entry.ecx, entry.edx)
        if b"".join(int(word).to_bytes(4, "little") for word in words) == _KVM_SIGNATURE:
            return _find(entries, base | 1)
    return None


def _comparable(vcpu: Vcpu, table: bytes) -> list[bytes]:
    """What kvm_cpuid_check_equal() compares: padding isn't."""
    used = ffi.offsetof("struct kvm_cpuid_entry2", "padding")
    cr4, xcr0 = vcpu.state.cr4, vcpu.state.xcr0
    entries = _at_runtime(vcpu, table, cr4=cr4, xcr0=xcr0)
    return [bytes(ffi.buffer(entry)[:used]) for entry in map(ffi.addressof, entries)]


def _at_runtime(vcpu: Vcpu, table: bytes, *, cr4: int, xcr0: int) -> Any:
    """__kvm_update_cpuid_runtime(): fields that follow CR4, the APIC base, XCR0 and XSS."""
    entries, state = _entries(table), vcpu.state
    basic, structured = _find(entries, 0x1), _find(entries, 0x7)
    if basic is not None:
        _set_bit(basic, "ecx", _OSXSAVE, cr4 >> 18 & 1)
        _set_bit(basic, "edx", _APIC, state.apic_base >> 11 & 1)
        if vcpu.vm.disabled_quirks & lib.KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT:
            _set_bit(basic, "ecx", _MONITOR, state.msrs[_MISC_ENABLE] >> 18 & 1)
    if structured is not None:
        _set_bit(structured, "ecx", _OSPKE, cr4 >> 22 & 1)
    features = _kvm_features(entries) if vcpu.vm.hlt_in_guest else None
    if features is not None:
        _set_bit(features, "eax", _PV_UNHALT, 0)
    extended = xcr0 & _XFEATURES_EXTENDED
    sizes, compact = _find(entries, _XSAVE), _find(entries, _XSAVE, 1)
    if sizes is not None:
        sizes.ebx = xsave_size(extended, compacted=False)
    if compact is not None and compact.eax & (_XSAVEC | _XSAVES):
        compact.ebx = xsave_size(extended, compacted=True)
    return entries


def _set_bit(entry: Any, register: str, bit: int, value: int) -> None:
    setattr(entry, register, getattr(entry, register) & ~(1 << bit) | value << bit)


def _apply(vcpu: Vcpu, entries: Any, sizes: Any) -> None:
    """What KVM takes from the table for its own checks."""
    state = vcpu.state
    xsave = _find(entries, _XSAVE)
    given = xsave.eax | xsave.edx << 32 if xsave is not None else 0
    state.guest_xcr0 = given & vcpu.vm.host.supported_xcr0
    head = _find(entries, 0x80000000)
    known = sizes is not None and head is not None and head.eax >= _ADDRESS_SIZES
    width = sizes.eax & 0xFF if known else _DEFAULT_WIDTH
    sev = _find(entries, _SEV)
    c_bit = sev.ebx & 0x3F if sev is not None and vcpu.vm.sev.active else None
    state.reserved_gpa_bits = reserved_gpa_bits(width, c_bit)
    state.reserved_bits_raw = reserved_gpa_bits(width, None)
    state.guest = limits(lambda function, index: _find(entries, function, index))
    vcpu.apic.set_version()


def _entries(table: bytes) -> Any:
    entries = ffi.new("struct kvm_cpuid_entry2[]", len(table) // _ENTRY)
    ffi.buffer(entries)[:] = table
    return entries


def _find(entries: Any, function: int, index: int = 0) -> Any:
    """The first entry of a leaf, or None."""
    for entry in entries:
        if entry.function == function and (not entry.flags & 1 or entry.index == index):
            return entry
    return None
