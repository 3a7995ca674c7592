"""Enumerations as `enum` makes them, for what every short command needs.

To import `enum`, and all that it needs, takes longer than to measure firmware. Here members are
what a class names in capitals, there are no aliases, and none is an `enum.Enum`. enums.pyi tells
type checkers that the classes are those of `enum`.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

__all__ = ["IntEnum", "StrEnum"]


class _Enumeration(type):
    """An enumeration is called with a value and indexed by a name; it is a collection."""

    __members__: dict[str, Any]
    _by_value: dict[object, Any]

    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> _Enumeration:
        made = super().__new__(cls, name, bases, body)
        members = {}
        for key in body:
            if key.isupper():
                members[key] = member = made.__new__(made, body[key])
                member._name, member._value = key, body[key]
                setattr(made, key, member)
        made.__members__ = members
        made._by_value = {member._value: member for member in members.values()}
        return made

    def __call__(cls, value: object) -> Any:
        try:
            return cls._by_value[value]
        except (KeyError, TypeError):  # what can't be hashed is no value
            raise ValueError(f"{value!r} is not a valid {cls.__qualname__}") from None

    def __getitem__(cls, name: str) -> Any:
        return cls.__members__[name]

    def __iter__(cls) -> Iterator[Any]:
        return iter(cls.__members__.values())

    def __reversed__(cls) -> Iterator[Any]:
        return reversed(cls.__members__.values())

    def __contains__(cls, value: object) -> bool:
        return value in cls._by_value

    def __len__(cls) -> int:
        return len(cls.__members__)

    def __setattr__(cls, name: str, value: object) -> None:
        if name in vars(cls).get("__members__", ()):
            raise AttributeError(f"cannot reassign member {name!r}")
        super().__setattr__(name, value)

    def __delattr__(cls, name: str) -> None:
        if name in cls.__members__:
            raise AttributeError(f"cannot delete member {name!r}")
        super().__delattr__(name)


class _Member:
    """What a member has beside its value; it is printed as that, and shown by name."""

    _name: str
    _value: Any

    @property
    def name(self) -> str:
        return self._name

    @property
    def value(self) -> Any:
        return self._value

    def __str__(self) -> str:
        return str(self._value)

    def __repr__(self) -> str:
        return f"<{type(self).__qualname__}.{self._name}: {self._value!r}>"

    def __reduce_ex__(self, protocol: object) -> tuple[type, tuple[Any]]:
        return type(self), (self._value,)


class IntEnum(_Member, int, metaclass=_Enumeration):
    """Base of an enumeration whose members are integers."""


class StrEnum(_Member, str, metaclass=_Enumeration):
    """Base of an enumeration whose members are texts."""
