"""A guest that brings its VMSAs, for the tests of the two proposals; all numbers typed.

The page is that of the proposal's own test (offsets: APM 2, table of the VMSA).
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import struct as packed
from typing import Any

from kvmlaunch.sim import KernelProfile
from kvmlaunch.uapi import ffi, lib

from .driver import PAGE, RAM_PAGES, Guest, launched, simulated, struct

DIRECT_VMSA, VCPU_STATE = 252, 251
GET, SET = 104, 105
VMSA = 2
VMSA_VALID, GHCB_VALID = 1, 2
NO_GHCB = (1 << 64) - 1
MARK = 0xABCD1234
OK = (0, 0)
EINVAL, EIO, EFAULT = (-1, errno.EINVAL), (-1, errno.EIO), (-1, errno.EFAULT)
ENOTTY = (-1, errno.ENOTTY)

# Segments: offset -> selector, attributes, limit (base 0 but for CS).
_DATA, _TABLE = (0, 0x93, 0xFFFF), (0, 0, 0xFFFF)
_SEGMENTS = {
    **{0x00: _DATA, 0x20: _DATA, 0x30: _DATA, 0x40: _DATA, 0x50: _DATA},  # es ss ds fs gs
    **{0x10: (0, 0x9B, 0xFFFF), 0x60: _TABLE, 0x70: (0, 0x82, 0xFFFF)},  # cs gdtr ldtr
    **{0x80: _TABLE, 0x90: (0, 0x8B, 0xFFFF)},  # idtr tr
}
_QUADS = {
    **{0xD0: 0x1000, 0x158: 0x10, 0x160: 0x400, 0x168: 0xFFFF0FF0, 0x170: 2},
    **{0x268: 0x0007040600070406, 0x3B0: 1, 0x3E8: 1, 0x408: 0x1F80, 0x410: 0x37F},
}
RIP, RSP, VMPL, SEV_FEATURES = 0x178, 0x1D8, 0xCA, 0x3B0

# 16-bit code: mov $0xc0010130,%ecx; mov $0x100,%eax; xor %edx,%edx; wrmsr; vmgexit
TERMINATE = bytes.fromhex("66b9300101c0 66b800010000 6631d2 0f30 f30f01d9")


def raw(value: Any) -> bytes:
    """The bytes of a struct."""
    return bytes(ffi.buffer(value))


def vmsa_page(*, entry: int = Guest.GPA, vmpl: int = 0, **quads: int) -> bytes:
    """Real mode at ``entry``; ``quads`` are o_OFFSET=value."""
    page = bytearray(PAGE)
    for offset, (selector, attributes, limit) in _SEGMENTS.items():
        base = entry if offset == 0x10 else 0
        packed.pack_into("<HHIQ", page, offset, selector, attributes, limit, base)
    for offset, value in _QUADS.items():
        packed.pack_into("<Q", page, offset, value)
    for name, value in quads.items():
        packed.pack_into("<Q", page, int(name.removeprefix("o_"), 16), value)
    page[VMPL] = vmpl
    return bytes(page)


def extended(digest: bytes, page_type: int, gpa: int, page: bytes | None = None) -> bytes:
    """The launch digest after one more page (AMD 56860, PAGE_INFO)."""
    contents = bytes(48) if page is None else hashlib.sha384(page).digest()
    info = packed.pack("<48s48sHBB4xQ", digest, contents, 0x70, page_type, 0, gpa)
    return hashlib.sha384(info).digest()


def set_state(
    guest: Guest, vmsa: int | None = None, ghcb: int | None = None, vcpu: int = 0, **fields: Any
) -> Any:
    """SET_VCPU_STATE; what is None isn't marked as valid."""
    valid = (VMSA_VALID if vmsa is not None else 0) | (GHCB_VALID if ghcb is not None else 0)
    given = {"valid_fields": valid, "vmsa_gpa": vmsa or 0, "ghcb_gpa": ghcb or 0, **fields}
    args = struct("kvm_sev_snp_vcpu_state", **given)
    return guest.sev(guest.vcpus[vcpu], SET, args, error=MARK)


