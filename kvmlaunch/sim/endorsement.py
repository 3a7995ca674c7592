"""The chip's keys: VCEK and VLEK, and the roots of derived keys.

All of them are functions of a chip secret, drawn at first use, and of the TCB that they stand
for, so that a chip has the same VCEK again when its REPORTED_TCB comes back. The functions are
this simulator's own (HKDF with SHA-384): the real ones are not known outside the chip.

A VLEK depends on the loaded hashstick as well, and unlike a real one on the chip.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmlaunch.abi.guest_message import KEY_SIZE, SecretKey
from kvmlaunch.abi.report import SigningKey
from kvmlaunch.abi.signature import encode_signature

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

__all__ = ["ChipKeys", "derive"]

# Order of P-384 (FIPS 186-4, D.1.2.4).
_P384_ORDER = (1 << 384) - 0x389CB27E0BC8D220A7E5F24DB74F58851313E695333AD68D
_WIDE = 64
"""Bytes from which a scalar is reduced: 16 more than the order has, so that no bias shows."""


def derive(root: SecretKey, info: bytes, size: int = KEY_SIZE) -> bytes:
    """Return `size` bytes of HKDF-SHA-384 without salt."""
    from cryptography.hazmat.primitives.hashes import SHA384
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA384(), size, salt=None, info=info).derive(root.reveal())


class ChipKeys:
    """Keys of one chip. They stay in here, except the public halves.

    `vlek` arguments are the loaded hashstick; `tcb` is a TCB_VERSION.
    """

    def __init__(self, random: Callable[[int], bytes]) -> None:
        self._random = random
        self._secret: SecretKey | None = None
        self._signers: dict[tuple[SigningKey, int, bytes], ec.EllipticCurvePrivateKey] = {}
        self._lock = threading.Lock()

    def root(self, kind: SigningKey, tcb: int, vlek: bytes = b"") -> SecretKey:
        """Return the root of keys that are derived from VCEK or VLEK."""
        with self._lock:
            return SecretKey(derive(self._chip_secret(), _info("root", kind, tcb, vlek)))

    def sign(self, kind: SigningKey, tcb: int, message: bytes, vlek: bytes = b"") -> bytes:
        """Return the ECDSA P-384 / SHA-384 signature in firmware's encoding, 512 bytes."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

        signature = self._signer(kind, tcb, vlek).sign(message, ec.ECDSA(hashes.SHA384()))
        return encode_signature(*decode_dss_signature(signature))

    def public_key(
        self, kind: SigningKey, tcb: int, vlek: bytes = b""
    ) -> ec.EllipticCurvePublicKey:
        """Return the public half of VCEK or VLEK."""
        return self._signer(kind, tcb, vlek).public_key()

    def _signer(self, kind: SigningKey, tcb: int, vlek: bytes) -> ec.EllipticCurvePrivateKey:
        from cryptography.hazmat.primitives.asymmetric import ec

        with self._lock:
            if (kind, tcb, vlek) not in self._signers:
                info = _info("signer", kind, tcb, vlek)
                self._signers[kind, tcb, vlek] = ec.derive_private_key(
                    int.from_bytes(derive(self._chip_secret(), info, _WIDE), "big")
                    % (_P384_ORDER - 1)
                    + 1,
                    ec.SECP384R1(),
                )
            return self._signers[kind, tcb, vlek]

    def _chip_secret(self) -> SecretKey:
        if self._secret is None:
            self._secret = SecretKey(self._random(KEY_SIZE))
        return self._secret

    def __repr__(self) -> str:
        return "<ChipKeys SIMULATED hidden>"


def _info(use: str, kind: SigningKey, tcb: int, vlek: bytes) -> bytes:
    label = f"kvmlaunch SIMULATED {use} {kind.name} "
    return label.encode() + tcb.to_bytes(8, "little") + vlek
