"""ID block and ID authentication as files and other tools' output hold them, and as text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from kvmlaunch.abi.blob import parse_blob
from kvmlaunch.abi.digest import DIGEST_SIZE, parse_digest
from kvmlaunch.abi.idblock import ID_AUTH_SIZE, ID_BLOCK_SIZE, PUBLIC_KEY_SIZE, IdAuth, IdBlock
from kvmlaunch.abi.policy import describe_policy
from kvmlaunch.abi.signature import decode_signature
from kvmlaunch.errors import FormatError, ImageError
from kvmlaunch.launch.files import read_small

__all__ = ["READ_AS", "Found", "describe", "describe_json", "digest_from", "read_all"]

READ_AS = (
    "Files are raw, hex or base64, or hold QEMU's properties (id-block=..., id-auth=...) as "
    "snp-create-id-block prints them."
)

_PROPERTY = re.compile(rb"\b(id-block|id-auth)=([A-Za-z0-9+/=]+)")
_BLOCK, _AUTH = "an ID block", "ID authentication information"


class Found(NamedTuple):
    """What files hold; None where they have none."""

    block: IdBlock | None
    auth: IdAuth | None


def digest_from(text: str) -> bytes:
    """A launch digest as an option has it: the digest, or @FILE. Raises FormatError."""
    if not text.startswith("@"):
        return parse_digest(text)
    data = read_small(text[1:])
    return data if len(data) == DIGEST_SIZE else parse_digest(data.decode("latin-1"))


def read_all(paths: Sequence[str]) -> Found:
    """ID block and ID authentication of some files.

    Raises ImageError: a file that can't be read or is neither, and a second one of a kind.
    """
    found: dict[str, IdBlock | IdAuth] = {}
    for path in paths:
        try:
            for part in _parts(read_small(path)):
                kind = _BLOCK if isinstance(part, IdBlock) else _AUTH
                if kind in found:
                    raise FormatError(f"a second file with {kind}")
                found[kind] = part
        except FormatError as error:
            if isinstance(error, ImageError):
                raise
            raise ImageError(path, error.rule, offset=error.offset) from None
    block, auth = found.get(_BLOCK), found.get(_AUTH)
    assert block is None or isinstance(block, IdBlock)
    assert auth is None or isinstance(auth, IdAuth)
    return Found(block, auth)


def _parts(data: bytes) -> Iterator[IdBlock | IdAuth]:
    properties = _PROPERTY.findall(data) if len(data) not in (ID_BLOCK_SIZE, ID_AUTH_SIZE) else ()
    for name, text in properties:
        yield _block(text) if name == b"id-block" else _auth(text)
    if properties:
        return
    try:
        block = _block(data)
    except FormatError:
        pass
    else:
        yield block
        return
    try:
        raw = parse_blob(data, ID_AUTH_SIZE, _AUTH)
    except FormatError:
        raise FormatError(
            f"neither an ID block ({ID_BLOCK_SIZE} bytes) nor its authentication "
            f"({ID_AUTH_SIZE} bytes), raw, hex or base64"
        ) from None
    yield IdAuth.decode(raw)


def _block(data: bytes) -> IdBlock:
    return IdBlock.decode(parse_blob(data, ID_BLOCK_SIZE, _BLOCK))


def _auth(data: bytes) -> IdAuth:
    return IdAuth.decode(parse_blob(data, ID_AUTH_SIZE, _AUTH))


def describe_json(found: Found) -> dict[str, Any]:
    """Every field; integers as they are, bytes in hex."""
    event: dict[str, Any] = {}
    if found.block is not None:
        block = found.block
        event["id_block"] = {
            "ld": block.ld.hex(),
            "family_id": block.family_id.hex(),
            "image_id": block.image_id.hex(),
            "version": block.version,
            "guest_svn": block.guest_svn,
            "policy": block.policy,
        }
    if found.auth is not None:
        auth = found.auth
        event["id_auth"] = {
            "id_key_algo": auth.id_key_algo,
            "auth_key_algo": auth.auth_key_algo,
            "id_block_sig": _signature(auth.id_block_sig),
            "id_key": _key(auth.id_key),
            "id_key_sig": _signature(auth.id_key_sig),
            "author_key": _key(auth.author_key) if auth.has_author_key else None,
        }
    return event


def describe(found: Found) -> list[str]:
    """Lines for people."""
    lines: list[str] = []
    if found.block is not None:
        block = found.block
        lines += [
            "ID block",
            f"  launch digest     {block.ld.hex()}",
            f"  family id         {block.family_id.hex()}{_text(block.family_id)}",
            f"  image id          {block.image_id.hex()}{_text(block.image_id)}",
            f"  version           {block.version}",
            f"  guest SVN         {block.guest_svn}",
            f"  policy            {block.policy:#x}",
            *(f"    {line}" for line in describe_policy(block.policy)),
        ]
    if found.auth is not None:
        auth = found.auth
        lines += ["ID authentication information"]
        lines += _key_lines("ID key", auth.id_key_algo, auth.id_key, "ID block", auth.id_block_sig)
        if auth.has_author_key:
            lines += _key_lines(
                "author key", auth.auth_key_algo, auth.author_key, "ID key", auth.id_key_sig
            )
        else:
            lines += ["  author key        none"]
    return lines


def _key_lines(name: str, algo: int, key: bytes, signed: str, signature: bytes) -> list[str]:
    decoded, signed_by = _key(key), _signature(signature)
    algorithm = "ECDSA P-384 with SHA-384" if algo == 1 else "no known algorithm"
    return [
        f"  {name}",
        f"    algorithm       {algo} ({algorithm})",
        f"    digest          {decoded['digest']}",
        f"    curve           {decoded['curve']}",
        f"    QX              {decoded['qx']}",
        f"    QY              {decoded['qy']}",
        f"    signature of the {signed}",
        f"      R             {signed_by['r']}",
        f"      S             {signed_by['s']}",
    ]


def _key(key: bytes) -> dict[str, Any]:
    from kvmlaunch.abi.idblock_sign import key_digest

    assert len(key) == PUBLIC_KEY_SIZE
    return {
        "digest": key_digest(key).hex(),
        "curve": int.from_bytes(key[:4], "little"),
        "qx": _number(key[4:76]),
        "qy": _number(key[76:148]),
    }


def _signature(signature: bytes) -> dict[str, str]:
    try:
        r, s = decode_signature(signature)
    except FormatError as error:
        return {"r": str(error), "s": str(error)}
    return {"r": f"{r:096x}", "s": f"{s:096x}"}


def _number(data: bytes) -> str:
    return f"{int.from_bytes(data, 'little'):096x}"


def _text(data: bytes) -> str:
    text = data.rstrip(b" \0")
    return (
        f" ({text.decode('ascii')!r})"
        if text and text.isascii() and text.decode().isprintable()
        else ""
    )
