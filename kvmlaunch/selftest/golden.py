"""Launch digests that no kernel may change: fixed pages, fixed registers, what KVM measures.

In mode ``sync`` KVM makes the VMSAs, so the launch digest is part of its ABI: an owner who has
signed an ID block expects every kernel to arrive at it. The digests were not made by kvmlaunch:
tests/selftest/test_golden.py makes them anew in two other ways. Mainline 6.12's code gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.abi.vmsa import Segment, Vmsa

__all__ = ["GOLDEN", "PAGES", "STATES", "Golden", "state"]

PAGES: tuple[tuple[PageType, bytes], ...] = (
    (PageType.NORMAL, b"kvmlaunch golden page 0\n".ljust(PAGE_SIZE, b"\0")),
    (PageType.NORMAL, bytes(range(256)) * 16),
    (PageType.ZERO, bytes(PAGE_SIZE)),
    (PageType.UNMEASURED, b"u" * PAGE_SIZE),
    (PageType.SECRETS, bytes(PAGE_SIZE)),
)
"""What is launched, page after page from `kvmlaunch.selftest.vm.GPA` on."""

_DATA = (0, 0x92, 0xFFFF, 0)
_FLAT = (0x10, 0xC93, 0xFFFF_FFFF, 0)
_TABLE = (0, 0, 0xFFFF, 0)

_DEBUG_SWAP = 1 << 5  # of SEV_FEATURES

_Fields = Mapping[str, int | tuple[int, int, int, int] | bytes]

_RESET: _Fields = {
    **dict.fromkeys(("es", "ss", "ds", "fs", "gs"), _DATA),
    "cs": (0xF000, 0x9A, 0xFFFF, 0xFFFF_0000),
    "gdtr": _TABLE,
    "idtr": _TABLE,
    "ldtr": (0, 0x82, 0xFFFF, 0),
    "tr": (0, 0x83, 0xFFFF, 0),
    "efer": 0x1000,
    "cr4": 0x40,
    "cr0": 0x10,
    "dr7": 0x400,
    "dr6": 0xFFFF_0FF0,
    "rflags": 0x2,
    "rip": 0xFFF0,
    "rdx": 0x600,
    "g_pat": 0x0007_0406_0007_0406,
    "xcr0": 1,
    "mxcsr": 0x1F80,
    "x87_fcw": 0x37F,
}

_FLAT32: _Fields = {
    **_RESET,
    **dict.fromkeys(("es", "ss", "ds", "fs", "gs"), _FLAT),
    "cs": (0x8, 0xC9B, 0xFFFF_FFFF, 0),
    "gdtr": (0, 0, 0x17, 0x5000),
    "tr": (0x18, 0x8B, 0x67, 0x6000),
    "cr0": 0x11,
    "rip": 0x10_0000,
    **{name: 0x1111 * n for n, name in enumerate(("rax", "rbx", "rcx", "rdx", "rsi", "rdi"), 1)},
    "rsp": 0x8000,
    "rbp": 0x9000,
}

_LONG64: _Fields = {
    **_FLAT32,
    "cs": (0x8, 0xA9B, 0xFFFF_FFFF, 0),
    "efer": 0x1D01,
    "cr4": 0x660,
    "cr3": 0x10_3000,
    "cr0": 0x8001_0033,
    "rflags": 0x246,
    "rip": 0xFFFF_8000_0010_0000,
    "rsp": 0xFFFF_8000_0020_0000,
    **{f"r{n}": 0x0101_0101_0101_0101 * n for n in range(8, 16)},
    "star": 0x0023_0010_0000_0000,
    "lstar": 0xFFFF_8000_0000_1000,
    "cstar": 0xFFFF_8000_0000_2000,
    "sfmask": 0x4_7700,
    "kernel_gs_base": 0xFFFF_8000_0000_3000,
    "sysenter_cs": 0x10,
    "sysenter_esp": 0x7000,
    "sysenter_eip": 0x7100,
    "dr6": 0xFFFF_0FF1,
    "mxcsr": 0x1FA0,
    "x87_fcw": 0x27F,
    "x87_fsw": 0x3800,
    "x87_ftw": 0x80,
    "x87_fop": 0x123,
    "x87_rip": 0x1234_5678,
    "x87_dp": 0x8765_4321,
    "fpreg_x87": bytes(range(1, 81)),
    "fpreg_xmm": bytes(255 - n for n in range(256)),
}

STATES: Mapping[str, _Fields] = {"reset": _RESET, "flat32": _FLAT32, "long64": _LONG64}
"""What lies in the VMSA, by field: numbers, segments as (selector, attrib, limit, base), bytes.

