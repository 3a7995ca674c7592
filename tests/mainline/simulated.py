"""The simulated host as a script's host: what its secure processor did, also for dead VMs.

As fake_psp in debugfs: pages of every guest, VMSAs of the newest one, each firmware command.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvmlaunch.sim import Faults, SimPlatform, caps
from kvmlaunch.uapi import lib
from tests.mainline.player import Player
from tests.mainline.script import Script

__all__ = ["SimHost", "play_simulated"]

_VMSA = 2


class SimHost:
    """Listens to a SimPlatform's secure processor."""

    def __init__(self, platform: SimPlatform) -> None:
        self._host = platform._host
        self.phys_bits = self._host.phys_bits
        self.vcpu_ids = caps.MAX_VCPU_ID
        self._log: list[list[Any]] = []
        self._guests: list[Any] = []
        self._old: list[Any] = []
        self._vmsas: list[str] = []
        self._listen()

    def begin(self, orders: Sequence[str]) -> None:
        # A context that couldn't be decommissioned stays for ever.
        self._old = list(self._host.processor._contexts.values())
        self._log.clear()
        self._guests.clear()
        self._vmsas.clear()
        self._host.faults.faults = Faults.parse(orders).faults
        self._host.faults._calls.clear()

    def end(self) -> dict[str, Any]:
        guests = [
            [[int(p.page_type), f"{p.gpa:x}", p.contents.hex(), p.digest.hex()] for p in g.pages]
            for g in self._guests
            if g.pages
        ]
        return {"guests": guests, "vmsas": list(self._vmsas), "log": list(self._log)}

    def _listen(self) -> None:
        psp, faults = self._host.psp, self._host.faults
        status, launch_update, reclaim_fails = psp.status, psp.launch_update, faults.reclaim_fails

        def noted(name: str, command: Callable[[], int]) -> int:
            answer = status(name, command)
            self._log.append([name, int(answer)])
            if name == "SNP_GCTX_CREATE" and not answer:
                self._vmsas.clear()
            for context in psp.processor._contexts.values():
                if context not in self._guests and context not in self._old:
                    self._guests.append(context)
            return answer

        def with_vmsa(gctx: int, spa: int, page_type: int) -> int:
            page = bytes(self._host.memory.page(spa))
            answer = launch_update(gctx, spa, page_type)
            newest = self._guests and psp.processor._contexts[gctx] is self._guests[-1]
            if page_type == _VMSA and not answer and newest:
                self._vmsas.append(page.rstrip(b"\0").hex())
            return answer

        def noted_failure() -> bool:
            failed = reclaim_fails()
            if failed:
                self._log.append(["SNP_PAGE_RECLAIM", int(lib.SEV_RET_INVALID_PAGE_STATE)])
            return failed

        psp.status, psp.launch_update = noted, with_vmsa
        faults.reclaim_fails = noted_failure


def play_simulated(
    script: Script, orders: Sequence[str] = (), platform: SimPlatform | None = None
) -> dict[str, Any]:
    """Play on a new simulated host of profile 6.12."""
    with platform or SimPlatform("6.12", random=bytes) as fresh:
        outcome = Player(fresh, SimHost(fresh)).play(script, orders)
        assert fresh.open_fds == (), f"left open: {fresh.open_fds}"
        return outcome
