"""The chain of a report's key: VCEK or VLEK, its intermediate (ASK, ASVK) and the root (ARK)."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from kvmlaunch.abi.report import SigningKey
from kvmlaunch.abi.tcb import Product
from kvmlaunch.errors import FormatError

from .certificates import Certificate, RevocationList
from .result import Check

__all__ = ["AMD_ROOTS", "Chain", "check_chain", "find_chain", "is_signed_by"]

_RSA_BITS, _SALT_SIZE = 4096, 48
_PRODUCTS: tuple[Product, ...] = ("Milan", "Genoa", "Turin")

AMD_ROOTS: Mapping[str, Product] = MappingProxyType(
    {
        "9f056bee44377e29308cb5ffa895bdfb62d18881fa6bed8d6f075b0204089cb9": "Milan",
        "429a69c9422aa258ee4d8db5fcda9c6470ef15f8cd5a9cebd6cbc7d90b863831": "Genoa",
        "4f125410563a2ab9a50356f9243f6fe0b6f73de98603f53f90339c70e9d7ad08": "Turin",
    }
)
"""SHA-256 of the public keys (SubjectPublicKeyInfo) of AMD's roots.

From the ARKs that virtee/sev (src/certs/snp/builtin, commit 9cf2adbf), go-sev-guest
(verify/trust, commit af1c107) and trustee (deps/verifier/src/snp, commit 78962cd4) carry, each
from AMD's https://kdsintf.amd.com/vcek/v1/PRODUCT/cert_chain; all three have the same keys.
"""


@dataclass(frozen=True)
class Chain:
    """Three certificates; whether they fit together says `check_chain`."""

    kind: SigningKey
    leaf: Certificate
    ask: Certificate
    ark: Certificate

    @property
    def is_simulated(self) -> bool:
        """Whether it says that it is of a simulated host."""
        return any(c.is_simulated for c in (self.leaf, self.ask, self.ark))

    @property
    def product(self) -> Product | None:
        """The product that the root's name has."""
        found = [p for p in _PRODUCTS if self.ark.name.split(" ")[0] == f"ARK-{p}"]
        return found[0] if found else None


def find_chain(certificates: Sequence[Certificate], kind: SigningKey) -> Chain:
    """Pick the chain of a VCEK or VLEK out of certificates in any order.

    Where several have the right name, the one that signed what is below it is taken.

    Raises:
        FormatError: a part is missing.
    """
    leaf = _only(
        f"{kind.name}, which the report says it is signed by",
        [c for c in certificates if c.name.split(" ")[0] == f"SEV-{kind.name}"],
    )
    ask = _issuer_of(leaf, certificates, "ASVK" if kind is SigningKey.VLEK else "ASK")
    return Chain(kind, leaf, ask, _issuer_of(ask, certificates, "ARK"))


def check_chain(
    chain: Chain,
    *,
    now: datetime.datetime,
    trusted: Iterable[str] = (),
    allow_simulated: bool = False,
    crls: Sequence[RevocationList] = (),
) -> list[Check]:
    """Check root, signatures, validity and (if there are ``crls``) revocation.

    ``trusted`` are digests of root keys beside AMD's (`Certificate.key_digest`). A chain that
    says SIMULATED needs ``allow_simulated``, whoever trusts its root.
    """
    names = {"ark": chain.ark, "ask": chain.ask, chain.kind.name.lower(): chain.leaf}
    issuers = (chain.ark, chain.ark, chain.ask)
    checks = [_root(chain, frozenset(trusted), allow_simulated)]
    for (name, certificate), issuer in zip(names.items(), issuers, strict=True):
        checks.append(_signature(name, certificate, issuer))
        checks.append(_validity(name, certificate, now))
    for crl in crls:
        checks += _revocation(crl, names, chain.ark, now)
    if crls and not any(crl.issuer == chain.ark.subject for crl in crls):
        found = ", ".join(crl.issuer for crl in crls)
        checks.append(Check("revocation", False, f"a list of {found}", f"of {chain.ark.subject}"))
    return checks


