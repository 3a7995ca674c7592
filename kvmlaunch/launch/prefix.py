"""Parts of a plan, to find out from which page on the host's digest is another one."""

from __future__ import annotations

from dataclasses import replace

from kvmlaunch.images.plan import LaunchPlan, PageRange

__all__ = ["prefix", "section"]


def prefix(plan: LaunchPlan, pages: int, vcpus: int = 0) -> LaunchPlan:
    """The plan's first ``pages`` pages and first ``vcpus`` vCPUs, see `section`."""
    return section(plan, 0, pages, vcpus)


def section(plan: LaunchPlan, first: int, end: int, vcpus: int = 0) -> LaunchPlan:
    """The plan's pages ``first`` to ``end`` - 1 and first ``vcpus`` vCPUs; steps are cut.

    No vCPU is bound to a VMSA: it can be launched, but not run.
    """
    steps: list[PageRange] = []
    at = 0
    for step in plan.steps:
        low, high = max(first - at, 0), min(end - at, step.npages)
        if low < high:
            steps.append(step.section(low, high))
        at += step.npages
    return replace(
        plan,
        steps=tuple(steps),
        vcpus=plan.vcpus[:vcpus],
        bindings={},
        id_block=None,
        id_auth=None,
        author_key_enabled=False,
        partial=True,
    )
