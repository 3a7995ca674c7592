"""Tiny guests that tell by their termination request what they found.

Each ends by the termination request of the GHCB MSR protocol, which user space gets as
KVM_SYSTEM_EVENT_SEV_TERM with the MSR's value in data[0]: reason set 14, a code in bits 23:16,
and in bits 63:32, which the protocol leaves unused and KVM passes on, a 32-bit value.

| payload             | mode            | pages  | code, value                                |
|---------------------|-----------------|--------|--------------------------------------------|
| `report_bl`         | 32-bit, unpaged | 0      | BL, 0                                      |
| `report_vmsa_state` | 64-bit          | 0 to 5 | low byte of `state_checksum`, all of it    |
| `start_ap`          | 64-bit          | 0 to 7 | the AP: `AP_STARTED`, 0; the first vCPU    |
|                     |                 |        | halts, or ends with a code of `FAILURES`   |
| `apic_ids`          | 64-bit          | all    | how many, a bit per ID (modulo 32); or one |
|                     |                 |        | of `FAILURES`                              |

| page | GPA      | what                                                              |
|------|----------|-------------------------------------------------------------------|
| 0    | 0x100000 | code of all payloads; its start is `report_bl`                    |
| 1    | 0x101000 | stack                                                             |
| 2-5  | 0x102000 | page tables: 1 to 2 MiB one to one, private but for pages 7 and 8 |
|      |          | below that the same once more, all private, for PVALIDATE         |
| 6    | 0x106000 | state of the AP, which `start_ap` makes a VMSA page by RMPADJUST  |
| 7    | 0x107000 | GHCB page: launched as zeros, shared later                        |
| 8    | 0x108000 | list of APIC IDs: launched as zeros, shared later                 |

The bytes are those of payloads.S, assembled by hand: hosts without a compiler run them too.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType

from kvmlaunch.abi.ghcb_msr import SELFTEST_SET
from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.abi.reset import BSP_EIP, qemu_reset
from kvmlaunch.abi.segment import Segment
from kvmlaunch.abi.vmsa import Vmsa

__all__ = [
    "AP_STARTED",
    "BASE",
    "FAILURES",
    "SIZE",
    "apic_ids",
    "build",
    "report_bl",
    "report_vmsa_state",
    "reported",
    "start_ap",
    "state_checksum",
]

BASE = 0x100000
"""GPA of the first page."""
SIZE = 9 * PAGE_SIZE
"""Bytes of memory from BASE on that the payloads occupy; they touch no other."""
AP_STARTED = 0xA9

FAILURES: Mapping[int, str] = MappingProxyType(
    {
        0xE1: "PVALIDATE failed, or the page was not valid; value: EAX",
        0xE2: "page state change refused; value: bits 63:32 of the answer",
        0xE3: "GHCB registration refused",
        0xE4: "RMPADJUST failed; value: EAX",
        0xE5: "AP creation refused; value: SW_EXITINFO2",
        0xE6: "the host has no APIC ID list; value: its features",
        0xE7: "the APIC ID list is refused; value: SW_EXITINFO2",
    }
)
"""Code -> the step that failed."""

_CODE = bytes.fromhex(
    """
    0fb6c3c1e0100d00e1000031d2b9300101c00f30f30f01d9ebf8549c505351525657554150415141
    52415341544155415641570f20c0500f20d0500f20d8500f20e0508cc0508cc8508cd0508cd8508c
    e0508ce8500f00c0500f00c8506a006a000f0104246a006a000f010c246a00d93c24488d351f0200
    008b0e0f3281f9800000c075040fbaf00c48c1e2204809d0504883c604488d05200200004839c672
    d831c0b92b00000048c1c0075a4801d0e2f64889c248c1ea2031c289d00fb6c0c1e0100d00e10000
    b9300101c00f30f30f01d9ebf8bf00701000e8ba000000e806010000b3e4b80060100031c9ba0100
    0100f30f01fe89c285c00f858e010000b3e5488b0425b0631000be1300008048bf01000000010000
    0041b800601000e8f6000000f4ebfdbf00701000e868000000bf00801000e85e000000e8aa000000
    b3e6b88000000031d2e8be00000089c2c1ea0c0fbae0100f8331010000b3e7b801000000be170000
    80bf008010004531c0e8a40000008b0c250080100031d2e30c8b048d008010000fabc2e2f48b0425
    00801000e924ffffffb3e1488d870000f0ff31c931d2f20f01ff89c20f82dc00000085c00f85d400
    0000b3e28d4714ba00002000e84300000025ff0f000083f8150f85b700000085d20f85af00000031
    c0b900020000f348abc3b3e3b81270100031d2e8140000003d137010000f858b00000085d20f8583
    000000c3b9300101c00f30f30f01d90f32c348890425f8711000488934259073100048893c259873
    10004c890425a073100048b8000000000000008048890425f073100048b80000000000001c004889
    0425f873100048c70425f87f100000000200b80070100031d2b9300101c00f30f30f01d98b1425a0
    731000833c2598731000007501c388d8e928feffff0f1f00800000c074010000810000c0820000c0
    830000c0840000c0000100c0010100c0020100c0
    """
)
_ENTRIES = {"report_bl": 0x0, "report_vmsa_state": 0x1A, "start_ap": 0xD5, "apic_ids": 0x127}

_STACK_END = _TABLES = BASE + 0x2000
_SHARED = (BASE + 0x7000, BASE + 0x8000)
_TERMINATE = 0x100
_LINK = 0x3  # present, writable
_SVME = 1 << 12
_U64 = (1 << 64) - 1

_FLAT_CODE = Segment(0x08, 0xC9B, 0xFFFFFFFF, 0)
_FLAT_DATA = Segment(0x10, 0xC93, 0xFFFFFFFF, 0)


def reported(code: int, value: int = 0) -> int:
    """What data[0] of the SEV_TERM event is for a code and a value."""
    return value << 32 | code << 16 | SELFTEST_SET << 12 | _TERMINATE


def build(cbitpos: int, *, sev_features: int = 1) -> dict[int, bytes]:
    """GPA -> the 4096 bytes to launch there as a NORMAL page, all from BASE to BASE + SIZE.

    ``sev_features`` are the VM's, for the VMSA that `start_ap` makes.
    """
    pages = (_CODE, b"", *_tables(1 << cbitpos), _ap(sev_features).encode(), b"", b"")
    return {BASE + n * PAGE_SIZE: page.ljust(PAGE_SIZE, b"\0") for n, page in enumerate(pages)}


def report_bl(bl: int, *, sev_features: int = 1) -> Vmsa:
    """The state that starts `report_bl` with this BL: 32-bit protected mode, no paging."""
    return _start("report_bl", sev_features).replace(
        cs=_FLAT_CODE, cr0=0x11, rbx=0xB1B1_B1B1_B1B1_B100 | bl
    )


def report_vmsa_state(cbitpos: int, *, sev_features: int = 1) -> Vmsa:
    """The state that starts `report_vmsa_state`: something else in each register that it reads.

    Any of these may be changed as long as 64-bit code runs; `state_checksum` tells what then.
    """
    general = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *(f"r{n}" for n in range(8, 16)))
    return _long_mode("report_vmsa_state", cbitpos, sev_features).replace(
        **{name: 0x0123_4567_89AB_0000 * (n + 1) & _U64 | n for n, name in enumerate(general)},
        rflags=0x8D7,  # OF SF ZF AF PF CF
        cr0=0x80010033,  # PG WP NE ET MP PE
        cr4=0x660,  # OSXMMEXCPT OSFXSR MCE PAE
        efer=0x1D01,  # SVME NXE LMA LME SCE
        ds=Segment(0x18, 0xC93, 0xFFFFFFFF, 0),
        es=Segment(0x20, 0xC93, 0xFFFFFFFF, 0),
        fs=Segment(0x28, 0xC93, 0xFFFFFFFF, 0x12345678),
        gs=Segment(0x30, 0xC93, 0xFFFFFFFF, 0xFFFF_8000_1234_0000),
        ldtr=Segment(0x38, 0x82, 0x67, 0x9000),
        tr=Segment(0x40, 0x8B, 0x67, 0xA000),
        gdtr=Segment(limit=0x7F, base=0xFFFF_8000_0000_5000),
        idtr=Segment(limit=0xFFF, base=0x6000),
        star=0x0023_0010_0000_0000,
        lstar=0xFFFF_8000_0000_1000,
        cstar=0xFFFF_8000_0000_2000,
        sfmask=0x47700,
        kernel_gs_base=0xFFFF_8000_0000_3000,
        sysenter_cs=0x48,
        x87_fcw=0x27F,
    )


def start_ap(cbitpos: int, *, sev_features: int = 1) -> Vmsa:
    """The state that starts `start_ap`, on the first vCPU; the other one has APIC ID 1.

    That one must wait for it: with the APIC in the kernel, and on kernels that don't look at AP
    creation before the first INIT in KVM_MP_STATE_AP_RESET_HOLD.
    """
    return _long_mode("start_ap", cbitpos, sev_features)


def apic_ids(cbitpos: int, *, sev_features: int = 1) -> Vmsa:
    """The state that starts `apic_ids`."""
    return _long_mode("apic_ids", cbitpos, sev_features)


def state_checksum(vmsa: Vmsa) -> int:
    """The 32 bits that `report_vmsa_state` reports if it finds the state that this VMSA has.

    EFER.SVME, which is the hypervisor's, doesn't count; nor does what the guest can't read without
    the hypervisor (attributes of segments, debug registers), nor PAT, which an emulated VMRUN
    doesn't load (QEMU 7.2).
    """
    segments = (vmsa.es, vmsa.cs, vmsa.ss, vmsa.ds, vmsa.fs, vmsa.gs, vmsa.ldtr, vmsa.tr)
    words = (
        *(vmsa.rsp, vmsa.rflags, vmsa.rax, vmsa.rbx, vmsa.rcx, vmsa.rdx, vmsa.rsi, vmsa.rdi),
        *(vmsa.rbp, vmsa.r8, vmsa.r9, vmsa.r10, vmsa.r11, vmsa.r12, vmsa.r13, vmsa.r14, vmsa.r15),
        *(vmsa.cr0, vmsa.cr2, vmsa.cr3, vmsa.cr4),
        *(segment.selector for segment in segments),
        *_pushed_table(vmsa.gdtr),
        *_pushed_table(vmsa.idtr),
        vmsa.x87_fcw,
        *(vmsa.efer & ~_SVME, vmsa.sysenter_cs),
        *(vmsa.star, vmsa.lstar, vmsa.cstar, vmsa.sfmask),
        *(vmsa.fs.base, vmsa.gs.base, vmsa.kernel_gs_base),
    )
    checksum = 0
    for word in reversed(words):  # the last pushed is the first popped
        checksum = ((checksum << 7 | checksum >> 57) + word) & _U64
    return (checksum ^ checksum >> 32) & 0xFFFFFFFF


def _pushed_table(table: Segment) -> tuple[int, int]:
    """What SGDT or SIDT leave in two words on the stack, the higher one first."""
    low, high = struct.unpack("<QQ", struct.pack("<HQ6x", table.limit & 0xFFFF, table.base))
    return high, low


def _start(payload: str, sev_features: int) -> Vmsa:
    """Reset state, but that it starts there and its data segments are flat."""
    return qemu_reset(BSP_EIP, signature=0, sev_features=sev_features).replace(
        rip=BASE + _ENTRIES[payload],
        es=_FLAT_DATA,
        ss=_FLAT_DATA,
        ds=_FLAT_DATA,
        fs=_FLAT_DATA,
        gs=_FLAT_DATA,
    )


def _long_mode(payload: str, cbitpos: int, sev_features: int) -> Vmsa:
    return _start(payload, sev_features).replace(
        cs=Segment(0x08, 0xA9B, 0xFFFFFFFF, 0),
        cr0=0x80000011,  # PG ET PE
        cr3=_TABLES | 1 << cbitpos,
        cr4=0x60,  # MCE PAE
        efer=0x1500,  # SVME LMA LME
        rsp=_STACK_END,
    )


def _ap(sev_features: int) -> Vmsa:
    return report_bl(AP_STARTED, sev_features=sev_features)


def _tables(c_bit: int) -> list[bytes]:
    """PML4, PDPT and PD with an entry each, and the page table of the lowest 2 MiB."""
    tables = [struct.pack("<Q", _TABLES + n * PAGE_SIZE | _LINK | c_bit) for n in range(1, 4)]
    entries = []
    for address in range(0, 2 * BASE, PAGE_SIZE):
        gpa = address % BASE + BASE
        shared = address in _SHARED
        entries.append(gpa | _LINK | (0 if shared else c_bit))
    return [*tables, struct.pack("<512Q", *entries)]
