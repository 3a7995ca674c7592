"""Two things timed side by side, as a ratio that a loaded machine changes little."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


@dataclass(frozen=True)
class Figure:
    """Medians of one comparison, in seconds; ``ratio`` is the median of the pairs' ratios."""

    what: str
    seconds: float
    against: str
    baseline: float
    ratio: float


def compare(
    what: str,
    ours: Callable[[], float],
    against: str,
    baseline: Callable[[], float],
    rounds: int,
) -> Figure:
    """Call both in turn ``rounds`` times; each returns the seconds it took for one unit."""
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
    rows = [("figure", "median", "against", "median", "ratio")]
    rows += [
        (f.what, human(f.seconds), f.against, human(f.baseline), f"{f.ratio:.2f}") for f in figures
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    left = (0, 2)
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def human(seconds: float) -> str:
    """A time in the unit that suits it."""
    scale, unit = next((pair for pair in _UNITS if seconds >= pair[0]), _UNITS[-1])
    return f"{seconds / scale:.3g} {unit}"
