"""Options about VMSAs, and how they become VmsaChoices."""

from __future__ import annotations

import os

from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.cli.quick import bad_argument
from kvmlaunch.errors import FormatError, ImageError
from kvmlaunch.images import LaunchPlan, VmsaMode

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    import argparse
    import re
    from typing import TypeAlias

    from kvmlaunch.cli.quick import Group, Parser
    from kvmlaunch.cli.talk import Talk
    from kvmlaunch.images import VmsaChoice
    from kvmlaunch.uapi import Proposal

__all__ = [
    "add_proposal_option",
    "add_vmsa_options",
    "as_asked",
    "proposal_from",
    "vmsa_files",
    "vmsas_from",
]

# Compiled when they are needed.
_VMSA = r"(?is)(?P<file>.*?)(?::(?P<vcpu>\d+|none))?(?:@(?P<gpa>0x[0-9a-f]+|\d+))?"
_EDIT = r"(?i)(?:(?P<vcpu>\d+):)?(?P<field>[a-z0-9_.]+)=(?P<value>.+)"
_Edits: TypeAlias = dict[int, list[tuple[str, int | bytes]]]
_NUMBER = r"(?i)0x[0-9a-f]+|\d+"


def add_vmsa_options(parser: Parser) -> None:
    """Who makes the VMSAs, and what they are."""
    group = parser.add_argument_group("VMSA")
    group.add_argument(
        "--vmsa-mode",
        choices=tuple(mode.value for mode in VmsaMode),
        help="who makes the VMSAs; sync: KVM, one per vCPU, at LAUNCH_FINISH; page: one page of "
        "ours for vCPU 0 (proposal v1); direct: pages of ours, bound per vCPU (proposal v2). "
        "Default: sync, or for an image with a VMSA the best that the host has",
    )
    group.add_argument(
        "--vmsa",
        metavar="[FILE][:VCPU][@GPA]",
        action="append",
        default=[],
        help="a VMSA page of 4096 bytes for this vCPU (default 0; none: measured only) at this "
        "GPA (default: the lowest free page); without FILE built from the vCPU's state",
    )
    group.add_argument("--vmsa-gpa", metavar="GPA", type=_gpa, help="where vCPU 0's VMSA is")
    group.add_argument(
        "--set-vmsa",
        metavar="[VCPU:]FIELD=VALUE",
        action="append",
        default=[],
        help="change a field of a VMSA, as rip=0x100000, cs.base=0 or 1:rbx=7",
    )
    group.add_argument(
        "--force",
        action="store_true",
        help="launch VMSAs that the kernel will refuse (vmpl, sev_features, GPA)",
    )


def vmsa_files(args: argparse.Namespace) -> list[str]:
    """The files that --vmsa names."""
    return [path for text in args.vmsa if (path := _parts(text)["file"])]


def vmsas_from(args: argparse.Namespace) -> tuple[VmsaChoice, ...]:
    """The VMSAs that the options ask for, in their order. Raises FormatError."""
    choices = [_choice(text) for text in args.vmsa]
    edits: _Edits = {}
    for text in args.set_vmsa:
        vcpu, field, value = _edit(text)
        edits.setdefault(vcpu, []).append((field, value))
    wanted = ([0] if args.vmsa_gpa is not None else []) + sorted(edits)
    for vcpu in wanted:
        if not any(choice.vcpu == vcpu for choice in choices):
            choices.append(_choice(f":{vcpu}"))
    return tuple(_finished(choice, args.vmsa_gpa, edits) for choice in choices)


def as_asked(plan: LaunchPlan, args: argparse.Namespace, talk: Talk) -> LaunchPlan:
    """The plan in mode sync where that was asked for, with what it changes said."""
    if args.vmsa_mode != "sync" or plan.vmsa_mode is VmsaMode.SYNC:
        return plan
    from kvmlaunch.images import to_sync
    from kvmlaunch.launch.sync_fallback import describe_fallback

    fallback = to_sync(plan)
    for line in describe_fallback(plan, fallback)[0]:
        talk.say(line)
    return fallback.plan


def add_proposal_option(group: Group) -> None:
    """Numbers of the proposals."""
    group.add_argument(
        "--proposal-cap",
        metavar="NAME=NUMBER",
        action="append",
        default=[],
        help="a number of the VMSA proposals in this kernel, as DIRECT_VMSA=251 (or in the "
        "environment: KVMLAUNCH_PROPOSAL)",
    )


def proposal_from(args: argparse.Namespace) -> Proposal:
    """The numbers of option and environment. Raises FormatError."""
    from kvmlaunch.uapi import default_proposal, parse_proposal

    return parse_proposal(",".join(args.proposal_cap), default_proposal())


def _finished(choice: VmsaChoice, gpa: int | None, edits: _Edits) -> VmsaChoice:
    if choice.vcpu is None:
        return choice
    edited = choice.replace(edits=tuple(edits.get(choice.vcpu, ())))
    if choice.vcpu or gpa is None:
        return edited
    if choice.gpa is not None:
        raise FormatError("vCPU 0's VMSA has two GPAs: --vmsa-gpa and --vmsa")
    return edited.replace(gpa=gpa)


def _parts(text: str) -> re.Match[str]:
    import re

    match = re.fullmatch(_VMSA, text)
    assert match is not None  # a FILE may be anything
    return match


def _choice(text: str) -> VmsaChoice:
    from kvmlaunch.images import VmsaChoice

    match = _parts(text)
    path, vcpu, gpa = match["file"], match["vcpu"] or "0", match["gpa"]
    choice = VmsaChoice(
        vcpu=None if vcpu.lower() == "none" else _number(vcpu),
        gpa=None if gpa is None else _number(gpa),
    )
    return choice.replace(page=_page(path), origin=os.path.basename(path)) if path else choice


def _page(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            page = file.read(PAGE_SIZE + 1)
            size = len(page) if len(page) <= PAGE_SIZE else max(os.path.getsize(path), 4097)
    except OSError as error:
        raise ImageError(path, f"can't be read: {error.strerror}") from None
    if size != PAGE_SIZE:
        raise ImageError(path, f"a VMSA page is 4096 bytes, this file has {size}")
    return page


def _edit(text: str) -> tuple[int, str, int | bytes]:
    import re

    match = re.fullmatch(_EDIT, text)
    if match is None:
        raise FormatError(f"--set-vmsa {text}: not [VCPU:]FIELD=VALUE")
    field, value = match["field"].lower(), match["value"]
    if field.startswith("fpreg_"):
        try:
            return _number(match["vcpu"] or "0"), field, bytes.fromhex(value.removeprefix("0x"))
        except ValueError:
            raise FormatError(f"--set-vmsa {text}: {value!r} is not hex") from None
    if not re.fullmatch(_NUMBER, value):
        raise FormatError(f"--set-vmsa {text}: {value!r} is not a number")
    return _number(match["vcpu"] or "0"), field, _number(value)


def _number(text: str) -> int:
    try:
        return int(text, 16 if text[:2].lower() == "0x" else 10)
    except ValueError:  # Python reads no decimal number of over 4300 digits
        raise FormatError(f"{text[:20]}... is no number of a VMSA: {len(text)} digits") from None


def _gpa(text: str) -> int:
    import re

    if not re.fullmatch(_NUMBER, text):
        raise bad_argument(f"{text!r} is not a number")
    return _number(text)
