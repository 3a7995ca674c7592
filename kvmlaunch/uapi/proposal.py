"""Numbers of the unmerged proposals for a VMSA that user space supplies.

Trees disagree on them, so they are configuration; the defaults are in csrc/uapi_proposal.h.
"""

from __future__ import annotations

import dataclasses
import os

from kvmlaunch.errors import FormatError
from kvmlaunch.uapi._ext import lib

__all__ = ["PROPOSAL_VARIABLE", "Proposal", "default_proposal", "parse_proposal"]

PROPOSAL_VARIABLE = "KVMLAUNCH_PROPOSAL"
"""Environment variable with numbers, as `parse_proposal` takes them."""

_U32 = 1 << 32
_PREFIXES = ("KVM_CAP_SNP_", "KVM_SEV_SNP_")


@dataclasses.dataclass(frozen=True)
class Proposal:
    """The numbers of one tree, named as there (``KVM_CAP_SNP_`` and ``KVM_SEV_SNP_`` left out).

    Attributes:
        direct_vmsa: capability KVM_CAP_SNP_DIRECT_VMSA.
        vcpu_state: capability KVM_CAP_SNP_VCPU_STATE.
        get_vcpu_state, set_vcpu_state: commands of KVM_MEMORY_ENCRYPT_OP on a vCPU.
        page_type_vmsa: page type of KVM_SEV_SNP_LAUNCH_UPDATE.
    """

    direct_vmsa: int = lib.KVM_CAP_SNP_DIRECT_VMSA
    vcpu_state: int = lib.KVM_CAP_SNP_VCPU_STATE
    get_vcpu_state: int = lib.KVM_SEV_SNP_GET_VCPU_STATE
    set_vcpu_state: int = lib.KVM_SEV_SNP_SET_VCPU_STATE
    page_type_vmsa: int = lib.KVM_SEV_SNP_PAGE_TYPE_VMSA

    def __post_init__(self) -> None:
        """Refuse what doesn't fit the kernel's fields."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            limit = 1 << 8 if field.name == "page_type_vmsa" else _U32
            if not 0 <= value < limit:
                bits = limit.bit_length() - 1
                raise FormatError(f"{field.name.upper()}={value:#x} doesn't fit into {bits} bits")


def parse_proposal(text: str, base: Proposal = Proposal()) -> Proposal:
    """``base`` with the numbers of ``NAME=NUMBER[,NAME=NUMBER...]``.

    Names are the kernel's, with or without their prefix: ``KVM_CAP_SNP_DIRECT_VMSA=251`` or
    ``DIRECT_VMSA=251``. Raises FormatError.
    """
    known = [field.name for field in dataclasses.fields(Proposal)]
    found: dict[str, int] = {}
    for setting in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = setting.partition("=")
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        if name.lower() not in known:
            names = ", ".join(name.upper() for name in known)
            raise FormatError(f"{setting!r} names no number of the proposals; known are {names}")
        if name.lower() in found:
            raise FormatError(f"{name} of the proposals is given twice")
        try:
            found[name.lower()] = int(value, 0)
        except ValueError:
            raise FormatError(f"{setting!r}: {value!r} is not a number") from None
    return dataclasses.replace(base, **found)


def default_proposal() -> Proposal:
    """The numbers that the environment names (`PROPOSAL_VARIABLE`). Raises FormatError."""
    try:
        return parse_proposal(os.environ.get(PROPOSAL_VARIABLE, ""))
    except FormatError as error:
        raise FormatError(f"{PROPOSAL_VARIABLE}: {error.rule}") from None
