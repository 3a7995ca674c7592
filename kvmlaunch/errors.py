"""Exceptions of kvmlaunch.

KvmLaunchError
├── IoctlError (OSError)          a kernel call failed: ioctl name, errno, its arguments
│   ├── IoctlPermissionError      EPERM or EACCES (also a PermissionError)
│   ├── FirmwareError             the call reached the secure processor, which refused
│   └── VmDeadError               the kernel has killed the VM (KVM_BUG)
├── MissingCapability             found by asking the host, never by its version
├── LaunchStateError              a launch step out of order
├── ClosedError                   use of a closed file descriptor object
└── FormatError (ValueError)      bytes or text that break a format's rule
    └── ImageError                the same, in an image file
"""

from __future__ import annotations

import errno as _errno
import os

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = [
    "ClosedError",
    "FirmwareError",
    "FormatError",
    "ImageError",
    "IoctlError",
    "IoctlPermissionError",
    "KvmLaunchError",
    "LaunchStateError",
    "MissingCapability",
    "VmDeadError",
]


class KvmLaunchError(Exception):
    """Base of everything that kvmlaunch raises on purpose. Can be copied and pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls __init__ with args, which fits no class whose __init__ takes more.
        return _rebuild, (type(self), self.args), self.__dict__


def _rebuild(kind: type[KvmLaunchError], args: tuple[Any, ...]) -> KvmLaunchError:
    error = kind.__new__(kind)
    super(KvmLaunchError, error).__init__(*args)
    return error


class IoctlError(KvmLaunchError, OSError):
    """A call into the kernel failed.

    Attributes: ``ioctl`` (its name), ``errno``, ``fw_error`` (firmware status
    word or None where the call has none), ``fields`` (the arguments that
    matter, by name) and ``explanation`` (sentences for the user).

    ``str()`` starts with the line that people search for,
    ``SNP_LAUNCH_FINISH ret=-5 fw_error=11 'Bad measurement'``; the fields stand
    behind it and the explanation below.
    """

    def __init__(
        self,
        ioctl: str,
        errno: int,
        *,
        fw_error: int | None = None,
        fw_text: str = "",
        fields: Mapping[str, Any] | None = None,
        explanation: str = "",
    ) -> None:
        super().__init__(errno, os.strerror(errno))
        self.ioctl = ioctl
        self.fw_error = fw_error
        self.fw_text = fw_text
        self.fields = dict(fields or {})
        self.explanation = explanation

    @property
    def no_device(self) -> bool:
        """Whether a device was to be opened that the host hasn't (not: that may not be used)."""
        missing = (_errno.ENOENT, _errno.ENXIO, _errno.ENODEV)
        return self.ioctl.startswith("open ") and self.errno in missing

    def __str__(self) -> str:
        assert self.errno is not None
        # QEMU's spelling: SNP_LAUNCH_START, but KVM_SEV_INIT2.
        name = self.ioctl.replace("KVM_SEV_SNP_", "SNP_", 1)
        line = f"{name} ret=-{self.errno}"
        if self.fw_error is not None:
            line += f" fw_error={self.fw_error} '{self.fw_text}'"
        else:
            line += f" ({_errno.errorcode.get(self.errno, self.errno)}: {self.strerror})"
        for name, value in self.fields.items():
            line += f" {name}={value:#x}" if isinstance(value, int) else f" {name}={value}"
        return f"{line}\n{self.explanation}" if self.explanation else line


class IoctlPermissionError(IoctlError, PermissionError):
    """EPERM or EACCES."""


class FirmwareError(IoctlError):
    """The secure processor refused the command (``fw_error`` holds its status)."""


class VmDeadError(IoctlError):
    """The kernel has marked the VM as dead: every further ioctl on it is EIO."""


class MissingCapability(KvmLaunchError):
    """The host lacks something that was asked for.

    Attributes: ``cap`` (its name) and ``needed_for``.
    """

    def __init__(self, cap: str, needed_for: str) -> None:
        super().__init__(f"this host lacks {cap}, needed for {needed_for}")
        self.cap = cap
        self.needed_for = needed_for


class LaunchStateError(KvmLaunchError, RuntimeError):
    """A launch step was called in the wrong state.

    Attributes: ``step``, ``have`` and ``need`` (state names).
    """

    def __init__(self, step: str, *, have: str, need: str) -> None:
        super().__init__(f"{step} needs a launch in state {need}, this one is {have}")
        self.step = step
        self.have = have
        self.need = need


class ClosedError(KvmLaunchError, ValueError):
    """A closed object was used."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is closed")
        self.what = what


class FormatError(KvmLaunchError, ValueError):
    """Input breaks a rule of its format.

    Attributes: ``rule`` (one sentence, without a final full stop), ``offset``
    (byte offset in the input, or None).
    """

    def __init__(self, rule: str, *, offset: int | None = None) -> None:
        super().__init__(rule, offset)
        self.rule = rule
        self.offset = offset

    def __str__(self) -> str:
        return self.rule if self.offset is None else f"offset {self.offset:#x}: {self.rule}"


class ImageError(FormatError):
    """An image file can't be loaded. Attribute ``path`` names it."""

    def __init__(self, path: str, rule: str, *, offset: int | None = None) -> None:
        super().__init__(rule, offset=offset)
        self.args = (path, rule, offset)
        self.path = path

    def __str__(self) -> str:
        return f"{self.path}: {super().__str__()}"
