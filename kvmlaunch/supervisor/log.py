"""The page log of launches that a client does (schema kvmlaunch.log/1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.launch.pagelog import PageLog
from kvmlaunch.launch.records import PageRecord
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import Call, MeasuredPage, lib

__all__ = ["LaunchLog"]

_START, _UPDATE, _FINISH = (f"KVM_SEV_SNP_LAUNCH_{step}" for step in ("START", "UPDATE", "FINISH"))


@dataclass
class _Launch:
    """One guest's launch so far."""

    number: int
    pages: int = 0
    vmsas: int = 0
    digest: bytes = bytes(48)


class LaunchLog:
    """Writes what firmware measures, after each step; later guests than the first have ``vm``.

    ``program`` is what the header calls the image.
    """

    def __init__(self, log: PageLog, platform: SimPlatform, program: str) -> None:
        self._log = log
        self._platform = platform
        self._program = program
        self._launches: dict[int, _Launch] = {}
        self._started = 0

    def note(self, call: Call) -> None:
        """A call that has been answered. Raises LogError."""
        if call.name not in (_START, _UPDATE, _FINISH):
            return
        try:
            context = self._platform.launch_context(call.fd)
        except OSError:
            return  # it isn't a VM, or is closed by now
        if context is None:
            return
        if call.name != _START:
            self._new_pages(call, self._launches[context])
        elif not call.ret or context not in self._launches:
            # EFAULT may mean that the firmware has started, and the client can't be told.
            self._start(call, context)

    def _start(self, call: Call, context: int) -> None:
        launch = self._launches[context] = _Launch(self._started)
        self._started += 1
        self._log.start(
            {"image": self._program, **_vm(launch)},
            call.sent["data"]["policy"],
            platform=self._platform.name,
            profile=self._platform.profile,
            vmsa_mode="client",  # its choice, which the pages show
        )

    def _new_pages(self, call: Call, launch: _Launch) -> None:
        finish = call.name == _FINISH
        pages = self._platform.measured_pages(call.fd, launch.pages)
        for number, page in enumerate(pages):
            origin = "kvm-sync" if finish else _origin(call.sent["data"], number)
            self._record(launch, page, origin)
        if finish and not call.ret:
            self._log.finish(launch.digest, launch.pages, predicted=False, vm=launch.number)
        self._log.flush()

    def _record(self, launch: _Launch, page: MeasuredPage, origin: str) -> None:
        vcpu = None
        if page.type == PageType.VMSA:
            vcpu, launch.vmsas = launch.vmsas, launch.vmsas + 1
        record = PageRecord(
            launch.pages,
            page.gpa,
            PageType(page.type),
            page.contents,
            page.digest,
            origin,
            "",
            vcpu,
        )
        launch.pages, launch.digest = launch.pages + 1, page.digest
        if launch.number:
            self._log.write({**record.to_event(), **_vm(launch)})
        else:
            self._log.record(record)


def _origin(update: Any, number: int) -> str:
    """Where the client had the page: an address of its memory."""
    if update["type"] == lib.KVM_SEV_SNP_PAGE_TYPE_ZERO:
        return "client"
    return f"client+{update['uaddr'] + number * PAGE_SIZE:#x}"


def _vm(launch: _Launch) -> dict[str, int]:
    return {"vm": launch.number} if launch.number else {}
