"""What an exception of a failed call carries."""

from __future__ import annotations

import copy
import errno
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from kvmlaunch.abi.fwstatus import FwStatus
from kvmlaunch.errors import (
    ClosedError,
    FirmwareError,
    FormatError,
    ImageError,
    IoctlError,
    IoctlPermissionError,
    KvmLaunchError,
    LaunchStateError,
    MissingCapability,
    VmDeadError,
)
from kvmlaunch.kvm import Kvm, SevDevice, Vm
from kvmlaunch.kvm.calls import ioctl_error
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import Result, RunResult, address_of, ffi, lib
from tests.host import require_kvm
from tests.kvm.machines import PAGE, Denying, machine, started
from tests.kvm.methods import METHODS, Method, World, world


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as exits:
        yield exits


class _Kernel(Denying):
    """A simulated host; ``errnos`` orders failures from now on, by name ("*" = all)."""

    def __init__(self) -> None:
        self.errnos: dict[str, int] = {}
        super().__init__(SimPlatform(), self._errno)

    def run(self, fd: int, run: Any, uart: Any) -> RunResult:
        wrong = self._errno("KVM_RUN")
        return RunResult(-1 if wrong else 0, wrong, False, 1)

    def _errno(self, name: str) -> int:
        return self.errnos.get(name, self.errnos.get("*", 0))


@pytest.fixture
def kernel() -> _Kernel:
    return _Kernel()


@pytest.fixture
def opened(kernel: _Kernel, stack: ExitStack) -> World:
    return world(kernel, stack)


def _failure(call: Callable[[], Any]) -> IoctlError:
    with pytest.raises(IoctlError) as caught:
        call()
    return caught.value


# Those that give the result instead, or answer without raising.
_UNCHECKED = {"ioctl_raw", "is_dead", "sev_command_raw", "device_attr", "vmsa_features"}
_CHECKED = [m for m in METHODS if m.sees and m.name not in _UNCHECKED]
_TITLES = {"mmap": "mmap of the run page", "fallocate": "fallocate guest_memfd"}
_DEVICE_COMMANDS = {
    "platform_status": "SEV_PLATFORM_STATUS",
    "snp_platform_status": "SNP_PLATFORM_STATUS",
    "set_config": "SNP_SET_CONFIG",
    "commit": "SNP_COMMIT",
    "load_vlek": "SNP_VLEK_LOAD",
}


@pytest.mark.parametrize("method", _CHECKED, ids=str)
def test_method_when_its_ioctl_fails_names_it_with_errno(
    kernel: _Kernel, opened: World, method: Method
) -> None:
    kernel.errnos[method.sees[0]] = errno.ENOSPC
    error = _failure(lambda: method.call(opened))
    name = _DEVICE_COMMANDS.get(method.name) or _TITLES.get(method.sees[0], method.sees[0])
    assert (error.ioctl, error.errno) == (name, errno.ENOSPC)


@pytest.mark.parametrize("method", _CHECKED, ids=str)
@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES], ids=["EPERM", "EACCES"])
def test_method_when_permission_is_denied_is_permission_error(
    kernel: _Kernel, opened: World, method: Method, number: int
) -> None:
    kernel.errnos[method.sees[0]] = number
    error = _failure(lambda: method.call(opened))
    assert isinstance(error, IoctlPermissionError)
    assert isinstance(error, PermissionError)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("check_extension", {"cap": 3}),
        ("create_vm", {"type": 0}),
        ("supported_cpuid", {"nent": 128}),
        ("enable_cap", {"cap": lib.KVM_CAP_EXIT_HYPERCALL}),
        ("create_vcpu", {"vcpu": 1}),
        ("create_guest_memfd", {"size": PAGE}),
        ("set_user_memory_region", {"slot": 1, "gpa": 0x10000, "size": PAGE, "flags": 0}),
        ("set_user_memory_region2", {"slot": 1, "gpa": 0x10000, "size": PAGE, "memfd_offset": 0}),
        ("set_memory_attributes", {"gpa": 0, "size": PAGE, "attributes": 8}),
        ("get_regs", {"vcpu": 0}),
        ("set_cpuid", {"vcpu": 0, "nent": 0}),
        ("run", {"vcpu": 0}),
        ("allocate", {"mode": 1, "offset": 0, "length": PAGE}),
        ("punch_hole", {"mode": 3, "offset": 0, "length": PAGE}),
    ],
)
def test_method_when_it_fails_has_the_arguments_that_matter(
    kernel: _Kernel, opened: World, name: str, fields: dict[str, int]
) -> None:
    method = next(m for m in METHODS if m.name == name)
    kernel.errnos[method.sees[0]] = errno.ENOSPC
    assert _failure(lambda: method.call(opened)).fields == fields


