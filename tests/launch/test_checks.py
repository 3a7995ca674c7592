"""The line by which a guest tells that a check of its own failed."""

from __future__ import annotations

import pytest

from kvmlaunch.launch.checks import FailedCheck, LastLine

GOOD = b"check failed: psc.c:41: *word(gpa) is 0x0, expected 0x401fff\n"
CHECK = FailedCheck("psc.c", 41, "*word(gpa)", 0, 0x401FFF)


def said(*parts: bytes) -> FailedCheck | None:
    line = LastLine()
    for part in parts:
        line.add(part)
    return line.failed_check()


@pytest.mark.parametrize(
    "parts",
    [
        [GOOD],
        [GOOD.replace(b"\n", b"\r\n")],
        [GOOD[:-1]],
        [b"psc\n", GOOD],
        [b"psc\n" + GOOD],
        [b"one\ntwo\n" + GOOD[:7], GOOD[7:]],
        [b"x\n", *(bytes([byte]) for byte in GOOD)],
    ],
)
def test_line_when_it_is_the_last_one_is_understood(parts: list[bytes]) -> None:
    assert said(*parts) == CHECK


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [GOOD, b"more\n"],
        [GOOD + b"more"],
        [b"text " + GOOD],
        [GOOD.replace(b"0x401fff", b"401fff")],
        [GOOD.replace(b"0x401fff", b"0x10000000000000000")],
        [GOOD.replace(b":41:", b":4x:")],
        [GOOD.replace(b"word", b"w\x1brd")],
        [GOOD.replace(b"word", b"w" * 600)],
        [b"check failed: a:1: " + b"w" * 100000 + b" is 0x0, expected 0x1\n"],
    ],
)
def test_line_when_it_is_none_is_ignored(parts: list[bytes]) -> None:
    assert said(*parts) is None


def test_line_when_the_guest_never_ends_it_is_not_kept() -> None:
    line = LastLine()
    for _ in range(1000):
        line.add(b"x" * 4096)
    assert len(line._line) < 5000


def test_check_when_shown_is_the_line_that_was_printed() -> None:
    assert f"{CHECK}\n".encode() == GOOD
