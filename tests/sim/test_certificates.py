"""The simulated ARK, ASK and VCEK or VLEK (snp-firmware-abi 8.3)."""

from __future__ import annotations

import datetime
from functools import cache

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from kvmlaunch.abi.report import SigningKey
from kvmlaunch.abi.tcb import Product
from kvmlaunch.errors import MissingCapability
from kvmlaunch.sim import SimPlatform
from kvmlaunch.sim.certificates import CertificateChain
from kvmlaunch.sim.firmware_profiles import firmware_profile

from .rig import Rig

PRODUCTS: tuple[Product, ...] = ("Milan", "Genoa", "Turin")
KINDS = [(product, kind) for product in PRODUCTS for kind in (SigningKey.VCEK, SigningKey.VLEK)]
OID = "1.3.6.1.4.1.3704.1."


@cache
def chain_of(product: Product, kind: SigningKey) -> CertificateChain:
    rig = Rig(firmware_profile(product))
    rig.psp.vlek_load(b"V" * 432)
    chain = rig.psp.certificate_chain(kind)
    assert chain is not None
    return chain


def certificates(product: Product, kind: SigningKey) -> list[x509.Certificate]:
    """Leaf, ASK, ARK."""
    chain = chain_of(product, kind)
    return [x509.load_der_x509_certificate(der) for der in (chain.leaf, chain.ask, chain.ark)]


@pytest.mark.usefixtures("few_rsa_keys")
@pytest.mark.parametrize(("product", "kind"), KINDS)
def test_each_certificate_is_signed_by_the_next(product: Product, kind: SigningKey) -> None:
    leaf, ask, ark = certificates(product, kind)
    for certificate, issuer in ((leaf, ask), (ask, ark), (ark, ark)):
        key = issuer.public_key()
        assert isinstance(key, rsa.RSAPublicKey)
        assert key.key_size == 4096
        certificate.verify_directly_issued_by(issuer)
        pss = padding.PSS(padding.MGF1(hashes.SHA384()), salt_length=48)
        digest = certificate.signature_hash_algorithm
        assert isinstance(digest, hashes.SHA384)
        key.verify(certificate.signature, certificate.tbs_certificate_bytes, pss, digest)


@pytest.mark.usefixtures("few_rsa_keys")
@pytest.mark.parametrize(("product", "kind"), KINDS)
def test_leaf_is_a_p384_key_of_seven_years(product: Product, kind: SigningKey) -> None:
    leaf, _, _ = certificates(product, kind)
    key = leaf.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert isinstance(key.curve, ec.SECP384R1)
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc == datetime.timedelta(days=7 * 365)
    now = datetime.datetime.now(datetime.timezone.utc)
    assert leaf.not_valid_before_utc < now


@pytest.mark.usefixtures("few_rsa_keys")
@pytest.mark.parametrize(("product", "kind"), KINDS)
def test_every_name_says_simulated_and_none_is_amds(product: Product, kind: SigningKey) -> None:
    middle = "VLEK-" if kind is SigningKey.VLEK else ""
    names = [f"SEV-{kind.name}", f"SEV-{middle}{product}", f"ARK-{product}"]
    for certificate, name in zip(certificates(product, kind), names, strict=True):
        subject = certificate.subject.rfc4514_string()
        assert subject == f"CN={name} SIMULATED,O=kvmlaunch SIMULATED"


@pytest.mark.usefixtures("few_rsa_keys")
@pytest.mark.parametrize(("product", "kind"), KINDS)
def test_issuers_may_sign_certificates_only(product: Product, kind: SigningKey) -> None:
    _, ask, ark = certificates(product, kind)
    for certificate, length in ((ask, 0), (ark, 1)):
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
        assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, length)
        assert (usage.critical, usage.value.key_cert_sign) == (True, True)
        assert not usage.value.digital_signature


@pytest.mark.usefixtures("few_rsa_keys")
def test_issuers_certificates_have_serial_numbers_of_their_own() -> None:
    numbers = [
        certificate.serial_number
        for kind in (SigningKey.VCEK, SigningKey.VLEK)
        for certificate in certificates("Milan", kind)
    ]
    # As AMD's for Milan: SEV-Milan, ARK-Milan, SEV-VLEK-Milan.
    assert numbers == [1, 0x10001, 0x10000, 1, 0x10101, 0x10000]


def extensions(product: Product, kind: SigningKey) -> dict[str, bytes]:
    leaf, _, _ = certificates(product, kind)
    assert not any(extension.critical for extension in leaf.extensions)
    values = {}
    for extension in leaf.extensions:
        assert isinstance(extension.value, x509.UnrecognizedExtension)
        values[extension.oid.dotted_string.removeprefix(OID)] = extension.value.value
    return values


def integer(value: int) -> bytes:
    """DER, for a byte without the top bit."""
    return bytes([2, 1, value])


