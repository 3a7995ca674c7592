"""The Recorder: what it notes, and that it changes nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

from kvmlaunch.kvm import Kvm
from kvmlaunch.uapi import (
    Call,
    MeasuredPage,
    Recorder,
    Result,
    RunResult,
    address_of,
    ffi,
    lib,
)
from tests.host import require_kvm

_UNREADABLE = 0x1000


class _Fake:
    """A platform that answers as told and keeps the arguments."""

    name = "fake"
    profile = "told"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answer = Result(0, 0)
        self.writes: Callable[[int], None] = lambda arg: None

    def __repr__(self) -> str:
        return "Fake()"

    def open(self, path: str, flags: int) -> Result:
        return self._keep("open", path, flags)

    def close(self, fd: int) -> Result:
        return self._keep("close", fd)

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
        self.writes(arg)
        return self._keep("ioctl", fd, request, arg)

    def mmap(self, fd: int, length: int, prot: int, flags: int, offset: int = 0) -> Result:
        return self._keep("mmap", fd, length, prot, flags, offset)

    def munmap(self, addr: int, length: int) -> Result:
        return self._keep("munmap", addr, length)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> Result:
        return self._keep("fallocate", fd, mode, offset, length)

    def run(self, fd: int, run: Any, uart: Any) -> RunResult:
        self._keep("run", fd, run, uart)
        return RunResult(self.answer.ret, self.answer.errno, True, 7)

    def measured_pages(self, vm_fd: int) -> list[MeasuredPage]:
        return [MeasuredPage(1, vm_fd, b"c", b"d")]

    def _keep(self, *call: Any) -> Result:
        self.calls.append(call)
        return self.answer


@pytest.fixture
def fake() -> _Fake:
    return _Fake()


@pytest.fixture
def calls() -> list[Call]:
    return []


@pytest.fixture
def recorder(fake: _Fake, calls: list[Call]) -> Recorder:
    return Recorder(fake, calls.append)


def _sev_command(command: int, data: int) -> Any:
    return ffi.new("struct kvm_sev_cmd *", {"id": command, "data": data, "sev_fd": 9})


def test_recorder_when_asked_has_the_name_of_what_it_wraps(recorder: Recorder) -> None:
    assert (recorder.name, recorder.profile, repr(recorder)) == (
        "fake",
        "told",
        "Recorder(Fake())",
    )


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("open", ("/dev/kvm", os.O_RDWR)),
        ("close", (3,)),
        ("ioctl", (3, lib.KVM_CREATE_VM, 4)),
        ("mmap", (3, 4096, 1, 2, 8192)),
        ("munmap", (0x7000, 4096)),
        ("fallocate", (3, 1, 4096, 8192)),
        ("run", (3, "page", "uart")),
    ],
)
@pytest.mark.parametrize("answer", [Result(12, 0), Result(-1, errno.EINTR)], ids=["ok", "EINTR"])
def test_call_when_recorded_passes_arguments_and_result_on(
    fake: _Fake, recorder: Recorder, method: str, args: tuple[Any, ...], answer: Result
) -> None:
    fake.answer = answer
    expected = RunResult(*answer, True, 7) if method == "run" else answer
    assert getattr(recorder, method)(*args) == expected
    assert fake.calls == [(method, *args)]


@pytest.mark.parametrize(
    ("method", "args", "name", "fd", "arg", "sent"),
    [
        ("open", ("/dev/kvm", os.O_RDWR), "open", -1, os.O_RDWR, {"path": "/dev/kvm"}),
        ("close", (3,), "close", 3, 0, {}),
        ("ioctl", (3, lib.KVM_CREATE_VM, 4), "KVM_CREATE_VM", 3, 4, {}),
        ("ioctl", (3, 0x1234, 5), "0x1234", 3, 5, {}),
        ("mmap", (3, 4096, 1, 2), "mmap", 3, 4096, {}),
        ("munmap", (0x7000, 4096), "munmap", -1, 0x7000, {}),
        ("fallocate", (3, 1, 4096, 8192), "fallocate", 3, 1, {"offset": 4096, "length": 8192}),
        ("run", (3, None, None), "KVM_RUN", 3, 0, {}),
    ],
)
def test_call_when_recorded_is_noted_once(
    fake: _Fake,
    recorder: Recorder,
    calls: list[Call],
    method: str,
    args: tuple[Any, ...],
    name: str,
    fd: int,
    arg: int,
    sent: dict[str, Any],
) -> None:
    fake.answer = Result(-1, errno.EPERM)
    getattr(recorder, method)(*args)
    (call,) = calls
    assert call == Call(name, fd, arg, -1, errno.EPERM, call.ns, sent=sent)


def test_measured_pages_when_asked_are_those_of_what_it_wraps(recorder: Recorder) -> None:
    assert recorder.measured_pages(5) == [MeasuredPage(1, 5, b"c", b"d")]


def test_duration_when_noted_is_not_negative(recorder: Recorder, calls: list[Call]) -> None:
    recorder.close(3)
    assert calls[0].ns >= 0


def test_struct_when_sent_is_noted_by_field(recorder: Recorder, calls: list[Call]) -> None:
    values = {"slot": 2, "flags": 4, "guest_phys_addr": 0x1000, "memory_size": 0x2000}
    region = ffi.new("struct kvm_userspace_memory_region *", values)
    recorder.ioctl(3, lib.KVM_SET_USER_MEMORY_REGION, address_of(region))
    assert calls[0].sent == {**values, "userspace_addr": 0}


def test_struct_when_it_has_padding_is_noted_without(recorder: Recorder, calls: list[Call]) -> None:
    create = ffi.new("struct kvm_create_guest_memfd *", {"size": 4096})
    recorder.ioctl(3, lib.KVM_CREATE_GUEST_MEMFD, address_of(create))
    assert calls[0].sent == {"size": 4096, "flags": 0}


def test_struct_when_it_holds_structs_and_arrays_is_noted_as_hex(
    recorder: Recorder, calls: list[Call]
) -> None:
    request = ffi.new("struct kvm_enable_cap *", {"cap": 7, "args": [1, 0x200]})
    recorder.ioctl(3, lib.KVM_ENABLE_CAP, address_of(request))
    assert calls[0].sent["args"] == "01000000000000000002000000000000" + "00" * 16


def test_struct_when_open_ended_is_noted_by_its_head(recorder: Recorder, calls: list[Call]) -> None:
    table = ffi.new("struct kvm_cpuid2 *", {"nent": 3, "entries": 3})
    recorder.ioctl(3, lib.KVM_SET_CPUID2, address_of(table))
    assert calls[0].sent == {"nent": 3}


def test_struct_when_the_kernel_writes_it_is_noted_before_and_after(
    fake: _Fake, recorder: Recorder, calls: list[Call]
) -> None:
    state = ffi.new("struct kvm_mp_state *", {"mp_state": 1})
    fake.writes = lambda arg: setattr(state, "mp_state", 3)
    recorder.ioctl(3, lib.KVM_GET_MP_STATE, address_of(state))
    assert (calls[0].sent, calls[0].received) == ({"mp_state": 1}, {"mp_state": 3})


def test_struct_when_recorded_is_not_changed(recorder: Recorder) -> None:
    regs = ffi.new("struct kvm_regs *")
    ffi.buffer(regs)[:] = bytes(range(144))
    recorder.ioctl(3, lib.KVM_SET_REGS, address_of(regs))
    assert bytes(ffi.buffer(regs)) == bytes(range(144))


def test_value_when_it_is_no_pointer_is_not_read(recorder: Recorder, calls: list[Call]) -> None:
    regs = ffi.new("struct kvm_regs *")
    recorder.ioctl(3, lib.KVM_CREATE_VCPU, address_of(regs))
    assert (calls[0].sent, calls[0].received) == ({}, {})


@pytest.mark.parametrize("address", [0, _UNREADABLE])
def test_struct_when_unreadable_is_left_out(
    fake: _Fake, recorder: Recorder, calls: list[Call], address: int
) -> None:
    fake.answer = Result(-1, errno.EFAULT)
    assert recorder.ioctl(3, lib.KVM_SET_REGS, address) == (-1, errno.EFAULT)
    assert calls[0].name == "KVM_SET_REGS"
    assert (calls[0].sent, calls[0].received) == ({}, {})


def test_sev_command_when_known_has_its_name_and_its_struct(
    recorder: Recorder, calls: list[Call]
) -> None:
    start = ffi.new("struct kvm_sev_snp_launch_start *", {"policy": 0x30000})
    command = _sev_command(lib.KVM_SEV_SNP_LAUNCH_START, address_of(start))
    recorder.ioctl(3, lib.KVM_MEMORY_ENCRYPT_OP, address_of(command))
    assert calls[0].name == "KVM_SEV_SNP_LAUNCH_START"
    assert calls[0].sent == {
        "id": lib.KVM_SEV_SNP_LAUNCH_START,
        "data": {"policy": 0x30000, "flags": 0},
        "error": 0,
        "sev_fd": 9,
    }


def test_sev_command_when_the_kernel_updates_its_struct_is_noted_before_and_after(
    fake: _Fake, recorder: Recorder, calls: list[Call]
) -> None:
    update = ffi.new("struct kvm_sev_snp_launch_update *", {"gfn_start": 1, "len": 8192})
    command = _sev_command(lib.KVM_SEV_SNP_LAUNCH_UPDATE, address_of(update))

    def one_page(arg: int) -> None:
        update.gfn_start, update.len = 2, 4096

    fake.writes = one_page
    recorder.ioctl(3, lib.KVM_MEMORY_ENCRYPT_OP, address_of(command))
    seen = [(data["gfn_start"], data["len"]) for data in _data(calls[0])]
    assert seen == [(1, 8192), (2, 4096)]


def _data(call: Call) -> list[Any]:
    return [call.sent["data"], call.received["data"]]


def test_sev_command_when_unknown_has_its_number(recorder: Recorder, calls: list[Call]) -> None:
    command = _sev_command(77, 0x123000)
    recorder.ioctl(3, lib.KVM_MEMORY_ENCRYPT_OP, address_of(command))
    assert (calls[0].name, calls[0].sent["data"]) == ("KVM_SEV_CMD_77", 0x123000)


def test_sev_command_when_its_data_is_unreadable_keeps_name_address_and_fw_error(
    fake: _Fake, recorder: Recorder, calls: list[Call]
) -> None:
    command = _sev_command(lib.KVM_SEV_SNP_LAUNCH_UPDATE, _UNREADABLE)
    fake.writes = lambda arg: setattr(command, "error", 22)
    recorder.ioctl(3, lib.KVM_MEMORY_ENCRYPT_OP, address_of(command))
    call = calls[0]
    assert (call.name, call.sent["data"], call.fw_error) == (
        "KVM_SEV_SNP_LAUNCH_UPDATE",
        _UNREADABLE,
        22,
    )


def test_sev_command_when_itself_unreadable_has_the_ioctls_name(
    recorder: Recorder, calls: list[Call]
) -> None:
    recorder.ioctl(3, lib.KVM_MEMORY_ENCRYPT_OP, _UNREADABLE)
    assert (calls[0].name, calls[0].fw_error) == ("KVM_MEMORY_ENCRYPT_OP", None)


def test_fw_error_when_the_device_answers_is_noted(
    fake: _Fake, recorder: Recorder, calls: list[Call]
) -> None:
    command = ffi.new("struct sev_issue_cmd *", {"cmd": lib.SNP_COMMIT})
    fake.writes = lambda arg: setattr(command, "error", 0x20)
    recorder.ioctl(3, lib.SEV_ISSUE_CMD, address_of(command))
    assert calls[0].fw_error == 0x20


def test_fw_error_when_call_has_none_is_none(recorder: Recorder, calls: list[Call]) -> None:
    regs = ffi.new("struct kvm_regs *")
    recorder.ioctl(3, lib.KVM_GET_REGS, address_of(regs))
    assert calls[0].fw_error is None


def test_recorder_when_wrapping_the_real_kernel_notes_what_it_answered(
    calls: list[Call],
) -> None:
    with Kvm.open(Recorder(require_kvm(), calls.append)) as kvm:
        version = kvm.api_version()
        vm = kvm.create_vm()
        vm.close()
    names = [call.name for call in calls]
    assert names == ["open", "KVM_GET_API_VERSION", "KVM_CREATE_VM", "close", "close"]
    assert (calls[1].ret, calls[2].ret >= 0) == (version, True)


def test_recorder_when_wrapping_the_real_kernel_sees_what_it_writes(calls: list[Call]) -> None:
    with (
        Kvm.open(Recorder(require_kvm(), calls.append)) as kvm,
        kvm.create_vm() as vm,
        vm.create_vcpu(0) as vcpu,
    ):
        rip = vcpu.get_regs()["rip"]
    (call,) = [call for call in calls if call.name == "KVM_GET_REGS"]
    assert (call.sent["rip"], call.received["rip"]) == (0, rip)
    assert rip == 0xFFF0
