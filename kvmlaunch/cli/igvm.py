"""kvmlaunch igvm: show, check and build IGVM files."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from kvmlaunch.cli.key_options import Identity, add_identity_options, add_key_options
from kvmlaunch.cli.options import (
    add_image_options,
    add_launch_options,
    number,
    plan_from,
    size,
)
from kvmlaunch.cli.talk import DONE, FAILED, Talk
from kvmlaunch.cli.vmsa_options import add_proposal_option, as_asked, proposal_from
from kvmlaunch.errors import FormatError
from kvmlaunch.images import PlanOptions, open_image

if TYPE_CHECKING:
    from kvmlaunch.images.igvm.build import ParameterChoice
    from kvmlaunch.images.igvm.parse import IgvmFile

__all__ = ["add_parser"]

_SCHEMA = "kvmlaunch.igvm/1"
_KINDS = {
    "vp-count": "VP_COUNT_PARAMETER",
    "environment-info": "ENVIRONMENT_INFO_PARAMETER",
    "memory-map": "MEMORY_MAP",
    "mmio-ranges": "MMIO_RANGES",
    "command-line": "COMMAND_LINE",
    "madt": "MADT",
    "srat": "SRAT",
    "slit": "SLIT",
    "pptt": "PPTT",
    "device-tree": "DEVICE_TREE",
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "igvm",
        help="show, check or build an IGVM file",
        description="IGVM: a file that fixes a guest's pages, its VMSAs and their GPAs.",
    )
    ways = parser.add_subparsers(metavar="WAY", required=True)
    _add_show(ways)
    _add_check(ways)
    _add_build(ways)


def _add_show(ways: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    show = ways.add_parser(
        "show",
        help="headers, and the launch digest in each order",
        description="Show what an IGVM file holds, and its launch digest as the file orders it, "
        "as a mainline kernel launches it, and as QEMU issues it.",
    )
    _add_file_options(show)
    show.add_argument("--json", action="store_true", help="for machines")
    show.set_defaults(command=_show)


def _add_check(ways: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = ways.add_parser(
        "check",
        help="what would be refused, and where loaders differ",
        description="Tell before a launch what kernel or firmware would refuse, by which rule, "
        "and where known loaders treat the file in different ways. Exit code 1 if something "
        "would be refused.",
    )
    _add_file_options(check)
    check.add_argument(
        "--platform",
        choices=("kvm", "sim"),
        default="sim",
        help="kvm: ask this machine's kernel what it has; sim: launch on the simulated host",
    )
    check.add_argument(
        "--sim", metavar="PROFILE[,KEY=VALUE...]", help="what to simulate (default direct-vmsa)"
    )
    add_proposal_option(check)
    check.add_argument("--json", action="store_true", help="for machines")
    check.set_defaults(command=_check)


def _add_file_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="IGVM file")
    parser.add_argument("--vcpus", type=number, metavar="N", help="default: as many as it has")
    parser.add_argument("--memory", type=size, metavar="SIZE", help="RAM (default 256M)")
    parser.add_argument(
        "--native-zero", action="store_true", help="pages without data are ZERO (else NORMAL)"
    )


def _add_build(ways: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    build = ways.add_parser(
        "build",
        help="make an IGVM file of an image",
        description="Make an IGVM file of what launching an image would do. Without an option "
        "about VMSAs it has those that KVM makes, one for each vCPU.",
    )
    add_image_options(build, native_zero=False)
    add_launch_options(build, log=False)
    group = build.add_argument_group("IGVM file")
    group.add_argument("-o", "--output", required=True, metavar="FILE", help="the file to write")
    group.add_argument(
        "--igvm-version", type=int, choices=(1, 2), default=1, help="format version (default 1)"
    )
    group.add_argument(
        "--parameters",
        metavar="KIND[,KIND...]@GPA",
        action="append",
        default=[],
        help=f"a parameter area there, with these values of the launch: {', '.join(_KINDS)}",
    )
    group.add_argument(
        "--command-line", default="", metavar="TEXT", help="value of the parameter command-line"
    )
    group.add_argument(
        "--native-zero",
        action="store_true",
        dest="keep_zero",
        help="pages of type ZERO stay what --native-zero reads (else they become NORMAL)",
    )
    add_key_options(group)
    add_identity_options(group)
    build.set_defaults(command=_build)


def _options(args: argparse.Namespace, file: IgvmFile) -> PlanOptions:
    from kvmlaunch.images.igvm.directives import vcpus_of

    return PlanOptions(
        vcpus=vcpus_of(file) if args.vcpus is None else args.vcpus,
        memory=args.memory,
        native_zero=args.native_zero,
        forced=True,
    )


def _show(args: argparse.Namespace, talk: Talk) -> int:
    from kvmlaunch.images.igvm.parse import parse
    from kvmlaunch.images.igvm.show import describe_file, rows, table
    from kvmlaunch.launch.igvm_orders import order_digests

    file = parse(open_image(args.file))
    orders = order_digests(file, _options(args, file))
    if args.json:
        print(
            json.dumps(
                {
                    "schema": _SCHEMA,
                    "file": args.file,
                    **describe_file(file),
                    "headers": list(rows(file)),
                    "digests": [
                        {"order": o.order, "digest": o.digest and o.digest.hex(), "why": o.why}
                        for o in orders
                    ],
                },
                indent=2,
            )
        )
        return DONE
    about = describe_file(file)
    print(f"{args.file}: IGVM version {about['version']}, {about['file_size']} bytes")
    for platform in about["platforms"]:
        print("platform", " ".join(f"{name}={value}" for name, value in platform.items()))
    for line in table(rows(file)):
        print(line)
    if about["skipped"]:
        print(f"skipped: {about['skipped']} headers of unknown optional types")
    print()
    for order in orders:
        print(f"{order.order:<5}", order.digest.hex() if order.digest else "none")
        for why in order.why:
            print(f"      {why}")
    return DONE


def _check(args: argparse.Namespace, talk: Talk) -> int:
    from kvmlaunch.launch.igvm_check import check
    from kvmlaunch.platforms import open_platform

    choice = open_platform(args.platform, profile=args.sim or "direct-vmsa")
    talk.say(choice.why)
    source = open_image(args.file)
    findings = check(
        source,
        lambda file: _options(args, file),
        choice.platform,
        proposal=proposal_from(args),
    )
    refused = any(finding.refused for finding in findings)
    if args.json:
        shown = [finding._asdict() for finding in findings]
        print(json.dumps({"schema": _SCHEMA, "file": args.file, "findings": shown}, indent=2))
    else:
        for finding in findings:
            print(finding)
        if not findings:
            print("nothing would be refused, and known loaders agree")
    return FAILED if refused else DONE


def _build(args: argparse.Namespace, talk: Talk) -> int:
    from kvmlaunch.images.igvm.build import for_igvm
    from kvmlaunch.launch.igvm_build import describe_change, write_igvm
    from kvmlaunch.launch.measure import measure

    identity = Identity(args)
    plan = as_asked(plan_from(args), args, talk)
    areas = tuple(_area(text) for text in args.parameters)
    made = for_igvm(plan, areas, native_zero=args.keep_zero, command_line=args.command_line)
    made = identity.sign(made)
    written = write_igvm(
        args.output, made, areas, version=args.igvm_version, native_zero=args.keep_zero
    )
    talk.say(f"{args.output}: {written} bytes")
    digest = measure(made).digest
    for line in describe_change(plan, made, digest):
        talk.say(line)
    print(digest.hex())
    return DONE


def _area(text: str) -> ParameterChoice:
    from kvmlaunch.images.igvm.build import ParameterChoice
    from kvmlaunch.images.igvm.format import HeaderType

    kinds, _, gpa = text.partition("@")
    names = kinds.split(",")
    if unknown := [name for name in names if name not in _KINDS]:
        raise FormatError(f"--parameters: no value is named {unknown[0]!r}; {', '.join(_KINDS)}")
    try:
        address = int(gpa, 0)
    except ValueError:
        raise FormatError(f"--parameters {text}: not KIND[,KIND...]@GPA") from None
    return ParameterChoice(address, tuple(HeaderType[_KINDS[name]] for name in names))
