"""Benchmarks run and give positive figures; how large they are is not tested."""

from __future__ import annotations

import tempfile
from importlib import import_module
from pathlib import Path

import pytest

from tests.benchmarks.__main__ import NAMES, main
from tests.benchmarks.native import NoCompiler
from tests.benchmarks.timing import MIB, Figure, compare, human, table
from tests.host import require_kvm


@pytest.mark.parametrize("name", NAMES)
def test_benchmark_with_one_round_gives_positive_ratios(name: str) -> None:
    module = import_module(f"tests.benchmarks.{name}")
    if module.NEEDS_KVM:
        require_kvm()
    # Not tmp_path, which would keep images of 256 MiB.
    with tempfile.TemporaryDirectory() as work:
        try:
            found = module.figures(Path(work), 1)
        except NoCompiler as error:
            pytest.skip(str(error))
    assert len(found) >= 2
    assert all(f.seconds > 0 and f.baseline > 0 and f.ratio > 0 for f in found)


def test_main_prints_a_row_per_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rounds", "1", "measured_page"]) == 0
    out = capsys.readouterr().out
    machine, _, *lines = out.splitlines()
    assert "Python" in machine
    assert "hashing" in machine
    assert [line.split()[0] for line in lines] == ["figure", "measured", "measured"]


def test_compare_takes_the_median_of_the_pairs_ratios() -> None:
    ours, theirs = iter([2.0, 9.0, 8.0]), iter([1.0, 3.0, 2.0])
    figure = compare("a", lambda: next(ours), "b", lambda: next(theirs), 3)
    assert figure == Figure("a", 8.0, "b", 2.0, 3.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.56e-6, "4.56 us"), (7e-10, "0.7 ns")],
)
def test_human_uses_the_unit_that_suits(seconds: float, text: str) -> None:
    assert human(seconds) == text


def test_table_aligns_its_columns() -> None:
    lines = table([Figure("x", 1.0, "long name", 0.5, 2.0)]).splitlines()
    assert lines == [
        "figure  median  against    median  ratio  wanted",
        "x          1 s  long name  500 ms   2.00",
    ]


def test_table_names_the_ratio_that_is_wanted_and_the_unit() -> None:
    figure = Figure("x", 30 << 20, "y", 60 << 20, 0.5, 0.667, MIB)
    assert table([figure]).splitlines()[1].split() == (
        ["x", "30", "MiB", "y", "60", "MiB", "0.50", "<=", "0.67"]
    )
