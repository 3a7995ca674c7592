"""A launch as three states that can't be called out of order: New, Started, Finished.

Each step consumes the state it is called on. A step of another state, or a
second call, is a LaunchStateError that names both states.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from kvmlaunch.abi import cpuid_page
from kvmlaunch.abi.fwstatus import FwStatus
from kvmlaunch.abi.idblock import ID_AUTH_SIZE, ID_BLOCK_SIZE
from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.errors import FirmwareError, FormatError, IoctlError, LaunchStateError
from kvmlaunch.kvm import SevDevice, SevResult, Vm
from kvmlaunch.kvm.calls import ioctl_error
from kvmlaunch.snp import causes
from kvmlaunch.uapi import address_of, ffi, lib, peek

__all__ = ["CpuidRejected", "Finished", "New", "Started"]

_HOST_DATA_SIZE = 32
_EAGAIN_TRIES = 100
_EAGAIN_PAUSE_SECONDS = 0.01


class CpuidRejected(FirmwareError):
    """The firmware refused the CPUID page and wrote back what it would accept.

    Attributes: ``sent`` and ``corrected`` (4096 bytes each).
    """

    sent: bytes = b""
    corrected: bytes = b""

    def differences(self) -> list[str]:
        """One line per register that the firmware changed, or why there is none."""
        try:
            return [str(line) for line in cpuid_page.diff_pages(self.sent, self.corrected)]
        except FormatError as error:
            return [f"not a CPUID page: {error}"]

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *self.differences()])


# Which state a step belongs to.
_STEPS = {"start": "New", "update": "Started", "update_all": "Started", "finish": "Started"}


class _State:
    """What the states share: the VM, its /dev/sev, and whether the state is over."""

    name: ClassVar[str]

    def __init__(self, vm: Vm, sev: SevDevice) -> None:
        self.vm = vm
        self.sev = sev
        self._next: str | None = None

    def __repr__(self) -> str:
        return f"<{self.state} launch of {self.vm!r}>"

    @property
    def state(self) -> str:
        """Name of the state that this launch is in now."""
        return self._next or self.name

    def _enter(self, step: str) -> None:
        if self._next is not None:
            raise LaunchStateError(step, have=self._next, need=self.name)

    if not TYPE_CHECKING:  # a type checker should see that the step isn't there

        def __getattr__(self, name: str) -> Any:
            need = _STEPS.get(name)
            if need is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

            def wrong(*args: Any, **kwargs: Any) -> Any:
                raise LaunchStateError(name, have=self.state, need=need)

            return wrong


class New(_State):
    """The VM is an initialised SNP guest; nothing has been measured."""

    name = "New"

    @classmethod
    def init(cls, vm: Vm, sev: SevDevice, *, vmsa_features: int = 0, ghcb_version: int = 0) -> New:
        """Make the VM an SNP guest (KVM_SEV_INIT2). Must come before the first vCPU.

        ``vmsa_features``: SEV_FEATURES of every VMSA without bit 0, which KVM adds.
        """
        data = ffi.new(
            "struct kvm_sev_init *",
            {"vmsa_features": vmsa_features, "ghcb_version": ghcb_version},
        )
        result = vm.sev_command_raw(lib.KVM_SEV_INIT2, data)
        if result.ret < 0:
            raise _failed(
                vm,
                "KVM_SEV_INIT2",
                result,
                {"vmsa_features": vmsa_features},
                causes.explain_init(result.errno, vmsa_features),
            )
        return cls(vm, sev)

    def start(self, policy: int, *, gosvw: bytes = bytes(16)) -> Started:
        """Make the guest context (KVM_SEV_SNP_LAUNCH_START)."""
        self._enter("start")
        data = ffi.new("struct kvm_sev_snp_launch_start *", {"policy": policy, "gosvw": gosvw})
        result = self.vm.sev_command_raw(lib.KVM_SEV_SNP_LAUNCH_START, data, sev_fd=self.sev.fd)
        if result.ret < 0:
            raise _failed(
                self.vm,
                "KVM_SEV_SNP_LAUNCH_START",
                result,
                {"policy": policy},
                causes.explain_start(result.errno, result.fw_error, policy),
            )
        self._next = Started.name
        return Started(self.vm, self.sev)


class Started(_State):
    """Pages can be added to the launch digest."""

    name = "Started"

    def update_raw(
        self, gpa: int, page_type: int, address: int, size: int
    ) -> tuple[SevResult, int]:
        """One KVM_SEV_SNP_LAUNCH_UPDATE, unchecked; also the number of bytes it has done."""
        data = ffi.new(
            "struct kvm_sev_snp_launch_update *",
            {"gfn_start": gpa // PAGE_SIZE, "uaddr": address, "len": size, "type": page_type},
        )
        result = self.vm.sev_command_raw(lib.KVM_SEV_SNP_LAUNCH_UPDATE, data, sev_fd=self.sev.fd)
        return result, size - int(data.len) if result.ret >= 0 else 0

    def update(self, gpa: int, page_type: int, address: int, size: int, *, what: str = "") -> int:
        """Measure and encrypt pages (KVM_SEV_SNP_LAUNCH_UPDATE); returns the bytes done.

        One call, repeated only for EAGAIN and EINTR; less than ``size`` may be done,
        and of CPUID pages only one, since the kernel corrects any page of the call in place.
        ``address`` is the source (page aligned; ignored for ZERO), ``what``
        describes the page in an error. Raises FirmwareError, CpuidRejected,
        IoctlError with the GPA.
        """
        self._enter("update")
        if gpa % PAGE_SIZE or size % PAGE_SIZE or size <= 0:
            raise FormatError(f"update of {size:#x} bytes at GPA {gpa:#x}: not whole pages")
        sent = b""
        if page_type == PageType.CPUID:
            sent, size = _page_at(address), PAGE_SIZE
        for _ in range(_EAGAIN_TRIES):
            result, done = self.update_raw(gpa, page_type, address, size)
            if result.ret >= 0 and done:
                return done
            if result.ret < 0 and result.errno not in (errno.EAGAIN, errno.EINTR):
                break
            if result.errno == errno.EAGAIN:
                time.sleep(_EAGAIN_PAUSE_SECONDS)
        raise self._update_failed(gpa, page_type, address, sent, result, what)

    def update_all(
        self,
        gpa: int,
        page_type: int,
        address: int,
        size: int,
        *,
        what: Callable[[int], str] = lambda gpa: "",
    ) -> Iterator[int]:
        """Repeat update() until the whole range is done; yields the bytes of each call.

        ``what`` describes the page at a GPA, for errors.
        """
        offset = 0
        while offset < size:
            at = gpa + offset
            source = address + offset if address else 0
            done = self.update(at, page_type, source, size - offset, what=what(at))
            offset += done
            yield done

    def _update_failed(
        self, gpa: int, page_type: int, address: int, sent: bytes, result: SevResult, what: str
    ) -> IoctlError:
        name = "KVM_SEV_SNP_LAUNCH_UPDATE"
        fields = {"gpa": gpa, "type": page_type}
        if result.ret >= 0:
            result = SevResult(-1, errno.EIO, 0)
            explanation = "The kernel says success but has done no page: please report this."
        else:
            explanation = causes.explain_update(result.errno, result.fw_error, page_type, what)
        if page_type == PageType.CPUID and result.fw_error == FwStatus.INVALID_PARAM:
            error = CpuidRejected(
                name,
                result.errno,
                fw_error=result.fw_error,
                fw_text="Invalid parameter",
                fields=fields,
                explanation=explanation,
            )
            error.sent, error.corrected = sent, _page_at(address)
            return error
        return _failed(self.vm, name, result, fields, explanation)

    def finish(
        self,
        *,
        host_data: bytes = bytes(32),
        id_block: bytes | None = None,
        id_auth: bytes | None = None,
        auth_key: bool = False,
        vcek_disabled: bool = False,
        digest: bytes | None = None,
        kvm_vmsas: bool = True,
    ) -> Finished:
        """Measure the vCPUs' VMSAs and close the launch (KVM_SEV_SNP_LAUNCH_FINISH).

        ``digest`` is the predicted launch digest, and ``kvm_vmsas`` whether KVM makes the VMSAs,
        for the error text: then the VM is spent when this fails with vCPUs. Raises FormatError
        for a part of the wrong size.
        """
        self._enter("finish")
        _check_size("host data", host_data, _HOST_DATA_SIZE)
        if id_block is not None or id_auth is not None:
            _check_size("the ID block", id_block or b"", ID_BLOCK_SIZE)
            _check_size("the ID authentication", id_auth or b"", ID_AUTH_SIZE)
        keep = [ffi.from_buffer(part) for part in (id_block or b"", id_auth or b"")]
        data = ffi.new(
            "struct kvm_sev_snp_launch_finish *",
            {
                "id_block_uaddr": address_of(keep[0]) if id_block else 0,
                "id_auth_uaddr": address_of(keep[1]) if id_auth else 0,
                "id_block_en": int(id_block is not None),
                "auth_key_en": int(auth_key),
                "vcek_disabled": int(vcek_disabled),
                "host_data": host_data,
            },
        )
        result = self.vm.sev_command_raw(lib.KVM_SEV_SNP_LAUNCH_FINISH, data, sev_fd=self.sev.fd)
        if result.ret < 0:
            raise _failed(
                self.vm,
                "KVM_SEV_SNP_LAUNCH_FINISH",
                result,
                {},
                causes.explain_finish(
                    result.errno, result.fw_error, digest, id_block, kvm_vmsas=kvm_vmsas
                ),
            )
        self._next = Finished.name
        return Finished(self.vm, self.sev)


class Finished(_State):
    """The launch is over; the guest can run."""

    name = "Finished"


def _page_at(address: int) -> bytes:
    """A page of this process; empty where it can't be read, which the kernel will say."""
    try:
        return peek(address, PAGE_SIZE)
    except OSError:
        return b""


def _check_size(what: str, data: bytes, size: int) -> None:
    """The kernel would read what lies behind a short one, and the VM is spent when it refuses."""
    if len(data) != size:
        raise FormatError(f"{what} is {size} bytes, not {len(data)}")


def _failed(
    vm: Vm, name: str, result: SevResult, fields: dict[str, Any], explanation: str
) -> IoctlError:
    # Also after the firmware said no: taking the page back is what kills the VM then.
    if result.errno == errno.EIO and vm.is_dead():
        return vm.dead_error(name, fields, fw_error=result.fw_error)
    return ioctl_error(
        name, result.errno, fw_error=result.fw_error, fields=fields, explanation=explanation
    )
