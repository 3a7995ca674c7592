"""Values for parameter areas, read back by readers of the tests' own.

By hand the tables were also read by ACPICA's iasl (20200925) and the tree by dtc (1.6.1), which
find nothing wrong with them.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest

from kvmlaunch.errors import FormatError
from kvmlaunch.images.igvm.format import PARAMETERS, HeaderType
from kvmlaunch.images.igvm.params import Launch, parameter_bytes
from kvmlaunch.images.plan import ram_regions

RAM = ram_regions(5 << 30)  # 3 GiB, and 2 GiB from 4 GiB on


def value(kind: HeaderType, vcpus: int = 2, command_line: str = "") -> bytes:
    return parameter_bytes(kind, Launch(vcpus, RAM, command_line))


def table(kind: HeaderType, signature: bytes, vcpus: int) -> bytes:
    """The body of an ACPI table whose header is right."""
    raw = value(kind, vcpus)
    name, length = struct.unpack_from("<4sI", raw)
    assert (name, length, sum(raw) & 0xFF) == (signature, len(raw), 0)
    return raw[36:]


def structures(body: bytes) -> list[tuple[int, bytes]]:
    """(type, bytes behind type and length) of the parts of a table."""
    found = []
    while body:
        kind, length = body[0], body[1]
        assert 2 <= length <= len(body)
        found.append((kind, body[2:length]))
        body = body[length:]
    return found


def test_parameter_when_any_is_asked_for_has_a_value() -> None:
    assert all(value(kind) for kind in PARAMETERS)


def test_vp_count_is_the_number_of_vcpus() -> None:
    assert value(HeaderType.VP_COUNT_PARAMETER, 7) == b"\7\0\0\0"


def test_environment_info_says_that_memory_is_private() -> None:
    assert value(HeaderType.ENVIRONMENT_INFO_PARAMETER) == bytes(4)


def test_memory_map_is_the_ram_sorted_with_an_empty_entry_at_the_end() -> None:
    assert struct.unpack("<" + "QQHHI" * 3, value(HeaderType.MEMORY_MAP)) == (
        *(0, 0xC0000, 0, 0, 0),
        *(0x100000, 0x80000, 0, 0, 0),
        *(0, 0, 0, 0, 0),
    )


def test_mmio_ranges_are_the_hole_below_4_gib_and_nothing_above_ram() -> None:
    words = struct.unpack("<QQQQ", value(HeaderType.MMIO_RANGES))
    assert words == (0xC0000, 0x40000, 0x180000, 0)


def test_command_line_ends_with_a_nul() -> None:
    assert value(HeaderType.COMMAND_LINE, command_line="a=b") == b"a=b\0"
    assert value(HeaderType.COMMAND_LINE) == b"\0"


@pytest.mark.parametrize("text", ["a\0b", "\u00e9"])
def test_command_line_when_it_is_no_c_string_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        value(HeaderType.COMMAND_LINE, command_line=text)


def test_madt_has_an_apic_for_each_vcpu() -> None:
    body = table(HeaderType.MADT, b"APIC", 257)
    assert struct.unpack_from("<II", body) == (0xFEE00000, 0)
    parts = structures(body[8:])
    # ACPI 6.5: Processor Local APIC is 0, Processor Local x2APIC 9.
    assert [kind for kind, _ in parts] == [0] * 255 + [9] * 2
    assert parts[254][1] == struct.pack("<BBI", 254, 254, 1)
    assert parts[255][1] == struct.pack("<HIII", 0, 255, 1, 255)


def test_srat_puts_all_into_one_domain() -> None:
    body = table(HeaderType.SRAT, b"SRAT", 256)
    assert struct.unpack_from("<IQ", body) == (1, 0)
    parts = structures(body[12:])
    # APIC affinity 0, x2APIC affinity 2, memory affinity 1.
    assert [kind for kind, _ in parts] == [0] * 255 + [2] + [1] * 2
    assert parts[1][1] == struct.pack("<BBIB3sI", 0, 1, 1, 0, bytes(3), 0)
    assert parts[255][1] == struct.pack("<HIIIII", 0, 0, 255, 1, 0, 0)
    assert parts[257][1] == struct.pack("<IHQQIIQ", 0, 0, 4 << 30, 2 << 30, 0, 1, 0)


def test_slit_has_one_locality() -> None:
    assert table(HeaderType.SLIT, b"SLIT", 2) == struct.pack("<QB", 1, 10)


def test_pptt_has_a_package_with_a_leaf_for_each_vcpu() -> None:
    parts = structures(table(HeaderType.PPTT, b"PPTT", 2))
    # Flags: physical package 1, ACPI processor ID valid 2, leaf 8; the package is at offset 36.
    assert parts == [
        (0, struct.pack("<HIIII", 0, 1, 0, 0, 0)),
        (0, struct.pack("<HIIII", 0, 10, 36, 0, 0)),
        (0, struct.pack("<HIIII", 0, 10, 36, 1, 0)),
    ]


def read_tree(raw: bytes) -> dict[str, Any]:
    """A flattened device tree as nested dictionaries (Devicetree specification 0.4, chapter 5)."""
    words = struct.unpack_from(">10I", raw)
    magic, total, at, strings, reserved, version, compatible, _, strings_size, size = words
    assert (magic, total, version, compatible) == (0xD00DFEED, len(raw), 17, 16)
    assert (raw[reserved : reserved + 16], strings + strings_size) == (bytes(16), total)
    end, stack, root = at + size, [], {}
    while at < end:
        (token,) = struct.unpack_from(">I", raw, at)
        at += 4
        if token == 1:
            name = raw[at : raw.index(0, at)].decode()
            at += -(-(len(name) + 1) // 4) * 4
            node: dict[str, Any] = {}
            (stack[-1] if stack else root)[name] = node
            stack.append(node)
        elif token == 2:
            stack.pop()
        elif token == 3:
            length, offset = struct.unpack_from(">II", raw, at)
            name = raw[strings + offset : raw.index(0, strings + offset)].decode()
            stack[-1][name] = raw[at + 8 : at + 8 + length]
            at += 8 + -(-length // 4) * 4
        else:
            assert token == 9
    assert (at, stack) == (end, [])
    return root[""]  # type: ignore[no-any-return]


def test_device_tree_has_vcpus_memory_and_command_line() -> None:
    root = read_tree(value(HeaderType.DEVICE_TREE, 18, "x=1"))
    assert root["chosen"] == {"bootargs": b"x=1\0"}
    assert root["cpus"]["cpu@11"] == {
        **{"device_type": b"cpu\0", "reg": struct.pack(">I", 0x11), "status": b"okay\0"}
    }
    assert len([name for name in root["cpus"] if name.startswith("cpu@")]) == 18
    assert root["memory@100000000"] == {
        "device_type": b"memory\0",
        "reg": struct.pack(">QQ", 4 << 30, 2 << 30),
    }
