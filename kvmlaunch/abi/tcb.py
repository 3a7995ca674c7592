"""TCB_VERSION: security versions of a platform's parts, one byte each in a u64.

| product      | byte 0      | 1           | 2   | 3   | 6   | 7         |
|--------------|-------------|-------------|-----|-----|-----|-----------|
| Milan, Genoa | boot loader | TEE         | -   | -   | SNP | microcode |
| Turin        | FMC         | boot loader | TEE | SNP | -   | microcode |

Source: AMD 56860, TCB_VERSION; layouts and product numbers compared with virtee/sev.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

from kvmlaunch.errors import FormatError

from ._check import uint

__all__ = ["Product", "Tcb", "product_of"]

Product: TypeAlias = Literal["Milan", "Genoa", "Turin"]

_MILAN = {"bootloader": 0, "tee": 1, "snp": 6, "microcode": 7}
_LAYOUT: dict[Product, dict[str, int]] = {
    "Milan": _MILAN,
    "Genoa": _MILAN,
    "Turin": {"fmc": 0, "bootloader": 1, "tee": 2, "snp": 3, "microcode": 7},
}
# (family, models, product); Genoa's second range is Bergamo and Siena.
_MODELS: tuple[tuple[int, range, Product], ...] = (
    (0x19, range(0x10), "Milan"),
    (0x19, range(0x10, 0x20), "Genoa"),
    (0x19, range(0xA0, 0xB0), "Genoa"),
    (0x1A, range(0x12), "Turin"),
)


def product_of(family: int, model: int) -> Product | None:
    """Return the product of a combined CPUID family and model; None for an unknown one."""
    found = (p for f, models, p in _MODELS if f == family and model in models)
    return next(found, None)


@dataclasses.dataclass(frozen=True)
class Tcb:
    """Security versions of a platform's parts. `fmc` exists on Turin only.

    Raises:
        FormatError: a version does not fit in a byte.
    """

    bootloader: int = 0
    tee: int = 0
    snp: int = 0
    microcode: int = 0
    fmc: int = 0

    def __post_init__(self) -> None:
        """Refuse a version that is too large."""
        for name, value in dataclasses.asdict(self).items():
            uint(name, value, 8)

    def encode(self, product: Product) -> int:
        """Return TCB_VERSION (u64) in the layout of `product`.

        Raises:
            FormatError: an FMC version for a product that has none.
        """
        layout = _LAYOUT[product]
        if self.fmc and "fmc" not in layout:
            raise FormatError(f"{product} has no FMC version")
        return sum(getattr(self, name) << 8 * byte for name, byte in layout.items())

    def covers(self, other: Tcb) -> bool:
        """Whether every part is at least that of `other`."""
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return all(a >= b for a, b in zip(mine, others, strict=True))

    @classmethod
    def decode(cls, product: Product, value: int) -> Tcb:
        """Read a TCB_VERSION; reserved bytes are skipped."""
        return cls(**{n: value >> 8 * byte & 0xFF for n, byte in _LAYOUT[product].items()})
