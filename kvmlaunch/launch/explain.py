"""Why a launch digest, or a VMSA, is another than was predicted: a search over its inputs.

One change is tried first, then two at once, then more, as far as a limit. :mod:`~.deviations`
is the table of what is changed, :mod:`~.variants` says what that gives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import prod
from typing import Any, TypeAlias

from kvmlaunch import hashing
from kvmlaunch.abi.digest import DIGEST_SIZE
from kvmlaunch.errors import FormatError
from kvmlaunch.images import LaunchPlan
from kvmlaunch.images.options import PlanOptions
from kvmlaunch.images.sync_vmsas import finish_vmsas
from kvmlaunch.images.vmm_file import FORMAT
from kvmlaunch.launch.deviations import (
    VMM,
    Asked,
    Cause,
    Dimension,
    dimensions,
    vcpu_counts,
    vcpus_cause,
)
from kvmlaunch.launch.variants import Variants

__all__ = ["MOST", "Cause", "Explanation", "explain_digest", "explain_vmsa"]

MOST = 1_000_000
"""How many variants of a launch are tried."""

_Progress: TypeAlias = Callable[[int, int], object]
_Row: TypeAlias = tuple[Dimension, list[Any]]

_DEFAULTS = PlanOptions()
_FEW = 2  # other changes, with which only usual numbers of vCPUs are tried
_USUAL_VCPUS = 64
_VMSA_CHANGES = 3


@dataclass(frozen=True)
class Explanation:
    """What a search found.

    Attributes: ``causes``, the inputs that differ (none: it is as predicted), or None if
    nothing explains it; ``tried``, how many variants; ``complete``: not stopped by the limit;
    ``suspects``, inputs that were not searched.
    """

    causes: tuple[Cause, ...] | None
    tried: int
    complete: bool = True
    suspects: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether it is explained."""
        return self.causes is not None

    def __str__(self) -> str:
        """Lines for people."""
        if self.causes is None:
            return "\n".join(self._unexplained())
        if not self.causes:
            return "that is the predicted digest"
        lines = [f"  {cause}" for cause in self.causes]
        options = [cause.option for cause in self.causes]
        if all(options) and sum("--vmm-type" in option for option in options) <= 1:
            return "\n".join((f"{' '.join(options)} gives this digest:", *lines))
        typed = [cause.option for cause in self.causes if cause.option and not cause.profile]
        profile = self._profile()
        file = "base" in profile
        if file:
            typed.append("--vmm-type FILE.json")
        if typed:
            lines.append(f"as far as it can be typed: {' '.join(typed)}")
        if profile:
            where = "FILE.json" if file else "to change in the VMM profile"
            lines.append(f"{where}: {json.dumps(profile)}")
        return "\n".join(("this launch gives the digest:", *lines))

    def _profile(self) -> dict[str, Any]:
        """What a VMM profile's file says to launch so."""
        merged: dict[str, Any] = {}
        # The base of another VMM counts, not that of the one asked for.
        for cause in sorted(self.causes or (), key=lambda cause: cause.name == VMM):
            for key, value in cause.profile.items():
                both = isinstance(value, dict) and key in merged
                merged[key] = {**merged[key], **value} if both else value
        return {"format": FORMAT, "name": "mine", **merged} if "base" in merged else merged

    def _unexplained(self) -> Iterator[str]:
        limit = "" if self.complete else " (the limit, so not every combination)"
        yield f"nothing explains this digest: {self.tried} launches tried{limit}; left to suspect:"
        yield from (f"  {suspect}" for suspect in self.suspects)


def explain_digest(
    plan: LaunchPlan,
    digest: bytes,
    options: PlanOptions = _DEFAULTS,
    *,
    most: int = MOST,
    hasher: hashing.Hasher | None = None,
    progress: _Progress | None = None,
) -> Explanation:
    """Search for a launch that gives ``digest`` (48 bytes), beginning with the plan's.

    ``options`` are those that the plan was made with, ``most`` how many launches are tried.
    ``progress`` is called often, with how many were and how many there are to try. Raises
    FormatError for what is no digest, or a plan that can't be measured.
    """
    if len(digest) != DIGEST_SIZE:
        raise FormatError(f"a launch digest is {DIGEST_SIZE} bytes, not {len(digest)}")
    for _ in finish_vmsas(plan):
        pass  # it raises for what can't be launched as asked
    asked, variants = Asked(plan, options), Variants(plan, options, hasher)
    rows = dimensions(asked)
    total = _number(asked, rows, most) if progress else most
    tried = 0
    for changes, counts in _launches(asked, rows):
        for count, found in variants.digests(changes, counts):
            tried += 1
            if found == digest:
                return Explanation(_causes(asked, rows, changes, count), tried)
        if progress:
            progress(tried, total)
        if tried >= most:
            return Explanation(None, tried, False, _suspects(asked))
    return Explanation(None, tried, True, _suspects(asked))


