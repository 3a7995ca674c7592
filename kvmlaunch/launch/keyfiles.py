"""Private keys in files, and the passphrases of encrypted ones.

A passphrase comes from a file, from the environment or from a prompt: what stands in an
argument vector is there for everybody to read. Nothing here logs or keeps one.
"""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Mapping, Sequence

from kvmlaunch.abi.idblock_sign import PassphraseNeeded, Signer, private_pem
from kvmlaunch.errors import FormatError, ImageError
from kvmlaunch.launch.files import read_small, write_files

__all__ = ["load_signer", "make_keys", "new_passphrase"]

_MODE = 0o600


def load_signer(path: str, *, passphrase_file: str | None = None, variable: str = "") -> Signer:
    """The P-384 private key in a PEM or DER file.

    If it is encrypted, its passphrase is the first line of ``passphrase_file``, else the value
    of the environment's ``variable``, else asked for where there is a terminal. Raises
    ImageError, which names the file.
    """
    data = read_small(path)
    given = _given(passphrase_file, variable)
    try:
        try:
            return Signer.from_pem(data, given)
        except PassphraseNeeded:
            if given is not None or not _at_a_terminal():
                raise
        return Signer.from_pem(data, _ask(f"Passphrase of {path}: "))
    except PassphraseNeeded as error:
        more = f" (in a file, or in {variable})" if variable and given is None else ""
        raise ImageError(path, error.rule + more) from None
    except FormatError as error:
        raise ImageError(path, error.rule) from None


def make_keys(
    paths: Sequence[str], *, passphrase: bytes | None = None, replace: bool = False
) -> Mapping[str, Signer]:
    """Make a P-384 key per file (PKCS#8 PEM, mode 0600), all or none.

    Raises FormatError where a file is there already and may not be replaced, and
    KvmLaunchError where one can't be written.
    """
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise FormatError("two keys can't be in one file")
    keys = {path: private_pem(passphrase) for path in paths}
    files = {path: pem for path, (pem, _) in keys.items()}
    write_files(files, mode=_MODE, replace=replace)
    return {path: signer for path, (_, signer) in keys.items()}


def new_passphrase(passphrase_file: str | None, variable: str) -> bytes:
    """A passphrase for a new key, from where `load_signer` takes one. Raises FormatError."""
    given = _given(passphrase_file, variable)
    if given is None and _at_a_terminal():
        given = _ask("New passphrase: ")
        if given != _ask("Once more: "):
            raise FormatError("the two passphrases differ")
    if given is None:
        raise FormatError(f"there is no passphrase: give it in a file, or in {variable}")
    if not given:
        raise FormatError("the passphrase is empty")
    return given


def _given(passphrase_file: str | None, variable: str) -> bytes | None:
    if passphrase_file is not None:
        return read_small(passphrase_file).partition(b"\n")[0].removesuffix(b"\r")
    value = os.environ.get(variable) if variable else None
    return None if value is None else os.fsencode(value)


def _at_a_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _ask(prompt: str) -> bytes:
    try:
        return getpass.getpass(prompt).encode()
    except EOFError:
        raise FormatError("no passphrase was given") from None
