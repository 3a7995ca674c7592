"""Known causes of another VMSA: each is found, and named by what it changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from kvmlaunch.abi.digest import LaunchDigest
from kvmlaunch.abi.kvm_sync import sregs_round_trip
from kvmlaunch.abi.page import PageType
from kvmlaunch.abi.reset import kvm_untouched
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.images import LaunchPlan
from kvmlaunch.images.sync_vmsas import finish_vmsas
from kvmlaunch.launch.bisect import Bisection, bisect
from kvmlaunch.launch.oracle import Answer, Oracle, Reply
from kvmlaunch.launch.vmsa_search import guess_unasked, guess_vmsas
from kvmlaunch.sim import SimPlatform
from tests.launch.rig import plan, reset_state

Change = Callable[[list[Vmsa]], list[Vmsa]]
GPA = 0xFFFFFFFFF000  # kernel-snp-abi: where KVM has VMSAs measured
STATES = [reset_state().replace(rbx=0x100 + n) for n in range(4)]


class Measures(Oracle):
    """A host that measures the VMSAs of a plan without pages as ``change`` makes them."""

    def __init__(self, change: Change) -> None:
        super().__init__(SimPlatform())
        self._change = change

    def ask(self, plan: LaunchPlan, digest: bytes) -> Reply:
        self.launches += 1
        chain = LaunchDigest()
        for vmsa in self._change([vmsa for _, vmsa in finish_vmsas(plan)]):
            chain.update(PageType.VMSA, GPA, vmsa.encode())
        answer = Answer.RIGHT if chain.value == digest else Answer.DIFFERS
        return Reply(answer, digest, 0x0A if answer is Answer.RIGHT else 0x0B, 5, False)


def guests(*states: Vmsa, **more: object) -> LaunchPlan:
    return replace(plan([], vcpus=len(states)), vcpus=states, **more)


def found(change: Change, *states: Vmsa) -> Bisection:
    return bisect(guests(*(states or STATES)), Measures(change))


def nth(number: int, make: Callable[[Vmsa], Vmsa]) -> Change:
    """Change one VMSA, where there is one of this number."""

    def change(vmsas: list[Vmsa]) -> list[Vmsa]:
        return [make(vmsa) if n == number else vmsa for n, vmsa in enumerate(vmsas)]

    return change


def swapped(vmsas: list[Vmsa]) -> list[Vmsa]:
    return [*vmsas[:1], vmsas[2], vmsas[1], *vmsas[3:]] if len(vmsas) > 2 else vmsas


CAUSES: dict[str, tuple[Change, int, str]] = {
    "missing": (
        lambda vmsas: vmsas[:2] + vmsas[3:],
        2,
        "the host measures no such VMSA",
    ),
    "order": (swapped, 2, "the last two VMSAs are in the other order"),
    "one more before": (
        lambda vmsas: [*vmsas[:2], *([STATES[3]] if len(vmsas) > 2 else []), *vmsas[2:]],
        2,
        "the host measures one VMSA more before it",
    ),
    "one more behind": (
        lambda vmsas: [*vmsas[:3], *([vmsas[2]] if len(vmsas) > 2 else []), *vmsas[3:]],
        2,
        "the host measures one VMSA more behind it",
    ),
    "another vCPU's": (nth(1, lambda vmsa: STATES[3]), 1, "the VMSA of another vCPU"),
    "untouched": (
        nth(1, lambda vmsa: kvm_untouched(sev_features=1)),
        1,
        "as KVM makes a vCPU that nobody touched",
    ),
    "secure TSC": (
        nth(3, lambda vmsa: vmsa.replace(sev_features=0x201)),
        3,
        "SEV feature secure_tsc is set",
    ),
    "Turin": (
        nth(0, lambda vmsa: vmsa.replace(rdx=0xB00F00)),
        0,
        "another vCPU signature: EPYC-Turin",
    ),
    "no PAT": (nth(0, lambda vmsa: vmsa.replace(g_pat=0)), 0, "g_pat is zero"),
    "CS of KVM": (
        nth(2, lambda vmsa: vmsa.with_field("cs.attrib", 0x9A)),
        2,
        "cs as in a vCPU that nobody touched",
    ),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_search_when_a_vmsa_has_a_known_cause_names_it(cause: str) -> None:
    change, vcpu, why = CAUSES[cause]
    result = found(change)
    assert result.culprit is not None
    assert result.fits is not None
    assert (result.culprit.vcpu, result.fits.why) == (vcpu, why)


def test_search_when_registers_went_round_trip_names_that() -> None:
    """KVM_GET_SREGS reports segments as accessed (kernel-snp-abi, VMSA)."""
    state = kvm_untouched(sev_features=1)
    result = found(nth(1, sregs_round_trip), state, state)
    assert result.fits is not None
    assert result.fits.why == "as after KVM_GET_SREGS and KVM_SET_SREGS"
    fields = {change.split(" ")[0] for change in result.fits.changes}
    assert fields == {"ds.attrib", "es.attrib", "fs.attrib", "gs.attrib"}


def test_search_when_the_state_is_given_as_kvm_never_measures_it_names_that() -> None:
    """A plan of another VMM's predictor: KVM sets SVME and MCE, and clears CD and NW."""
    state = reset_state().replace(efer=0, cr4=0, cr0=0x60000010)
    launch_plan = guests(state, as_given=True)
    measured = reset_state()
    result = bisect(launch_plan, Measures(lambda vmsas: [measured for _ in vmsas]))
    assert result.fits is not None
    assert result.fits.why == "as KVM makes it of these registers"
    assert [change.split(" ")[0] for change in result.fits.changes] == ["efer", "cr4", "cr0"]


