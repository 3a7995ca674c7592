"""Names of a guest's code, from the symbols of its ELF file."""

from __future__ import annotations

from bisect import bisect_right
from typing import IO, cast

from elftools.elf.constants import SH_FLAGS
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from kvmlaunch.images.plan import LaunchPlan
from kvmlaunch.images.source import ViewStream

__all__ = ["Symbols"]

_KINDS = ("STT_FUNC", "STT_NOTYPE")


class Symbols:
    """Address -> name. Without symbols it knows no address."""

    def __init__(self, symbols: dict[int, str], code: list[tuple[int, int]]) -> None:
        """``code`` are the ranges (first, end) in which addresses have a name."""
        self._places = sorted(symbols)
        self._names = symbols
        self._code = code

    @classmethod
    def of_plan(cls, plan: LaunchPlan) -> Symbols:
        """The symbols of a plan's image; none where it isn't an ELF file."""
        if plan.image_type != "elf":
            return cls({}, [])
        try:
            return cls._read(ELFFile(cast("IO[bytes]", ViewStream(plan.data))))
        except Exception:  # whatever pyelftools makes of hostile bytes
            # It was good enough to launch; what it lacks is names.
            return cls({}, [])

    @classmethod
    def _read(cls, elf: ELFFile) -> Symbols:
        found: dict[int, str] = {}
        code = []
        for section in elf.iter_sections():
            if section["sh_flags"] & SH_FLAGS.SHF_EXECINSTR:
                first = int(section["sh_addr"])
                code.append((first, first + int(section["sh_size"])))
            if not isinstance(section, SymbolTableSection):
                continue
            for symbol in section.iter_symbols():
                if symbol["st_info"]["type"] in _KINDS and isinstance(symbol["st_shndx"], int):
                    # A function's name rather than a label's at the same place.
                    if symbol["st_info"]["type"] == "STT_FUNC":
                        found[int(symbol["st_value"])] = symbol.name
                    else:
                        found.setdefault(int(symbol["st_value"]), symbol.name)
        return cls(found, code)

    def name(self, address: int) -> str | None:
        """``symbol+0xoffset`` for an address in the guest's code."""
        if not any(first <= address < end for first, end in self._code):
            return None
        at = bisect_right(self._places, address) - 1
        if at < 0:
            return None
        start = self._places[at]
        offset = f"+{address - start:#x}" if address > start else ""
        return f"{self._names[start]}{offset}"
