"""SNP_ID_BLOCK of an IGVM file, and what SNP_LAUNCH_FINISH takes: one made into the other.

The file's header has no policy, which is GUEST_POLICY's, and its public keys have a reserved
word behind the curve that AMD's layout (which is signed) hasn't.
"""

from __future__ import annotations

from kvmlaunch.abi.idblock import PUBLIC_KEY_SIZE, IdAuth, IdBlock
from kvmlaunch.abi.signature import SIGNATURE_SIZE
from kvmlaunch.errors import FormatError
from kvmlaunch.images.igvm.format import IdBlockHeader

__all__ = ["header_of", "id_block_of"]

_CURVE, _NUMBERS = 4, 144  # bytes of the curve's number, and of two numbers of 72 bytes


def id_block_of(header: IdBlockHeader, policy: int) -> tuple[IdBlock, IdAuth]:
    """ID block and ID authentication of a file's header and its policy."""
    block = IdBlock(
        ld=header.ld,
        family_id=header.family_id,
        image_id=header.image_id,
        version=header.version,
        guest_svn=header.guest_svn,
        policy=policy,
    )
    auth = IdAuth(
        id_key_algo=header.id_key_algorithm,
        auth_key_algo=header.author_key_algorithm,
        id_block_sig=header.id_key_signature.ljust(SIGNATURE_SIZE, b"\0"),
        id_key=_public_key(header.id_public_key),
        id_key_sig=header.author_key_signature.ljust(SIGNATURE_SIZE, b"\0"),
        author_key=_public_key(header.author_public_key),
    )
    return block, auth


def header_of(
    block: IdBlock, auth: IdAuth, *, mask: int, author_key_enabled: bool
) -> IdBlockHeader:
    """The file's header. Raises FormatError for what it can't hold."""
    return IdBlockHeader(
        mask=mask,
        author_key_enabled=int(author_key_enabled),
        reserved=bytes(3),
        ld=block.ld,
        family_id=block.family_id,
        image_id=block.image_id,
        version=block.version,
        guest_svn=block.guest_svn,
        id_key_algorithm=auth.id_key_algo,
        author_key_algorithm=auth.auth_key_algo,
        id_key_signature=_cut("the ID block's signature", auth.id_block_sig, _NUMBERS),
        id_public_key=_igvm_key("the ID key", auth.id_key),
        author_key_signature=_cut("the ID key's signature", auth.id_key_sig, _NUMBERS),
        author_public_key=_igvm_key("the author key", auth.author_key),
    )


def _public_key(key: bytes) -> bytes:
    return (key[:_CURVE] + key[2 * _CURVE :]).ljust(PUBLIC_KEY_SIZE, b"\0")


def _igvm_key(what: str, key: bytes) -> bytes:
    used = _cut(what, key, _CURVE + _NUMBERS)
    return used[:_CURVE] + bytes(_CURVE) + used[_CURVE:]


def _cut(what: str, data: bytes, size: int) -> bytes:
    if any(data[size:]):
        raise FormatError(f"{what} has bytes behind its {size}, which IGVM can't hold")
    return data[:size]