@pytest.mark.parametrize("vmsa", [kvm_untouched(sev_features=1), STATES[1]])
def test_search_when_a_vmsa_is_measured_without_vcpus_names_it(vmsa: Vmsa) -> None:
    result = found(lambda vmsas: [vmsa, *vmsas])
    assert (result.culprit, result.answer) == (None, Answer.DIFFERS)
    assert result.fits is not None
    assert result.fits.why == "the host measures a VMSA that nobody asked for"
    assert result.fits.vmsas == (vmsa,)


def test_search_when_nothing_known_fits_says_so() -> None:
    result = found(nth(1, lambda vmsa: vmsa.replace(r9=0x1234)))
    assert result.culprit is not None
    assert (result.culprit.vcpu, result.fits) == (1, None)


def test_guesses_when_listed_are_all_different_and_none_is_the_prediction() -> None:
    expected, others = STATES[1], (STATES[0], STATES[2], STATES[2])
    guesses = list(guess_vmsas(STATES[:1], expected, others))
    chains = [tuple(vmsa.encode() for vmsa in guess.vmsas) for guess in guesses]
    assert (STATES[0].encode(), expected.encode()) not in chains
    assert len(set(chains)) == len(chains)
    # Each is a VM: the search must stay a matter of seconds.
    assert 50 < len(chains) < 200


def test_guesses_when_a_vmsa_is_replaced_say_which_fields_change() -> None:
    def changed(fields: Sequence[str]) -> set[str]:
        return {line.split(" ")[0].split(".")[0] for line in fields}

    for guess in guess_vmsas((), STATES[0], ()):
        if guess.changes:
            (vmsa,) = guess.vmsas
            differing = {
                name
                for name in changed(guess.changes)
                if getattr(vmsa, name) != getattr(STATES[0], name)
            }
            assert differing == changed(guess.changes)


def test_unasked_guesses_when_listed_are_single_vmsas() -> None:
    guesses = list(guess_unasked(STATES[:2], 0x21))
    assert [len(guess.vmsas) for guess in guesses] == [1, 1, 1]
    assert guesses[0].vmsas[0].sev_features == 0x21
