"""Failures on order: which call fails, how, and the how-manieth time.

One fault is one text::

    NAME:errno=ERRNO[@N]        the N-th call of NAME fails before anything else happens
    NAME:fw=STATUS[@N]          the N-th firmware command NAME gives STATUS and does nothing
    SNP_LAUNCH_UPDATE:partial=PAGES[@N]  the N-th UPDATE stops after so many pages (1...)
    SNP_LAUNCH_UPDATE:signal=PAGE[@N]    a signal is pending when the N-th UPDATE comes to
                                that page (0...)
    SNP_PAGE_RECLAIM:fail[@N]   the N-th reclaim fails, which kills the VM
    CPUID:correct=LEAF[/SUBLEAF].REG[=VALUE][@N]  firmware refuses the N-th CPUID page with
                                0x16 and corrects that register (to VALUE, else bit 0 flips)

``NAME`` of ``errno`` is an ioctl (``KVM_CREATE_VCPU``), a command of KVM_MEMORY_ENCRYPT_OP with or
without KVM_SEV_ (``SNP_LAUNCH_START``, ``INIT2``; of a vCPU: ``SNP_SET_VCPU_STATE``), or a command
of /dev/sev (``SNP_PLATFORM_STATUS``). ``NAME`` of ``fw`` is a firmware command: SNP_GCTX_CREATE,
SNP_LAUNCH_START, SNP_ACTIVATE, SNP_LAUNCH_UPDATE, SNP_LAUNCH_FINISH, SNP_GUEST_REQUEST,
SNP_DECOMMISSION, SNP_PAGE_RECLAIM, SNP_PLATFORM_STATUS, SNP_COMMIT, SNP_CONFIG, SNP_VLEK_LOAD.

``ERRNO`` is a name (EIO) or a number; numbers are decimal or 0x hex; ``@N`` counts from 1, is 1
when left out, and ``@N+`` means from then on.
"""

from __future__ import annotations

import errno
import re
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvmlaunch.errors import FormatError
from kvmlaunch.uapi import ARGUMENT, lib

__all__ = ["FIRMWARE_COMMANDS", "CpuidCorrection", "Fault", "Faults"]

FIRMWARE_COMMANDS = (
    "SNP_ACTIVATE",
    "SNP_COMMIT",
    "SNP_CONFIG",
    "SNP_DECOMMISSION",
    "SNP_GCTX_CREATE",
    "SNP_GUEST_REQUEST",
    "SNP_LAUNCH_FINISH",
    "SNP_LAUNCH_START",
    "SNP_LAUNCH_UPDATE",
    "SNP_PAGE_RECLAIM",
    "SNP_PLATFORM_STATUS",
    "SNP_VLEK_LOAD",
)
"""Names that ``fw=`` knows."""

_GRAMMAR = "NAME:errno=|fw=|partial=|signal=|fail|correct=VALUE, then @N or @N+"
_SHAPE = re.compile(r"(?P<name>[A-Z0-9_]+):(?P<verb>[a-z]+)(=(?P<value>[^@]+))?(@(?P<at>\d+\+?))?")
_CORRECTION = re.compile(
    r"(?P<leaf>0x[0-9a-f]+|\d+)(/(?P<index>0x[0-9a-f]+|\d+))?"
    r"\.(?P<reg>e[abcd]x)(=(?P<value>0x[0-9a-f]+|\d+))?"
)
_UPDATE = "SNP_LAUNCH_UPDATE"
_DEV_PREFIXES = ("SEV_", "SNP_")


@dataclass(frozen=True)
class CpuidCorrection:
    """A register of the CPUID page that firmware insists on changing."""

    leaf: int
    index: int
    register: str
    value: int | None = None


@dataclass(frozen=True)
class Fault:
    """One ordered failure; ``first`` counts calls from 1, ``forever`` means from then on."""

    name: str
    verb: str
    value: int = 0
    first: int = 1
    forever: bool = False
    correction: CpuidCorrection | None = None

    def hits(self, call: int) -> bool:
        """Whether the ``call``-th call is meant."""
        return call == self.first or (self.forever and call > self.first)


