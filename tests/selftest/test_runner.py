"""The runner and its output, over cases of the tests' own."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator

import pytest

from kvmlaunch.errors import FormatError, IoctlError, MissingCapability
from kvmlaunch.kvm import Kvm
from kvmlaunch.selftest import Host, Json, Ktap, Spec, Verdict, conduct, run_one, select
from kvmlaunch.selftest.answer import MARK, Answer
from kvmlaunch.selftest.case import Case, Skip
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import PROPOSAL_VARIABLE, Proposal, Result

EIO, EINVAL, EFAULT = 5, 22, 14


@pytest.fixture
def host() -> Iterator[Host]:
    with SimPlatform("6.12") as platform, Host(platform) as opened:
        yield opened


def passes(t: Case) -> None:
    t.note("a note\nof two lines")
    t.expect(True, "never said")


def fails(t: Case) -> None:
    t.equal("answer", 41, 42)


def skips(t: Case) -> None:
    t.skip("nothing of that kind here")


def checks_nothing(t: Case) -> None:
    pass


def breaks(t: Case) -> None:
    raise IoctlError("KVM_CREATE_VM", EINVAL, explanation="Something else.")


def crashes(t: Case) -> None:
    raise ValueError("of ours")


def lacks(t: Case) -> None:
    raise MissingCapability("a thing", "this")


def spec(function: Callable[[Case], None], *, may_crash: bool = False) -> Spec:
    return Spec(function.__name__.replace("_", "-"), "about it", function, may_crash)


def ktap(*functions: Callable[[Case], None], nested: bool = False) -> tuple[int, list[str]]:
    out = io.StringIO()
    environment = {"KSFT_TAP_LEVEL": "1"} if nested else {}
    with SimPlatform("6.12") as platform:
        report = Ktap(out, environment)
        code = conduct(platform, [spec(function) for function in functions], report)
    return code, out.getvalue().splitlines()


# KTAP


def test_ktap_when_cases_end_in_each_way_has_a_line_for_each() -> None:
    code, lines = ktap(passes, fails, skips, checks_nothing, breaks, crashes, lacks)
    assert lines[:2] == ["TAP version 13", "1..7"]
    assert lines[2].startswith("# kvmlaunch ")
    assert lines[3:] == [
        "# platform: sim (6.12)",
        "# a note of two lines",
        "ok 1 passes",
        "# answer: expected 0x2a, got 0x29",
        "not ok 2 fails",
        "ok 3 skips # SKIP nothing of that kind here",
        "# checked nothing",
        "not ok 4 checks-nothing # ERROR",
        "# KVM_CREATE_VM ret=-22 (EINVAL: Invalid argument)",
        "not ok 5 breaks # ERROR",
        "# ValueError: of ours",
        "not ok 6 crashes # ERROR",
        "ok 7 lacks # SKIP this host lacks a thing, needed for this",
        "# Totals: pass:1 fail:1 xfail:0 xpass:0 skip:2 error:3",
    ]
    assert code == 1


def test_ktap_when_nested_leaves_the_version_line_to_the_harness() -> None:
    """kselftest.h: ksft_print_header() prints none where KSFT_TAP_LEVEL is set, whatever it is."""
    alone, nested = ktap(passes)[1], ktap(passes, nested=True)[1]
    assert nested == alone[1:]
    assert nested[0] == "1..1"


@pytest.mark.parametrize(
    ("functions", "code"),
    [
        ([passes, passes], 0),
        ([passes, skips], 0),
        ([skips, lacks], 4),
        ([passes, fails], 1),
        ([skips, fails], 1),
        ([passes, checks_nothing], 1),
        ([skips, breaks], 1),
    ],
)
def test_exit_code_when_cases_end_so_is(functions: list[Callable[[Case], None]], code: int) -> None:
    assert ktap(*functions)[0] == code


def test_ktap_when_a_name_or_reason_has_several_lines_stays_one_line() -> None:
    def several(t: Case) -> None:
        raise Skip("one\n  two\nthree")

    assert ktap(several)[1][-2] == "ok 1 several # SKIP one two three"


class Unbuffered(io.StringIO):
    """Remembers what was there at each flush."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed: list[str] = []

    def flush(self) -> None:
        self.flushed.append(self.getvalue())


