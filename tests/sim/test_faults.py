"""Ordered faults: the grammar, the counting, and each verb at the ioctl line."""

from __future__ import annotations

import errno

import pytest

from kvmlaunch.errors import FormatError
from kvmlaunch.sim import Faults
from kvmlaunch.uapi import lib

from .driver import PAGE, Driver, Guest, launched, simulated, struct

MARK = 0xABCD1234


@pytest.mark.parametrize(
    "text",
    [
        "KVM_CREATE_VCPU:errno=ENOMEM@2",
        "SNP_LAUNCH_UPDATE:errno=EAGAIN",
        "KVM_SEV_SNP_LAUNCH_UPDATE:errno=5",
        "INIT2:errno=EBUSY",
        "KVM_MEMORY_ENCRYPT_OP:errno=EIO@1+",
        "SNP_PLATFORM_STATUS:errno=524",
        "SNP_LAUNCH_UPDATE:fw=0x16@2",
        "SNP_LAUNCH_UPDATE:fw=22",
        "SNP_GUEST_REQUEST:fw=0x1d@2+",
        "SNP_LAUNCH_UPDATE:partial=5",
        "SNP_LAUNCH_UPDATE:signal=0@3",
        "SNP_PAGE_RECLAIM:fail",
        "SNP_PAGE_RECLAIM:fail@2",
        "CPUID:correct=0x80000008.ebx",
        "CPUID:correct=0xd/1.eax=0x10@2",
        " KVM_RUN:errno=EINTR ",
    ],
)
def test_good_text_is_one_fault(text):
    assert len(Faults.parse([text]).faults) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "SNP_LAUNCH_UPDATE",
        "SNP_LAUNCH_UPDATE:errno",
        "SNP_LAUNCH_UPDATE:errno=",
        "SNP_LAUNCH_UPDATE:errno=EWHAT",
        "SNP_LAUNCH_UPDATE:errno=0",
        "SNP_LAUNCH_UPDATE:errno=5000",
        "SNP_LAUNCH_UPDATE:errno=EIO@0",
        "SNP_LAUNCH_UPDATE:errno=EIO@-1",
        "SNP_LAUNCH_UPDATE:errno=EIO@x",
        "SNP_LAUNCH_UPDATE:partial=0",
        "SNP_LAUNCH_UPDATE:fail",
        "SNP_LAUNCH_START:partial=1",
        "SNP_LAUNCH_START:fw=x",
        "KVM_CREATE_VM:fw=1",
        "KVM_NO_SUCH:errno=EIO",
        "SNP_PAGE_RECLAIM:fail=1",
        "CPUID:correct",
        "CPUID:correct=0x80000008",
        "CPUID:correct=0x80000008.rax",
        "SNP_LAUNCH_UPDATE:correct=1.eax",
        "snp_launch_update:errno=EIO",
    ],
)
def test_bad_text_is_format_error_with_text_and_grammar(text):
    with pytest.raises(FormatError) as caught:
        Faults.parse([text])
    assert repr(text) in str(caught.value)
    assert "NAME:errno=" in str(caught.value)


def test_errno_at_nth_call_hits_that_call_only():
    with simulated(faults=["KVM_CREATE_VCPU:errno=ENOMEM@2"]) as platform:
        driver = Driver(platform)
        vm = driver.create_vm(0)
        results = [driver.ioctl(vm, lib.KVM_CREATE_VCPU, n).errno for n in range(3)]
        assert results == [0, errno.ENOMEM, 0]


def test_errno_from_nth_call_on_hits_all_later_ones():
    with simulated(faults=["KVM_CREATE_VCPU:errno=ENOMEM@2+"]) as platform:
        driver = Driver(platform)
        vm = driver.create_vm(0)
        results = [driver.ioctl(vm, lib.KVM_CREATE_VCPU, n).errno for n in range(3)]
        assert results == [0, errno.ENOMEM, errno.ENOMEM]


def test_errno_is_given_before_any_check():
    with simulated(faults=["KVM_CREATE_VM:errno=EINTR"]) as platform:
        driver = Driver(platform)
        kvm = driver.open_kvm()
        assert driver.ioctl(kvm, lib.KVM_CREATE_VM, 99) == (-1, errno.EINTR)
        assert driver.ioctl(kvm, lib.KVM_CREATE_VM, 99) == (-1, errno.EINVAL)


@pytest.mark.parametrize("name", ["SNP_LAUNCH_UPDATE", "KVM_SEV_SNP_LAUNCH_UPDATE"])
def test_eagain_from_update_changes_nothing(name):
    with simulated(faults=[f"{name}:errno=EAGAIN"]) as platform:
        guest = launched(platform)
        args = guest.update_args(npages=2)
        assert guest.update(args, error=MARK) == ((-1, errno.EAGAIN), MARK)
        assert args.len == 2 * PAGE
        assert guest.update(args) == ((0, 0), 0)
        assert args.len == 0


