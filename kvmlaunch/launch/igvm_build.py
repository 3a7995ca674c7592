"""IGVM files written whole."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from kvmlaunch.abi.page import PageType
from kvmlaunch.images import LaunchPlan
from kvmlaunch.images.igvm.build import ParameterChoice, build
from kvmlaunch.launch.files import write_files
from kvmlaunch.launch.measure import measure

__all__ = ["describe_change", "write_igvm"]

_MODE = 0o666


def describe_change(plan: LaunchPlan, made: LaunchPlan, after: bytes) -> Iterator[str]:
    """What the file's launch, with its digest, has otherwise than the image's; a sentence each."""
    if made.steps == plan.steps:
        return
    before = measure(plan).digest
    yield f"the image's launch digest is {before.hex()}, the file's {after.hex()}:"
    pages = {
        name: sum(step.npages for step in steps if step.type is PageType.ZERO)
        for name, steps in (("image", plan.steps), ("file", made.steps))
    }
    if pages["image"] != pages["file"]:
        yield f"  IGVM has no pages of type ZERO: {pages['image']} become NORMAL (--native-zero)"
    if areas := len(made.steps) - len(plan.steps):
        yield f"  parameter areas: {areas}"


def write_igvm(
    path: str,
    plan: LaunchPlan,
    areas: Sequence[ParameterChoice] = (),
    *,
    version: int = 1,
    native_zero: bool = False,
) -> int:
    """Write the file of a plan from `for_igvm`, completely or not at all; returns its bytes.

    Raises FormatError for what no file can hold, and KvmLaunchError where it can't be written.
    """
    parts = build(plan, areas, version=version, native_zero=native_zero)
    write_files({path: parts}, mode=_MODE)
    return os.path.getsize(path)
