"""SNP_LAUNCH_FINISH and what is left afterwards (kernel-snp-abi 3.5, 3.6)."""

from __future__ import annotations

import errno
import threading

import pytest

from kvmlaunch.uapi import lib

from .driver import PAGE, Guest, Memory, launched, simulated, struct

MARK = 0xABCD1234
EINVAL = (-1, errno.EINVAL)
EIO = (-1, errno.EIO)
EFAULT = (-1, errno.EFAULT)
EBADF = (-1, errno.EBADF)
OK = (0, 0)
VMSA_GPA = 0xFFFFFFFFF000


@pytest.fixture
def guest():
    with simulated() as platform:
        yield launched(platform)


def protected(guest, vcpu=0):
    """Whether the kernel refuses to show the registers."""
    return guest.ioctl(guest.vcpus[vcpu], lib.KVM_GET_REGS, struct("kvm_regs")) == EINVAL


def test_finish_when_good_is_0_and_error_is_firmwares(guest):
    assert guest.finish(error=MARK) == (OK, 0)
    assert protected(guest)


@pytest.mark.parametrize("vm_type", [0, 4])
def test_finish_before_init2_is_enotty_before_its_struct_is_read(vm_type):
    with simulated() as platform:
        guest = Guest(platform, init=False, vm_type=vm_type)
        command = lib.KVM_SEV_SNP_LAUNCH_FINISH
        result = guest.sev(guest.vm, command, 8, guest.sev_fd, MARK)
        assert result == ((-1, errno.ENOTTY), MARK)


def test_finish_before_start_is_einval_before_its_struct_is_read():
    with simulated() as platform:
        guest = Guest(platform)
        command = lib.KVM_SEV_SNP_LAUNCH_FINISH
        assert guest.sev(guest.vm, command, 8, guest.sev_fd, MARK) == (EINVAL, MARK)


def test_finish_with_unreadable_struct_is_efault_and_harmless(guest):
    command = lib.KVM_SEV_SNP_LAUNCH_FINISH
    assert guest.sev(guest.vm, command, 8, guest.sev_fd, MARK) == (EFAULT, MARK)
    assert not protected(guest)


@pytest.mark.parametrize("bit", range(16))
def test_finish_with_flag_is_einval_and_harmless(guest, bit):
    assert guest.finish(flags=1 << bit, error=MARK) == (EINVAL, MARK)
    assert not protected(guest)
    assert guest.finish()[0] == OK


def test_finish_while_vcpu_is_created_is_ebusy_on_order():
    with simulated(faults=["SNP_LAUNCH_FINISH:errno=EBUSY"]) as platform:
        guest = launched(platform)
        assert guest.finish(error=MARK) == ((-1, errno.EBUSY), MARK)
        assert guest.finish()[0] == OK


def test_finish_measures_vmsas_in_creation_order(guest):
    second = guest.add_vcpu(7)
    third = guest.add_vcpu(3)
    for fd, rip in ((second, 0x7000), (third, 0x3000)):
        regs = guest.get(fd, lib.KVM_GET_REGS)
        regs.rip = rip
        guest.ok(guest.ioctl(fd, lib.KVM_SET_REGS, regs))
    guest.ok(guest.finish()[0])
    pages = guest.platform.measured_pages(guest.vm)
    assert [(page.type, page.gpa) for page in pages] == [(2, VMSA_GPA)] * 3
    assert len({page.contents for page in pages}) == 3


def test_finish_without_vcpus_measures_memory_only():
    with simulated() as platform:
        guest = launched(platform, vcpus=0)
        guest.ok(guest.update_pages()[0])
        before = guest.digest
        assert guest.finish() == (OK, 0)
        assert guest.digest == before


@pytest.mark.parametrize("profile", ["6.12", "6.18", "7.0"])
def test_second_finish_with_vcpus_is_einval(profile):
    with simulated(profile) as platform:
        guest = launched(platform)
        guest.ok(guest.finish()[0])
        assert guest.finish(error=MARK) == (EINVAL, MARK)


def test_second_finish_without_vcpus_is_firmwares_answer():
    with simulated() as platform:
        guest = launched(platform, vcpus=0)
        guest.ok(guest.finish()[0])
        assert guest.finish(error=MARK) == (EIO, 2)


@pytest.mark.parametrize("dr7", [0, 0x401, 0x400 | 1 << 31])
def test_finish_with_dr7_in_use_is_einval_when_bits_beside_0x400(guest, dr7):
    regs = guest.get(guest.vcpus[0], lib.KVM_GET_DEBUGREGS)
    regs.dr7 = dr7
    guest.ok(guest.ioctl(guest.vcpus[0], lib.KVM_SET_DEBUGREGS, regs))
    expected = (EINVAL, MARK) if dr7 & ~0x400 else (OK, 0)
    assert guest.finish(error=MARK) == expected