@pytest.mark.parametrize("request_name", ["KVM_MEMORY_ENCRYPT_OP", "SEV_ISSUE_CMD"])
def test_errno_of_the_ioctl_itself_counts_its_commands_together(request_name):
    with simulated(faults=[f"{request_name}:errno=EPERM@2"]) as platform:
        guest = Guest(platform, init=False)
        fd = guest.vm if request_name.startswith("KVM") else guest.sev_fd
        results = [guest.ioctl(fd, getattr(lib, request_name), 8).errno for _ in range(3)]
        assert results == [errno.EFAULT, errno.EPERM, errno.EFAULT]


def test_init2_errno_can_be_ordered():
    with simulated(faults=["INIT2:errno=EBUSY"]) as platform:
        guest = Guest(platform, init=False)
        assert guest.init2(error=MARK) == ((-1, errno.EBUSY), MARK)
        assert guest.init2()[0] == (0, 0)


def test_run_errno_can_be_ordered():
    with simulated(faults=["KVM_RUN:errno=EFAULT"]) as platform:
        guest = launched(platform)
        assert guest.ioctl(guest.vcpus[0], lib.KVM_RUN) == (-1, errno.EFAULT)


@pytest.mark.parametrize("verb", ["partial", "signal"])
def test_update_that_stops_after_two_pages_is_partial_success(verb):
    with simulated(faults=[f"SNP_LAUNCH_UPDATE:{verb}=2@2"]) as platform:
        guest = launched(platform)
        assert guest.update_pages(0, 3) == ((0, 0), 0)
        args = guest.update_args(3, 5)
        assert guest.update(args, error=MARK) == ((0, 0), MARK)
        assert args.len == 3 * PAGE
        assert guest.update(args) == ((0, 0), 0)
        assert len(platform.measured_pages(guest.vm)) == 8


def test_partial_beyond_the_end_changes_nothing():
    with simulated(faults=["SNP_LAUNCH_UPDATE:partial=5"]) as platform:
        guest = launched(platform)
        args = guest.update_args(npages=3)
        assert guest.update(args) == ((0, 0), 0)
        assert args.len == 0


def test_firmware_status_at_nth_page():
    with simulated(faults=["SNP_LAUNCH_UPDATE:fw=0x1c@3"]) as platform:
        guest = launched(platform)
        words = [guest.update_pages(n)[1] for n in range(4)]
        assert words == [0, 0, 0x1C, 0]


def test_vm_reclaims_its_response_page_before_it_decommissions():
    # snp_guest_req_init() takes a Firmware page at INIT2; sev_vm_destroy() gives it back first.
    with simulated() as platform:
        guest = Guest(platform)
        guest.ok(guest.start()[0])
        issued = []
        status = platform._host.psp.status
        platform._host.psp.status = lambda name, call: issued.append(name) or status(name, call)
        platform.close(guest.vm)
        assert issued == ["SNP_PAGE_RECLAIM", "SNP_DECOMMISSION", "SNP_PAGE_RECLAIM"]


def test_second_reclaim_failure_kills_the_second_vm_only():
    faults = ["SNP_LAUNCH_UPDATE:fw=0x1c@1+", "SNP_PAGE_RECLAIM:fail@2"]
    with simulated(faults=faults) as platform:
        first, second = launched(platform), launched(platform)
        first.update_pages()
        second.update_pages()
        probe = struct("kvm_enable_cap")
        assert first.ioctl(first.vm, lib.KVM_ENABLE_CAP, probe) == (-1, errno.EINVAL)
        assert second.ioctl(second.vm, lib.KVM_ENABLE_CAP, probe) == (-1, errno.EIO)


def test_page_that_could_not_be_reclaimed_is_not_asked_for_again():
    # sev_gmem_invalidate() only tries RMPUPDATE; firmware isn't asked.
    faults = ["SNP_LAUNCH_UPDATE:fw=0x1a", "SNP_PAGE_RECLAIM:fail"]
    with simulated(faults=faults) as platform:
        guest = launched(platform)
        guest.update_pages()
        issued = []
        status = platform._host.psp.status
        platform._host.psp.status = lambda name, call: issued.append(name) or status(name, call)
        platform.close(guest.gmem)
        assert issued == []


def test_faults_object_may_be_given_instead_of_texts():
    faults = Faults.parse(["KVM_GET_API_VERSION:errno=EIO"])
    with simulated(faults=faults) as platform:
        driver = Driver(platform)
        result = driver.ioctl(driver.open_kvm(), lib.KVM_GET_API_VERSION)
        assert result == (-1, errno.EIO)
