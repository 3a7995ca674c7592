"""FakeHost's reading of debugfs, from files of the same form."""

from __future__ import annotations

import pytest

from kvmlaunch.uapi import MeasuredPage, RealPlatform, Result, address_of, ffi, lib
from tests.mainline.fake import FakeHost

A, B, C, D = ("aa" * 48, "bb" * 48, "cc" * 48, "dd" * 48)
_MEASURED = f"""1 1 100000 {A} {B}
2 3 200000 {"00" * 48} {C}
1 2 fffffffff000 {C} {D}
"""
_LOG = """SNP_GCTX_CREATE 0x00
SNP_LAUNCH_START 0x07
0x123 0x16
"""


@pytest.fixture
def host(tmp_path):
    (tmp_path / "measured").write_text(_MEASURED)
    (tmp_path / "log").write_text(_LOG)
    (tmp_path / "orders").write_text("")
    (tmp_path / "vmsa").write_bytes(bytes(0x178) + b"\xf0\xff" + bytes(4096 - 0x17A))
    return FakeHost(tmp_path)


def test_end_tells_pages_by_guest(host):
    outcome = host.end()
    assert outcome["guests"] == [
        [[1, "100000", A, B], [2, "fffffffff000", C, D]],
        [[3, "200000", "00" * 48, C]],
    ]
    assert outcome["vmsas"] == ["00" * 0x178 + "f0ff"]
    assert outcome["log"] == [["SNP_GCTX_CREATE", 0], ["SNP_LAUNCH_START", 7], ["0x123", 0x16]]


def test_orders_are_lines(host, tmp_path):
    host.order(["SNP_LAUNCH_UPDATE:fw=0x1a@3", "SNP_PAGE_RECLAIM:fail"])
    assert (tmp_path / "orders").read_text() == (
        "SNP_LAUNCH_UPDATE:fw=0x1a@3\nSNP_PAGE_RECLAIM:fail\n"
    )


def test_begin_forgets_pages_and_orders(host, tmp_path):
    host.order(["SNP_PAGE_RECLAIM:fail"])
    host.begin([])
    assert (tmp_path / "orders").read_text().strip() == ""
    assert (tmp_path / "measured").read_text() != _MEASURED


def test_measured_pages_are_those_of_the_vm_that_was_started(host, monkeypatch):
    monkeypatch.setattr(RealPlatform, "ioctl", lambda *_: Result(0, 0))
    command = ffi.new("struct kvm_sev_cmd *", {"id": lib.KVM_SEV_SNP_LAUNCH_START})
    assert host.measured_pages(7) == []
    host.ioctl(7, lib.KVM_MEMORY_ENCRYPT_OP, address_of(command))
    assert host.measured_pages(7) == [
        MeasuredPage(1, 0x100000, bytes.fromhex(A), bytes.fromhex(B)),
        MeasuredPage(2, 0xFFFFFFFFF000, bytes.fromhex(C), bytes.fromhex(D)),
    ]
    assert host.measured_pages(8) == []
