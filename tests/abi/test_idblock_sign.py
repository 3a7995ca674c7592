from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import itertools
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmlaunch.abi.idblock import IdAuth, IdBlock
from kvmlaunch.abi.idblock_sign import (
    PassphraseNeeded,
    Signer,
    check_signatures,
    decode_public_key,
    encode_public_key,
    key_digest,
    private_pem,
    sign_id_block,
    verify_signature,
)
from kvmlaunch.abi.signature import encode_signature
from kvmlaunch.errors import FormatError
from tests import idblock as by_hand

from . import vectors

PRIVATE = by_hand.ID_PRIVATE
BLOCK = IdBlock(ld=by_hand.V1, guest_svn=7)
PASSPHRASE = b"correct horse"
# Of NIST SP 800-186, P-384: the generator and the order.
GENERATOR = (
    0xAA87CA22BE8B05378EB1C71EF320AD746E1D3B628BA79B9859F741E082542A385502F25DBF55296C3A545E3872760AB7,
    0x3617DE4A96262C6F5D9E98BF9292DC29F8F41DBD289A147CE9DA3113B5F0B8C00A60B1CE1D7E819D7A431D7C90EA0E5F,
)
ORDER = int(
    "ffffffffffffffffffffffffffffffffffffffffffffffff"
    "c7634d81f4372ddf581a0db248b0a77aecec196accc52973",
    16,
)


def der_sign(message: bytes) -> bytes:
    return PRIVATE.sign(message, ec.ECDSA(hashes.SHA384()))


def pem(private: Any, passphrase: bytes | None = None, *, sec1: bool = False) -> bytes:
    encryption: Any = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase)
    form = serialization.PrivateFormat
    made: bytes = private.private_bytes(
        serialization.Encoding.PEM, form.TraditionalOpenSSL if sec1 else form.PKCS8, encryption
    )
    return made


def der(private: Any, passphrase: bytes | None = None) -> bytes:
    text = pem(private, passphrase).splitlines()[1:-1]
    return base64.b64decode(b"".join(text))


PEM, DER = pem(PRIVATE), der(PRIVATE)
SEALED_PEM, SEALED_DER = pem(PRIVATE, PASSPHRASE), der(PRIVATE, PASSPHRASE)


def never(message: bytes) -> bytes:
    raise AssertionError("nothing is signed here")


# Published vectors (snp-firmware-abi.md 6.5)


@pytest.mark.parametrize(
    ("key", "digest"),
    [
        (vectors.VS_ID_KEY_PEM, vectors.VS_ID_KEY_DIGEST),
        (vectors.VS_AUTHOR_KEY_PEM, vectors.VS_AUTHOR_KEY_DIGEST),
        (vectors.SSM_ID_KEY_PEM, vectors.SSM_ID_KEY_DIGEST),
        (vectors.SSM_AUTHOR_KEY_PEM, vectors.SSM_AUTHOR_KEY_DIGEST),
    ],
)
def test_digest_of_published_key_is_the_published_one(key: bytes, digest: str) -> None:
    assert Signer(never, key).digest.hex() == digest


def published_auth() -> IdAuth:
    def signature(parts: tuple[str, str]) -> bytes:
        r, s = (int.from_bytes(bytes.fromhex(part), "little") for part in parts)
        return encode_signature(r, s)

    return IdAuth(
        1,
        1,
        signature(vectors.VS_ID_BLOCK_SIG),
        Signer(never, vectors.VS_ID_KEY_PEM).public_key,
        signature(vectors.VS_ID_KEY_SIG),
        Signer(never, vectors.VS_AUTHOR_KEY_PEM).public_key,
    )


def test_id_auth_of_published_parts_is_the_published_page() -> None:
    page = published_auth().encode()
    assert hashlib.sha384(page).hexdigest() == vectors.VS_ID_AUTH_SHA384


def test_check_of_published_id_block_finds_nothing() -> None:
    block = IdBlock.decode(base64.b64decode(vectors.ID_BLOCK_BASE64))
    assert check_signatures(block, published_auth()) == []


