"""A mainline 6.12 kernel's uapi headers: where they are, and asking a compiler about them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmlaunch.uapi import ffi, lib
from tests.debian import Unavailable
from tests.host import require
from tests.kernel_packages import KernelPackages

CSRC = Path(__file__).resolve().parents[2] / "csrc"
UINT64 = 2**64

_DEFINE = re.compile(r"^#define (\w+) \S", re.MULTILINE)
_STRUCT = re.compile(r"^struct (\w+) \{", re.MULTILINE)
_HEADERS = ("linux/kvm.h", "linux/kvm_para.h", "linux/psp-sev.h")

# Raw tree headers are not what `make headers_install` installs: these stand for the
# files that it generates or leaves out.
_SHIMS = {
    "linux/compiler.h": "",
    "linux/compiler_types.h": "",
    "asm/types.h": "#include <asm-generic/types.h>\n",
    "asm/ioctl.h": "#include <asm-generic/ioctl.h>\n",
}
_KERNEL_WORDS = ("-D__user=", "-D__packed=__attribute__((packed))")

# What the kernel spells otherwise: ours -> the member that starts at the same place.
# A bit field has no address: its neighbours and the struct's size pin it, and a test of
# its own compares where the kernel's bits end up.
BIT_FIELDS = {
    "sev_user_data_snp_status.rmp_word": ("is_rmp_initialized", "rsvd"),
    "sev_user_data_snp_status.mask_word": ("mask_chip_id", "mask_chip_key", "vlek_en", "rsvd1"),
    "sev_user_data_snp_config.mask_word": ("mask_chip_id", "mask_chip_key", "rsvd"),
}
"""Words of ours that the kernel declares as bit fields, with its names from bit 0 up."""


class MissingNames(AssertionError):
    """The kernel's headers lack names of ours, or the assertions over them fail."""


