"""What the reference leaves open about the proposals: each rule, and the other way round."""

from __future__ import annotations

import dataclasses
import errno

import pytest

from kvmlaunch.sim.profiles import KERNEL_PROFILES, kernel_profile
from kvmlaunch.sim.vmsa_rules import VmsaRules
from kvmlaunch.uapi import Proposal, lib

from .driver import PAGE, Guest, simulated, struct
from .vmsa_pages import (
    DIRECT_VMSA,
    EFAULT,
    EINVAL,
    GET,
    MARK,
    OK,
    SET,
    VCPU_STATE,
    VmsaGuest,
    vmsa_page,
    with_rules,
)

PAGE_KERNEL, DIRECT_KERNEL = kernel_profile("vmsa-page"), kernel_profile("direct-vmsa")
EPERM = (-1, errno.EPERM)


def test_profiles_have_the_rules_of_their_generation():
    generations = {name: profile.vmsa.generation for name, profile in KERNEL_PROFILES.items()}
    assert generations == {
        **dict.fromkeys(("6.12", "6.18", "7.0", "multi-vmpl"), "none"),
        "vmsa-page": "page",
        "direct-vmsa": "direct",
    }


def test_kernels_of_the_proposals_are_7_0_but_for_their_vmsas_and_aps():
    aps = {"apic_id_list", "ap_create_uninitialized"}
    for name, more in (("vmsa-page", set()), ("direct-vmsa", aps)):
        changed = {
            field.name
            for field in dataclasses.fields(kernel_profile("7.0"))
            if getattr(kernel_profile(name), field.name)
            != getattr(kernel_profile("7.0"), field.name)
        }
        assert changed == {"name", "release", "vmsa", *more}


def test_every_rule_is_documented():
    doc = VmsaRules.__doc__ or ""
    missing = [f.name for f in dataclasses.fields(VmsaRules) if f"{f.name}:" not in doc]
    assert missing == []


def direct(**changes):
    return simulated(with_rules(DIRECT_KERNEL, **changes))


def page(**changes):
    return simulated(with_rules(PAGE_KERNEL, **changes))


@pytest.mark.parametrize(("number", "found"), [(None, 0), (250, 1)])
def test_page_capability_is_reported_where_it_has_a_number(number, found):
    with page(page_capability=number) as platform:
        guest = VmsaGuest(platform, direct=False)
        assert guest.capability(250) == found
        assert guest.enable(250) == EINVAL


@pytest.mark.parametrize(("needed", "result"), [(False, OK), (True, EINVAL)])
def test_page_needs_the_capability_where_the_kernel_says_so(needed, result):
    with direct(page_needs_capability=needed) as platform:
        assert VmsaGuest(platform, direct=False).measure(1) == (result, MARK)
        assert VmsaGuest(platform, direct=True).measure(1) == (OK, MARK)


def test_update_of_several_vmsas_where_the_kernel_takes_them():
    with page(one_page_per_update=False) as platform:
        guest = VmsaGuest(platform, direct=False)
        guest.source.write(vmsa_page(), 2 * PAGE)
        assert guest.measure(1, len=2 * PAGE) == (OK, MARK)
        assert guest.measured() == [(2, guest.gpa(1)), (2, guest.gpa(2))]


def test_update_of_several_vmsas_stops_at_the_bad_one():
    with direct(one_page_per_update=False) as platform:
        guest = VmsaGuest(platform)
        assert guest.measure(1, len=2 * PAGE) == (OK, MARK)
        assert guest.measured() == [(2, guest.gpa(1))]


def test_bad_page_has_the_kernels_errno():
    with page(bad_page_errno=errno.EPERM) as platform:
        guest = VmsaGuest(platform, direct=False)
        assert guest.measure(1, vmsa_page(vmpl=1)) == (EPERM, MARK)


@pytest.mark.parametrize("code", [errno.EEXIST, errno.EBUSY])
def test_second_page_has_the_kernels_errno(code):
    with page(second_page_errno=code) as platform:
        guest = VmsaGuest(platform, direct=False)
        guest.ok(guest.measure(1)[0])
        assert guest.measure(2) == ((-1, code), MARK)


def test_second_page_counts_where_the_kernel_takes_it():
    with page(second_page_errno=0) as platform:
        guest = VmsaGuest(platform, direct=False)
        guest.ok(guest.measure(1)[0])
        assert guest.measure(2, b"\0" * PAGE) == (EINVAL, MARK)
        guest.ok(guest.measure(2)[0])
        guest.ok(guest.finish()[0])
        vcpu = platform._host.fds.get(guest.vcpus[0]).vcpu
        assert vcpu.sev_es.guest_vmsa_gpa == guest.gpa(2)


