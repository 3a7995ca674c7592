"""Image bytes without copies: a file is mapped, and everything else is views of the map.

A block device is mapped as well. What can't be mapped, a pipe, is copied to a file without a
name in the folder for temporary files (``TMPDIR``), and that is mapped.
"""

from __future__ import annotations

import io
import mmap
import os
import stat

from kvmlaunch.abi.record import Record
from kvmlaunch.errors import ImageError

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from typing import BinaryIO

__all__ = ["ImageSource", "ViewStream", "forget", "open_image"]

_STREAM_LIMIT = 1 << 30  # bytes from a pipe, which may have no end
_COPY_BYTES = 1 << 20


class _FileMap(mmap.mmap):
    """A mapping of `open_image`: shared and read-only, so that its file has all it holds."""


class ImageSource(Record):
    """The bytes of one image and the name to use in messages.

    Attributes: ``name`` (path as the user gave it, or ``<bytes>``), ``data``
    (read-only view; the file mapping lives as long as a view of it does).
    """

    name: str
    data: memoryview

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview, name: str = "<bytes>") -> ImageSource:
        """Wrap bytes that are already in memory."""
        return cls(name, memoryview(data).cast("B").toreadonly())

    @property
    def basename(self) -> str:
        """The name without its directories, for page origins (the same on every machine)."""
        return os.path.basename(self.name)

    def fail(self, rule: str, *, offset: int | None = None) -> ImageError:
        """An ImageError that names this image (to be raised by the caller)."""
        return ImageError(self.name, rule, offset=offset)

    def slice(self, offset: int, size: int, what: str) -> memoryview:
        """A view of ``size`` bytes at ``offset``; ImageError if the image ends before."""
        if offset < 0 or size < 0 or offset + size > len(self.data):
            raise self.fail(
                f"{what} needs {size:#x} bytes, the image ends at {len(self.data):#x}",
                offset=max(offset, 0),
            )
        return self.data[offset : offset + size]


def open_image(path: str | os.PathLike[str]) -> ImageSource:
    """Map ``path`` read-only. Raises ImageError if it can't be read or is empty."""
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if (stat.S_ISREG(mode) and os.fstat(file.fileno()).st_size) or stat.S_ISBLK(mode):
                return _mapped(file, name)
            return _copied(file, name)
    except OSError as error:
        raise ImageError(name, f"can't be read: {error.strerror or error}") from None


def _mapped(file: BinaryIO, name: str) -> ImageSource:
    # The size that stat gives for a block device is 0.
    size = os.lseek(file.fileno(), 0, os.SEEK_END)
    if not size:
        raise ImageError(name, "the image is empty")
    return ImageSource(name, memoryview(_FileMap(file.fileno(), size, access=mmap.ACCESS_READ)))


def _copied(file: BinaryIO, name: str) -> ImageSource:
    left = _STREAM_LIMIT
    with _temporary(name) as copy:
        while data := file.read(min(_COPY_BYTES, left + 1)):
            left -= len(data)
            if left < 0:
                limit = _STREAM_LIMIT >> 20
                raise ImageError(name, f"more than {limit} MiB from what isn't a regular file")
            try:
                copy.write(data)
            except OSError as error:
                raise _no_copy(name, error) from None
        return _mapped(copy, name)


def _temporary(name: str) -> BinaryIO:
    import tempfile  # takes longer than all else that a small image needs

    try:
        return tempfile.TemporaryFile(buffering=0)
    except OSError as error:
        raise _no_copy(name, error) from None


def _no_copy(name: str, error: OSError) -> ImageError:
    reason = error.strerror or error
    return ImageError(name, f"can't be copied to the folder for temporary files: {reason}")


def forget(data: memoryview) -> bool:
    """Give back the memory of the mapped file that ``data`` is a view of; False if it is none.

    Its bytes come from the file again where they are read again.
    """
    if not isinstance(data.obj, _FileMap):
        return False
    data.obj.madvise(mmap.MADV_DONTNEED)
    return True


class ViewStream(io.RawIOBase):
    """A binary stream over an image. (io.BytesIO would copy it.)"""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes; all that are left if it is negative."""
        end = len(self._data) if size < 0 else self._at + size
        chunk = bytes(self._data[self._at : end])
        self._at += len(chunk)
        return chunk

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go anywhere, also behind the end."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def tell(self) -> int:
        """Where it is."""
        return self._at