SIMULATED = b"SIMULATED".ljust(64, b"\0")
# 8.3; the SPLs are those of the profile's made up TCBs.
EXTENSIONS: dict[Product, dict[str, bytes]] = {
    "Milan": {
        "1": integer(0),
        "2": b"\x16\x08Milan-B0",
        "3.1": integer(3),
        "3.2": integer(0),
        "3.3": integer(8),
        **{f"3.{n}": integer(0) for n in (4, 5, 6, 7)},
        "3.8": integer(115),
    },
    "Genoa": {
        "1": integer(0),
        "2": b"\x16\x08Genoa-B0",
        "3.1": integer(7),
        "3.2": integer(0),
        "3.3": integer(14),
        **{f"3.{n}": integer(0) for n in (4, 5, 6, 7)},
        "3.8": integer(72),
    },
    "Turin": {
        "1": integer(1),
        "2": b"\x16\x05Turin",
        "3.1": integer(1),
        "3.2": integer(1),
        "3.3": integer(4),
        **{f"3.{n}": integer(0) for n in (5, 6, 7)},
        "3.8": integer(80),
        "3.9": integer(1),
    },
}
HWID = {"Milan": SIMULATED, "Genoa": SIMULATED, "Turin": b"SIMULATE"}


@pytest.mark.usefixtures("few_rsa_keys")
@pytest.mark.parametrize("product", PRODUCTS)
def test_vcek_has_the_products_extensions(product: Product) -> None:
    want = {**EXTENSIONS[product], "4": HWID[product]}
    assert extensions(product, SigningKey.VCEK) == want


@pytest.mark.usefixtures("few_rsa_keys")
@pytest.mark.parametrize("product", PRODUCTS)
def test_vlek_has_a_csp_id_instead_of_the_hwid(product: Product) -> None:
    want = {**EXTENSIONS[product], "5": b"\x16\x09SIMULATED"}
    assert extensions(product, SigningKey.VLEK) == want


@pytest.mark.usefixtures("few_rsa_keys")
def test_spl_with_the_top_bit_set_stays_positive() -> None:
    rig = Rig(firmware_profile("Milan"))
    rig.psp._reported_tcb = type(rig.psp.profile.current_tcb)(microcode=0xD1)
    chain = rig.psp.certificate_chain()
    assert chain is not None
    leaf = x509.load_der_x509_certificate(chain.leaf)
    oid = x509.ObjectIdentifier(OID + "3.8")
    value = leaf.extensions.get_extension_for_oid(oid).value
    assert isinstance(value, x509.UnrecognizedExtension)
    assert value.value == b"\x02\x02\x00\xd1"


@pytest.mark.usefixtures("few_rsa_keys")
def test_pem_is_leaf_ask_ark() -> None:
    chain = chain_of("Milan", SigningKey.VCEK)
    loaded = x509.load_pem_x509_certificates(chain.pem().encode())
    assert [c.public_bytes(Encoding.DER) for c in loaded] == [chain.leaf, chain.ask, chain.ark]


@pytest.mark.usefixtures("few_rsa_keys")
@pytest.mark.parametrize(
    ("kind", "guid"),
    [
        (SigningKey.VCEK, "63da758de6644564adc5f4b93be8accd"),
        (SigningKey.VLEK, "a8074bc2a25a483eaae639c045a0b8a1"),
    ],
)
def test_table_holds_the_chain(kind: SigningKey, guid: str) -> None:
    chain = chain_of("Milan", kind)
    table = chain.table()
    at = 4 * 24
    want = b""
    guids = (guid, "4ab7b379bbac4fe4a02f05aef327c782", "c0b406a4a803495297433fb6014cd0ae")
    for name, blob in zip(guids, (chain.leaf, chain.ask, chain.ark), strict=True):
        want += bytes.fromhex(name) + at.to_bytes(4, "little") + len(blob).to_bytes(4, "little")
        at += len(blob)
    assert table == want + bytes(24) + chain.leaf + chain.ask + chain.ark


# The host


def test_host_gives_the_same_chain_again_and_each_host_its_own() -> None:
    with SimPlatform() as one, SimPlatform() as other:
        chain, others = one.certificate_chain(), other.certificate_chain()
        assert one.certificate_chain() == chain
    for mine, theirs in ((chain.leaf, others.leaf), (chain.ask, others.ask)):
        keys = [x509.load_der_x509_certificate(der).public_key() for der in (mine, theirs)]
        assert keys[0] != keys[1]


def test_host_without_vlek_lacks_it() -> None:
    with SimPlatform() as platform, pytest.raises(MissingCapability, match="VLEK"):
        platform.certificate_chain(vlek=True)


def test_host_makes_no_rsa_key_before_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("an RSA key was made")

    monkeypatch.setattr(rsa, "generate_private_key", refuse)
    rig = Rig()
    gctx = rig.finished()
    rig.psp.guest_request(gctx, rig.memory.alloc(), rig.firmware_page())
    with pytest.raises(AssertionError, match="RSA"):
        rig.psp.certificate_chain()
