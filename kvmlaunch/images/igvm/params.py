"""What a loader writes into parameter areas: values that come from the launch at hand.

ACPI tables (ACPI specification 6.5, chapter 5.2) and the device tree (Devicetree specification
0.4, chapter 5) say no more than the launch has: vCPUs, RAM, local APICs. No table says what
kvmlaunch hasn't got (I/O APIC, caches, NUMA distances).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.errors import FormatError
from kvmlaunch.images.igvm.format import HeaderType, MemoryEntry, MemoryType
from kvmlaunch.images.plan import HIGH_MEMORY, LOW_MEMORY_END, MemoryRegion

__all__ = ["Launch", "parameter_bytes"]

_ACPI_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_LAPIC_ADDRESS = 0xFEE0_0000
_XAPIC_LAST = 0xFE  # an xAPIC's ID has 8 bits, and 0xFF is for all
_ENABLED = 1
_FDT_MAGIC, _FDT_VERSION, _FDT_COMPATIBLE = 0xD00DFEED, 17, 16
_FDT_BEGIN, _FDT_END_NODE, _FDT_PROP, _FDT_END = 1, 2, 3, 9


@dataclass(frozen=True)
class Launch:
    """What parameters tell: number of vCPUs (APIC IDs from 0), RAM by GPA, command line."""

    vcpus: int
    ram: tuple[MemoryRegion, ...]
    command_line: str = ""


def parameter_bytes(kind: int, launch: Launch) -> bytes:
    """The value of a parameter. Raises FormatError where there is none."""
    return _MAKERS[HeaderType(kind)](launch)


def _vp_count(launch: Launch) -> bytes:
    return struct.pack("<I", launch.vcpus)


def _environment(launch: Launch) -> bytes:
    # Bit 0, memory_is_shared: memory that the file doesn't name is private here.
    return struct.pack("<I", 0)


def _memory_map(launch: Launch) -> bytes:
    entries = [
        MemoryEntry(m.gpa // PAGE_SIZE, m.size // PAGE_SIZE, MemoryType.MEMORY) for m in launch.ram
    ]
    return b"".join(entry.encode() for entry in (*entries, MemoryEntry(0, 0, 0)))


def _command_line(launch: Launch) -> bytes:
    try:
        text = launch.command_line.encode("ascii")
    except UnicodeEncodeError:
        raise FormatError("a command line for IGVM is ASCII") from None
    if b"\0" in text:
        raise FormatError("a command line has no NUL in it")
    return text + b"\0"


def _mmio_ranges(launch: Launch) -> bytes:
    """Below 4 GiB the hole that RAM leaves; above, a range without pages: nothing is there."""
    low = (LOW_MEMORY_END // PAGE_SIZE, (HIGH_MEMORY - LOW_MEMORY_END) // PAGE_SIZE)
    high = max(HIGH_MEMORY, *(region.end for region in launch.ram))
    return struct.pack("<QQQQ", *low, high // PAGE_SIZE, 0)


def _acpi_table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A system description table with its checksum (ACPI 6.5, table 5.4)."""
    length = _ACPI_HEADER.size + len(body)
    fields = (signature, length, revision, 0, b"KVMLCH", b"KVMLAUNC", 1, b"KVML", 1)
    table = bytearray(_ACPI_HEADER.pack(*fields) + body)
    table[9] = -sum(table) & 0xFF
    return bytes(table)


def _madt(launch: Launch) -> bytes:
    """Local APICs only: ACPI 6.5, 5.2.12.2 and 5.2.12.12 (x2APIC)."""
    body = struct.pack("<II", _LAPIC_ADDRESS, 0)
    for vcpu in range(launch.vcpus):
        if vcpu <= _XAPIC_LAST:
            body += struct.pack("<BBBBI", 0, 8, vcpu, vcpu, _ENABLED)
        else:
            body += struct.pack("<BBHIII", 9, 16, 0, vcpu, _ENABLED, vcpu)
    return _acpi_table(b"APIC", 5, body)


def _srat(launch: Launch) -> bytes:
    """One proximity domain: ACPI 6.5, 5.2.16.1 (APIC), 5.2.16.2 (memory), 5.2.16.3 (x2APIC)."""
    body = struct.pack("<IQ", 1, 0)
    for vcpu in range(launch.vcpus):
        if vcpu <= _XAPIC_LAST:
            body += struct.pack("<BBBBIB3sI", 0, 16, 0, vcpu, _ENABLED, 0, bytes(3), 0)
        else:
            body += struct.pack("<BBHIIIII", 2, 24, 0, 0, vcpu, _ENABLED, 0, 0)
    for region in launch.ram:
        body += struct.pack("<BBIHQQIIQ", 1, 40, 0, 0, region.gpa, region.size, 0, _ENABLED, 0)
    return _acpi_table(b"SRAT", 3, body)