``reset`` is a vCPU that nobody has touched; its registers are not written.
"""


@dataclass(frozen=True)
class Golden:
    """One digest: ``name``, the ``states`` of the vCPUs in creation order, the SEV ``features``
    that INIT2 gets (SNP_ACTIVE is KVM's to add), and the ``digest``, 96 hex digits.
    """

    name: str
    states: tuple[str, ...]
    digest: str = field(repr=False)
    features: int = 0


GOLDEN: tuple[Golden, ...] = (
    Golden(
        "reset-1",
        ("reset",),
        "1a1977763be52d3cc05eac82fb7b7c99c9e4f800dc961d06"
        "8d71bd2152778b883c41da239367b6970a0aa03fd584b999",
    ),
    Golden(
        "reset-2",
        ("reset",) * 2,
        "7eeb57bad0b3215b28ad9b9a707660ef3c92d11b5a955b35"
        "d8107a9584ab6ded0404f7ff63134289423dda298b997469",
    ),
    Golden(
        "reset-4",
        ("reset",) * 4,
        "c8ff4322b1cf61730367f3de1dd53295ea1fc344014e9c7e"
        "6bc618df1ce67f2be54b3620785e94316320e3b80d929abd",
    ),
    Golden(
        "reset-2-debug-swap",
        ("reset",) * 2,
        "e4533b0be22eb7fd3abba6fe98f038e065d02c90f185d178"
        "085c0cd02d708178fb074d40e84a8134a0a9ba7902a79ce9",
        features=_DEBUG_SWAP,
    ),
    Golden(
        "flat32-1",
        ("flat32",),
        "9d838ff363ad7461c8a7b5c7c8ec09b8fcad452e698a737b"
        "2c3d2a8df8b4ea3926182c95c03df9913d965cd56181f279",
    ),
    Golden(
        "flat32-2",
        ("flat32", "reset"),
        "44044b24120a9ac1c356fda8a6a724d82e1b8fbaf058ac8f"
        "0970836cd81121c7bea2a2ac6ae75bfd25d409f491fcf469",
    ),
    Golden(
        "long64-1",
        ("long64",),
        "d2bb7faeeb85076ec0f482e776d458d6115500e4b001d99d"
        "7b4e60c210b1a2782a827eeb04341eb593aeda5bd73f19b7",
    ),
    Golden(
        "long64-4",
        ("long64", *("reset",) * 3),
        "ae3facf4951719ac4158fa8ad954e89ff876adf144501ec3"
        "4867eb0e0405c37242f6caaa2c1dfff9b7f7b9f3135560f2",
    ),
    Golden(
        "long64-1-debug-swap",
        ("long64",),
        "126f6199040892e64565f3dbafa475e6c698aaee69844103"
        "9b532f828d8a6b8ef469babebdb37f975d4d0c8b8023b81b",
        features=_DEBUG_SWAP,
    ),
)
"""Every known digest."""


def state(name: str) -> Vmsa:
    """The register state of that name."""
    fields: dict[str, Any] = {
        key: Segment(*value) if isinstance(value, tuple) else value
        for key, value in STATES[name].items()
    }
    return Vmsa(**fields, sev_features=1)