def test_ktap_when_a_line_is_written_is_flushed_at_once() -> None:
    out = Unbuffered()
    with SimPlatform("6.12") as platform:
        conduct(platform, [spec(passes), spec(fails)], Ktap(out, {}))
    assert [text.count("\n") for text in out.flushed] == list(range(1, len(out.flushed) + 1))
    assert out.flushed[-1] == out.getvalue()


# A host without SNP


class Without:
    """A platform whose devices can't be opened."""

    name, profile = "kvm", ""

    def __init__(self, code: int) -> None:
        self._code = code

    def open(self, path: str, flags: int) -> Result:
        return Result(-1, self._code)


@pytest.mark.parametrize("code", [2, 6, 19])  # ENOENT, ENXIO, ENODEV
def test_run_when_there_is_no_device_is_skipped_as_a_whole(code: int) -> None:
    out = io.StringIO()
    assert conduct(Without(code), [spec(passes)], Ktap(out, {})) == 4  # type: ignore[arg-type]
    version, plan = out.getvalue().splitlines()
    assert version == "TAP version 13"
    assert plan.startswith(f"1..0 # SKIP open /dev/kvm ret=-{code} ")


def test_run_when_the_device_may_not_be_opened_is_an_error() -> None:
    with pytest.raises(IoctlError, match="EACCES"):
        conduct(Without(13), [spec(passes)], Ktap(io.StringIO(), {}))  # type: ignore[arg-type]


def test_run_when_a_call_of_the_host_fails_so_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Kvm) -> bool:
        raise IoctlError("KVM_CHECK_EXTENSION", 6)

    monkeypatch.setattr(Kvm, "supports_snp", fail)
    with SimPlatform("6.12") as platform, pytest.raises(IoctlError, match="ENXIO"):
        conduct(platform, [spec(passes)], Ktap(io.StringIO(), {}))


def test_run_when_the_host_has_no_snp_is_skipped_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvmlaunch.kvm.Kvm.supports_snp", lambda self: False)
    out = io.StringIO()
    with SimPlatform("6.12") as platform:
        assert conduct(platform, [spec(passes)], Json(out)) == 4
        assert platform.open_fds == ()
    (event,) = map(json.loads, out.getvalue().splitlines())
    assert event["schema"] == "kvmlaunch.selftest/1"
    assert event["reason"].startswith("this host lacks SEV-SNP")


# JSON


def test_json_when_cases_run_has_header_cases_and_totals() -> None:
    out = io.StringIO()
    with SimPlatform("6.18") as platform:
        conduct(platform, [spec(passes), spec(skips)], Json(out))
    header, first, second, totals = map(json.loads, out.getvalue().splitlines())
    assert header["schema"] == "kvmlaunch.selftest/1"
    assert (header["platform"], header["profile"], header["cases"]) == ("sim", "6.18", 2)
    assert first == {
        "event": "case",
        "number": 1,
        "name": "passes",
        "about": "about it",
        "result": "pass",
        "reason": "",
        "checks": 1,
        "notes": ["a note\nof two lines"],
    }
    assert (second["result"], second["reason"]) == ("skip", "nothing of that kind here")
    assert totals == {"event": "totals", "pass": 1, "fail": 0, "skip": 1, "error": 0}


# One case


def test_case_when_it_may_crash_runs_on_a_real_host_only_if_asked(host: Host) -> None:
    risky = spec(passes, may_crash=True)
    assert run_one(risky, host).verdict is Verdict.PASS
    host.risky = False
    result = run_one(risky, host)
    assert (result.verdict, result.checks) == (Verdict.SKIP, 0)
    assert "--risky" in result.reason


@pytest.mark.parametrize(("name", "asked", "risky"), [("kvm", False, False), ("kvm", True, True)])
def test_host_when_it_is_real_is_not_risked_unasked(
    monkeypatch: pytest.MonkeyPatch, name: str, asked: bool, risky: bool
) -> None:
    monkeypatch.setattr(SimPlatform, "name", name)
    with SimPlatform("6.12") as platform, Host(platform, risky=asked) as host:
        assert host.risky is risky


def test_host_when_no_numbers_are_given_takes_those_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(PROPOSAL_VARIABLE, "DIRECT_VMSA=250")
    with SimPlatform("6.12") as platform:
        with Host(platform) as host:
            assert host.proposal == Proposal(direct_vmsa=250)
        with Host(platform, proposal=Proposal()) as host:
            assert host.proposal == Proposal()


