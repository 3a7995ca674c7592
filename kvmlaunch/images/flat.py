"""Raw binaries: no header, so the user says where they go.

| image                                       | start state of every vCPU              |
|---------------------------------------------|----------------------------------------|
| ends at 4 GiB (a ROM), no entry point given | reset: real mode at 0xFFFFFFF0         |
| entry point below 1 MiB                     | real mode at the entry point           |
| entry point at or above 1 MiB               | 64-bit, see :mod:`~.boot64`            |

The load address is 0x1000 and the entry point the load address, unless chosen. All
vCPUs start in the same state at the same place: nothing holds the others back until
a SIPI, as an interrupt controller in the kernel would, so the image tells them apart.
"""

from __future__ import annotations

from dataclasses import replace

from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.abi.reset import BSP_EIP, qemu_reset
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.images.boot64 import boot64
from kvmlaunch.images.options import PlanOptions, build_plan, outside_memory
from kvmlaunch.images.plan import HIGH_MEMORY, LaunchPlan, MemoryRegion, PageRange, Piece
from kvmlaunch.images.source import ImageSource

__all__ = ["DEFAULT_LOAD_ADDR", "load"]

DEFAULT_LOAD_ADDR = 0x1000

_REAL_MODE_END = 1 << 20


def load(source: ImageSource, options: PlanOptions) -> LaunchPlan:
    """Plan the launch of a raw binary. Raises FormatError where it can't be placed."""
    gpa = DEFAULT_LOAD_ADDR if options.load_addr is None else options.load_addr
    if gpa % PAGE_SIZE:
        raise source.fail(f"the load address {gpa:#x} is not aligned to 4 KiB pages")
    name = source.basename
    image = PageRange(
        gpa,
        -(-len(source.data) // PAGE_SIZE) * PAGE_SIZE,
        PageType.NORMAL,
        "image",
        name,
        (Piece(0, source.data, name),),
    )
    memory = options.ram()
    if gpa + len(source.data) == HIGH_MEMORY:
        memory = (*memory, MemoryRegion(gpa, image.size, "rom"))
    if outside := outside_memory(memory, image.gpa, image.end):
        raise source.fail(f"the image ({image.gpa:#x}..{image.end:#x}) {outside}")
    tables, vmsa = _start(source, image, memory, options)
    return build_plan(
        source,
        options,
        "flat",
        memory=memory,
        steps=(*tables, image),
        vcpus=(vmsa,) * options.vcpus,
        paging=bool(tables),
    )


def _start(
    source: ImageSource,
    image: PageRange,
    memory: tuple[MemoryRegion, ...],
    options: PlanOptions,
) -> tuple[tuple[PageRange, ...], Vmsa]:
    """The start state, and the page tables where it needs them."""
    entry = options.entry
    if entry is None and image.end == HIGH_MEMORY:
        return (), _reset(options)
    entry = image.gpa if entry is None else entry
    end = image.gpa + len(source.data)
    if not image.gpa <= entry < end:
        raise source.fail(
            f"the entry point {entry:#x} is outside the image, which is at {image.gpa:#x}..{end:#x}"
        )
    if entry < _REAL_MODE_END:
        return (), _real_mode(entry, options)
    tables, vmsa = boot64(entry, memory, [image], options)
    return (tables,), vmsa


def _reset(options: PlanOptions) -> Vmsa:
    return qemu_reset(BSP_EIP, signature=options.signature, sev_features=options.features)


def _real_mode(entry: int, options: PlanOptions) -> Vmsa:
    """The reset state, with CS:IP at ``entry``; CS is 0 where that reaches."""
    base = entry & 0xF_0000
    reset = _reset(options)
    return replace(
        reset,
        cs=replace(reset.cs, selector=base >> 4, base=base),
        rip=entry - base,
    )
