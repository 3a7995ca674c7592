"""Rules of the simulated kernel, each broken once: what is changed, and which cases must notice."""

from __future__ import annotations
import __future__

import importlib
import inspect
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import pytest

SIM = "kvmlaunch.sim."


@dataclass(frozen=True)
class Mutant:
    """One rule: ``old`` in the source of a module of kvmlaunch.sim becomes ``new``.

    ``cases`` are globs, separated by spaces, of the cases that fail then, and no other;
    ``seconds``: how long a guest may take, where one waits in vain.
    """

    rule: str
    module: str
    old: str
    new: str
    cases: str
    profile: str = "6.12"
    seconds: float = 30.0

    def expected(self, names: Iterable[str]) -> set[str]:
        """The cases that fail."""
        globs = self.cases.split()
        return {name for name in names if any(fnmatchcase(name, glob) for glob in globs)}

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Change the code of the module's functions until the test is over."""
        module = importlib.import_module(SIM + self.module)
        source = inspect.getsource(module)
        assert source.count(self.old) == 1, f"{self.old!r} stands {source.count(self.old)} times"
        mutated = compile(
            source.replace(self.old, self.new),
            str(module.__file__),
            "exec",
            flags=__future__.annotations.compiler_flag,
            dont_inherit=True,
        )
        codes = dict(_codes(mutated, ""))
        changed = 0
        for name, function in _functions(module):
            if _differs(function.__code__, codes[name]):
                monkeypatch.setattr(function, "__code__", codes[name])
                changed += 1
        assert changed, f"nothing that runs is changed by {self.new!r}"


def _codes(code: types.CodeType, prefix: str) -> Iterator[tuple[str, types.CodeType]]:
    """Code objects of functions, by qualified name; those inside functions belong to them."""
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield prefix + const.co_name, const
            yield from _codes(const, f"{prefix}{const.co_name}.")


def _functions(module: types.ModuleType) -> Iterator[tuple[str, types.FunctionType]]:
    for owner, prefix in [(module, ""), *((c, f"{c.__name__}.") for c in _classes(module))]:
        for value in list(vars(owner).values()):
            function: Any = value
            if isinstance(value, property):
                function = value.fget
            elif isinstance(value, (staticmethod, classmethod)):
                function = value.__func__
            if not isinstance(function, types.FunctionType) or "<" in function.__qualname__:
                continue
            if function.__module__ == module.__name__:
                yield prefix + function.__name__, function


def _classes(module: types.ModuleType) -> Iterator[type]:
    for value in vars(module).values():
        if isinstance(value, type) and value.__module__ == module.__name__:
            yield value


def _differs(old: types.CodeType, new: types.CodeType) -> bool:
    return (old.co_code, old.co_consts, old.co_names) != (new.co_code, new.co_consts, new.co_names)
