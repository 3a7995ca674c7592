"""Options that several commands share, and how they become PlanOptions."""

from __future__ import annotations

import os

from kvmlaunch.abi.reset import vcpu_signature, vcpu_type_signature
from kvmlaunch.cli.mode_options import mode_choices
from kvmlaunch.cli.quick import bad_argument
from kvmlaunch.cli.vmsa_options import add_vmsa_options, vmsa_files, vmsas_from
from kvmlaunch.errors import FormatError, ImageError
from kvmlaunch.images import LaunchPlan, PlanOptions, VmmProfile, load_image, load_vmm
from kvmlaunch.images.options import DEFAULT_CBITPOS, DEFAULT_SIGNATURE, IMAGE_TYPES, ORDERS
from kvmlaunch.images.vmm import BUILT_IN, is_profile_path

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    import argparse

    from kvmlaunch.cli.quick import Parser

__all__ = [
    "add_image_options",
    "add_launch_options",
    "add_order_option",
    "choices_from",
    "number",
    "plan_from",
    "refuse_overwriting",
]

_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = r"(?i)^(\d+|0x[0-9a-f]+)([KMGT]?)(?:i?B)?$"
_BLOB_MOST = 1 << 16
_INPUTS = (
    *("image", "ovmf", "igvm", "id_block", "id_auth", "kernel", "initrd", "svsm", "vars_file"),
    *("id_key", "author_key", "id_key_passphrase", "author_key_passphrase", "from_log"),
)
_OUTPUTS = ("log", "trace_out", "report_out", "chain_out", "output")
_QEMU = "QEMU"


def add_image_options(parser: Parser, *, positional: bool = True, native_zero: bool = True) -> None:
    """The image and everything that changes its launch digest; or the image as --image."""
    what = "flat, ELF, OVMF or IGVM image"
    if positional:
        parser.add_argument("image", nargs="?", metavar="IMAGE", help=what)
    image = parser.add_argument_group("image")
    if not positional:
        image.add_argument("--image", metavar="IMAGE", help=what)
    image.add_argument("--ovmf", metavar="FILE", help="OVMF firmware, instead of IMAGE")
    image.add_argument("--igvm", metavar="FILE", help="IGVM file, instead of IMAGE")
    if native_zero:
        image.add_argument(
            "--native-zero",
            action="store_true",
            help="an IGVM file's pages without data are ZERO, as for Cloud Hypervisor (else "
            "NORMAL)",
        )
    image.add_argument("--image-type", choices=IMAGE_TYPES, default="auto", help="default: auto")
    image.add_argument(
        "--load-addr", type=number, metavar="GPA", help="where a flat image goes (default 0x1000)"
    )
    image.add_argument(
        "--entry",
        type=number,
        metavar="GPA",
        help="where the vCPUs start (flat, ELF; then a PVH note doesn't count)",
    )
    image.add_argument(
        "--kernel", metavar="FILE", help="Linux kernel for OVMF, whose hash is measured"
    )
    image.add_argument("--initrd", metavar="FILE", help="its initrd")
    image.add_argument("--append", metavar="TEXT", help="its command line, or that of --igvm")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--vcpus", type=number, default=1, metavar="N", help="default: 1")
    machine.add_argument(
        "--memory", type=size, metavar="SIZE", help="RAM, as 512M or 2G (default 256M)"
    )
    machine.add_argument("--vcpu-type", metavar="TYPE", help="QEMU's CPU model, EPYC-v4 …")
    machine.add_argument("--vcpu-sig", type=number, metavar="N", help="CPUID leaf 1 EAX itself")
    machine.add_argument("--vcpu-family", type=number, metavar="N", help="with model and stepping")
    machine.add_argument("--vcpu-model", type=number, metavar="N", help="with family and stepping")
    machine.add_argument("--vcpu-stepping", type=number, metavar="N", help="with family and model")
    machine.add_argument(
        "--vmm-type",
        metavar="NAME|FILE.json",
        default=_QEMU,
        help="whose register values, page order and page types firmware is launched with: "
        f"{', '.join(BUILT_IN)}, or a profile of yours (default: {_QEMU})",
    )
    machine.add_argument(
        "--guest-features",
        type=number,
        metavar="N",
        help="SEV_FEATURES of the VMSAs (default 0x1, or what an IGVM file's VMSAs have)",
    )
    machine.add_argument(
        "--cbitpos",
        type=number,
        metavar="BIT",
        help="C-bit position in 64-bit page tables (default: run asks the host; else "
        f"{DEFAULT_CBITPOS})",
    )


