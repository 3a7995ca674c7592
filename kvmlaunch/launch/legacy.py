"""Launch digests of SEV and SEV-ES guests: one SHA-256 over all that is launched.

These are firmware, the kernel hashes table (176 bytes, where there is a kernel) and, with
SEV-ES, a VMSA per vCPU whose SEV_FEATURES are 0. Neither addresses nor page types count, so
that there is no LaunchPlan. Source: AMD 55766 (LAUNCH_UPDATE_DATA, LAUNCH_UPDATE_VMSA), and
sev-snp-measure 0.0.13 for the VMSAs.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field

from kvmlaunch.abi.kernel_hashes import KernelHashes
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.errors import FormatError, ImageError
from kvmlaunch.images.options import LEGACY_MODES, PlanOptions
from kvmlaunch.images.ovmf_hashes import check_hashes_place, read_hashes
from kvmlaunch.images.ovmf_pages import check_size
from kvmlaunch.images.ovmf_table import has_table, parse_table
from kvmlaunch.images.source import ImageSource, open_image
from kvmlaunch.images.vmm import default_vmm

__all__ = ["LegacyLaunch", "plan_legacy"]

_DEFAULTS = PlanOptions()
_SNP_ONLY = (
    *("load_addr", "entry", "vmsa_mode", "vmsas", "svsm", "firmware_digest", "order"),
    "native_zero",
)


@dataclass(frozen=True)
class LegacyLaunch:
    """What is launched, in this order; no ``hashes`` without a kernel, no ``vmsas`` in SEV."""

    firmware: memoryview = field(repr=False)
    hashes: KernelHashes | None
    vmsas: tuple[Vmsa, ...] = field(repr=False)

    def digest(self) -> bytes:
        """The launch digest, 32 bytes."""
        digest = hashlib.sha256(self.firmware)
        if self.hashes is not None:
            digest.update(self.hashes.encode())
        for vmsa in self.vmsas:
            digest.update(vmsa.encode())
        return digest.digest()


def plan_legacy(
    image: str | os.PathLike[str] | bytes, mode: str, options: PlanOptions = _DEFAULTS
) -> LegacyLaunch:
    """What a SEV or SEV-ES launch (mode ``sev``, ``seves``) of OVMF consists of.

    Of the options count ``vcpus``, ``signature``, ``vmm``, ``kernel``, ``initrd`` and
    ``append``. Raises ImageError for firmware that can't be launched so.
    """
    if mode not in LEGACY_MODES:
        raise FormatError(f"mode {mode!r} is not one of {', '.join(LEGACY_MODES)}")
    for name in _SNP_ONLY:
        if getattr(options, name) != getattr(_DEFAULTS, name):
            raise FormatError(f"{name} is for SNP launches, not for mode {mode}")
    source = ImageSource.of(image) if isinstance(image, bytes) else open_image(image)
    try:
        return _plan(source, mode, options)
    except ImageError:
        raise
    except FormatError as error:
        raise source.fail(error.rule, offset=error.offset) from error


def _plan(source: ImageSource, mode: str, options: PlanOptions) -> LegacyLaunch:
    check_size(source)
    vmm = options.vmm or default_vmm()
    # Plain SEV asks nothing of firmware, so that any can be measured.
    needed = options.kernel is not None or (mode == "seves" and options.vcpus > 1)
    tables = parse_table(source) if needed or has_table(source) else None
    hashes = None
    if options.kernel is not None and tables is not None:
        check_hashes_place(source, tables, vmm)
        hashes = read_hashes(options)
    vmsas: tuple[Vmsa, ...] = ()
    if mode == "seves":
        eip = tables.reset_eip if tables else None
        vmsas = vmm.states(
            options.vcpus, signature=options.signature, sev_features=0, reset_eip=eip
        )
    return LegacyLaunch(source.data, hashes, vmsas)
