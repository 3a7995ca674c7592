"""Secure processor firmware that can be simulated: differences are data."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

from kvmlaunch.abi.tcb import Product, Tcb

__all__ = [
    "VLEK_HASHSTICK_SIZE",
    "CpuidPolicyName",
    "FirmwareProfile",
    "firmware_profile",
]

CpuidPolicyName: TypeAlias = Literal["strict", "permissive"]

VLEK_HASHSTICK_SIZE = 432
"""Bytes of a wrapped VLEK hashstick (SNP_VLEK_LOAD)."""

_CHIP_ID_SIZE = 64
_HWID_SIZE = {"Milan": 64, "Genoa": 64, "Turin": 8}

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
    to `cxl_present` are what LAUNCH_START and ACTIVATE compare policies with; `tsme_enabled` to
    `alias_check_complete` are for reports only. `report_version` is 3 by default, for reports
    that name their CPU, as real ones of 1.55.29 (Milan) and 1.55.40 (Genoa) are, those of 1.52
    being 2; 5 brings the mitigation vectors, as real ones of 1.55.43 (Genoa) and 1.55.61 (Turin).
    """

    product: Product = "Milan"
    api_major: int = 1
    api_minor: int = 55
    build: int = 21
    current_tcb: Tcb = _TCBS["Milan"]
    committed_tcb: Tcb = _TCBS["Milan"]
    committed_version: tuple[int, int, int] = (1, 55, 21)  # major, minor, build
    smt_enabled: bool = True
    sockets: int = 1
    mem_aes_256_xts: bool = False
    rapl_disabled: bool = False
    ciphertext_hiding: bool = False
    cxl_present: bool = False
    tsme_enabled: bool = False
    ecc_enabled: bool = False
    alias_check_complete: bool = False
    policy_bits: int = _POLICY_BITS_1_55
    secrets_version: int = 3
    cpuid_policy: CpuidPolicyName = "strict"
    tsc_khz: int = 2_000_000
    tsc_factor: int = 200  # units of 0.001 %; a plausible value (obs)
    check_id_block_version: bool = False  # not every release checks it (obs)
    report_version: int = 3
    mit_vector: int = 0

    @property
    def version(self) -> tuple[int, int, int]:
        """Major, minor and build of the running firmware."""
        return self.api_major, self.api_minor, self.build

    @property
    def hwid(self) -> bytes:
        """The chip's name: 64 bytes, on Turin 8."""
        return b"SIMULATED"[: _HWID_SIZE[self.product]].ljust(_HWID_SIZE[self.product], b"\0")

    @property
    def chip_id(self) -> bytes:
        """CHIP_ID of reports: `hwid` in 64 bytes."""
        return self.hwid.ljust(_CHIP_ID_SIZE, b"\0")


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
        committed_version=(*api, FirmwareProfile.build),
        policy_bits=_POLICY_BITS_1_55 if api <= (1, 55) else _POLICY_BITS_NEWER,
    )
