"""Options about the certificates of a host: given to guests, and written to a file."""

from __future__ import annotations

from kvmlaunch.cli.talk import Talk
from kvmlaunch.errors import FormatError

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    import argparse

    from kvmlaunch.attestation.certificates import Certificate
    from kvmlaunch.sim import SimPlatform
    from kvmlaunch.uapi import Platform

__all__ = [
    "add_certificate_options",
    "certificate_files",
    "certificates_from",
    "load_certificates",
    "write_chain",
]

_SIMULATED = "simulated"


def add_certificate_options(group: argparse._ActionsContainer) -> None:
    """What run has about certificates."""
    group.add_argument(
        "--certs",
        metavar="FILE",
        action="append",
        help="certificates for the guest's extended requests, again for more files: PEM, DER, or a "
        f"certificate table; {_SIMULATED}: the simulated host's own. Needs Linux 7.0",
    )
    group.add_argument(
        "--chain-out",
        metavar="FILE",
        help="write the simulated host's VCEK, ASK and ARK as PEM, for report verify",
    )


def certificates_from(args: argparse.Namespace, platform: Platform) -> bytes | None:
    """The table that --certs asks for. Raises FormatError."""
    if args.certs is None:
        return None
    from kvmlaunch.attestation.table import certificate_table

    if _SIMULATED in args.certs:
        if len(args.certs) > 1:
            raise FormatError(f"--certs {_SIMULATED} is all that the simulated host has")
        return _simulated(platform, "--certs simulated").certificate_chain().table()
    return certificate_table(c for path in args.certs for c in load_certificates(path))


def load_certificates(path: str) -> list[Certificate]:
    """The certificates of a file. Raises ImageError."""
    from kvmlaunch.attestation.certificates import read_certificates
    from kvmlaunch.attestation.source import decode_file

    return decode_file(path, read_certificates)


def certificate_files(args: argparse.Namespace) -> list[str]:
    """The files that --certs names, of a command that may have it."""
    return [path for path in getattr(args, "certs", None) or () if path != _SIMULATED]


def write_chain(args: argparse.Namespace, platform: Platform, talk: Talk) -> None:
    """Do what --chain-out asks for. Raises FormatError and KvmLaunchError."""
    if args.chain_out is None:
        return
    from kvmlaunch.launch.files import write_whole

    chain = _simulated(platform, "--chain-out").certificate_chain()
    write_whole(args.chain_out, chain.pem().encode("ascii"))
    talk.say(f"certificates of the simulated host written to {args.chain_out}")


def _simulated(platform: Platform, option: str) -> SimPlatform:
    from kvmlaunch.sim import SimPlatform

    if not isinstance(platform, SimPlatform):
        raise FormatError(
            f"{option} is for the simulated host: a chip's own certificates are at "
            "https://kdsintf.amd.com/vcek/v1"
        )
    return platform