def test_case_when_it_ends_leaves_nothing_open() -> None:
    with SimPlatform("direct-vmsa") as platform:
        with Host(platform) as host:
            before = platform.open_fds
            for one in select(["*.taken", "vmsa.s*", "r8*"]):
                run_one(one, host)
                assert platform.open_fds == before
        assert platform.open_fds == ()


def refusal(answer: Answer, **expected: object) -> str:
    """What `refused` says of an answer; nothing if it is content."""
    running = Case(None)  # type: ignore[arg-type]
    try:
        running.refused(answer, "EIO", **expected)  # type: ignore[arg-type]
    except Exception as failure:
        return str(failure)
    return ""


@pytest.mark.parametrize(
    ("answer", "fw", "said"),
    [
        (Answer("X", EIO, MARK), None, ""),
        (Answer("X", EIO, 7), 7, ""),
        (Answer("X", 0, MARK), None, "X: expected errno EIO, got success"),
        (Answer("X", EINVAL, MARK), None, "X: expected errno EIO, got errno EINVAL"),
        (
            Answer("X", EIO, 0),
            None,
            "X: expected the firmware word untouched, got errno EIO, firmware code 0",
        ),
        (
            Answer("X", EIO, 7),
            11,
            "X: expected errno EIO, firmware code 11, got errno EIO, firmware code 7",
        ),
        (Answer("X", EIO, MARK), 0, "X: expected errno EIO, firmware code 0, got errno EIO"),
    ],
)
def test_refusal_when_it_differs_is_told_in_one_sentence(
    answer: Answer, fw: int | None, said: str
) -> None:
    assert refusal(answer, fw=fw) == said


def test_difference_when_no_kernel_is_known_to_do_that_fails() -> None:
    running = Case(None)  # type: ignore[arg-type]
    question = "UPDATE with len 0"
    assert running.one_of(Answer("X", 0, MARK), question)
    assert not running.one_of(Answer("X", EINVAL, MARK), question)
    assert running.notes == [
        "UPDATE with len 0: success (6.11 to 6.17)",
        "UPDATE with len 0: errno EINVAL (6.18 and later)",
    ]
    with pytest.raises(Exception, match="X: expected success or errno EINVAL, got errno EFAULT"):
        running.one_of(Answer("X", EFAULT, MARK), question)
    with pytest.raises(Exception, match="got errno EINVAL, firmware code 1"):
        running.one_of(Answer("X", EINVAL, 1), question)


# Which cases


def test_names_when_listed_are_unique_and_said_in_a_sentence() -> None:
    specs = select()
    assert len({one.name for one in specs}) == len(specs)
    for one in specs:
        assert one.about
        assert not one.about.endswith(".")
        assert "#" not in one.name + one.about
        assert "{" not in one.name + one.about


def test_filter_when_globs_match_keeps_the_order_and_takes_each_once() -> None:
    names = [one.name for one in select(["start.*", "init2.t*", "init2.taken"])]
    assert names[:2] == ["init2.taken", "init2.twice"]
    assert names[2:] == [one.name for one in select(["start.*"])]


def test_filter_when_nothing_matches_is_one_sentence() -> None:
    with pytest.raises(FormatError, match=r"^no case's name matches 'nothing\*': see --list$"):
        select(["init2.*", "nothing*"])


@pytest.mark.parametrize("kind", ["normal", "zero", "unmeasured", "secrets", "cpuid"])
def test_cases_when_listed_cover_each_page_type(kind: str) -> None:
    of_type = {one.name.split(".")[2] for one in select([f"update.{kind}.*"])}
    common = {"taken", "len-unaligned", "flags", "twice", "shared", "partial", "sev-fd"}
    assert common | {"after-finish"} <= of_type


def test_cases_when_listed_cover_the_proposal() -> None:
    names = [one.name for one in select()]
    rows = [*(f"vmsa.c{n}" for n in range(1, 7)), *(f"vmsa.u{n}" for n in range(1, 6))]
    rows += [*(f"vmsa.s{n}" for n in range(1, 11)), "vmsa.d1", "vmsa.d2", "golden"]
    # R3 is golden, R9 all refusals.
    rows += [f"r{n}" for n in (1, 2, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15)]
    assert [
        row for row in rows if not any(n.startswith((f"{row}-", f"{row}.")) for n in names)
    ] == []
