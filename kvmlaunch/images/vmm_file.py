"""The format of VMM profiles, strictly read.

A JSON object; numbers are JSON's or strings as ``"0x9b"``:

| key           | value                                                                    |
|---------------|--------------------------------------------------------------------------|
| format        | ``kvmlaunch.vmm/1``                                                      |
| name          | text                                                                     |
| description   | text (optional)                                                          |
| base          | a profile of the package, from which come all values that aren't given   |
| pages         | ``firmware``, ``metadata`` and perhaps ``cpuid``, in launch order        |
| sections      | ``sec-mem``, ``secrets``, ``cpuid``, ``svsm-caa``, ``kernel-hashes``,    |
|               | ``other`` -> page type                                                   |
| registers     | VMSA field, as ``rsi`` or ``cs.attrib`` -> value, for every vCPU;        |
|               | ``rdx`` may be ``"signature"``, the CPU's                                |
| bsp, ap       | the same for the first vCPU and for the others, and ``eip``:             |
|               | ``reset-vector``, ``reset-block`` or an address; ``ap`` may be null      |
| kernel_hashes | true if the VMM launches kernel hashes (optional: false)                 |
| svsm          | true if it launches an SVSM below the firmware (optional: false)         |
| vmsa_gpa      | where VMSAs are measured (optional: where KVM does)                      |
| measured      | ``as-given`` (optional), or ``kvm``: as mainline KVM makes VMSAs of them |
| sources       | one of these keys, or one inside -> where its values are from (optional) |

What a file says goes before its base, its ``bsp`` and ``ap`` before its ``registers``.
CS.base and RIP follow from ``eip``, SEV_FEATURES are the guest's.
"""

from __future__ import annotations

import functools
import json
import os
import re
import reprlib
from collections.abc import Mapping

from kvmlaunch.abi.page import PAGE_SIZE, PageType
from kvmlaunch.abi.reset import BSP_EIP
from kvmlaunch.abi.vmsa import SEGMENT_FIELDS, VMSA_FIELDS, Vmsa
from kvmlaunch.errors import FormatError, ImageError
from kvmlaunch.images.ovmf_table import SECTION_TYPES
from kvmlaunch.images.plan import SYNC_VMSA_GPA
from kvmlaunch.images.vmm import BUILT_IN, VcpuStart, VmmProfile, load_vmm

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from typing import Any

__all__ = ["FORMAT", "built_in", "parse_vmm", "read_vmm"]

FORMAT = "kvmlaunch.vmm/1"

_FOLDER = os.path.join(os.path.dirname(__file__), "vmms")
_SIZE_MOST = 1 << 20

_VALUES = (
    *("pages", "sections", "registers", "bsp", "ap", "kernel_hashes", "svsm", "vmsa_gpa"),
    "measured",
)
_KEYS = ("format", "name", "description", "base", *_VALUES, "sources")
_NEEDED_ALONE = ("pages", "sections", "registers", "bsp", "ap")
_SECTIONS = (*SECTION_TYPES.values(), "other")
_ORDERS = (
    *(("firmware", "metadata"), ("metadata", "firmware")),
    *(("firmware", "metadata", "cpuid"), ("metadata", "firmware", "cpuid")),
    *(("firmware", "cpuid", "metadata"), ("metadata", "cpuid", "firmware")),
    *(("cpuid", "firmware", "metadata"), ("cpuid", "metadata", "firmware")),
)
_PAGE_TYPES = {kind.name: kind for kind in PageType if kind is not PageType.VMSA}
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20}")
_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr")
_SIZES = {field.name: field.size for field in VMSA_FIELDS if field.name not in _SEGMENTS}
_SIZES |= {f"{name}.{part.name}": part.size for name in _SEGMENTS for part in SEGMENT_FIELDS}
_ELSEWHERE = {
    "cs.base": "it follows from eip",
    "rip": "it follows from eip",
    "sev_features": "it is the guest's (--guest-features)",
    **dict.fromkeys(_SEGMENTS, "name its parts, as cs.attrib"),
}
_GPA_BITS = 52
_NAME_MOST = 40


@functools.cache
def built_in(name: str) -> VmmProfile:
    """A profile of the package, by its exact name."""
    return read_vmm(os.path.join(_FOLDER, f"{name}.json"), name)


