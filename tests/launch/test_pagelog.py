"""The page log: schema kvmlaunch.log/1."""

from __future__ import annotations

import errno
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvmlaunch.abi.page import PageType
from kvmlaunch.errors import FirmwareError
from kvmlaunch.images import LaunchPlan
from kvmlaunch.launch import pagelog
from kvmlaunch.launch.measure import measure, page_records
from kvmlaunch.launch.pagelog import NullLog, PageLog, open_log
from kvmlaunch.launch.records import PageRecord, RecordBatch
from kvmlaunch.launch.session import Session
from kvmlaunch.sim import SimPlatform
from kvmlaunch.version import __version__
from tests.cli.command import events

from .rig import (
    Playback,
    Scripted,
    io_out,
    map_gpa,
    out_and_exit,
    plain_exit,
    small_plan,
    system_event,
)

ZEROS = "0" * 96


def session_log(
    tmp_path: Path,
    *scripts: Scripted,
    faults: tuple[str, ...] = (),
    ioctls: bool = False,
    launch_plan: LaunchPlan | None = None,
) -> list[dict[str, Any]]:
    """Events of a launch, and of a run where there are scripts."""
    path = tmp_path / "log"
    with SimPlatform("6.18", faults=faults) as host, PageLog(str(path)) as log:
        platform = Playback(host, dict(enumerate(scripts)))
        with Session(launch_plan or small_plan(), platform, log=log, ioctls=ioctls) as session:
            session.launch()
            if scripts:
                session.run(lambda text: None, timeout=20)
    return events(path)


def of_kind(found: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in found if event["event"] == kind]


# Schema


def test_log_when_a_guest_is_launched_has_events_in_order(tmp_path: Path) -> None:
    kinds = [event["event"] for event in session_log(tmp_path)]
    assert kinds == ["header", *["page"] * 6, "vmsa", "finish"]


def test_header_when_written_says_what_is_launched_and_where(tmp_path: Path) -> None:
    assert session_log(tmp_path)[0] == {
        "event": "header",
        "schema": "kvmlaunch.log/1",
        "platform": "sim",
        "profile": "6.18",
        "image": "test.bin",
        "sha256": hashlib.sha256(b"test").hexdigest(),
        "policy": "0x30000",
        "vmsa_mode": "sync",
        "version": __version__,
    }


