"""Ask a host's firmware whether a launch has a certain digest, without a line of guest code.

SNP_LAUNCH_FINISH compares an ID block with what was measured, in a fixed order: the launch
digest (BAD_MEASUREMENT), the policy (POLICY_FAILURE), the algorithms (INVALID_PARAM), the
signatures (BAD_SIGNATURE). With an ID key, success proves the digest. Without one, an ID
block that nobody signed is refused in any case, and the status tells whether the digest was
the reason.

The order is that of snp-firmware-abi 6.4: observed with one firmware release, not confirmed
on every product. FINISH also measures the VMSAs that KVM makes, so that a status may be that of a
VMSA: whoever concludes "right" from a refusal has to see the refusal change with the digest
(`kvmlaunch.launch.verify`).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from kvmlaunch.abi import fwstatus
from kvmlaunch.abi.fwstatus import FwStatus
from kvmlaunch.abi.idblock import ALGO_ECDSA_P384_SHA384, IdAuth, IdBlock
from kvmlaunch.abi.idblock_sign import Signer, sign_id_block
from kvmlaunch.errors import FormatError, IoctlError
from kvmlaunch.images.plan import LaunchPlan
from kvmlaunch.launch.guest import Guest
from kvmlaunch.uapi import Platform, Proposal

__all__ = ["Answer", "Oracle", "Reply"]

_FINISH = "KVM_SEV_SNP_LAUNCH_FINISH"
# Names an algorithm, so that the signature is what is refused: no other command gives 0Ah.
_UNSIGNED = IdAuth(id_key_algo=ALGO_ECDSA_P384_SHA384)
_REFUSED_UNSIGNED = (FwStatus.BAD_SIGNATURE, FwStatus.INVALID_PARAM)


class Answer(str, enum.Enum):
    """Whether the firmware measured the digest that it was asked for."""

    RIGHT = "right"
    DIFFERS = "differs"
    UNKNOWN = "unknown"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Reply:
    """What SNP_LAUNCH_FINISH of one VM gave.

    Attributes: ``answer``; ``digest`` that was asked for (48 bytes); ``status`` of the firmware,
    None where the kernel refused by itself; ``errno`` (0: success); ``signed``: the ID block was.
    """

    answer: Answer
    digest: bytes
    status: int | None
    errno: int
    signed: bool

    def __str__(self) -> str:
        block = "a signed ID block" if self.signed else "an unsigned ID block"
        if self.status is None:
            result = f"errno {self.errno} without a firmware status"
        else:
            result = f"{self.status:02X}h ({fwstatus.name(self.status)})"
        return f"{block} with digest {self.digest.hex()}: SNP_LAUNCH_FINISH gave {result}"


class Oracle:
    """Launches plans on a platform, one VM per question.

    With ``id_key`` (and ``author_key``) the ID blocks are signed. ``launches`` counts the VMs.
    """

    def __init__(
        self,
        platform: Platform,
        *,
        id_key: Signer | None = None,
        author_key: Signer | None = None,
        proposal: Proposal | None = None,
        retry_cpuid: bool = False,
    ) -> None:
        if author_key is not None and id_key is None:
            raise FormatError("an author key signs an ID key, which is missing")
        self.platform = platform
        self.signed = id_key is not None
        self.launches = 0
        self._id_key = id_key
        self._author_key = author_key
        self._proposal = proposal
        self._retry_cpuid = retry_cpuid

    def __repr__(self) -> str:
        how = repr(self._id_key) if self._id_key is not None else "unsigned"
        return f"<Oracle {how}, {self.launches} launches, platform={self.platform.name}>"

    def ask(self, plan: LaunchPlan, digest: bytes) -> Reply:
        """Launch ``plan`` up to FINISH, with an ID block that expects ``digest``.

        Raises IoctlError where another step fails, and MissingCapability.
        """
        block = IdBlock(ld=digest, policy=plan.policy)
        auth = _UNSIGNED
        if self._id_key is not None:
            auth = sign_id_block(block, self._id_key, self._author_key)
        asked = replace(
            plan,
            id_block=block.encode(),
            id_auth=auth.encode(),
            author_key_enabled=self._author_key is not None,
        )
        self.launches += 1
        with Guest(asked, self.platform, proposal=self._proposal) as guest:
            try:
                guest.launch_blind(retry_cpuid=self._retry_cpuid)
            except IoctlError as error:
                if error.ioctl != _FINISH:
                    raise
                return self._reply(digest, error.fw_error or None, error.errno or 0)
        return self._reply(digest, FwStatus.SUCCESS, 0)

    def _reply(self, digest: bytes, status: int | None, errno: int) -> Reply:
        answer = Answer.UNKNOWN
        if status == FwStatus.BAD_MEASUREMENT:
            answer = Answer.DIFFERS
        elif (self.signed and not errno) or (not self.signed and status in _REFUSED_UNSIGNED):
            answer = Answer.RIGHT
        return Reply(answer, digest, status, errno, self.signed)
