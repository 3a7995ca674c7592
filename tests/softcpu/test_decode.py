"""Lengths and operands of instructions; the lengths against objdump where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess

import _cffi_backend
import pytest

from kvmlaunch.softcpu.decode import decode, io_instructions


@pytest.mark.parametrize(
    ("bits", "code", "length"),
    [
        (64, "90", 1),
        (64, "4889c8", 3),
        (64, "48b8efcdab8967452301", 10),
        (64, "8b042578563412", 7),
        (64, "8b0578563412", 6),
        (64, "66c70578563412abcd", 9),
        (64, "c78424000100007856 3412", 11),
        (64, "f20f01ff", 4),
        (64, "0f1f840000000000", 8),
        (64, "0f3a0fc108", 5),
        (64, "660f38f6c1", 5),
        (64, "c4e278f2c1", 5),
        (64, "e978563412", 5),
        (64, "66e978563412", 6),
        (64, "c8102003", 4),
        (64, "f6051000000001", 7),
        (64, "f615 10000000", 6),
        (64, "a10123456789abcdef", 9),
        (32, "a178563412", 5),
        (32, "66b83412", 4),
        (32, "678b1e3412", 5),
        (32, "ea785634121000", 7),
        (32, "40", 1),
        (16, "b83412", 3),
        (16, "66b878563412", 6),
        (16, "8b863412", 4),
        (16, "8b1e3412", 4),
        (16, "ea34121000", 5),
        (16, "6667a178563412", 7),
    ],
)
def test_decode_when_instruction_is_whole_knows_its_length(
    bits: int, code: str, length: int
) -> None:
    raw = bytes.fromhex(code)
    found = decode(raw + b"\x90" * 4, bits)
    assert found is not None
    assert found.length == length == len(raw)
    assert decode(raw[:-1], bits) is None or length == 1


def test_decode_when_prefixes_never_end_gives_up() -> None:
    assert decode(b"\x66" * 15 + b"\x90", 64) is None


@pytest.mark.parametrize(
    ("code", "size", "changes"),
    [
        ("8803", 1, False),
        ("668903", 2, False),
        ("8903", 4, False),
        ("488903", 8, False),
        ("0003", 1, True),
        ("0103", 4, True),
        ("800301", 1, True),
        ("803b01", 1, False),
        ("833b01", 4, False),
        ("f603 01", 1, False),
        ("f613", 1, True),
        ("ff03", 4, True),
        ("ff33", 4, False),
        ("0fb603", 1, False),
        ("0fb703", 2, False),
        ("0fb10b", 4, True),
        ("8703", 4, True),
        ("0fab03", 4, True),
        ("0fba2b03", 4, True),
        ("0fba2303", 4, False),
        ("c603 01", 1, False),
        ("4863 03", 4, False),
        ("89c3", 4, False),
    ],
)
def test_operand_when_in_memory_has_size_and_kind(code: str, size: int, changes: bool) -> None:
    found = decode(bytes.fromhex(code), 64)
    assert found is not None
    assert found.access_size == size
    assert found.changes_memory is changes


def test_io_when_in_a_block_is_found_at_its_start() -> None:
    # mov al,0xec (not IN); in al,dx; rep outsd; out 0x10,eax with prefix; add al,0x6c
    code = bytes.fromhex("b0ec ec f36f 66e710 046c")
    assert io_instructions(code, 64, 5) == [2, 3, 5]


def test_io_when_block_can_not_be_followed_all_places_count() -> None:
    assert io_instructions(bytes.fromhex("b0ec ec 0f"), 64, 7) == [1, 2]


def test_lengths_when_objdump_reads_a_library_are_the_same() -> None:
    if shutil.which("objdump") is None:
        pytest.skip("there is no objdump to compare with (apt install binutils)")
    command = ["objdump", "-d", "-w", "--insn-width=16", _cffi_backend.__file__]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    lines = re.findall(r"^ *[0-9a-f]+:\t((?:[0-9a-f]{2} )+)\s*\t(\S+)", text, re.MULTILINE)
    if not lines or "x86-64" not in text:
        pytest.skip("this isn't a machine with x86-64 programs")
    wrong = []
    for raw, name in lines[:100_000]:
        code = bytes.fromhex(raw)
        found = decode(code + b"\x90" * 15, 64)
        if found is None or found.length != len(code):
            wrong.append((raw, name))
    # XOP and EVEX aren't known; WAIT is an instruction of its own.
    known = [w for w in wrong if not w[0].startswith(("62 ", "8f ", "9b ")) and w[1] != "(bad)"]
    assert len(lines) > 1000
    assert known == []
