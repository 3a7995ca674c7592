"""What is simulated, as people write it: ``6.12,seed=3,product=Genoa,debug-swap``."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, get_args

from kvmlaunch.abi.tcb import Product
from kvmlaunch.errors import FormatError
from kvmlaunch.sim.profiles import DEBUG_SWAP, KernelProfile, kernel_profile

__all__ = ["DEFAULT_PRODUCT", "SimSpec", "parse_spec", "with_profile"]

DEFAULT_PRODUCT = "Milan"

_KEYS = ("product", "seed")
_DEBUG_SWAP = "debug-swap"


class SimSpec(NamedTuple):
    """Kernel profile, CPU, and the seed that vCPUs take turns by."""

    profile: str
    product: str = DEFAULT_PRODUCT
    seed: int = 0
    debug_swap: bool = False
    """KVM sets that SEV feature in every VMSA, unasked, as kernels 6.5 to 6.7 did for SEV-ES."""

    def kernel(self) -> KernelProfile:
        """The kernel with what was said of it."""
        profile = kernel_profile(self.profile)
        if not self.debug_swap:
            return profile
        name = f"{profile.name},{_DEBUG_SWAP}"
        return replace(profile, name=name, forced_vmsa_features=DEBUG_SWAP)


def with_profile(text: str, default: str) -> str:
    """``text`` with a profile in front: ``default`` where it names none."""
    first = text.split(",")[0]
    names_none = "=" in first or first == _DEBUG_SWAP
    return f"{default},{text}" if names_none else text or default


def parse_spec(text: str) -> SimSpec:
    """Read ``PROFILE[,KEY=VALUE...][,debug-swap]``; keys are seed and product.

    Raises FormatError for a profile, key or value that isn't known, and for a key given twice.
    """
    profile, *settings = text.split(",")
    kernel_profile(profile)
    found: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if setting != _DEBUG_SWAP and (key not in _KEYS or not equals):
            raise FormatError(
                f"{setting!r} is nothing that a simulated host has; known are "
                f"{', '.join(f'{name}=...' for name in _KEYS)}, {_DEBUG_SWAP}"
            )
        if key in found:
            raise FormatError(f"{key} of the simulated host is given twice")
        found[key] = value
    return SimSpec(
        profile,
        _product(found.get("product", DEFAULT_PRODUCT)),
        _seed(found.get("seed", "0")),
        _DEBUG_SWAP in found,
    )


def _product(text: str) -> str:
    known = get_args(Product)
    if text not in known:
        raise FormatError(f"no CPU is named {text!r}; known are {', '.join(known)}")
    return text


def _seed(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if value < 0:
        raise FormatError(f"a seed is a number from 0 up, not {text!r}")
    return value
