"""The one place that chooses between the real kernel and the simulated host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvmlaunch.errors import FormatError, KvmLaunchError
from kvmlaunch.images import LaunchPlan, VmsaMode
from kvmlaunch.kvm import Kvm, SevDevice, cbitpos
from kvmlaunch.uapi import Platform, RealPlatform

__all__ = ["DEFAULT_PROFILE", "Choice", "host_cbitpos", "open_platform", "profile_for"]

DEFAULT_PROFILE = "6.12"
_VMPL_PROFILE = "multi-vmpl"
_CERTIFICATES_PROFILE = "7.0"
_PROFILES = {VmsaMode.PAGE: "vmsa-page", VmsaMode.DIRECT: "direct-vmsa"}


class Choice(NamedTuple):
    """A platform and the sentence that says why it was taken."""

    platform: Platform
    why: str


def open_platform(
    name: str = "auto",
    *,
    profile: str = DEFAULT_PROFILE,
    confidential: bool = True,
    faults: Sequence[str] = (),
) -> Choice:
    """Choose a platform: ``kvm``, ``sim``, or ``auto``.

    ``auto`` takes the real kernel where it can do what is asked (launch SNP guests,
    or any guest with ``confidential=False``), else the simulated host. ``profile``
    (``6.12,seed=3,product=Genoa``: see :mod:`kvmlaunch.sim.spec`) and ``faults`` are the
    simulated host's. Raises FormatError for another name, and for a bad ``profile``.
    """
    if name not in ("auto", "kvm", "sim"):
        raise FormatError(f"no platform is named {name!r}; known are auto, kvm, sim")
    if name == "kvm":
        return _real(RealPlatform())
    why = "as asked"
    if name == "auto":
        real = RealPlatform()
        missing = _missing(real, confidential)
        if missing is None:
            return _real(real)
        why = f"since {missing}"
    # Only here: a real host needs none of it.
    from kvmlaunch.sim import SimPlatform
    from kvmlaunch.sim.spec import parse_spec

    spec = parse_spec(profile)
    sim = SimPlatform(spec.kernel(), product=spec.product, seed=spec.seed, faults=faults)
    return Choice(sim, f"platform sim ({profile}): a simulated host, {why}")


def _real(platform: RealPlatform) -> Choice:
    # Under `kvmlaunch sim` even this machine's kernel is simulated.
    return Choice(platform, f"platform kvm: {platform.profile or 'this machine'}'s kernel")


def profile_for(plan: LaunchPlan, asked: str | None = None, *, certificates: bool = False) -> str:
    """What to simulate for ``plan``: what was asked for, where that names a kernel.

    Else mainline, unless the plan needs VMPLs or a proposal's VMSA mode, or there are
    certificates for the guest's extended requests; with the settings that were asked for.
    """
    mainline = _CERTIFICATES_PROFILE if certificates else DEFAULT_PROFILE
    default = _VMPL_PROFILE if plan.vmpls else _PROFILES.get(plan.vmsa_mode, mainline)
    if not asked:
        return default
    # Only here: a real host needs none of it.
    from kvmlaunch.sim.spec import with_profile

    return with_profile(asked, default)


def host_cbitpos(platform: Platform) -> int | None:
    """Where an SNP host has its C-bit (for PlanOptions); None where its CPUID doesn't tell.

    Raises MissingCapability where there is no SNP, and IoctlError.
    """
    with Kvm.open(platform) as kvm:
        kvm.require_snp()
        return cbitpos(kvm.supported_cpuid())


def _missing(platform: Platform, confidential: bool) -> str | None:
    """What keeps this machine's kernel from it, or None."""
    try:
        with Kvm.open(platform) as kvm:
            if not confidential:
                return None
            if not kvm.supports_snp():
                return "this machine's KVM has no SEV-SNP"
        SevDevice.open(platform).close()
    except KvmLaunchError as error:
        return str(error).splitlines()[0]
    return None
