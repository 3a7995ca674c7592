"""Secure processor: the SNP commands of a guest.

Each command checks in the order that the comments number, and returns the status of the
first failure (`kvmlaunch.abi.fwstatus`); a failure changes nothing, except that a refused
CPUID page is corrected in place. Source: AMD 56860, chapter of each command; the order of
checks is that of one observed firmware release (obs) and may differ elsewhere.

Not simulated: encryption of memory (pages stay readable in `PhysicalMemory`), the register
protection of a VMSA (SEV_FEATURES bit 14), migration, swapping. Guest requests are in
`firmware_messages`.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import NamedTuple

from kvmlaunch.abi.fwstatus import FwStatus
from kvmlaunch.abi.idblock import ID_AUTH_SIZE, ID_BLOCK_SIZE, IdBlock
from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.abi.secrets_page import SecretsPage

from .cpuid_policy import correct_page
from .firmware_messages import MessageCommands
from .firmware_platform import PlatformStatus
from .guest_context import GuestContext, GuestState, MeasuredPage
from .id_block_check import AUTHOR_KEY, ID_KEY, check_id_block
from .launch_policy import policy_refused
from .rmp import LARGE_PAGE_SIZE, PERMS_ALL, PageState, RmpEntry

__all__ = [
    "GuestContext",
    "GuestState",
    "GuestStatus",
    "MeasuredPage",
    "PlatformStatus",
    "SecureProcessor",
]

_ZERO_PAGE = bytes(PAGE_SIZE)
_SMALL_ONLY = frozenset({PageType.VMSA, PageType.SECRETS, PageType.CPUID})
_POLICY_SINGLE_SOCKET = 1 << 20
_TSC_FACTOR_SINCE_VERSION = 3

# VMSA fields (APM 2, table of the VMSA).
_VMSA_SEV_FEATURES = slice(0x3B0, 0x3B8)
_VMSA_TSC = slice(0x2F0, 0x300)
_SECURE_TSC = 1 << 9


class GuestStatus(NamedTuple):
    """Answer of SNP_GUEST_STATUS; the other fields are 0 unless `status` is 0."""

    status: int
    policy: int = 0
    asid: int = 0
    state: int = 0
    vcek_dis: bool = False


class SecureProcessor(MessageCommands):
    """The secure processor of one host. Commands return the firmware status.

    Page addresses are SPAs. `random` gives keys and ids: VMPCK0..3, VMRK and report id at
    LAUNCH_START, the chip secret when a key is first made of it. `fault` is asked with the
    command's name before anything else; what it returns, unless None, is the command's
    status.
    """

    def gctx_create(self, gctx: int) -> int:
        """SNP_GCTX_CREATE: make the Firmware page `gctx` a Context page, state INIT."""
        if (ordered := self._fault("SNP_GCTX_CREATE")) is not None:
            return ordered
        if gctx % PAGE_SIZE:
            return FwStatus.INVALID_PARAM
        if not self._initialised:
            return FwStatus.INVALID_PLATFORM_STATE
        entry = self._rmp.lookup(gctx)
        if entry.state is not PageState.FIRMWARE:
            return FwStatus.INVALID_PAGE_STATE
        if entry.page_size:
            return FwStatus.INVALID_PAGE_SIZE
        self._memory.page(gctx)[:] = _ZERO_PAGE
        self._rmp.store(gctx, replace(entry, vmsa=True))
        self._contexts[gctx] = GuestContext()
        return FwStatus.SUCCESS

    def launch_start(
        self,
        gctx: int,
        policy: int,
        gosvw: bytes = bytes(16),
        *,
        imi_en: bool = False,
        ma_gctx: int = 0,
        desired_tsc_khz: int = 0,
    ) -> int:
        """SNP_LAUNCH_START: INIT -> LAUNCH. MA_EN is `ma_gctx` not 0."""
        if (ordered := self._fault("SNP_LAUNCH_START")) is not None:
            return ordered
        # 1 reserved bits and alignment, 2 platform, 3 context
        bad = len(gosvw) != 16 or ma_gctx % PAGE_SIZE or not 0 <= desired_tsc_khz < 1 << 32
        status, guest = self._guest(gctx, bad_parameter=bool(bad))
        if guest is None:
            return status
        # 4 state
        if guest.state != GuestState.INIT:
            return FwStatus.INVALID_GUEST_STATE
        # 5 migration agent's context
        agent = self._contexts.get(ma_gctx)
        if ma_gctx and agent is None:
            return FwStatus.INVALID_GUEST
        # 6 policy
        if policy_refused(policy, self.profile, agent):
            return FwStatus.POLICY_FAILURE
        guest.policy = policy
        guest.imi_en = imi_en
        guest.gosvw = bytes(gosvw)
        guest.desired_tsc_khz = desired_tsc_khz
        guest.ma_gctx = ma_gctx
        guest.launch_tcb = self.profile.current_tcb.encode(self.profile.product)
        guest.launch_mit_vector = self.profile.mit_vector
        guest.vmpck = (self._random(32), self._random(32), self._random(32), self._random(32))
        guest.vmrk = self._random(32)
        guest.report_id = self._random(32)
        if agent is not None:
            guest.report_id_ma = agent.report_id
        guest.state = GuestState.LAUNCH
        return FwStatus.SUCCESS

    def activate(self, gctx: int, asid: int) -> int:
        """SNP_ACTIVATE: bind the guest to an ASID."""
        if (ordered := self._fault("SNP_ACTIVATE")) is not None:
            return ordered
        # 1 reserved bits and alignment, 2 platform, 3 context
        status, guest = self._guest(gctx)
        if guest is None:
            return status
        # 4 state, 5 pages that have the ASID already
        if guest.state not in (GuestState.LAUNCH, GuestState.RUNNING):
            return FwStatus.INVALID_GUEST_STATE
        if self._rmp.asid_in_use(asid):
            return FwStatus.INVALID_CONFIG
        # 6 sockets, 7 range, 8 another guest's, 9 the guest has one, 10 flush
        if guest.policy & _POLICY_SINGLE_SOCKET and self.profile.sockets > 1:
            return FwStatus.POLICY_FAILURE
        if not 1 <= asid <= self.model.max_snp_asid:
            return FwStatus.INVALID_ASID
        if any(g.asid == asid for g in self._contexts.values() if g is not guest):
            return FwStatus.ASID_OWNED
        if guest.asid:
            return FwStatus.ACTIVE
        if asid in self._flush_needed:
            return FwStatus.DFFLUSH_REQUIRED
        guest.asid = asid
        return FwStatus.SUCCESS

    def decommission(self, gctx: int) -> int:
        """SNP_DECOMMISSION: forget the guest; its context page is a Firmware page again."""
        if (ordered := self._fault("SNP_DECOMMISSION")) is not None:
            return ordered
        status, guest = self._guest(gctx)
        if guest is None:
            return status
        if guest.asid:
            self._flush_needed.add(guest.asid)
        del self._contexts[gctx]
        self._memory.page(gctx)[:] = _ZERO_PAGE
        self._rmp.store(gctx, replace(self._rmp.lookup(gctx), vmsa=False))
        return FwStatus.SUCCESS

    def guest_status(self, gctx: int) -> GuestStatus:
        """SNP_GUEST_STATUS."""
        if (ordered := self._fault("SNP_GUEST_STATUS")) is not None:
            return GuestStatus(ordered)
        status, guest = self._guest(gctx)
        if guest is None:
            return GuestStatus(status)
        return GuestStatus(status, guest.policy, guest.asid, guest.state, guest.vcek_dis)

    def launch_update(
        self,
        gctx: int,
        spa: int,
        page_type: int,
        *,
        page_size: int = 0,
        imi_page: bool = False,
        vmpl_perms: tuple[int, int, int] = (0, 0, 0),
    ) -> int:
        """SNP_LAUNCH_UPDATE: measure a Pre-Guest page, make it Guest-Valid."""
        if (ordered := self._fault("SNP_LAUNCH_UPDATE")) is not None:
            return ordered
        # 1 reserved bits and alignment, 2 platform, 3 context
        bad = spa % PAGE_SIZE or page_size not in (0, 1) or not 0 <= page_type <= 7
        bad = bad or not all(0 <= perms <= 0xFF for perms in vmpl_perms)
        status, guest = self._guest(gctx, bad_parameter=bool(bad))
        if guest is None:
            return status
        entry = self._rmp.lookup(spa)
        if refused := self._update_refused(guest, entry, spa, page_type, page_size, imi_page):
            return refused
        gpas = range(entry.gpa, entry.gpa + (LARGE_PAGE_SIZE if page_size else PAGE_SIZE))
        for gpa in gpas[::PAGE_SIZE]:
            page = self._memory.page(spa + gpa - entry.gpa)
            self._fill(guest, page, page_type)
            contents = guest.measurement.extend(
                page_type, gpa, page, imi_page=imi_page, vmpl_perms=vmpl_perms
            )
            if imi_page:
                guest.imi_measurement.extend(
                    page_type, gpa, page, imi_page=True, vmpl_perms=vmpl_perms
                )
            guest.pages.append(MeasuredPage(page_type, gpa, contents, guest.measurement.value))
            if page_type == PageType.VMSA:
                self._set_tsc(guest, page)
        self._rmp.store(
            spa,
            replace(
                entry,
                validated=True,
                immutable=False,
                vmsa=page_type == PageType.VMSA,
                perms=(PERMS_ALL, *vmpl_perms),
            ),
        )
        return FwStatus.SUCCESS

    def launch_finish(
        self,
        gctx: int,
        *,
        id_block: bytes | None,
        id_auth: bytes | None,
        auth_key_en: bool = False,
        vcek_dis: bool = False,
        host_data: bytes = bytes(32),
    ) -> int:
        """SNP_LAUNCH_FINISH: LAUNCH -> RUNNING. ID_BLOCK_EN is `id_block` not None.

        AUTH_KEY_EN without an ID block is INVALID_PARAM here; not every release refuses it
        (obs).
        """
        if (ordered := self._fault("SNP_LAUNCH_FINISH")) is not None:
            return ordered
        # 1 reserved bits, 2 platform, 3 context
        status, guest = self._guest(
            gctx,
            bad_parameter=not _finish_is_well_formed(id_block, id_auth, auth_key_en, host_data),
        )
        if guest is None:
            return status
        # 4 state, 5 ASID
        if guest.state != GuestState.LAUNCH or guest.imi_en:
            return FwStatus.INVALID_GUEST_STATE
        if not guest.asid:
            return FwStatus.INACTIVE
        # 6 ID block
        if id_block is not None and id_auth is not None:
            status = check_id_block(
                id_block,
                id_auth,
                digest=guest.measurement.value,
                policy=guest.policy,
                auth_key_en=auth_key_en,
                check_version=self.profile.check_id_block_version,
            )
            if status:
                return status
            self._keep_id_block(guest, id_block, id_auth, auth_key_en)
        guest.host_data = bytes(host_data)
        guest.vcek_dis = vcek_dis
        guest.state = GuestState.RUNNING
        return FwStatus.SUCCESS

    # Peepholes: no command shows these.

    def context(self, gctx: int) -> GuestContext:
        """Return the guest's context. KeyError if there is none at `gctx`."""
        return self._contexts[gctx]

    def launch_digest(self, gctx: int) -> bytes:
        """Return what has been measured so far. KeyError if `gctx` is no context."""
        return self._contexts[gctx].measurement.value

    def measured_pages(self, gctx: int, first: int = 0) -> list[MeasuredPage]:
        """Return the pages measured so far from number `first` on, in order.

        KeyError if `gctx` is no context.
        """
        return self._contexts[gctx].pages[first:]

    # Helpers.

    def _update_refused(
        self,
        guest: GuestContext,
        entry: RmpEntry,
        spa: int,
        page_type: int,
        page_size: int,
        imi_page: bool,
    ) -> FwStatus:
        # 4 page state, 5 page size, 6 alignment of a large page
        if entry.state is not PageState.PRE_GUEST:
            return FwStatus.INVALID_PAGE_STATE
        if entry.page_size != page_size:
            return FwStatus.INVALID_PAGE_SIZE
        if page_size and spa % LARGE_PAGE_SIZE:
            return FwStatus.INVALID_ADDRESS
        # 7 page type
        if page_size and page_type in _SMALL_ONLY:
            return FwStatus.INVALID_PAGE_SIZE
        if page_type not in PageType.__members__.values():
            return FwStatus.INVALID_PARAM
        # 8 state, 9 ASID, 10 owner
        if guest.state != GuestState.LAUNCH:
            return FwStatus.INVALID_GUEST_STATE
        if not guest.asid:
            return FwStatus.INACTIVE
        if entry.asid != guest.asid:
            return FwStatus.INVALID_PAGE_OWNER
        # 11 initial migration image, 12 CPUID table
        if guest.imi_en and not imi_page:
            return FwStatus.INVALID_PARAM
        if page_type == PageType.CPUID and not self._cpuid_accepted(spa):
            return FwStatus.INVALID_PARAM
        return FwStatus.SUCCESS

    def _cpuid_accepted(self, spa: int) -> bool:
        page = self._memory.page(spa)
        accepted, corrected = correct_page(page, self.model, self.profile.cpuid_policy)
        if corrected is not None:
            page[:] = corrected
        return accepted

    def _fill(self, guest: GuestContext, page: memoryview, page_type: int) -> None:
        """Put into the page what firmware, not the host, determines."""
        if page_type == PageType.ZERO:
            if bytes(page) != _ZERO_PAGE:  # reading doesn't make a lazily backed page real
                page[:] = _ZERO_PAGE
        elif page_type == PageType.SECRETS:
            page[:] = self._secrets(guest)

    def _secrets(self, guest: GuestContext) -> bytes:
        version = self.profile.secrets_version
        return SecretsPage(
            version=version,
            imi_en=guest.imi_en,
            fms=self.model.signature,
            gosvw=guest.gosvw,
            vmpck=guest.vmpck,
            tsc_factor=self.profile.tsc_factor if version >= _TSC_FACTOR_SINCE_VERSION else 0,
        ).encode()

    def _set_tsc(self, guest: GuestContext, page: memoryview) -> None:
        """Secure TSC: scale and offset 0, after measuring (obs)."""
        features = int.from_bytes(page[_VMSA_SEV_FEATURES], "little")
        if features & _SECURE_TSC:
            page[_VMSA_TSC] = self._tsc_scale(guest).to_bytes(8, "little") + bytes(8)

    def _keep_id_block(
        self, guest: GuestContext, id_block: bytes, id_auth: bytes, auth_key_en: bool
    ) -> None:
        block = IdBlock.decode(id_block)
        guest.id_block_en = True
        guest.guest_svn = block.guest_svn
        guest.family_id = block.family_id
        guest.image_id = block.image_id
        guest.id_key_digest = hashlib.sha384(id_auth[ID_KEY]).digest()
        if auth_key_en:
            guest.author_key_en = True
            guest.author_key_digest = hashlib.sha384(id_auth[AUTHOR_KEY]).digest()

    def __repr__(self) -> str:
        firmware = f"{self.profile.api_major}.{self.profile.api_minor}.{self.profile.build}"
        return (
            f"<SecureProcessor SIMULATED {self.profile.product} firmware {firmware} "
            f"{len(self._contexts)} guests>"
        )


def _finish_is_well_formed(
    id_block: bytes | None, id_auth: bytes | None, auth_key_en: bool, host_data: bytes
) -> bool:
    if len(host_data) != 32:
        return False
    if id_block is None:
        return not auth_key_en
    return len(id_block) == ID_BLOCK_SIZE and id_auth is not None and len(id_auth) == ID_AUTH_SIZE
