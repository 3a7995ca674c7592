"""kvmlaunch report: show, verify and get attestation reports."""

from __future__ import annotations

import argparse
import base64
import binascii
import datetime
import json
from typing import TYPE_CHECKING, cast

from kvmlaunch.abi.policy import parse_policy
from kvmlaunch.abi.report import AttestationReport
from kvmlaunch.abi.tcb import Product
from kvmlaunch.attestation.show import as_json, as_text
from kvmlaunch.attestation.source import decode_file, find_report
from kvmlaunch.cli.certificates import load_certificates
from kvmlaunch.cli.options import add_image_options, number, plan_from
from kvmlaunch.cli.run import add_run_options, run_image
from kvmlaunch.cli.talk import DONE, FAILED, Talk
from kvmlaunch.cli.vmsa_options import add_vmsa_options, as_asked
from kvmlaunch.errors import FormatError

if TYPE_CHECKING:
    from kvmlaunch.attestation.certificates import RevocationList
    from kvmlaunch.attestation.verify import Expected

__all__ = ["add_parser"]

_FILE = "raw, hex, base64, a MSG_REPORT_RSP, or a guest's console; - is stdin"
_SIZES = {
    "report_data": 64,
    "host_data": 32,
    "id_key_digest": 48,
    "author_key_digest": 48,
    "family_id": 16,
    "image_id": 16,
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "report",
        help="show and verify attestation reports",
        description="Show and verify attestation reports, or get one from a guest.",
    )
    parts = parser.add_subparsers(metavar="PART", required=True)
    _add_show(parts)
    _add_verify(parts)
    _add_get(parts)


