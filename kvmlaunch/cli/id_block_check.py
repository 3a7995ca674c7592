"""kvmlaunch id-block verify: signatures, digest, policy."""

from __future__ import annotations

import argparse
import json
from typing import NamedTuple

from kvmlaunch.abi.digest import parse_digest
from kvmlaunch.abi.idblock import IdAuth, IdBlock
from kvmlaunch.cli.id_block_files import READ_AS, Found, digest_from, read_all
from kvmlaunch.cli.options import add_image_options, add_launch_options, plan_from
from kvmlaunch.cli.talk import DONE, FAILED, Talk
from kvmlaunch.cli.vmsa_options import as_asked
from kvmlaunch.errors import FormatError, IoctlError

__all__ = ["add_verify_parser"]

_EPILOG = """\
exit codes: 0 all checks passed, 1 one failed, 2 usage or bad input, 4 the host that was asked
for has no SNP
"""


class _Check(NamedTuple):
    """One thing that was looked at; ``wrong`` is a sentence, "" where all is well."""

    name: str
    wrong: str


def add_verify_parser(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the action."""
    parser = actions.add_parser(
        "verify",
        help="check an ID block as firmware will",
        description="Check version, keys and signatures of an ID block as SNP_LAUNCH_FINISH does; "
        "with IMAGE or --digest the launch digest, too, with --policy the policy, and with "
        f"--platform whether that host starts a guest with this policy. {READ_AS}",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_image_options(parser)
    # With --id-block and --id-auth, which here are what is checked.
    add_launch_options(parser, log=False)
    group = parser.add_argument_group("expected")
    group.add_argument("--digest", metavar="DIGEST", help="launch digest, instead of IMAGE")
    group.add_argument("--id-key-digest", metavar="DIGEST", help="SHA-384 that reports name it by")
    group.add_argument("--author-key-digest", metavar="DIGEST", help="likewise")
    host = parser.add_argument_group("host")
    host.add_argument("--platform", choices=("kvm", "sim"), help="try the policy on this host")
    host.add_argument(
        "--sim", metavar="PROFILE[,KEY=VALUE...]", help="what to simulate (implies --platform sim)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(command=_verify, policy=None)


def _verify(args: argparse.Namespace, talk: Talk) -> int:
    if args.id_block is None:
        raise FormatError("name what to check: --id-block FILE, and --id-auth FILE")
    files = [args.id_block] if args.id_auth is None else [args.id_block, args.id_auth]
    found = read_all(files)
    if found.block is None or found.auth is None:
        missing = "ID block" if found.block is None else "ID authentication"
        raise FormatError(f"{' and '.join(files)}: there is no {missing}")
    checks = [
        *_own_checks(found.block, found.auth, author=args.author_key_enabled or None),
        *_expected(args, found, talk),
        *_on_host(args, found.block),
    ]
    failed = [check for check in checks if check.wrong]
    if args.json:
        event = {
            "ok": not failed,
            "checks": [{"name": c.name, "ok": not c.wrong, "why": c.wrong} for c in checks],
        }
        print(json.dumps(event))
    else:
        for check in checks:
            print(f"{check.name}: {check.wrong or 'right'}")
    return FAILED if failed else DONE


def _own_checks(block: IdBlock, auth: IdAuth, *, author: bool | None) -> list[_Check]:
    from kvmlaunch.abi.idblock_sign import check_signatures

    version = "" if block.version == 1 else f"is {block.version}, not 1"
    wrong = check_signatures(block, auth, author=author)
    by_author = [line for line in wrong if "author key" in line]
    by_id = [line for line in wrong if line not in by_author]
    checks = [_Check("version", version), _Check("ID key", "; ".join(by_id))]
    if author or auth.has_author_key:
        checks.append(_Check("author key", "; ".join(by_author)))
    return checks


def _expected(args: argparse.Namespace, found: Found, talk: Talk) -> list[_Check]:
    block, auth = found
    assert block is not None
    assert auth is not None
    checks: list[_Check] = []
    image = args.image or args.ovmf or args.igvm
    if image is not None and args.digest is not None:
        raise FormatError("name one source of the digest: IMAGE or --digest")
    if args.digest is not None:
        checks.append(_same("launch digest", block.ld, digest_from(args.digest)))
    if image is not None:
        from kvmlaunch.launch.measure import measure

        # The files are read above, in more forms than a launch takes.
        args.id_block = args.id_auth = None
        args.author_key_enabled = False
        plan = as_asked(plan_from(args), args, talk)
        checks.append(_same("launch digest", block.ld, measure(plan).digest))
    if args.policy is not None:
        from kvmlaunch.abi.policy import parse_policy

        policy = parse_policy(args.policy)
        wrong = "" if policy == block.policy else f"is {block.policy:#x}, not {policy:#x}"
        checks.append(_Check("policy", wrong))
    from kvmlaunch.abi.idblock_sign import key_digest

    for name, text, key in (
        ("ID key digest", args.id_key_digest, auth.id_key),
        ("author key digest", args.author_key_digest, auth.author_key),
    ):
        if text is not None:
            checks.append(_same(name, key_digest(key), parse_digest(text)))
    return checks


def _same(name: str, found: bytes, expected: bytes) -> _Check:
    wrong = "" if found == expected else f"is {found.hex()}, not {expected.hex()}"
    return _Check(name, wrong)


def _on_host(args: argparse.Namespace, block: IdBlock) -> list[_Check]:
    """Start a guest with the policy, and throw it away."""
    if args.platform is None and args.sim is None:
        return []
    if args.platform == "kvm" and args.sim is not None:
        raise FormatError("--sim is for the simulated host: leave out --platform kvm")
    from kvmlaunch.launch.policy_check import try_policy
    from kvmlaunch.platforms import DEFAULT_PROFILE, open_platform

    choice = open_platform(args.platform or "sim", profile=args.sim or DEFAULT_PROFILE)
    name = f"policy on {choice.platform.name} {choice.platform.profile}".rstrip()
    try:
        try_policy(choice.platform, block.policy)
    except IoctlError as error:
        if not error.ioctl.endswith("SNP_LAUNCH_START"):
            raise
        return [_Check(name, f"is refused: {' '.join(str(error).split())}")]
    return [_Check(name, "")]
