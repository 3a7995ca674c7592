"""Secure processor: commands about the platform and about pages of no guest.

Source: AMD 56860, chapter of each command; 8.2 of the project's fact sheet for the TCB rules.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from kvmlaunch.abi.fwstatus import FwStatus
from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.abi.tcb import Tcb

from .certificates import CertificateAuthority
from .cpumodel import CpuModel
from .endorsement import ChipKeys
from .firmware_profiles import VLEK_HASHSTICK_SIZE, FirmwareProfile
from .guest_context import GuestContext, GuestState
from .memory import PhysicalMemory
from .rmp import LARGE_PAGE_SIZE, PageState, Rmp, RmpEntry

__all__ = ["PlatformCommands", "PlatformStatus"]

_RECLAIMABLE = frozenset(
    {PageState.FIRMWARE, PageState.METADATA, PageState.PRE_GUEST, PageState.PRE_SWAP}
)
_CONFIG_MASK_CHIP_ID = 1
_CONFIG_MASK_CHIP_KEY = 2


class PlatformStatus(NamedTuple):
    """Answer of SNP_PLATFORM_STATUS; `status` is not 0 only where a fault was ordered."""

    status: int
    api_major: int = 0
    api_minor: int = 0
    state: int = 0
    is_rmp_initialized: bool = False
    build: int = 0
    mask_chip_id: bool = False
    mask_chip_key: bool = False
    vlek_en: bool = False
    guest_count: int = 0
    current_tcb: int = 0
    reported_tcb: int = 0


class PlatformCommands:
    """State of the secure processor, and the commands that name no guest."""

    def __init__(
        self,
        profile: FirmwareProfile,
        memory: PhysicalMemory,
        rmp: Rmp,
        *,
        model: CpuModel,
        random: Callable[[int], bytes] = os.urandom,
        fault: Callable[[str], int | None] = lambda name: None,
    ) -> None:
        self.profile = profile
        self.model = model
        self._memory = memory
        self._rmp = rmp
        self._random = random
        self._fault = fault
        self._initialised = False
        self._contexts: dict[int, GuestContext] = {}
        self._flush_needed: set[int] = set()
        self._committed_tcb = profile.committed_tcb
        self._reported_tcb = profile.committed_tcb
        self._committed_version = profile.committed_version
        self._mask_word = 0
        self._vlek: bytes | None = None
        self._keys = ChipKeys(random)
        self._authority = CertificateAuthority(profile.product)

    def init(self) -> int:
        """SNP_INIT (with INIT_RMP)."""
        if (ordered := self._fault("SNP_INIT")) is not None:
            return ordered
        if self._initialised:
            return FwStatus.INVALID_PLATFORM_STATE
        self._initialised = True
        return FwStatus.SUCCESS

    def platform_status(self) -> PlatformStatus:
        """SNP_PLATFORM_STATUS: works in any state."""
        if (ordered := self._fault("SNP_PLATFORM_STATUS")) is not None:
            return PlatformStatus(ordered)
        started = [g for g in self._contexts.values() if g.state != GuestState.INIT]
        return PlatformStatus(
            FwStatus.SUCCESS,
            self.profile.api_major,
            self.profile.api_minor,
            int(self._initialised),
            self._initialised,
            self.profile.build,
            self._mask_chip_id,
            self._mask_chip_key,
            self._vlek is not None,
            len(started),
            self.profile.current_tcb.encode(self.profile.product),
            self._reported_tcb.encode(self.profile.product),
        )

    def config(self, reported_tcb: int, mask_word: int) -> int:
        """SNP_CONFIG: bit 0 of `mask_word` masks CHIP_ID, bit 1 the chip key.

        `reported_tcb` 0 stands for the committed one; above that in any part is refused.
        """
        if (ordered := self._fault("SNP_CONFIG")) is not None:
            return ordered
        if mask_word & ~(_CONFIG_MASK_CHIP_ID | _CONFIG_MASK_CHIP_KEY):
            return FwStatus.INVALID_PARAM
        if not self._initialised:
            return FwStatus.INVALID_PLATFORM_STATE
        reported = Tcb.decode(self.profile.product, reported_tcb)
        if not self._committed_tcb.covers(reported):
            return FwStatus.INVALID_PARAM
        self._reported_tcb = reported if reported_tcb else self._committed_tcb
        self._mask_word = mask_word
        return FwStatus.SUCCESS

    def commit(self) -> int:
        """SNP_COMMIT: the running firmware becomes the floor (COMMITTED = REPORTED = CURRENT)."""
        if (ordered := self._fault("SNP_COMMIT")) is not None:
            return ordered
        # GEN: allowed in any platform state; REPORTED_TCB follows.
        self._committed_tcb = self._reported_tcb = self.profile.current_tcb
        self._committed_version = self.profile.version
        return FwStatus.SUCCESS

    def vlek_load(self, hashstick: bytes) -> int:
        """SNP_VLEK_LOAD: any 432 bytes will do, nothing is unwrapped."""
        if (ordered := self._fault("SNP_VLEK_LOAD")) is not None:
            return ordered
        if len(hashstick) != VLEK_HASHSTICK_SIZE:
            return FwStatus.INVALID_PARAM
        if not self._initialised:
            return FwStatus.INVALID_PLATFORM_STATE
        self._vlek = bytes(hashstick)
        return FwStatus.SUCCESS

    def df_flush(self) -> int:
        """SNP_DF_FLUSH: ASIDs of decommissioned guests can be used again."""
        if (ordered := self._fault("SNP_DF_FLUSH")) is not None:
            return ordered
        if not self._initialised:
            return FwStatus.INVALID_PLATFORM_STATE
        self._flush_needed.clear()
        return FwStatus.SUCCESS

    def page_reclaim(self, spa: int) -> int:
        """SNP_PAGE_RECLAIM: the host may take the page back; bit 0 of `spa` is its size.

        GEN: the states that can be reclaimed, and that a page already in Reclaim can't.
        """
        if (ordered := self._fault("SNP_PAGE_RECLAIM")) is not None:
            return ordered
        page_size = spa & 1
        spa &= ~1
        if spa % (LARGE_PAGE_SIZE if page_size else PAGE_SIZE):
            return FwStatus.INVALID_PARAM
        if not self._initialised:
            return FwStatus.INVALID_PLATFORM_STATE
        entry = self._rmp.lookup(spa)
        if entry.state not in _RECLAIMABLE:
            return FwStatus.INVALID_PAGE_STATE
        if entry.page_size != page_size:
            return FwStatus.INVALID_PAGE_SIZE
        self._rmp.store(spa, RmpEntry(assigned=True, page_size=page_size))
        return FwStatus.SUCCESS

    # Helpers.

    @property
    def _mask_chip_id(self) -> bool:
        return bool(self._mask_word & _CONFIG_MASK_CHIP_ID)

    @property
    def _mask_chip_key(self) -> bool:
        return bool(self._mask_word & _CONFIG_MASK_CHIP_KEY)

    def _guest(
        self, gctx: int, *, bad_parameter: bool = False
    ) -> tuple[FwStatus, GuestContext | None]:
        """The checks that every guest command begins with."""
        if bad_parameter or gctx % PAGE_SIZE:
            return FwStatus.INVALID_PARAM, None
        if not self._initialised:
            return FwStatus.INVALID_PLATFORM_STATE, None
        guest = self._contexts.get(gctx)
        return (FwStatus.SUCCESS if guest else FwStatus.INVALID_GUEST), guest