@pytest.mark.parametrize("offset", range(0, 96, 5))
def test_check_when_a_bit_of_the_published_id_block_flips_finds_the_signature(offset: int) -> None:
    raw = bytearray(base64.b64decode(vectors.ID_BLOCK_BASE64))
    raw[offset] ^= 0x10
    assert check_signatures(IdBlock.decode(raw), published_auth()) == [
        "the signature of the ID block is not one by the ID key"
    ]


# Signing, held against what tests/idblock.py lays out by hand


@pytest.mark.parametrize("author", [False, True])
def test_sign_gives_what_is_laid_out_by_hand_but_for_the_signatures(author: bool) -> None:
    keys = Signer.from_private_key(PRIVATE), Signer.from_private_key(by_hand.AUTHOR_PRIVATE)
    signed = sign_id_block(BLOCK, *keys) if author else sign_id_block(BLOCK, keys[0])
    expected = IdAuth.decode(by_hand.id_auth(BLOCK.encode(), author=author))
    without = {"id_block_sig": bytes(512), "id_key_sig": bytes(512)}
    assert dataclasses.replace(signed, **without) == dataclasses.replace(expected, **without)
    assert signed.has_author_key is author
    assert check_signatures(BLOCK, signed) == []
    assert check_signatures(BLOCK, expected) == []


@pytest.mark.parametrize(
    "sign", [der_sign, lambda message: decode_dss_signature(der_sign(message))]
)
@pytest.mark.parametrize(
    "public",
    [
        by_hand.ID_KEY,
        *(
            PRIVATE.public_key().public_bytes(
                encoding, serialization.PublicFormat.SubjectPublicKeyInfo
            )
            for encoding in (serialization.Encoding.PEM, serialization.Encoding.DER)
        ),
    ],
)
def test_signer_takes_any_callable_and_any_form_of_its_public_key(
    sign: Callable[[bytes], Any], public: bytes
) -> None:
    auth = sign_id_block(BLOCK, Signer(sign, public))
    assert auth.id_key == by_hand.ID_KEY
    r, s = (int.from_bytes(auth.id_block_sig[at : at + 72], "little") for at in (0, 72))
    PRIVATE.public_key().verify(
        encode_dss_signature(r, s), BLOCK.encode(), ec.ECDSA(hashes.SHA384())
    )


@pytest.mark.parametrize("given", [(1, 1), (0, 0), b"", b"\x30\x00", (1 << 600, 1)])
def test_signer_when_the_callable_gives_no_signature_is_refused(given: Any) -> None:
    with pytest.raises(FormatError):
        Signer(lambda message: given, by_hand.ID_KEY).sign(b"x")


def test_signer_when_the_public_key_is_another_is_refused() -> None:
    with pytest.raises(FormatError, match="doesn't fit its public key"):
        Signer(der_sign, by_hand.AUTHOR_KEY).sign(b"x")


# Checking


FLIPS = [
    *((at, "id") for at in (0x000, 0x003, 0x040, 0x040 + 71, 0x040 + 72, 0x240, 0x244, 0x28C)),
    *((at, "author") for at in (0x004, 0x680, 0x680 + 72, 0x880, 0x884, 0x8CC)),
]


@pytest.mark.parametrize(("offset", "which"), FLIPS)
def test_check_when_a_bit_of_the_id_auth_flips_finds_the_right_key(offset: int, which: str) -> None:
    page = bytearray(by_hand.id_auth(BLOCK.encode(), author=True))
    page[offset] ^= 0x04
    wrong = check_signatures(BLOCK, IdAuth.decode(bytes(page)))
    assert ("ID key" if which == "id" else "author key") in wrong[0]
    # A change of the ID key breaks what the author key signs, too.
    assert len(wrong) == (2 if 0x240 <= offset < 0x644 else 1)


