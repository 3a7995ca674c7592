"""kvmlaunch measure: print the launch digest that launching an image will give."""

from __future__ import annotations

from kvmlaunch.abi.digest import format_digest, parse_digest
from kvmlaunch.abi.page import Buffer
from kvmlaunch.cli.mode_options import add_mode_options, add_svsm_options, chosen_mode
from kvmlaunch.cli.options import (
    add_image_options,
    add_launch_options,
    add_order_option,
    choices_from,
    plan_from,
    refuse_overwriting,
)
from kvmlaunch.cli.talk import DONE, FAILED, Talk, help_width
from kvmlaunch.cli.vmsa_options import as_asked
from kvmlaunch.errors import FormatError
from kvmlaunch.images import LaunchPlan, load_image
from kvmlaunch.images.options import LEGACY_MODES, lacks_snp_active
from kvmlaunch.images.sync_vmsas import finish_vmsas
from kvmlaunch.launch.measure import firmware_digest, measure, record_batches

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable
    from typing import Any

    from kvmlaunch.cli.quick import Parser

__all__ = ["add_options", "add_parser"]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    import argparse
    from functools import partial

    parser = commands.add_parser(
        "measure",
        help="print the launch digest",
        description="Predict the SNP launch digest of an image. Needs no SNP host, no root.",
        formatter_class=partial(argparse.HelpFormatter, width=help_width()),
    )
    # Without a default, which would undo the one before COMMAND.
    add_options(parser, verbose=argparse.SUPPRESS)


def add_options(parser: Parser, *, verbose: Any = False) -> None:
    """The command's options, for argparse and for `QuickParser`; ``verbose`` is a default."""
    add_image_options(parser)
    add_mode_options(parser)
    add_svsm_options(parser)
    add_order_option(parser)
    add_launch_options(parser)
    parser.add_argument(
        "--output-format", choices=("hex", "base64"), default="hex", help="default: hex"
    )
    parser.add_argument(
        "--explain",
        metavar="DIGEST",
        help="instead of a prediction say which options give this digest (hex or base64), by "
        "trying other numbers of vCPUs, features, CPUs, VMMs, page types, orders …",
    )
    # Where sev-snp-measure has it.
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        default=verbose,
        help="say more (on stderr)",
    )
    parser.set_defaults(command=_measure)


def _measure(args: argparse.Namespace, talk: Talk) -> int:
    mode = chosen_mode(args)
    if args.explain is not None:
        return _explain(args, mode, talk)
    if mode in LEGACY_MODES:
        return _legacy(args, mode)
    if mode == "snp:ovmf-hash":
        _check_no_log(args, mode)
        if args.dump_vmsa:
            raise FormatError(f"--dump-vmsa: --mode {mode} is of firmware alone, without VMSAs")
        _print_digest(firmware_digest(plan_from(args)), args)
        return DONE
    plan = as_asked(plan_from(args), args, talk)
    talk.detail(str(plan))
    if not plan.sev_features & 1:
        talk.say(lacks_snp_active(plan.sev_features))
    if args.log is None and not talk.verbose:
        digest = measure(plan).digest
    else:
        digest = _page_by_page(plan, args.log, talk)
    if args.dump_vmsa:
        _dump(_vmsas(plan), args)
    if args.log != "-":
        print(format_digest(digest, args.output_format))
    return DONE


def _explain(args: argparse.Namespace, mode: str, talk: Talk) -> int:
    from kvmlaunch.launch.explain import explain_digest

    if mode not in ("snp", "snp:svsm"):
        raise FormatError(f"--explain is for digests of SNP launches, not for --mode {mode}")
    for name in ("log", "dump_vmsa"):
        if getattr(args, name):
            option = name.replace("_", "-")
            raise FormatError(f"--explain measures many launches, so --{option} has none to show")
    digest = _digest(args.explain)
    image, options = choices_from(args)
    plan = as_asked(load_image(image, options), args, talk)

    def progress(tried: int, total: int) -> None:
        talk.progress(f"{tried} of {total} launches tried")

    try:
        found = explain_digest(plan, digest, options, progress=progress)
    finally:
        talk.progress("")
    print(found)
    return DONE if found else FAILED


def _digest(text: str) -> bytes:
    try:
        return parse_digest(text)
    except FormatError as error:
        raise FormatError(f"--explain: {error.rule}") from None


def _page_by_page(plan: LaunchPlan, log_path: str | None, talk: Talk) -> bytes:
    from kvmlaunch.launch.pagelog import open_log

    with open_log(log_path) as log:
        log.header(plan, platform="prediction", profile="", vmsa_mode=str(plan.vmsa_mode))
        digest, pages = plan.start_digest, 0
        for batch in record_batches(plan):
            log.records(batch)
            if talk.verbose:
                for record in batch.records:
                    talk.detail(str(record))
            digest, pages = batch.digest, pages + len(batch)
        log.finish(digest, pages)
    return digest


def _legacy(args: argparse.Namespace, mode: str) -> int:
    from kvmlaunch.launch.legacy import plan_legacy

    _check_no_log(args, mode)
    if mode == "sev" and args.dump_vmsa:
        raise FormatError("--dump-vmsa: a SEV guest has no VMSAs, see --mode seves")
    image, options = choices_from(args)
    launch = plan_legacy(image, mode, options)
    if args.dump_vmsa:
        _dump((vmsa.encode() for vmsa in launch.vmsas), args)
    _print_digest(launch.digest(), args)
    return DONE


def _check_no_log(args: argparse.Namespace, mode: str) -> None:
    if args.log is not None:
        raise FormatError(f"--log is a log of an SNP launch, which --mode {mode} is not")


def _print_digest(digest: bytes, args: argparse.Namespace) -> None:
    if args.output_format == "base64":
        import base64

        print(base64.b64encode(digest).decode())
    else:
        print(digest.hex())


def _vmsas(plan: LaunchPlan) -> Iterable[Buffer]:
    """The VMSAs that are measured, in their order."""
    for step in plan.vmsas:
        yield step.page(0)
    for _, vmsa in finish_vmsas(plan):
        yield vmsa.encode()


def _dump(pages: Iterable[Buffer], args: argparse.Namespace) -> None:
    from kvmlaunch.launch.files import write_whole

    named = [(f"vmsa{n}.bin", bytes(page)) for n, page in enumerate(pages)]
    for name, _ in named:
        refuse_overwriting(name, "--dump-vmsa", args)
    for name, page in named:
        write_whole(name, page)
