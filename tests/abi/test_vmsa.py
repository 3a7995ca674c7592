from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlaunch.abi.vmsa import (
    SEGMENT_FIELDS,
    SEV_FEATURES,
    VMSA_FIELDS,
    FieldDiff,
    Segment,
    Vmsa,
    VmsaField,
    describe_sev_features,
    diff,
    field_at,
)
from kvmlaunch.errors import FormatError

from . import vectors

AT = {f.name: (f.offset, f.size) for f in VMSA_FIELDS}
INT_FIELDS = [f for f in VMSA_FIELDS if isinstance(getattr(Vmsa, f.name), int)]
PAGES = st.builds(
    # Few random bytes at random places shrink better than 4096 random bytes.
    lambda pokes: bytes(pokes.get(at, 0) for at in range(4096)),
    st.dictionaries(st.integers(0, 4095), st.integers(0, 255), max_size=40),
)


@pytest.mark.parametrize(("offset", "size", "name"), vectors.SEV_ES_SAVE_AREA)
def test_field_table_agrees_with_kernel_struct(offset: int, size: int, name: str) -> None:
    assert AT[name] == (offset, size)


@pytest.mark.parametrize(
    ("name", "offset"),
    # spec_ctrl: appendix B, vmcb_save_area; the others: snp-firmware-abi.md 3.1
    [
        ("spec_ctrl", 0x2E0),
        ("guest_tsc_scale", 0x2F0),
        ("guest_tsc_offset", 0x2F8),
        ("reg_prot_nonce", 0x300),
    ],
)
def test_field_table_has_fields_that_kernel_struct_reserves(name: str, offset: int) -> None:
    assert AT[name] == (offset, 8)


def test_field_table_has_no_other_fields() -> None:
    kernel = {name for _, _, name in vectors.SEV_ES_SAVE_AREA}
    extra = {"spec_ctrl", "guest_tsc_scale", "guest_tsc_offset", "reg_prot_nonce"}
    assert set(AT) == kernel | extra


def test_field_table_is_in_order_without_overlap() -> None:
    assert all(a.offset + a.size <= b.offset for a, b in itertools.pairwise(VMSA_FIELDS))


def test_segment_layout_is_selector_attrib_limit_base() -> None:
    segment = Segment(selector=0x1122, attrib=0x3344, limit=0x55667788, base=0x99AABBCCDDEEFF00)
    assert segment.encode().hex() == "221144338877665500ffeeddccbbaa99"


def test_segment_decode_of_short_input_is_format_error() -> None:
    with pytest.raises(FormatError, match="16 bytes"):
        Segment.decode(bytes(15))


@pytest.mark.parametrize("field", SEGMENT_FIELDS, ids=lambda f: f.name)
def test_segment_with_wide_value_names_the_part(field: VmsaField) -> None:
    with pytest.raises(FormatError, match=field.name):
        Segment(**{field.name: 1 << field.size * 8})


@given(st.binary(min_size=16, max_size=16))
def test_segment_encode_of_decode_is_identity(raw: bytes) -> None:
    assert Segment.decode(raw).encode() == raw


def test_encode_of_default_is_zeros() -> None:
    assert Vmsa().encode() == bytes(4096)


@pytest.mark.parametrize("field", INT_FIELDS, ids=lambda f: f.name)
def test_encode_of_largest_value_fills_exactly_its_field(field: VmsaField) -> None:
    page = Vmsa().replace(**{field.name: (1 << field.size * 8) - 1}).encode()
    want = bytearray(4096)
    want[field.offset : field.offset + field.size] = b"\xff" * field.size
    assert page == want


@pytest.mark.parametrize("field", INT_FIELDS, ids=lambda f: f.name)
def test_vmsa_with_wide_value_names_the_field(field: VmsaField) -> None:
    with pytest.raises(FormatError, match=f"^{field.name} "):
        Vmsa().replace(**{field.name: 1 << field.size * 8})


def test_vmsa_with_negative_value_is_format_error() -> None:
    with pytest.raises(FormatError, match="rip"):
        Vmsa(rip=-1)


def test_vmsa_with_short_xmm_is_format_error() -> None:
    with pytest.raises(FormatError, match="fpreg_xmm"):
        Vmsa(fpreg_xmm=bytes(255))


def test_vmsa_with_number_for_segment_is_format_error() -> None:
    with pytest.raises(FormatError, match="cs"):
        Vmsa(cs=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, 4095, 4097])
def test_decode_of_wrong_size_is_format_error(size: int) -> None:
    with pytest.raises(FormatError, match="4096"):
        Vmsa.decode(bytes(size))