def test_device_attr_when_it_faults_has_group_and_attr(kernel: _Kernel, opened: World) -> None:
    kernel.errnos["KVM_GET_DEVICE_ATTR"] = errno.EFAULT
    error = _failure(lambda: opened.kvm.device_attr(1, 2))
    assert (error.errno, error.fields) == (errno.EFAULT, {"group": 1, "attr": 2})


@pytest.mark.parametrize("number", [errno.ENXIO, errno.EINVAL, errno.ENOTTY])
def test_device_attr_when_the_host_lacks_it_is_none(
    kernel: _Kernel, opened: World, number: int
) -> None:
    kernel.errnos["KVM_GET_DEVICE_ATTR"] = number
    assert opened.kvm.device_attr(1, 2) is None


def test_vm_types_when_the_kernel_lacks_the_capability_is_the_default_type(
    opened: World,
) -> None:
    opened.kvm.platform = _Answering({lib.KVM_CHECK_EXTENSION: [Result(0, 0)]})
    assert opened.kvm.vm_types() == 1


class _Answering:
    """A platform whose ioctls give the listed results, the last one again and again."""

    name = "fake"
    profile = ""

    def __init__(self, answers: dict[int, list[Result]]) -> None:
        self.answers = answers
        self.requests: list[tuple[int, int]] = []

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
        self.requests.append((request, arg))
        left = self.answers[request]
        return left.pop(0) if len(left) > 1 else left[0]

    def close(self, fd: int) -> Result:
        return Result(0, 0)


def _kvm(**answers: list[Result]) -> tuple[Kvm, _Answering]:
    fake: Any = _Answering({getattr(lib, name): results for name, results in answers.items()})
    return Kvm(fake, 3, "/dev/kvm"), fake


def test_create_vm_when_interrupted_tries_again() -> None:
    kvm, fake = _kvm(KVM_CREATE_VM=[Result(-1, errno.EINTR), Result(-1, errno.EINTR), Result(7, 0)])
    assert kvm.create_vm().fd == 7
    assert len(fake.requests) == 3


def test_create_vm_when_always_interrupted_gives_up() -> None:
    kvm, fake = _kvm(KVM_CREATE_VM=[Result(-1, errno.EINTR)])
    assert _failure(kvm.create_vm).errno == errno.EINTR
    assert len(fake.requests) == 5


def test_create_vm_when_type_is_unsupported_says_which_are() -> None:
    kvm, _ = _kvm(KVM_CREATE_VM=[Result(-1, errno.EINVAL)], KVM_CHECK_EXTENSION=[Result(0b1011, 0)])
    error = _failure(lambda: kvm.create_vm(4))
    assert error.explanation == "This host can create VM types 0, 1, 3; SNP is 4."


def test_supported_cpuid_when_room_is_short_asks_with_more() -> None:
    kvm, _ = _kvm(KVM_GET_SUPPORTED_CPUID=[Result(-1, errno.E2BIG), Result(0, 0)])
    assert len(kvm.supported_cpuid()) == 256


def test_supported_cpuid_when_never_enough_gives_up() -> None:
    kvm, _ = _kvm(KVM_GET_SUPPORTED_CPUID=[Result(-1, errno.E2BIG)])
    error = _failure(kvm.supported_cpuid)
    assert (error.errno, error.fields) == (errno.E2BIG, {"nent": 8192})


@pytest.mark.parametrize(
    ("kind", "number", "hint"),
    [
        (Kvm, errno.ENOENT, "load kvm_amd"),
        (Kvm, errno.EACCES, "group kvm"),
        (SevDevice, errno.ENOENT, "No secure processor"),
        (SevDevice, errno.EACCES, "run as root"),
    ],
)
def test_open_when_it_fails_says_what_to_do(
    kernel: _Kernel, kind: Any, number: int, hint: str
) -> None:
    kernel.errnos["open"] = number
    error = _failure(lambda: kind.open(kernel))
    assert error.errno == number
    assert hint in str(error)


def test_open_when_the_device_is_missing_names_it(kernel: _Kernel) -> None:
    kernel.errnos["open"] = errno.ENOENT
    error = _failure(lambda: Kvm.open(kernel, "/dev/kvm2"))
    assert error.ioctl == "open /dev/kvm2"


# The text.


def test_text_when_the_firmware_refused_is_the_line_people_search_for() -> None:
    error = ioctl_error("KVM_SEV_SNP_LAUNCH_FINISH", errno.EIO, fw_error=11)
    assert str(error).splitlines()[0] == "SNP_LAUNCH_FINISH ret=-5 fw_error=11 'Bad measurement'"


