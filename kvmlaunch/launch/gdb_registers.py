"""The registers as GDB wants them: a target description, and bytes in its order.

One description for all stages: a guest in 32-bit or real mode shows its registers in the 64-bit
set, so that GDB needn't be told when the mode changes.

Source: the GDB manual, appendix "Target Descriptions" (i386 features).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from kvmlaunch.abi.registers import GENERAL, SEGMENTS, SYSTEM

__all__ = ["REGISTERS", "TARGET_XML", "Register", "decode_all", "encode_all", "encode_one"]


class Register(NamedTuple):
    """``name`` as in :mod:`kvmlaunch.abi.registers`, ``gdb`` as GDB calls it; ``size`` in bytes."""

    name: str
    size: int
    type: str
    feature: str
    gdb: str


_CORE, _SSE = "org.gnu.gdb.i386.core", "org.gnu.gdb.i386.sse"
_BASES, _SYSTEM = "org.gnu.gdb.i386.segments", "org.kvmlaunch.system"
_POINTERS = {"rip": "code_ptr", "rsp": "data_ptr", "rbp": "data_ptr"}
_X87 = ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop")


def _all() -> Iterator[Register]:
    for name in GENERAL[:-1]:
        yield Register(name, 8, _POINTERS.get(name, "int64"), _CORE, name)
    yield Register("rflags", 4, "int32", _CORE, "eflags")
    for name in SEGMENTS:
        yield Register(name, 4, "int32", _CORE, name)
    for n in range(8):
        yield Register(f"st{n}", 10, "i387_ext", _CORE, f"st{n}")
    for name in _X87:
        yield Register(name, 4, "int", _CORE, name)
    for n in range(16):
        yield Register(f"xmm{n}", 16, "uint128", _SSE, f"xmm{n}")
    yield Register("mxcsr", 4, "int", _SSE, "mxcsr")
    for name in SYSTEM:
        base = name.endswith("_base")
        yield Register(name, 8, "int", _BASES if base else _SYSTEM, name)


REGISTERS = tuple(_all())


def _description() -> str:
    lines = [
        '<?xml version="1.0"?>',
        '<!DOCTYPE target SYSTEM "gdb-target.dtd">',
        "<target><architecture>i386:x86-64</architecture>",
    ]
    feature = ""
    for number, register in enumerate(REGISTERS):
        if register.feature != feature:
            lines += ["</feature>"] if feature else []
            feature = register.feature
            lines.append(f'<feature name="{feature}">')
        lines.append(
            f'<reg name="{register.gdb}" bitsize="{8 * register.size}" '
            f'type="{register.type}" regnum="{number}"/>'
        )
    return "\n".join([*lines, "</feature></target>", ""])


TARGET_XML = _description().encode()


def encode_one(register: Register, values: Mapping[str, int] | None) -> bytes:
    """A register's value in hex; x for what isn't available."""
    if values is None:
        return b"x" * (2 * register.size)
    # GDB wants segments of the last x87 instruction, which nobody keeps.
    value = values.get(register.name, 0) & (1 << 8 * register.size) - 1
    return value.to_bytes(register.size, "little").hex().encode()


def encode_all(values: Mapping[str, int] | None) -> bytes:
    """The answer to packet g."""
    return b"".join(encode_one(register, values) for register in REGISTERS)


def decode_all(data: bytes, old: Mapping[str, int]) -> dict[str, int] | None:
    """What packet G (hex) changes; None if it has another length or isn't hex."""
    if len(data) != 2 * sum(register.size for register in REGISTERS):
        return None
    changes, at = {}, 0
    for register in REGISTERS:
        digits = data[at : at + 2 * register.size]
        at += 2 * register.size
        if b"x" in digits:
            continue
        try:
            value = int.from_bytes(bytes.fromhex(digits.decode("ascii")), "little")
        except ValueError:
            return None
        if register.name in old and value != old[register.name] & (1 << 8 * register.size) - 1:
            changes[register.name] = value
    return changes
