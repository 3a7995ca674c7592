"""What a CPU asks of the owner of the guest's memory.

Private and shared pages have backings of their own; both are given as host addresses and used in
place, without copies. The rules of the RMP are the CPU's, the table is the owner's.
"""

from __future__ import annotations

import enum
from typing import Protocol

__all__ = ["Access", "GuestMemory", "Missing", "RmpEntry"]


class Access(enum.Enum):
    """What an instruction wants of a page."""

    READ = "read"
    WRITE = "write"
    FETCH = "fetch"


class Missing(enum.Enum):
    """Why there is no page behind a GPA."""

    ABSENT = "absent"
    """The hypervisor must do something: `NestedFault`."""
    MMIO = "mmio"
    """An emulated device: #VC 0x400 in an SNP guest, `MmioRead` or `MmioWrite` in a plain one."""


class RmpEntry(Protocol):
    """One entry of the reverse map table, for reading.

    `gpa` is a byte address, `page_size` 0 (4 KiB) or 1 (2 MiB); `perms` are the permission bits of
    VMPL0..VMPL3 (read 1, write 2, user execute 4, supervisor execute 8).
    """

    @property
    def assigned(self) -> bool: ...  # noqa: D102
    @property
    def asid(self) -> int: ...  # noqa: D102
    @property
    def gpa(self) -> int: ...  # noqa: D102
    @property
    def immutable(self) -> bool: ...  # noqa: D102
    @property
    def validated(self) -> bool: ...  # noqa: D102
    @property
    def vmsa(self) -> bool: ...  # noqa: D102
    @property
    def page_size(self) -> int: ...  # noqa: D102
    @property
    def perms(self) -> tuple[int, int, int, int]: ...  # noqa: D102


class GuestMemory(Protocol):
    """Guest memory by GPA; every `gpa` is that of a 4 KiB page, without the C-bit.

    A plain guest asks with `private` False only and never for RMP entries. Answers are kept until
    `Machine.flush`: call it when a page moves, changes sides or loses rights.
    """

    def resolve(self, gpa: int, private: bool, write: bool = False) -> int | Missing:
        """Return the host address of the 4096 bytes that back the page.

        With ``write`` the guest writes there next, as often as it likes.
        """
        ...

    def write_protected(self, gpa: int) -> bool:
        """Whether a shared page that was resolved may not be written before it is so again."""
        ...

    def rmp_lookup(self, gpa: int) -> RmpEntry:
        """Return the entry of the page that backs `gpa` privately (it was resolved before)."""
        ...

    def rmp_update(
        self,
        gpa: int,
        *,
        validated: bool | None = None,
        vmsa: bool | None = None,
        perms: tuple[int, int, int, int] | None = None,
    ) -> None:
        """Change what PVALIDATE and RMPADJUST may change in that entry; None keeps a part."""
        ...
