"""Options about ID block, ID key and author key."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvmlaunch.abi.blob import parse_blob
from kvmlaunch.cli.options import number
from kvmlaunch.errors import FormatError

if TYPE_CHECKING:
    from kvmlaunch.abi.idblock_sign import Signer
    from kvmlaunch.images import LaunchPlan

__all__ = [
    "AUTHOR_VARIABLE",
    "ID_VARIABLE",
    "Identity",
    "add_identity_options",
    "add_key_options",
    "identity_from",
    "signers_from",
]

ID_VARIABLE = "KVMLAUNCH_ID_KEY_PASSPHRASE"
"""Environment variable with the ID key's passphrase."""
AUTHOR_VARIABLE = "KVMLAUNCH_AUTHOR_KEY_PASSPHRASE"
"""Environment variable with the author key's passphrase."""


def add_key_options(group: argparse._ArgumentGroup, *, required: bool = False) -> None:
    """The keys that sign, and where their passphrases are."""
    group.add_argument(
        "--id-key", metavar="FILE", required=required, help="private P-384 key (PEM or DER)"
    )
    group.add_argument(
        "--id-key-passphrase",
        metavar="FILE",
        help=f"its passphrase, the file's first line (or in {ID_VARIABLE}; else asked for)",
    )
    group.add_argument(
        "--author-key", metavar="FILE", help="private P-384 key that signs the ID key"
    )
    group.add_argument(
        "--author-key-passphrase",
        metavar="FILE",
        help=f"its passphrase, the file's first line (or in {AUTHOR_VARIABLE}; else asked for)",
    )


def add_identity_options(group: argparse._ArgumentGroup) -> None:
    """What an ID block says beside digest and policy."""
    group.add_argument("--family-id", metavar="ID", help="16 bytes, hex or base64 (default zeros)")
    group.add_argument("--image-id", metavar="ID", help="16 bytes, hex or base64 (default zeros)")
    group.add_argument(
        "--guest-svn", type=number, default=0, metavar="N", help="security version (default 0)"
    )


def signers_from(args: argparse.Namespace) -> tuple[Signer | None, Signer | None]:
    """ID key and author key, where they are given. Raises FormatError and ImageError."""
    if args.id_key is None:
        for name in ("author_key", "id_key_passphrase", "author_key_passphrase"):
            if getattr(args, name) is not None:
                raise FormatError(f"--{name.replace('_', '-')} needs --id-key FILE")
        return None, None
    if args.author_key is None and args.author_key_passphrase is not None:
        raise FormatError("--author-key-passphrase needs --author-key FILE")
    from kvmlaunch.launch.keyfiles import load_signer

    id_key = load_signer(args.id_key, passphrase_file=args.id_key_passphrase, variable=ID_VARIABLE)
    if args.author_key is None:
        return id_key, None
    author_key = load_signer(
        args.author_key, passphrase_file=args.author_key_passphrase, variable=AUTHOR_VARIABLE
    )
    return id_key, author_key


def identity_from(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of an ID block. Raises FormatError."""
    if not 0 <= args.guest_svn < 1 << 32:
        raise FormatError(f"--guest-svn {args.guest_svn} does not fit in 32 bits")
    return {
        "family_id": _id(args.family_id, "--family-id"),
        "image_id": _id(args.image_id, "--image-id"),
        "guest_svn": args.guest_svn,
    }


class Identity:
    """What signs a plan, read before anything is done. Raises FormatError and ImageError."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._fields = identity_from(args)
        self._id_key, self._author_key = signers_from(args)
        for name in ("family_id", "image_id", "guest_svn"):
            if self._id_key is None and getattr(args, name):
                raise FormatError(f"--{name.replace('_', '-')} needs --id-key FILE")
        if self._id_key is not None and (args.id_block or args.id_auth or args.author_key_enabled):
            raise FormatError("--id-key makes an ID block: leave out the options about a given one")

    def sign(self, plan: LaunchPlan) -> LaunchPlan:
        """The plan with an ID block for its predicted digest, where there is an ID key."""
        if self._id_key is None:
            return plan
        if plan.id_block is not None:
            raise FormatError(
                f"--id-key makes an ID block, but {plan.image} has one: {plan.id_block.hex()}"
            )
        from kvmlaunch.abi.idblock import IdBlock
        from kvmlaunch.abi.idblock_sign import sign_id_block
        from kvmlaunch.launch.measure import measure

        block = IdBlock(ld=measure(plan).digest, policy=plan.policy, **self._fields)
        return replace(
            plan,
            id_block=block.encode(),
            id_auth=sign_id_block(block, self._id_key, self._author_key).encode(),
            author_key_enabled=self._author_key is not None,
        )


def _id(text: str | None, option: str) -> bytes:
    return bytes(16) if text is None else parse_blob(text.encode(), 16, option)