def explain_vmsa(
    plan: LaunchPlan,
    vcpu: int,
    fits: Callable[[bytes], bool],
    options: PlanOptions = _DEFAULTS,
) -> Explanation:
    """Search for a VMSA page (4096 bytes) of one vCPU that ``fits``, see `explain_digest`.

    For whoever knows the digest before that page and the one after it.
    """
    asked, variants = Asked(plan, options), Variants(plan, options)
    rows = [(row, values) for row, values in dimensions(asked) if row.vmsa]
    tried = 0
    for count in range(min(len(rows), _VMSA_CHANGES) + 1):
        for changes in _combinations(rows, count):
            page = variants.page(changes, vcpu)
            if page is None:
                continue
            tried += 1
            if fits(page):
                return Explanation(_causes(asked, rows, changes, len(plan.vcpus)), tried)
    return Explanation(None, tried, True, ("the registers that the VMM sets",))


def _launches(asked: Asked, rows: Sequence[_Row]) -> Iterator[tuple[dict[str, Any], Sequence[int]]]:
    """Changes, and the numbers of vCPUs to try with them; the fewest changes first."""
    # Another number of vCPUs is one more change, but costs next to nothing.
    for number in range(len(rows) + 1):
        counts = _counts(asked, number)
        for chosen in _chosen(asked, rows, number):
            costly = any(row.costly for row, _ in chosen)
            few = (len(asked.plan.vcpus),) if costly and number > 1 else counts
            for changes in _products(chosen):
                yield changes, few


def _counts(asked: Asked, changes: int) -> Sequence[int]:
    return vcpu_counts(asked, None if changes < _FEW else _USUAL_VCPUS)


def _chosen(asked: Asked, rows: Sequence[_Row], number: int) -> Iterator[tuple[_Row, ...]]:
    for chosen in combinations(rows, number):
        if number <= 2 or not (asked.behind or any(row.costly for row, _ in chosen)):
            yield chosen


def _combinations(rows: Sequence[_Row], number: int) -> Iterator[dict[str, Any]]:
    for chosen in combinations(rows, number):
        yield from _products(chosen)


def _products(chosen: Sequence[_Row]) -> Iterator[dict[str, Any]]:
    keys = [row.key for row, _ in chosen]
    for values in product(*(values for _, values in chosen)):
        yield dict(zip(keys, values, strict=True))


def _number(asked: Asked, rows: Sequence[_Row], most: int) -> int:
    """How many launches there are to try, up to ``most``."""
    total = 0
    for number in range(len(rows) + 1):
        counts = len(_counts(asked, number))
        for chosen in _chosen(asked, rows, number):
            total += prod(len(values) for _, values in chosen) * counts
            if total >= most:
                return most
    return total


def _causes(
    asked: Asked, rows: Sequence[_Row], changes: dict[str, Any], count: int
) -> tuple[Cause, ...]:
    causes = [row.cause(asked, changes[row.key]) for row, _ in rows if row.key in changes]
    if count != len(asked.plan.vcpus):
        causes.insert(0, vcpus_cause(asked, count))
    return tuple(causes)


def _suspects(asked: Asked) -> tuple[str, ...]:
    """Inputs that no search can guess."""
    plan = asked.plan
    if any(plan.start_digest):
        found = ["the firmware's digest"]
    else:
        what = "firmware" if plan.image_type == "ovmf" else "image"
        found = [f"the {what}'s bytes (another build of {plan.image}?)"]
    if asked.options.svsm is not None:
        found.append("the SVSM's bytes, and --vars-size")
    elif asked.hashes:
        found.append("the bytes of --kernel and --initrd, and --append")
    elif any(step.label == "kernel-hashes" for step in asked.steps):
        found.append("a kernel, initrd and command line whose hashes were launched (--kernel)")
    if plan.image_type in ("flat", "elf"):
        found.append("--load-addr, --entry and --memory, which say what goes where")
    elif plan.image_type == "igvm":
        found.append("--order, in which a loader takes the file's directives")
    option = " (--vmm-type FILE)" if asked.profile else ""
    found.append(f"a VMM that sets registers or orders pages in a way of its own{option}")
    found.append("other numbers of vCPUs, CPU signatures or SEV_FEATURES than those tried")
    return tuple(found)
