"""Prediction: records, and known answers of the fact sheet (snp-firmware-abi 1.4, 3.2)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest

from kvmlaunch.abi.digest import LaunchDigest
from kvmlaunch.abi.page import PageType
from kvmlaunch.errors import FormatError, KvmLaunchError
from kvmlaunch.hashing import backends
from kvmlaunch.hashing.plain import PlainHasher
from kvmlaunch.images import LaunchPlan, PageRange, Piece
from kvmlaunch.launch.measure import Measurement, Predictor, measure, page_records
from kvmlaunch.launch.records import PageRecord
from tests.abi import vectors

from .rig import PAGE, plan, reset_state, small_plan, step

ZERO_CONTENTS = bytes(48)

# SHA-384 of whole VMSA pages of QEMU's boot processor (snp-firmware-abi 3.2).
VMSA_HASHES = [
    (0x800F12, 0x1, "77920c4c629ff47e90c0e174fc1ad0eb6fa664f88cd4739488058a8c6cb1a77b"),
    (0x830F10, 0x1, "34f43cbd622a2c18c3e042a6d30358628c35d97690fb5d3566644b45b26f7c90"),
    (0xA00F11, 0x1, "728af287318db5f3fc4d2357a969483c4225956dc555b514a78d64ee372112d1"),
    (0xA10F10, 0x1, "7d39672d1b8a3e38353a8eef23af9a14a850be7b9c80bd29898aff5cd2386719"),
    (0xB00F00, 0x1, "49ddacf0393b6d9401ac505250ec615e923bc580ff6ce0a0b4c5f2e261b0a972"),
    (0x800F12, 0x21, "ae79efa6efbe1594a2717dfd42af495a0e4ed37b00e529a5fdf349bea04c3513"),
]
AP_HASH = "8413b852790765a310d95867a8b00bfca3a802b5a80830044b45e253fe962226"


def digests(launch_plan: LaunchPlan) -> list[str]:
    return [record.digest.hex() for record in page_records(launch_plan)]


def of_pages(steps: list[PageRange]) -> str:
    """The digest behind the last page that is no VMSA."""
    low = min(part.gpa for part in steps)
    high = max(part.end for part in steps)
    return digests(plan(steps, memory=[(low, high - low)]))[-2]


def of_content(type_: int, page: bytes | None) -> bytes | None:
    """Bytes only for types that take some."""
    return page if type_ in (1, 4) else None


SINGLES = {name: row for name, row in vectors.SINGLE_PAGE.items() if row[0] != 2}


@pytest.mark.parametrize("name", SINGLES)
def test_digest_when_one_page_is_launched_is_the_known_one(name: str) -> None:
    type_, gpa, page, expected = SINGLES[name]
    assert of_pages([step(gpa, [of_content(type_, page)], type_)]) == expected


@pytest.mark.parametrize("name", vectors.RANGES)
def test_digest_when_a_range_is_launched_is_the_known_one(name: str) -> None:
    type_, gpa, pages, expected = vectors.RANGES[name]
    assert of_pages([step(gpa, pages, type_)]) == expected


def v12_steps() -> list[PageRange]:
    rows = list(vectors.V12_STEPS.values())[:5]
    return [step(pages[0][0], [page for _, page in pages], type_) for type_, pages, _ in rows]


@pytest.mark.parametrize(("count", "name"), list(enumerate("abcde", 1)))
def test_digest_when_types_follow_each_other_is_the_known_one(count: int, name: str) -> None:
    """V12, step by step."""
    assert of_pages(v12_steps()[:count]) == vectors.V12_STEPS[name][2]


def v20_plan() -> LaunchPlan:
    steps = [
        step(0xFFFFF000, [vectors.COUNTING]),
        step(0x80D000, [None], 5),
        step(0x80E000, [None], 6),
    ]
    memory = [(0x80D000, 2 * PAGE), (0xFFFFF000, PAGE)]
    return plan(steps, memory=memory, state=reset_state(0xA00F11))


def test_digest_when_the_guest_is_minimal_is_the_known_one() -> None:
    """V20: pages, and the VMSA that KVM makes of QEMU's reset state."""
    assert measure(v20_plan()).digest.hex() == (
        "f346d8b9a336ee896c6bd741d21e4ef029b99a2440d1c2e1208034bc9cbca7c1"
        "671500e0bc0d00757e9157258f5fc3a7"
    )


def test_digests_when_the_guest_is_minimal_are_known_at_every_page() -> None:
    assert digests(v20_plan())[:3] == [row[3] for row in vectors.V20_PAGES]


@pytest.mark.parametrize(("signature", "features", "expected"), VMSA_HASHES)
def test_vmsa_contents_when_the_state_is_qemus_are_the_known_ones(
    signature: int, features: int, expected: str
) -> None:
    launch_plan = plan([step(0, [None])], state=reset_state(signature), sev_features=features)
    *_, record = page_records(launch_plan)
    assert record.contents.hex()[:64] == expected


