"""What a conformance case is made of: its entry in the registry, and the checks it makes."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from kvmlaunch.errors import KvmLaunchError
from kvmlaunch.selftest.differences import DIFFERENCES

if TYPE_CHECKING:
    from kvmlaunch.selftest.answer import Answer
    from kvmlaunch.selftest.host import Host

__all__ = ["REGISTRY", "Case", "Failure", "Skip", "Spec", "Unprepared", "case"]


class Failure(KvmLaunchError):
    """The kernel did something else than its ABI says; one sentence."""


class Skip(KvmLaunchError):
    """This host can't run the case; the reason."""


class Unprepared(KvmLaunchError):
    """A case didn't get as far as what it checks."""


@dataclass(frozen=True)
class Spec:
    """A case as it is listed.

    Attributes: ``name`` (dotted, for ``--filter``), ``about`` (what is checked, one line) and
    ``may_crash`` (a kernel with a known bug may crash: not run on a real host unless asked for).
    """

    name: str
    about: str
    function: Callable[[Case], None]
    may_crash: bool = False


REGISTRY: list[Spec] = []
"""Every case, in the order in which they run."""

_Function = Callable[..., None]


def case(
    name: str, *, each: Sequence[object] = (), may_crash: bool = False
) -> Callable[[_Function], _Function]:
    """Register a case; its docstring tells what it checks.

    ``each``: one case per item, which is passed as second argument; ``{}`` in ``name`` and
    docstring stands for the item's ``name`` in lower case, or the item itself.
    """

    def register(function: _Function) -> _Function:
        about = " ".join((function.__doc__ or "").split())
        if not each:
            REGISTRY.append(Spec(name, about, function, may_crash))
        for item in each:
            label = str(getattr(item, "name", item)).lower()
            REGISTRY.append(
                Spec(name.format(label), about.format(label), _bound(function, item), may_crash)
            )
        return function

    return register


def _bound(function: _Function, item: object) -> Callable[[Case], None]:
    return lambda running: function(running, item)


class Case:
    """One running case: its host, its checks, and what it opened.

    Attributes: ``host``, ``checks`` (how many were made), ``notes`` (lines for people) and
    ``stack`` (closed when the case is over).
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.checks = 0
        self.notes: list[str] = []
        self.stack = ExitStack()

    def expect(self, true: object, sentence: str) -> None:
        """One check. Raises Failure with the sentence."""
        self.checks += 1
        if not true:
            raise Failure(sentence)

    def equal(self, what: str, got: object, expected: object) -> None:
        """One check of a value, numbers in hex."""
        self.expect(got == expected, f"{what}: expected {_shown(expected)}, got {_shown(got)}")

    def taken(self, answer: Answer) -> Answer:
        """The call succeeded."""
        self.expect(answer.ok, f"{answer.what}: expected success, got {answer}")
        return answer

    def refused(self, answer: Answer, name: str, *, fw: int | None = None) -> None:
        """The call failed with this errno.

        ``fw``: what the firmware word must hold then; None: what the caller put there, as KVM
        leaves it alone where it doesn't get as far as the firmware.
        """
        expected = f"errno {name}" if fw is None else f"errno {name}, firmware code {fw}"
        right = not answer.ok and answer.errno == getattr(errno, name)
        self.expect(right, f"{answer.what}: expected {expected}, got {answer}")
        if fw is None:
            kept = answer.untouched
            self.expect(kept, f"{answer.what}: expected the firmware word untouched, got {answer}")
        else:
            self.expect(answer.fw_error == fw, f"{answer.what}: expected {expected}, got {answer}")

    def errno(self, answer: Answer, name: str) -> None:
        """The call gave this errno, whatever the firmware word is."""
        right = answer.errno == getattr(errno, name)
        self.expect(right, f"{answer.what}: expected errno {name}, got {answer}")

    def needs(self, *modes: str) -> None:
        """Raises Skip unless the host takes VMSAs from user space in one of these modes."""
        offer = self.host.vmsa_offer
        if offer.mode not in modes:
            self.skip(
                f"needs VMSA mode {' or '.join(modes)}, this host has {offer.mode}: {offer.why}"
            )

    def one_of(self, answer: Answer, difference: str) -> bool:
        """The call did what some kernel is known to do; True if it succeeded.

        ``difference`` names a row of the table of documented differences; which one this host
        has becomes a note.
        """
        known = DIFFERENCES[difference]
        for behaviour in known:
            if behaviour.matches(answer):
                self.checks += 1
                self.note(f"{difference}: {behaviour}")
                return answer.ok
        raise Failure(
            f"{answer.what}: expected {' or '.join(b.answer for b in known)}, got {answer}"
        )

    def note(self, text: str) -> None:
        """A line for people, shown once before the result."""
        if text not in self.notes:
            self.notes.append(text)

    def skip(self, reason: str) -> NoReturn:
        """Raises Skip."""
        raise Skip(reason)


def _shown(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int):
        return value.hex() if isinstance(value, bytes) else str(value)
    return f"{value:#x}"