def _slit(launch: Launch) -> bytes:
    """One locality, at distance 10 from itself (ACPI 6.5, 5.2.17)."""
    return _acpi_table(b"SLIT", 1, struct.pack("<QB", 1, 10))


def _pptt(launch: Launch) -> bytes:
    """A package with a leaf per vCPU (ACPI 6.5, 5.2.30.1, processor hierarchy nodes)."""
    physical, valid, leaf = 1 << 0, 1 << 1, 1 << 3
    package = _ACPI_HEADER.size
    body = struct.pack("<BBHIIII", 0, 20, 0, physical, 0, 0, 0)
    for vcpu in range(launch.vcpus):
        body += struct.pack("<BBHIIII", 0, 20, 0, valid | leaf, package, vcpu, 0)
    return _acpi_table(b"PPTT", 3, body)


class _Tree:
    """A flattened device tree in the making."""

    def __init__(self) -> None:
        self._nodes = bytearray()
        self._names = bytearray()

    def begin(self, name: str) -> None:
        self._nodes += struct.pack(">I", _FDT_BEGIN) + _aligned(name.encode() + b"\0")

    def end(self) -> None:
        self._nodes += struct.pack(">I", _FDT_END_NODE)

    def add(self, name: str, value: bytes) -> None:
        encoded = name.encode() + b"\0"
        at = self._names.find(encoded)
        if at < 0:
            at = len(self._names)
            self._names += encoded
        self._nodes += struct.pack(">III", _FDT_PROP, len(value), at) + _aligned(value)

    def cells(self, name: str, *values: int) -> None:
        self.add(name, struct.pack(f">{len(values)}I", *values))

    def text(self, name: str, value: str) -> None:
        self.add(name, value.encode() + b"\0")

    def encode(self) -> bytes:
        header, reserved = 40, bytes(16)
        nodes = bytes(self._nodes) + struct.pack(">I", _FDT_END)
        at = header + len(reserved)
        words = (_FDT_MAGIC, at + len(nodes) + len(self._names), at, at + len(nodes), header)
        sizes = (len(self._names), len(nodes))
        versions = (_FDT_VERSION, _FDT_COMPATIBLE, 0)
        return (
            struct.pack(">10I", *words, *versions, *sizes) + reserved + nodes + bytes(self._names)
        )


def _aligned(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _device_tree(launch: Launch) -> bytes:
    tree = _Tree()
    tree.begin("")
    tree.cells("#address-cells", 2)
    tree.cells("#size-cells", 2)
    tree.begin("chosen")
    tree.text("bootargs", _command_line(launch)[:-1].decode("ascii"))
    tree.end()
    tree.begin("cpus")
    tree.cells("#address-cells", 1)
    tree.cells("#size-cells", 0)
    for vcpu in range(launch.vcpus):
        tree.begin(f"cpu@{vcpu:x}")
        tree.text("device_type", "cpu")
        tree.cells("reg", vcpu)
        tree.text("status", "okay")
        tree.end()
    tree.end()
    for region in launch.ram:
        tree.begin(f"memory@{region.gpa:x}")
        tree.text("device_type", "memory")
        tree.cells("reg", *_cells(region.gpa), *_cells(region.size))
        tree.end()
    tree.end()
    return tree.encode()


def _cells(value: int) -> Sequence[int]:
    return value >> 32, value & 0xFFFF_FFFF


_MAKERS: dict[int, Callable[[Launch], bytes]] = {
    HeaderType.VP_COUNT_PARAMETER: _vp_count,
    HeaderType.ENVIRONMENT_INFO_PARAMETER: _environment,
    HeaderType.MEMORY_MAP: _memory_map,
    HeaderType.COMMAND_LINE: _command_line,
    HeaderType.MMIO_RANGES: _mmio_ranges,
    HeaderType.MADT: _madt,
    HeaderType.SRAT: _srat,
    HeaderType.SLIT: _slit,
    HeaderType.PPTT: _pptt,
    HeaderType.DEVICE_TREE: _device_tree,
}
