"""OVMF under a coconut SVSM, as coconut's QEMU launches them.

Below the firmware lies its variable store, which isn't launched, and below that the SVSM
image, whose own metadata names the other pages. All vCPUs start in the SVSM, in 32-bit
protected mode without paging. Source: coconut-svsm/qemu 0e64fb84 target/i386/sev.c, as in
sev-snp-measure 0.0.13 (whose VMSA lacks X87_FCW: it sets a field that its struct doesn't have).
"""

from __future__ import annotations

from dataclasses import replace

from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.abi.vmsa import Segment, Vmsa
from kvmlaunch.images.options import Blob, PlanOptions, build_plan
from kvmlaunch.images.ovmf_pages import check_sections, section_ranges
from kvmlaunch.images.ovmf_table import METADATA_GUID, SVSM_INFO_GUID, parse_table, words
from kvmlaunch.images.plan import LOW_MEMORY_END, LaunchPlan, MemoryRegion, PageRange, Piece
from kvmlaunch.images.source import ImageSource, open_image
from kvmlaunch.images.vmm import VmmProfile

__all__ = ["plan_svsm"]

_CODE = Segment(selector=0x08, attrib=0xC9B, limit=0xFFFF_FFFF, base=0)
_DATA = Segment(selector=0x10, attrib=0xC93, limit=0xFFFF_FFFF, base=0)


def plan_svsm(
    source: ImageSource, firmware: PageRange, options: PlanOptions, vmm: VmmProfile
) -> LaunchPlan:
    """Plan the launch of firmware ``source`` under the options' SVSM. Raises ImageError."""
    if not vmm.svsm:
        raise source.fail(f"how {vmm.name} launches an SVSM is not known; QEMU's way is")
    assert options.svsm is not None
    svsm = _open(options.svsm)
    end = firmware.gpa - (options.vars_size or 0)
    if options.compat == "sev-snp-measure":
        options = replace(options, sev_features=1)
    gpa, size, name = end - len(svsm.data), len(svsm.data), svsm.basename
    if size % PAGE_SIZE or gpa < LOW_MEMORY_END:
        raise svsm.fail(
            f"an SVSM of {size:#x} bytes below {end:#x}: not a number of 4 KiB pages, or too many"
        )
    tables = parse_table(svsm)
    info = tables.find(SVSM_INFO_GUID)
    if info is None or not tables.sections:
        guid = METADATA_GUID if info else SVSM_INFO_GUID
        raise svsm.fail(f"not an SVSM with SEV metadata: its table has no {guid} entry")
    ram = options.ram()
    check_sections(svsm, tables.sections, ram)
    eip = words(svsm, info, 1)[0] + gpa
    if not gpa <= eip < end:
        raise svsm.fail(f"the SVSM starts at {eip:#x}, outside its image", offset=info.offset)
    image = PageRange(gpa, size, PageType.NORMAL, "svsm", name, (Piece(0, svsm.data, name),))
    start = _start(eip, options, vmm)
    return build_plan(
        source,
        options,
        "ovmf",
        memory=(
            *ram,
            MemoryRegion(gpa, size, "svsm"),
            MemoryRegion(firmware.gpa, firmware.size, "firmware"),
        ),
        steps=(firmware, image, *section_ranges(svsm, tables.sections, vmm)),
        vcpus=(start,) * options.vcpus,
        apic=True,
        vmm=vmm,
    )


def _open(blob: Blob) -> ImageSource:
    return ImageSource.of(blob, "<svsm>") if isinstance(blob, bytes) else open_image(blob)


def _start(eip: int, options: PlanOptions, vmm: VmmProfile) -> Vmsa:
    """The state of every vCPU: what isn't named here is as after the VMM's reset."""
    reset = vmm.bsp.at(eip, signature=options.signature, sev_features=options.features)
    buggy = options.compat == "sev-snp-measure"
    return reset.replace(
        cs=_CODE,
        ds=_DATA,
        es=_DATA,
        ss=_DATA,
        fs=_DATA,
        cr0=0x11,  # ET, PE
        rip=eip,
        x87_fcw=0 if buggy else reset.x87_fcw,
    )
