"""A trace of what a guest does: exits, page states, instructions; lines for people or JSON."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

from kvmlaunch.errors import FormatError
from kvmlaunch.kvm.exits import Exit
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.symbols import Symbols
from kvmlaunch.uapi import TraceEvent

__all__ = ["TRACE_KINDS", "Trace"]

TRACE_KINDS = ("exits", "pages", "insn")


class Trace:
    """Writes a line for each event of the wanted kinds; any thread may call.

    ``kinds``: ``exits`` (exits to user space; on a simulated host also what its KVM handles
    itself), ``pages`` (page states, RMP, nested faults) and ``insn`` (each instruction); the
    last two on a simulated host only. ``write`` gets whole lines; once it raises OSError,
    nothing more is written and ``error`` has the exception.
    """

    def __init__(
        self, kinds: Collection[str], write: Callable[[str], object], *, as_json: bool = False
    ) -> None:
        """Raises FormatError for an unknown kind."""
        unknown = sorted(set(kinds) - set(TRACE_KINDS))
        if unknown:
            raise FormatError(f"no trace is named {unknown[0]!r}; known are {_KNOWN}")
        self.kinds = frozenset(kinds)
        self.error: OSError | None = None
        self._write = write
        self._format = _json_line if as_json else _text_line
        self._lock = threading.Lock()
        self._symbols = Symbols({}, [])
        self._guest: Guest | None = None

    def attach(self, guest: Guest) -> None:
        """Begin with a guest. Raises FormatError where its host can't tell what is wanted."""
        inspector = guest.inspector
        hidden = sorted(self.kinds - {"exits"})
        if inspector is None and hidden:
            raise FormatError(
                f"--trace {hidden[0]} is for the simulated host: a real one doesn't tell "
                "(add --platform sim)"
            )
        self._symbols = Symbols.of_plan(guest.plan)
        self._guest = guest
        if inspector is not None:
            inspector.trace(self.kinds, self.event)

    def detach(self) -> None:
        """The run is over; what happens to the guest from now on is no part of it."""
        if self._guest is not None and self._guest.inspector is not None:
            self._guest.inspector.trace((), self.event)
        self._guest = None

    def exit(self, vcpu: int, exit_: Exit) -> None:
        """An exit to user space."""
        if "exits" not in self.kinds:
            return
        assert self._guest is not None
        registers = self._guest.registers(vcpu)
        rip = None if registers is None else registers["rip"]
        text = str(exit_)
        name = exit_.reason or text
        self.event(TraceEvent("exits", vcpu, rip, name, text.removeprefix(name).strip(), {}))

    def event(self, event: TraceEvent) -> None:
        """Something that the host saw."""
        symbol = None if event.rip is None else self._symbols.name(event.rip)
        line = self._format(event, symbol)
        with self._lock:
            if self.error is not None:
                return
            try:
                self._write(line)
            except OSError as error:
                self.error = error


_KNOWN = ", ".join(TRACE_KINDS)


def _text_line(event: TraceEvent, symbol: str | None) -> str:
    who = "-" if event.vcpu is None else f"vcpu{event.vcpu}"
    parts = [f"{event.kind} {who}"]
    if event.rip is not None:
        parts.append(f"{event.rip:#x}" + (f" <{symbol}>" if symbol else ""))
    parts += [part for part in (event.name, event.detail) if part and part != event.kind]
    return " ".join(parts) + "\n"


def _json_line(event: TraceEvent, symbol: str | None) -> str:
    fields: dict[str, Any] = {"trace": event.kind, "vcpu": event.vcpu}
    if event.rip is not None:
        fields["rip"] = f"{event.rip:#x}"
    if symbol:
        fields["symbol"] = symbol
    fields["name"] = event.name
    if event.detail and not event.fields:
        fields["detail"] = event.detail
    fields.update(_plain(event.fields))
    return json.dumps(fields, separators=(",", ":")) + "\n"


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: f"{value:#x}" if name == "gpa" else value for name, value in fields.items()}