@dataclass
class Faults:
    """Ordered faults and how often each name has been called."""

    faults: tuple[Fault, ...] = ()
    _calls: Counter[tuple[str, str]] = field(default_factory=Counter, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Faults:
        """Read fault texts. Raises FormatError naming the text and the grammar."""
        return cls(tuple(_parse(text) for text in texts))

    def errno_of(self, name: str) -> int:
        """Count a call of the ioctl or command ``name``; the errno ordered for it, or 0."""
        found = self._next(name, "errno")
        return found.value if found else 0

    def status_of(self, name: str) -> int | None:
        """Count a firmware command; the status ordered for it, or None."""
        found = self._next(name, "fw")
        return found.value if found else None

    def update_stop(self) -> int | None:
        """Count an UPDATE that got as far as its pages; the page it must stop before, or None."""
        stops = [self._next(_UPDATE, "partial"), self._next(_UPDATE, "signal")]
        return min((fault.value for fault in stops if fault), default=None)

    def reclaim_fails(self) -> bool:
        """Count a page reclaim; whether it must fail."""
        return self._next("SNP_PAGE_RECLAIM", "fail") is not None

    def cpuid_correction(self) -> CpuidCorrection | None:
        """Count a CPUID page that reached firmware; the correction ordered for it, or None."""
        found = self._next("CPUID", "correct")
        return found.correction if found else None

    def _next(self, name: str, verb: str) -> Fault | None:
        with self._lock:
            self._calls[name, verb] += 1
            call = self._calls[name, verb]
        matching = (f for f in self.faults if f.name == name and f.verb == verb)
        return next((fault for fault in matching if fault.hits(call)), None)


def _parse(text: str) -> Fault:
    shape = _SHAPE.fullmatch(text.strip())
    if not shape:
        raise _bad(text, "it doesn't have the form")
    name = shape["name"].removeprefix("KVM_SEV_")
    verb, value = shape["verb"], shape["value"]
    first = int((shape["at"] or "1").rstrip("+"))
    if not first:
        raise _bad(text, "calls are counted from 1")
    forever = bool(shape["at"]) and shape["at"].endswith("+")
    if verb == "correct":
        correction = _parse_correction(text, name, value)
        return Fault(name, verb, 0, first, forever, correction)
    return Fault(name, verb, _parse_value(text, name, verb, value), first, forever)


def _parse_value(text: str, name: str, verb: str, value: str | None) -> int:
    if verb == "fail" and value is None and name == "SNP_PAGE_RECLAIM":
        return 0
    if value is None:
        raise _bad(text, f"{verb!r} needs a value or doesn't exist for {name}")
    if verb == "errno" and name in _callable_names():
        return _errno(text, value)
    if verb == "fw" and name in FIRMWARE_COMMANDS:
        return _number(text, value)
    if verb in ("partial", "signal") and name == _UPDATE:
        pages = _number(text, value)
        if verb == "partial" and not pages:
            raise _bad(text, "partial progress is at least one page")
        return pages
    raise _bad(text, f"{verb!r} doesn't exist for {name}")


def _parse_correction(text: str, name: str, value: str | None) -> CpuidCorrection:
    shape = _CORRECTION.fullmatch(value or "")
    if name != "CPUID" or not shape:
        raise _bad(text, "a correction is CPUID:correct=LEAF[/SUBLEAF].REG[=VALUE]")
    index = int(shape["index"] or "0", 0)
    to = int(shape["value"], 0) if shape["value"] else None
    return CpuidCorrection(int(shape["leaf"], 0), index, shape["reg"], to)


def _callable_names() -> frozenset[str]:
    commands = {n.removeprefix("KVM_SEV_") for n in dir(lib) if n.startswith("KVM_SEV_")}
    devices = {n for n in dir(lib) if n.startswith(_DEV_PREFIXES) and "_RET_" not in n}
    return frozenset(commands | devices | set(ARGUMENT))


def _errno(text: str, value: str) -> int:
    code = getattr(errno, value, None)
    if not isinstance(code, int):
        code = _number(text, value)
    if not 0 < code < 4096:
        raise _bad(text, f"{value} is no errno")
    return code


def _number(text: str, value: str) -> int:
    if not re.fullmatch(r"0x[0-9a-fA-F]{1,16}|\d{1,19}", value):
        raise _bad(text, f"{value!r} is no number")
    return int(value, 16 if value.startswith("0x") else 10)


def _bad(text: str, why: str) -> FormatError:
    return FormatError(f"fault {text!r}: {why}; the grammar is {_GRAMMAR}")