def _add_show(parts: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = parts.add_parser(
        "show",
        help="show every field of a report",
        description="Show every field of a report. Nothing is verified: see report verify.",
    )
    parser.add_argument("report", metavar="FILE", help=_FILE)
    parser.add_argument(
        "--product",
        choices=("Milan", "Genoa", "Turin"),
        help="whose TCB layout to take (default: that of the CPU in the report)",
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.set_defaults(command=_show)


def _add_verify(parts: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = parts.add_parser(
        "verify",
        help="verify a report's signature, its chain and its fields",
        description="Verify a report: signature, certificates and the fields that are given. "
        "With --image its measurement must be the image's predicted launch digest.",
        epilog="exit codes: 0 all is right, 1 a check failed, 2 usage or bad input",
    )
    parser.add_argument("report", metavar="FILE", help=_FILE)
    trust = parser.add_argument_group("certificates")
    trust.add_argument(
        "--certs",
        metavar="FILE",
        action="append",
        required=True,
        help="VCEK or VLEK, ASK, ARK; again for more files, in any order: PEM, DER, or a "
        "certificate table",
    )
    trust.add_argument(
        "--crl", metavar="FILE", action="append", default=[], help="revocation list, PEM or DER"
    )
    trust.add_argument(
        "--trust-ark",
        metavar="FILE",
        action="append",
        default=[],
        help="a root to trust beside AMD's for Milan, Genoa and Turin",
    )
    trust.add_argument(
        "--at", metavar="TIME", type=_time, help="when certificates must be valid (default: now)"
    )
    trust.add_argument(
        "--allow-simulated", action="store_true", help="take the chain of a simulated host"
    )
    group = parser.add_argument_group("expected fields (hex or base64)")
    group.add_argument("--digest", metavar="DIGEST", help="launch digest, instead of --image")
    for name, size in _SIZES.items():
        option = name.replace("_", "-")
        group.add_argument(f"--{option}", metavar="HEX", help=f"{size} bytes")
    group.add_argument("--policy", metavar="POLICY", help="a number, or names as smt,debug")
    group.add_argument("--guest-svn", metavar="N", type=number, help="guest SVN")
    group.add_argument("--vmpl", metavar="N", type=number, help="VMPL of who asked for the report")
    group.add_argument(
        "--min-tcb",
        metavar="TCB",
        help="least reported, committed and current TCB, as bootloader=3,tee=0,snp=8,microcode=115 "
        "(and fmc for Turin)",
    )
    group.add_argument("--no-debug", action="store_true", help="the policy must forbid debugging")
    parser.add_argument("--json", action="store_true", help="for machines")
    add_image_options(parser, positional=False)
    add_vmsa_options(parser)
    parser.set_defaults(command=_verify)


def _add_get(parts: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = parts.add_parser(
        "get",
        help="run a guest that prints its report, and keep that",
        description="Run a guest that asks for its attestation report and prints it, as "
        "examples/guests/attest does: run --report-out FILE, without the guest's console.",
    )
    add_run_options(parser, report_required=True)
    parser.set_defaults(command=_get)


def _get(args: argparse.Namespace, talk: Talk) -> int:
    return run_image(args, talk, lambda text: None)


def _show(args: argparse.Namespace, talk: Talk) -> int:
    report = _report(args.report)
    product = cast("Product | None", args.product)
    if args.json:
        print(json.dumps(as_json(report, product), indent=2))
    else:
        print(as_text(report, product))
    return DONE


def _verify(args: argparse.Namespace, talk: Talk) -> int:
    from kvmlaunch.attestation.verify import verify_report

    verdict = verify_report(
        _report(args.report),
        [c for path in args.certs for c in load_certificates(path)],
        _expected(args, talk),
        now=args.at,
        crls=[crl for path in args.crl for crl in _crls(path)],
        trusted=[c.key_digest for path in args.trust_ark for c in load_certificates(path)],
        allow_simulated=args.allow_simulated,
    )
    if args.json:
        print(json.dumps(verdict.as_json(), indent=2))
    else:
        for check in verdict.checks:
            print(check)
        for note in verdict.notes:
            print(f"note: {note}")
    if verdict.ok:
        return DONE
    talk.error(f"not verified: {', '.join(check.name for check in verdict.failed)}")
    return FAILED


def _report(path: str) -> AttestationReport:
    return decode_file(path, lambda data: AttestationReport.decode(find_report(data)))


def _crls(path: str) -> list[RevocationList]:
    from kvmlaunch.attestation.certificates import read_crls

    return decode_file(path, read_crls)


def _expected(args: argparse.Namespace, talk: Talk) -> Expected:
    from kvmlaunch.attestation.verify import Expected, parse_min_tcb

    values = {name: _bytes(name, getattr(args, name), size) for name, size in _SIZES.items()}
    return Expected(
        measurement=_measurement(args, talk),
        policy=None if args.policy is None else parse_policy(args.policy),
        guest_svn=args.guest_svn,
        vmpl=args.vmpl,
        min_tcb={} if args.min_tcb is None else parse_min_tcb(args.min_tcb),
        no_debug=args.no_debug,
        **values,
    )


def _measurement(args: argparse.Namespace, talk: Talk) -> bytes | None:
    from kvmlaunch.abi.digest import parse_digest

    if args.image is None and args.ovmf is None and args.igvm is None:
        return None if args.digest is None else parse_digest(args.digest)
    if args.digest is not None:
        raise FormatError("give the launch digest once: --digest, or an image to predict it from")
    from kvmlaunch.launch.measure import measure

    # What isn't measured (host data, policy) is compared as it was given, not by the plan.
    other = dict.fromkeys(("policy", "host_data", "id_block", "id_auth"))
    plain = argparse.Namespace(**{**vars(args), **other})
    return measure(as_asked(plan_from(plain), args, talk)).digest


def _bytes(name: str, text: str | None, size: int) -> bytes | None:
    """Hex with or without 0x, or base64."""
    if text is None:
        return None
    option, text = f"--{name.replace('_', '-')}", text.strip()
    try:
        data = bytes.fromhex(text.lower().removeprefix("0x"))
    except ValueError:
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise FormatError(f"{option} is neither hex nor base64") from None
    if len(data) != size:
        raise FormatError(f"{option} is {len(data)} bytes, it must be {size}")
    return data


def _time(text: str) -> datetime.datetime:
    try:
        time = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no time, as 2025-06-01T12:00Z") from None
    return time if time.tzinfo else time.replace(tzinfo=datetime.timezone.utc)
