"""What a user may choose about a launch, whatever the image's format is."""

from __future__ import annotations

import os

from kvmlaunch.abi.defaults import DEFAULT_POLICY
from kvmlaunch.abi.digest import DIGEST_SIZE
from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.abi.record import Record
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.errors import FormatError
from kvmlaunch.images.plan import (
    LaunchPlan,
    MemoryRegion,
    PageRange,
    VmsaMode,
    check_identity,
    ram_regions,
)
from kvmlaunch.images.source import ImageSource
from kvmlaunch.images.vmm import VmmProfile

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, TypeAlias

    from kvmlaunch.images.vmsas import VmsaChoice

__all__ = [
    "COMPAT",
    "DEFAULT_CBITPOS",
    "DEFAULT_MEMORY",
    "DEFAULT_SIGNATURE",
    "IMAGE_TYPES",
    "LEGACY_MODES",
    "MAX_VCPUS",
    "ORDERS",
    "Blob",
    "PlanOptions",
    "build_plan",
    "lacks_snp_active",
    "outside_memory",
]

DEFAULT_CBITPOS = 51
"""C-bit position where nobody chose it and no host was asked: what CPUID 0x8000001F
EBX[5:0] (APM volume 3, appendix E.4) says on every EPYC with SNP so far, Milan to Turin."""
DEFAULT_MEMORY = 256 << 20
"""RAM of a guest whose memory size nobody chose."""
DEFAULT_SIGNATURE = 0x800F12
"""CPUID signature of QEMU's EPYC-v4, which sev-snp-measure's users mostly name."""
LEGACY_MODES = ("seves", "sev")
"""Launches without SNP, see `kvmlaunch.launch.legacy`."""
COMPAT = ("sev-snp-measure",)
"""Tools whose known bugs a plan can repeat."""
IMAGE_TYPES = ("auto", "flat", "elf", "ovmf", "igvm")
ORDERS = ("file", "kvm", "qemu")
MAX_VCPUS = 4096

SNP_ACTIVE = 1

Blob: TypeAlias = str | os.PathLike[str] | bytes
"""A file to read once, from its start to its end, or its bytes."""