def test_text_when_there_is_no_firmware_word_names_errno_and_fields() -> None:
    fields = {"slot": 17, "way": "up"}
    error = ioctl_error("KVM_SET_USER_MEMORY_REGION", errno.EINVAL, fields=fields)
    assert str(error) == (
        "KVM_SET_USER_MEMORY_REGION ret=-22 (EINVAL: Invalid argument) slot=0x11 way=up"
    )


def test_text_when_errno_has_no_name_shows_its_number() -> None:
    """ENOTSUPP, which the kernel lets out by mistake."""
    assert "(524: Unknown error 524)" in str(ioctl_error("SEV_GET_ID2", 524))


def test_text_when_explained_ends_with_the_explanation() -> None:
    error = ioctl_error("KVM_RUN", errno.EINVAL, explanation="Why.")
    assert str(error).splitlines()[1:] == ["Why."]


# The class.


def test_kind_when_the_firmware_refused_is_firmware_error_with_advice() -> None:
    error = ioctl_error("KVM_SEV_SNP_LAUNCH_START", errno.EIO, fw_error=7)
    assert isinstance(error, FirmwareError)
    assert (error.errno, error.fw_error) == (errno.EIO, FwStatus.POLICY_FAILURE)
    assert error.explanation


@pytest.mark.parametrize("word", [None, 0, 0xFFFFFFFF], ids=["no word", "0", "not called"])
def test_kind_when_the_firmware_said_nothing_is_plain_ioctl_error(word: int | None) -> None:
    error = ioctl_error("KVM_SEV_INIT2", errno.EIO, fw_error=word)
    assert type(error) is IoctlError
    assert error.fw_error == word


def test_kind_when_the_word_is_unknown_is_still_firmware_error() -> None:
    error = ioctl_error("KVM_SEV_SNP_LAUNCH_UPDATE", errno.EIO, fw_error=0x8003)
    assert isinstance(error, FirmwareError)
    assert "0x8003" in error.explanation


def test_kind_when_caught_as_os_error_has_errno_and_strerror() -> None:
    error: OSError = ioctl_error("KVM_CREATE_VM", errno.EBUSY)
    assert (error.errno, error.strerror) == (errno.EBUSY, "Device or resource busy")


_ERRORS = [
    ioctl_error("KVM_CREATE_VM", errno.EPERM, fields={"type": 4}),
    ioctl_error("KVM_SEV_SNP_LAUNCH_FINISH", errno.EIO, fw_error=11, fields={"gfn": 3}),
    VmDeadError("KVM_RUN", errno.EIO, explanation="Dead."),
    MissingCapability("KVM_CAP_GUEST_MEMFD", "private memory"),
    LaunchStateError("finish", have="New", need="Started"),
    ClosedError("vCPU 0"),
    FormatError("a rule", offset=0x10),
    ImageError("a.elf", "a rule", offset=0x10),
]


@pytest.mark.parametrize("error", _ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "copied",
    [copy.copy, lambda error: pickle.loads(pickle.dumps(error))],
    ids=["copy", "pickle"],
)
def test_error_when_copied_is_the_same(
    error: KvmLaunchError, copied: Callable[[KvmLaunchError], KvmLaunchError]
) -> None:
    again = copied(error)
    assert (type(again), str(again), again.args) == (type(error), str(error), error.args)
    assert again.__dict__ == error.__dict__


def test_error_when_pickled_keeps_errno() -> None:
    again = pickle.loads(pickle.dumps(_ERRORS[0]))
    assert (again.errno, again.strerror) == (errno.EPERM, "Operation not permitted")


# A VM that the kernel has killed.


_OF_A_VM = [m for m in _CHECKED if m.kind.__name__ in ("Vm", "Vcpu") and "KVM" in m.sees[0]]


@pytest.mark.parametrize("method", _OF_A_VM, ids=str)
def test_method_when_every_call_gives_eio_is_vm_dead(
    kernel: _Kernel, opened: World, method: Method
) -> None:
    kernel.errnos["*"] = errno.EIO
    error = _failure(lambda: method.call(opened))
    assert isinstance(error, VmDeadError)
    assert error.ioctl == method.sees[0]
    assert "KVM_BUG" in str(error)


@pytest.mark.parametrize("name", ["KVM_SET_MEMORY_ATTRIBUTES", "KVM_SET_REGS", "KVM_RUN"])
def test_method_when_only_its_call_gives_eio_is_no_dead_vm(
    kernel: _Kernel, opened: World, name: str
) -> None:
    method = next(m for m in METHODS if m.sees[:1] == (name,))
    kernel.errnos[name] = errno.EIO
    assert type(_failure(lambda: method.call(opened))) is IoctlError