def test_decode_reads_little_endian() -> None:
    page = bytearray(4096)
    page[0x178:0x180] = bytes.fromhex("f0ff000000000000")
    assert Vmsa.decode(page).rip == 0xFFF0


def test_decode_keeps_reserved_bytes_by_gap() -> None:
    page = bytearray(4096)
    page[0xC9] = 1
    page[0x700:0x703] = b"\x02\0\x03"
    assert Vmsa.decode(page).reserved == ((0xC9, b"\x01"), (0x700, b"\x02\0\x03"))


def test_reserved_is_normalised_to_one_run_per_gap() -> None:
    vmsa = Vmsa(reserved=((0x702, b"\x03\0"), (0x700, b"\x02")))
    assert vmsa.reserved == ((0x700, b"\x02\0\x03"),)


@pytest.mark.parametrize(
    "reserved",
    [((0x178, b"\x01"),), ((0xC9, b"\x01\x02"),), ((0x1000, b"\x01"),), ((-1, b"\x01"),)],
    ids=["in a field", "into a field", "behind the page", "before the page"],
)
def test_reserved_outside_a_gap_is_format_error(reserved: tuple[tuple[int, bytes], ...]) -> None:
    with pytest.raises(FormatError, match="gap"):
        Vmsa(reserved=reserved)


def test_reserved_given_twice_is_format_error() -> None:
    with pytest.raises(FormatError, match="twice"):
        Vmsa(reserved=((0x700, b"\x01\x02"), (0x701, b"\x02")))


@given(PAGES)
def test_encode_of_decode_is_identity(page: bytes) -> None:
    assert Vmsa.decode(page).encode() == page


def test_encode_of_decode_of_all_ones_is_identity() -> None:
    assert Vmsa.decode(vectors.ONES).encode() == vectors.ONES


@given(PAGES)
def test_decode_of_encode_is_equal(page: bytes) -> None:
    vmsa = Vmsa.decode(page)
    assert Vmsa.decode(vmsa.encode()) == vmsa


@given(PAGES)
def test_repr_recreates_it(page: bytes) -> None:
    vmsa = Vmsa.decode(page)
    assert eval(repr(vmsa)) == vmsa


@given(st.binary(max_size=64))
def test_decode_of_arbitrary_bytes_raises_format_error_only(raw: bytes) -> None:
    with pytest.raises(FormatError):
        Vmsa.decode(raw)


def test_vmsa_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Vmsa().rip = 1  # type: ignore[misc]


def test_replace_changes_the_named_field() -> None:
    assert Vmsa(rip=1, rax=2).replace(rip=3) == Vmsa(rip=3, rax=2)


def test_replace_of_unknown_field_is_format_error() -> None:
    with pytest.raises(FormatError, match="fcw"):
        Vmsa().replace(fcw=0x37F)


@pytest.mark.parametrize(
    ("name", "value", "want"),
    [
        ("rip", 0xFFF0, Vmsa(rip=0xFFF0)),
        ("cs.attrib", 0x9B, Vmsa(cs=Segment(attrib=0x9B))),
        ("tr", Segment(limit=1), Vmsa(tr=Segment(limit=1))),
        ("fpreg_x87", b"\x01" * 80, Vmsa(fpreg_x87=b"\x01" * 80)),
    ],
)
def test_with_field_sets_by_name(name: str, value: int | bytes | Segment, want: Vmsa) -> None:
    assert Vmsa().with_field(name, value) == want


@pytest.mark.parametrize("name", ["", "fcw", "cs.", "cs.flags", "rip.attrib", "reserved", "get"])
def test_with_field_of_unknown_name_is_format_error(name: str) -> None:
    with pytest.raises(FormatError, match="no field"):
        Vmsa().with_field(name, 0)


def test_with_fields_of_one_segment_sets_all_its_parts() -> None:
    start = Vmsa(cs=Segment(selector=8, base=4), rip=1)
    found = start.with_fields({"cs.attrib": 0x9B, "rax": 5, "cs.limit": 0xFFFF})
    assert found == Vmsa(cs=Segment(8, 0x9B, 0xFFFF, 4), rip=1, rax=5)
    assert start.with_fields({}) == start


def test_with_fields_of_a_wide_value_is_format_error() -> None:
    with pytest.raises(FormatError, match="mxcsr 0x100000000 does not fit in 32 bits"):
        Vmsa().with_fields({"rax": 1, "mxcsr": 1 << 32})


def test_with_field_of_misspelt_name_names_a_close_one() -> None:
    with pytest.raises(FormatError, match=r"cs\.attrib"):
        Vmsa().with_field("cs.atrib", 0)