@dataclass(frozen=True)
class Kernel:
    """An unpacked linux-headers-*-common package; ``changes`` replaces files of it."""

    root: Path
    work: Path
    changes: Mapping[str, str]

    def text(self, header: str) -> str:
        """The text of one uapi header (``linux/kvm.h``, ``asm/kvm.h``)."""
        return self.changes.get(header) or self._path(header).read_text(encoding="utf-8")

    def changed(self, header: str, old: str, new: str) -> Kernel:
        """The same kernel with a mutation in one header."""
        text = self.text(header)
        assert old in text, f"{header} has no {old!r} to change"
        work = Path(tempfile.mkdtemp(dir=self.work))
        return Kernel(self.root, work, {**self.changes, header: text.replace(old, new, 1)})

    def check(self, source: str) -> None:
        """Compile C text over the kernel's headers. Raises MissingNames with gcc's errors."""
        self._compile(source, "-fsyntax-only")

    def ask(self, lines: Iterable[str]) -> dict[str, int]:
        """Values of C expressions over the kernel's headers: ``name = expression`` lines."""
        prints = []
        for line in lines:
            name, _, expression = line.partition(" = ")
            prints.append(f'\tprintf("{name} %llu\\n", (unsigned long long)({expression}));\n')
        self._compile(f"int main(void)\n{{\n{''.join(prints)}}}\n", "-o", str(self.work / "probe"))
        done = subprocess.run(
            [self.work / "probe"], capture_output=True, text=True, check=True, timeout=30
        )
        return {name: int(value) for name, value in map(str.split, done.stdout.splitlines())}

    def _path(self, header: str) -> Path:
        arch = "arch/x86/" if header.startswith("asm/") else ""
        return self.root / f"{arch}include/uapi" / header

    def _compile(self, source: str, *options: str) -> None:
        shims = self.work / "shims"
        for name, text in {**_SHIMS, **self.changes}.items():
            path = shims / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        includes = "".join(f"#include <{name}>\n" for name in _HEADERS)
        path = self.work / "probe.c"
        path.write_text(
            f"#include <stddef.h>\n#include <stdio.h>\n{includes}{source}", encoding="utf-8"
        )
        roots = (shims, self.root / "arch/x86/include/uapi", self.root / "include/uapi")
        done = subprocess.run(
            [
                *("gcc", "-std=gnu11", "-w", *_KERNEL_WORDS),
                *(f"-I{root}" for root in roots),
                *(str(path), *options),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        errors = [line for line in done.stderr.splitlines() if "error:" in line]
        if done.returncode:
            raise MissingNames("\n".join(errors) or done.stderr)


def find_kernel(work: Path) -> Kernel:
    """The kernel to compare with; skips where there is none (KVMLAUNCH_REQUIRE=headers: fails)."""
    if shutil.which("gcc") is None:
        require("headers", "there is no gcc to read a kernel's headers with")
    given = os.environ.get("KVMLAUNCH_KERNEL_HEADERS")
    if given:
        root = Path(given)
        if not (root / "include/uapi/linux/kvm.h").is_file():
            require("headers", f"KVMLAUNCH_KERNEL_HEADERS={given} has no include/uapi/linux/kvm.h")
        return Kernel(root, work, {})
    try:
        return Kernel(KernelPackages.newest().common_headers, work, {})
    except Unavailable as error:
        require("headers", f"{error} (or set KVMLAUNCH_KERNEL_HEADERS)")


def our_text(header: str) -> str:
    """The text of one of our headers (``uapi_kvm.h``)."""
    return (CSRC / header).read_text(encoding="utf-8")


def defines(header: str) -> list[str]:
    """Names that one of our headers defines."""
    return _DEFINE.findall(our_text(header))


def structs(header: str) -> list[str]:
    """Structs that one of our headers declares."""
    return _STRUCT.findall(our_text(header))


@dataclass(frozen=True)
class Member:
    """A field of a struct as the compiled extension has it; an open array has size None."""

    name: str
    offset: int
    size: int | None


def members(struct: str) -> Iterator[Member]:
    """Every field of a struct, nested ones too (``io.port``)."""
    yield from _members(ffi.typeof(f"struct {struct}"), "", 0)


def _members(ctype: Any, prefix: str, base: int) -> Iterator[Member]:
    for name, info in ctype.fields:
        path, offset = prefix + name, base + info.offset
        is_open = info.type.kind == "array" and info.type.length is None
        if name:
            yield Member(path, offset, None if is_open else ffi.sizeof(info.type))
        if info.type.kind in ("struct", "union"):
            yield from _members(info.type, f"{path}." if name else prefix, offset)


def questions(header: str) -> dict[str, tuple[str, int]]:
    """For each fact of one of our headers: the C expression, and the extension's answer.

    Facts are ``NAME`` of a define, ``sizeof STRUCT``, ``STRUCT.FIELD offset`` and ``... size``.
    """
    facts = {name: (name, getattr(lib, name) % UINT64) for name in defines(header)}
    for struct in structs(header):
        facts[f"sizeof:{struct}"] = (f"sizeof(struct {struct})", ffi.sizeof(f"struct {struct}"))
        for member in members(struct):
            path = f"{struct}.{member.name}"
            if path in BIT_FIELDS:
                continue
            expression = f"offsetof(struct {struct}, {member.name})"
            facts[f"{path}:offset"] = (expression, member.offset)
            if member.size is not None:
                expression = f"sizeof(((struct {struct} *)0)->{member.name})"
                facts[f"{path}:size"] = (expression, member.size)
    return facts


def differences(kernel: Kernel, header: str) -> list[str]:
    """One line per fact of our header that the kernel's headers answer differently."""
    facts = questions(header)
    answers = kernel.ask(f"{name} = {expression}" for name, (expression, _) in facts.items())
    return [
        f"{name}: {ours:#x} in csrc/{header}, {answers[name]:#x} in the kernel's headers"
        for name, (_, ours) in facts.items()
        if answers[name] != ours
    ]


def values(kernel: Kernel, pattern: str) -> dict[str, int]:
    """Every name of the kernel's headers that matches ``pattern``, with its value."""
    text = "".join(kernel.text(header) for header in (*_HEADERS, "asm/kvm.h"))
    declared = rf"^(?:#define\s+|\s+)({pattern})(?=\s*=|\s*,|\s+[\w(])"
    names = sorted(set(re.findall(declared, text, re.MULTILINE)))
    return kernel.ask(f"{name} = {name}" for name in names)
