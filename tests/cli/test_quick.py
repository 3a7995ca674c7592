"""Command lines read without argparse: the same arguments as argparse's, or none."""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvmlaunch.cli import measure
from kvmlaunch.cli.parser import make_parser
from kvmlaunch.cli.quick import QuickParser
from tests.cli.command import Cli

PARSER = make_parser(["measure"])


def quick(*words: str) -> dict[str, Any] | None:
    parser = QuickParser()
    parser.set_defaults(quiet=False)
    measure.add_options(parser)
    args = parser.parse(words)
    return None if args is None else vars(args)


def slow(*words: str) -> dict[str, Any] | None:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            return vars(PARSER.parse_args(["measure", *words]))
        except SystemExit:
            return None


def actions() -> list[argparse.Action]:
    parser = argparse.ArgumentParser()
    measure.add_options(parser)
    return [action for action in parser._actions if action.dest != "help"]


def word_of(action: argparse.Action) -> str:
    """A value that the option takes."""
    if action.choices is not None:
        return next(iter(action.choices))
    return "0x1000" if action.type is not None else "some text"


@pytest.mark.parametrize("action", actions(), ids=lambda action: action.dest)
def test_option_when_given_alone_is_read_as_by_argparse(action: argparse.Action) -> None:
    lines: list[list[str]]
    if not action.option_strings:
        lines = [["file"]]
    elif action.nargs == 0:
        lines = [[name] for name in action.option_strings]
    else:
        value = word_of(action)
        lines = [[name, value] for name in action.option_strings]
        lines += [[f"{name}={value}"] for name in action.option_strings]
        if action.type is None and action.choices is None:
            lines += [
                [f"{name}={odd}"] for name in action.option_strings for odd in ("--", "=", "-v")
            ]
    for words in lines:
        assert quick(*words) == slow(*words) is not None


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--vcpus", "2", "--ovmf", "OVMF.fd", "--append=-x=1 y", "--vmsa", "a", "--vmsa", ":1"],
        ["image", "--vcpus", "1", "--vcpus", "3", "--force", "-v"],
        ["--force", "image", "--set-vmsa", "rip=1", "--set-vmsa=1:rbx=7"],
    ],
)
def test_plain_line_when_read_is_read_as_by_argparse(words: list[str]) -> None:
    assert quick(*words) == slow(*words) is not None


@pytest.mark.parametrize(
    "words",
    [
        *(["--help"], ["-h"], ["--vcpu", "1"], ["--vc=1"], ["-vv"], ["-q"], ["--version"]),
        *(["--vcpus"], ["--vcpus", "x"], ["--vcpus", "-1"], ["--vcpus", "--force"], ["--vcpus="]),
        *(["--mode", "none"], ["--force=1"], ["one", "two"], ["--", "image"], ["-"], [""]),
        *(["--log", "-"], ["--ovmf", ""], ["--vars-size", "1", "--vars-file", "x"]),
        *(["--nothing"], ["--memory", "1Q"], ["--memory", ""]),
    ],
)
def test_line_with_a_doubt_when_read_is_left_to_argparse(words: list[str]) -> None:
    assert quick(*words) is None


NAMES = sorted({name for action in actions() for name in action.option_strings})
OTHERS = (
    *("image", "1", "0x10", "-1", "", "-", "--", "--vcpu", "--vcpus=2", "--log=-", "a b", "-vq"),
    *("--ovmf=", "--order=kvm", "snp", "hex", "sync", "512M", "--memory=x", "rip=1", "-v=1"),
    *("=", "--append==", "--append=--", "--vcpus=--", "--order=--"),
    *("--append=--x", "--mode=sev", "--compat=sev-snp-measure", "--vars-file=a", "@file"),
)
WORDS = st.sampled_from(NAMES) | st.sampled_from(OTHERS)


@settings(max_examples=300, deadline=None)
@given(st.lists(WORDS, max_size=6))
@example(["--vars-file", "a", "--vars-file", "b"])
@example(["--append", "@file", "image"])
def test_line_when_read_at_all_is_read_as_by_argparse(words: list[str]) -> None:
    found = quick(*words)
    assert found is None or found == slow(*words)


def test_lists_when_filled_do_not_stay_for_the_next_line() -> None:
    parser = QuickParser()
    parser.add_argument("--many", action="append", default=[])
    assert parser.parse(["--many", "a"]).many == ["a"]
    assert parser.parse([]).many == []


def test_measure_when_argparse_has_to_be_asked_prints_the_same(cli: Cli, halt: Path) -> None:
    short = cli("measure", "--vcpu=2", halt)  # ambiguous
    assert (short.code, short.out) == (2, "")
    assert "ambiguous option: --vcpu=2 could match --vcpus, --vcpu-type" in short.err
    assert cli("measure", "--vcpus", 2, halt) == cli("measure", "--vcpus=2", "--", halt)
