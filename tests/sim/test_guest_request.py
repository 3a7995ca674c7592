"""KVM's part in guest requests (sev.c of 6.12.117: snp_handle_guest_req and its neighbours).

What a guest would do is done here by hand: nothing runs a guest's code.
"""

from __future__ import annotations

import errno

import pytest

from kvmlaunch.sim.guest_request import CertificatesWanted, Reply
from kvmlaunch.uapi import lib
from tests.messages import KEY_REQ, key_req, opened, report_req, sealed

from .driver import PAGE, Driver, launched, simulated

REQUEST, RESPONSE, DATA = 0x10000, 0x11000, 0x20000
VMPCK0 = bytes(32)  # the test platform's keys are zeros
GOOD = sealed(VMPCK0, report_req())
STALE = b"\xee" * PAGE


class GuestMemory:
    """Pages by GPA; any other address is a hole."""

    def __init__(self) -> None:
        self.pages = {REQUEST: bytearray(PAGE), RESPONSE: bytearray(STALE)}
        self.pages[DATA] = bytearray(STALE)

    def _page(self, gpa):
        if gpa // PAGE * PAGE not in self.pages:
            raise OSError(errno.EFAULT, "no such page")
        return self.pages[gpa // PAGE * PAGE]

    def read(self, gpa, size):
        return bytes(self._page(gpa)[gpa % PAGE :][:size])

    def write(self, gpa, data):
        self._page(gpa)[gpa % PAGE : gpa % PAGE + len(data)] = data


class Asker:
    """A launched guest that asks; `requests` is its VM's."""

    def __init__(self, platform, message=GOOD):
        self.guest = launched(platform)
        self.guest.ok(self.guest.update_pages()[0])
        self.guest.ok(self.guest.finish()[0])
        self.vm = platform._host.fds.get(self.guest.vm).vm
        self.requests = self.vm.sev.requests
        self.memory = GuestMemory()
        self.say(message)

    def say(self, message):
        self.memory.pages[REQUEST][:] = message.ljust(PAGE, b"\0")

    def ask(self, request=REQUEST, response=RESPONSE):
        return self.requests.handle(self.memory, request, response)

    def ask_extended(self, request=REQUEST, response=RESPONSE, rax=DATA, rbx=1):
        handle = self.requests.handle_extended
        return handle(self.memory, request, response, rax=rax, rbx=rbx)

    def finish(self, ret, npages=0):
        handle = self.requests.finish_extended
        return handle(self.memory, REQUEST, RESPONSE, ret=ret, npages=npages)

    @property
    def answer(self):
        return bytes(self.memory.pages[RESPONSE])

    @property
    def report(self):
        return opened(VMPCK0, self.answer)[1][0x20:]


@pytest.fixture
def asker():
    with simulated() as platform:
        yield Asker(platform)


@pytest.fixture
def asker_7_0():
    """A guest whose userspace wants to give certificates."""
    with simulated("7.0") as platform:
        asker = Asker(platform)
        asker.vm.sev.req_certs = True
        yield asker


# Guest request


def test_request_when_good_brings_the_report_of_this_launch(asker):
    assert asker.ask() == (0, 0, None)
    report = asker.report
    assert report[0x90:0xC0] == asker.guest.digest
    assert report[0x50:0x90] == b"R" * 64


def test_request_leaves_its_own_page_alone(asker):
    before = bytes(asker.memory.pages[REQUEST])
    asker.ask()
    assert bytes(asker.memory.pages[REQUEST]) == before


def test_request_after_another_goes_on_with_its_numbers(asker):
    asker.ask()
    asker.say(sealed(VMPCK0, key_req(), seqno=3, msg_type=KEY_REQ))
    assert asker.ask() == (0, 0, None)
    header, _ = opened(VMPCK0, asker.answer)
    assert header["seqno"] == 4


def test_request_refused_by_firmware_gives_its_status_and_the_answer_before(asker):
    asker.say(bytes(PAGE))
    assert asker.ask() == (0, 0x16, None)
    assert asker.answer == bytes(PAGE)
    asker.say(GOOD)
    asker.ask()
    good = asker.answer
    assert asker.ask() == (0, 0x1D, None)
    assert asker.answer == good


def test_request_in_a_hole_is_eio_and_not_issued(asker):
    with pytest.raises(OSError, match="Input/output") as caught:
        asker.ask(request=0x90000)
    assert caught.value.errno == errno.EIO
    assert asker.ask() == (0, 0, None)


def test_response_in_a_hole_is_eio_after_the_message_counted(asker):
    with pytest.raises(OSError, match="Input/output"):
        asker.ask(response=0x90000)
    assert asker.ask() == (0, 0x1D, None)


def test_request_after_sev_device_was_closed_is_ebadf(asker):
    asker.guest.platform.close(asker.guest.sev_fd)
    with pytest.raises(OSError, match="descriptor") as caught:
        asker.ask()
    assert caught.value.errno == errno.EBADF
    assert asker.answer == STALE


def test_request_on_order_fails_with_that_status():
    with simulated(faults=["SNP_GUEST_REQUEST:fw=0x27@2"]) as platform:
        asker = Asker(platform)
        assert asker.ask() == (0, 0, None)
        asker.say(sealed(VMPCK0, report_req(), seqno=3))
        assert asker.ask() == (0, 0x27, None)
        assert asker.ask() == (0, 0, None)


def test_vm_when_gone_has_given_its_pages_back():
    with simulated() as platform:
        host = platform._host
        before = len(host.rmp._entries), len(host.memory._allocated)
        asker = Asker(platform)
        asker.ask()
        del asker
        for fd in platform.open_fds:
            platform.close(fd)
        assert (len(host.rmp._entries), len(host.memory._allocated)) == before


def test_vm_that_is_plain_has_no_pages_for_requests():
    with simulated() as platform:
        vm = Driver(platform).create_vm(lib.KVM_X86_DEFAULT_VM)
        assert platform._host.fds.get(vm).vm.sev.requests is None


# Extended guest request


def test_extended_request_has_an_empty_table(asker):
    assert asker.ask_extended() == (0, 0, None)
    assert asker.report[0x90:0xC0] == asker.guest.digest
    assert bytes(asker.memory.pages[DATA]) == bytes(24) + STALE[24:]


def test_extended_request_without_room_leaves_the_data_alone(asker):
    assert asker.ask_extended(rax=0x90000, rbx=0) == (0, 0, None)
    assert asker.report


@pytest.mark.parametrize(("rax", "rbx"), [(None, 1), (DATA, None), (DATA + 8, 1)])
def test_extended_request_with_bad_register_is_invalid_input(asker, rax, rbx):
    # GHCB_ERR_INVALID_INPUT
    assert asker.ask_extended(rax=rax, rbx=rbx) == (2, 5, None)
    assert asker.ask() == (0, 0, None)


def test_extended_request_for_a_key_needs_no_registers(asker):
    asker.say(sealed(VMPCK0, key_req(), msg_type=KEY_REQ))
    assert asker.ask_extended(rax=None, rbx=None) == (0, 0, None)


@pytest.mark.parametrize("where", [{"request": 0x90000}, {"rax": 0x90000}])
def test_extended_request_in_a_hole_is_eio(asker, where):
    with pytest.raises(OSError, match="Input/output"):
        asker.ask_extended(**where)
    assert asker.answer == STALE


def test_extended_request_asks_userspace_where_that_wants_to_be_asked(asker_7_0):
    assert asker_7_0.ask_extended(rbx=4) == CertificatesWanted(DATA, 4)
    assert asker_7_0.answer == STALE
    assert bytes(asker_7_0.memory.pages[DATA]) == STALE
    assert asker_7_0.finish(0) == Reply(0, 0)
    assert asker_7_0.report[0x90:0xC0] == asker_7_0.guest.digest


def test_extended_request_for_a_key_asks_nobody(asker_7_0):
    asker_7_0.say(sealed(VMPCK0, key_req(), msg_type=KEY_REQ))
    assert asker_7_0.ask_extended() == Reply(0, 0)


@pytest.mark.parametrize(
    ("ret", "reply"),
    [
        (errno.ENOSPC, (0, 1 << 32, 9)),
        (errno.EAGAIN, (0, 2 << 32, None)),
        (errno.EIO, (0, 0xFFFFFFFF << 32, None)),
    ],
)
def test_extended_request_refused_by_userspace_is_not_issued(asker_7_0, ret, reply):
    asker_7_0.ask_extended()
    assert asker_7_0.finish(ret, npages=9) == reply
    assert asker_7_0.answer == STALE
    assert asker_7_0.ask() == (0, 0, None)


@pytest.mark.parametrize("ret", [errno.EPERM, errno.EINVAL, -errno.EIO, 1 << 31])
def test_extended_request_with_unknown_answer_of_userspace_is_einval(asker_7_0, ret):
    asker_7_0.ask_extended()
    with pytest.raises(OSError, match="Invalid") as caught:
        asker_7_0.finish(ret)
    assert caught.value.errno == errno.EINVAL
