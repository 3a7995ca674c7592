"""A report with every field by its name, for people and for machines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvmlaunch.abi.policy import GuestPolicy, describe_policy
from kvmlaunch.abi.report import (
    PLATFORM_INFO,
    REPORT_VERSIONS,
    AttestationReport,
    SigningKey,
    fields_of,
)
from kvmlaunch.abi.signature import ALGO_ECDSA_P384_SHA384, decode_signature
from kvmlaunch.abi.tcb import Product, Tcb
from kvmlaunch.errors import FormatError

__all__ = ["as_json", "as_text", "notes", "tcb_layout", "tcb_text"]

_SCHEMA = "kvmlaunch.report/1"
_TCBS = ("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb")
_TURIN_CHIP_ID_SIZE = 8
_WIDTH = 20


def tcb_layout(report: AttestationReport) -> Product | None:
    """Return whose TCB layout the report's TCBs have; None for a CPU that isn't known.

    Version 2 doesn't name the CPU. There a CHIP_ID of 8 bytes is taken for Turin's, anything
    else for one of Milan and Genoa, whose layout is the same; said as Milan.
    """
    if report.version > 2:
        return report.product
    head, rest = report.chip_id[:_TURIN_CHIP_ID_SIZE], report.chip_id[_TURIN_CHIP_ID_SIZE:]
    return "Turin" if any(head) and not any(rest) else "Milan"


def tcb_text(value: int, product: Product | None) -> str:
    """Return a TCB_VERSION as ``bootloader=3,tee=0,snp=8,microcode=115``, or as a number."""
    if product is None:
        return f"{value:#018x}"
    return ",".join(f"{name}={number}" for name, number in _parts(value, product).items())


def notes(report: AttestationReport) -> list[str]:
    """What to know before believing the fields; nothing of it makes a report wrong."""
    found = []
    if report.version not in REPORT_VERSIONS:
        found.append(
            f"version {report.version} is not known: read as version "
            f"{5 if report.version > 5 else 2}, as far as that goes"
        )
    if report.reserved:
        places = ", ".join(f"{at:#x}" for at, _ in report.reserved)
        found.append(f"reserved bytes are not zero at {places}")
    if tcb_layout(report) is None:
        found.append("the CPU is not known, so the TCBs are shown as numbers")
    if GuestPolicy.from_int(report.policy, strict=False).debug:
        found.append("the policy allows debugging: the host can read this guest's memory")
    return found


def as_text(report: AttestationReport, product: Product | None = None) -> str:
    """Return the report, a field a line, with the bits that have names below."""
    layout = product or tcb_layout(report)
    lines = []
    for name, shown, details in _rows(report, layout):
        lines.append(f"{name:<{_WIDTH}} {shown}")
        lines += [f"{'':<{_WIDTH}}   {detail}" for detail in details]
    lines += [f"reserved at {at:#05x}    {data.hex()}" for at, data in report.reserved]
    lines += [f"note: {note}" for note in notes(report)]
    return "\n".join(lines)


def as_json(report: AttestationReport, product: Product | None = None) -> dict[str, Any]:
    """Return the report for `json`: integers as numbers, bytes as hex, TCBs taken apart.

    A number that JSON's readers may not hold (above 2^53) is a string of hex.
    """
    layout = product or tcb_layout(report)
    fields: dict[str, Any] = {}
    for name, *_ in fields_of(report.version):
        value = getattr(report, name)
        if name in _TCBS:
            parts = None if layout is None else _parts(value, layout)
            fields[name] = {"value": f"{value:#018x}", "parts": parts}
        elif isinstance(value, bytes):
            fields[name] = value.hex()
        else:
            fields[name] = f"{value:#x}" if value >> 53 else value
    return {
        "schema": _SCHEMA,
        "tcb_layout": layout,
        "product": report.product,
        "fields": fields,
        "policy_flags": _policy_flags(report.policy),
        "platform_flags": _platform_flags(report.platform_info),
        "signing_key": _signing_key(report),
        "author_key_en": report.author_key_en,
        "mask_chip_key": report.mask_chip_key,
        "reserved": [{"offset": at, "bytes": data.hex()} for at, data in report.reserved],
        "notes": notes(report),
    }


def _rows(
    report: AttestationReport, layout: Product | None
) -> Iterator[tuple[str, str, list[str]]]:
    """Field, value as text, and lines that explain it."""
    for name, _, size, _ in fields_of(report.version):
        value = getattr(report, name)
        if name == "signature":
            yield from _signature_rows(value)
        elif isinstance(value, bytes):
            yield name, value.hex(), []
        elif name in _TCBS:
            parts = "" if layout is None else f" {tcb_text(value, layout)}"
            yield name, f"{value:#018x}{parts}", []
        elif name == "policy":
            yield name, f"{value:#x}", describe_policy(value)
        elif name == "platform_info":
            yield name, f"{value:#x}", _bits(value)
        elif name == "key_info":
            yield name, f"{value:#x}", _key_info(report)
        elif name == "signature_algo":
            known = " (ECDSA P-384 with SHA-384)" if value == ALGO_ECDSA_P384_SHA384 else ""
            yield name, f"{value}{known}", []
        elif name == "cpuid_step":
            yield name, f"{value}", [f"product {report.product or 'not known'}"]
        elif name.startswith("cpuid_") or size == 8:
            yield name, f"{value:#x}", []
        else:
            yield name, f"{value}", []


def _signature_rows(raw: bytes) -> Iterator[tuple[str, str, list[str]]]:
    try:
        r, s = decode_signature(raw)
    except FormatError:
        yield "signature", raw.hex(), ["not a signature: bytes behind S are not zero"]
        return
    yield "signature_r", f"{r:096x}", []
    yield "signature_s", f"{s:096x}", []


def _parts(value: int, product: Product) -> dict[str, int]:
    tcb = Tcb.decode(product, value)
    parts = {"bootloader": tcb.bootloader, "tee": tcb.tee, "snp": tcb.snp}
    parts["microcode"] = tcb.microcode
    return {"fmc": tcb.fmc, **parts} if product == "Turin" else parts


def _bits(value: int) -> list[str]:
    lines = [f"bit {bit} {name} = {value >> bit & 1}" for name, bit in PLATFORM_INFO.items()]
    named = set(PLATFORM_INFO.values())
    return lines + [
        f"bit {n} = 1, not known" for n in range(64) if value >> n & 1 and n not in named
    ]


def _key_info(report: AttestationReport) -> list[str]:
    return [
        f"bit 0 AUTHOR_KEY_EN = {report.author_key_en:d}",
        f"bit 1 MASK_CHIP_KEY = {report.mask_chip_key:d}",
        f"bits 4:2 SIGNING_KEY = {int(report.signing_key)}: {_signing_key(report)}",
    ]


def _signing_key(report: AttestationReport) -> str:
    key = report.signing_key
    return key.name if isinstance(key, SigningKey) else f"not known ({key})"


def _policy_flags(policy: int) -> list[str]:
    known = GuestPolicy.from_int(policy, strict=False)
    return [name for name, value in vars(known).items() if value is True]


def _platform_flags(value: int) -> list[str]:
    return [name for name, bit in PLATFORM_INFO.items() if value >> bit & 1]
