"""Enumerations behave as those of `enum`: each test holds one against the other."""

from __future__ import annotations

import copy
import enum
import json
import pickle
from collections.abc import Callable, Collection
from typing import Any

import pytest

from kvmlaunch.abi.enums import IntEnum, StrEnum


class OurNumber(IntEnum):
    ONE = 1
    """A docstring is no member."""
    TWO = 2

    @property
    def even(self) -> bool:
        return self in (OurNumber.TWO,)


class TheirNumber(enum.IntEnum):
    ONE = 1
    TWO = 2

    @property
    def even(self) -> bool:
        return self in (TheirNumber.TWO,)


class OurText(StrEnum):
    SYNC = "sync"
    PAGE = "page"


class TheirText(str, enum.Enum):
    SYNC = "sync"
    PAGE = "page"

    def __str__(self) -> str:  # as enum.StrEnum, which is new in Python 3.11, has it
        return self.value


PAIRS = ((OurNumber, TheirNumber, 2), (OurText, TheirText, "page"))


def outcome(call: Callable[[Any, Any], Any], kind: Any, value: object) -> Any:
    try:
        return call(kind, value)
    except Exception as error:
        return type(error), str(error).replace("Their", "Our")


@pytest.mark.parametrize(("ours", "theirs", "value"), PAIRS)
@pytest.mark.parametrize(
    "call",
    [
        lambda kind, value: kind(value).name,
        lambda kind, value: kind(value).value,
        lambda kind, value: type(kind(value).value),
        lambda kind, value: kind(kind(value)) is kind(value),
        lambda kind, value: kind(value) == value,
        lambda kind, value: value == kind(value),
        lambda kind, value: hash(kind(value)) == hash(kind(kind(value))),
        lambda kind, value: {kind(value): 1}[value],
        lambda kind, value: isinstance(kind(value), type(value)),
        lambda kind, value: isinstance(kind(value), kind),
        lambda kind, value: kind(3),
        lambda kind, value: kind("x"),
        lambda kind, value: kind([1]),
        lambda kind, value: kind["ONE"].value,
        lambda kind, value: kind["SYNC"].value,
        lambda kind, value: kind["one"],
        lambda kind, value: list(kind.__members__),
        lambda kind, value: [member.name for member in kind],
        lambda kind, value: [member.name for member in reversed(kind)],
        lambda kind, value: [member in kind for member in kind],
        lambda kind, value: isinstance(kind, Collection),
        lambda kind, value: len(kind),
        lambda kind, value: bool(kind),
        lambda kind, value: f"{kind(value)}",
        lambda kind, value: f"{kind(value):>6}",
        lambda kind, value: f"{kind(value)!r}".replace("Their", "Our"),
        lambda kind, value: json.dumps(kind(value)),
        lambda kind, value: copy.copy(kind(value)) is kind(value),
        lambda kind, value: copy.deepcopy([kind(value)])[0] is kind(value),
        lambda kind, value: pickle.loads(pickle.dumps(kind(value))) is kind(value),
        lambda kind, value: kind(value) + value,
        lambda kind, value: type(kind(value) + value),
        lambda kind, value: kind(value).even,
        lambda kind, value: setattr(kind(value), "value", 1),
        lambda kind, value: sorted(kind, reverse=True)[0].name,
    ],
)
def test_enumeration_answers_as_the_standard_library_has_it(
    ours: type, theirs: type, value: object, call: Callable[[Any, Any], Any]
) -> None:
    found, expected = outcome(call, ours, value), outcome(call, theirs, value)
    if isinstance(expected, tuple) and expected[0] is AttributeError:
        found, expected = found[0], expected[0]
    assert found == expected


@pytest.mark.parametrize("kind", [OurNumber, OurText])
def test_str_of_a_member_is_that_of_its_value(kind: Any) -> None:
    # As enum has it since Python 3.11.
    assert [str(member) for member in kind] == [str(member.value) for member in kind]


def test_member_that_is_assigned_is_refused() -> None:
    with pytest.raises(AttributeError, match="cannot reassign member 'ONE'"):
        OurNumber.ONE = 3  # type: ignore[misc, assignment]
    with pytest.raises(AttributeError, match="cannot delete member 'ONE'"):
        del OurNumber.ONE
    assert OurNumber.ONE == 1


def test_value_in_an_enumeration_is_found() -> None:
    # As enum has it since Python 3.12.
    assert 2 in OurNumber
    assert 3 not in OurNumber
