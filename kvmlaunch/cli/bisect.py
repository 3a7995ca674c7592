"""kvmlaunch bisect: find the first page whose measured digest differs from the prediction."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from kvmlaunch.cli.talk import DONE, FAILED, Talk
from kvmlaunch.cli.verify import add_oracle_options, ask_about, print_guess, reply_event
from kvmlaunch.launch.pagelog import open_log

if TYPE_CHECKING:
    from kvmlaunch.launch.oracle import Reply
    from kvmlaunch.launch.records import PageRecord

__all__ = ["add_parser"]

_EPILOG = """\
Launches growing parts of the image, one VM per question, each decided by the firmware as in
`verify` (see its help for what is not confirmed on hardware). VMSAs that KVM makes come
behind all pages; where one of those differs, known causes are tried until one fits.

exit codes: 0 nothing differs, 1 something does or it stays unknown (or a launch failed),
2 usage or bad input, 4 this machine has no SNP and was asked for, 130 interrupted
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "bisect",
        help="find the first page that the host measures otherwise",
        description="Find the first page or VMSA from which on the host's launch digest is "
        "another than the predicted one.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_oracle_options(parser)
    parser.set_defaults(command=_bisect)


def _bisect(args: argparse.Namespace, talk: Talk) -> int:
    from kvmlaunch.launch.bisect import bisect
    from kvmlaunch.launch.oracle import Answer

    replies: list[tuple[str, Reply]] = []

    def note(what: str, reply: Reply) -> None:
        replies.append((what, reply))
        talk.detail(f"{what}: {reply.answer}")

    plan, oracle = ask_about(args, talk)
    with open_log(args.log) as log:
        log.header(
            plan,
            platform=oracle.platform.name,
            profile=oracle.platform.profile,
            vmsa_mode=str(plan.vmsa_mode),
        )
        result = bisect(plan, oracle, note)
        event: dict[str, Any] = {
            "event": "bisect",
            "answer": str(result.answer),
            "why": result.why,
            "culprit": None if result.culprit is None else result.culprit.to_event(),
            "fits": None if result.fits is None else result.fits.why,
            "changes": [] if result.fits is None else list(result.fits.changes),
            "launches": result.launches,
            "questions": [{"what": what, **reply_event(reply)} for what, reply in replies],
        }
        log.write(event)
    if args.json:
        import json

        print(json.dumps(event))
    elif args.log != "-":
        print(result)
        if result.culprit is not None:
            _print_culprit(result.culprit)
        print_guess(result.fits)
        if (
            result.fits is None
            and result.culprit is not None
            and result.culprit.type.name == "VMSA"
        ):
            print("  none of the known causes fits")
    talk.say(f"{result.launches} launches")
    return DONE if result.answer is Answer.RIGHT else FAILED


def _print_culprit(record: PageRecord) -> None:
    print(f"  page     {record.seq}")
    print(f"  GPA      {record.gpa:#x}")
    print(f"  type     {record.type.name}")
    print(f"  label    {record.label}")
    print(f"  origin   {record.origin}")
    print(f"  contents {record.contents.hex()} (predicted)")
