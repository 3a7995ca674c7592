"""The certificate table that a host gives to extended guest requests, from certificates."""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

from kvmlaunch.abi import cert_table
from kvmlaunch.errors import FormatError

from .certificates import Certificate

__all__ = ["certificate_table"]

_LEAVES = ("VCEK", "VLEK")


def certificate_table(certificates: Iterable[Certificate]) -> bytes:
    """Return the table with each certificate under its GUID, in the order given.

    A name tells which it is: SEV-VCEK, SEV-VLEK, ARK-..., and the ASK (or ASVK) is any other
    issuer.

    Raises:
        FormatError: two certificates have one GUID, or one is none of these.
    """
    blobs: dict[UUID, bytes] = {}
    for certificate in certificates:
        kind = _kind(certificate)
        guid = cert_table.CERT_GUIDS[kind]
        if blobs.get(guid, certificate.der) != certificate.der:
            raise FormatError(f"there are two certificates of the {kind}")
        blobs[guid] = certificate.der
    return cert_table.encode(blobs)


def _kind(certificate: Certificate) -> str:
    name = certificate.name.split(" ")[0]
    for kind in _LEAVES:
        if name == f"SEV-{kind}":
            return kind
    if name.startswith("ARK-"):
        return "ARK"
    if certificate.is_ca:
        return "ASK"
    raise FormatError(f"{certificate.name} is no VCEK, VLEK, ASK or ARK")
