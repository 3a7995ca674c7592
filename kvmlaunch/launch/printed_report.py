"""An attestation report that a guest prints on its console.

As the example guest ``attest`` does: hex digits, in lines of any length, between the lines
``-----BEGIN ATTESTATION REPORT-----`` and ``-----END ATTESTATION REPORT-----``. The first
such block counts. It is the guest's word: the report's signature says what it is worth.
"""

from __future__ import annotations

from kvmlaunch.abi.report import REPORT_SIZE
from kvmlaunch.errors import FormatError

__all__ = ["MEASUREMENT", "PrintedReport"]

MEASUREMENT = slice(0x90, 0xC0)
"""Part of an ATTESTATION_REPORT (AMD 56860)."""

_BEGIN = b"-----BEGIN ATTESTATION REPORT-----\n"
_END = b"-----END ATTESTATION REPORT-----"
_MOST = 4 * REPORT_SIZE


class PrintedReport:
    """Listens to a console; keeps the report and little else."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._begun = False
        self._ended = False

    def add(self, text: bytes) -> None:
        """The guest printed this."""
        if self._ended:
            return
        self._text += text.replace(b"\r", b"")
        if not self._begun:
            at = self._text.find(_BEGIN)
            self._begun = at >= 0
            # A marker may come in two parts.
            del self._text[: at + len(_BEGIN) if self._begun else -len(_BEGIN)]
        if self._begun:
            at = self._text.find(_END)
            self._ended = at >= 0 or len(self._text) > _MOST
            del self._text[at if at >= 0 else _MOST + 1 :]

    def report(self) -> bytes:
        """The report's 1184 bytes. Raises FormatError where the guest printed none."""
        if not self._begun:
            raise FormatError("the guest printed no attestation report")
        if not self._ended:
            raise FormatError("the guest's attestation report has no end")
        try:
            report = bytes.fromhex(self._text.decode("ascii"))
        except ValueError:
            raise FormatError("the guest's attestation report is not hex") from None
        if len(report) != REPORT_SIZE:
            raise FormatError(
                f"the guest's attestation report has {len(report)} bytes, not {REPORT_SIZE}"
            )
        return report
