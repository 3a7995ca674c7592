"""kvmlaunch measure: print the launch digest that launching an image will give."""

from __future__ import annotations

import argparse

from kvmlaunch.abi.digest import format_digest
from kvmlaunch.cli.options import add_image_options, add_launch_options, plan_from
from kvmlaunch.cli.talk import DONE, Talk
from kvmlaunch.cli.vmsa_options import as_asked
from kvmlaunch.images.plan import LaunchPlan
from kvmlaunch.launch.measure import measure, page_records
from kvmlaunch.launch.pagelog import open_log

__all__ = ["add_parser"]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "measure",
        help="print the launch digest",
        description="Predict the SNP launch digest of an image. Needs no SNP host, no root.",
    )
    add_image_options(parser)
    add_launch_options(parser)
    parser.add_argument(
        "--output-format", choices=("hex", "base64"), default="hex", help="default: hex"
    )
    parser.set_defaults(command=_measure)


def _measure(args: argparse.Namespace, talk: Talk) -> int:
    plan = as_asked(plan_from(args), args, talk)
    talk.detail(str(plan))
    if args.log is None and not talk.verbose:
        digest = measure(plan).digest
    else:
        digest = _page_by_page(plan, args.log, talk)
    if args.log != "-":
        print(format_digest(digest, args.output_format))
    return DONE


def _page_by_page(plan: LaunchPlan, log_path: str | None, talk: Talk) -> bytes:
    with open_log(log_path) as log:
        log.header(plan, platform="prediction", profile="", vmsa_mode=str(plan.vmsa_mode))
        digest, pages = bytes(48), 0
        for record in page_records(plan):
            log.record(record)
            if talk.verbose:
                talk.detail(str(record))
            digest, pages = record.digest, pages + 1
        log.finish(digest, pages)
    return digest