def test_check_when_an_author_key_is_there_but_not_enabled_leaves_it_out() -> None:
    page = by_hand.id_auth(BLOCK.encode(), author=True, id_key_sig=bytes(512))
    auth = IdAuth.decode(page)
    assert check_signatures(BLOCK, auth, author=False) == []
    assert len(check_signatures(BLOCK, auth, author=True)) == 1


def test_check_when_an_author_key_is_enabled_but_missing_says_so() -> None:
    auth = IdAuth.decode(by_hand.id_auth(BLOCK.encode()))
    assert check_signatures(BLOCK, auth, author=True) == [
        "the algorithm of the author key is 0, not 1 (ECDSA P-384 with SHA-384)"
    ]


@pytest.mark.parametrize(("r", "s"), [(0, 1), (1, 0), (ORDER, 1), (1, ORDER), (1 << 575, 1)])
def test_verify_when_a_number_is_out_of_range_is_false(r: int, s: int) -> None:
    assert not verify_signature(by_hand.ID_KEY, encode_signature(r, s), b"x")


def test_verify_when_a_byte_behind_the_signature_is_set_is_false() -> None:
    signature = by_hand.sign(PRIVATE, b"x")
    assert verify_signature(by_hand.ID_KEY, signature, b"x")
    assert not verify_signature(by_hand.ID_KEY, signature[:-1] + b"\1", b"x")


# Public keys


def test_public_key_of_the_generator_has_its_coordinates() -> None:
    encoded = encode_public_key(*GENERATOR)
    assert encoded[:4] == b"\2\0\0\0"
    assert encoded[4:52] == GENERATOR[0].to_bytes(48, "little")
    assert encoded[0x4C : 0x4C + 48] == GENERATOR[1].to_bytes(48, "little")
    assert not any(encoded[52:0x4C])
    assert not any(encoded[0x4C + 48 :])
    assert decode_public_key(encoded) == GENERATOR
    assert key_digest(encoded) == hashlib.sha384(encoded).digest()


@pytest.mark.parametrize("point", [(0, 0), (1, 1), (GENERATOR[0], 1), (-1, 1), (1 << 577, 1)])
def test_public_key_when_not_on_the_curve_is_refused(point: tuple[int, int]) -> None:
    with pytest.raises(FormatError, match="not a point of P-384"):
        encode_public_key(*point)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda key: key[:-1], "1028 bytes"),
        (lambda key: b"\1" + key[1:], "curve is 1"),
        (lambda key: key[:-1] + b"\1", "not zero"),
    ],
)
def test_public_key_when_malformed_is_refused(change: Any, rule: str) -> None:
    with pytest.raises(FormatError, match=rule):
        decode_public_key(change(by_hand.ID_KEY))


# Private keys


@pytest.mark.parametrize("sec1", [False, True])
@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
def test_pem_when_read_signs(sec1: bool, passphrase: bytes | None) -> None:
    signer = Signer.from_pem(pem(PRIVATE, passphrase, sec1=sec1), passphrase)
    assert signer.public_key == by_hand.ID_KEY
    assert check_signatures(BLOCK, sign_id_block(BLOCK, signer)) == []


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
def test_der_when_read_signs(passphrase: bytes | None) -> None:
    assert Signer.from_pem(der(PRIVATE, passphrase), passphrase).public_key == by_hand.ID_KEY


@pytest.mark.parametrize("make", [pem, der])
def test_key_that_is_not_encrypted_needs_no_passphrase_that_is_given(make: Any) -> None:
    assert Signer.from_pem(make(PRIVATE), PASSPHRASE).public_key == by_hand.ID_KEY


@pytest.mark.parametrize("make", [pem, der])
@pytest.mark.parametrize("passphrase", [None, b"", b"wrong"])
def test_key_that_is_encrypted_without_its_passphrase_is_refused(
    make: Any, passphrase: bytes | None
) -> None:
    with pytest.raises(FormatError, match=r"passphrase|damaged"):
        Signer.from_pem(make(PRIVATE, PASSPHRASE), passphrase)