def test_vmsa_contents_when_a_second_vcpu_starts_elsewhere_are_the_known_ones() -> None:
    launch_plan = plan([step(0, [None])])
    states = (reset_state(), reset_state(eip=0x80B004))
    *_, record = page_records(replace(launch_plan, vcpus=states))
    assert record.contents.hex()[:64] == AP_HASH


def test_vmsas_when_there_are_several_vcpus_come_last_in_their_order() -> None:
    records = list(page_records(small_plan(vcpus=3)))
    assert [record.vcpu for record in records] == [None] * 6 + [0, 1, 2]


def test_vmsas_when_kvm_makes_them_lie_at_the_gpa_that_kvm_chose() -> None:
    records = list(page_records(small_plan(vcpus=2)))
    assert [record.gpa for record in records[-2:]] == [0xFFFFFFFFF000] * 2


# Records


def test_records_when_taken_count_from_zero() -> None:
    assert [record.seq for record in page_records(small_plan())] == list(range(7))


def test_records_when_taken_name_gpa_and_type() -> None:
    records = list(page_records(small_plan()))
    assert [(record.gpa, record.type.name) for record in records[:-1]] == [
        (0x1000, "NORMAL"),
        (0x2000, "NORMAL"),
        (0x4000, "ZERO"),
        (0x5000, "SECRETS"),
        (0x6000, "CPUID"),
        (0x7000, "UNMEASURED"),
    ]


def test_records_when_a_file_holds_the_page_name_file_and_offset() -> None:
    records = list(page_records(small_plan()))
    assert [record.origin for record in records[:3]] == [
        "image.bin+0x0",
        "image.bin+0x1000",
        "kvmlaunch:zero",
    ]


def test_record_when_the_page_is_normal_has_its_sha384() -> None:
    first = next(page_records(small_plan()))
    assert first.contents == hashlib.sha384(b"a" * PAGE).digest()


@pytest.mark.parametrize("seq", [2, 3, 4, 5])
def test_record_when_firmware_measures_no_contents_has_zeros(seq: int) -> None:
    assert list(page_records(small_plan()))[seq].contents == ZERO_CONTENTS


def test_records_when_chained_follow_the_definition() -> None:
    """PAGE_INFO of 1.1, laid out here by hand."""
    digest = bytes(48)
    for record in page_records(small_plan()):
        tail = bytes([0x70, 0, record.type, 0, 0, 0, 0, 0]) + record.gpa.to_bytes(8, "little")
        digest = hashlib.sha384(digest + record.contents + tail).digest()
        assert record.digest == digest


def test_unmeasured_when_its_contents_change_keeps_the_digest() -> None:
    one = plan([step(0x2000, [b"1" * PAGE], 4)])
    two = plan([step(0x2000, [b"2" * PAGE], 4)])
    assert measure(one) == measure(two)


def test_unmeasured_when_its_gpa_changes_changes_the_digest() -> None:
    one = plan([step(0x2000, [b"1" * PAGE], 4)])
    two = plan([step(0x3000, [b"1" * PAGE], 4)])
    assert measure(one) != measure(two)


@pytest.mark.parametrize(
    "change",
    [
        {"policy": 0xB0000},
        {"host_data": b"h" * 32},
        {"id_block": bytes(96), "id_auth": bytes(4096)},
    ],
)
def test_digest_when_what_is_not_measured_changes_stays(change: dict[str, Any]) -> None:
    assert measure(replace(small_plan(), **change)) == measure(small_plan())


def test_digest_when_the_steps_change_places_changes() -> None:
    launch_plan = small_plan()
    swapped = replace(launch_plan, steps=launch_plan.steps[::-1])
    assert measure(swapped) != measure(launch_plan)


def test_digest_when_a_vcpu_is_added_changes() -> None:
    assert measure(small_plan(vcpus=2)) != measure(small_plan(vcpus=1))


def test_measurement_when_taken_counts_pages_and_vmsas() -> None:
    assert measure(small_plan(vcpus=2)).pages == 8


def test_measurement_when_shown_is_96_lower_case_hex_digits() -> None:
    text = str(Measurement(bytes(range(0xD0, 0x100)), 1))
    assert text == bytes(range(0xD0, 0x100)).hex()


