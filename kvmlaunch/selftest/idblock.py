"""ID blocks that carry a digest, signed with keys made for the run."""

from __future__ import annotations

from functools import cache

from kvmlaunch.abi.idblock import IdAuth, IdBlock
from kvmlaunch.abi.idblock_sign import Signer, sign_id_block
from kvmlaunch.abi.policy import DEFAULT_POLICY

__all__ = ["flipped", "id_auth", "id_block"]


def id_block(digest: bytes, *, policy: int = DEFAULT_POLICY) -> IdBlock:
    """An ID block that expects this launch digest (48 bytes)."""
    return IdBlock(ld=digest, family_id=b"kvmlaunch".ljust(16), guest_svn=7, policy=policy)


def id_auth(block: IdBlock, *, author: bool = False) -> IdAuth:
    """Its authentication, with an author key or without."""
    return sign_id_block(block, _signer("id"), _signer("author") if author else None)


def flipped(data: bytes, bit: int = 0) -> bytes:
    """``data`` with one bit turned round."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@cache
def _signer(name: str) -> Signer:
    return Signer.generate()