def get_state(guest: Guest, vcpu: int = 0) -> tuple[int, int, int]:
    """GET_VCPU_STATE: valid fields, VMSA, GHCB; what was in the struct is overwritten."""
    out = struct("kvm_sev_snp_vcpu_state", valid_fields=77, vmsa_gpa=77, ghcb_gpa=77)
    out.pad[0] = 77
    assert guest.sev(guest.vcpus[vcpu], GET, out, error=MARK) == (OK, MARK)
    assert list(out.pad) == [0] * 5
    return out.valid_fields, out.vmsa_gpa, out.ghcb_gpa


def enter(guest: Guest, vcpu: int = 0) -> tuple[Any, int]:
    """KVM_RUN: the call's result and the exit reason."""
    run = guest.mmap_run(guest.vcpus[vcpu])
    return guest.ioctl(guest.vcpus[vcpu], lib.KVM_RUN), int(run.exit_reason)


def is_protected(guest: Guest, vcpu: int) -> bool:
    """Whether the register ioctls are refused."""
    result = guest.ioctl(guest.vcpus[vcpu], lib.KVM_GET_REGS, struct("kvm_regs"))
    assert result in (OK, EINVAL)
    return bool(result == EINVAL)


class VmsaGuest(Guest):
    """A guest that has started its launch, with RAM at GPA and vCPUs.

    ``direct``: KVM_CAP_SNP_DIRECT_VMSA is enabled.
    """

    set_state = set_state
    get_state = get_state
    enter = enter
    is_protected = is_protected

    def __init__(
        self,
        platform: Any,
        *,
        direct: bool = True,
        vcpus: int = 1,
        start: bool = True,
        split: bool = False,
        features: int = 0,
    ) -> None:
        super().__init__(platform, init=False)
        self.ok(self.init2(vmsa_features=features)[0])
        if direct:
            self.ok(self.enable())
        if split:
            self.ok(self.enable(lib.KVM_CAP_SPLIT_IRQCHIP))
        self.add_ram()
        for number in range(vcpus):
            self.add_vcpu(number)
        if start:
            self.ok(self.start()[0])

    def enable(self, number: int = DIRECT_VMSA, vm: int | None = None, **fields: Any) -> Any:
        """KVM_ENABLE_CAP; ``args`` is a list."""
        cap = struct("kvm_enable_cap", cap=number, **fields)
        return self.ioctl(self.vm if vm is None else vm, lib.KVM_ENABLE_CAP, cap)

    def capability(self, number: int, fd: int | None = None) -> int:
        """KVM_CHECK_EXTENSION on the VM."""
        return self.ok(self.ioctl(self.vm if fd is None else fd, lib.KVM_CHECK_EXTENSION, number))

    def gpa(self, page: int) -> int:
        return self.GPA + page * PAGE

    def measure(self, page: int, data: bytes | None = None, kind: int = VMSA, **fields: Any) -> Any:
        """One LAUNCH_UPDATE of RAM page ``page``: (result, error), the error word being MARK."""
        self.source.write(vmsa_page() if data is None else data, page * PAGE)
        fields.setdefault("type", kind)
        return self.update(self.update_args(page, **fields), error=MARK)

    def mp_state(self, vcpu: int) -> int:
        return int(self.get(self.vcpus[vcpu], lib.KVM_GET_MP_STATE).mp_state)

    def measured(self) -> list[tuple[int, int]]:
        """Type and GPA of each page measured so far."""
        return [(page.type, page.gpa) for page in self.platform.measured_pages(self.vm)]


def with_rules(profile: KernelProfile, **changes: Any) -> KernelProfile:
    """That kernel with other rules for VMSAs."""
    return dataclasses.replace(profile, vmsa=dataclasses.replace(profile.vmsa, **changes))


def check_digest_of_one_page(platform: Any, **options: Any) -> None:
    """FINISH adds nothing to a launch with one VMSA page, however many vCPUs there are."""
    guest = VmsaGuest(platform, **options)
    guest.ok(guest.measure(1)[0])
    guest.ok(guest.finish()[0])
    assert guest.digest == extended(bytes(48), 2, guest.gpa(1), vmsa_page())


def digest_of_kvms_vmsas(kernel: str) -> bytes:
    """The launch digest of a guest whose two vCPUs get their VMSAs from KVM."""
    with simulated(kernel) as platform:
        guest = launched(platform, vcpus=2)
        guest.ok(guest.finish()[0])
        assert [page.gpa for page in platform.measured_pages(guest.vm)] == [0xFFFFFFFFF000] * 2
        return bytes(guest.digest)


END_OF_RAM = Guest.GPA + RAM_PAGES * PAGE
