"""OVMF (edk2) firmware with SEV metadata, laid out as its VMM does (QEMU, unless chosen).

The image ends at 4 GiB. What it says about itself is read by :mod:`~.ovmf_table`, the page
with a kernel's hashes made by :mod:`~.ovmf_hashes`. With an SVSM, :mod:`~.svsm` plans.
"""

from __future__ import annotations

from kvmlaunch.images.options import PlanOptions, build_plan
from kvmlaunch.images.ovmf_pages import (
    check_sections,
    check_size,
    firmware_range,
    in_order,
    section_ranges,
)
from kvmlaunch.images.ovmf_table import (
    GOOD_BUILDS,
    METADATA_GUID,
    RESET_BLOCK_GUID,
    SVSM_INFO_GUID,
    OvmfTables,
    parse_table,
)
from kvmlaunch.images.plan import LaunchPlan, MemoryRegion
from kvmlaunch.images.source import ImageSource
from kvmlaunch.images.vmm import VmmProfile, default_vmm

__all__ = ["load"]


def load(source: ImageSource, options: PlanOptions) -> LaunchPlan:
    """Plan the launch of OVMF firmware. Raises ImageError if SNP can't launch it."""
    if options.load_addr is not None or options.entry is not None:
        raise source.fail(
            "firmware ends at 4 GiB and starts at the reset vector; "
            "it takes no load address or entry point"
        )
    vmm = options.vmm or default_vmm()
    check_size(source)
    if options.svsm is not None:
        from kvmlaunch.images.svsm import plan_svsm

        return plan_svsm(source, firmware_range(source), options, vmm)
    tables = parse_table(source)
    if options.confidential:
        _check_launchable(source, tables, options.vcpus if vmm.needs_reset_block else 1)
    ram = options.ram()
    check_sections(source, tables.sections, ram)
    hashes = None if options.kernel is None else _hashes_page(source, tables, options, vmm)
    firmware = firmware_range(source)
    sections = section_ranges(source, tables.sections, vmm, hashes)
    if options.firmware_digest is not None and vmm.pages[0] != "firmware":
        raise source.fail(
            f"the firmware's digest can't be given: {vmm.name} launches its metadata first"
        )
    known = options.firmware_digest is not None
    steps = in_order(vmm.pages, [] if known else [firmware], sections)
    return build_plan(
        source,
        options,
        "ovmf",
        memory=(*ram, MemoryRegion(firmware.gpa, firmware.size, "firmware")),
        steps=steps,
        vcpus=vmm.states(
            options.vcpus,
            signature=options.signature,
            sev_features=options.features,
            # A plain VM's other vCPUs wait for a SIPI.
            reset_eip=tables.reset_eip if options.confidential else tables.reset_eip or 0,
        ),
        apic=True,
        vmm=vmm,
    )


def _hashes_page(
    source: ImageSource, tables: OvmfTables, options: PlanOptions, vmm: VmmProfile
) -> bytes:
    from kvmlaunch.images.ovmf_hashes import hashes_page  # few launches need it

    return hashes_page(source, tables, options, vmm)


def _check_launchable(source: ImageSource, tables: OvmfTables, vcpus: int) -> None:
    has = ", ".join(str(entry) for entry in tables.entries) or "none"
    if tables.find(SVSM_INFO_GUID):
        raise source.fail(
            f"this is an SVSM, not firmware (its table has an SVSM info entry {SVSM_INFO_GUID}); "
            "it can't be launched alone"
        )
    if not tables.sections:
        raise source.fail(
            f"the GUIDed table has no SEV metadata (GUID {METADATA_GUID} with at least one "
            f"section), so SEV-SNP can't launch this build; its entries are: {has}; {GOOD_BUILDS}"
        )
    if vcpus > 1 and tables.reset_eip is None:
        raise source.fail(
            f"{vcpus} vCPUs need a SEV-ES reset block (GUID {RESET_BLOCK_GUID}), "
            f"which says where the second starts; this build's table has: {has}"
        )