class PlanOptions(Record, kw_only=True, unshown=("kernel", "initrd", "svsm")):
    """Choices for :func:`kvmlaunch.images.load_image`. FormatError if one makes no sense.

    Attributes:
        image_type: one of ``IMAGE_TYPES``; ``auto`` looks into the file.
        vcpus: number of vCPUs.
        memory: guest RAM in bytes; None leaves it to the loader (256 MiB).
        policy: guest policy (u64); None leaves it to the image (0x30000).
        host_data: 32 bytes for SNP_LAUNCH_FINISH.
        id_block, id_auth: 96 and 4096 bytes, both or none.
        author_key_enabled: the author key in id_auth counts.
        vcek_disabled: the guest's reports may not be signed by the VCEK.
        sev_features: SEV_FEATURES of every VMSA (bit 0 = SNP active); None leaves it to the
            image (1).
        signature: CPUID leaf 1 EAX of the CPU model, in RDX at reset.
        load_addr, entry: where a flat image goes and starts (entry: ELF too).
        confidential: False plans for a plain VM, whose page tables have no C-bit.
        cbitpos: position of the C-bit in page tables; None for ``DEFAULT_CBITPOS``.
        vmsa_mode: who makes the VMSAs; None: KVM (``sync``), unless there are ``vmsas``
            (``direct``).
        vmsas: VMSA pages of modes ``page`` and ``direct``; without any, vCPU 0 gets one.
        forced: the kernel may refuse the VMSAs, they aren't checked before.
        vmm: profile of the VMM that launches firmware; None for QEMU's.
        kernel, initrd, append: what QEMU hands to OVMF, whose hashes are measured; ``append``
            is an IGVM file's COMMAND_LINE, too.
        svsm: a coconut SVSM image to launch below OVMF; ``vars_size``: bytes between the two,
            for OVMF's variables.
        firmware_digest: 48 bytes, the digest of firmware whose pages then aren't launched
            (`kvmlaunch.launch.measure.firmware_digest` of the full plan).
        compat: one of ``COMPAT``, whose known bugs are repeated.
        order: whose order an IGVM file's directives are in, one of ``ORDERS``; None: the file's.
        native_zero: an IGVM file's pages without data are ZERO instead of NORMAL.
    """

    image_type: str = "auto"
    vcpus: int = 1
    memory: int | None = None
    policy: int | None = None
    host_data: bytes = bytes(32)
    id_block: bytes | None = None
    id_auth: bytes | None = None
    author_key_enabled: bool = False
    vcek_disabled: bool = False
    sev_features: int | None = None
    signature: int = DEFAULT_SIGNATURE
    load_addr: int | None = None
    entry: int | None = None
    confidential: bool = True
    cbitpos: int | None = None
    vmsa_mode: VmsaMode | str | None = None
    vmsas: tuple[VmsaChoice, ...] = ()
    forced: bool = False
    vmm: VmmProfile | None = None
    kernel: Blob | None = None
    initrd: Blob | None = None
    append: str | None = None
    svsm: Blob | None = None
    vars_size: int | None = None
    firmware_digest: bytes | None = None
    compat: str | None = None
    order: str | None = None
    native_zero: bool = False

    def __post_init__(self) -> None:
        """Refuse what no launch could use."""
        if self.image_type not in IMAGE_TYPES:
            raise FormatError(
                f"unknown image type {self.image_type!r}, known are {', '.join(IMAGE_TYPES)}"
            )
        if self.vcpus < 1:
            raise FormatError("a guest needs at least one vCPU")
        if self.vcpus > MAX_VCPUS:
            raise FormatError(f"a guest has at most {MAX_VCPUS} vCPUs, not {self.vcpus}")
        if not 32 <= self._cbitpos <= 63:
            raise FormatError(f"the C-bit is one of the address bits 32 to 63, not {self._cbitpos}")
        if self.order not in (None, *ORDERS):
            raise FormatError(f"unknown order {self.order!r}, known are {', '.join(ORDERS)}")
        for what, value, bits in (
            ("policy", self.policy or 0, 64),
            ("SEV features", self.features, 64),
            ("CPU signature", self.signature, 32),
            ("load address", self.load_addr or 0, 64),
            ("entry point", self.entry or 0, 64),
        ):
            if not 0 <= value < 1 << bits:
                raise FormatError(f"the {what} {value:#x} doesn't fit into {bits} bits")
        check_identity(self.host_data, self.id_block, self.id_auth)
        if self.author_key_enabled and self.id_auth is None:
            raise FormatError("an author key is part of the ID authentication, which is missing")
        self._check_memory()
        self._check_vmsa_mode()
        self._check_firmware()

    def _check_firmware(self) -> None:
        for name, what in (("initrd", "an initrd"), ("append", "a kernel command line")):
            if name == "append" and self.image_type == "igvm":
                continue
            if getattr(self, name) is not None and self.kernel is None:
                raise FormatError(f"{what} goes with a kernel, and there is none")
        if self.kernel is not None and self.svsm is not None:
            raise FormatError("an SVSM is launched without kernel hashes")
        if self.svsm is not None and self.firmware_digest is not None:
            raise FormatError("the firmware's digest can't be given for a launch with an SVSM")
        if (self.svsm is None) != (self.vars_size is None):
            raise FormatError(
                "an SVSM and the size of the variable store between it and OVMF go together"
            )
        if self.vars_size is not None and (self.vars_size < 0 or self.vars_size % PAGE_SIZE):
            raise FormatError(
                f"a variable store of {self.vars_size} bytes is not a number of 4 KiB pages"
            )
        if self.compat is not None and self.compat not in COMPAT:
            raise FormatError(
                f"unknown tool {self.compat!r} to be compatible with, known are {', '.join(COMPAT)}"
            )

    @property
    def firmware_only(self) -> str | None:
        """A choice that only OVMF understands, in words; None if there is none."""
        choices = {
            "kernel hashes are": self.kernel,
            "an SVSM is": self.svsm,
            "a VMM profile is": self.vmm,
            "a firmware digest is": self.firmware_digest,
        }
        return next((what for what, value in choices.items() if value is not None), None)

    @property
    def igvm_only(self) -> str | None:
        """A choice that only IGVM files understand, in words; None if there is none."""
        if self.order is not None:
            return "an order is"
        return "ZERO for pages without data is" if self.native_zero else None

    def _check_vmsa_mode(self) -> None:
        known = [mode.value for mode in VmsaMode]
        if self.vmsa_mode is not None and self.vmsa_mode not in known:
            raise FormatError(f"unknown VMSA mode {self.vmsa_mode!r}, known are {', '.join(known)}")
        ours = self.vmsas or self.vmsa_mode in (VmsaMode.PAGE, VmsaMode.DIRECT)
        if ours and not self.features & SNP_ACTIVE:
            raise FormatError(lacks_snp_active(self.features))
        if self.vmsa_mode == VmsaMode.SYNC and self.vmsas:
            raise FormatError(
                "in mode sync KVM makes the VMSAs: plan for mode direct, then use to_sync()"
            )

    def _check_memory(self) -> None:
        if self.memory is None:
            return
        if self.memory <= 0 or self.memory % PAGE_SIZE:
            raise FormatError(
                f"guest memory of {self.memory} bytes is not a positive number of 4 KiB pages"
            )
        end = ram_regions(self.memory)[-1].end
        if self.confidential and end > 1 << self._cbitpos:
            raise FormatError(
                f"guest memory of {self.memory:#x} bytes ends at GPA {end:#x}, "
                f"beyond the C-bit (bit {self._cbitpos})"
            )

    @property
    def features(self) -> int:
        """SEV_FEATURES where the image has none of its own."""
        return SNP_ACTIVE if self.sev_features is None else self.sev_features

    @property
    def _cbitpos(self) -> int:
        return DEFAULT_CBITPOS if self.cbitpos is None else self.cbitpos

    @property
    def c_bit(self) -> int:
        """The C-bit as a mask, 0 in a plain VM."""
        return 1 << self._cbitpos if self.confidential else 0

    def ram(self) -> tuple[MemoryRegion, ...]:
        """The guest's RAM: as chosen, else ``DEFAULT_MEMORY``."""
        return ram_regions(DEFAULT_MEMORY if self.memory is None else self.memory)


