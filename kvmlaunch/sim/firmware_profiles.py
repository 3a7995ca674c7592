"""Secure processor firmware that can be simulated: differences are data."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

__all__ = [
    "VLEK_HASHSTICK_SIZE",
    "CpuidPolicyName",
    "FirmwareProfile",
    "Product",
    "Tcb",
    "firmware_profile",
]

Product: TypeAlias = Literal["Milan", "Genoa", "Turin"]
CpuidPolicyName: TypeAlias = Literal["strict", "permissive"]

VLEK_HASHSTICK_SIZE = 432
"""Bytes of a wrapped VLEK hashstick (SNP_VLEK_LOAD)."""

# TCB_VERSION, byte index of each component (56860; layouts of virtee/sev).
_TCB_LAYOUT: dict[str, dict[str, int]] = {
    "Milan": {"bootloader": 0, "tee": 1, "snp": 6, "microcode": 7},
    "Genoa": {"bootloader": 0, "tee": 1, "snp": 6, "microcode": 7},
    "Turin": {"fmc": 0, "bootloader": 1, "tee": 2, "snp": 3, "microcode": 7},
}


@dataclasses.dataclass(frozen=True)
class Tcb:
    """Security versions of a platform's parts. `fmc` exists on Turin only."""

    bootloader: int = 0
    tee: int = 0
    snp: int = 0
    microcode: int = 0
    fmc: int = 0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value <= 0xFF:
                raise ValueError(f"{name} {value} does not fit in a byte")

    def encode(self, product: str) -> int:
        """Return TCB_VERSION (u64) in the layout of `product`."""
        layout = _TCB_LAYOUT[product]
        if self.fmc and "fmc" not in layout:
            raise ValueError(f"{product} has no FMC version")
        return sum(getattr(self, name) << 8 * byte for name, byte in layout.items())

    def covers(self, other: Tcb) -> bool:
        """Whether every part is at least that of `other`."""
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return all(a >= b for a, b in zip(mine, others, strict=True))

    @classmethod
    def decode(cls, product: str, value: int) -> Tcb:
        """Read a TCB_VERSION; reserved bytes are skipped."""
        return cls(**{n: value >> 8 * byte & 0xFF for n, byte in _TCB_LAYOUT[product].items()})


# Made up.
_TCBS: dict[Product, Tcb] = {
    "Milan": Tcb(bootloader=3, tee=0, snp=8, microcode=115),
    "Genoa": Tcb(bootloader=7, tee=0, snp=14, microcode=72),
    "Turin": Tcb(fmc=1, bootloader=1, tee=1, snp=4, microcode=80),
}

# Guest policy bits that are not reserved: 15:0 ABI version, 16 SMT, 17 must be one,
# 18 MIGRATE_MA, 19 DEBUG, 20 SINGLE_SOCKET; newer firmware knows 21..25 too (obs).
_POLICY_BITS_1_55 = (1 << 21) - 1
_POLICY_BITS_NEWER = (1 << 26) - 1


@dataclasses.dataclass(frozen=True)
class FirmwareProfile:
    """One firmware on one platform configuration.

    `policy_bits` are the guest policy bits that are known, the others reserved. `smt_enabled`
    to `cxl_present` are what LAUNCH_START and ACTIVATE compare policies with.
    """

    product: Product = "Milan"
    api_major: int = 1
    api_minor: int = 55
    build: int = 21
    current_tcb: Tcb = _TCBS["Milan"]
    committed_tcb: Tcb = _TCBS["Milan"]
    smt_enabled: bool = True
    sockets: int = 1
    mem_aes_256_xts: bool = False
    rapl_disabled: bool = False
    ciphertext_hiding: bool = False
    cxl_present: bool = False
    policy_bits: int = _POLICY_BITS_1_55
    secrets_version: int = 3
    cpuid_policy: CpuidPolicyName = "strict"
    tsc_khz: int = 2_000_000
    tsc_factor: int = 200  # units of 0.001 %; a plausible value (obs)
    check_id_block_version: bool = False  # not every release checks it (obs)


def firmware_profile(product: Product = "Milan", api: tuple[int, int] = (1, 55)) -> FirmwareProfile:
    """Return the profile of `product` with firmware of this ABI version.

    Versions up to 1.55 take policy bits 21 and up as reserved. The security versions are
    made up.
    """
    tcb = _TCBS[product]
    return FirmwareProfile(
        product=product,
        api_major=api[0],
        api_minor=api[1],
        current_tcb=tcb,
        committed_tcb=tcb,
        policy_bits=_POLICY_BITS_1_55 if api <= (1, 55) else _POLICY_BITS_NEWER,
    )