def test_header_when_the_image_is_large_has_the_hash_of_all_of_it(tmp_path: Path) -> None:
    image = bytes(range(251)) * ((9 << 20) // 251)  # no part of a power of two is as another
    with PageLog(str(tmp_path / "log")) as log:
        plan = replace(small_plan(), data=memoryview(image))
        log.header(plan, platform="sim", profile="6.12", vmsa_mode="sync")
    assert events(tmp_path / "log")[0]["sha256"] == hashlib.sha256(image).hexdigest()


def test_pages_when_written_spell_types_as_the_schema_does(tmp_path: Path) -> None:
    found = session_log(tmp_path)
    assert [event["type"] for event in found[1:-1]] == [
        *["NORMAL", "NORMAL", "ZERO", "SECRETS", "CPUID", "UNMEASURED"],
        "VMSA",
    ]


def test_page_when_written_has_the_fields_of_the_schema_in_order(tmp_path: Path) -> None:
    page = session_log(tmp_path)[1]
    assert list(page) == [
        *["event", "seq", "gpa", "type", "contents", "digest", "origin", "label"],
    ]
    assert (page["seq"], page["gpa"], page["label"]) == (0, "0x1000", "image")
    assert page["contents"] == hashlib.sha384(b"a" * 4096).hexdigest()


def test_vmsa_when_written_has_the_fields_of_the_schema_in_order(tmp_path: Path) -> None:
    vmsa = session_log(tmp_path)[-2]
    assert list(vmsa) == [
        *["event", "seq", "vcpu", "gpa", "type", "contents", "digest", "origin"],
    ]
    assert (vmsa["vcpu"], vmsa["gpa"], vmsa["origin"]) == (0, "0xfffffffff000", "kvm-sync")


@pytest.mark.parametrize("type_", ["ZERO", "SECRETS", "CPUID", "UNMEASURED"])
def test_contents_when_firmware_measures_none_are_96_zeros(tmp_path: Path, type_: str) -> None:
    (page,) = [e for e in session_log(tmp_path) if e.get("type") == type_]
    assert page["contents"] == ZEROS


def test_digests_when_written_are_96_lower_case_hex_digits(tmp_path: Path) -> None:
    for event in session_log(tmp_path)[1:]:
        assert len(event["digest"]) == 96
        assert set(event["digest"]) <= set("0123456789abcdef")


def test_finish_when_written_has_the_last_digest_and_the_number_of_pages(tmp_path: Path) -> None:
    *_, vmsa, finish = session_log(tmp_path)
    assert finish == {
        "event": "finish",
        "digest": vmsa["digest"],
        "pages": 7,
        "predicted": True,
        "host_agrees": True,
    }


def test_finish_when_nobody_was_asked_does_not_say_whether_the_host_agrees(
    tmp_path: Path,
) -> None:
    path = tmp_path / "log"
    with PageLog(str(path)) as log:
        log.finish(bytes(48), 0)
    assert events(path) == [{"event": "finish", "digest": ZEROS, "pages": 0, "predicted": True}]


def test_log_when_measured_has_the_same_pages_as_when_launched(tmp_path: Path) -> None:
    path = tmp_path / "measured"
    with PageLog(str(path)) as log:
        for record in page_records(small_plan()):
            log.record(record)
    assert events(path) == session_log(tmp_path)[1:-1]


def test_log_when_the_launch_fails_has_the_pages_done(tmp_path: Path) -> None:
    with pytest.raises(FirmwareError):
        session_log(tmp_path, faults=("SNP_LAUNCH_UPDATE:fw=0x1a@3+",))
    assert [event["event"] for event in events(tmp_path / "log")] == ["header", "page", "page"]


def test_names_when_they_are_not_ascii_are_written_as_json(tmp_path: Path) -> None:
    name = 'kärnel "1"\n.elf'
    found = session_log(tmp_path, launch_plan=replace(small_plan(), image=name))
    assert found[0]["image"] == name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"type": PageType.VMSA, "vcpu": 2},
        {"type": PageType.VMSA, "vcpu": None},
        {"origin": 'k\u00e4rnel "1"\n\\+0x0', "label": "\x7f\u2028"},
        {"seq": 0, "gpa": 0, "type": PageType.CPUID},
        {"gpa": 0xFFFFFFFFF000, "seq": 1 << 40},
    ],
)
def test_record_when_written_is_its_event_as_json(changes: dict[str, Any], tmp_path: Path) -> None:
    normal = PageRecord(3, 0x1000, PageType.NORMAL, b"\1" * 48, b"\2" * 48, "a.bin+0x0", "image")
    record, path = replace(normal, **changes), tmp_path / "log"
    with PageLog(str(path)) as log:
        log.record(record)
    expected = json.dumps(record.to_event(), separators=(",", ":"))
    assert path.read_text("ascii") == expected + "\n"


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"origins": (("a", None, 2), ("b", 0, 1))},
        {"origins": (("b.elf", (1 << 32) - 4096, 2), ("", 0x123, 1))},
        {"origins": (('k\u00e4rnel "1"\n\\%s+', 0xFFF, 3),), "label": "\x7f\u2028\0 %d"},
        {"type": PageType.UNMEASURED, "seq": (1 << 64) - 3, "gpa": (1 << 64) - (3 << 12)},
        {"type": PageType.SECRETS, "seq": 9, "gpa": 0},
        {"type": PageType.VMSA, "vcpu": 1},
    ],
)
def test_batch_when_written_is_the_events_of_its_records_as_json(
    native: bool, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native and not pagelog._NATIVE:
        pytest.skip("the hashing extension isn't built")
    monkeypatch.setattr(pagelog, "_NATIVE", native)
    found = bytes(range(256)) + bytes(32)
    batch = RecordBatch(3, 0x1000, PageType.NORMAL, found, (("a.bin", 0, 3),), "image")
    batch, path = replace(batch, **changes), tmp_path / "log"
    with PageLog(str(path)) as log:
        log.records(batch)
    lines = [json.dumps(record.to_event(), separators=(",", ":")) for record in batch.records]
    assert path.read_text("ascii").split("\n") == [*lines, ""]
    assert len(lines) == len(batch) == 3


def test_records_when_a_batch_is_taken_apart_are_its_pages() -> None:
    found = bytes(n for n in range(6) for _ in range(48))
    origins = (("a.bin", 0xF00, 2), ("zeros", None, 1))
    batch = RecordBatch(7, 0x5000, PageType.NORMAL, found, origins, "image")
    assert batch.records == [
        PageRecord(7, 0x5000, PageType.NORMAL, b"\0" * 48, b"\1" * 48, "a.bin+0xf00", "image"),
        PageRecord(8, 0x6000, PageType.NORMAL, b"\2" * 48, b"\3" * 48, "a.bin+0x1f00", "image"),
        PageRecord(9, 0x7000, PageType.NORMAL, b"\4" * 48, b"\5" * 48, "zeros", "image"),
    ]
    assert batch.digest == b"\5" * 48


# Exits and calls


def test_exits_when_the_guest_runs_are_written(tmp_path: Path) -> None:
    def script(run: Any) -> Any:
        yield map_gpa(run, 0x3000, 1, private=False)
        yield system_event(run, 6, 0x021100)

    assert of_kind(session_log(tmp_path, script), "exit") == [
        {
            "event": "exit",
            "vcpu": 0,
            "reason": "KVM_EXIT_HYPERCALL",
            "detail": "KVM_EXIT_HYPERCALL MAP_GPA_RANGE gpa=0x3000 pages=1 to=shared",
        },
        {
            "event": "exit",
            "vcpu": 0,
            "reason": "KVM_EXIT_SYSTEM_EVENT",
            "detail": "KVM_EXIT_SYSTEM_EVENT SEV_TERM data=['0x21100']",
        },
    ]


def test_exits_when_they_are_console_output_are_not_written(tmp_path: Path) -> None:
    found = of_kind(session_log(tmp_path, out_and_exit(b"text\n")), "exit")
    assert [event["detail"].split()[2] for event in found] == ["port=0xf4"]


def test_exit_when_its_number_is_unknown_is_named(tmp_path: Path) -> None:
    def script(run: Any) -> Any:
        yield plain_exit(run, 999)

    (event,) = of_kind(session_log(tmp_path, script), "exit")
    assert event["reason"] == "KVM_EXIT_999"


def test_exit_when_written_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with PageLog(str(path)) as log:
        log.exit(1, "KVM_EXIT_HLT", "KVM_EXIT_HLT")
        assert events(path)[-1]["vcpu"] == 1


def test_calls_when_not_asked_for_are_not_written(tmp_path: Path) -> None:
    assert of_kind(session_log(tmp_path), "ioctl") == []


def test_calls_when_asked_for_are_written_with_their_result(tmp_path: Path) -> None:
    calls = of_kind(session_log(tmp_path, ioctls=True), "ioctl")
    updates = [call for call in calls if call["name"] == "KVM_SEV_SNP_LAUNCH_UPDATE"]
    assert [list(call)[:6] for call in updates] == [
        ["event", "name", "ret", "errno", "fw_error", "ns"]
    ] * 5
    assert {(call["ret"], call["errno"], call["fw_error"]) for call in updates} == {(0, 0, 0)}


def test_calls_when_they_have_no_firmware_word_have_no_such_field(tmp_path: Path) -> None:
    calls = of_kind(session_log(tmp_path, ioctls=True), "ioctl")
    (created,) = [call for call in calls if call["name"] == "KVM_CREATE_VM"]
    assert "fw_error" not in created


def test_calls_when_one_fails_show_errno_and_firmware_word(tmp_path: Path) -> None:
    with pytest.raises(FirmwareError):
        session_log(tmp_path, faults=("SNP_LAUNCH_FINISH:fw=0x0b",), ioctls=True)
    last = [c for c in events(tmp_path / "log") if c.get("name") == "KVM_SEV_SNP_LAUNCH_FINISH"]
    assert [(c["ret"], c["errno"], c["fw_error"]) for c in last] == [(-1, errno.EIO, 11)]


def test_calls_when_written_stand_before_the_pages_that_they_measured(tmp_path: Path) -> None:
    found = session_log(tmp_path, ioctls=True)
    names = [event.get("name", event["event"]) for event in found]
    start = names.index("KVM_SEV_SNP_LAUNCH_UPDATE")
    assert names[start + 1 : start + 3] == ["page", "page"]


# Whole lines


def test_log_when_each_step_is_done_is_on_disk(tmp_path: Path) -> None:
    """What a crash in the next step would leave: all pages of the steps before."""
    path = tmp_path / "log"
    seen: list[int] = []

    class Watching(SimPlatform):
        def ioctl(self, fd: int, request: int, arg: int = 0) -> Any:
            seen.append(path.read_bytes().count(b'"event":"page"'))
            return super().ioctl(fd, request, arg)

    with (
        Watching() as host,
        PageLog(str(path)) as log,
        Session(small_plan(), host, log=log) as session,
    ):
        session.launch()
    # Two pages in the first step, then one in each, all before SNP_LAUNCH_FINISH.
    assert sorted(set(seen)) == [0, 2, 3, 4, 5, 6]


def test_log_when_the_file_exists_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("old\n" * 1000)
    with PageLog(str(path)) as log:
        log.write({"event": "x"})
    assert path.read_text() == '{"event":"x"}\n'


# Standard output, and none


def test_log_when_the_path_is_a_dash_goes_to_standard_output(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with PageLog("-") as log:
        log.finish(measure(small_plan()).digest, 7)
    assert json.loads(capfd.readouterr().out)["pages"] == 7


def test_log_when_on_standard_output_leaves_it_open(capfd: pytest.CaptureFixture[str]) -> None:
    PageLog("-").close()
    print("still open")
    assert capfd.readouterr().out == "still open\n"


def test_open_log_when_there_is_no_path_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with open_log(None) as log, SimPlatform() as host:
        assert isinstance(log, NullLog)
        with Session(small_plan(), host, log=log, ioctls=True) as session:
            session.launch()
    assert capfd.readouterr() == ("", "")


def test_open_log_when_there_is_a_path_is_a_page_log(tmp_path: Path) -> None:
    with open_log(str(tmp_path / "log")) as log:
        assert isinstance(log, PageLog)


def test_session_when_records_are_watched_gets_each_once(tmp_path: Path) -> None:
    seen: list[int] = []
    with SimPlatform() as host, Session(small_plan(vcpus=2), host) as session:
        session.on_record = lambda record: seen.append(record.seq)
        session.launch()
    assert seen == list(range(8))


def test_session_when_exits_are_watched_gets_each_once() -> None:
    def script(run: Any) -> Any:
        yield io_out(run, 0xF4, b"\0")

    seen: list[int] = []
    with SimPlatform() as host, Session(small_plan(), Playback(host, {0: script})) as session:
        session.on_exit = lambda vcpu, exit_: seen.append(vcpu)
        session.launch()
        session.run(print, timeout=20)
    assert seen == [0]