def test_is_dead_when_alive_is_false(opened: World) -> None:
    assert not opened.vm.is_dead()


def test_is_dead_when_the_probe_fails_otherwise_is_false(kernel: _Kernel, opened: World) -> None:
    kernel.errnos["KVM_CHECK_EXTENSION"] = errno.EBADF
    assert not opened.vm.is_dead()


def test_dead_error_when_made_by_hand_keeps_the_firmware_word(opened: World) -> None:
    error = opened.vm.dead_error("KVM_SEV_SNP_LAUNCH_UPDATE", {"gfn": 1}, fw_error=0x16)
    assert (error.errno, error.fw_error, error.fields) == (errno.EIO, 0x16, {"gfn": 1})


def test_vm_when_a_page_cannot_be_reclaimed_is_dead(stack: ExitStack) -> None:
    """The simulated host's own KVM_BUG: firmware refuses a page, then won't give it back."""
    faults = ["SNP_LAUNCH_UPDATE:fw=0x16", "SNP_PAGE_RECLAIM:fail"]
    sim = stack.enter_context(SimPlatform(faults=faults))
    made, sev = started(sim, stack)
    memfd = stack.enter_context(made.vm.create_guest_memfd(PAGE))
    gpa = 0x10000
    made.vm.set_user_memory_region2(1, gpa, PAGE, made.memory.address, memfd=memfd)
    made.vm.set_memory_attributes(gpa, PAGE, private=True)
    update = ffi.new(
        "struct kvm_sev_snp_launch_update *",
        {
            "gfn_start": gpa // PAGE,
            "uaddr": made.memory.address,
            "len": PAGE,
            "type": lib.KVM_SEV_SNP_PAGE_TYPE_NORMAL,
        },
    )
    result = made.vm.sev_command_raw(lib.KVM_SEV_SNP_LAUNCH_UPDATE, update, sev_fd=sev.fd)
    assert result.errno == errno.EIO
    assert made.vm.is_dead()
    assert isinstance(_failure(lambda: made.vm.check_extension(3)), VmDeadError)
    assert isinstance(_failure(made.vcpu.get_regs), VmDeadError)


# SEV commands and the word beside errno.


def test_sev_command_when_the_kernel_refuses_has_word_0(stack: ExitStack) -> None:
    made = machine(SimPlatform(), stack, lib.KVM_X86_SNP_VM)
    again = ffi.new("struct kvm_sev_init *")
    assert made.vm.sev_command_raw(lib.KVM_SEV_INIT2, again) == (-1, errno.EPERM, 0)


def test_sev_command_when_the_firmware_refuses_has_its_word(stack: ExitStack) -> None:
    sim = SimPlatform(faults=["SNP_LAUNCH_START:fw=7"])
    made = machine(sim, stack, lib.KVM_X86_SNP_VM)
    sev = stack.enter_context(SevDevice.open(sim))
    start = ffi.new("struct kvm_sev_snp_launch_start *", {"policy": 0x30000})
    result = made.vm.sev_command_raw(lib.KVM_SEV_SNP_LAUNCH_START, start, sev_fd=sev.fd)
    assert result == (-1, errno.EIO, FwStatus.POLICY_FAILURE)


def test_sev_command_when_the_real_host_has_no_sev_is_enotty(stack: ExitStack) -> None:
    made = machine(require_kvm(), stack)
    if made.kvm.vmsa_features() is not None:
        pytest.skip("this machine's KVM has SEV")
    assert made.vm.sev_command_raw(lib.KVM_SEV_INIT2) == (-1, errno.ENOTTY, 0)


def test_sev_command_when_sent_carries_id_data_and_fd() -> None:
    sent: list[tuple[int, int, int, int]] = []

    class _Reading(_Answering):
        def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
            command = ffi.cast("struct kvm_sev_cmd *", arg)
            sent.append((command.id, command.data, command.error, command.sev_fd))
            return super().ioctl(fd, request, arg)

    data = ffi.new("struct kvm_sev_init *")
    fake: Any = _Reading({lib.KVM_MEMORY_ENCRYPT_OP: [Result(0, 0)]})
    Vm(fake, 4, lib.KVM_X86_SNP_VM, lambda: 12288).sev_command_raw(
        lib.KVM_SEV_INIT2, data, sev_fd=9
    )
    assert sent == [(lib.KVM_SEV_INIT2, address_of(data), 0, 9)]
