"""TAP lines from pytest, and several runs joined into one stream."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mainline.tap import Stream

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS = """
import pytest
def test_good(): pass
@pytest.mark.parametrize("x", ["a#b"])
def test_named(x): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip(reason="no such host")
def test_skipped(): pass
@pytest.fixture
def broken(): raise RuntimeError("fixture")
def test_error(broken): pass
"""


def lines_of(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "test_them.py").write_text(text)
    out = tmp_path / "out.tap"
    subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-p", "tests.mainline.tap", "--tap", str(out), f"--rootdir={tmp_path}"),
            str(tmp_path / "test_them.py"),
        ],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        check=False,
        timeout=60,
    )
    return out.read_text().splitlines()


def stream_of(*runs: list[str]) -> tuple[list[str], bool]:
    out = io.StringIO()
    stream = Stream(out)
    for run in runs:
        stream.take(run)
    well = stream.end()
    return out.getvalue().splitlines(), well


def test_plugin_when_tests_end_each_way_writes_a_line_each(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, TESTS)
    assert [line for line in lines if not line.startswith("#")] == [
        "ok - test_them.py::test_good",
        "ok - test_them.py::test_named[a_b]",
        "not ok - test_them.py::test_bad",
        "ok - test_them.py::test_skipped # SKIP no such host",
        "not ok - test_them.py::test_error",
    ]
    assert lines[-1] == "# end 1"
    assert any("assert 1 == 2" in line for line in lines)


def test_plugin_when_a_file_can_not_be_imported_says_not_ok(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, "import nothing_of_that_name")
    assert "not ok - test_them.py" in lines
    assert lines[-1] == "# end 2"


def test_stream_when_runs_are_joined_numbers_their_tests() -> None:
    lines, well = stream_of(
        ["ok - a", "#   why", "not ok - b", "# end 1"],
        ["ok - c # SKIP none", "# end 0"],
    )
    assert lines == [
        "TAP version 13",
        "ok 1 - a",
        "#   why",
        "not ok 2 - b",
        "ok 3 - c # SKIP none",
        "1..3",
        "# Totals: pass:1 fail:1 xfail:0 xpass:0 skip:1 error:0",
    ]
    assert not well


def test_stream_when_a_run_breaks_off_counts_a_failure() -> None:
    lines, well = stream_of(["ok - a"])
    assert lines[2] == "not ok 2 - the run came to its end"
    assert not well


@pytest.mark.parametrize("run", [["# end 5"], ["ok - a # SKIP none", "# end 0"]])
def test_stream_when_nothing_passed_is_not_well(run: list[str]) -> None:
    assert stream_of(run)[1] is False


def test_stream_when_all_passed_is_well() -> None:
    assert stream_of(["ok - a", "# end 0"])[1] is True
