"""/dev/sev: SEV_ISSUE_CMD (drivers/crypto/ccp/sev-dev.c)."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

from kvmlaunch.sim.fdtable import File
from kvmlaunch.sim.firmware import PlatformStatus
from kvmlaunch.sim.host import Host
from kvmlaunch.sim.uaccess import copy_in, copy_out, refuse
from kvmlaunch.uapi import ffi, lib

__all__ = ["SevDevice"]

_VLEK_HASHSTICK = ffi.sizeof("struct sev_user_data_snp_wrapped_vlek_hashstick")
_COMMANDS = {
    getattr(lib, name): name
    for name in (
        "SEV_FACTORY_RESET",
        "SEV_PLATFORM_STATUS",
        "SEV_PEK_GEN",
        "SEV_PEK_CSR",
        "SEV_PDH_GEN",
        "SEV_PDH_CERT_EXPORT",
        "SEV_PEK_CERT_IMPORT",
        "SEV_GET_ID",
        "SEV_GET_ID2",
        "SNP_PLATFORM_STATUS",
        "SNP_COMMIT",
        "SNP_SET_CONFIG",
        "SNP_VLEK_LOAD",
    )
}


class SevDevice(File):
    """An open /dev/sev."""

    name = "/dev/sev"

    def __init__(self, host: Host, flags: int) -> None:
        self._host = host
        self._writable = flags & os.O_ACCMODE != os.O_RDONLY
        self._handlers: dict[int, Callable[[Any], None]] = {
            lib.SEV_FACTORY_RESET: self._legacy,
            lib.SEV_PLATFORM_STATUS: self._platform_status,
            lib.SEV_PEK_GEN: self._legacy,
            lib.SEV_PEK_CSR: self._legacy,
            lib.SEV_PDH_GEN: self._legacy,
            lib.SEV_PDH_CERT_EXPORT: self._pdh_cert_export,
            lib.SEV_PEK_CERT_IMPORT: self._legacy,
            lib.SEV_GET_ID: self._get_id,
            lib.SEV_GET_ID2: self._get_id2,
            lib.SNP_PLATFORM_STATUS: self._snp_platform_status,
            lib.SNP_COMMIT: self._snp_commit,
            lib.SNP_SET_CONFIG: self._snp_set_config,
            lib.SNP_VLEK_LOAD: self._snp_vlek_load,
        }

    def ioctl_names(self, request: int, arg: int) -> tuple[str, ...]:
        """SEV_ISSUE_CMD and the command in its argument."""
        if request != lib.SEV_ISSUE_CMD:
            return ()
        try:
            command = copy_in(self._host.user, "sev_issue_cmd", arg).cmd
        except OSError:
            return ("SEV_ISSUE_CMD",)
        return ("SEV_ISSUE_CMD", _COMMANDS.get(command, ""))

    def ioctl(self, request: int, arg: int) -> int:
        """SEV_ISSUE_CMD. Its 16 bytes are copied back even when the command failed."""
        if request != lib.SEV_ISSUE_CMD:
            refuse(errno.EINVAL)
        issue = copy_in(self._host.user, "sev_issue_cmd", arg)
        handler = self._handlers.get(issue.cmd)
        if handler is None:
            refuse(errno.EINVAL)
        try:
            handler(issue)
        finally:
            copy_out(self._host.user, arg, issue)
        return 0

    # Legacy SEV isn't simulated: its commands stop at the check that comes first.

    def _legacy(self, issue: Any) -> None:
        self._need_write()
        self._fail(issue, lib.SEV_RET_UNSUPPORTED)

    def _platform_status(self, issue: Any) -> None:
        status = self._status(issue)
        out = ffi.new("struct sev_user_data_status *")
        out.api_major, out.api_minor = status.api_major, status.api_minor
        # SNP is initialised; legacy SEV with it, as the driver does for both at once.
        out.state, out.build = 1, status.build & 0xFF
        copy_out(self._host.user, issue.data, out)

    def _pdh_cert_export(self, issue: Any) -> None:
        copy_in(self._host.user, "sev_user_data_pdh_cert_export", issue.data)
        self._fail(issue, lib.SEV_RET_UNSUPPORTED)

    def _get_id(self, issue: Any) -> None:
        out = ffi.new("struct sev_user_data_get_id *")
        ffi.buffer(out.socket1)[:] = self._host.processor.profile.chip_id
        copy_out(self._host.user, issue.data, out)

    def _get_id2(self, issue: Any) -> None:
        user = self._host.user
        query = copy_in(user, "sev_user_data_get_id2", issue.data)
        chip_id = self._host.processor.profile.chip_id
        room = query.length if query.address else 0
        query.length = len(chip_id)
        if room < len(chip_id):
            copy_out(user, issue.data, query)
            self._fail(issue, lib.SEV_RET_INVALID_LEN)
        issue.error = lib.SEV_RET_SUCCESS
        user.write(query.address, chip_id)
        copy_out(user, issue.data, query)

    def _snp_platform_status(self, issue: Any) -> None:
        if not issue.data:
            refuse(errno.EINVAL)
        status = self._status(issue)
        out = ffi.new("struct sev_user_data_snp_status *")
        out.api_major, out.api_minor = status.api_major, status.api_minor
        out.state, out.rmp_word = status.state, int(status.is_rmp_initialized)
        out.build_id, out.guest_count = status.build, status.guest_count
        out.mask_word = status.mask_chip_id | status.mask_chip_key << 1 | status.vlek_en << 2
        out.current_tcb_version = status.current_tcb
        out.reported_tcb_version = status.reported_tcb
        copy_out(self._host.user, issue.data, out)

    def _snp_commit(self, issue: Any) -> None:
        self._issue(issue, "SNP_COMMIT", self._host.processor.commit)

    def _snp_set_config(self, issue: Any) -> None:
        self._need_data_and_write(issue)
        config = copy_in(self._host.user, "sev_user_data_snp_config", issue.data)
        self._issue(
            issue,
            "SNP_CONFIG",
            lambda: self._host.processor.config(config.reported_tcb, config.mask_word),
        )

    def _snp_vlek_load(self, issue: Any) -> None:
        self._need_data_and_write(issue)
        user = self._host.user
        load = copy_in(user, "sev_user_data_snp_vlek_load", issue.data)
        if load.len != ffi.sizeof(load[0]) or load.vlek_wrapped_version:
            refuse(errno.EINVAL)
        blob = user.read(load.vlek_wrapped_address, _VLEK_HASHSTICK)
        self._issue(issue, "SNP_VLEK_LOAD", lambda: self._host.processor.vlek_load(blob))

    def _need_write(self) -> None:
        if not self._writable:
            refuse(errno.EPERM)

    def _need_data_and_write(self, issue: Any) -> None:
        if not issue.data:
            refuse(errno.EINVAL)
        self._need_write()

    def _status(self, issue: Any) -> PlatformStatus:
        answers: list[PlatformStatus] = []

        def command() -> int:
            answers.append(self._host.processor.platform_status())
            return answers[0].status

        self._issue(issue, "SNP_PLATFORM_STATUS", command)
        return answers[0]

    def _issue(self, issue: Any, name: str, command: Callable[[], int]) -> None:
        issue.error = self._host.psp.status(name, command)
        if issue.error:
            refuse(errno.EIO)

    def _fail(self, issue: Any, status: int) -> None:
        issue.error = status
        refuse(errno.EIO)
