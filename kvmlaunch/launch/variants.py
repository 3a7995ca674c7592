"""Launch digests of a plan's variants, with all that variants share hashed once.

A variant is a mapping: key of a :class:`~.deviations.Dimension` -> value; what isn't in it is
as in the plan. Contents of pages are hashed once per range, a VMSA once per state. The chain
of PAGE_INFO is a tree: a variant goes on from the digest of the longest part that another one
had already, and numbers of vCPUs are points on one branch.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

from kvmlaunch import hashing
from kvmlaunch.abi.digest import page_contents, page_info
from kvmlaunch.abi.page import PageType
from kvmlaunch.abi.vmsa import VMSA_FIELDS, Vmsa
from kvmlaunch.errors import FormatError
from kvmlaunch.images import LaunchPlan, PageRange, Piece, VmsaChoice, VmsaMode, load_vmm, to_sync
from kvmlaunch.images.boot64 import identity_tables
from kvmlaunch.images.options import PlanOptions
from kvmlaunch.images.ovmf_pages import in_order
from kvmlaunch.images.ovmf_table import parse_table
from kvmlaunch.images.source import ImageSource, forget
from kvmlaunch.images.sync_vmsas import finish_vmsas
from kvmlaunch.images.vmm import VmmProfile
from kvmlaunch.images.vmsas import supply_vmsas

__all__ = ["FIRMWARE", "NOT_LAUNCHED", "Changes", "Variants", "asked_profile"]

Changes: TypeAlias = Mapping[str, Any]
"""What is changed -> to what."""

FIRMWARE = ("firmware", "svsm")
"""Labels of the steps that the order of pages calls firmware."""
NOT_LAUNCHED = 0
"""No page type: the pages are left out."""

_CHUNK_PAGES = 2048  # as in measure.py
_TAIL = slice(0x30, None)  # of PAGE_INFO: all but DIGEST_CUR
_NO_DIGEST = bytes(0x30)
_FIELDS = {field.name: field for field in VMSA_FIELDS}
_PLACES = 64  # VMSA pages of user space, at most
_STATE = ("vmm", "sev_features", "signature", "fpu", "cbit", "mode")
_NO_LAYOUT = {*_STATE, "vmsa_gpa"} - {"vmm", "cbit", "mode"}


@dataclass(frozen=True, eq=False)
class _Part:
    """Pages as they are measured; ``contents`` is None where none enter the digest."""

    type: PageType
    gpa: int
    npages: int
    contents: bytes | None


class _States(NamedTuple):
    """VMSA pages of the vCPUs; ``more``: the last one is also that of all others."""

    pages: tuple[bytes, ...]
    more: bool


class _Chain(NamedTuple):
    """PAGE_INFO behind DIGEST_CUR, of each VMSA; ``more`` as above.

    ``fixed``: all are measured, whatever the number of vCPUs.
    """

    infos: tuple[bytes, ...]
    more: bool = False
    fixed: bool = False


class _Layout(NamedTuple):
    """The digest before the VMSAs, the parts behind them, and those after each but the last."""

    digest: bytes
    behind: tuple[_Part, ...]
    between: tuple[tuple[_Part, ...], ...] = ()


class Variants:
    """Digests of the variants of one plan, and their VMSA pages.

    ``options`` are those that the plan was made with.
    """

    def __init__(
        self, plan: LaunchPlan, options: PlanOptions, hasher: hashing.Hasher | None = None
    ) -> None:
        self._plan, self._options = plan, options
        self._hasher = hasher or hashing.hasher()
        self._profile = asked_profile(plan, options)
        self._tables = None
        if self._profile is not None:
            self._tables = parse_table(ImageSource(plan.image, plan.data))
        self._vmsas = plan.vmsas
        self._parts: dict[tuple[Any, ...], _Part] = {}
        self._digests: dict[tuple[bytes, _Part], bytes] = {}
        self._layouts: dict[tuple[Any, ...], _Layout | None] = {}
        self._bases: dict[tuple[Any, ...], _States | None] = {}
        self._states: dict[tuple[Any, ...], _States | None] = {}
        self._chains: dict[tuple[Any, ...], _Chain | None] = {}
        self._contents: dict[bytes, bytes] = {}

    def digests(self, changes: Changes, counts: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """(number of vCPUs, launch digest) for each of ``counts``, which ascend.

        None for numbers that there is no such launch with; of a launch whose digest doesn't
        depend on the number, only that of the plan.
        """
        key = tuple(item for item in changes.items() if item[0] not in _NO_LAYOUT)
        if key not in self._layouts:
            self._layouts[key] = self._layout(changes)
        layout = self._layouts[key]
        chain = self._chain(changes) if layout else None
        if layout is None or chain is None:
            return
        if chain.fixed:
            asked = len(self._plan.vcpus)
            if asked in counts:
                digest = layout.digest
                for number, info in enumerate(chain.infos):
                    digest = _extended(digest, (info,))
                    if number < len(layout.between):
                        digest = self._extended(digest, layout.between[number])
                yield asked, self._extended(digest, layout.behind)
            return
        digest, done, last = layout.digest, 0, len(chain.infos)
        for count in counts:
            if count > last and not chain.more:
                return
            digest = _extended(digest, chain.infos[done:count])
            if count > last:
                # An inner loop of the search.
                for _ in range(count - max(done, last)):
                    digest = hashlib.sha384(digest + chain.infos[-1]).digest()
            done = count
            yield count, self._extended(digest, layout.behind) if layout.behind else digest

    def page(self, changes: Changes, vcpu: int) -> bytes | None:
        """The VMSA page that a vCPU starts from; None if there is no such launch."""
        states = self._states_of(changes)
        if self._mode(changes) == "given":
            bound = [self._plan.vcpu_at(step) for step in self._vmsas]
            return states.pages[bound.index(vcpu)] if states and vcpu in bound else None
        if states is None or (vcpu >= len(states.pages) and not states.more):
            return None
        return states.pages[min(vcpu, len(states.pages) - 1)]

    # Pages other than VMSAs

    def _layout(self, changes: Changes) -> _Layout | None:
        vmm = _vmm(changes)
        if self._mode(changes) == "given" and not changes.keys() & {"vmm", "order", "place"}:
            return self._interleaved(changes)
        steps = self._ordered(changes, vmm)
        place = changes.get("place")
        at = len(steps)
        if place == "first":
            at = 0
        elif place == "before-metadata":
            at = next((n for n, step in enumerate(steps) if step.label not in FIRMWARE), 0)
            if not at and not any(self._plan.start_digest):
                return None  # that is first
        before = [part for step in steps[:at] if (part := self._part(step, changes, vmm))]
        behind = [part for step in steps[at:] if (part := self._part(step, changes, vmm))]
        return _Layout(self._extended(self._plan.start_digest, before), tuple(behind))

    def _interleaved(self, changes: Changes) -> _Layout:
        """With VMSAs where the plan has them."""
        runs: list[list[_Part]] = [[]]
        for step in self._steps_of(changes, vmsas=True):
            if step.type is PageType.VMSA:
                runs.append([])
            elif part := self._part(step, changes, None):
                runs[-1].append(part)
        before, *between = runs
        behind = between.pop() if between else []
        digest = self._extended(self._plan.start_digest, before)
        return _Layout(digest, tuple(behind), tuple(map(tuple, between)))

    def _steps_of(self, changes: Changes, *, vmsas: bool = False) -> list[PageRange]:
        steps = self._other_zeros if "native_zero" in changes else self._plan.steps
        return [step for step in steps if vmsas or step.type is not PageType.VMSA]

    @functools.cached_property
    def _other_zeros(self) -> tuple[PageRange, ...]:
        """The steps of an IGVM file whose pages without data have the other type."""
        from kvmlaunch.images.igvm.plan import load

        source = ImageSource(self._plan.image, self._plan.data)
        other = replace(self._options, native_zero=not self._options.native_zero)
        return load(source, other).steps

    def _ordered(self, changes: Changes, vmm: VmmProfile | None) -> list[PageRange]:
        order = changes.get("order") or (vmm.pages if vmm else None)
        steps = self._steps_of(changes)
        if order is None:
            return steps
        if order == "ascending":
            return sorted(steps, key=lambda step: step.gpa)
        if order == "image-first":
            return [*steps[1:], steps[0]]
        firmware = [step for step in steps if step.label in FIRMWARE]
        sections = [step for step in steps if step.label not in FIRMWARE]
        if self._tables is not None:  # the plan's order may be another than the table's
            gpas = [section.gpa for section in self._tables.sections]
            sections.sort(key=lambda step: gpas.index(step.gpa))
        return in_order(order, firmware, sections)

    def _part(self, step: PageRange, changes: Changes, vmm: VmmProfile | None) -> _Part | None:
        hashes = step.label == "kernel-hashes" and bool(step.pieces)
        kernel, page = changes.get("kernel") if hashes else None, None
        if step.label == "page-tables" and "cbit" in changes:
            page = identity_tables(step.gpa, self._plan.memory, 1 << changes["cbit"])
        elif kernel is not None:
            page = kernel.page
        left_out = hashes and (
            (kernel is not None and kernel.page is None) or (vmm and not vmm.kernel_hashes)
        )
        kind = self._kind(step, changes, vmm) if left_out or not step.pieces else step.type
        if kind == NOT_LAUNCHED:
            return None
        key = (step.gpa, step.npages, kind, left_out, page)
        if key not in self._parts:
            if left_out or page is not None:
                pieces = () if page is None else (Piece(0, memoryview(page), step.origin),)
                step = replace(step, pieces=pieces)
            kind = PageType(kind)
            contents = self._hashed(step) if kind.measures_contents else None
            self._parts[key] = _Part(kind, step.gpa, step.npages, contents)
        return self._parts[key]

    def _kind(self, step: PageRange, changes: Changes, vmm: VmmProfile | None) -> int:
        """The page type of a step without contents, or what had contents and has none now."""
        kind = step.type
        if step.label not in FIRMWARE and self._profile and (vmm or step.pieces):
            kind = (vmm or self._profile).page_type(step.label)
        if kind is PageType.ZERO:
            kind = changes.get("zero", kind)
        return int(changes.get(f"type of {step.label}", kind))

    def _hashed(self, step: PageRange) -> bytes:
        found = []
        for at in range(0, step.npages, _CHUNK_PAGES):
            for data in step.runs(at, min(_CHUNK_PAGES, step.npages - at)):
                found.append(self._hasher.contents(data))
                forget(data)
        return b"".join(found)

    def _extended(self, digest: bytes, parts: Sequence[_Part]) -> bytes:
        for part in parts:
            found = self._digests.get((digest, part))
            if found is None:
                found = self._digests[digest, part] = self._after(digest, part)
            digest = found
        return digest

    def _after(self, digest: bytes, part: _Part) -> bytes:
        if part.contents is None:
            return self._hasher.extend(digest, part.type, part.gpa, None, part.npages)
        return self._hasher.extend_contents(digest, part.type, part.gpa, part.contents)

    # VMSAs

    def _chain(self, changes: Changes) -> _Chain | None:
        key = tuple(item for item in changes.items() if item[0] in _STATE or item[0] == "vmsa_gpa")
        if key not in self._chains:
            self._chains[key] = self._new_chain(changes)
        return self._chains[key]

    def _new_chain(self, changes: Changes) -> _Chain | None:
        mode = self._mode(changes)
        if mode != "sync" and "vmsa_gpa" in changes:
            return None
        if mode == "none":
            rest = {"sev_features", "signature", "fpu", "place"}
            return None if rest & changes.keys() else _Chain((), fixed=True)
        states = self._states_of(changes)
        if states is None:
            return None
        if mode == "sync":
            vmm = _vmm(changes)
            gpa = changes.get("vmsa_gpa") or (vmm.vmsa_gpa if vmm else self._plan.vmsa_gpa)
            return _Chain(tuple(self._info(page, gpa) for page in states.pages), states.more)
        if mode == "given":
            gpas = [step.gpa for step in self._vmsas]
            return _Chain(tuple(map(self._info, states.pages, gpas)), fixed=True)
        gpas = self._places
        if not gpas:
            return None
        if mode == "first":
            return _Chain((self._info(states.pages[0], gpas[0]),), fixed=True)
        last = len(states.pages) - 1
        pages = [states.pages[min(n, last)] for n in range(len(gpas) if states.more else last + 1)]
        return _Chain(tuple(map(self._info, pages, gpas)))

    def _mode(self, changes: Changes) -> str:
        """``sync``, ``given`` (the plan's VMSAs), ``first``, ``each`` or ``none``."""
        given = "sync" if self._plan.vmsa_mode is VmsaMode.SYNC else "given"
        return str(changes.get("mode", given))

    @functools.cached_property
    def _places(self) -> list[int]:
        """Where a launcher puts VMSA pages of its own, for as many vCPUs as have room."""
        most = replace(self._plan, vcpus=(self._plan.vcpus[0],) * _PLACES)
        choices = [VmsaChoice(vcpu=vcpu) for vcpu in range(_PLACES)]
        while choices:
            try:
                made = supply_vmsas(most, VmsaMode.DIRECT, choices, forced=True)
            except FormatError:
                choices.pop()
            else:
                return [made.bindings[choice.vcpu] for choice in choices if choice.vcpu is not None]
        return []

    def _states_of(self, changes: Changes) -> _States | None:
        key = tuple(item for item in changes.items() if item[0] in _STATE)
        if key not in self._states:
            self._states[key] = self._new_states(changes)
        return self._states[key]

    def _new_states(self, changes: Changes) -> _States | None:
        vmm = _vmm(changes)
        given = self._mode(changes) == "given"
        key = (vmm.name if vmm else None, given)
        if key not in self._bases:
            self._bases[key] = self._given(vmm) if given else self._made(vmm)
        base = self._bases[key]
        fields: dict[str, int] = {}
        if "sev_features" in changes:
            fields["sev_features"] = changes["sev_features"]
        if "signature" in changes:
            profile = vmm or self._profile
            if profile is not None and not profile.bsp.signature:
                return None  # this VMM doesn't measure it
            fields["rdx"] = changes["signature"]
        if "fpu" in changes:
            fields["mxcsr"], fields["x87_fcw"] = changes["fpu"]
        if "cbit" in changes:
            tables = next(step for step in self._plan.steps if step.label == "page-tables")
            fields["cr3"] = tables.gpa | 1 << changes["cbit"]
        if base is None or not fields:
            return base
        return _States(tuple(_patched(page, fields) for page in base.pages), base.more)

    def _made(self, vmm: VmmProfile | None) -> _States | None:
        """VMSAs that KVM makes, or a launcher as KVM would."""
        plan = self._plan
        try:
            if plan.vmsa_mode is not VmsaMode.SYNC:
                plan = to_sync(plan).plan
            profile, states, more = vmm or self._profile, plan.vcpus, True
            if profile is not None and (vmm or len(states) == 1):
                both = self._both(profile)
                states, more = (both if vmm else (*states, *both[1:])), len(both) > 1
            as_given = vmm.as_given if vmm else plan.as_given
            made = [
                vmsa
                for _, vmsa in finish_vmsas(
                    replace(plan, vcpus=states, as_given=as_given, steps=(), bindings={})
                )
            ]
        except FormatError:
            return None
        while len(made) > 1 and made[-1] is made[-2]:
            made.pop()
        return _States(tuple(vmsa.encode() for vmsa in made), more)

    def _given(self, vmm: VmmProfile | None) -> _States | None:
        """The plan's own VMSAs, or what ``vmm`` starts their vCPUs with."""
        if vmm is None:
            return _States(tuple(bytes(step.page(0)) for step in self._vmsas), False)
        made, pages = self._made(vmm), []
        for step in self._vmsas:
            vcpu = self._plan.vcpu_at(step)
            if vcpu is None:
                pages.append(bytes(step.page(0)))
            elif made is None or (vcpu >= len(made.pages) and not made.more):
                return None
            else:
                pages.append(made.pages[min(vcpu, len(made.pages) - 1)])
        return _States(tuple(pages), False)

    def _both(self, profile: VmmProfile) -> tuple[Vmsa, ...]:
        """The first vCPU's state, and that of the others where it is known."""
        asked = self._options
        assert self._tables is not None
        for count in (2, 1):
            try:
                return profile.states(
                    count,
                    signature=asked.signature,
                    sev_features=self._plan.sev_features,
                    reset_eip=self._tables.reset_eip,
                )
            except FormatError:
                continue
        raise FormatError(f"{profile.name}: no state of a first vCPU")

    def _info(self, page: bytes, gpa: int) -> bytes:
        contents = self._contents.get(page)
        if contents is None:
            contents = self._contents[page] = page_contents(PageType.VMSA, page)
        return page_info(_NO_DIGEST, contents, PageType.VMSA, gpa)[_TAIL]


def asked_profile(plan: LaunchPlan, options: PlanOptions) -> VmmProfile | None:
    """The VMM profile whose states are in the plan: none without firmware, or with an SVSM."""
    if plan.image_type != "ovmf" or options.svsm is not None:
        return None
    return options.vmm or load_vmm("QEMU")


def _vmm(changes: Changes) -> VmmProfile | None:
    return load_vmm(changes["vmm"]) if "vmm" in changes else None


def _patched(page: bytes, fields: Mapping[str, int]) -> bytes:
    """A VMSA page with other values; much faster than a `Vmsa` with them."""
    made = bytearray(page)
    for name, value in fields.items():
        field = _FIELDS[name]
        made[field.offset : field.offset + field.size] = value.to_bytes(field.size, "little")
    return bytes(made)


def _extended(digest: bytes, infos: Sequence[bytes]) -> bytes:
    for info in infos:
        digest = hashlib.sha384(digest + info).digest()
    return digest
