"""csrc/syscalls.c: ret and errno together, EINTR shown, memory by address."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmlaunch.uapi import RealPlatform, address_of, ffi, lib, peek, poke

_PAGE = 4096
_NEVER_MAPPED = 0x1000  # below vm.mmap_min_addr
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_KEEP_SIZE = 1
_PUNCH_HOLE = 2


@pytest.fixture
def platform() -> RealPlatform:
    return RealPlatform()


@pytest.fixture
def pages() -> Iterator[int]:
    """Address of two pages, of which the second is unmapped."""
    address = lib.kl_mmap(-1, 2 * _PAGE, _READ_WRITE, _PRIVATE, 0).ret
    assert lib.kl_munmap(address + _PAGE, _PAGE).ret == 0
    yield address
    lib.kl_munmap(address, _PAGE)


@pytest.fixture
def closed_fd() -> int:
    fd = os.open("/dev/null", os.O_RDONLY)
    os.close(fd)
    return fd


def test_open_when_missing_is_enoent(platform: RealPlatform, tmp_path: Path) -> None:
    assert platform.open(f"{tmp_path}/none", os.O_RDONLY) == (-1, errno.ENOENT)


def test_open_when_path_goes_through_a_file_is_enotdir(platform: RealPlatform) -> None:
    assert platform.open("/dev/null/x", os.O_RDONLY) == (-1, errno.ENOTDIR)


def test_open_when_name_is_not_utf8_opens_it(platform: RealPlatform, tmp_path: Path) -> None:
    path = os.fsdecode(bytes(tmp_path) + b"/\xff")
    Path(path).touch()
    result = platform.open(path, os.O_RDONLY)
    assert result.errno == 0
    os.close(result.ret)


def test_close_when_open_gives_0_and_closes(platform: RealPlatform) -> None:
    fd = platform.open("/dev/null", os.O_RDONLY).ret
    assert platform.close(fd) == (0, 0)
    assert platform.close(fd) == (-1, errno.EBADF)


def test_ioctl_when_fd_is_closed_is_ebadf(platform: RealPlatform, closed_fd: int) -> None:
    assert platform.ioctl(closed_fd, lib.KVM_GET_API_VERSION) == (-1, errno.EBADF)


def test_ioctl_when_file_has_none_is_enotty(platform: RealPlatform) -> None:
    with open("/dev/null", "rb") as file:
        assert platform.ioctl(file.fileno(), lib.KVM_GET_API_VERSION) == (-1, errno.ENOTTY)


def test_errno_when_call_succeeds_after_a_failure_is_0(platform: RealPlatform) -> None:
    platform.close(-1)
    with open("/dev/null", "rb") as file:
        assert platform.ioctl(os.dup(file.fileno()), lib.KVM_RUN).errno == errno.ENOTTY
    result = platform.open("/dev/null", os.O_RDONLY)
    assert result.errno == 0
    os.close(result.ret)


def test_mmap_when_length_is_0_is_einval(platform: RealPlatform) -> None:
    assert platform.mmap(-1, 0, _READ_WRITE, _PRIVATE) == (-1, errno.EINVAL)


def test_mmap_when_fd_is_closed_is_ebadf(platform: RealPlatform, closed_fd: int) -> None:
    result = platform.mmap(closed_fd, _PAGE, mmap.PROT_READ, mmap.MAP_SHARED)
    assert result == (-1, errno.EBADF)


def test_mmap_when_offset_is_given_starts_there(platform: RealPlatform, tmp_path: Path) -> None:
    path = tmp_path / "two-pages"
    path.write_bytes(b"a" * _PAGE + b"b" * _PAGE)
    with path.open("rb") as file:
        result = platform.mmap(file.fileno(), _PAGE, mmap.PROT_READ, mmap.MAP_SHARED, _PAGE)
    assert peek(result.ret, 4) == b"bbbb"
    platform.munmap(result.ret, _PAGE)


def test_munmap_when_address_is_unaligned_is_einval(platform: RealPlatform, pages: int) -> None:
    assert platform.munmap(pages + 1, _PAGE) == (-1, errno.EINVAL)


def test_guest_ram_flags_when_mapped_read_as_zero(platform: RealPlatform) -> None:
    """Far more than this machine has: nothing is reserved."""
    size = 1 << 40
    result = platform.mmap(-1, size, _READ_WRITE, lib.KL_MAP_GUEST_RAM)
    assert peek(result.ret + size - 8, 8) == bytes(8)
    platform.munmap(result.ret, size)


def test_fallocate_when_memfd_allocates_and_keeps_the_size(platform: RealPlatform) -> None:
    fd = os.memfd_create("test")
    assert platform.fallocate(fd, _KEEP_SIZE, 0, 3 * _PAGE) == (0, 0)
    state = os.fstat(fd)
    os.close(fd)
    assert (state.st_size, state.st_blocks * 512) == (0, 3 * _PAGE)


def test_fallocate_when_punching_zeroes_only_the_hole(platform: RealPlatform) -> None:
    fd = os.memfd_create("test")
    os.write(fd, b"x" * 3 * _PAGE)
    result = platform.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, _PAGE, _PAGE)
    data = os.pread(fd, 3 * _PAGE, 0)
    os.close(fd)
    assert result == (0, 0)
    assert data == b"x" * _PAGE + bytes(_PAGE) + b"x" * _PAGE


def test_fallocate_when_pipe_is_espipe(platform: RealPlatform) -> None:
    read, write = os.pipe()
    assert platform.fallocate(write, 0, 0, _PAGE) == (-1, errno.ESPIPE)
    os.close(read)
    os.close(write)


def test_peek_when_mapped_copies(pages: int) -> None:
    ffi.buffer(ffi.cast("char *", pages), 5)[:] = b"hello"
    assert peek(pages, 5) == b"hello"


def test_peek_when_length_is_0_gives_nothing(pages: int) -> None:
    assert peek(pages, 0) == b""


@pytest.mark.parametrize("address", [0, _NEVER_MAPPED, 2**64 - _PAGE])
def test_peek_when_not_mapped_is_efault(address: int) -> None:
    with pytest.raises(OSError, match="EFAULT") as caught:
        peek(address, 8)
    assert caught.value.errno == errno.EFAULT


def test_peek_when_only_its_start_is_mapped_is_efault(pages: int) -> None:
    with pytest.raises(OSError, match="EFAULT"):
        peek(pages + _PAGE - 4, 8)


def test_poke_when_mapped_copies(pages: int) -> None:
    poke(pages + 8, memoryview(b"world"))
    assert bytes(ffi.buffer(ffi.cast("char *", pages), 14)) == bytes(8) + b"world\0"


@pytest.mark.parametrize("address", [0, _NEVER_MAPPED])
def test_poke_when_not_mapped_is_efault(address: int) -> None:
    with pytest.raises(OSError, match="EFAULT") as caught:
        poke(address, b"x")
    assert caught.value.errno == errno.EFAULT


def test_poke_when_read_only_is_efault() -> None:
    address = lib.kl_mmap(-1, _PAGE, mmap.PROT_READ, _PRIVATE, 0).ret
    with pytest.raises(OSError, match="EFAULT"):
        poke(address, b"x")
    lib.kl_munmap(address, _PAGE)


def test_address_of_when_array_is_where_its_bytes_are() -> None:
    array = ffi.new("char[]", b"bytes")
    assert peek(address_of(array), 5) == b"bytes"


def test_discard_when_anonymous_zeroes_only_the_range() -> None:
    address = lib.kl_mmap(-1, 3 * _PAGE, _READ_WRITE, _PRIVATE, 0).ret
    poke(address, b"x" * 3 * _PAGE)
    result = lib.kl_discard(address + _PAGE, _PAGE)
    data = peek(address, 3 * _PAGE)
    lib.kl_munmap(address, 3 * _PAGE)
    assert (result.ret, result.err) == (0, 0)
    assert data == b"x" * _PAGE + bytes(_PAGE) + b"x" * _PAGE


def test_discard_when_unaligned_is_einval(pages: int) -> None:
    result = lib.kl_discard(pages + 1, _PAGE)
    assert (result.ret, result.err) == (-1, errno.EINVAL)


class _Reader(threading.Thread):
    """Blocks in kl_open until the FIFO has a writer."""

    def __init__(self, fifo: Path) -> None:
        super().__init__(daemon=True)
        self.fifo = fifo
        self.result = (0, 0)

    def run(self) -> None:
        self.result = RealPlatform().open(str(self.fifo), os.O_RDONLY)


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Path]:
    """A FIFO that gets a writer after some seconds, lest a defect hangs the tests."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with subprocess.Popen(["sh", "-c", f"sleep 5; : > {path}"], start_new_session=True) as rescue:
        yield path
        os.killpg(rescue.pid, signal.SIGKILL)


