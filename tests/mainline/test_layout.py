"""Structs by field name; offsets and sizes are those of the kernel's headers (6.12)."""

from __future__ import annotations

import pytest

from tests.mainline.layout import decode_changes, encode


def encoded(struct: str, fields: dict, entries: tuple = (), room: int = 0) -> bytes:
    return encode(struct, fields, entries, room, lambda value: 77 if value == "name" else value)


def test_fields_are_where_the_kernel_has_them():
    data = encoded("kvm_sev_cmd", {"id": 0x16, "data": "name", "error": 5, "sev_fd": -1})
    assert len(data) == 24
    assert data[0:4] == b"\x16\0\0\0"
    assert data[8:16] == b"\x4d" + bytes(7)
    assert data[16:24] == b"\x05\0\0\0\xff\xff\xff\xff"


def test_nested_fields_and_arrays_are_set():
    data = encoded("kvm_sregs", {"ds": {"base": 1, "g": 1}, "cr0": 0x11})
    assert (data[24], data[24 + 20], data[224]) == (1, 1, 0x11)
    data = encoded("kvm_xcrs", {"nr_xcrs": 1, "xcrs": [{"value": 7}]})
    assert (data[0], data[16]) == (1, 7)
    data = encoded("kvm_xsave", {"region": {"128": 3}})
    assert (len(data), data[512]) == (4096, 3)


def test_entries_follow_the_header():
    data = encoded("kvm_msrs", {"nmsrs": 1}, ({"index": 0x10, "data": 9},), 2)
    assert len(data) == 8 + 3 * 16
    assert (data[8], data[16]) == (0x10, 9)


def test_values_are_cut_to_their_field():
    assert encoded("kvm_mp_state", {"mp_state": 1 << 40 | 3}) == b"\x03\0\0\0"


def test_unknown_field_is_a_key_error():
    with pytest.raises(KeyError):
        encoded("kvm_mp_state", {"none": 1})


def test_changes_are_named_by_path():
    before = encoded("kvm_sregs", {})
    after = encoded("kvm_sregs", {"cs": {"limit": 5}, "efer": 9})
    assert decode_changes("kvm_sregs", before, after) == {"cs.limit": 5, "efer": 9}
    assert decode_changes("kvm_sregs", before, before) == {}


def test_changes_of_entries_have_a_number():
    entries = ({"index": 1}, {"index": 2})
    before = encoded("kvm_msrs", {"nmsrs": 2}, entries)
    after = encoded("kvm_msrs", {"nmsrs": 2}, ({"index": 1}, {"index": 2, "data": 3}))
    assert decode_changes("kvm_msrs", before, after) == {"entries.1.data": 3}
