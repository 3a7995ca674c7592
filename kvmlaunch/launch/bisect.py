"""Find the first page from which on a host's launch digest is another than the predicted one.

Each question is a launch of a part of the plan (see `kvmlaunch.launch.oracle`). What counts are
prefixes: as long as the host measures what was predicted, a prefix's digest is right, and it
never is again behind the first difference, so that a binary search finds that in O(log n)
launches. Most differences also show where a few pages are launched alone; so that is
searched first, with fewer pages, and two prefixes prove what it finds. The VMSAs that KVM
makes come behind the pages: parts without vCPUs tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from kvmlaunch.abi.digest import LaunchDigest
from kvmlaunch.abi.page import PageType
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.images.plan import LaunchPlan
from kvmlaunch.images.sync_vmsas import finish_vmsas
from kvmlaunch.launch.measure import page_records
from kvmlaunch.launch.oracle import Answer, Oracle, Reply
from kvmlaunch.launch.prefix import prefix, section
from kvmlaunch.launch.records import PageRecord
from kvmlaunch.launch.verify import conclude
from kvmlaunch.launch.vmsa_search import Guess, guess_unasked, guess_vmsas

__all__ = ["Bisection", "bisect", "bisect_vmsas"]

_EMPTY = bytes(48)
"""Launch digest of a launch without pages."""


@dataclass(frozen=True)
class Bisection:
    """Where host and prediction part.

    Attributes:
        answer: of the whole launch; UNKNOWN also where the search couldn't go on.
        culprit: the first page or VMSA that the host measures otherwise; None where there
            is none.
        why: the sentence to it.
        fits: what the host measured instead of a VMSA, None where nothing known fits.
        launches: number of VMs that it took.
    """

    answer: Answer
    culprit: PageRecord | None
    why: str
    fits: Guess | None
    launches: int

    def __str__(self) -> str:
        word = "confirmed" if self.answer is Answer.RIGHT else self.answer
        return f"{word}: {self.why}"


class _Unexpected(Exception):
    """A reply that is neither right nor differs."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply)
        self.reply = reply


def bisect(
    plan: LaunchPlan, oracle: Oracle, on_reply: Callable[[str, Reply], object] = lambda *_: None
) -> Bisection:
    """Verify the plan, and if the host measures something else, find the first difference.

    ``on_reply`` gets each question and its answer. Raises what launching does.
    """
    search = _Search(plan, oracle, on_reply)
    return search.guarded(search.run)


def bisect_vmsas(plan: LaunchPlan, oracle: Oracle) -> Bisection:
    """Of a launch whose digest differs: whether the pages do, and if not, which VMSA.

    Leaves the search among the pages to `bisect`.
    """
    search = _Search(plan, oracle, lambda *_: None)
    return search.guarded(search.run_vmsas)


