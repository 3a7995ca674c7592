"""What a refused launch command says: the line that people search for, and the cause."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvmlaunch.errors import FirmwareError, IoctlPermissionError, VmDeadError
from kvmlaunch.snp import New, Started
from kvmlaunch.uapi import lib
from tests.idblock import id_auth, id_block

from .rig import (
    GPA,
    NORMAL,
    OTHER,
    PAGE,
    POLICY,
    Rig,
    first_line,
    one_page,
    other_fd,
    refused,
    snp_vm,
)

EPERM, EIO, EBADF, EBUSY, EINVAL, ENOTTY = 1, 5, 9, 16, 22, 25


# The line


def test_line_when_an_id_block_does_not_match_is_the_one_people_search_for() -> None:
    with snp_vm(slots=[(0, 4)]) as rig:
        block = id_block(OTHER)
        with refused(FirmwareError) as caught:
            one_page(rig).finish(id_block=block, id_auth=id_auth(block))
    assert first_line(caught.value) == "SNP_LAUNCH_FINISH ret=-5 fw_error=11 'Bad measurement'"


def test_line_when_a_start_is_refused_by_the_kernel_has_the_policy_behind() -> None:
    with snp_vm() as rig, refused() as caught:
        rig.started(0x70000)
    assert first_line(caught.value) == "SNP_LAUNCH_START ret=-22 fw_error=0 '' policy=0x70000"


def test_line_when_a_start_is_refused_by_the_firmware_has_its_text() -> None:
    with snp_vm() as rig, refused(FirmwareError) as caught:
        rig.started(0x3FFFF)
    assert first_line(caught.value) == (
        "SNP_LAUNCH_START ret=-5 fw_error=7 'Policy is not allowed' policy=0x3ffff"
    )


def test_line_when_an_update_is_refused_has_gpa_and_type_behind() -> None:
    with snp_vm() as rig:
        state = rig.started()
        state.update(GPA, NORMAL, rig.source.address, PAGE)
        with refused() as caught:
            state.update(GPA, NORMAL, rig.source.address, PAGE)
    assert first_line(caught.value) == (
        "SNP_LAUNCH_UPDATE ret=-5 fw_error=0 '' gpa=0x100000 type=0x1"
    )


def test_line_when_the_firmware_was_not_called_says_so() -> None:
    with snp_vm(faults=["SNP_LAUNCH_UPDATE:fw=0xffffffff"]) as rig, refused() as caught:
        rig.started().update(GPA, NORMAL, rig.source.address, PAGE)
    assert "fw_error=4294967295 'firmware was not called'" in first_line(caught.value)
    assert not isinstance(caught.value, FirmwareError)


def test_line_when_the_firmware_word_is_unknown_shows_the_number() -> None:
    with snp_vm(faults=["SNP_LAUNCH_UPDATE:fw=0x8003"]) as rig, refused(FirmwareError) as caught:
        rig.started().update(GPA, NORMAL, rig.source.address, PAGE)
    assert caught.value.fw_error == 0x8003
    assert "fw_error=32771 'unknown error'" in first_line(caught.value)
    assert "0x8003" in caught.value.explanation


def test_error_when_refused_keeps_errno_word_and_fields() -> None:
    with snp_vm(faults=["SNP_LAUNCH_UPDATE:fw=0x1c"]) as rig, refused(FirmwareError) as caught:
        rig.started().update(GPA, NORMAL, rig.source.address, PAGE)
    error = caught.value
    assert (error.ioctl, error.errno, error.fw_error, error.fields) == (
        "KVM_SEV_SNP_LAUNCH_UPDATE",
        EIO,
        0x1C,
        {"gpa": GPA, "type": NORMAL},
    )


def test_error_when_refused_is_an_os_error() -> None:
    with snp_vm() as rig, pytest.raises(OSError, match="policy") as caught:
        rig.started(0x70000)
    assert caught.value.errno == EINVAL


def test_error_when_pickled_keeps_its_text() -> None:
    with snp_vm() as rig, refused() as caught:
        rig.started(0x70000)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


# INIT2


def init_again(rig: Rig) -> None:
    rig.new()
    rig.new()


def init_after_vcpu(rig: Rig) -> None:
    rig.add_vcpu()
    rig.new()


INIT_ROWS = [
    (init_again, (), EPERM, "has been done already"),
    (init_after_vcpu, (), EINVAL, "a vCPU exists"),
    (lambda rig: rig.new(vmsa_features=1), (), EINVAL, "vmsa_features 0x1 "),
    (lambda rig: rig.new(vmsa_features=0x4), (), EINVAL, "vmsa_features 0x4 "),
    (lambda rig: rig.new(vmsa_features=0x8), (), EINVAL, "0x8 (bit 3 restricted_injection)"),
    (lambda rig: rig.new(vmsa_features=0x10), (), EINVAL, "0x10 (bit 4 alternate_injection)"),
    (lambda rig: rig.new(ghcb_version=3), (), EINVAL, "the GHCB version"),
    (Rig.new, ("INIT2:errno=ENOTTY",), ENOTTY, "no ASID is configured"),
    (Rig.new, ("INIT2:errno=EBUSY",), EBUSY, "No ASID is free"),
]


@pytest.mark.parametrize(("act", "faults", "number", "text"), INIT_ROWS)
def test_init2_when_refused_says_why(
    act: Callable[[Rig], Any], faults: tuple[str, ...], number: int, text: str
) -> None:
    with snp_vm(faults=faults) as rig, refused() as caught:
        act(rig)
    assert caught.value.errno == number
    assert text in caught.value.explanation


def test_init2_when_done_already_is_a_permission_error() -> None:
    with snp_vm() as rig, pytest.raises(IoctlPermissionError):
        init_again(rig)


def test_init2_when_no_asid_is_left_names_the_cgroup() -> None:
    with snp_vm(faults=["INIT2:errno=EBUSY"]) as rig, refused() as caught:
        rig.new()
    assert "/sys/fs/cgroup/misc" in caught.value.explanation


# START


POLICY_ROWS = [
    ("6.12", 0x10000, "bit 17 must be 1"),
    ("6.12", 0x300000, "bit 17 must be 1"),
    ("6.18", 0x10000, "bit 17 must be 1"),
    ("7.0", 0x10000, "bit 17 must be 1"),
    ("6.12", 0x20000, "bit 16"),
    ("6.12", 0x130000, "bit 20"),
    ("6.12", 0x70000, "does not accept bit 18"),
    ("6.18", 0x60000, "does not accept bit 18; kernels before 6.17 want bit 16"),
    ("6.18", 0x70000, "does not accept bit 18"),
    ("7.0", 0x70000, "does not accept bit 18"),
    ("6.12", 0x230000, "does not accept bit 21"),
    ("6.12", 1 << 63 | 0x30000, "does not accept bit 63"),
    ("6.12", 0x4070000, "does not accept bit 18, 26"),
]


@pytest.mark.parametrize(("profile", "policy", "text"), POLICY_ROWS)
def test_start_when_the_kernel_refuses_the_policy_names_the_bit(
    profile: str, policy: int, text: str
) -> None:
    with snp_vm(profile) as rig, refused() as caught:
        rig.started(policy)
    assert caught.value.errno == EINVAL
    assert f"{policy:#x}" in caught.value.explanation
    assert text in caught.value.explanation


@pytest.mark.parametrize("policy", [0x70000, 0x20000])
def test_start_when_the_kernel_refuses_the_policy_says_that_firmware_did_not_see_it(
    policy: int,
) -> None:
    with snp_vm() as rig, refused() as caught:
        rig.started(policy)
    assert "before the firmware saw it" in caught.value.explanation


def test_start_when_smt_is_not_allowed_is_the_firmwares_business_since_6_17() -> None:
    with snp_vm("6.18") as rig, refused(FirmwareError) as caught:
        rig.started(0x20000)
    assert caught.value.fw_error == 7
    assert "SMT" in caught.value.explanation


def test_start_when_done_already_says_so() -> None:
    with snp_vm() as rig:
        rig.started()
        with refused() as caught:
            New(rig.vm, rig.sev).start(POLICY)
    assert caught.value.errno == EINVAL
    assert "has been done already" in caught.value.explanation


def test_start_when_init2_is_missing_names_it() -> None:
    with snp_vm() as rig, refused() as caught:
        New(rig.vm, rig.sev).start(POLICY)
    assert caught.value.errno == ENOTTY
    assert "KVM_SEV_INIT2 has not been done" in caught.value.explanation


def test_start_when_the_vm_is_plain_says_that_it_is_no_snp_guest() -> None:
    with snp_vm(slots=[], vm_type=lib.KVM_X86_DEFAULT_VM) as rig, refused() as caught:
        New(rig.vm, rig.sev).start(POLICY)
    assert "no SNP guest" in caught.value.explanation


def test_start_when_the_descriptor_is_not_dev_sev_says_so() -> None:
    with snp_vm() as rig:
        rig.new()
        with refused() as caught:
            New(rig.vm, other_fd(rig)).start(POLICY)
    assert caught.value.errno == ENOTTY
    assert "not an open /dev/sev" in caught.value.explanation


def test_start_when_firmware_makes_no_context_names_the_command_and_the_cause() -> None:
    with snp_vm(faults=["SNP_GCTX_CREATE:fw=0x17"]) as rig, refused(FirmwareError) as caught:
        rig.started()
    assert (caught.value.errno, caught.value.fw_error) == (ENOTTY, 0x17)
    assert "GCTX_CREATE" in caught.value.explanation
    assert "no room for another guest" in caught.value.explanation


def test_start_when_activation_fails_has_the_firmwares_advice() -> None:
    with snp_vm(faults=["SNP_ACTIVATE:fw=0x0d"]) as rig, refused(FirmwareError) as caught:
        rig.started()
    assert caught.value.fw_text == "Invalid ASID"
    assert "ASID is out of the range" in caught.value.explanation


def test_start_when_firmware_refused_it_can_be_repeated() -> None:
    with snp_vm(faults=["SNP_LAUNCH_START:fw=0x07"]) as rig:
        state = rig.new()
        with refused(FirmwareError):
            state.start(POLICY)
        assert state.start(POLICY).state == "Started"


# UPDATE


def test_update_when_the_page_was_launched_before_names_overlap_first() -> None:
    with snp_vm() as rig:
        state = rig.started()
        state.update(GPA, NORMAL, rig.source.address, PAGE)
        with refused() as caught:
            state.update(GPA, NORMAL, rig.source.address, PAGE, what="page 0 of image")
    text = caught.value.explanation
    assert "page 0 of image" in text
    assert text.index("launched already") < text.index("not set private")


def test_update_when_the_page_is_not_private_names_the_attribute() -> None:
    with snp_vm(private=False) as rig, refused() as caught:
        rig.started().update(GPA, NORMAL, rig.source.address, PAGE)
    assert (caught.value.errno, caught.value.fw_error) == (EIO, 0)
    assert "KVM_SET_MEMORY_ATTRIBUTES" in caught.value.explanation


def test_update_when_there_is_no_slot_names_it() -> None:
    with snp_vm(slots=[]) as rig, refused() as caught:
        rig.started().update(GPA, NORMAL, rig.source.address, PAGE)
    assert caught.value.errno == EINVAL
    assert "no memory slot with guest_memfd" in caught.value.explanation


def test_update_when_start_is_missing_names_it() -> None:
    with snp_vm() as rig:
        rig.new()
        with refused() as caught:
            Started(rig.vm, rig.sev).update(GPA, NORMAL, rig.source.address, PAGE)
    assert caught.value.errno == EINVAL
    assert "no SNP_LAUNCH_START yet" in caught.value.explanation


@pytest.mark.parametrize(("type_", "name"), [(2, "2 (VMSA)"), (7, "7"), (0, "0")])
def test_update_when_the_page_type_is_refused_names_it(type_: int, name: str) -> None:
    with snp_vm() as rig, refused() as caught:
        rig.started().update(GPA, type_, rig.source.address, PAGE)
    assert f"page type {name}." in caught.value.explanation
    assert ("sev_features aren't the VM's" in caught.value.explanation) == (type_ == 2)


def test_update_when_the_descriptor_is_not_dev_sev_says_so() -> None:
    with snp_vm() as rig:
        rig.started()
        with refused() as caught:
            Started(rig.vm, other_fd(rig)).update(GPA, NORMAL, rig.source.address, PAGE)
    assert (caught.value.errno, caught.value.fw_error) == (EIO, 0)
    assert "not an open /dev/sev" in caught.value.explanation


def test_update_when_firmware_refuses_the_page_has_its_advice() -> None:
    with snp_vm(faults=["SNP_LAUNCH_UPDATE:fw=0x1a"]) as rig, refused(FirmwareError) as caught:
        rig.started().update(GPA, NORMAL, rig.source.address, PAGE, what="page 3 of image")
    assert caught.value.fw_text == "RMP page state is incorrect"
    assert caught.value.explanation.startswith("Page: page 3 of image. ")
    assert "not free for the launch" in caught.value.explanation


@pytest.fixture
def dead() -> Iterator[tuple[Rig, Started]]:
    """A VM that the kernel killed: firmware refused a page and would not give it back."""
    faults = ["SNP_LAUNCH_UPDATE:fw=0x1a", "SNP_PAGE_RECLAIM:fail"]
    with snp_vm(faults=faults) as rig:
        state = rig.started()
        with pytest.raises(VmDeadError) as caught:
            state.update(GPA, NORMAL, rig.source.address, PAGE)
        # The refusal that made the kernel take the page back is not lost.
        assert (caught.value.fw_error, caught.value.fw_text) == (
            0x1A,
            "RMP page state is incorrect",
        )
        yield rig, state


def test_update_when_the_vm_is_dead_says_so(dead: tuple[Rig, Started]) -> None:
    rig, state = dead
    with pytest.raises(VmDeadError, match="killed this VM") as caught:
        state.update(GPA + PAGE, NORMAL, rig.source.address, PAGE)
    assert caught.value.errno == EIO
    assert caught.value.fields["gpa"] == GPA + PAGE


def test_finish_when_the_vm_is_dead_says_so(dead: tuple[Rig, Started]) -> None:
    with pytest.raises(VmDeadError, match="killed this VM"):
        dead[1].finish()


def test_update_when_the_vm_lives_is_no_dead_vm_error() -> None:
    with snp_vm(private=False) as rig, refused() as caught:
        rig.started().update(GPA, NORMAL, rig.source.address, PAGE)
    assert not isinstance(caught.value, VmDeadError)
