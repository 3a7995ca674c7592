"""A launch and a run with everything written down as it happens."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from kvmlaunch.images.plan import LaunchPlan
from kvmlaunch.kvm.exits import Exit
from kvmlaunch.launch.debug import Debugger
from kvmlaunch.launch.guest import Guest, WitnessReport
from kvmlaunch.launch.pagelog import NullLog, PageLog
from kvmlaunch.launch.records import PageRecord
from kvmlaunch.launch.run import Outcome, run_guest
from kvmlaunch.launch.trace import Trace
from kvmlaunch.uapi import Platform, Proposal, Recorder

__all__ = ["Session"]


class Session:
    """One guest from launch to end, with its page log. A context manager.

    ``on_record`` and ``on_exit`` are called beside the log; ``ioctls`` puts every
    system call into the log as well.
    """

    def __init__(
        self,
        plan: LaunchPlan,
        platform: Platform,
        *,
        log: PageLog | NullLog | None = None,
        ioctls: bool = False,
        proposal: Proposal | None = None,
        certificates: bytes | None = None,
    ) -> None:
        self.plan = plan
        self.log = log if log is not None else NullLog()
        self.platform = Recorder(platform, self.log.call) if ioctls else platform
        self.on_record: Callable[[PageRecord], object] = lambda record: None
        self.on_exit: Callable[[int, Exit], object] = lambda vcpu, exit_: None
        self.log.header(
            plan,
            platform=platform.name,
            profile=platform.profile,
            vmsa_mode=str(plan.vmsa_mode) if plan.confidential else "none",
        )
        self.guest = Guest(plan, self.platform, proposal=proposal, certificates=certificates)

    def launch(self, *, retry_cpuid: bool = False) -> WitnessReport:
        """Launch the guest; what was done is in the log also when it fails."""
        # The log is flushed behind the last page of each step: the host may crash in the next.
        ends = set(itertools.accumulate(step.npages for step in self.plan.steps))
        try:
            self.guest.start()
            self.log.flush()
            for batch in self.guest.update_batches(retry_cpuid=retry_cpuid):
                self.log.records(batch)
                if batch.seq + len(batch) in ends:
                    self.log.flush()
                for record in batch.records:
                    self.on_record(record)
            for record in self.guest.finish():
                self.log.record(record)
                self.on_record(record)
            report = self.guest.witness()
            self.log.finish(self.guest.digest, report.pages, agrees=report.agrees)
        finally:
            self.log.flush()
        return report

    def run(
        self,
        console: Callable[[bytes], object],
        *,
        timeout: float | None = None,
        trace: Trace | None = None,
        debugger: Debugger | None = None,
    ) -> Outcome:
        """Run the guest to its end (see :func:`kvmlaunch.launch.run.run_guest`)."""
        return run_guest(
            self.guest,
            console=console,
            on_exit=self._exit,
            timeout=timeout,
            trace=trace,
            debugger=debugger,
        )

    def _exit(self, vcpu: int, exit_: Exit) -> None:
        self.log.exit(vcpu, exit_.reason or str(exit_), str(exit_))
        self.on_exit(vcpu, exit_)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.guest.close()
