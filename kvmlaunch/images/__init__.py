"""Loaders: an image file becomes a :class:`LaunchPlan`, and nothing else reads images."""

from __future__ import annotations

import os

from kvmlaunch.errors import FormatError, ImageError
from kvmlaunch.images.options import PlanOptions
from kvmlaunch.images.ovmf_table import has_table
from kvmlaunch.images.plan import LaunchPlan, MemoryRegion, PageRange, Piece, VmsaMode
from kvmlaunch.images.source import ImageSource, open_image
from kvmlaunch.images.vmm import VmmProfile, load_vmm

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from kvmlaunch.images.vmsas import SyncFallback, VmsaChoice, to_sync

__all__ = [
    "ImageSource",
    "LaunchPlan",
    "MemoryRegion",
    "PageRange",
    "Piece",
    "PlanOptions",
    "SyncFallback",
    "VmmProfile",
    "VmsaChoice",
    "VmsaMode",
    "load_image",
    "load_vmm",
    "open_image",
    "sniff",
    "to_sync",
]

_NOT_YET = {"linux": "Linux kernels (bzImage)"}

_DEFAULTS = PlanOptions()


def __getattr__(name: str) -> object:
    if name not in ("SyncFallback", "VmsaChoice", "to_sync"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvmlaunch.images import vmsas

    return getattr(vmsas, name)


def load_image(
    image: str | os.PathLike[str] | bytes, options: PlanOptions = _DEFAULTS
) -> LaunchPlan:
    """Plan the launch of an image file, or of an image's bytes.

    Raises ImageError, which names the file, where the image can't be launched as
    ``options`` ask for.
    """
    source = ImageSource.of(image) if isinstance(image, bytes) else open_image(image)
    if not source.data:
        raise source.fail("the image is empty")
    kind = sniff(source) if options.image_type == "auto" else options.image_type
    if kind in _NOT_YET:
        raise source.fail(f"{_NOT_YET[kind]} can't be launched yet")
    if kind != "ovmf" and options.firmware_only:
        raise source.fail(f"{options.firmware_only} for OVMF firmware, this image is {kind}")
    if kind != "igvm" and options.igvm_only:
        raise source.fail(f"{options.igvm_only} for IGVM files, this image is {kind}")
    try:
        return _with_vmsas(_load(kind, source, options), options)
    except ImageError:
        raise
    except FormatError as error:
        raise source.fail(error.rule, offset=error.offset) from error


def _load(kind: str, source: ImageSource, options: PlanOptions) -> LaunchPlan:
    # An image needs one of them.
    if kind == "ovmf":
        from kvmlaunch.images.ovmf import load
    elif kind == "elf":
        from kvmlaunch.images.elf import load
    elif kind == "igvm":
        from kvmlaunch.images.igvm import load
    else:
        assert kind == "flat"
        from kvmlaunch.images.flat import load
    return load(source, options)


def _with_vmsas(plan: LaunchPlan, options: PlanOptions) -> LaunchPlan:
    if options.vmsa_mode is None and not options.vmsas:
        return plan
    mode = VmsaMode(options.vmsa_mode or VmsaMode.DIRECT)
    if mode is VmsaMode.SYNC:
        return plan
    if plan.vmsa_mode is not VmsaMode.SYNC and not options.vmsas:
        return plan.replace(vmsa_mode=mode)
    from kvmlaunch.images.vmsas import VmsaChoice, supply_vmsas

    return supply_vmsas(plan, mode, options.vmsas or (VmsaChoice(),), forced=options.forced)


def sniff(source: ImageSource) -> str:
    """The image's type: ``igvm``, ``linux``, ``elf``, ``ovmf`` or else ``flat``."""
    head = bytes(source.data[:0x206])
    if head[:4] == b"IGVM":
        return "igvm"
    if head[0x1FE:0x200] == b"\x55\xaa" and head[0x202:] == b"HdrS":
        return "linux"
    if head[:4] == b"\x7fELF":
        return "elf"
    # A firmware volume without OVMF's table is never meant flat: the loader says what it lacks.
    if has_table(source) or head[0x28:0x2C] == b"_FVH":
        return "ovmf"
    return "flat"