def add_launch_options(parser: Parser, *, log: bool = True, identity: bool = True) -> None:
    """What a launch has beside its measured pages, a log and an ID block included."""
    group = parser.add_argument_group("launch")
    group.add_argument(
        "--policy",
        metavar="POLICY",
        help="guest policy: a number, or names as smt,debug (default: an IGVM file's, or 0x30000)",
    )
    group.add_argument("--host-data", metavar="HEX", help="32 bytes for the attestation report")
    if identity:
        group.add_argument("--id-block", metavar="FILE", help="96 bytes, raw, hex or base64")
        group.add_argument("--id-auth", metavar="FILE", help="4096 bytes, raw, hex or base64")
        group.add_argument(
            "--author-key-enabled", action="store_true", help="the author key in --id-auth counts"
        )
    if log:
        group.add_argument(
            "--log",
            metavar="FILE",
            help="page log, JSON Lines (schema kvmlaunch.log/1); - is stdout",
        )
    add_vmsa_options(parser)


def add_order_option(parser: Parser) -> None:
    """Whose order of an IGVM file's directives counts."""
    parser.add_argument(
        "--order",
        choices=ORDERS,
        help="an IGVM file's directives as the file has them (default), as a mainline kernel "
        "launches them (VMSAs last, at its own GPA), or as QEMU issues them",
    )


def plan_from(
    args: argparse.Namespace, *, confidential: bool = True, cbitpos: int | None = None
) -> LaunchPlan:
    """The plan that the options ask for. Raises FormatError and ImageError.

    ``cbitpos`` is what a host says, for where no option does.
    """
    return load_image(*choices_from(args, confidential=confidential, cbitpos=cbitpos))


def choices_from(
    args: argparse.Namespace, *, confidential: bool = True, cbitpos: int | None = None
) -> tuple[str, PlanOptions]:
    """The image's path, and what the options ask for. Raises FormatError and ImageError."""
    image, image_type = _image(args)
    _check_outputs(args)
    policy = getattr(args, "policy", None)
    vmsas = vmsas_from(args)
    options = PlanOptions(
        image_type=image_type,
        vcpus=args.vcpus,
        memory=args.memory,
        policy=None if policy is None else _policy(policy),
        host_data=_host_data(getattr(args, "host_data", None)),
        id_block=_blob(getattr(args, "id_block", None), 96, "an ID block"),
        id_auth=_blob(getattr(args, "id_auth", None), 4096, "an ID authentication"),
        author_key_enabled=getattr(args, "author_key_enabled", False),
        vcek_disabled=getattr(args, "vcek_disabled", False),
        sev_features=args.guest_features,
        signature=_signature(args),
        load_addr=args.load_addr,
        entry=args.entry,
        confidential=confidential,
        cbitpos=cbitpos if args.cbitpos is None else args.cbitpos,
        # What mode sync makes of VMSAs is said before: see to_sync().
        vmsa_mode=None if args.vmsa_mode == "sync" and vmsas else args.vmsa_mode,
        vmsas=vmsas,
        forced=args.force,
        vmm=_vmm(args.vmm_type),
        # Scripts pass an empty text for what they don't have.
        kernel=args.kernel or None,
        initrd=args.initrd or None,
        append=args.append or None,
        order=getattr(args, "order", None),
        native_zero=getattr(args, "native_zero", False),
        **mode_choices(args),
    )
    return image, options


def _image(args: argparse.Namespace) -> tuple[str, str]:
    """The image's path, and its type as far as the options say it."""
    named = [
        (path, kind)
        for path, kind in ((args.image, "auto"), (args.ovmf, "ovmf"), (args.igvm, "igvm"))
        if path is not None
    ]
    if len(named) != 1:
        raise FormatError("name one image: IMAGE, --ovmf FILE, or --igvm FILE")
    path, kind = named[0]
    if "auto" not in (kind, args.image_type) and kind != args.image_type:
        raise FormatError(f"--{kind} and --image-type {args.image_type} contradict each other")
    return path, args.image_type if kind == "auto" else kind


