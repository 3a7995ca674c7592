"""No key that the simulated firmware holds is shown by repr, str, pickle, log or traceback."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import pickle
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf import hkdf

from kvmlaunch.abi.report import SigningKey
from kvmlaunch.sim import SimPlatform, firmware_messages
from tests.messages import KEY_REQ, key_req, opened, report_req, sealed

from .driver import launched
from .rig import Rig

pytestmark = pytest.mark.usefixtures("few_rsa_keys")


class Safe:
    """A host that has used all of its keys; `secrets` are all that it ever drew or made."""

    def __init__(self) -> None:
        self.secrets: list[bytes] = []
        self.draws = 0
        self.rig = Rig()
        self.rig._random = self._random  # type: ignore[method-assign]
        self.rig.psp._random = self._random
        self.rig.psp._keys._random = self._random
        self.rig.psp.vlek_load(b"V" * 432)
        self.gctx = self.rig.finished()
        self.guest = self.rig.psp.context(self.gctx)
        self.secrets.remove(self.guest.report_id)  # every report shows it
        for select in (0, 2, 1):
            self.secrets.append(self.ask(key_req(select), KEY_REQ)[0x20:])
        self.ask(report_req(key_sel=1), 5)
        self.rig.psp.certificate_chain()
        keys = self.rig.psp._keys
        self.secrets += [keys.root(kind, 0).reveal() for kind in (SigningKey.VCEK,)]
        for key in keys._signers.values():
            self.secrets.append(key.private_numbers().private_value.to_bytes(48, "big"))

    def _random(self, size: int) -> bytes:
        self.draws += 1
        seed = hashlib.sha512(b"%d" % self.draws).digest()
        self.secrets.append(seed[:size])
        return seed[:size]

    def ask(self, payload: bytes, kind: int, **fields: int) -> bytes:
        seqno = self.guest.msg_count[0] + 1
        fields = {"seqno": seqno, "msg_type": kind, **fields}
        status, page = self.rig.request(self.gctx, sealed(self.guest.vmpck[0], payload, **fields))
        return opened(self.guest.vmpck[0], page)[1] if not status else b""

    def found_in(self, text: str) -> list[int]:
        """Which secrets can be read in the text, in any spelling that a dump may have."""
        return [n for n, secret in enumerate(self.secrets) if any(f in text for f in forms(secret))]


def forms(secret: bytes) -> Iterator[str]:
    for part in (secret, secret[:16], secret[-16:]):
        yield part.hex()
        yield repr(part)[2:-1]
        yield str(list(part))[1:-1]
    yield base64.b64encode(secret[:30]).decode()
    for order in ("big", "little"):
        number = int.from_bytes(secret, order)  # type: ignore[arg-type]
        yield str(number)
        yield hex(number)[2:]


@pytest.fixture
def safe() -> Safe:
    return Safe()


def test_search_when_a_secret_is_there_finds_it(safe: Safe) -> None:
    assert len(safe.secrets) >= 10
    assert len(set(safe.secrets)) == len(safe.secrets)
    for number, secret in enumerate(safe.secrets):
        assert number in safe.found_in(f"x {secret!r}")
        assert number in safe.found_in(secret.hex())


SHOWN: dict[str, Callable[[Safe], Any]] = {
    "processor": lambda safe: safe.rig.psp,
    "context": lambda safe: safe.guest,
    "chip keys": lambda safe: safe.rig.psp._keys,
    "authority": lambda safe: safe.rig.psp._authority,
    "chain": lambda safe: safe.rig.psp.certificate_chain(),
    "status": lambda safe: safe.rig.psp.guest_status(safe.gctx),
    "pages": lambda safe: safe.rig.psp.measured_pages(safe.gctx),
}


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("show", [repr, str, lambda value: f"{value}"])
def test_object_when_shown_has_no_secret(safe: Safe, name: str, show: Any) -> None:
    assert safe.found_in(show(SHOWN[name](safe))) == []


@pytest.mark.parametrize("name", SHOWN)
def test_object_when_pickled_is_refused_or_has_no_secret(safe: Safe, name: str) -> None:
    raw = b""
    with contextlib.suppress(TypeError, AttributeError, pickle.PicklingError):
        raw = pickle.dumps(SHOWN[name](safe))
    assert [secret for secret in safe.secrets if secret in raw] == []


def test_context_when_pickled_is_type_error(safe: Safe) -> None:
    with pytest.raises(TypeError, match="pickled") as caught:
        pickle.dumps(safe.guest)
    assert safe.found_in(str(caught.value)) == []


def test_platform_when_shown_has_no_secret() -> None:
    keys = [hashlib.sha512(b"%d" % n).digest() for n in range(40)]
    draws = iter(keys)
    with SimPlatform(random=lambda size: next(draws)[:size]) as platform:
        guest = launched(platform)
        guest.ok(guest.finish()[0])
        vm = platform._host.fds.get(guest.vm).vm
        text = repr([platform, platform._host, vm, vm.sev, vm.sev.requests, platform._host.psp])
        assert [key for key in keys if key[:16].hex() in text or repr(key[:16])[2:-1] in text] == []


FAILING = [
    *[("report", firmware_messages, name) for name in ("unseal", "seal", "key_info")],
    *[("report", firmware_messages, name) for name in ("ReportResponse", "replace")],
    *[("key", firmware_messages, name) for name in ("unseal", "seal", "derive", "_mix")],
    ("key", firmware_messages, "KeyResponse"),
    ("key", hkdf, "HKDF"),
    ("report", hkdf, "HKDF"),
    ("report", ec, "derive_private_key"),
]


@pytest.mark.parametrize(("request_for", "module", "name"), FAILING)
def test_traceback_with_locals_has_no_secret(
    safe: Safe, monkeypatch: pytest.MonkeyPatch, request_for: str, module: object, name: str
) -> None:
    """Whatever breaks inside the firmware: none of its frames holds key bytes in a local."""

    def breaks(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(module, name, breaks)
    safe.rig.psp._keys._signers.clear()
    payload, kind = (report_req(), 5) if request_for == "report" else (key_req(), KEY_REQ)
    with pytest.raises(RuntimeError, match="broken") as caught:
        safe.ask(payload, kind)
    seen = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    own = Path(firmware_messages.__file__).parents[1]
    frames = [f.locals or {} for f in seen.stack if own in Path(f.filename).parents]
    assert frames
    # The locals are reprs: another repr would double their backslashes.
    assert safe.found_in("\n".join(text for values in frames for text in values.values())) == []


def test_log_of_refused_and_answered_requests_has_no_secret(
    safe: Safe, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    safe.ask(key_req(), KEY_REQ)
    safe.ask(key_req(), KEY_REQ, seqno=1)
    safe.ask(key_req(fields=1 << 9), KEY_REQ)
    with contextlib.suppress(TypeError):
        pickle.dumps(safe.guest)
    out, err = capfd.readouterr()
    assert safe.found_in(caplog.text + out + err) == []
