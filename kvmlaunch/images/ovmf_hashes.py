"""Kernel hashes for OVMF: read from the files, and placed where the firmware wants them.

The GUIDed table says where the hashes table goes, and a metadata section of type 0x10
that its page is launched. The whole section is measured as NORMAL, zeros included.
Source: QEMU target/i386/sev.c, sev_add_kernel_loader_hashes and
snp_launch_update_kernel_hashes.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from kvmlaunch.abi.kernel_hashes import HASHES_SIZE, KernelHashes, hash_cmdline
from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.errors import ImageError
from kvmlaunch.images.options import Blob, PlanOptions
from kvmlaunch.images.ovmf_table import HASH_TABLE_GUID, OvmfTables
from kvmlaunch.images.source import ImageSource
from kvmlaunch.images.vmm import VmmProfile

__all__ = ["check_hashes_place", "hashes_page", "read_hashes"]

_CHUNK = 1 << 20
_HEAD = 0x264  # the setup header up to its newest field
_SETUP_SECTS, _SYSSIZE, _MAGIC, _VERSION = 0x1F1, 0x1F4, 0x202, 0x206
_SYSSIZE_IS_U32 = 0x204


def hashes_page(
    source: ImageSource, tables: OvmfTables, options: PlanOptions, vmm: VmmProfile
) -> bytes:
    """The page with the hashes of the options' kernel.

    Raises ImageError where the firmware has no place for it.
    """
    check_hashes_place(source, tables, vmm)
    page_gpa = tables.hash_base & -PAGE_SIZE
    places = [section for section in tables.sections if section.label == "kernel-hashes"]
    if not places:
        raise source.fail(
            "a kernel was given, but the SEV metadata has no section of type 0x10 "
            "(kernel hashes), so this build doesn't measure one under SEV-SNP; use edk2's "
            "AmdSevX64 build (Debian's OVMF.amdsev.fd)"
        )
    if not any(section.gpa == page_gpa for section in places):
        where = ", ".join(str(section) for section in places)
        raise source.fail(
            f"the kernel hashes table at {tables.hash_base:#x} is not in the first page of {where}"
        )
    if tables.hash_base % PAGE_SIZE > PAGE_SIZE - HASHES_SIZE:
        raise source.fail(f"the kernel hashes table at {tables.hash_base:#x} leaves its page")
    return read_hashes(options).page(tables.hash_base % PAGE_SIZE)


def check_hashes_place(source: ImageSource, tables: OvmfTables, vmm: VmmProfile) -> None:
    """Refuse a VMM without kernel hashes, and firmware whose table names no room for them.

    Raises ImageError.
    """
    if not vmm.kernel_hashes:
        raise source.fail(f"{vmm.name} launches no kernel hashes, so --kernel isn't measured")
    entry = tables.find(HASH_TABLE_GUID)
    if entry is None or not tables.hash_base:
        what = "is empty" if entry else "is missing"
        raise source.fail(
            "a kernel was given, but this firmware has no place for its hashes: the GUIDed "
            f"table's SEV hash table entry {what}; use edk2's AmdSevX64 build (Debian's "
            "OVMF.amdsev.fd)"
        )
    if tables.hash_size < HASHES_SIZE:
        raise source.fail(
            f"the place for kernel hashes has {tables.hash_size} bytes, they need {HASHES_SIZE}",
            offset=entry.offset + 4,
        )


def read_hashes(options: PlanOptions) -> KernelHashes:
    """Hash kernel, initrd and command line. Raises ImageError where a file can't be read."""
    assert options.kernel is not None
    kernel = _sha256(options.kernel, check_kernel=True)
    initrd = _sha256(b"" if options.initrd is None else options.initrd)
    return KernelHashes(kernel, initrd, hash_cmdline(options.append or ""))


def _sha256(blob: Blob, *, check_kernel: bool = False) -> bytes:
    """SHA-256 of a file from start to end, of which only a chunk is in memory."""
    name = "<bytes>" if isinstance(blob, bytes) else os.fspath(blob)
    digest, size, head = hashlib.sha256(), 0, b""
    if isinstance(blob, bytes):
        digest.update(blob)
        size, head = len(blob), blob[:_HEAD]
    else:
        chunk = bytearray(_CHUNK)
        view = memoryview(chunk)
        try:
            with Path(name).open("rb", buffering=0) as file:
                while count := file.readinto(chunk):
                    digest.update(view[:count])
                    head += bytes(view[: min(count, _HEAD - len(head))])
                    size += count
        except OSError as error:
            raise ImageError(name, f"can't be read: {error.strerror or error}") from None
        except ValueError as error:  # a NUL in a path
            raise ImageError(name, f"can't be read: {error}") from None
    if check_kernel and size < (least := _kernel_size(head)):
        raise ImageError(
            name, f"the kernel is cut off: its header says {least:#x} bytes, it has {size:#x}"
        )
    return digest.digest()


def _kernel_size(head: bytes) -> int:
    """The least size of a bzImage, by its setup header; 0 for what isn't one."""
    if len(head) < _HEAD or head[_MAGIC : _MAGIC + 4] != b"HdrS":
        return 0
    sectors = head[_SETUP_SECTS] or 4
    version = int.from_bytes(head[_VERSION : _VERSION + 2], "little")
    width = 4 if version >= _SYSSIZE_IS_U32 else 2
    paragraphs = int.from_bytes(head[_SYSSIZE : _SYSSIZE + width], "little")
    # The last paragraph may be a part of one.
    return (sectors + 1) * 512 + max(16 * paragraphs - 15, 0)
