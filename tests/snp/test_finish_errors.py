"""What a refused SNP_LAUNCH_FINISH says: whose digest, policy or signature it is, and what now."""

from __future__ import annotations

import pytest

from kvmlaunch.errors import FirmwareError, FormatError
from kvmlaunch.snp import Started
from tests.idblock import id_auth, id_block

from .rig import LD, OTHER, one_page, other_fd, refused, snp_vm

EBADF, EINVAL = 9, 22
SPENT = "can't be used any more"


def finish_with(
    block: bytes, auth: bytes | None = None, *, digest: bytes | None = None, vcpus: int = 0
) -> FirmwareError:
    with snp_vm(slots=[(0, 4)]) as rig:
        state = one_page(rig)
        for number in range(vcpus):
            rig.add_vcpu(number)
        with pytest.raises(FirmwareError) as caught:
            state.finish(
                id_block=block, id_auth=auth or id_auth(block), auth_key=False, digest=digest
            )
    return caught.value


def test_finish_when_the_digest_differs_shows_that_of_the_id_block() -> None:
    assert OTHER.hex() in str(finish_with(id_block(OTHER)))


def test_finish_when_the_digest_differs_shows_the_predicted_one() -> None:
    assert LD.hex() in str(finish_with(id_block(OTHER), digest=LD))


def test_finish_when_the_digest_differs_says_that_the_vm_is_spent() -> None:
    assert SPENT in finish_with(id_block(OTHER)).explanation


def test_finish_when_the_policy_of_the_id_block_differs_is_a_policy_failure() -> None:
    error = finish_with(id_block(LD, policy=0xB0000))
    assert error.fw_error == 7
    assert "another policy than the launch" in error.explanation


def test_finish_when_the_id_authentication_is_empty_tells_that_the_digest_is_right() -> None:
    error = finish_with(id_block(LD), bytes(4096))
    assert error.fw_error == 0x16
    assert "digest and policy of the ID block are right" in error.explanation


def test_finish_when_the_signature_is_wrong_says_so() -> None:
    block = id_block(LD)
    error = finish_with(block, id_auth(block, id_block_sig=bytes(512)))
    assert error.fw_error == 0x0A
    assert "signature" in error.explanation


def test_finish_when_the_id_block_is_right_and_signed_succeeds() -> None:
    block = id_block(LD)
    with snp_vm(slots=[(0, 4)]) as rig:
        state = one_page(rig).finish(id_block=block, id_auth=id_auth(block))
        assert state.state == "Finished"


def test_finish_when_an_author_key_counts_and_is_right_succeeds() -> None:
    block = id_block(LD)
    with snp_vm(slots=[(0, 4)]) as rig:
        auth = id_auth(block, author=True)
        assert one_page(rig).finish(id_block=block, id_auth=auth, auth_key=True)


def test_finish_when_done_twice_behind_the_types_is_explained() -> None:
    with snp_vm() as rig:
        state = rig.started()
        rig.add_vcpu()
        state.finish()
        with refused() as caught:
            Started(rig.vm, rig.sev).finish()
    assert caught.value.errno == EINVAL
    assert "Already finished" in caught.value.explanation


def test_finish_when_dr7_has_a_breakpoint_names_dr7() -> None:
    with snp_vm() as rig:
        state = rig.started()
        rig.add_vcpu().set_debugregs({"dr7": 0x401})
        with refused() as caught:
            state.finish()
    assert caught.value.errno == EINVAL
    assert "DR7" in caught.value.explanation


def test_finish_when_a_vcpu_is_being_created_says_so() -> None:
    with snp_vm(faults=["SNP_LAUNCH_FINISH:errno=EBUSY"]) as rig, refused() as caught:
        rig.started().finish()
    assert "being created" in caught.value.explanation
    assert SPENT not in caught.value.explanation


def test_finish_when_the_descriptor_of_start_is_closed_says_so() -> None:
    with snp_vm() as rig:
        state = rig.started()
        rig.sev.close()
        state.sev = other_fd(rig)
        with refused() as caught:
            state.finish()
    assert caught.value.errno == EBADF
    assert "/dev/sev" in caught.value.explanation
    assert SPENT in caught.value.explanation


def test_finish_when_firmware_has_another_objection_has_its_advice() -> None:
    with snp_vm(faults=["SNP_LAUNCH_FINISH:fw=0x02"]) as rig, refused(FirmwareError) as caught:
        rig.started().finish()
    assert "not in the state that the command needs" in caught.value.explanation
    assert SPENT in caught.value.explanation


SIZES = [
    ({"host_data": bytes(31)}, "host data is 32 bytes, not 31"),
    ({"host_data": bytes(33)}, "host data is 32 bytes, not 33"),
    ({"id_block": bytes(95), "id_auth": bytes(4096)}, "the ID block is 96 bytes, not 95"),
    ({"id_block": bytes(96), "id_auth": bytes(4095)}, "ID authentication is 4096 bytes, not 4095"),
    ({"id_block": bytes(96)}, "ID authentication is 4096 bytes, not 0"),
    ({"id_auth": bytes(4096)}, "the ID block is 96 bytes, not 0"),
]


@pytest.mark.parametrize(("parts", "text"), SIZES)
def test_finish_when_a_part_has_the_wrong_size_is_refused_before_the_vm_is_spent(
    parts: dict[str, bytes], text: str
) -> None:
    with snp_vm() as rig:
        state = rig.started()
        with pytest.raises(FormatError, match=text):
            state.finish(**parts)  # type: ignore[arg-type]
        assert rig.count("KVM_SEV_SNP_LAUNCH_FINISH") == 0
