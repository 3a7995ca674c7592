"""kvmlaunch id-block: make keys and ID blocks, show and check them."""

from __future__ import annotations

import argparse
import base64
import json
import os
from pathlib import Path
from typing import Any

from kvmlaunch.abi.idblock import IdBlock
from kvmlaunch.abi.policy import DEFAULT_POLICY, GuestPolicy, parse_policy
from kvmlaunch.cli.id_block_check import add_verify_parser
from kvmlaunch.cli.id_block_files import (
    READ_AS,
    describe,
    describe_json,
    digest_from,
    read_all,
)
from kvmlaunch.cli.key_options import (
    add_identity_options,
    add_key_options,
    identity_from,
    signers_from,
)
from kvmlaunch.cli.options import (
    add_image_options,
    add_launch_options,
    plan_from,
    refuse_overwriting,
)
from kvmlaunch.cli.talk import DONE, Talk
from kvmlaunch.cli.vmsa_options import as_asked
from kvmlaunch.errors import FormatError
from kvmlaunch.launch.files import write_files

__all__ = ["add_parser"]

_PASSPHRASE = "KVMLAUNCH_KEY_PASSPHRASE"
_BLOCK, _AUTH = "id-block", "id-auth"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "id-block",
        help="make, show and check ID blocks",
        description="ID blocks bind a launch to its digest, under one identity: 96 bytes "
        "(id-block), with keys and signatures in 4096 more (id-auth).",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    _add_create(actions)
    _add_keygen(actions)
    _add_show(actions)
    add_verify_parser(actions)


def _add_keygen(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = actions.add_parser(
        "keygen",
        help="make P-384 keys",
        description="Make a private P-384 key per file (PKCS#8 PEM, mode 0600), all or none, and "
        "print the digest that attestation reports name it by.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="as id.pem author.pem")
    parser.add_argument("--encrypt", action="store_true", help="encrypt them with a passphrase")
    parser.add_argument(
        "--passphrase-file",
        metavar="FILE",
        help=f"the passphrase, its first line (or in {_PASSPHRASE}; else asked for)",
    )
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    parser.set_defaults(command=_keygen)


def _keygen(args: argparse.Namespace, talk: Talk) -> int:
    from kvmlaunch.launch.keyfiles import make_keys, new_passphrase

    if args.passphrase_file is not None and not args.encrypt:
        raise FormatError("--passphrase-file needs --encrypt")
    passphrase = new_passphrase(args.passphrase_file, _PASSPHRASE) if args.encrypt else None
    for path, signer in make_keys(args.files, passphrase=passphrase, replace=args.force).items():
        print(f"{signer.digest.hex()}  {path}")
    return DONE


def _add_create(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = actions.add_parser(
        "create",
        help="make and sign an ID block",
        description="Make an ID block for the predicted digest of IMAGE, for --digest, or for the "
        "launch in a page log, and sign it.",
    )
    add_image_options(parser)
    add_launch_options(parser, log=False, identity=False)
    source = parser.add_argument_group("digest", "instead of IMAGE")
    source.add_argument(
        "--digest",
        metavar="DIGEST",
        help="launch digest, hex or base64, or @FILE (may be raw)",
    )
    source.add_argument(
        "--log", metavar="FILE", dest="from_log", help="the digest and policy of this page log"
    )
    identity = parser.add_argument_group("identity")
    add_key_options(identity, required=True)
    add_identity_options(identity)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out-dir", metavar="DIR", help=f"where {_BLOCK} and {_AUTH} go (default: here)"
    )
    output.add_argument(
        "--output-format",
        choices=("raw", "base64", "qemu"),
        default="raw",
        help="raw: bytes (default); base64: text in the files; qemu: nothing is written, and the "
        "properties of QEMU's sev-snp-guest are printed",
    )
    # None where it isn't given, since a log has a policy of its own.
    parser.set_defaults(command=_create, policy=None)


def _create(args: argparse.Namespace, talk: Talk) -> int:
    from kvmlaunch.abi.idblock_sign import sign_id_block

    identity = identity_from(args)
    digest, policy = _digest(args, talk)
    block = IdBlock(ld=digest, policy=policy, **identity)
    id_key, author_key = signers_from(args)
    assert id_key is not None
    auth = sign_id_block(block, id_key, author_key)
    if args.output_format == "qemu":
        if args.out_dir is not None:
            raise FormatError("--output-format qemu writes no files: leave out --out-dir")
        print(_qemu(block.encode(), auth.encode(), author=author_key is not None))
    else:
        _write(args, block.encode(), auth.encode(), talk)
    talk.say(f"launch digest {digest.hex()}")
    talk.say(f"ID key digest {id_key.digest.hex()}")
    if author_key is not None:
        talk.say(f"author key digest {author_key.digest.hex()}")
    return DONE


def _digest(args: argparse.Namespace, talk: Talk) -> tuple[bytes, int]:
    """Launch digest and policy, from one source."""
    image = args.image or args.ovmf or args.igvm
    if sum(source is not None for source in (image, args.digest, args.from_log)) != 1:
        raise FormatError("name one source of the digest: IMAGE, --digest or --log")
    policy = DEFAULT_POLICY
    if args.policy is not None:
        policy = parse_policy(args.policy)
        GuestPolicy.from_int(policy)
    if args.digest is not None:
        return digest_from(args.digest), policy
    if args.from_log is not None:
        from kvmlaunch.launch.pagelog_reader import read_log

        logged = read_log(args.from_log)
        return logged.digest, logged.policy if args.policy is None else policy
    from kvmlaunch.launch.measure import measure

    plan = as_asked(plan_from(args), args, talk)
    return measure(plan).digest, plan.policy


def _write(args: argparse.Namespace, block: bytes, auth: bytes, talk: Talk) -> None:
    folder = Path(args.out_dir or ".")
    files = {str(folder / _BLOCK): block, str(folder / _AUTH): auth}
    for path in files:
        refuse_overwriting(path, "--out-dir:", args)
    os.makedirs(folder, exist_ok=True)
    if args.output_format == "base64":
        files = {path: base64.b64encode(data) + b"\n" for path, data in files.items()}
    write_files(files)
    talk.say(f"wrote {' and '.join(files)}")


def _qemu(block: bytes, auth: bytes, *, author: bool) -> str:
    texts = (base64.b64encode(part).decode("ascii") for part in (block, auth))
    enabled = "on" if author else "off"
    return "id-block={},id-auth={},author-key-enabled={}".format(*texts, enabled)


def _add_show(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = actions.add_parser(
        "show",
        help="decode an ID block or its authentication",
        description=f"Decode ID block and ID authentication, with key digests. {READ_AS}",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="id-block, id-auth, or both")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(command=_show)


def _show(args: argparse.Namespace, talk: Talk) -> int:
    found = read_all(args.files)
    if args.json:
        event: dict[str, Any] = describe_json(found)
        print(json.dumps(event))
    else:
        print("\n".join(describe(found)))
    return DONE
