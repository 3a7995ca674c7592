"""Records behave as frozen dataclasses do: each test holds one against the other."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from types import MappingProxyType
from typing import Any

import pytest

from kvmlaunch.abi.record import Record


class Ours(Record, unshown=("hidden",), unhashed=("extra",)):
    a: int
    b: str = "b"
    hidden: bytes = b""
    extra: Any = MappingProxyType({})

    def __post_init__(self) -> None:
        if self.a < 0:
            raise ValueError("a")


@dataclasses.dataclass(frozen=True)
class Theirs:
    a: int
    b: str = "b"
    hidden: bytes = dataclasses.field(default=b"", repr=False)
    extra: Any = dataclasses.field(default_factory=lambda: MappingProxyType({}), hash=False)

    def __post_init__(self) -> None:
        if self.a < 0:
            raise ValueError("a")


class Named(Record, kw_only=True):
    a: int = 1
    b: int = 2


class OursMore(Ours, kw_only=True, unshown=("more",)):
    more: int = 0
    a: int


@dataclasses.dataclass(frozen=True)
class TheirsMore(Theirs):
    more: int = dataclasses.field(default=0, repr=False, kw_only=True)
    a: int


@pytest.mark.parametrize(
    "make",
    [
        lambda kind: kind(1),
        lambda kind: kind(1, "x", b"y"),
        lambda kind: kind(a=1, extra={2: 3}),
        lambda kind: kind(1, extra={2: 3}, b="x"),
    ],
)
def test_record_when_made_shows_and_hashes_as_a_dataclass(make: Any) -> None:
    ours, theirs = make(Ours), make(Theirs)
    assert vars(ours) == vars(theirs)
    assert repr(ours).replace("Ours", "Theirs") == repr(theirs)
    assert hash(ours) == hash(theirs)


def test_records_when_equal_are_of_one_class_and_equal_fields() -> None:
    assert Ours(1) == Ours(1, "b")
    assert Ours(1) != Ours(2)
    assert Ours(1, hidden=b"x") != Ours(1)
    assert Ours(1) != Theirs(1)


@pytest.mark.parametrize(
    ("arguments", "named", "error"),
    [
        ((), {}, "Ours needs a value for a"),
        ((1,), {"c": 2}, "Ours has no field c"),
        ((), {"z": 1, "c": 2}, "Ours has no field c, z"),
        ((1, "2", b"3", {}, 5), {}, "Ours takes 4 values without a name, and each field once"),
        ((1,), {"a": 1}, "Ours takes 4 values without a name, and each field once"),
    ],
)
def test_record_when_its_arguments_do_not_fit_is_refused(
    arguments: Any, named: Any, error: str
) -> None:
    with pytest.raises(TypeError, match=f"^{error}$"):
        Ours(*arguments, **named)
    with pytest.raises(TypeError):
        Theirs(*arguments, **named)


def test_record_when_fields_are_given_by_name_only_takes_no_other() -> None:
    assert Named(b=3) == Named(a=1, b=3)
    with pytest.raises(TypeError, match=r"^Named takes 0 values without a name"):
        Named(1)  # type: ignore[misc]


def test_record_when_checked_refuses_values_also_in_a_copy() -> None:
    with pytest.raises(ValueError, match=r"^a$"):
        Ours(-1)
    with pytest.raises(ValueError, match=r"^a$"):
        Ours(1).replace(a=-1)
    with pytest.raises(ValueError, match=r"^a$"):
        dataclasses.replace(Ours(1), a=-1)


def test_record_when_changed_says_that_it_is_frozen() -> None:
    record: Any = Ours(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.a = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        del record.a
    assert record == Ours(1)


def test_record_when_copied_is_equal() -> None:
    record = Ours(1, extra={})
    assert record.replace(b="c") == Ours(1, "c", extra={})
    assert copy.deepcopy(record) == copy.copy(record) == record
    assert pickle.loads(pickle.dumps(record)) == record
    # What copy.replace() of Python 3.13 calls.
    assert Ours(1).__replace__(b="c") == Ours(1, "c")


def test_record_when_dataclasses_ask_is_a_dataclass() -> None:
    assert dataclasses.is_dataclass(Ours)
    assert dataclasses.replace(Ours(1), b="c") == Ours(1, "c")
    assert dataclasses.asdict(Ours(1, extra={})) == dataclasses.asdict(Theirs(1, extra={}))
    for ours, theirs in zip(dataclasses.fields(Ours), dataclasses.fields(Theirs), strict=True):
        assert (ours.name, ours.type, ours.repr, ours.hash, ours.init, ours.kw_only) == (
            *(theirs.name, theirs.type, theirs.repr, theirs.hash, theirs.init, theirs.kw_only),
        )
    assert [f.name for f in dataclasses.fields(Named())] == ["a", "b"]


def test_record_when_matched_gives_its_fields_in_their_order() -> None:
    assert Ours.__match_args__ == Theirs.__match_args__  # type: ignore[attr-defined]
    assert Named.__match_args__ == ()  # type: ignore[attr-defined]
    match Ours(1, "x"):
        case Ours(a, b):
            assert (a, b) == (1, "x")
        case _:
            pytest.fail("no match")


@pytest.mark.parametrize("named", [{}, {"more": 5, "extra": {2: 3}}])
def test_record_when_derived_from_another_has_its_fields(named: Any) -> None:
    ours, theirs = OursMore(1, "x", **named), TheirsMore(1, "x", **named)
    assert vars(ours) == vars(theirs)
    assert repr(ours).replace("Ours", "Theirs") == repr(theirs)
    assert hash(ours) == hash(theirs)
    assert OursMore.__match_args__ == TheirsMore.__match_args__  # type: ignore[attr-defined]
    assert ours.replace(b="b") == OursMore(1, **named) != Ours(1)
    with pytest.raises(ValueError, match=r"^a$"):
        OursMore(-1)
    with pytest.raises(TypeError, match=r"^OursMore takes 4 values without a name"):
        OursMore(1, "x", b"", {}, 5)  # type: ignore[misc]
    for kind in (Ours, OursMore):
        assert {f.name for f in dataclasses.fields(kind)} == vars(kind(1)).keys()


def test_record_when_a_dataclass_is_derived_from_it_stays_one() -> None:
    @dataclasses.dataclass(frozen=True)
    class Mixed(Ours):
        more: int = 0

    mixed = Mixed(1, "x", more=5)
    assert vars(mixed) == {**vars(Ours(1, "x")), "more": 5}
    assert mixed.replace(more=6) == Mixed(1, "x", more=6) != mixed
    with pytest.raises(ValueError, match=r"^a$"):
        Mixed(-1)
    with pytest.raises(TypeError, match="frozen"):
        dataclasses.dataclass(type("Thawed", (Ours,), {}))
    assert not dataclasses.is_dataclass(Record)
    assert [f.name for f in dataclasses.fields(Ours)] == ["a", "b", "hidden", "extra"]


def test_record_when_made_imports_no_dataclasses() -> None:
    program = (
        "import sys; from kvmlaunch.abi.vmsa import Vmsa, Segment\n"
        "Vmsa(cs=Segment(1)).with_field('cs.base', 5).replace(rip=1)\n"
        "print('dataclasses' in sys.modules)"
    )
    words = [sys.executable, "-S", "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == "False\n"
