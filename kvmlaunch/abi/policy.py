"""Guest policy: the 64-bit word of SNP_LAUNCH_START and of the ID block.

| bit   | name                    | 1 means                                       |
|-------|-------------------------|-----------------------------------------------|
| 7:0   | ABI_MINOR               | lowest firmware ABI minor                     |
| 15:8  | ABI_MAJOR               | lowest firmware ABI major                     |
| 16    | SMT                     | SMT may be on                                 |
| 17    | reserved                | must be 1                                     |
| 18    | MIGRATE_MA              | a migration agent may be bound                |
| 19    | DEBUG                   | the host may decrypt the guest for debugging  |
| 20    | SINGLE_SOCKET           | one socket only                               |
| 21    | CXL_ALLOW               | CXL devices and memory may be present         |
| 22    | MEM_AES_256_XTS         | memory encryption must be AES-256-XTS         |
| 23    | RAPL_DIS                | RAPL must be off                              |
| 24    | CIPHERTEXT_HIDING_DRAM  | ciphertext hiding must be on                  |
| 25    | PAGE_SWAP_DISABLE       | no page move or swap commands                 |
| 63:26 | reserved                | must be 0                                     |

Source: AMD 56860, guest policy structure (table 9 in rev. 1.55), compared with virtee/sev
and go-sev-guest. Older firmware takes bits 21 and up as reserved. The policy isn't part of
the launch digest.
"""

from __future__ import annotations

import dataclasses
import re

from kvmlaunch.errors import FormatError

from ._check import uint
from .defaults import DEFAULT_POLICY

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from typing import Any

__all__ = ["DEFAULT_POLICY", "GuestPolicy", "describe_policy", "parse_policy"]

_MUST_BE_ONE = 17
_FLAGS = {
    "smt": (16, "SMT", "SMT may be on", "the host must have SMT off"),
    "migrate_ma": (18, "MIGRATE_MA", "a migration agent may be bound", "no migration agent"),
    "debug": (
        19,
        "DEBUG",
        "the host may decrypt the guest for debugging",
        "no debugging by the host",
    ),
    "single_socket": (20, "SINGLE_SOCKET", "one socket only", "any number of sockets"),
    "cxl_allow": (21, "CXL_ALLOW", "CXL may be present", "no CXL"),
    "mem_aes_256_xts": (
        22,
        "MEM_AES_256_XTS",
        "memory encryption must be AES-256-XTS",
        "any memory encryption mode",
    ),
    "rapl_dis": (23, "RAPL_DIS", "RAPL must be off", "RAPL may be on"),
    "ciphertext_hiding": (
        24,
        "CIPHERTEXT_HIDING_DRAM",
        "ciphertext hiding must be on",
        "ciphertext hiding may be off",
    ),
    "page_swap_disable": (
        25,
        "PAGE_SWAP_DISABLE",
        "no page move or swap",
        "page move and swap allowed",
    ),
}
_FLAG_AT_BIT = {bit: (name, on, off) for bit, name, on, off in _FLAGS.values()}
_HIGHEST = 25


@dataclasses.dataclass(frozen=True)
class GuestPolicy:
    """A policy with every reserved bit as it must be; `int()` gives the word."""

    abi_minor: int = 0
    abi_major: int = 0
    smt: bool = False
    migrate_ma: bool = False
    debug: bool = False
    single_socket: bool = False
    cxl_allow: bool = False
    mem_aes_256_xts: bool = False
    rapl_dis: bool = False
    ciphertext_hiding: bool = False
    page_swap_disable: bool = False

    def __post_init__(self) -> None:
        """Refuse an ABI version that is too large."""
        uint("abi_minor", self.abi_minor, 8)
        uint("abi_major", self.abi_major, 8)

    @classmethod
    def from_int(cls, value: int, *, strict: bool = True) -> GuestPolicy:
        """Take a policy word apart.

        Args:
            value: u64.
            strict: refuse reserved bits that firmware refuses; else drop them.

        Raises:
            FormatError: not a u64, or (strict) bit 17 clear or a bit above 25 set.
        """
        uint("policy", value, 64)
        if strict and not value >> _MUST_BE_ONE & 1:
            raise FormatError(f"policy {value:#x} has bit 17 clear, which must be 1")
        if strict and value >> _HIGHEST + 1:
            bits = ", ".join(str(b) for b in range(_HIGHEST + 1, 64) if value >> b & 1)
            raise FormatError(f"policy {value:#x} sets reserved bits: {bits}")
        flags = {field: bool(value >> row[0] & 1) for field, row in _FLAGS.items()}
        return cls(abi_minor=value & 0xFF, abi_major=value >> 8 & 0xFF, **flags)

    def __int__(self) -> int:
        """Return the policy word, bit 17 set."""
        value = self.abi_minor | self.abi_major << 8 | 1 << _MUST_BE_ONE
        for field, row in _FLAGS.items():
            value |= bool(getattr(self, field)) << row[0]
        return value

    def __str__(self) -> str:
        """Return the word and its names, as `0x30000 (smt)`."""
        names = [field for field in _FLAGS if getattr(self, field)]
        if self.abi_major or self.abi_minor:
            names.append(f"abi={self.abi_major}.{self.abi_minor}")
        return f"{int(self):#x} ({','.join(names)})" if names else f"{int(self):#x}"


_NUMBER = re.compile(r"0x[0-9a-f]+|[0-9]+")
_ABI = re.compile(r"abi=([0-9]{1,3})\.([0-9]{1,3})")


def parse_policy(text: str) -> int:
    """Return the policy word that `text` names.

    `text` is a number (`0x30000`, `196608`), taken as it is so that refusals can be
    tried out, or names of `GuestPolicy` fields and `abi=MAJOR.MINOR` with commas between
    (`smt,debug`); names imply bit 17.

    Raises:
        FormatError: an unknown name, or a number that isn't a u64.
    """
    text = text.strip().lower()
    if _NUMBER.fullmatch(text):
        # int() refuses thousands of decimal digits by ValueError; a u64 has at most 20.
        if len(text) > 20:
            raise FormatError("policy does not fit in 64 bits")
        return uint("policy", int(text, 16 if text.startswith("0x") else 10), 64)
    fields: dict[str, Any] = {}
    for word in text.split(","):
        name = word.strip().replace("-", "_")
        if found := _ABI.fullmatch(name):
            fields |= {"abi_major": int(found[1]), "abi_minor": int(found[2])}
        elif name in _FLAGS:
            fields[name] = True
        else:
            known = ", ".join([*_FLAGS, "abi=MAJOR.MINOR"])
            raise FormatError(f"no policy bit is named {word.strip()!r}; known are {known}")
    return int(dataclasses.replace(GuestPolicy(), **fields))


def describe_policy(value: int) -> list[str]:
    """Explain any policy word, one line for the ABI, each known bit and each wrong bit."""
    uint("policy", value, 64)
    lines = [f"bits 15:0 ABI = {value >> 8 & 0xFF}.{value & 0xFF}: firmware ABI at least this"]
    for bit in range(16, 64):
        on = value >> bit & 1
        if bit in _FLAG_AT_BIT:
            name, yes, no = _FLAG_AT_BIT[bit]
            lines.append(f"bit {bit} {name} = {on}: {yes if on else no}")
        elif bit == _MUST_BE_ONE:
            lines.append(f"bit {bit} reserved = {on}: must be 1{'' if on else ', is refused'}")
        elif on:
            lines.append(f"bit {bit} reserved = 1: must be 0, is refused")
    return lines