@pytest.mark.parametrize("name", backends())
def test_measure_when_another_backend_hashes_gives_the_known_digest(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V20."""
    monkeypatch.setenv("KVMLAUNCH_HASH", name)
    assert measure(v20_plan()).digest.hex() == vectors.V20_WITH_VMSA


def scattered(sizes: list[tuple[int, int]], npages: int) -> LaunchPlan:
    """One range whose pieces are (bytes left out before, bytes)."""
    at, pieces = 0, []
    for gap, size in sizes:
        data = bytes(n * 31 + len(pieces) & 0xFF for n in range(size))
        pieces.append(Piece(at + gap, memoryview(data), f"file{len(pieces)}", 0x100))
        at += gap + size
    step_ = PageRange(0, npages * PAGE, PageType.NORMAL, "image", "zeros", tuple(pieces))
    return plan([step_], memory=((0, npages * PAGE),))


SCATTERED = [
    scattered([(0, 3 * PAGE)], 3),
    scattered([(100, 3 * PAGE)], 5),
    scattered([(PAGE - 1, 2 * PAGE), (1, 1), (5 * PAGE, PAGE)], 300),
    scattered([(0, 10)] + [(PAGE - 10, 10)] * 600, 601),
    scattered([(0, 600 * PAGE), (0, 7), (0, 600 * PAGE)], 1202),
    scattered([], 600),
]


@pytest.mark.parametrize("launch_plan", SCATTERED)
def test_measure_when_pages_lie_scattered_is_that_of_page_by_page(launch_plan: LaunchPlan) -> None:
    """Against the simple chain and pages put together by hand."""
    (step_,) = launch_plan.steps
    image = bytearray(step_.size)
    for piece in step_.pieces:
        image[piece.offset : piece.end] = piece.data
    digest, expected = LaunchDigest(), []
    for at in range(0, step_.size, PAGE):
        contents = digest.update(1, at, image[at : at + PAGE])
        expected.append((at // PAGE, at, contents, digest.value))
    records = [(r.seq, r.gpa, r.contents, r.digest) for r in page_records(launch_plan)]
    assert records[:-1] == expected
    assert measure(launch_plan) == Measurement(records[-1][3], len(records))


def test_records_when_pages_lie_scattered_name_each_pages_first_file() -> None:
    launch_plan = scattered([(PAGE - 1, 2 * PAGE), (1, 1), (5 * PAGE, PAGE)], 12)
    origins = [record.origin for record in page_records(launch_plan)]
    assert origins[:-1] == [
        *("file0+0x100", "file0+0x101", "file0+0x1101", "file1+0x100"),
        *["zeros"] * 4,
        *("file2+0x100", "file2+0x10ff", "zeros", "zeros"),
    ]


def test_measure_when_the_backend_is_unknown_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMLAUNCH_HASH", "abacus")
    with pytest.raises(KvmLaunchError, match="KVMLAUNCH_HASH=abacus"):
        measure(small_plan())


def test_measure_when_kvm_would_refuse_the_state_says_so() -> None:
    with pytest.raises(FormatError, match="dr7"):
        measure(plan([], state=reset_state().replace(dr7=0x401)))


def test_measure_when_there_are_no_pages_has_the_vmsas_only() -> None:
    assert measure(plan([], vcpus=2)).pages == 2


class Watched(PlainHasher):
    """Notes what it is given."""

    def __init__(self) -> None:
        self.given: list[tuple[Any, int]] = []

    def extend(self, *args: Any, **more: Any) -> bytes:
        self.given.append((args[3], args[4]))
        return super().extend(*args, **more)


def test_extend_when_one_piece_has_the_pages_hands_over_one_view_of_it() -> None:
    image = bytes(range(256)) * 16 * 16
    hasher = Watched()
    pieces = (Piece(0, memoryview(image), "image.bin"),)
    Predictor(hasher).extend(PageRange(0, len(image), PageType.NORMAL, "image", "", pieces))
    ((data, npages),) = hasher.given
    assert (data.obj, npages) == (image, 16)


# Predictor


def test_predictor_when_copied_goes_on_by_itself() -> None:
    first = Predictor()
    first.extend(step(0, [b"x" * PAGE]))
    before = first.digest
    first.copy().extend(step(0x1000, [b"y" * PAGE]))
    assert first.digest == before


def test_predictor_when_copied_starts_from_the_same_digest() -> None:
    first = Predictor()
    first.extend(step(0, [b"x" * PAGE]))
    assert (first.copy().digest, first.copy().pages) == (first.digest, 1)


def test_predictor_when_copied_hashes_in_the_same_way() -> None:
    hasher = Watched()
    Predictor(hasher).copy().extend(step(0, [b"x" * PAGE]))
    assert len(hasher.given) == 1


# Records as events


def record(**changes: Any) -> PageRecord:
    base = PageRecord(3, 0x1000, PageType.NORMAL, b"\1" * 48, b"\2" * 48, "a.bin+0x0", "image")
    return replace(base, **changes)


def test_event_when_the_record_is_a_page_has_the_fields_of_the_schema() -> None:
    assert record().to_event() == {
        "event": "page",
        "seq": 3,
        "gpa": "0x1000",
        "type": "NORMAL",
        "contents": "01" * 48,
        "digest": "02" * 48,
        "origin": "a.bin+0x0",
        "label": "image",
    }


def test_event_when_the_record_is_a_vmsa_names_the_vcpu_and_has_no_label() -> None:
    event = record(type=PageType.VMSA, vcpu=2, origin="kvm-sync", gpa=0xFFFFFFFFF000).to_event()
    assert event == {
        "event": "vmsa",
        "seq": 3,
        "vcpu": 2,
        "gpa": "0xfffffffff000",
        "type": "VMSA",
        "contents": "01" * 48,
        "digest": "02" * 48,
        "origin": "kvm-sync",
    }


def test_record_when_shown_has_gpa_type_label_and_origin() -> None:
    shown = str(record())
    assert all(part in shown for part in ("0x000000001000", "NORMAL", "image", "a.bin+0x0"))