@pytest.mark.parametrize(("needed", "result"), [(False, OK), (True, EINVAL)])
def test_enable_before_init2_by_rule(needed, result):
    with direct(enable_needs_init=needed) as platform:
        guest = Guest(platform, init=False)
        cap = struct("kvm_enable_cap", cap=DIRECT_VMSA)
        assert guest.ioctl(guest.vm, lib.KVM_ENABLE_CAP, cap) == result
        assert guest.ioctl(guest.create_vm(0), lib.KVM_ENABLE_CAP, cap) == EINVAL


@pytest.mark.parametrize("code", [0, errno.EEXIST])
def test_enable_twice_has_the_kernels_errno(code):
    with direct(enable_twice_errno=code) as platform:
        guest = VmsaGuest(platform, vcpus=0)
        assert guest.enable() == ((-1, code) if code else OK)


@pytest.mark.parametrize(("needed", "result"), [(False, OK), (True, EINVAL)])
def test_get_without_the_capability_by_rule(needed, result):
    with direct(get_needs_capability=needed) as platform:
        for enabled in (False, True):
            guest = VmsaGuest(platform, direct=enabled)
            got = guest.sev(guest.vcpus[0], GET, struct("kvm_sev_snp_vcpu_state"))[0]
            assert got == (OK if enabled else result)


@pytest.mark.parametrize("code", [errno.EFAULT, errno.EINVAL])
def test_set_without_guest_memfd_has_the_kernels_errno(code):
    with direct(no_guest_memfd_errno=code) as platform:
        guest = VmsaGuest(platform)
        platform.close(guest.gmem)
        assert guest.set_state(guest.gpa(1)) == ((-1, code), MARK)


@pytest.mark.parametrize("code", [0, errno.EINVAL])
def test_finish_without_a_page_has_the_kernels_errno(code):
    with page(finish_without_page_errno=code) as platform:
        guest = VmsaGuest(platform, direct=False)
        assert guest.finish(error=MARK)[0] == ((-1, code) if code else OK)
        assert guest.is_protected(0) == (code == 0)


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("kernel", [PAGE_KERNEL, DIRECT_KERNEL], ids=str)
def test_finish_protects_unbound_vcpus_by_rule(kernel, every):
    with simulated(with_rules(kernel, finish_protects_all=every)) as platform:
        guest = VmsaGuest(platform, direct=kernel is DIRECT_KERNEL, vcpus=2)
        guest.ok(guest.measure(1)[0])
        if kernel is DIRECT_KERNEL:
            guest.ok(guest.set_state(guest.gpa(1), 0)[0])
        guest.ok(guest.finish()[0])
        assert (guest.is_protected(0), guest.is_protected(1)) == (True, every)


# Numbers


OTHER = Proposal(
    direct_vmsa=901, vcpu_state=902, get_vcpu_state=203, set_vcpu_state=204, page_type_vmsa=9
)


def test_kernel_with_other_numbers_goes_by_them_and_knows_no_others():
    with direct(proposal=OTHER) as platform:
        guest = VmsaGuest(platform, direct=False, vcpus=0)
        assert [guest.capability(number) for number in (901, 902)] == [1, 1]
        assert [guest.capability(number) for number in (DIRECT_VMSA, VCPU_STATE)] == [0, 0]
        assert guest.enable(DIRECT_VMSA) == EINVAL
        assert guest.enable(901) == OK
        vcpu = guest.add_vcpu()
        assert guest.measure(1, kind=2) == (EINVAL, MARK)
        assert guest.measure(1, kind=9) == (OK, MARK)
        # To firmware it is a VMSA, whatever KVM's own number.
        assert guest.measured() == [(2, guest.gpa(1))]
        state = struct("kvm_sev_snp_vcpu_state", valid_fields=1, vmsa_gpa=guest.gpa(1))
        assert [guest.sev(vcpu, command, state)[0] for command in (GET, SET)] == [EINVAL] * 2
        assert guest.sev(vcpu, 204, state)[0] == OK
        state.vmsa_gpa = 0
        assert guest.sev(vcpu, 203, state)[0] == OK
        assert state.vmsa_gpa == guest.gpa(1)
        assert guest.sev(vcpu, 203, 8)[0] == EFAULT


def test_fault_when_kernel_has_other_numbers_goes_by_the_commands_name():
    profile = with_rules(DIRECT_KERNEL, proposal=OTHER)
    with simulated(profile, faults=["SNP_SET_VCPU_STATE:errno=EBUSY"]) as platform:
        guest = VmsaGuest(platform, direct=False)
        state = struct("kvm_sev_snp_vcpu_state")
        assert guest.sev(guest.vcpus[0], 204, state)[0] == (-1, errno.EBUSY)


def test_page_kernel_with_another_type_takes_that():
    with page(proposal=OTHER) as platform:
        guest = VmsaGuest(platform, direct=False)
        assert guest.measure(1, kind=2) == (EINVAL, MARK)
        assert guest.measure(1, kind=9) == (OK, MARK)
        guest.ok(guest.finish()[0])
        assert guest.measured() == [(2, guest.gpa(1))]