def _vmm(name: str) -> VmmProfile | None:
    return None if name.lower() == _QEMU.lower() else load_vmm(name)


def refuse_overwriting(path: str, option: str, args: argparse.Namespace) -> None:
    """Raise FormatError if ``path`` is a file that is read."""
    for other in _inputs(args):
        if _is_same_file(path, other):
            raise FormatError(f"{option} {path} would overwrite {other}, which is launched from")


def _check_outputs(args: argparse.Namespace) -> None:
    """Opening an output empties it, so it must be no file of the launch, nor another output."""
    taken = [(path, "which is launched from") for path in _inputs(args)]
    for name in _OUTPUTS:
        path, option = getattr(args, name, None), name.replace("_", "-")
        if path is None:
            continue
        for other, why in taken:
            if _is_same_file(path, other):
                raise FormatError(f"--{option} {path} would overwrite {other}, {why}")
        taken.append((path, f"where --{option} goes"))


def _inputs(args: argparse.Namespace) -> list[str]:
    """The files that are read."""
    named = [path for name in _INPUTS if (path := getattr(args, name, None))]
    profile = [args.vmm_type] if is_profile_path(args.vmm_type) else []
    from kvmlaunch.cli.certificates import certificate_files  # of what writes files

    return [*named, *profile, *vmsa_files(args), *certificate_files(args)]


def _is_same_file(one: str, other: str) -> bool:
    if os.path.exists(one) and os.path.exists(other):
        # A device may be written to twice.
        return os.path.isfile(one) and os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


def number(text: str) -> int:
    """A number as people write it: decimal or 0x hex."""
    try:
        return int(text, 0)
    except ValueError:
        raise bad_argument(f"{text!r} is not a number") from None


def size(text: str) -> int:
    """A size in bytes: 4096, 512M, 2G, 0x100000."""
    import re  # few say how much

    match = re.match(_SIZE, text)
    if not match:
        raise bad_argument(f"{text!r} is not a size, as 512M or 2G")
    return int(match[1], 0) * _SUFFIXES[match[2].upper()]


def _policy(text: str) -> int:
    from kvmlaunch.abi.policy import GuestPolicy, parse_policy

    policy = parse_policy(text)
    GuestPolicy.from_int(policy)
    return policy


def _signature(args: argparse.Namespace) -> int:
    """The CPU's signature; whoever gives it in several ways must mean one CPU."""
    parts = (args.vcpu_family, args.vcpu_model, args.vcpu_stepping)
    given = set()
    if args.vcpu_type:
        given.add(vcpu_type_signature(args.vcpu_type))
    if args.vcpu_sig is not None:
        given.add(int(args.vcpu_sig))
    if parts != (None,) * 3:
        if None in parts:
            raise FormatError("--vcpu-family, --vcpu-model and --vcpu-stepping go together")
        given.add(vcpu_signature(*parts))
    if len(given) > 1:
        raise FormatError(
            "give the CPU once: --vcpu-type, or --vcpu-sig, or --vcpu-family/-model/-stepping"
        )
    return next(iter(given), DEFAULT_SIGNATURE)


def _host_data(text: str | None) -> bytes:
    if text is None:
        return bytes(32)
    try:
        data = bytes.fromhex(text.removeprefix("0x"))
    except ValueError:
        raise FormatError("--host-data is not hex") from None
    if len(data) != 32:
        raise FormatError(f"--host-data is {len(data)} bytes, it must be 32")
    return data


def _blob(path: str | None, length: int, what: str) -> bytes | None:
    """A small binary file, raw, hex or base64."""
    if path is None:
        return None
    from kvmlaunch.abi.blob import parse_blob
    from kvmlaunch.launch.files import read_small

    data = read_small(path, _BLOB_MOST)
    try:
        return parse_blob(data, length, what)
    except FormatError as error:
        raise ImageError(path, error.rule) from None
