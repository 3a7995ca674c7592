"""Two things timed side by side, as a ratio that a loaded machine changes little."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
MIB = ((float(1 << 20), "MiB"),)
"""Units of a figure, largest first: (its size, its name)."""


@dataclass(frozen=True)
class Figure:
    """Medians of one comparison; ``ratio`` is the median of the pairs' ratios.

    ``wanted`` is the ratio that it should be at most, ``unit`` what is measured.
    """

    what: str
    seconds: float
    against: str
    baseline: float
    ratio: float
    wanted: float | None = None
    unit: tuple[tuple[float, str], ...] = SECONDS


def compare(
    what: str,
    ours: Callable[[], float],
    against: str,
    baseline: Callable[[], float],
    rounds: int,
    wanted: float | None = None,
    unit: tuple[tuple[float, str], ...] = SECONDS,
) -> Figure:
    """Call both in turn ``rounds`` times; each returns what it took, in seconds or bytes."""
    pairs = []
    for number in range(rounds):
        # Who goes first alternates, so that neither always finds the caches warm.
        if number % 2:
            late = baseline()
            pairs.append((ours(), late))
        else:
            pairs.append((ours(), baseline()))
    return Figure(
        what,
        statistics.median(pair[0] for pair in pairs),
        against,
        statistics.median(pair[1] for pair in pairs),
        statistics.median(pair[0] / pair[1] for pair in pairs),
        wanted,
        unit,
    )


def timed(call: Callable[[], object], units: int = 1) -> Callable[[], float]:
    """A call that returns how many seconds one of its ``units`` took."""

    def run() -> float:
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) / units

    return run


def table(figures: Sequence[Figure]) -> str:
    """The figures as aligned columns, with a heading."""
    rows = [("figure", "median", "against", "median", "ratio", "wanted")]
    rows += [
        (
            *(f.what, human(f.seconds, f.unit), f.against, human(f.baseline, f.unit)),
            *(f"{f.ratio:.2f}", "" if f.wanted is None else f"<= {f.wanted:.2f}"),
        )
        for f in figures
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = (0, 2)
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def human(value: float, units: Sequence[tuple[float, str]] = SECONDS) -> str:
    """A value in the unit that suits it."""
    scale, unit = next((pair for pair in units if value >= pair[0]), units[-1])
    return f"{value / scale:.3g} {unit}"
