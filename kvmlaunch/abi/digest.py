"""Launch digest: the PAGE_INFO chain, and digests as text.

This is the simple form, page by page; `kvmlaunch.hashing` is the fast one.

The digest starts as 48 zero bytes. Each 4 KiB page, in the order of the launch updates,
replaces it by SHA-384 over PAGE_INFO (112 bytes):

| offset | size | field                                   |
|--------|------|-----------------------------------------|
| 0x00   | 48   | DIGEST_CUR, the digest before this page |
| 0x30   | 48   | CONTENTS, see `page_contents`           |
| 0x60   | 2    | LENGTH, 0x70                            |
| 0x62   | 1    | PAGE_TYPE                               |
| 0x63   | 1    | bit 0 IMI_PAGE                          |
| 0x64   | 1    | reserved                                |
| 0x65   | 3    | VMPL1_PERMS, VMPL2_PERMS, VMPL3_PERMS   |
| 0x68   | 8    | GPA, a byte address                     |

Source: AMD 56860, PAGE_INFO structure (table 67 in the revision that sev-snp-measure
quotes). That tool names the bytes 0x64..0x67 in another order; they are zero under KVM,
so no published digest tells the difference. The order here is that of coconut-svsm and
gce-tcb-verifier and follows the command word of LAUNCH_UPDATE.
"""

from __future__ import annotations

from kvmlaunch.errors import FormatError

from .page import PAGE_SIZE, Buffer, PageType

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from typing import Literal

__all__ = [
    "DIGEST_SIZE",
    "VMSA_TSC",
    "LaunchDigest",
    "format_digest",
    "page_contents",
    "page_info",
    "parse_digest",
    "sha384",
]

DIGEST_SIZE = 48
"""Bytes of a SHA-384, thus of a launch digest."""
VMSA_TSC = slice(0x2F0, 0x300)
"""GUEST_TSC_SCALE and GUEST_TSC_OFFSET in a VMSA: firmware fills them in after the hash."""

_ZEROS = bytes(DIGEST_SIZE)
_NO_PERMS = (0, 0, 0)
_PAGE_INFO_SIZE = 0x70
_LAST_GPA = (1 << 64) - PAGE_SIZE
_TYPES = frozenset(int(t) for t in PageType)
_MEASURED = frozenset(int(t) for t in PageType if t.measures_contents)


def sha384(data: Buffer) -> bytes:
    """Return SHA-384 of `data`, 48 bytes."""
    import hashlib  # with the extension nobody needs it, and it loads OpenSSL

    return hashlib.sha384(data).digest()


class LaunchDigest:
    """The running launch digest.

    Args:
        start: digest to go on from, 48 bytes (`--ovmf-hash`); zeros for a new guest.
    """

    __slots__ = ("_value",)

    def __init__(self, start: bytes = _ZEROS) -> None:
        """Start a chain at `start`."""
        if len(start) != DIGEST_SIZE:
            raise FormatError(f"a launch digest is {DIGEST_SIZE} bytes, start has {len(start)}")
        self._value = bytes(start)

    @property
    def value(self) -> bytes:
        """The digest after the pages so far, 48 bytes."""
        return self._value

    def hex(self) -> str:
        """Return the digest as 96 lower-case hex digits."""
        return self._value.hex()

    def update(
        self,
        page_type: int,
        gpa: int,
        page: Buffer | None = None,
        *,
        imi_page: bool = False,
        vmpl_perms: tuple[int, int, int] = _NO_PERMS,
        as_given: bool = False,
    ) -> bytes:
        """Add one 4 KiB page; return its CONTENTS (48 bytes).

        Args:
            page_type: 1..6, see `PageType`.
            gpa: byte address, page aligned.
            page: 4096 bytes; needed where contents are measured, else ignored.
            imi_page: IMI_PAGE of the update.
            vmpl_perms: permissions of VMPL1, VMPL2, VMPL3.
            as_given: see `page_contents`.

        Raises:
            FormatError: an argument is out of its range; the digest is unchanged.
        """
        contents = page_contents(page_type, page, as_given=as_given)
        self.update_contents(page_type, gpa, contents, imi_page=imi_page, vmpl_perms=vmpl_perms)
        return contents

    def update_contents(
        self,
        page_type: int,
        gpa: int,
        contents: bytes,
        *,
        imi_page: bool = False,
        vmpl_perms: tuple[int, int, int] = _NO_PERMS,
    ) -> None:
        """Add one 4 KiB page whose CONTENTS (48 bytes) is known already."""
        self._value = sha384(
            page_info(
                self._value, contents, page_type, gpa, imi_page=imi_page, vmpl_perms=vmpl_perms
            )
        )

    def __repr__(self) -> str:
        """Return an expression that continues this chain."""
        return f"LaunchDigest(bytes.fromhex('{self.hex()}'))"

    def __str__(self) -> str:
        """Return 96 lower-case hex digits."""
        return self.hex()


