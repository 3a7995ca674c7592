"""Options about how firmware is launched, with the names that sev-snp-measure gives them."""

from __future__ import annotations

import os
import stat

from kvmlaunch.abi.digest import parse_digest
from kvmlaunch.cli.quick import bad_argument
from kvmlaunch.errors import FormatError, ImageError
from kvmlaunch.images.options import COMPAT, LEGACY_MODES

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from kvmlaunch.cli.quick import Parser

__all__ = [
    "MODES",
    "add_mode_options",
    "add_svsm_options",
    "chosen_mode",
    "mode_choices",
]

MODES = ("snp", "snp:ovmf-hash", "snp:svsm", *LEGACY_MODES)

_CHUNK = 1 << 20


def add_mode_options(parser: Parser) -> None:
    """What is predicted, and what else is written."""
    group = parser.add_argument_group("mode")
    group.add_argument(
        "--mode",
        choices=MODES,
        help="snp: an SNP launch (default); snp:ovmf-hash: the digest of the firmware's pages "
        "alone, for --snp-ovmf-hash; snp:svsm: an SNP launch with --svsm; seves, sev: SHA-256 of "
        "a launch without SNP",
    )
    group.add_argument(
        "--snp-ovmf-hash",
        metavar="DIGEST",
        help="digest of the firmware's pages, which then aren't measured; its metadata is read",
    )
    group.add_argument(
        "--dump-vmsa", action="store_true", help="write the measured VMSAs to vmsa0.bin, …"
    )


def add_svsm_options(parser: Parser) -> None:
    """An SVSM below the firmware."""
    group = parser.add_argument_group("SVSM")
    group.add_argument("--svsm", metavar="FILE", help="coconut SVSM image, below --ovmf")
    size = group.add_mutually_exclusive_group()
    size.add_argument(
        "--vars-size",
        type=_bytes,
        metavar="BYTES",
        help="size of OVMF's variable store, which lies between the two",
    )
    size.add_argument("--vars-file", metavar="FILE", help="that variable store, for its size")
    group.add_argument(
        "--compat",
        choices=COMPAT,
        help="repeat what this tool gets wrong (with an SVSM: X87_FCW is 0, and "
        "--guest-features is ignored)",
    )


def chosen_mode(args: argparse.Namespace) -> str:
    """The mode, whether it was named or follows from ``--svsm``. Raises FormatError."""
    svsm = bool(args.svsm)
    mode: str = args.mode or ("snp:svsm" if svsm else "snp")
    if mode == "snp:svsm" and not svsm:
        raise FormatError("--mode snp:svsm needs --svsm FILE, and --vars-size or --vars-file")
    if mode in LEGACY_MODES and args.snp_ovmf_hash:
        raise FormatError(f"--snp-ovmf-hash is for --mode snp, not for {mode}")
    if mode != "snp:svsm" and svsm:
        raise FormatError(f"--svsm is for --mode snp:svsm, not for {mode}")
    return mode


def mode_choices(args: argparse.Namespace) -> dict[str, Any]:
    """PlanOptions that these options ask for. Raises FormatError."""
    svsm = getattr(args, "svsm", None) or None
    digest = getattr(args, "snp_ovmf_hash", None) or None
    return {
        "svsm": svsm,
        "vars_size": None if svsm is None else _vars_size(args),
        "firmware_digest": None if digest is None else parse_digest(digest),
        "compat": getattr(args, "compat", None),
    }


def _vars_size(args: argparse.Namespace) -> int:
    if args.vars_file is not None:
        return _size_of(args.vars_file)
    if args.vars_size is None:
        raise FormatError("--svsm needs --vars-size BYTES or --vars-file FILE")
    return int(args.vars_size)


def _size_of(path: str) -> int:
    """Bytes of a file, also of one that only tells them when it is read."""
    try:
        with open(path, "rb", buffering=0) as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
                return os.lseek(file.fileno(), 0, os.SEEK_END)
            size = 0
            while chunk := file.read(_CHUNK):
                size += len(chunk)
            return size
    except OSError as error:
        raise ImageError(path, f"can't be read: {error.strerror or error}") from None


def _bytes(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise bad_argument(f"{text!r} is not a number of bytes") from None
