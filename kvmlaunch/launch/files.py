"""Files that are there completely or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from kvmlaunch.abi.page import Buffer
from kvmlaunch.errors import FormatError, ImageError, KvmLaunchError

__all__ = ["check_folder", "read_small", "write_files", "write_whole"]

_MOST = 1 << 16


def read_small(path: str, most: int = _MOST) -> bytes:
    """A small file's bytes. Raises ImageError if it can't be read or is larger than ``most``."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise ImageError(path, f"can't be read: {error.strerror}") from None
    if len(data) > most:
        raise ImageError(path, f"is larger than {most} bytes")
    return data


def check_folder(path: str) -> None:
    """Raise KvmLaunchError where no file could be made at ``path``: before a run, not behind it."""
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise KvmLaunchError(f"{path}: {folder} is not a folder")
    if Path(path).is_dir():
        raise KvmLaunchError(f"{path}: is a folder")


def write_whole(path: str, data: bytes) -> None:
    """Write a file as `write_files` does, or to a device or a pipe. Raises KvmLaunchError."""
    target = Path(path).resolve()
    if target.is_file() or not target.exists():
        write_files({path: data}, mode=0o666)
        return
    try:
        target.write_bytes(data)
    except OSError as error:
        raise KvmLaunchError(f"{path}: {error.strerror or error}") from None


def write_files(
    files: Mapping[str, bytes | Iterable[Buffer]], *, mode: int = 0o644, replace: bool = True
) -> None:
    """Write all of the files, given whole or in parts, each by renaming a complete one.

    With ``replace=False`` nothing is written if one is there already: FormatError. Raises
    KvmLaunchError where a file can't be written; new ones are taken away again then.
    """
    written: dict[str, str] = {}
    made: list[str] = []
    try:
        for path, data in files.items():
            if not replace and os.path.lexists(path):
                raise FormatError(f"{path} is there already (--force replaces it)")
            written[path] = _written(path, data, mode)
        for path, whole in written.items():
            _settle(path, whole, replace=replace, made=made)
    except OSError as error:
        _remove(made)
        raise KvmLaunchError(f"{error.filename2 or error.filename}: {error.strerror}") from None
    except BaseException:
        _remove(made)
        raise
    finally:
        _remove(written.values())


def _written(path: str, data: bytes | Iterable[Buffer], mode: int) -> str:
    """A complete file beside ``path``, which nobody else may read before it has its mode."""
    import tempfile  # takes longer to import than a short command does

    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        raise KvmLaunchError(f"{path}: is {'a folder' if target.is_dir() else 'not a file'}")
    try:
        fd, whole = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise KvmLaunchError(f"{path}: {error.strerror}") from None
    try:
        with os.fdopen(fd, "wb") as file:
            file.writelines((data,) if isinstance(data, bytes) else data)
            os.fchmod(fd, mode & ~_umask())
            file.flush()
            os.fsync(fd)
    except OSError as error:
        _remove([whole])
        raise KvmLaunchError(f"{path}: {error.strerror}") from None
    except BaseException:
        _remove([whole])
        raise
    return whole


def _settle(path: str, whole: str, *, replace: bool, made: list[str]) -> None:
    """Give the file its name, at once; without ``replace`` only if nobody has taken it since."""
    target = str(Path(path).resolve())
    if replace:
        new = not os.path.lexists(target)
        os.replace(whole, target)
    else:
        new = True
        try:
            os.link(whole, target)
        except FileExistsError:
            raise FormatError(f"{path} is there already (--force replaces it)") from None
    if new:
        made.append(target)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _remove(paths: Iterable[str]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)
