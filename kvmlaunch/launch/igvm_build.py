"""IGVM files written whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from kvmlaunch.abi.page import PageType
from kvmlaunch.errors import KvmLaunchError
from kvmlaunch.images import LaunchPlan
from kvmlaunch.images.igvm.build import ParameterChoice, build
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
    return _write_whole(path, build(plan, areas, version=version, native_zero=native_zero))


def _write_whole(path: str, parts: Iterable[bytes | memoryview]) -> int:
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        raise KvmLaunchError(f"{path}: is not a file")
    size, written = 0, ""
    try:
        descriptor, written = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with open(descriptor, "wb") as file:
            for part in parts:
                size += file.write(part)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(written, _MODE & ~mask)
        os.replace(written, target)
    except OSError as error:
        raise KvmLaunchError(f"{path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(written)  # there only if something went wrong
    return size
