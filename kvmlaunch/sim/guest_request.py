"""KVM's part in guest requests (sev.c: snp_handle_guest_req, snp_handle_ext_guest_req).

KVM can't read the messages. It copies the request page to a page of its own, lets firmware
answer into another one, and copies that to the guest, so that firmware never writes to guest
memory. An extended request for a report may carry certificates besides; without userspace's
help (KVM_SEV_SNP_ENABLE_REQ_CERTS) their table is empty. That the pages are two, and aligned,
was checked before (sev_es_validate_vmgexit).

Values in the GHCB are those of AMD 56421 (GHCB specification).
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvmlaunch.abi.guest_message import MessageType
from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.sim.sevdev import SevDevice
from kvmlaunch.sim.uaccess import refuse

if TYPE_CHECKING:
    from kvmlaunch.sim.sev import SevVm

__all__ = ["CertificatesWanted", "GuestMemory", "GuestRequests", "Reply"]

_INFO_1_ERROR = 2
_INVALID_INPUT = 5
_VMM_ERROR_SHIFT = 32
_VMM_INVALID_LEN, _VMM_BUSY = 1, 2
_VMM_GENERIC = 0xFFFFFFFF  # KVM's own, from 7.0
_VMM_ERRORS = {
    errno.ENOSPC: _VMM_INVALID_LEN,
    errno.EAGAIN: _VMM_BUSY,
    errno.EIO: _VMM_GENERIC,
}
_MSG_TYPE_OFFSET = 0x34
_EMPTY_TABLE = bytes(24)


class GuestMemory(Protocol):
    """Guest memory as KVM reaches it, through the user addresses of the slots.

    Raises OSError where there is no slot or no memory behind it.
    """

    def read(self, gpa: int, size: int) -> bytes:
        """kvm_read_guest()."""

    def write(self, gpa: int, data: bytes) -> None:
        """kvm_write_guest()."""


class Reply(NamedTuple):
    """What the guest finds: SW_EXITINFO1, SW_EXITINFO2, and RBX unless that stays as it is."""

    exit_info_1: int
    exit_info_2: int
    rbx: int | None = None


class CertificatesWanted(NamedTuple):
    """KVM_EXIT_SNP_REQ_CERTS: userspace is to fill `npages` pages at `gpa`."""

    gpa: int
    npages: int


class GuestRequests:
    """The two pages of one VM (snp_guest_req_init); requests are handled one at a time.

    What KVM_RUN would fail with is raised as OSError: EIO for guest memory that isn't there,
    EBADF once /dev/sev is closed, EINVAL for an answer of userspace that isn't known.
    """

    def __init__(self, sev: SevVm) -> None:
        self._sev = sev
        self._host = sev.host
        self._lock = threading.Lock()
        page = self._host.alloc_firmware_page()
        if page is None:
            refuse(errno.EIO)
        self._response = page
        self._request = self._host.memory.alloc()

    def free(self) -> None:
        """snp_guest_req_cleanup()."""
        self._host.free_firmware_page(self._response)
        self._host.memory.free(self._request)

    def handle(self, memory: GuestMemory, request_gpa: int, response_gpa: int) -> Reply:
        """A guest request. A firmware status goes to the guest, with a page that is stale."""
        with self._lock:
            pages = self._host.memory
            pages.page(self._request)[:] = _read(memory, request_gpa, PAGE_SIZE)
            self._host.fds.get_kind(self._sev.fd, SevDevice, errno.EBADF)
            context = self._sev.context or 0
            status = self._host.psp.guest_request(context, self._request, self._response)
            _write(memory, response_gpa, bytes(pages.page(self._response)))
        return Reply(0, status)

    def handle_extended(
        self,
        memory: GuestMemory,
        request_gpa: int,
        response_gpa: int,
        *,
        rax: int | None,
        rbx: int | None,
    ) -> Reply | CertificatesWanted:
        """An extended guest request; RAX and RBX are None unless the guest marked them valid.

        What `CertificatesWanted` brings is given to `finish_extended`.
        """
        (message_type,) = _read(memory, request_gpa + _MSG_TYPE_OFFSET, 1)
        if message_type == MessageType.REPORT_REQ:
            if rax is None or rbx is None or rax % PAGE_SIZE:
                return Reply(_INFO_1_ERROR, _INVALID_INPUT)
            if self._sev.req_certs:
                return CertificatesWanted(rax, rbx)
            if rbx:
                _write(memory, rax, _EMPTY_TABLE)
        return self.handle(memory, request_gpa, response_gpa)

    def finish_extended(
        self, memory: GuestMemory, request_gpa: int, response_gpa: int, *, ret: int, npages: int
    ) -> Reply:
        """Go on after KVM_EXIT_SNP_REQ_CERTS with what userspace answered.

        Firmware isn't called unless `ret` is 0: the guest's message number stays unused.
        """
        if not ret:
            return self.handle(memory, request_gpa, response_gpa)
        if ret not in _VMM_ERRORS:
            refuse(errno.EINVAL)
        rbx = npages if ret == errno.ENOSPC else None
        return Reply(0, _VMM_ERRORS[ret] << _VMM_ERROR_SHIFT, rbx)


def _read(memory: GuestMemory, gpa: int, size: int) -> bytes:
    try:
        return memory.read(gpa, size)
    except OSError:
        refuse(errno.EIO)


def _write(memory: GuestMemory, gpa: int, data: bytes) -> None:
    try:
        memory.write(gpa, data)
    except OSError:
        refuse(errno.EIO)
