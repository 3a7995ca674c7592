"""/dev/sev: the secure processor as the host sees it."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Any

from kvmlaunch.errors import FormatError
from kvmlaunch.kvm.calls import ioctl_error
from kvmlaunch.kvm.descriptor import Descriptor
from kvmlaunch.uapi import Platform, address_of, ffi, lib

__all__ = ["SevDevice", "SevStatus", "SnpStatus", "TcbVersion"]

_VLEK_HASHSTICK_BYTES = 432

TcbVersion = int
"""A TCB_VERSION word; which byte is which depends on the product."""


@dataclass(frozen=True)
class SevStatus:
    """SEV_PLATFORM_STATUS. ``state``: 0 uninitialised, 1 initialised, 2 working."""

    api_major: int
    api_minor: int
    state: int
    flags: int
    build: int
    guest_count: int

    @property
    def owned(self) -> bool:
        """True when the platform is owned by someone else than itself."""
        return bool(self.flags & 1)

    @property
    def es_configured(self) -> bool:
        """True when SEV-ES has been configured."""
        return bool(self.flags >> 8 & 1)


@dataclass(frozen=True)
class SnpStatus:
    """SNP_PLATFORM_STATUS. ``state``: 0 uninitialised, 1 initialised."""

    api_major: int
    api_minor: int
    state: int
    rmp_initialized: bool
    build_id: int
    mask_chip_id: bool
    mask_chip_key: bool
    vlek_enabled: bool
    guest_count: int
    current_tcb: TcbVersion
    reported_tcb: TcbVersion

    def __str__(self) -> str:
        state = "initialised" if self.state else "uninitialised"
        return (
            f"SNP firmware {self.api_major}.{self.api_minor} build {self.build_id}, {state}, "
            f"{self.guest_count} guests, TCB {self.current_tcb:#018x} "
            f"(reported {self.reported_tcb:#018x})"
        )


class SevDevice(Descriptor):
    """The /dev/sev descriptor. Each command is one SEV_ISSUE_CMD."""

    @classmethod
    def open(cls, platform: Platform, path: str = "/dev/sev") -> SevDevice:
        """Open the device. Raises IoctlError with what to do about it."""
        result = platform.open(path, os.O_RDWR | os.O_CLOEXEC)
        if result.ret < 0:
            raise ioctl_error(f"open {path}", result.errno)
        return cls(platform, result.ret, path)

    def platform_status(self) -> SevStatus:
        """Status of SEV and SEV-ES (SEV_ISSUE_CMD SEV_PLATFORM_STATUS)."""
        status = ffi.new("struct sev_user_data_status *")
        self._issue("SEV_PLATFORM_STATUS", status)
        return SevStatus(
            status.api_major,
            status.api_minor,
            status.state,
            status.flags,
            status.build,
            status.guest_count,
        )

    def snp_platform_status(self) -> SnpStatus:
        """Status of SNP (SEV_ISSUE_CMD SNP_PLATFORM_STATUS)."""
        status = ffi.new("struct sev_user_data_snp_status *")
        self._issue("SNP_PLATFORM_STATUS", status)
        word = int(status.mask_word)
        return SnpStatus(
            status.api_major,
            status.api_minor,
            status.state,
            bool(status.rmp_word & 1),
            status.build_id,
            bool(word & 1),
            bool(word & 2),
            bool(word & 4),
            status.guest_count,
            status.current_tcb_version,
            status.reported_tcb_version,
        )

    def set_config(
        self, *, reported_tcb: int = 0, mask_chip_id: bool = False, mask_chip_key: bool = False
    ) -> None:
        """Set the reported TCB and the masks (SEV_ISSUE_CMD SNP_SET_CONFIG).

        This changes the host for every guest; reported_tcb 0 means "as committed".
        """
        config = ffi.new("struct sev_user_data_snp_config *")
        config.reported_tcb = reported_tcb
        config.mask_word = int(mask_chip_id) | int(mask_chip_key) << 1
        self._issue("SNP_SET_CONFIG", config)

    def commit(self) -> None:
        """Commit the running firmware as anti-rollback floor (SEV_ISSUE_CMD SNP_COMMIT).

        Irreversible: no older firmware can be loaded afterwards.
        """
        self._issue("SNP_COMMIT", None)

    def load_vlek(self, hashstick: bytes) -> None:
        """Load a wrapped VLEK hashstick of 432 bytes (SEV_ISSUE_CMD SNP_VLEK_LOAD)."""
        if len(hashstick) != _VLEK_HASHSTICK_BYTES:
            raise FormatError(
                f"a VLEK hashstick is {_VLEK_HASHSTICK_BYTES} bytes, not {len(hashstick)}"
            )
        blob = ffi.new("struct sev_user_data_snp_wrapped_vlek_hashstick *")
        blob.data = hashstick
        load = ffi.new("struct sev_user_data_snp_vlek_load *")
        load.len = ffi.sizeof("struct sev_user_data_snp_vlek_load")
        load.vlek_wrapped_address = address_of(blob)
        self._issue("SNP_VLEK_LOAD", load)

    def _issue(self, name: str, data: Any) -> None:
        command = ffi.new("struct sev_issue_cmd *")
        command.cmd = getattr(lib, name)
        command.data = 0 if data is None else address_of(data)
        result = self.ioctl_raw("SEV_ISSUE_CMD", command)
        if result.ret < 0:
            explanation = ""
            if not command.error and result.errno in (errno.EINVAL, errno.ENODEV):
                # Both mean it: kernels before 6.16 say EINVAL, mid-2026 ones ENODEV (sev-dev.c).
                explanation = "SNP is not initialised on this host, or the kernel refused the data."
            raise ioctl_error(
                name, result.errno, fw_error=int(command.error), explanation=explanation
            )