def test_finish_with_guest_debug_is_einval(guest):
    debug = struct("kvm_guest_debug", control=1)
    guest.ok(guest.ioctl(guest.vcpus[0], lib.KVM_SET_GUEST_DEBUG, debug))
    assert guest.finish(error=MARK) == (EINVAL, MARK)


def test_finish_when_firmware_refuses_second_vmsa_leaves_the_first_encrypted():
    with simulated(faults=["SNP_LAUNCH_UPDATE:fw=0x17@2"]) as platform:
        guest = launched(platform, vcpus=2)
        assert guest.finish(error=MARK) == (EIO, 0x17)
        assert (protected(guest, 0), protected(guest, 1)) == (True, False)
        assert guest.finish(error=MARK) == (EINVAL, MARK)


def test_finish_when_firmware_refuses_first_vmsa_may_be_tried_again():
    with simulated(faults=["SNP_LAUNCH_UPDATE:fw=0x17"]) as platform:
        guest = launched(platform)
        assert guest.finish() == (EIO, 0x17)
        assert guest.finish() == (OK, 0)


def test_finish_when_vmsa_cannot_be_reclaimed_kills_the_vm():
    faults = ["SNP_LAUNCH_UPDATE:fw=0x17", "SNP_PAGE_RECLAIM:fail"]
    with simulated(faults=faults) as platform:
        guest = launched(platform)
        assert guest.finish(error=MARK) == (EIO, 0x17)
        assert guest.finish(error=MARK) == (EIO, MARK)


@pytest.mark.parametrize("sev_fd", [0, 99999])
def test_finish_without_sev_fd_is_ebadf_at_the_first_vmsa(guest, sev_fd):
    assert guest.finish(sev_fd=sev_fd, error=MARK) == (EBADF, MARK)
    assert not protected(guest)
    assert guest.finish() == (OK, 0)


def test_finish_without_vcpus_does_not_look_at_its_own_sev_fd():
    with simulated() as platform:
        guest = launched(platform, vcpus=0)
        assert guest.finish(sev_fd=0) == (OK, 0)


def test_finish_when_fd_of_start_is_closed_is_ebadf_after_the_vmsas(guest):
    other = guest.open_sev()
    guest.platform.close(guest.sev_fd)
    assert guest.finish(sev_fd=other, error=MARK) == (EBADF, 0)
    assert protected(guest)


def test_finish_when_fd_of_start_was_reopened_under_its_number_works(guest):
    guest.platform.close(guest.sev_fd)
    assert guest.open_sev() == guest.sev_fd
    assert guest.finish() == (OK, 0)


# ID block


def with_blobs(**fields):
    return {"id_block_en": 1, **fields}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, EINVAL),
        ({"id_block_uaddr": 8}, EFAULT),
        ({"id_auth_uaddr": 8}, EINVAL),
    ],
)
def test_finish_with_bad_id_block_address_has_encrypted_already(guest, fields, expected):
    assert guest.finish(error=MARK, **with_blobs(**fields)) == (expected, 0)
    assert protected(guest)


@pytest.mark.parametrize(("auth", "expected"), [(0, EINVAL), (8, EFAULT)])
def test_finish_with_id_block_needs_id_auth(guest, auth, expected):
    blob = Memory(PAGE)
    fields = with_blobs(id_block_uaddr=blob.address, id_auth_uaddr=auth)
    assert guest.finish(**fields) == (expected, 0)


def test_finish_with_unsigned_id_block_is_firmwares_answer(guest):
    blob = Memory(2 * PAGE)
    fields = with_blobs(id_block_uaddr=blob.address, id_auth_uaddr=blob.address + PAGE)
    result, error = guest.finish(error=MARK, **fields)
    assert result == EIO
    assert error in (0x07, 0x0A, 0x0B, 0x16)


def test_finish_with_author_key_but_no_id_block_works(guest):
    assert guest.finish(auth_key_en=1, id_block_uaddr=8, id_auth_uaddr=8) == (OK, 0)


def test_finish_when_firmware_refuses_is_eio_with_its_word():
    with simulated(faults=["SNP_LAUNCH_FINISH:fw=0xb"]) as platform:
        guest = launched(platform)
        assert guest.finish(error=MARK) == (EIO, 0xB)
        assert protected(guest)
        assert guest.finish(error=MARK) == (EINVAL, MARK)


# afterwards


@pytest.mark.parametrize(
    "name",
    ["REGS", "SREGS", "SREGS2", "DEBUGREGS", "XCRS"],
)
@pytest.mark.parametrize("verb", ["GET", "SET"])
def test_register_ioctl_after_finish_is_einval(guest, verb, name):
    guest.ok(guest.finish()[0])
    request = getattr(lib, f"KVM_{verb}_{name}")
    args = struct(f"kvm_{name.lower()}")
    assert guest.ioctl(guest.vcpus[0], request, args) == EINVAL