def is_signed_by(what: Certificate | RevocationList, issuer: Certificate) -> bool:
    """Whether RSASSA-PSS with SHA-384 and an RSA-4096 key, as AMD signs, fits.

    Nothing else is tried, whatever algorithm is named.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding, rsa

    key = issuer.key
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size != _RSA_BITS:
        return False
    if what.issuer != issuer.subject or not issuer.is_ca:
        return False
    pss = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=_SALT_SIZE)
    try:
        key.verify(what.signature, what.signed, pss, hashes.SHA384())
    except InvalidSignature:
        return False
    return True


def _only(what: str, found: list[Certificate]) -> Certificate:
    # AMD's server makes a new certificate of the same key each time it is asked.
    different = {c.key_digest for c in found}
    if not different:
        raise FormatError(f"there is no certificate of the {what}")
    if len(different) > 1:
        raise FormatError(f"there are {len(different)} certificates of the {what}")
    return found[0]


def _issuer_of(below: Certificate, certificates: Sequence[Certificate], what: str) -> Certificate:
    found = [c for c in certificates if c.subject == below.issuer]
    signers = [c for c in found if is_signed_by(below, c)]
    return _only(f"{what} {below.issuer}, which issued {below.name}", signers[:1] or found)


def _root(chain: Chain, trusted: frozenset[str], allow_simulated: bool) -> Check:
    wanted = "one of AMD's"
    if chain.is_simulated:
        return Check("root", allow_simulated, f"{chain.ark.name}, of a simulated host", wanted)
    digest = chain.ark.key_digest
    if digest in AMD_ROOTS:
        return Check("root", True, f"AMD's ARK-{AMD_ROOTS[digest]}", wanted)
    if digest in trusted:
        return Check("root", True, f"{chain.ark.name}, trusted as asked", wanted)
    return Check("root", False, f"{chain.ark.name} with key sha256 {digest}, not known", wanted)


def _signature(name: str, certificate: Certificate, issuer: Certificate) -> Check:
    ok = is_signed_by(certificate, issuer)
    got = f"signed by {issuer.name}" if ok else f"not signed by {issuer.name}"
    return Check(f"{name}_signature", ok, got, f"RSA-4096 PSS, SHA-384, by {issuer.name}")


def _validity(name: str, certificate: Certificate, now: datetime.datetime) -> Check:
    start, end = certificate.not_before, certificate.not_after
    text = f"valid from {start:%Y-%m-%d %H:%M:%S} to {end:%Y-%m-%d %H:%M:%S} UTC"
    wanted = f"valid at {now:%Y-%m-%d %H:%M:%S} UTC"
    return Check(f"{name}_validity", start <= now <= end, text, wanted)


def _revocation(
    crl: RevocationList,
    names: Mapping[str, Certificate],
    ark: Certificate,
    now: datetime.datetime,
) -> list[Check]:
    if crl.issuer != ark.subject:
        return []
    signed = is_signed_by(crl, ark)
    got = "signed" if signed else "not signed"
    checks = [Check("crl_signature", signed, f"{got} by {ark.name}", f"signed by {ark.name}")]
    end = crl.next_update
    fresh = crl.last_update <= now and (end is None or now <= end)
    until = "no end" if end is None else f"{end:%Y-%m-%d %H:%M:%S} UTC"
    text = f"valid from {crl.last_update:%Y-%m-%d %H:%M:%S} to {until}"
    checks.append(Check("crl_validity", fresh, text, f"valid at {now:%Y-%m-%d %H:%M:%S} UTC"))
    for name, certificate in names.items():
        if certificate.issuer == crl.issuer:
            revoked = certificate.serial in crl.revoked
            got = "revoked" if revoked else "not revoked"
            text = f"serial number {certificate.serial:#x} is {got}"
            checks.append(Check(f"{name}_revocation", not revoked, text, "not revoked"))
    return checks
