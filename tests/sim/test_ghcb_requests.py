"""Guest messages by the GHCB: what KVM does with them (svm/sev.c: snp_handle_guest_req)."""

from __future__ import annotations

import errno

import pytest

from kvmlaunch.uapi import ffi, lib

from .driver import PAGE, Guest
from .scripted import RBX, asks

OK = (0, 0)
REQUEST, RESPONSE, DATA = (Guest.GPA + n * PAGE for n in (9, 10, 11))
NOWHERE = 0x40000000
PLAIN, EXTENDED = 0x80000011, 0x80000012
MSG_TYPE, REPORT_REQ = 0x34, 5


def asked(code, request=REQUEST, response=RESPONSE, **options):
    fields = {name: options.pop(name) for name in ("rax", "rbx") if name in options}
    return asks({"code": code, "info_1": request, "info_2": response, **fields}, **options)


def message(rig, kind):
    rig.guest.ram.write(bytes([kind]), REQUEST - Guest.GPA + MSG_TYPE)


@pytest.mark.parametrize("code", [PLAIN, EXTENDED])
@pytest.mark.parametrize(
    ("request_", "response"),
    [(REQUEST + 8, RESPONSE), (REQUEST, RESPONSE + 8), (REQUEST, REQUEST)],
)
def test_request_with_bad_pages_is_refused(code, request_, response):
    rig = asked(code, request_, response)
    assert rig.enter() == OK
    assert rig.error == (2, 4)


@pytest.mark.parametrize("code", [PLAIN, EXTENDED])
def test_request_that_firmware_refuses_is_answered_with_its_status(code):
    rig = asked(code)
    assert rig.enter() == OK
    info_1, info_2 = rig.error
    assert info_1 == 0
    assert 0 < info_2 < 1 << 32


@pytest.mark.parametrize(("request_", "response"), [(NOWHERE, RESPONSE), (REQUEST, NOWHERE)])
def test_request_where_no_memory_is_fails_the_run(request_, response):
    assert asked(PLAIN, request_, response).enter() == (-1, errno.EIO)


@pytest.mark.parametrize("fields", [{}, {"rax": DATA}, {"rbx": 1}, {"rax": DATA + 8, "rbx": 1}])
def test_extended_request_for_a_report_needs_its_data_pages(fields):
    rig = asked(EXTENDED, **fields)
    message(rig, REPORT_REQ)
    assert rig.enter() == OK
    assert rig.error == (2, 5)


def test_extended_request_for_a_report_gets_an_empty_table():
    rig = asked(EXTENDED, rax=DATA, rbx=1)
    message(rig, REPORT_REQ)
    rig.guest.ram.write(b"x" * 32, DATA - Guest.GPA)
    rig.enter()
    assert rig.guest.ram.read(32, DATA - Guest.GPA) == bytes(24) + b"x" * 8


@pytest.mark.parametrize(
    ("ret", "npages", "info_2", "rbx"),
    [(28, 3, 1 << 32, 3), (11, 9, 2 << 32, 1), (5, 9, 0xFFFFFFFF << 32, 1)],
)
def test_extended_request_when_user_space_has_certificates_exits(ret, npages, info_2, rbx):
    rig = asked(EXTENDED, rax=DATA, rbx=1, profile="7.0", req_certs=True)
    message(rig, REPORT_REQ)
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_SNP_REQ_CERTS)
    exit_ = ffi.cast("struct kvm_exit_snp_req_certs *", ffi.addressof(rig.run[0], "io"))
    assert (exit_.gpa, exit_.npages, exit_.ret) == (DATA, 1, 0)
    exit_.ret, exit_.npages = ret, npages
    assert (rig.enter(), rig.run.exit_reason) == (OK, lib.KVM_EXIT_HLT)
    assert (rig.error, rig.field(RBX)) == ((0, info_2), rbx)


def test_extended_request_when_user_space_answers_nonsense_fails_the_run():
    rig = asked(EXTENDED, rax=DATA, rbx=1, profile="7.0", req_certs=True)
    message(rig, REPORT_REQ)
    rig.enter()
    ffi.cast("struct kvm_exit_snp_req_certs *", ffi.addressof(rig.run[0], "io")).ret = 99
    assert rig.enter() == (-1, errno.EINVAL)