def lacks_snp_active(sev_features: int) -> str:
    """The sentence for SEV features that no SNP guest has."""
    return f"SEV features {sev_features:#x} lack bit 0 (SNP active), which every SNP guest has"


def build_plan(
    source: ImageSource,
    options: PlanOptions,
    image_type: str,
    *,
    memory: Sequence[MemoryRegion],
    steps: Sequence[PageRange],
    vcpus: Sequence[Vmsa],
    paging: bool = False,
    apic: bool = False,
    vmpls: bool = False,
    vmm: VmmProfile | None = None,
) -> LaunchPlan:
    """A LaunchPlan of ``source`` with everything that the options say directly.

    ``paging``: the steps hold page tables, with the options' C-bit. ``vmm``: whose the vCPUs'
    states are.
    Raises FormatError where the parts don't fit together (see ``plan.py``).
    """
    return LaunchPlan(
        image=source.name,
        image_type=image_type,
        data=source.data,
        memory=tuple(sorted(memory, key=lambda region: region.gpa)),
        steps=tuple(steps),
        vcpus=tuple(vcpus),
        policy=DEFAULT_POLICY if options.policy is None else options.policy,
        sev_features=options.features,
        host_data=options.host_data,
        id_block=options.id_block,
        id_auth=options.id_auth,
        author_key_enabled=options.author_key_enabled,
        vcek_disabled=options.vcek_disabled,
        apic=apic,
        vmpls=vmpls,
        confidential=options.confidential,
        cbitpos=options.c_bit.bit_length() - 1 if paging and options.c_bit else None,
        **({} if vmm is None else _of_vmm(vmm)),
        start_digest=options.firmware_digest or bytes(DIGEST_SIZE),
    )


def _of_vmm(vmm: VmmProfile) -> dict[str, Any]:
    return {"vmm": vmm.name, "as_given": vmm.as_given, "vmsa_gpa": vmm.vmsa_gpa}


def outside_memory(memory: Sequence[MemoryRegion], gpa: int, end: int) -> str | None:
    """None if one region holds ``gpa..end``, else the end of a sentence that says it doesn't."""
    if any(region.gpa <= gpa and end <= region.end for region in memory):
        return None
    regions = ", ".join(f"{region.gpa:#x}..{region.end:#x}" for region in memory)
    return f"is outside the guest's memory ({regions})"
