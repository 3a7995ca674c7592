"""Check a report: its signature and chain, and the fields that someone expects."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

from kvmlaunch.abi.policy import GuestPolicy
from kvmlaunch.abi.report import AttestationReport, SigningKey
from kvmlaunch.abi.signature import ALGO_ECDSA_P384_SHA384, decode_signature
from kvmlaunch.abi.tcb import Product, Tcb
from kvmlaunch.errors import FormatError

from .certificates import Certificate, RevocationList
from .chain import Chain, check_chain, find_chain
from .result import Check, Verdict
from .show import notes, tcb_layout, tcb_text

__all__ = ["Expected", "parse_min_tcb", "verify_report"]

_SIMULATED = "SIMULATED: this chain is a simulated host's and says nothing about hardware"
_TCB_PARTS = frozenset(part.name for part in fields(Tcb))
_MASKED = bytes(64)


@dataclass(frozen=True)
class Expected:
    """What a report must have; None is anything.

    ``min_tcb`` holds for the reported, the committed and the current TCB, part by part;
    parts that aren't named may be anything. ``no_debug``: the policy must forbid debugging.
    """

    measurement: bytes | None = None
    host_data: bytes | None = None
    report_data: bytes | None = None
    policy: int | None = None
    id_key_digest: bytes | None = None
    author_key_digest: bytes | None = None
    family_id: bytes | None = None
    image_id: bytes | None = None
    guest_svn: int | None = None
    vmpl: int | None = None
    min_tcb: Mapping[str, int] = field(default_factory=dict)
    no_debug: bool = False


def verify_report(
    report: AttestationReport,
    certificates: Sequence[Certificate],
    expected: Expected | None = None,
    *,
    now: datetime.datetime | None = None,
    crls: Sequence[RevocationList] = (),
    trusted: Sequence[str] = (),
    allow_simulated: bool = False,
) -> Verdict:
    """Check a report against its chain and what is expected of it.

    Args:
        report: the report.
        certificates: VCEK or VLEK, ASK or ASVK, and ARK, in any order, and any others.
        expected: field values.
        now: when certificates and revocation lists must be valid; default: this moment.
        crls: revocation lists of the root.
        trusted: digests of root keys that are trusted beside AMD's (`Certificate.key_digest`).
        allow_simulated: take the chain of a simulated host. The verdict says so.

    Raises:
        FormatError: a certificate of the chain is missing.
    """
    moment = datetime.datetime.now(datetime.timezone.utc) if now is None else now
    wanted = Expected() if expected is None else expected
    checks: list[Check] = []
    said = notes(report)
    if wanted.measurement is None:
        said.append("no launch digest was given: this says nothing about what was launched")
    simulated = False
    layout = tcb_layout(report)
    kind = report.signing_key
    if kind in (SigningKey.VCEK, SigningKey.VLEK):
        chain = find_chain(certificates, SigningKey(kind))
        simulated = chain.is_simulated
        checks += check_chain(
            chain, now=moment, trusted=trusted, allow_simulated=allow_simulated, crls=crls
        )
        checks.append(_signature(report, chain.leaf))
        checks += _bindings(report, chain)
        layout = chain.product or layout
        said += _what_is_not_bound(report, chain)
    else:
        number = int(kind)
        text = "none, its signer's key is masked" if kind is SigningKey.NONE else str(number)
        checks.append(Check("signing_key", False, text, "VCEK or VLEK"))
    checks += _fields(report, wanted, layout)
    if simulated:
        said.insert(0, _SIMULATED)
    return Verdict(tuple(checks), tuple(said), simulated)


def parse_min_tcb(text: str) -> dict[str, int]:
    """Return the parts of ``bootloader=3,tee=0,snp=8,microcode=115`` (and ``fmc`` for Turin).

    Raises:
        FormatError: no such part, one twice, or a version that is no byte.
    """
    parts: dict[str, int] = {}
    for word in text.split(","):
        name, _, number = (piece.strip() for piece in word.partition("="))
        if name not in _TCB_PARTS:
            known = ", ".join(sorted(_TCB_PARTS))
            raise FormatError(f"no part of a TCB is named {name!r}; known are {known}")
        if name in parts:
            raise FormatError(f"the TCB's {name} is given twice")
        if not number.isascii() or not number.isdigit() or len(number) > 3 or int(number) > 0xFF:
            raise FormatError(f"the TCB's {name} is {number!r}, must be a number up to 255")
        parts[name] = int(number)
    return parts


def _signature(report: AttestationReport, leaf: Certificate) -> Check:
    wanted = f"ECDSA P-384 with SHA-384, by {leaf.name}"
    if report.signature_algo != ALGO_ECDSA_P384_SHA384:
        return Check("signature", False, f"algorithm {report.signature_algo}", wanted)
    ok = _is_signed(report, leaf)
    return Check("signature", ok, f"{'' if ok else 'not '}signed by {leaf.name}", wanted)


def _is_signed(report: AttestationReport, leaf: Certificate) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

    key = leaf.key
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        return False
    try:
        signature = encode_dss_signature(*decode_signature(report.signature))
        key.verify(signature, report.signed_bytes, ec.ECDSA(hashes.SHA384()))
    except (FormatError, InvalidSignature):
        return False
    return True


def _bindings(report: AttestationReport, chain: Chain) -> Iterator[Check]:
    """What the key's certificate says of the report's platform."""
    # A model that isn't known yet may well be one of the chain's.
    if report.product is not None and chain.product is not None:
        same = report.product == chain.product
        yield Check("product", same, report.product, chain.product)
    yield _certified_tcb(report, chain)
    if chain.kind is SigningKey.VLEK or report.chip_id == _MASKED:
        return
    try:
        hwid = chain.leaf.hwid
    except FormatError as error:
        yield Check("chip_id", False, str(error), "the certificate's HWID")
        return
    wanted = hwid.ljust(len(_MASKED), b"\0")
    yield Check("chip_id", report.chip_id == wanted, report.chip_id.hex(), wanted.hex())


def _what_is_not_bound(report: AttestationReport, chain: Chain) -> Iterator[str]:
    if chain.kind is SigningKey.VLEK:
        with contextlib.suppress(FormatError):
            yield f"the VLEK is that of {chain.leaf.csp_id}, and of no certain chip"
    elif report.chip_id == _MASKED:
        yield "CHIP_ID is masked: only the VCEK's signature says which chip it was"


def _certified_tcb(report: AttestationReport, chain: Chain) -> Check:
    """REPORTED_TCB is what the VCEK or VLEK stands for (56860)."""
    try:
        wanted = chain.leaf.tcb
    except FormatError as error:
        return Check("reported_tcb", False, str(error), "the certificate's TCB")
    layout = chain.product or tcb_layout(report)
    if layout is None:
        return Check("reported_tcb", False, f"{report.reported_tcb:#018x}", f"{wanted}")
    got = Tcb.decode(layout, report.reported_tcb)
    text = tcb_text(report.reported_tcb, layout)
    if wanted.fmc and layout != "Turin":
        return Check("reported_tcb", False, text, f"{wanted}")
    return Check("reported_tcb", got == wanted, text, tcb_text(wanted.encode(layout), layout))


def _fields(
    report: AttestationReport, expected: Expected, layout: Product | None
) -> Iterator[Check]:
    for part in fields(expected):
        wanted = getattr(expected, part.name)
        if part.name in ("min_tcb", "no_debug") or wanted is None:
            continue
        got = getattr(report, part.name)
        yield Check(part.name, got == wanted, _text(got), _text(wanted))
    if expected.no_debug:
        debug = GuestPolicy.from_int(report.policy, strict=False).debug
        text = "debugging allowed" if debug else "debugging forbidden"
        yield Check("policy_debug", not debug, text, "debugging forbidden")
    if expected.min_tcb:
        for name in ("reported_tcb", "committed_tcb", "current_tcb"):
            yield _at_least(f"min_{name}", getattr(report, name), expected.min_tcb, layout)


def _at_least(name: str, value: int, least: Mapping[str, int], layout: Product | None) -> Check:
    wanted = "at least " + ",".join(f"{part}={number}" for part, number in least.items())
    text = tcb_text(value, layout)
    if layout is None or (least.get("fmc") and layout != "Turin"):
        return Check(name, False, f"{text}, of a CPU without such parts", wanted)
    ok = Tcb.decode(layout, value).covers(Tcb(**least))
    return Check(name, ok, text, wanted)


def _text(value: int | bytes) -> str:
    return value.hex() if isinstance(value, bytes) else f"{value:#x}"