class _Search:
    """One search; ``records`` are those of the whole plan, its pages first."""

    def __init__(
        self, plan: LaunchPlan, oracle: Oracle, on_reply: Callable[[str, Reply], object]
    ) -> None:
        self.plan = plan
        self.records = tuple(page_records(plan))
        self._oracle = oracle
        self._on_reply = on_reply
        self._made = tuple(vmsa for _, vmsa in finish_vmsas(plan))

    def guarded(self, search: Callable[[], Bisection]) -> Bisection:
        try:
            return search()
        except _Unexpected as error:
            why = f"not expected: {error.reply}"
            return Bisection(Answer.UNKNOWN, None, why, None, self._oracle.launches)

    def run(self) -> Bisection:
        return self._first_difference(self._among_the_pages, self._whole)

    def run_vmsas(self) -> Bisection:
        return self._first_difference(self._somewhere_in_the_pages, self._only_together)

    def _first_difference(
        self, in_pages: Callable[[], Bisection], apart_right: Callable[[], Bisection]
    ) -> Bisection:
        """Pages without vCPUs, then VMSAs without pages: these don't depend on those."""
        if not self._pages_right(self.plan.npages):
            return in_pages() if self.plan.npages else self._unasked()
        if self._made and not self._vmsas_right(0, len(self._made)):
            return self._among_the_vmsas(0)
        return apart_right()

    def _somewhere_in_the_pages(self) -> Bisection:
        return self._found(None, f"among the {self.plan.npages} pages that the plan launches")

    def _whole(self) -> Bisection:
        reply = self._oracle.ask(self.plan, self.records[-1].digest if self.records else _EMPTY)
        self._on_reply("the whole launch", reply)
        verdict = conclude(self.plan, self._oracle, reply)
        for control in verdict.replies[1:]:
            self._on_reply("the whole launch, and a wrong digest", control)
        if verdict.answer is Answer.DIFFERS:
            return self._only_together()
        why = str(verdict).split(": ", 1)[1]
        return Bisection(verdict.answer, None, why, None, self._oracle.launches)

    def _only_together(self) -> Bisection:
        if self._made:
            return self._among_the_vmsas(self.plan.npages)
        why = "the pages are as predicted, but with vCPUs the host measures more than them"
        return self._found(None, why)

    def _among_the_pages(self) -> Bisection:
        npages, right = self.plan.npages, self._pages_right
        first = self._first_alone()
        if not right(first):
            if not first:
                return self._unasked()
            # It takes the pages before. The first of them are right: launched alone, too.
            wrong = _first_wrong(first, right)
        elif first + 1 < npages and right(first + 1):
            behind = first + 1
            wrong = behind + _first_wrong(npages - behind, lambda n: right(behind + n))
        else:
            wrong = first + 1
        return self._page(self.records[wrong - 1])

    def _first_alone(self) -> int:
        """The first page that differs if it doesn't take those before it to see that."""
        low, high = 0, self.plan.npages
        while high - low > 1:
            middle = (low + high) // 2
            digest = LaunchDigest()
            for record in self.records[low:middle]:
                digest.update_contents(record.type, record.gpa, record.contents)
            part = section(self.plan, low, middle)
            if self._right(f"pages {low} to {middle - 1} alone", part, digest.value):
                low = middle
            else:
                high = middle
        return low

    def _unasked(self) -> Bisection:
        guesses = guess_unasked(self._made, self.plan.sev_features)
        why = "the host measures something even where nothing is launched"
        return self._found(None, why, self._fitting(guesses, 0))

    def _page(self, record: PageRecord) -> Bisection:
        if record.type is not PageType.VMSA:
            return self._found(record, "first at a page")
        step = next(step for step in self.plan.vmsas if step.gpa == record.gpa)
        others = [Vmsa.decode(other.page(0)) for other in self.plan.vmsas if other is not step]
        alone = replace(prefix(self.plan, 0), steps=(step,))
        guesses = guess_vmsas((), Vmsa.decode(step.page(0)), others)
        fits = self._first_right(guesses, alone, step.gpa)
        return self._found(record, "first at a VMSA that the plan launches", fits)

    def _among_the_vmsas(self, pages: int) -> Bisection:
        """With so many pages, the VMSAs of all vCPUs aren't right."""
        first = _first_wrong(len(self._made), lambda vcpus: self._vmsas_right(pages, vcpus)) - 1
        others = [vmsa for vcpu, vmsa in enumerate(self._made) if vcpu != first]
        guesses = guess_vmsas(self._made[:first], self._made[first], others)
        fits = self._fitting(guesses, first + 1) if not pages else None
        record = self.records[self.plan.npages + first]
        return self._found(record, f"VMSA of vCPU {first}", fits)

    def _pages_right(self, pages: int) -> bool:
        return self._right(f"{pages} pages", prefix(self.plan, pages), self._digest(pages))

    def _vmsas_right(self, pages: int, vcpus: int) -> bool:
        digest = _chain(self._made[:vcpus], self.plan.vmsa_gpa, self._digest(pages))
        what = f"{pages} pages, {vcpus} vCPUs"
        return self._right(what, prefix(self.plan, pages, vcpus), digest)

    def _digest(self, pages: int) -> bytes:
        return self.records[pages - 1].digest if pages else _EMPTY

    def _right(self, what: str, plan: LaunchPlan, digest: bytes) -> bool:
        reply = self._oracle.ask(plan, digest)
        self._on_reply(what, reply)
        if reply.answer is Answer.UNKNOWN:
            raise _Unexpected(reply)
        return reply.answer is Answer.RIGHT

    def _fitting(self, guesses: Iterable[Guess], vcpus: int) -> Guess | None:
        """The first guess that a launch of the vCPUs alone confirms."""
        return self._first_right(guesses, prefix(self.plan, 0, vcpus), self.plan.vmsa_gpa)

    def _first_right(self, guesses: Iterable[Guess], plan: LaunchPlan, gpa: int) -> Guess | None:
        return next(
            (g for g in guesses if self._right(g.why, plan, _chain(g.vmsas, gpa, _EMPTY))), None
        )

    def _found(self, culprit: PageRecord | None, why: str, fits: Guess | None = None) -> Bisection:
        return Bisection(Answer.DIFFERS, culprit, why, fits, self._oracle.launches)


def _first_wrong(count: int, right: Callable[[int], bool]) -> int:
    """The least n in 1..count for which ``right(n)`` is False, as it is for ``count``."""
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        if right(middle):
            low = middle
        else:
            high = middle
    return high


def _chain(vmsas: Iterable[Vmsa], gpa: int, start: bytes) -> bytes:
    """The launch digest after VMSAs, all at the same GPA."""
    digest = LaunchDigest(start)
    for vmsa in vmsas:
        digest.update(PageType.VMSA, gpa, vmsa.encode())
    return digest.value