def read_vmm(path: str, name: str) -> VmmProfile:
    """The profile in a file. Raises ImageError, which calls the file ``name``."""
    try:
        with open(path, "rb") as file:
            raw = file.read(_SIZE_MOST + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise ImageError(name, f"can't be read: {reason or error}") from None
    try:
        if len(raw) > _SIZE_MOST:
            raise FormatError("a VMM profile has at most 1 MiB")
        return parse_vmm(raw)
    except FormatError as error:
        raise ImageError(name, error.rule) from None


def parse_vmm(raw: bytes) -> VmmProfile:
    """A profile from its file's bytes. Raises FormatError, which names key and rule."""
    found = _object("the file", _json(raw), _KEYS)
    if found.get("format") != FORMAT:
        raise FormatError(f"format: {_shown(found.get('format'))} is not {FORMAT!r}")
    base = _base(found)
    if base is None:
        for key in _NEEDED_ALONE:
            if key not in found:
                raise FormatError(f"{key}: missing, and there is no base that has it")
    registers = _registers("registers", found.get("registers", {}))
    bsp = _start("bsp", found, registers, base.bsp if base else VcpuStart(Vmsa(), BSP_EIP))
    ap_base = base.ap if base else VcpuStart(Vmsa())
    ap = _start("ap", found, registers, ap_base)
    on_kvm = base is not None and not base.as_given
    if bsp is None:
        raise FormatError("bsp: null, but every guest has a first vCPU")
    return VmmProfile(
        name=_text("name", found.get("name")),
        description=_text("description", found.get("description", "")),
        bsp=bsp,
        ap=ap,
        pages=_pages(found["pages"]) if base is None or "pages" in found else base.pages,
        sections=_sections(found.get("sections", {}), base),
        kernel_hashes=_flag(found, "kernel_hashes", base is not None and base.kernel_hashes),
        svsm=_flag(found, "svsm", base is not None and base.svsm),
        vmsa_gpa=_gpa(found.get("vmsa_gpa", base.vmsa_gpa if base else SYNC_VMSA_GPA)),
        as_given=_as_given(found.get("measured", "kvm" if on_kvm else "as-given")),
        sources={**(base.sources if base else {}), **_sources(found.get("sources", {}))},
    )


def _json(raw: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in pairs:
            if key in made:
                raise FormatError(f"{_name(key)}: it is there twice")
            made[key] = value
        return made

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except FormatError:
        raise
    except json.JSONDecodeError as error:
        raise FormatError(f"not JSON: line {error.lineno}: {error.msg}") from None
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise FormatError(f"not JSON: {error}") from None


def _base(found: Mapping[str, Any]) -> VmmProfile | None:
    if "base" not in found:
        return None
    name = _text("base", found["base"])
    if name not in BUILT_IN:
        raise FormatError(f"base: {_shown(name)} is none of {', '.join(BUILT_IN)}")
    return load_vmm(name)


def _start(
    key: str,
    found: Mapping[str, Any],
    common: dict[str, int | bytes | None],
    base: VcpuStart | None,
) -> VcpuStart | None:
    own = found.get(key, {})
    if own is None:
        return None
    if base is None:
        if not own:
            return None
        raise FormatError(f"{key}: the base doesn't know it, so it can't be changed")
    own = dict(_object(key, own, None))
    eip = _eip(f"{key}.eip", own.pop("eip")) if "eip" in own else base.eip
    registers = {**common, **_registers(key, own)}
    signature = registers["rdx"] is None if "rdx" in registers else base.signature
    values = {name: 0 if value is None else value for name, value in registers.items()}
    return VcpuStart(base.registers.with_fields(values), eip, signature)


def _registers(key: str, value: Any) -> dict[str, int | bytes | None]:
    """Field -> value; None is the CPU's signature."""
    found: dict[str, int | bytes | None] = {}
    for name, text in _object(key, value, None).items():
        where = f"{key}.{_name(name)}"
        if name != _name(name):
            raise FormatError(f"{where}: no name of a VMSA field")
        if name in _ELSEWHERE:
            raise FormatError(f"{where}: can't be given, {_ELSEWHERE[name]}")
        if name not in _SIZES:
            try:
                Vmsa().with_field(name, 0)
            except FormatError as error:
                raise FormatError(f"{where}: {error.rule}") from None
        if name == "rdx" and text == "signature":
            found[name] = None
        elif name.startswith("fpreg_"):
            found[name] = _hex(where, text, _SIZES[name])
        else:
            found[name] = _fits(where, _number(where, text), 8 * _SIZES[name])
    return found


def _eip(key: str, value: Any) -> int | None:
    if value == "reset-block":
        return None
    if value == "reset-vector":
        return BSP_EIP
    return _fits(key, _number(key, value), 32)


def _pages(value: Any) -> tuple[str, ...]:
    order = tuple(value) if isinstance(value, list) else ()
    if order not in _ORDERS:
        raise FormatError(
            "pages: not a list of 'firmware', 'metadata' and perhaps 'cpuid' in their order"
        )
    return order


def _sections(value: Any, base: VmmProfile | None) -> dict[str, PageType]:
    found = dict(base.sections) if base else {}
    for name, kind in _object("sections", value, _SECTIONS).items():
        if not isinstance(kind, str) or kind not in _PAGE_TYPES:
            raise FormatError(
                f"sections.{name}: {_shown(kind)} is none of {', '.join(_PAGE_TYPES)}"
            )
        found[name] = _PAGE_TYPES[kind]
    for name in _SECTIONS:
        if name not in found:
            raise FormatError(f"sections.{name}: missing, and there is no base that has it")
    return found


def _flag(found: Mapping[str, Any], key: str, default: bool) -> bool:
    value = found.get(key, default)
    if not isinstance(value, bool):
        raise FormatError(f"{key}: {_shown(value)} is not true or false")
    return value


def _gpa(value: Any) -> int:
    gpa = _fits("vmsa_gpa", _number("vmsa_gpa", value), _GPA_BITS)
    if gpa % PAGE_SIZE:
        raise FormatError(f"vmsa_gpa: {gpa:#x} is not aligned to 4 KiB")
    return gpa


def _as_given(value: Any) -> bool:
    if value not in ("as-given", "kvm"):
        raise FormatError(f"measured: {_shown(value)} is not 'as-given' or 'kvm'")
    return bool(value == "as-given")


def _sources(value: Any) -> dict[str, str]:
    sources = {}
    for key, text in _object("sources", value, None).items():
        if key.split(".")[0] not in _VALUES:
            raise FormatError(f"sources.{_name(key)}: a profile has no such value")
        sources[key] = _text(f"sources.{_name(key)}", text)
    return sources


def _object(key: str, value: Any, known: tuple[str, ...] | None) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"{key}: not a JSON object")
    for name in value:
        if known is not None and name not in known:
            where = _name(name) if key == "the file" else f"{key}.{_name(name)}"
            raise FormatError(f"{where}: unknown key, known are {', '.join(known)}")
    return value


def _name(key: str) -> str:
    """A key for a message: as it is, unless it's long or has what doesn't print."""
    return key if key.isprintable() and len(key) <= _NAME_MOST else reprlib.repr(key)


def _shown(value: object) -> str:
    text = reprlib.repr(value)
    return text if len(text) <= _NAME_MOST else f"{text[:_NAME_MOST]}..."


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or (key == "name" and not value):
        raise FormatError(
            f"{key}: {'missing' if value is None else f'{_shown(value)} is not a text'}"
        )
    return value


def _number(key: str, value: Any) -> int:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return int(value, 16 if value[:2] in ("0x", "0X") else 10)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise FormatError(f"{key}: {_shown(value)} is not a number")


def _fits(key: str, value: int, bits: int) -> int:
    if not 0 <= value < 1 << bits:
        raise FormatError(f"{key}: {value:#x} does not fit in {bits} bits")
    return value


def _hex(key: str, value: Any, size: int) -> bytes:
    try:
        raw = bytes.fromhex(value.removeprefix("0x")) if isinstance(value, str) else None
    except ValueError:
        raw = None
    if raw is None:
        raise FormatError(f"{key}: {_shown(value)} is not hex")
    if len(raw) != size:
        raise FormatError(f"{key}: {len(raw)} bytes, must be {size}")
    return raw
