"""The guest `attest`, built as a program of this machine, against AES-GCM of the cryptography
package: what it asks the secure processor, and what it believes of the answer."""

from __future__ import annotations

import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests.guests import EXAMPLES, require_build_tools

HERE = Path(__file__).resolve().parents[1] / "guest_host" / "attest_here.c"
KEY = bytes(range(32))
DATA = b"asked for by kvmlaunch's example guest".ljust(64, b"\0")
PAGE = 4096


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """attest with its AES-GCM."""
    require_build_tools()
    path = tmp_path_factory.mktemp("attest") / "attest"
    guests = EXAMPLES / "guests"
    sources = [HERE, guests / "runtime" / "aes_gcm.c"]
    flags = ["-O1", "-no-pie", "-fno-pie", "-static", "-Wall", "-Wextra", "-Werror"]
    command = ["gcc", *flags, "-I", guests, "-o", path, *sources]
    subprocess.run(command, check=True, timeout=60)
    return path


@dataclass
class Processor:
    """What a secure processor does with one message (AMD 56860; layouts by hand)."""

    sequence: int = 2
    kind: int = 6
    status: int = 0
    size: int = 0x4A0
    data: bytes = DATA
    vmpl: int = 0
    spoil: int | None = None
    refusal: int = 0
    request: bytes = field(default=b"", init=False)
    report: bytes = field(default=b"", init=False)

    def secrets(self, last: int = 0) -> bytes:
        """A secrets page whose VMPCK0 has been used for ``last`` messages."""
        page = bytearray(PAGE)
        page[0x20:0x40] = KEY
        struct.pack_into("<I", page, 0xA0, last)
        return bytes(page)

    def answer(self, page: bytes) -> bytes:
        """Status and response page for a request page."""
        self.request = page
        body = bytearray((n * 31) % 256 for n in range(0x4A0))
        struct.pack_into("<I", body, 0x30, self.vmpl)
        body[0x50:0x90] = self.data
        self.report = bytes(body)
        payload = struct.pack("<II24x", self.status, self.size) + self.report
        rest = struct.pack("<BBHBBHIB35x", 1, 1, 0x60, self.kind, 1, len(payload), 0, 0)
        iv = self.sequence.to_bytes(8, "little") + bytes(4)
        sealed = AESGCM(KEY).encrypt(iv, payload, rest)
        tag = sealed[-16:].ljust(32, b"\0")
        message = bytearray(tag + struct.pack("<QQ", self.sequence, 0) + rest + sealed[:-16])
        if self.spoil is not None:
            message[self.spoil] ^= 1
        return struct.pack("<Q", self.refusal) + bytes(message).ljust(PAGE, b"\0")


def run(program: Path, processor: Processor, last: int = 0) -> tuple[int, str]:
    """Exit code and console of the guest."""
    with subprocess.Popen(
        [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as guest:
        assert guest.stdin is not None
        assert guest.stdout is not None
        guest.stdin.write(processor.secrets(last))
        guest.stdin.flush()
        answer = processor.answer(guest.stdout.read(PAGE))
        _, text = guest.communicate(answer, timeout=20)
    return guest.returncode, text.decode()


def test_request_when_decrypted_asks_for_a_report(program: Path) -> None:
    processor = Processor()
    run(program, processor)
    request = processor.request
    assert request[0x20:0x60] == struct.pack("<QQBBHBBHIB35x", 1, 0, 1, 1, 0x60, 5, 1, 0x60, 0, 0)
    iv = (1).to_bytes(8, "little") + bytes(4)
    sealed = request[0x60:0xC0] + request[:16]
    plain = AESGCM(KEY).decrypt(iv, sealed, request[0x30:0x60])
    assert plain == DATA + bytes(32)
    with pytest.raises(InvalidTag):
        AESGCM(KEY[::-1]).decrypt(iv, sealed, request[0x30:0x60])


def test_request_when_the_key_was_used_goes_on_counting(program: Path) -> None:
    processor = Processor(sequence=6)
    code, _ = run(program, processor, last=4)
    assert code == 0
    assert processor.request[0x20:0x28] == struct.pack("<Q", 5)


def test_report_when_answered_is_printed(program: Path) -> None:
    processor = Processor()
    code, text = run(program, processor)
    lines = text.splitlines()
    assert code == 0
    assert lines[0] == "-----BEGIN ATTESTATION REPORT-----"
    assert lines[-1] == "-----END ATTESTATION REPORT-----"
    assert {len(line) for line in lines[1:-1]} == {64}
    assert bytes.fromhex("".join(lines[1:-1])) == processor.report


@pytest.mark.parametrize(
    ("processor", "what"),
    [
        (Processor(sequence=4), "message.header.sequence is 0x4, expected 0x2"),
        (Processor(sequence=1), "message.header.sequence is 0x1, expected 0x2"),
        (Processor(kind=4), "message.header.type is 0x4, expected 0x6"),
        (Processor(status=0x16), "message.response.status is 0x16, expected 0x0"),
        (Processor(size=0x4A1), "message.response.size is 0x4a1, expected 0x4a0"),
        (Processor(data=b"x" * 64), "REPORT_DATA + n] is 0x78, expected 0x61"),
        (Processor(vmpl=1), "is 0x1, expected 0x0"),
    ],
)
def test_report_when_not_the_answer_is_not_believed(
    program: Path, processor: Processor, what: str
) -> None:
    code, text = run(program, processor)
    assert code == 12
    assert what in text
    assert "BEGIN" not in text


@pytest.mark.parametrize("spoiled", [0, 15, 0x30, 0x5F, 0x60, 0x51F])
def test_report_when_a_bit_was_changed_is_not_believed(program: Path, spoiled: int) -> None:
    code, text = run(program, Processor(spoil=spoiled))
    # Nothing of the right tag is told.
    assert (code, text) == (14, "the answer is not the secure processor's\n")


@pytest.mark.parametrize(
    ("refusal", "text"),
    [
        (0x1D, "guest request: VMM error 0, firmware status 0x1d\n"),
        (2 << 32, "guest request: VMM error 2, firmware status 0x0\n"),
    ],
)
def test_report_when_refused_says_by_whom(program: Path, refusal: int, text: str) -> None:
    assert run(program, Processor(refusal=refusal)) == (14, text)
