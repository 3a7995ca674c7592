"""Looking inside a guest, where its host lets us: beside the system calls, as measured_pages."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Protocol

__all__ = ["Inspector", "TraceEvent"]


class TraceEvent(NamedTuple):
    """Something that a host saw a guest do.

    ``kind`` is ``exits``, ``pages`` or ``insn``; ``vcpu`` and ``rip`` (linear) are None where
    unknown; ``name`` says what, ``detail`` the rest for people, ``fields`` for machines.
    """

    kind: str
    vcpu: int | None
    rip: int | None
    name: str
    detail: str
    fields: Mapping[str, Any]


class Inspector(Protocol):
    """One VM from inside. Any thread may call it; the guest stands still meanwhile."""

    def registers(self, vcpu: int) -> Mapping[str, int] | None:
        """Registers by name (:mod:`kvmlaunch.abi.registers`); None for a vCPU without state."""

    def set_registers(self, vcpu: int, values: Mapping[str, int]) -> bool:
        """Change registers; False, and nothing is changed, where one of them can't be."""

    def read_memory(self, vcpu: int, linear: int, size: int) -> bytes:
        """Guest memory through the vCPU's page tables, as far as it goes."""

    def write_memory(self, vcpu: int, linear: int, data: bytes) -> bool:
        """Change guest memory, read-only or not: all or nothing (then False)."""

    def set_breakpoints(self, places: Collection[int]) -> None:
        """Stop with KVM_EXIT_DEBUG before the instructions at these linear addresses."""

    def resume(self, steps: Collection[int]) -> None:
        """The vCPUs will go on; those in ``steps`` stop (KVM_EXIT_DEBUG) after an instruction."""

    def trace(self, kinds: Collection[str], sink: Callable[[TraceEvent], object]) -> None:
        """Hand what happens to ``sink``, which must not call back; no kinds ends it."""
