"""Requirement R3: what KVM measures in mode sync is ABI. The digests are constants."""

from __future__ import annotations

from kvmlaunch.kvm import apply_state
from kvmlaunch.selftest.case import Case, case
from kvmlaunch.selftest.golden import GOLDEN, PAGES, Golden, state
from kvmlaunch.selftest.vm import LaunchVm

_UNTOUCHED = "reset"


@case("golden.{}", each=GOLDEN)
def golden(t: Case, known: Golden) -> None:
    """The launch digest of fixed pages and registers ({}) is what it has always been"""
    if known.features & ~t.host.vmsa_features:
        t.skip(f"this host doesn't offer the SEV features {known.features:#x}")
    vm = LaunchVm.started(t, pages=len(PAGES), features=known.features)
    for index, name in enumerate(known.states):
        vcpu = vm.add_vcpu(index)
        if name != _UNTOUCHED:
            apply_state(vcpu, state(name), t.host.cpuid, bsp=not index)
    for page, (kind, data) in enumerate(PAGES):
        vm.fill(page, data)
        t.taken(vm.update(page, type=kind))
    answer = vm.finish_expecting(bytes.fromhex(known.digest))
    measured = t.host.measured(vm.vm.fd)
    if measured:
        t.equal("launch digest", measured[-1].digest, bytes.fromhex(known.digest))
    t.taken(answer)