@pytest.mark.parametrize("passphrase", [None, b"wrong"])
def test_pem_that_is_encrypted_without_its_passphrase_asks_for_it(passphrase: Any) -> None:
    with pytest.raises(PassphraseNeeded):
        Signer.from_pem(pem(PRIVATE, PASSPHRASE), passphrase)


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
@pytest.mark.parametrize("length", range(0, 320, 7))
def test_pem_when_truncated_is_refused(length: int, passphrase: bytes | None) -> None:
    whole = pem(PRIVATE, passphrase)
    with pytest.raises(FormatError):
        Signer.from_pem(whole[: min(length, len(whole) - 30)], passphrase)


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        (ec.generate_private_key(ec.SECP256R1()), "curve secp256r1; firmware takes P-384"),
        (ec.generate_private_key(ec.SECP521R1()), "curve secp521r1; firmware takes P-384"),
        (rsa.generate_private_key(65537, 2048), "not one of elliptic curve P-384"),
    ],
)
def test_pem_when_of_another_kind_is_refused(key: Any, rule: str) -> None:
    with pytest.raises(FormatError, match=rule):
        Signer.from_pem(pem(key))


@pytest.mark.parametrize("data", [b"", b"text", bytes(100), vectors.VS_ID_KEY_PEM])
def test_pem_when_no_private_key_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        Signer.from_pem(data)


@pytest.mark.parametrize("data", [b"", b"text", bytes(1028), by_hand.public_key(PRIVATE, 1)])
def test_signer_when_the_public_key_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        Signer(never, data)


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
def test_private_pem_when_made_can_be_read(passphrase: bytes | None) -> None:
    made, signer = private_pem(passphrase)
    assert (b"ENCRYPTED" in made) is bool(passphrase)
    assert Signer.from_pem(made, passphrase).public_key == signer.public_key
    assert private_pem()[1].digest != private_pem()[1].digest


@given(st.data(), st.sampled_from([PEM, DER, SEALED_PEM, SEALED_DER]))
@settings(deadline=None, max_examples=150)
def test_key_when_some_bytes_are_others_is_a_key_or_refused(
    data: st.DataObject, key: bytes
) -> None:
    changed = bytearray(key)
    for at in data.draw(st.lists(st.integers(0, len(key) - 1), min_size=1, max_size=4)):
        changed[at] = data.draw(st.integers(0, 255))
    for read in (
        lambda: Signer.from_pem(bytes(changed), PASSPHRASE),
        lambda: Signer(never, changed),
    ):
        with contextlib.suppress(FormatError):
            read()


# Secrets


def secrets_of(private: ec.EllipticCurvePrivateKey) -> list[str]:
    value = private.private_numbers().private_value
    raw = value.to_bytes(48, "big")
    return [str(value), f"{value:x}", raw.hex(), base64.b64encode(raw).decode()[:40]]


def test_repr_of_signer_has_no_key_material() -> None:
    signer = Signer.from_pem(pem(PRIVATE))
    text = repr(signer) + str(signer) + repr(vars(signer))
    assert by_hand_digest()[:16] in repr(signer)
    assert [secret for secret in secrets_of(PRIVATE) if secret in text] == []


def by_hand_digest() -> str:
    return hashlib.sha384(by_hand.ID_KEY).hexdigest()


def test_errors_when_a_key_is_refused_have_neither_key_nor_passphrase() -> None:
    texts = []
    whole = pem(PRIVATE, PASSPHRASE)
    for data, passphrase in itertools.product(
        (whole, whole[:100], der(PRIVATE)[:-9]), (b"tops3cr3t",)
    ):
        with pytest.raises(FormatError) as caught:
            Signer.from_pem(data, passphrase)
        texts.append("".join(traceback.format_exception(caught.value)))
    assert not any("tops3cr3t" in text for text in texts)
    assert not any(secret in text for text in texts for secret in secrets_of(PRIVATE))
