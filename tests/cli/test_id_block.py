"""kvmlaunch id-block: keygen, create, show, verify; and run with keys."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from kvmlaunch.abi.idblock import IdAuth, IdBlock
from kvmlaunch.abi.idblock_sign import check_signatures
from tests.abi import vectors
from tests.cli.command import SECONDS, Cli, Done, refused, spawn
from tests.idblock import AUTHOR_PRIVATE, ID_PRIVATE, public_key, sec1
from tests.idblock import id_auth as auth_by_hand
from tests.idblock import id_block as block_by_hand

SIM = ("--platform", "sim")
DIGEST = bytes.fromhex(vectors.ID_BLOCK_LD)
SECRET = "tr0ub4dor&3"


def made(folder: Path) -> tuple[IdBlock, IdAuth]:
    return (
        IdBlock.decode((folder / "id-block").read_bytes()),
        IdAuth.decode((folder / "id-auth").read_bytes()),
    )


# keygen


def test_keygen_makes_private_keys_and_prints_their_digests(cli: Cli, tmp_path: Path) -> None:
    paths = [tmp_path / "id.pem", tmp_path / "author.pem"]
    done = cli("id-block", "keygen", *paths)
    assert done.code == 0
    expected = []
    for path in paths:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert key.curve.name == "secp384r1"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        expected.append(f"{hashlib.sha384(public_key(key)).hexdigest()}  {path}")
    assert done.out.splitlines() == expected


def test_keygen_over_a_key_is_refused_and_leaves_it(cli: Cli, keys: tuple[Path, Path]) -> None:
    before = keys[0].read_bytes()
    new = keys[0].with_name("new.pem")
    sentence = refused(cli("id-block", "keygen", new, keys[0]))
    assert sentence == f"{keys[0]} is there already (--force replaces it)"
    assert keys[0].read_bytes() == before
    assert not new.exists()
    assert cli("id-block", "keygen", "--force", keys[0]).code == 0
    assert keys[0].read_bytes() != before


def test_keygen_with_a_passphrase_encrypts(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMLAUNCH_KEY_PASSPHRASE", SECRET)
    path = tmp_path / "id.pem"
    assert cli("id-block", "keygen", "--encrypt", path).code == 0
    assert b"ENCRYPTED" in path.read_bytes()
    assert serialization.load_pem_private_key(path.read_bytes(), SECRET.encode())


def test_keygen_without_a_passphrase_to_encrypt_with_is_refused(tmp_path: Path) -> None:
    done = spawn("id-block", "keygen", "--encrypt", tmp_path / "id.pem", stdin=subprocess.DEVNULL)
    assert refused(done).startswith("there is no passphrase: give it in a file")
    assert [*tmp_path.iterdir()] == []


# create


@pytest.mark.parametrize("author", [False, True])
def test_create_for_a_digest_is_what_is_laid_out_by_hand(
    cli: Cli, keys: tuple[Path, Path], tmp_path: Path, author: bool
) -> None:
    more = ("--author-key", keys[1]) if author else ()
    out = tmp_path / "out" / "id"
    done = cli(
        *("id-block", "create", "--digest", DIGEST.hex(), "--id-key", keys[0], *more),
        *("--family-id", b"F".hex() * 16, "--image-id", "0x" + b"I".hex() * 16),
        *("--guest-svn", 7, "--policy", "0xb0000", "--out-dir", out),
    )
    assert (done.code, done.out) == (0, "")
    expected = block_by_hand(DIGEST, policy=0xB0000)
    assert (out / "id-block").read_bytes() == expected
    block, auth = made(out)
    by_hand = IdAuth.decode(auth_by_hand(expected, author=author))
    assert (auth.id_key, auth.author_key, auth.auth_key_algo) == (
        by_hand.id_key,
        by_hand.author_key,
        by_hand.auth_key_algo,
    )
    assert check_signatures(block, auth, author=author) == []


def test_create_for_the_published_digest_is_the_published_block(
    cli: Cli, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    digest = base64.b64encode(DIGEST).decode()
    options = ("--output-format", "base64", "--out-dir", tmp_path)
    assert cli("id-block", "create", "--digest", digest, "--id-key", keys[0], *options).code == 0
    assert (tmp_path / "id-block").read_text() == vectors.ID_BLOCK_BASE64 + "\n"
    assert len(base64.b64decode((tmp_path / "id-auth").read_text())) == 4096


@pytest.mark.parametrize("form", ["raw", "hex", "0x", "base64"])
def test_create_takes_a_digest_from_a_file(
    cli: Cli, keys: tuple[Path, Path], tmp_path: Path, form: str
) -> None:
    data = {
        "raw": DIGEST,
        "hex": DIGEST.hex().encode() + b"\n",
        "0x": b"0x" + DIGEST.hex().upper().encode(),
        "base64": base64.b64encode(DIGEST),
    }[form]
    (tmp_path / "digest").write_bytes(data)
    digest = f"@{tmp_path / 'digest'}"
    options = ("--id-key", keys[0], "--out-dir", tmp_path)
    assert cli("id-block", "create", "--digest", digest, *options).code == 0
    assert made(tmp_path)[0].ld == DIGEST


@pytest.mark.parametrize("options", [(), ("--vcpus", 3), ("--policy", "smt,debug")])
def test_create_for_an_image_has_its_digest_and_is_launched(
    cli: Cli, halt: Path, keys: tuple[Path, Path], tmp_path: Path, options: tuple[object, ...]
) -> None:
    done = cli(
        *("id-block", "create", "--id-key", keys[0], "--author-key", keys[1]),
        *("--out-dir", tmp_path, *options, halt),
    )
    assert done.code == 0
    assert made(tmp_path)[0].ld.hex() == cli("measure", *options, halt).out.strip()
    ids = ("--id-block", tmp_path / "id-block", "--id-auth", tmp_path / "id-auth")
    assert cli("run", *SIM, *ids, "--author-key-enabled", *options, halt).code == 0
    assert cli("run", *SIM, *ids, "--vcpus", 2, halt).code == 1


@pytest.mark.parametrize("command", [("measure",), ("run", *SIM), ("verify", *SIM)])
def test_create_for_a_page_log_has_its_digest_and_policy(
    cli: Cli, halt: Path, keys: tuple[Path, Path], tmp_path: Path, command: tuple[str, ...]
) -> None:
    log = tmp_path / "x.jsonl"
    cli(*command, "--log", log, "--policy", "0xb0000", halt)
    options = ("--id-key", keys[0], "--out-dir", tmp_path)
    assert cli("id-block", "create", "--log", log, *options).code == 0
    block = made(tmp_path)[0]
    assert (block.ld.hex(), block.policy) == (cli("measure", halt).out.strip(), 0xB0000)
    assert cli("id-block", "create", "--log", log, "--policy", "smt", *options).code == 0
    assert made(tmp_path)[0].policy == 0x30000


@pytest.mark.parametrize("author", [False, True])
def test_create_for_qemu_prints_its_properties_and_writes_nothing(
    cli: Cli, keys: tuple[Path, Path], tmp_path: Path, author: bool
) -> None:
    more = ("--author-key", keys[1]) if author else ()
    before = sorted(tmp_path.iterdir())
    options = ("--digest", DIGEST.hex(), "--id-key", keys[0], *more, "--output-format", "qemu")
    done = cli("id-block", "create", *options)
    found = re.fullmatch(r"id-block=(.*),id-auth=(.*),author-key-enabled=(on|off)\n", done.out)
    assert found is not None
    assert found[1] == vectors.ID_BLOCK_BASE64
    auth = IdAuth.decode(base64.b64decode(found[2]))
    assert check_signatures(IdBlock(ld=DIGEST), auth) == []
    assert (found[3] == "on") is auth.has_author_key is author
    assert sorted(tmp_path.iterdir()) == before


def test_create_with_an_encrypted_key_takes_the_passphrase_from_file_or_environment(
    cli: Cli, keys: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys[0].write_bytes(sec1(ID_PRIVATE, SECRET.encode()))
    keys[1].write_bytes(sec1(AUTHOR_PRIVATE, b"another"))
    (tmp_path / "pass").write_text(SECRET + "\n")
    monkeypatch.setenv("KVMLAUNCH_AUTHOR_KEY_PASSPHRASE", "another")
    done = cli(
        *("-v", "id-block", "create", "--digest", DIGEST.hex(), "--out-dir", tmp_path),
        *("--id-key", keys[0], "--id-key-passphrase", tmp_path / "pass", "--author-key", keys[1]),
    )
    assert done.code == 0
    assert check_signatures(*made(tmp_path)) == []
    assert SECRET not in done.out + done.err


# Other tools


def test_verify_of_virtees_published_pair_finds_nothing(cli: Cli, tmp_path: Path) -> None:
    """virtee/sev tests/measurement: ID block, and the page whose hash is published."""
    from tests.abi.test_idblock_sign import published_auth

    page = published_auth().encode()
    assert hashlib.sha384(page).hexdigest() == vectors.VS_ID_AUTH_SHA384
    (tmp_path / "id-block").write_text(vectors.ID_BLOCK_BASE64)
    (tmp_path / "id-auth").write_bytes(page)
    done = cli(
        *("id-block", "verify", "--digest", vectors.ID_BLOCK_LD, "--policy", "0x30000"),
        *("--id-block", tmp_path / "id-block", "--id-auth", tmp_path / "id-auth"),
        *("--id-key-digest", vectors.VS_ID_KEY_DIGEST),
        *("--author-key-digest", vectors.VS_AUTHOR_KEY_DIGEST),
    )
    assert (done.code, failed_checks(done), len(done.out.splitlines())) == (0, [], 7)


def test_show_reads_what_snp_create_id_block_prints(
    cli: Cli, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    pytest.importorskip("sevsnpmeasure.id_block")
    printed = subprocess.run(
        [
            *(sys.executable, "-c", "from sevsnpmeasure.id_block import main; main()"),
            *("--measurement", base64.b64encode(DIGEST).decode()),
            *("--idkey", str(keys[0]), "--authorkey", str(keys[1])),
        ],
        capture_output=True,
        check=True,
        timeout=SECONDS,
    ).stdout
    (tmp_path / "theirs").write_bytes(printed)
    shown = json.loads(cli("id-block", "show", "--json", tmp_path / "theirs").out)
    assert shown["id_block"]["ld"] == DIGEST.hex()
    digests = dict(line.split(": ") for line in printed.decode().splitlines()[1:])
    for name, key in (("id_key_hash", "id_key"), ("author_key", "author_key")):
        assert base64.b64decode(digests[name]).hex() == shown["id_auth"][key]["digest"]
    both = ("--id-block", tmp_path / "theirs", "--digest", DIGEST.hex())
    assert cli("id-block", "verify", *both).out.splitlines() == [
        "version: right",
        "ID key: right",
        "author key: right",
        "launch digest: right",
    ]


def test_create_makes_what_snp_create_id_block_does_but_for_the_signatures(
    cli: Cli, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    other = pytest.importorskip("sevsnpmeasure.id_block")
    text = other.snp_calc_id_block(DIGEST, str(keys[0]), str(keys[1])).splitlines()[0]
    block, auth = (base64.b64decode(part.split("=", 1)[1]) for part in text.split(",", 1))
    cli(
        *("id-block", "create", "--digest", DIGEST.hex(), "--out-dir", tmp_path),
        *("--id-key", keys[0], "--author-key", keys[1]),
    )
    assert (tmp_path / "id-block").read_bytes() == block
    mine, theirs = (tmp_path / "id-auth").read_bytes(), auth
    for start, end in ((0, 0x40), (0x240, 0x680), (0x880, 0x1000)):
        assert mine[start:end] == theirs[start:end]


# show


def test_show_prints_every_field_and_the_key_digests(cli: Cli, tmp_path: Path) -> None:
    block = block_by_hand(DIGEST)
    (tmp_path / "a").write_bytes(block)
    (tmp_path / "b").write_bytes(base64.encodebytes(auth_by_hand(block, author=True)))
    out = cli("id-block", "show", tmp_path / "a", tmp_path / "b").out
    for text in (
        *(DIGEST.hex(), b"F".hex() * 16, "'IIIIIIIIIIIIIIII'", "policy            0x30000"),
        *("version           1", "guest SVN         7", "bit 16 SMT = 1"),
        *(hashlib.sha384(public_key(key)).hexdigest() for key in (ID_PRIVATE, AUTHOR_PRIVATE)),
        f"{ID_PRIVATE.public_key().public_numbers().x:096x}",
        f"{AUTHOR_PRIVATE.public_key().public_numbers().y:096x}",
    ):
        assert text in out


def test_show_of_one_without_author_key_says_so(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(auth_by_hand(block_by_hand()))
    assert "author key        none" in cli("id-block", "show", tmp_path / "b").out


@pytest.mark.parametrize("form", ["hex", "0x", "base64", "raw"])
@pytest.mark.parametrize("which", ["block", "auth"])
def test_show_takes_every_form(cli: Cli, tmp_path: Path, form: str, which: str) -> None:
    raw = block_by_hand() if which == "block" else auth_by_hand(block_by_hand())
    data = {
        "raw": raw,
        "hex": raw.hex().encode(),
        "0x": b"0x" + raw.hex().upper().encode() + b"\n",
        "base64": base64.b64encode(raw),
    }[form]
    (tmp_path / "x").write_bytes(data)
    (tmp_path / "raw").write_bytes(raw)
    shown = cli("id-block", "show", "--json", tmp_path / "x")
    assert shown.code == 0
    assert shown.out == cli("id-block", "show", "--json", tmp_path / "raw").out


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"", "neither an ID block (96 bytes) nor its authentication (4096 bytes)"),
        (bytes(95), "neither an ID block"),
        (b"ab" * 48, "neither an ID block"),
        (bytes(8) + b"\1" + bytes(4087), "offset 0x8: reserved byte of ID auth"),
        (b"id-block=AAA=", "an ID block is 96 bytes, raw, hex or base64; this is base64 of 2"),
    ],
)
def test_show_of_something_else_is_refused(
    cli: Cli, tmp_path: Path, data: bytes, rule: str
) -> None:
    (tmp_path / "x").write_bytes(data)
    assert refused(cli("id-block", "show", tmp_path / "x")).startswith(f"{tmp_path / 'x'}: {rule}")


def test_show_of_two_id_blocks_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(block_by_hand())
    sentence = refused(cli("id-block", "show", tmp_path / "x", tmp_path / "x"))
    assert sentence.endswith("a second file with an ID block")


# verify


def failed_checks(done: Done) -> list[str]:
    return [line.split(":")[0] for line in done.out.splitlines() if not line.endswith(": right")]


def test_verify_of_a_good_one_is_0(cli: Cli, halt: Path, signed: Any) -> None:
    digests = [hashlib.sha384(public_key(key)).digest() for key in (ID_PRIVATE, AUTHOR_PRIVATE)]
    done = cli(
        *("id-block", "verify", *signed, "--policy", "smt", "--sim", "6.12", halt),
        *("--id-key-digest", digests[0].hex()),
        *("--author-key-digest", base64.b64encode(digests[1]).decode()),
    )
    assert (done.code, failed_checks(done)) == (0, [])
    assert len(done.out.splitlines()) == 8


# Offset in ID block and ID authentication (snp-firmware-abi 6.1, 6.2) and what must find it.
FLIPS = [
    *(("id-block", at, ["ID key", "launch digest"]) for at in (0x00, 0x2F)),
    *(("id-block", at, ["ID key"]) for at in (0x30, 0x3F, 0x40, 0x4F, 0x54, 0x57)),
    *(("id-block", at, ["version", "ID key"]) for at in (0x50, 0x53)),
    *(("id-block", at, ["ID key", "policy"]) for at in (0x58, 0x5A, 0x5F)),
    *(("id-auth", at, ["ID key"]) for at in (0x000, 0x003, 0x040, 0x087, 0x088, 0x0CF, 0x23F)),
    *(("id-auth", at, ["author key"]) for at in (0x004, 0x007, 0x680, 0x6C8, 0x87F)),
    *(("id-auth", at, ["ID key", "author key"]) for at in (0x240, 0x244, 0x28C, 0x643)),
    *(("id-auth", at, ["author key"]) for at in (0x880, 0x884, 0x8CC, 0xC83)),
]


@pytest.mark.parametrize(("name", "offset", "found_by"), FLIPS)
def test_verify_when_one_bit_flips_is_found_by_the_right_check(
    cli: Cli, halt: Path, signed: Any, tmp_path: Path, name: str, offset: int, found_by: list[str]
) -> None:
    data = bytearray((tmp_path / name).read_bytes())
    data[offset] ^= 0x40
    (tmp_path / name).write_bytes(data)
    done = cli("id-block", "verify", *signed, "--policy", "0x30000", halt)
    assert (done.code, failed_checks(done)) == (1, found_by)
    as_json = json.loads(cli("id-block", "verify", "--json", *signed, "--policy", "smt", halt).out)
    assert [c["name"] for c in as_json["checks"] if not c["ok"]] == found_by
    assert as_json["ok"] is False


@pytest.mark.parametrize("offset", [0x008, 0x03F, 0x644, 0x67F, 0xC84, 0xFFF])
def test_verify_when_a_reserved_bit_flips_is_refused(
    cli: Cli, signed: Any, tmp_path: Path, offset: int
) -> None:
    data = bytearray((tmp_path / "id-auth").read_bytes())
    data[offset] ^= 1
    (tmp_path / "id-auth").write_bytes(data)
    sentence = refused(cli("id-block", "verify", *signed))
    assert f"offset {offset:#x}: reserved byte" in sentence


@pytest.mark.parametrize(
    ("options", "found_by"),
    [
        (("--digest", "00" * 48), ["launch digest"]),
        (("--policy", "smt,debug"), ["policy"]),
        (("--id-key-digest", "00" * 48), ["ID key digest"]),
        (("--author-key-digest", "00" * 48), ["author key digest"]),
    ],
)
def test_verify_when_something_else_is_expected_is_1(
    cli: Cli, signed: Any, options: tuple[str, ...], found_by: list[str]
) -> None:
    done = cli("id-block", "verify", *signed, *options)
    assert (done.code, failed_checks(done)) == (1, found_by)


@pytest.mark.parametrize(
    ("policy", "profile", "good"),
    [
        ("smt,debug", "6.12", True),
        ("smt,single_socket", "6.12", False),
        ("smt,single_socket", "6.18", True),
        ("smt,abi=1.55", "6.12", True),
        ("smt,abi=1.56", "6.12", False),  # the simulated firmware's ABI is 1.55
        ("debug", "6.12", False),
    ],
)
def test_verify_when_a_host_refuses_the_policy_is_1(
    cli: Cli, keys: tuple[Path, Path], tmp_path: Path, policy: str, profile: str, good: bool
) -> None:
    options = ("--id-key", keys[0], "--out-dir", tmp_path, "--policy", policy)
    assert cli("id-block", "create", "--digest", DIGEST.hex(), *options).code == 0
    ids = ("--id-block", tmp_path / "id-block", "--id-auth", tmp_path / "id-auth")
    done = cli("id-block", "verify", *ids, "--sim", profile)
    assert done.code == (0 if good else 1)
    assert failed_checks(done) == ([] if good else [f"policy on sim {profile}"])


def test_verify_without_an_author_key_where_one_should_count_is_1(
    cli: Cli, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    cli("id-block", "create", "--digest", DIGEST.hex(), "--id-key", keys[0], "--out-dir", tmp_path)
    ids = ("--id-block", tmp_path / "id-block", "--id-auth", tmp_path / "id-auth")
    assert cli("id-block", "verify", *ids).code == 0
    done = cli("id-block", "verify", *ids, "--author-key-enabled")
    assert (done.code, failed_checks(done)) == (1, ["author key"])


# run


@pytest.mark.parametrize("author", [False, True])
def test_run_with_keys_signs_what_is_launched(
    cli: Cli, halt: Path, keys: tuple[Path, Path], author: bool
) -> None:
    more = ("--author-key", keys[1]) if author else ()
    done = cli("run", *SIM, "--id-key", keys[0], *more, "--family-id", "ab" * 16, halt)
    assert done.code == 0
    # On a host that measures something else it is refused.
    done = cli(
        "-q", "run", "--platform", "sim", "--sim", "6.12,debug-swap", "--id-key", keys[0], halt
    )
    assert done.code == 1
    assert done.errors[0].startswith("kvmlaunch: SNP_LAUNCH_FINISH ret=-5 fw_error=11 ")


def test_run_with_keys_is_in_the_guests_report(
    cli: Cli, keys: tuple[Path, Path], tmp_path: Path, guests: Path
) -> None:
    """Fields and digests of snp-firmware-abi 8.1."""
    from tests.host import require_simulated_cpu

    require_simulated_cpu()
    report = tmp_path / "report"
    given = (
        *("run", *SIM, "--id-key", keys[0], "--author-key", keys[1], "--family-id", "ab" * 16),
        *("--image-id", "cd" * 16, "--guest-svn", 5, "--host-data", "ef" * 32),
        *("--report-out", report, guests / "attest.elf"),
    )
    assert cli(*given, "--vcek-disabled").code == 1
    assert not report.exists()
    assert cli(*given).code == 0
    data = report.read_bytes()
    assert data[0x04:0x08] == (5).to_bytes(4, "little")
    assert data[0x10:0x30] == bytes.fromhex("ab" * 16 + "cd" * 16)
    assert data[0xC0:0xE0] == bytes.fromhex("ef" * 32)
    assert data[0xE0:0x110] == hashlib.sha384(public_key(ID_PRIVATE)).digest()
    assert data[0x110:0x140] == hashlib.sha384(public_key(AUTHOR_PRIVATE)).digest()


# What is said


def test_nothing_that_is_said_or_logged_has_key_material(
    cli: Cli, halt: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    keys[0].write_bytes(sec1(ID_PRIVATE, SECRET.encode()))
    (tmp_path / "pass").write_text(SECRET)
    given = ("--id-key", keys[0], "--id-key-passphrase", tmp_path / "pass", "--author-key", keys[1])
    said = b""
    for number, command in enumerate(
        [
            ("run", *SIM, "--ioctls"),
            ("verify", *SIM),
            ("bisect", *SIM, "--sim", "6.12,debug-swap"),
            ("bisect", *SIM, "--json"),
        ]
    ):
        log = tmp_path / f"{number}.jsonl"
        done = cli("-v", *command, *given, "--log", log, halt)
        said += done.out.encode() + done.err.encode() + log.read_bytes()
    assert len(said) > 1000
    for private in (ID_PRIVATE, AUTHOR_PRIVATE):
        value = private.private_numbers().private_value
        for secret in (f"{value}", f"{value:x}", base64.b64encode(value.to_bytes(48, "big"))[-16:]):
            text = secret if isinstance(secret, bytes) else secret.encode()
            assert text not in said
    assert SECRET.encode() not in said
