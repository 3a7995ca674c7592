"""ID blocks and keys on the command line: what is refused, by which sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.abi import vectors
from tests.cli.command import Cli, refused
from tests.idblock import ID_PRIVATE, sec1

SIM = ("--platform", "sim")
SECRET = "tr0ub4dor&3"


@pytest.mark.parametrize(
    ("args", "rule"),
    [
        ((), "name one source of the digest"),
        (("--digest", "00" * 48, "halt"), "name one source of the digest"),
        (("--digest", "00" * 47), "96 hex digits, this has 94"),
        (("--digest", "@/nosuch"), "/nosuch: can't be read"),
        (("--log", "/nosuch"), "/nosuch: can't be read"),
        (("--digest", "00" * 48, "--family-id", "00" * 15), "--family-id is 16 bytes"),
        (("--digest", "00" * 48, "--guest-svn", "-1"), "does not fit in 32 bits"),
        (("--digest", "00" * 48, "--policy", "0x10000"), "bit 17"),
        (("--digest", "00" * 48, "--policy", "smt,nonsense"), "no policy bit is named"),
        (("--digest", "00" * 48, "--output-format", "qemu", "--out-dir", "x"), "writes no files"),
    ],
)
def test_create_from_bad_input_is_refused_and_writes_nothing(
    cli: Cli,
    halt: Path,
    keys: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    rule: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    given = [halt if arg == "halt" else arg for arg in args]
    assert rule in refused(cli("id-block", "create", "--id-key", keys[0], *given))
    assert sorted(tmp_path.iterdir()) == before


def rsa_or_curve(name: str) -> bytes:
    from cryptography.hazmat.primitives.asymmetric import rsa

    key: Any = {
        "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
    }[name]()
    return sec1(key)


BAD_KEYS = {
    "empty": (lambda: b"", "not a private key"),
    "truncated": (lambda: sec1(ID_PRIVATE)[:100], "not a private key"),
    "p256": (lambda: rsa_or_curve("p256"), "curve secp256r1"),
    "rsa": (lambda: rsa_or_curve("rsa"), "not one of elliptic curve"),
    "public": (lambda: vectors.VS_ID_KEY_PEM, "not a private key"),
    "encrypted": (lambda: sec1(ID_PRIVATE, b"x"), "is encrypted, give its passphrase"),
}


@pytest.mark.parametrize("option", ["--id-key", "--author-key"])
@pytest.mark.parametrize("kind", BAD_KEYS)
@pytest.mark.parametrize("command", ["create", "run", "verify", "bisect"])
def test_key_that_is_none_is_refused_before_anything_is_done(
    halt: Path,
    keys: tuple[Path, Path],
    tmp_path: Path,
    command: str,
    kind: str,
    option: str,
    cli: Cli,
) -> None:
    make, rule = BAD_KEYS[kind]
    bad = tmp_path / "bad.pem"
    bad.write_bytes(make())
    before = sorted(tmp_path.iterdir())
    given = ("--id-key", keys[0], option, bad) if option == "--author-key" else (option, bad)
    head = {"create": ("id-block", "create", "--out-dir", tmp_path / "out")}.get(
        command, (command, *SIM, "--log", tmp_path / "log")
    )
    sentence = refused(cli("-q", *head, *given, halt))
    assert sentence.startswith(f"{bad}: ")
    assert rule in sentence
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("args", "rule"),
    [
        (("--author-key", "x"), "--author-key needs --id-key FILE"),
        (("--id-key-passphrase", "x"), "--id-key-passphrase needs --id-key FILE"),
        (("--family-id", "00" * 16), "--family-id needs --id-key FILE"),
        (("--guest-svn", "1"), "--guest-svn needs --id-key FILE"),
    ],
)
def test_run_with_half_an_identity_is_refused(
    cli: Cli, halt: Path, args: tuple[str, ...], rule: str
) -> None:
    assert refused(cli("-q", "run", *SIM, *args, halt)) == rule


def test_run_with_two_id_blocks_is_refused(
    cli: Cli, halt: Path, keys: tuple[Path, Path], signed: Any
) -> None:
    sentence = refused(cli("-q", "run", *SIM, *signed, "--id-key", keys[0], halt))
    assert sentence == "--id-key makes an ID block: leave out the options about a given one"


def test_output_over_a_key_is_refused_and_leaves_it(
    cli: Cli, halt: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "id-block").write_bytes(keys[0].read_bytes())
    before = keys[0].read_bytes()
    options = ("--id-key", tmp_path / "id-block", "--out-dir", tmp_path)
    assert "would overwrite" in refused(cli("id-block", "create", *options, halt))
    assert (tmp_path / "id-block").read_bytes() == before
    for command in ("run", "verify", "bisect"):
        done = cli("-q", command, *SIM, "--id-key", keys[0], "--log", keys[0], halt)
        assert "would overwrite" in refused(done)
        assert keys[0].read_bytes() == before
    (tmp_path / "pass").write_text(SECRET)
    given = ("--id-key", keys[0], "--id-key-passphrase", tmp_path / "pass")
    done = cli("-q", "verify", *SIM, *given, "--log", tmp_path / "pass", halt)
    assert "would overwrite" in refused(done)
    assert (tmp_path / "pass").read_text() == SECRET