@pytest.mark.parametrize(("name", "value"), [("rip", b""), ("cs", 1), ("fpreg_x87", 1)])
def test_with_field_of_wrong_kind_is_format_error(name: str, value: int | bytes) -> None:
    with pytest.raises(FormatError, match="takes"):
        Vmsa().with_field(name, value)


def test_with_field_of_wide_part_names_it_in_full() -> None:
    with pytest.raises(FormatError, match=r"cs\.attrib 0x10000"):
        Vmsa().with_field("cs.attrib", 0x10000)


def test_get_of_dotted_name_is_the_part() -> None:
    assert Vmsa(cs=Segment(base=7)).get("cs.base") == 7


@pytest.mark.parametrize(
    ("offset", "name"),
    [
        (0x000, "es.selector"),
        (0x012, "cs.attrib"),
        (0x017, "cs.limit"),
        (0x01F, "cs.base"),
        (0x0C8, "reserved_0xc8"),
        (0x178, "rip"),
        (0x17F, "rip"),
        (0x2E7, "spec_ctrl"),
        (0x2F0, "guest_tsc_scale"),
        (0x320, "reserved_0x320"),
        (0x66F, "fpreg_ymm"),
        (0x670, "reserved_0x670"),
        (0xFFF, "reserved_0x670"),
    ],
)
def test_field_at_offset_is_its_name(offset: int, name: str) -> None:
    assert field_at(offset) == name


@pytest.mark.parametrize("offset", [-1, 4096])
def test_field_at_outside_page_is_format_error(offset: int) -> None:
    with pytest.raises(FormatError, match="outside"):
        field_at(offset)


def test_diff_of_equal_is_empty() -> None:
    assert diff(Vmsa(rip=1), Vmsa(rip=1)) == []


def test_diff_of_segment_names_the_part() -> None:
    a, b = Vmsa(cs=Segment(0xF000, 0x9A)), Vmsa(cs=Segment(0xF000, 0x9B))
    assert diff(a, b) == [FieldDiff("cs.attrib", 0x12, 0x9A, 0x9B)]


def test_diff_of_reserved_bytes_names_the_gap() -> None:
    found = diff(Vmsa(reserved=((0x700, b"\x01"),)), Vmsa(reserved=((0x702, b"\x02"),)))
    assert found == [FieldDiff("reserved_0x670", 0x700, b"\x01\0\0", b"\0\0\x02")]


def test_diff_is_in_order_of_the_page() -> None:
    a = Vmsa(rip=1, es=Segment(base=1), reserved=((0xC8, b"\x01"),))
    assert [d.name for d in diff(a, Vmsa())] == ["es.base", "reserved_0xc8", "rip"]


def test_diff_line_shows_both_values_in_hex() -> None:
    assert str(diff(Vmsa(rip=16), Vmsa())[0]) == "rip (offset 0x178): 0x10 != 0x0"


@given(PAGES, PAGES)
def test_diff_is_empty_only_for_equal_pages(a: bytes, b: bytes) -> None:
    assert (diff(Vmsa.decode(a), Vmsa.decode(b)) == []) == (a == b)


@pytest.mark.parametrize(
    ("name", "bit"),
    # snp-firmware-abi.md 3.1
    [
        ("snp_active", 0),
        ("vtom", 1),
        ("reflect_vc", 2),
        ("restricted_injection", 3),
        ("alternate_injection", 4),
        ("debug_swap", 5),
        ("prevent_host_ibs", 6),
        ("btb_isolation", 7),
        ("vmpl_sss", 8),
        ("secure_tsc", 9),
        ("vmgexit_parameter", 10),
        ("pmc_virtualization", 11),
        ("ibs_virtualization", 12),
        ("guest_intercept_control", 13),
        ("vmsa_reg_prot", 14),
        ("smt_protection", 15),
        ("secure_avic", 16),
        ("ibpb_on_entry", 21),
    ],
)
def test_sev_features_bit_is_that_of_the_reference(name: str, bit: int) -> None:
    assert SEV_FEATURES[name] == bit


def test_describe_sev_features_names_set_bits() -> None:
    assert describe_sev_features(1 | 1 << 5 | 1 << 40) == [
        "bit 0 snp_active",
        "bit 5 debug_swap",
        "bit 40 reserved",
    ]


def test_vmsa_with_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="no field 'rpi'"):
        Vmsa(rpi=1)


def test_vmsas_are_equal_when_all_their_bytes_are() -> None:
    one, other = Vmsa(rip=1), Vmsa(cs=Segment(), rip=1)
    assert (one == other, hash(one) == hash(other)) == (True, True)
    assert Vmsa(rip=1) != Vmsa(rip=2)
    assert Vmsa(reserved=((0x700, b"\x01"),)) != Vmsa()
    assert Vmsa() != Vmsa().encode()