# kvm_arch_vcpu_ioctl(): only SET_SREGS2 looks at the vCPU before it reads the struct.
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("REGS", errno.EFAULT),
        ("SREGS", errno.EFAULT),
        ("SREGS2", errno.EINVAL),
        ("DEBUGREGS", errno.EFAULT),
        ("XCRS", errno.EFAULT),
    ],
)
def test_set_with_a_null_struct_after_finish(guest, name, code):
    guest.ok(guest.finish()[0])
    assert guest.ioctl(guest.vcpus[0], getattr(lib, f"KVM_SET_{name}")) == (-1, code)


def test_guest_debug_after_finish_is_einval(guest):
    guest.ok(guest.finish()[0])
    debug = struct("kvm_guest_debug")
    assert guest.ioctl(guest.vcpus[0], lib.KVM_SET_GUEST_DEBUG, debug) == EINVAL


@pytest.mark.parametrize("name", ["FPU", "XSAVE", "MP_STATE", "VCPU_EVENTS"])
def test_state_that_kvm_keeps_is_readable_after_finish(guest, name):
    guest.ok(guest.finish()[0])
    args = struct(f"kvm_{name.lower()}")
    assert guest.ioctl(guest.vcpus[0], getattr(lib, f"KVM_GET_{name}"), args) == OK


def test_memory_ioctls_after_finish_are_allowed(guest):
    guest.ok(guest.finish()[0])
    assert guest.set_attributes(guest.GPA, PAGE, 0) == OK
    assert guest.platform.fallocate(guest.gmem, 3, 0, PAGE) == OK
    assert guest.set_region(memory_size=0) == OK


# kvm_handle_noslot_fault(): a private frame is a memory fault, a shared one would be MMIO.
@pytest.mark.parametrize(("private", "code"), [(True, errno.EFAULT), (False, errno.ENOENT)])
def test_pre_fault_without_a_slot(guest, private, code):
    guest.ok(guest.finish()[0])
    guest.ok(guest.set_attributes(0x900000, PAGE, 8 if private else 0))
    args = struct("kvm_pre_fault_memory", gpa=0x900000, size=PAGE)
    assert guest.ioctl(guest.vcpus[0], lib.KVM_PRE_FAULT_MEMORY, args) == (-1, code)


def test_pre_fault_of_shared_memory_that_is_not_there_is_efault(guest):
    guest.ok(guest.finish()[0])
    place = {"guest_phys_addr": 0x900000, "memory_size": PAGE, "userspace_addr": 0}
    guest.ok(guest.set_region(slot=7, **place))
    args = struct("kvm_pre_fault_memory", gpa=0x900000, size=PAGE)
    assert guest.ioctl(guest.vcpus[0], lib.KVM_PRE_FAULT_MEMORY, args) == (-1, errno.EFAULT)


def test_pre_fault_is_eopnotsupp_before_and_allowed_after_finish(guest):
    args = struct("kvm_pre_fault_memory", gpa=guest.GPA, size=2 * PAGE)
    vcpu = guest.vcpus[0]
    result = guest.ioctl(vcpu, lib.KVM_PRE_FAULT_MEMORY, args)
    assert result == (-1, errno.EOPNOTSUPP)
    guest.ok(guest.finish()[0])
    assert guest.ioctl(vcpu, lib.KVM_PRE_FAULT_MEMORY, args) == OK
    assert (args.gpa, args.size) == (guest.GPA + 2 * PAGE, 0)


def test_vcpu_made_after_finish_cannot_be_run(guest):
    guest.ok(guest.finish()[0])
    late = guest.add_vcpu(1)
    run = guest.mmap_run(late)
    assert guest.ioctl(late, lib.KVM_RUN) == OK
    assert run.exit_reason == lib.KVM_EXIT_FAIL_ENTRY


def test_finish_on_7_0_waits_for_the_vcpus():
    with simulated("7.0") as platform:
        guest = launched(platform)
        mutex = platform._host.fds.get(guest.vcpus[0]).vcpu.mutex
        results = []
        thread = threading.Thread(target=lambda: results.append(guest.finish()))
        with mutex:
            thread.start()
            thread.join(0.05)
            assert results == []
            # Other ioctls of the VM go on meanwhile.
            assert guest.ioctl(guest.vm, lib.KVM_CHECK_EXTENSION, 3).ret == 1
        thread.join(10)
        assert results == [(OK, 0)]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"flags": 1, "id_block_en": 1}, EINVAL),
        ({"flags": 1, "sev_fd": 0}, EINVAL),
        ({"id_block_en": 1, "sev_fd": 0}, EBADF),
    ],
)
def test_finish_with_two_faults_gives_the_earlier_one(guest, fields, expected):
    assert guest.finish(error=MARK, **fields) == (expected, MARK)