def page_contents(page_type: int, page: Buffer | None, *, as_given: bool = False) -> bytes:
    """Return CONTENTS of a page: SHA-384 of it, or 48 zero bytes where firmware measures none.

    A VMSA is hashed with the bytes 0x2F0..0x2FF (TSC scale and offset) taken as zero, as
    firmware does. `as_given` hashes it as it stands, as measuring tools do; the two agree
    on every VMSA whose bytes there are zero.

    Raises:
        FormatError: no such page type, or a measured page that isn't 4096 bytes.
    """
    if page_type not in _MEASURED:
        _check_type(page_type)
        return _ZEROS
    if page is None:
        raise FormatError(f"a {PageType(page_type).name} page is measured by its contents")
    if len(page) != PAGE_SIZE:
        raise FormatError(f"a page is {PAGE_SIZE} bytes, not {len(page)}")
    if page_type == PageType.VMSA and not as_given and any(page[VMSA_TSC]):
        page = bytes(page[: VMSA_TSC.start]) + bytes(16) + bytes(page[VMSA_TSC.stop :])
    return sha384(page)


def page_info(
    current: bytes,
    contents: bytes,
    page_type: int,
    gpa: int,
    *,
    imi_page: bool = False,
    vmpl_perms: tuple[int, int, int] = _NO_PERMS,
) -> bytes:
    """Return the PAGE_INFO structure, 112 bytes.

    Raises:
        FormatError: a digest isn't 48 bytes, `page_type` isn't 1..6, `gpa` isn't page
            aligned or above 64 bits, or a permission doesn't fit in 8 bits.
    """
    if len(current) != DIGEST_SIZE or len(contents) != DIGEST_SIZE:
        raise FormatError(
            f"DIGEST_CUR and CONTENTS are {DIGEST_SIZE} bytes, not {len(current)}, {len(contents)}"
        )
    if page_type not in _TYPES:
        _check_type(page_type)
    if gpa & (PAGE_SIZE - 1) or not 0 <= gpa <= _LAST_GPA:
        raise FormatError(f"GPA {gpa:#x} is not a page-aligned 64-bit address")
    # `is`: nearly every page comes without permissions, and this runs once per page.
    if vmpl_perms is not _NO_PERMS and not all(0 <= p <= 0xFF for p in vmpl_perms):
        raise FormatError(f"VMPL permissions {vmpl_perms} do not fit in 8 bits each")
    vmpl1, vmpl2, vmpl3 = vmpl_perms
    small = bytes((_PAGE_INFO_SIZE, 0, page_type, imi_page, 0, vmpl1, vmpl2, vmpl3))
    return b"".join((current, contents, small, gpa.to_bytes(8, "little")))


def _check_type(page_type: int) -> None:
    if page_type not in _TYPES:
        raise FormatError(f"page type {page_type} is not one of 1 to 6")


# Compiled when they are needed.
_HEX = r"(?:0[xX])?([0-9a-fA-F]{96})"
_BARE_HEX = r"(?:0[xX])?[0-9a-fA-F]+"


def parse_digest(text: str) -> bytes:
    """Return the 48 bytes of a launch digest written by a person or a tool.

    Taken are 96 hex digits (any case, with or without 0x), base64 of the 48 bytes, and
    base64 of the 96 hex digits; line breaks in base64 are skipped.

    Raises:
        FormatError: anything else.
    """
    import re  # a digest is mostly asked for, not given

    text = text.strip()
    if found := re.fullmatch(_HEX, text):
        return bytes.fromhex(found[1])
    # 64 hex digits are base64 of 48 bytes too, but what was pasted is a SHA-256.
    if re.fullmatch(_BARE_HEX, text):
        digits = len(text.lower().removeprefix("0x"))
        raise FormatError(f"a launch digest has 96 hex digits, this has {digits}")
    import base64
    import binascii

    try:
        raw = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) == DIGEST_SIZE:
        return raw
    if found := re.fullmatch(_HEX, raw.decode("latin-1").strip()):
        return bytes.fromhex(found[1])
    raise FormatError("a launch digest is 96 hex digits, or base64 of 48 bytes or of the digits")


def format_digest(digest: bytes, form: Literal["hex", "base64"] = "hex") -> str:
    """Return `digest` (48 bytes) as 96 lower-case hex digits or as base64 of its bytes."""
    if len(digest) != DIGEST_SIZE:
        raise FormatError(f"a launch digest is {DIGEST_SIZE} bytes, not {len(digest)}")
    if form == "hex":
        return digest.hex()
    if form == "base64":
        import base64

        return base64.b64encode(digest).decode("ascii")
    raise FormatError(f"digest format {form!r} is not one of hex, base64")
