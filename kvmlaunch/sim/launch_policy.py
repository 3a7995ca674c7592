"""Guest policies that SNP_LAUNCH_START refuses (AMD 56860, guest policy structure)."""

from __future__ import annotations

from .firmware_profiles import FirmwareProfile
from .guest_context import GuestContext

__all__ = ["policy_refused"]

_SMT = 1 << 16
_MUST_BE_ONE = 1 << 17
_MIGRATE_MA = 1 << 18
_SINGLE_SOCKET = 1 << 20
_CXL_ALLOW = 1 << 21
_MEM_AES_256_XTS = 1 << 22
_RAPL_DIS = 1 << 23
_CIPHERTEXT_HIDING = 1 << 24


def policy_refused(policy: int, profile: FirmwareProfile, agent: GuestContext | None) -> bool:
    """Whether `policy` is a POLICY_FAILURE, for a guest with this migration agent, if any."""
    wanted_abi = (policy >> 8 & 0xFF, policy & 0xFF)
    return (
        not policy & _MUST_BE_ONE
        or bool(policy & ~profile.policy_bits)
        or (profile.smt_enabled and not policy & _SMT)
        or wanted_abi > (profile.api_major, profile.api_minor)
        or _requirement_unmet(policy, profile)
        or (agent is not None and _agent_refused(policy, agent))
    )


def _requirement_unmet(policy: int, profile: FirmwareProfile) -> bool:
    """Bits 21..24, for firmware that knows them (GEN: from 56860, not observed)."""
    if not profile.policy_bits & _CXL_ALLOW:
        return False
    return bool(
        (policy & _MEM_AES_256_XTS and not profile.mem_aes_256_xts)
        or (policy & _RAPL_DIS and not profile.rapl_disabled)
        or (policy & _CIPHERTEXT_HIDING and not profile.ciphertext_hiding)
        or (profile.cxl_present and not policy & _CXL_ALLOW)
    )


def _agent_refused(policy: int, agent: GuestContext) -> bool:
    return bool(
        not policy & _MIGRATE_MA
        or agent.ma_gctx
        or (policy & _SINGLE_SOCKET and not agent.policy & _SINGLE_SOCKET)
    )
