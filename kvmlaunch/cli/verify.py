"""kvmlaunch verify: let the host's firmware confirm the predicted launch digest."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from kvmlaunch.cli.host_options import add_host_options, open_host, settle
from kvmlaunch.cli.key_options import add_key_options, signers_from
from kvmlaunch.cli.options import add_image_options, add_launch_options, plan_from
from kvmlaunch.cli.talk import DONE, FAILED, Talk
from kvmlaunch.cli.vmsa_options import proposal_from
from kvmlaunch.launch.pagelog import open_log

if TYPE_CHECKING:
    from kvmlaunch.images import LaunchPlan
    from kvmlaunch.launch.oracle import Oracle, Reply
    from kvmlaunch.launch.vmsa_search import Guess

__all__ = ["add_oracle_options", "add_parser", "ask_about", "print_guess", "reply_event"]

_HOW = """\
how it is found out:
  With --id-key the launch is given a signed ID block with the predicted digest, and runs
  only if the firmware measured that. Without a key the ID block is not signed: the firmware
  refuses it in any case, but first for its digest (status 0Bh), then for the signature
  (0Ah or 16h). Since another status may come in between, a second VM gets a digest that is
  wrong on purpose, and only if that one is refused for its digest was the first one right.
  The order of these checks was observed with one firmware release and is not confirmed on
  all hardware; an answer that isn't expected is "unknown", never "confirmed".
  One VM per question; no guest code runs.

exit codes: 0 confirmed, 1 differs or unknown (or the launch failed), 2 usage or bad input,
4 this machine has no SNP and was asked for (--platform kvm), 130 interrupted
"""


def add_oracle_options(parser: argparse.ArgumentParser) -> None:
    """What `verify` and `bisect` have in common."""
    add_image_options(parser)
    add_launch_options(parser, identity=False)
    group = parser.add_argument_group("keys", "sign the ID blocks that are asked with")
    add_key_options(group)
    add_host_options(parser.add_argument_group("host"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "verify",
        help="let the firmware confirm the predicted launch digest",
        description="Launch an image up to the point where the firmware compares the launch "
        "digest with the predicted one.",
        epilog=_HOW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_oracle_options(parser)
    parser.set_defaults(command=_verify)


def ask_about(args: argparse.Namespace, talk: Talk) -> tuple[LaunchPlan, Oracle]:
    """The settled plan and an oracle on the host that the options ask for."""
    from kvmlaunch.launch.oracle import Oracle

    plan = plan_from(args)
    id_key, author_key = signers_from(args)
    choice = open_host(args, plan)
    talk.say(choice.why)
    return settle(args, plan, choice.platform, talk), Oracle(
        choice.platform,
        id_key=id_key,
        author_key=author_key,
        proposal=proposal_from(args),
        retry_cpuid=args.retry_cpuid,
    )


def _verify(args: argparse.Namespace, talk: Talk) -> int:
    from kvmlaunch.launch.bisect import bisect_vmsas
    from kvmlaunch.launch.measure import record_batches
    from kvmlaunch.launch.oracle import Answer
    from kvmlaunch.launch.verify import verify

    plan, oracle = ask_about(args, talk)
    with open_log(args.log) as log:
        log.header(
            plan,
            platform=oracle.platform.name,
            profile=oracle.platform.profile,
            vmsa_mode=str(plan.vmsa_mode),
        )
        pages = 0
        for batch in record_batches(plan):
            log.records(batch)
            pages += len(batch)
        log.flush()
        verdict = verify(plan, oracle)
        known = verdict.answer is not Answer.UNKNOWN
        log.finish(verdict.digest, pages, agrees=verdict.answer is Answer.RIGHT if known else None)
    where = bisect_vmsas(plan, oracle) if verdict.answer is Answer.DIFFERS else None
    if args.json:
        event: dict[str, Any] = {
            "answer": str(verdict.answer),
            "digest": verdict.digest.hex(),
            "platform": oracle.platform.name,
            "proof": [reply_event(reply) for reply in verdict.replies],
            "why": verdict.why,
        }
        if where is not None:
            event["where"] = where.why
            event["fits"] = None if where.fits is None else where.fits.why
        _print_json(event)
    elif args.log != "-":
        placed = where is not None and where.answer is Answer.DIFFERS
        print(str(where if placed else verdict))
        for reply in verdict.replies:
            print(f"  {reply}")
        if where is not None:
            if not placed:
                print(f"  where it differs is {where}")
            print_guess(where.fits)
    return DONE if verdict.answer is Answer.RIGHT else FAILED


def reply_event(reply: Reply) -> dict[str, Any]:
    """A reply for --json."""
    return {
        "digest": reply.digest.hex(),
        "signed": reply.signed,
        "status": reply.status,
        "errno": reply.errno,
        "answer": str(reply.answer),
    }


def print_guess(guess: Guess | None) -> None:
    """What the host measured instead, as far as it is known."""
    if guess is None:
        return
    print(f"  the host's digest is that of: {guess.why}")
    for change in guess.changes:
        print(f"    {change}")


def _print_json(event: dict[str, Any]) -> None:
    import json

    print(json.dumps(event))
