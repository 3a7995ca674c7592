"""kvmlaunch run: plan, launch, run; the guest's console on stdout, the summary on stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from kvmlaunch.cli.certificates import (
    add_certificate_options,
    certificates_from,
    write_chain,
)
from kvmlaunch.cli.host_options import add_host_options, open_host, settle
from kvmlaunch.cli.inside import Inside, add_inside_options, describe_end
from kvmlaunch.cli.key_options import Identity, add_identity_options, add_key_options
from kvmlaunch.cli.options import (
    add_image_options,
    add_launch_options,
    plan_from,
)
from kvmlaunch.cli.talk import DONE, FAILED, INTERRUPTED, SKIPPED, TIMEOUT, Talk
from kvmlaunch.cli.vmsa_options import proposal_from
from kvmlaunch.errors import FormatError
from kvmlaunch.images import LaunchPlan
from kvmlaunch.launch.files import check_folder, write_whole
from kvmlaunch.launch.measure import measure
from kvmlaunch.launch.pagelog import open_log
from kvmlaunch.launch.printed_report import MEASUREMENT, PrintedReport

__all__ = ["add_parser", "add_run_options", "run_image"]

_CODES = {"timeout": TIMEOUT, "interrupted": INTERRUPTED, "no-cpu": SKIPPED}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "run",
        help="launch a guest and run it",
        description="Launch a guest and run it. Its console (port 0x3f8) is stdout; a write to "
        "port 0xf4 ends it, value 0 well.",
    )
    add_run_options(parser)
    parser.set_defaults(command=_run)


def add_run_options(parser: argparse.ArgumentParser, *, report_required: bool = False) -> None:
    """Everything that `run_image` looks at."""
    add_image_options(parser)
    add_launch_options(parser)
    identity = parser.add_argument_group("identity", "sign the predicted digest on the fly")
    add_key_options(identity)
    add_identity_options(identity)
    identity.add_argument(
        "--vcek-disabled",
        action="store_true",
        help="the guest gets no attestation reports signed by the VCEK",
    )
    group = parser.add_argument_group("host")
    add_host_options(group)
    group.add_argument(
        "--vm-type", choices=("snp", "plain"), default="snp", help="plain: the same, unprotected"
    )
    group.add_argument("--timeout", type=_seconds, metavar="SECONDS", help="end with code 124")
    group.add_argument(
        "--report-out",
        metavar="FILE",
        required=report_required,
        help="write the attestation report that the guest prints (as examples/guests/attest does)",
    )
    add_certificate_options(group)
    group.add_argument("--ioctls", action="store_true", help="put every call into the log, too")
    add_inside_options(parser)


def _run(args: argparse.Namespace, talk: Talk) -> int:
    return run_image(args, talk, _print_console)


def run_image(
    args: argparse.Namespace, talk: Talk, print_console: Callable[[bytes], object]
) -> int:
    """Do what the options ask for; returns the exit code."""
    from kvmlaunch.launch.session import Session

    confidential = args.vm_type == "snp"
    if args.kernel:
        raise FormatError(
            "--kernel: the kernel itself goes to OVMF by QEMU's fw_cfg, a device that this "
            "launcher doesn't have; measure and inspect take it"
        )
    plan = _as_hosted(plan_from(args, confidential=confidential), talk)
    if args.ioctls and args.log is None:
        raise FormatError("--ioctls needs --log FILE")
    if not confidential and args.id_key is not None:
        raise FormatError("--id-key is for SNP guests, not for --vm-type plain")
    if args.certs is not None and not confidential:
        raise FormatError("--certs is for SNP guests, not for --vm-type plain")
    identity = Identity(args)
    choice = open_host(args, plan, confidential=confidential, certificates=args.certs is not None)
    for path in filter(None, (args.report_out, args.chain_out)):
        check_folder(path)
    inside = Inside(args, choice.platform)
    talk.say(choice.why)
    certificates = certificates_from(args, choice.platform)
    write_chain(args, choice.platform, talk)
    plan = identity.sign(settle(args, plan, choice.platform, talk))
    proposal = proposal_from(args)
    with open_log(args.log) as log:
        session = Session(
            plan,
            choice.platform,
            log=log,
            ioctls=args.ioctls,
            proposal=proposal,
            certificates=certificates,
        )
        session.on_record = lambda record: talk.detail(str(record))
        session.on_exit = lambda vcpu, exit_: talk.detail(f"vCPU {vcpu}: {exit_}")
        with session:
            if confidential:
                report = session.launch(retry_cpuid=args.retry_cpuid)
                for refused in session.guest.corrections:
                    for line in refused.differences():
                        talk.say(f"CPUID page corrected by the firmware: {line}")
                _summary(plan, session.guest.digest, report.pages, talk)
                if report.agrees is False:
                    talk.error(str(report))
                    return FAILED
                talk.say(str(report))
            printed = PrintedReport()

            def console(text: bytes) -> None:
                print_console(text)
                printed.add(text)

            outcome = inside.run(session, console, talk)
            end = describe_end(session.guest, outcome)
            digest = session.guest.digest
    (talk.say if outcome.ok else talk.error)(str(outcome))
    for line in end:
        talk.say(line)
    code = DONE if outcome.ok else _CODES.get(outcome.kind, FAILED)
    if args.report_out is not None and not _save_report(args.report_out, printed, digest, talk):
        return code or FAILED
    return code


def _as_hosted(plan: LaunchPlan, talk: Talk) -> LaunchPlan:
    """The plan with the VMSAs that this host's KVM makes, and what that changes said."""
    hosted = plan.on_kvm()
    if (plan.as_given, plan.vmsa_gpa) == (hosted.as_given, hosted.vmsa_gpa):
        return plan
    before, after = measure(plan).digest, measure(hosted).digest
    if before != after:
        talk.say(
            f"{plan.vmm} has other VMSAs than KVM makes here: the launch digest is {after.hex()}, "
            f"not {before.hex()}"
        )
    return hosted


def _save_report(path: str, printed: PrintedReport, digest: bytes, talk: Talk) -> bool:
    """Write what the guest printed; whether that is a report of this launch."""
    try:
        report = printed.report()
    except FormatError as error:
        talk.error(f"--report-out: {error}")
        return False
    write_whole(path, report)
    if report[MEASUREMENT] != digest:
        talk.error(f"the report's measurement {report[MEASUREMENT].hex()} is not the launch digest")
        return False
    talk.say(f"report written to {path}: its measurement is the predicted launch digest")
    return True


def _summary(plan: LaunchPlan, digest: bytes, pages: int, talk: Talk) -> None:
    talk.say(f"launched {plan.image}: {pages} pages measured, policy {plan.policy:#x}")
    talk.say(f"launch digest {digest.hex()}")


def _print_console(text: bytes) -> None:
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value
