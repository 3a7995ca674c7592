"""Parts of a plan, to find out from which page on the host's digest is another one."""

from __future__ import annotations

from dataclasses import replace

from kvmlaunch.images.plan import LaunchPlan, PageRange

__all__ = ["prefix"]


def prefix(plan: LaunchPlan, pages: int, vcpus: int = 0) -> LaunchPlan:
    """The plan's first ``pages`` pages and first ``vcpus`` vCPUs, the last step cut where needed.

    No vCPU is bound to a VMSA: it can be launched, but not run.
    """
    steps: list[PageRange] = []
    for step in plan.steps:
        if not pages:
            break
        steps.append(step if step.npages <= pages else step.head(pages))
        pages -= steps[-1].npages
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