def test_open_when_signalled_shows_eintr(fifo: Path) -> None:
    number = lib.kl_kick_signal()
    reader = _Reader(fifo)
    reader.start()
    while reader.is_alive():  # a signal before open() blocks has no effect
        assert reader.ident is not None
        signal.pthread_kill(reader.ident, number)
        reader.join(0.001)
    assert reader.result == (-1, errno.EINTR)


def test_open_when_blocked_lets_other_threads_run(fifo: Path) -> None:
    reader = _Reader(fifo)
    started = time.monotonic()
    reader.start()
    writer = RealPlatform().open(str(fifo), os.O_WRONLY | os.O_NONBLOCK)
    while writer.errno == errno.ENXIO:  # until the reader waits in open()
        writer = RealPlatform().open(str(fifo), os.O_WRONLY | os.O_NONBLOCK)
    passed = time.monotonic() - started
    reader.join()
    os.close(reader.result[0])
    os.close(writer.ret)
    assert passed < 4, "only the rescuer's open() let this thread go on"


def _script(text: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 0, done.stderr or f"ended with {done.returncode}"
    return done.stdout.strip()


_PRELUDE = """
import os, signal
from kvmlaunch.uapi import lib
def caught():
    status = open("/proc/self/status").read()
    return int(status.partition("SigCgt:")[2].split()[0], 16) >> number - 1 & 1
number = signal.SIGRTMIN + 5
"""


def test_kick_signal_when_not_asked_for_has_no_handler() -> None:
    assert _script(_PRELUDE + "print(caught())") == "0"


def test_kick_signal_when_asked_for_has_a_handler() -> None:
    assert _script(_PRELUDE + "print(lib.kl_kick_signal() == number, caught())") == "True 1"


def test_kick_signal_when_sent_does_not_kill() -> None:
    text = "os.kill(os.getpid(), lib.kl_kick_signal()); print('alive')"
    assert _script(_PRELUDE + text) == "alive"


def test_kick_signal_when_asked_for_again_leaves_a_changed_handler() -> None:
    text = (
        "lib.kl_kick_signal(); signal.signal(number, signal.SIG_IGN);"
        "print(lib.kl_kick_signal() == number, caught())"
    )
    assert _script(_PRELUDE + text) == "True 0"
