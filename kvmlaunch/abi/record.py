"""Frozen records, as @dataclass(frozen=True) makes them, for what every short command needs.

`dataclasses` imports `inspect` and compiles code for each class, which together takes several
times as long as measuring firmware. Here a class says nothing but its fields. To the functions
of `dataclasses` (`replace`, `fields`, ...) a record is a dataclass all the same; record.pyi says
so to type checkers.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from collections.abc import Mapping
    from dataclasses import Field
    from typing import Any

__all__ = ["Record", "read_only"]

read_only = type(vars(type))
"""`types.MappingProxyType`, a mapping that nobody changes, without the import of `types`."""


class _Fields:
    """``__dataclass_fields__`` of a record, made when somebody asks for it."""

    def __get__(self, record: object, kind: type[Record]) -> dict[str, Field[Any]]:
        import dataclasses

        def field(name: str) -> Any:
            named = name not in kind.__match_args__
            options: dict[str, Any] = {"repr": name not in kind._unshown, "kw_only": named}
            if name in kind._defaults:
                # As a factory, since a default may be one that dataclasses refuse as mutable.
                options["default_factory"] = lambda: kind._defaults[name]
            if name in kind._unhashed:
                options["hash"] = False
            return dataclasses.field(**options)

        fields = [(name, type_, field(name)) for name, type_ in kind._types.items()]
        made = dataclasses.make_dataclass(kind.__name__, fields, frozen=True)
        kind.__dataclass_params__ = made.__dataclass_params__
        kind.__dataclass_fields__ = made.__dataclass_fields__
        return kind.__dataclass_fields__


_FIELDS = _Fields()


class Record:
    """Base of a record, whose annotations are its fields; class attributes are their defaults.

    ``kw_only``: fields are given by name. ``unshown``: fields that `repr` leaves out;
    ``unhashed``: those that don't enter the hash. ``__post_init__`` may refuse values.
    A class derived from a record has that one's fields, and its own behind them.
    """

    __match_args__: tuple[str, ...] = ()
    _types: Mapping[str, Any] = {}
    _defaults: Mapping[str, Any] = {}
    _unshown: tuple[str, ...] = ()
    _unhashed: tuple[str, ...] = ()

    def __init_subclass__(
        cls,
        *,
        kw_only: bool = False,
        unshown: tuple[str, ...] = (),
        unhashed: tuple[str, ...] = (),
    ) -> None:
        own = cls.__annotations__
        if not kw_only:
            cls.__match_args__ += tuple(name for name in own if name not in cls._types)
        cls._types = {**cls._types, **own}
        given = {name: vars(cls)[name] for name in own if name in vars(cls)}
        cls._defaults = {**cls._defaults, **given}
        cls._unshown, cls._unhashed = cls._unshown + unshown, cls._unhashed + unhashed
        # Not Record's, which is no dataclass, nor that of the class this one is derived from.
        cls.__dataclass_fields__ = _FIELDS

    @classmethod
    def set_defaults(cls, defaults: Mapping[str, Any]) -> None:
        """Replace default values, where the class has something else in their place."""
        for name, value in defaults.items():
            setattr(cls, name, value)
        cls._defaults = {**cls._defaults, **defaults}

    def __init__(self, *values: Any, **named: Any) -> None:
        if not named and len(values) == len(self.__match_args__) == len(self._types):
            # All of them in order, as tables are made: in half the time.
            vars(self).update(zip(self.__match_args__, values, strict=True))
            self.__post_init__()
            return
        given = {**dict(zip(self.__match_args__, values, strict=False)), **named}
        fields = {**self._defaults, **given}
        if fields.keys() != self._types.keys() or len(given) < len(values) + len(named):
            raise TypeError(_misfit(self, fields))
        vars(self).update(fields)
        self.__post_init__()

    def __post_init__(self) -> None:
        """Nothing to refuse."""

    def replace(self, **changes: Any) -> Record:
        """A copy with other values in the named fields."""
        return type(self)(**{**vars(self), **changes})

    def __replace__(self, **changes: Any) -> Record:
        """What Python 3.13's copy.replace() calls."""
        return self.replace(**changes)

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other) if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        hashed = (name for name in self._types if name not in self._unhashed)
        return hash(tuple(getattr(self, name) for name in hashed))

    def __repr__(self) -> str:
        shown = (name for name in self._types if name not in self._unshown)
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
        return f"{type(self).__qualname__}({fields})"

    def __setattr__(self, name: str, value: object) -> None:
        self.__delattr__(name)

    def __delattr__(self, name: str) -> None:
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"{type(self).__name__}.{name} can't be changed")


def _misfit(record: Record, fields: dict[str, Any]) -> str:
    """What is wrong with the arguments of a record's constructor."""
    name = type(record).__name__
    if unknown := sorted(fields.keys() - record._types.keys()):
        return f"{name} has no field {', '.join(unknown)}"
    if missing := [field for field in record._types if field not in fields]:
        return f"{name} needs a value for {', '.join(missing)}"
    return f"{name} takes {len(record.__match_args__)} values without a name, and each field once"
