"""Where kernels are known to differ: what each may answer, and which kernels do.

A case whose check is one of these takes every documented answer and nothing else. Source: Linux
6.12.117, and the commits and tags of later kernels.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from kvmlaunch.abi.fwstatus import FwStatus

if TYPE_CHECKING:
    from kvmlaunch.selftest.answer import Answer

__all__ = ["DIFFERENCES", "Behaviour"]


@dataclass(frozen=True)
class Behaviour:
    """One documented answer: ``errno`` (0 = success), firmware code ``fw`` (None: the word is
    left alone), and the ``kernels`` that give it.
    """

    errno: int
    kernels: str
    fw: int | None = None

    def matches(self, answer: Answer) -> bool:
        """Whether this is what a host did."""
        if answer.errno != self.errno:
            return False
        if answer.ok:
            return True
        return answer.untouched if self.fw is None else answer.fw_error == self.fw

    @property
    def answer(self) -> str:
        """The answer in words."""
        if not self.errno:
            return "success"
        text = f"errno {errno.errorcode[self.errno]}"
        return text if self.fw is None else f"{text}, firmware code {self.fw}"

    def __str__(self) -> str:
        return f"{self.answer} ({self.kernels})"


def _taken(kernels: str) -> Behaviour:
    return Behaviour(0, kernels)


def _refused(kernels: str) -> Behaviour:
    return Behaviour(errno.EINVAL, kernels)


def _policy_failure(kernels: str) -> Behaviour:
    return Behaviour(errno.EIO, kernels, FwStatus.POLICY_FAILURE)


DIFFERENCES: Mapping[str, tuple[Behaviour, ...]] = MappingProxyType(
    {
        "INIT2 with ghcb_version 1": (_taken("6.11 to 6.17"), _refused("6.18 and later")),
        "START without the policy's SMT bit": (
            _refused("6.11 to 6.16"),
            _taken("6.17 and later, SMT off"),
            _policy_failure("6.17 and later, SMT on"),
        ),
        "START with the policy's single socket bit": (
            _refused("6.11 to 6.16"),
            _taken("6.17 and later, one socket"),
            _policy_failure("6.17 and later, several sockets"),
        ),
        "START with a policy bit that the kernel offers": (
            _taken("6.19 and later"),
            _policy_failure("6.19 and later, where firmware wants something else"),
        ),
        "a command on a vCPU": (
            _refused("6.11 to 6.15"),
            Behaviour(errno.ENOTTY, "6.16 and later"),
        ),
        "KVM_RUN without a VMSA": (_refused("expected of the proposals"),),
        "SET_VCPU_STATE in a slot without guest_memfd": (
            Behaviour(errno.EFAULT, "as kvm_gmem_get_pfn() says"),
            _refused("where the slot is looked at"),
        ),
        "UPDATE with len 0": (_taken("6.11 to 6.17"), _refused("6.18 and later")),
        "UPDATE with an unaligned source": (_taken("6.11 to 6.19"), _refused("7.0 and later")),
    }
)
"""Question -> the answers that kernels are known to give."""
