"""Command lines that leave no doubt, read without argparse.

To import argparse, and to make a parser of so many options, takes longer than to measure
firmware. What fills argparse's parser fills a `QuickParser` as well, so that there is one table
of options. It takes only what is plain; abbreviations, errors, --help and the like are left to
argparse, which has the last word.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from typing import Any, TypeAlias

    Parser: TypeAlias = argparse.ArgumentParser | "QuickParser"
    Group: TypeAlias = argparse._ActionsContainer | "QuickParser" | "_Exclusive"

__all__ = ["QuickParser", "bad_argument"]


def bad_argument(text: str) -> Exception:
    """What the type of an option raises (to be raised by the caller)."""
    import argparse

    return argparse.ArgumentTypeError(text)


class QuickParser:
    """As much of argparse's parser, and of its groups, as `measure` has a use for."""

    def __init__(self) -> None:
        # Name of an option, or "" for the word without one: where its value goes, and how.
        self._options: dict[str, tuple[str, str, Callable[[str], Any] | None, Any]] = {}
        self._defaults: dict[str, Any] = {}
        self._exclusive: list[set[str]] = []

    def add_argument(
        self,
        *names: str,
        action: str = "store",
        nargs: str | None = None,
        default: Any = None,
        type: Callable[[str], Any] | None = None,
        choices: Sequence[str] | None = None,
        metavar: str | None = None,
        help: str | None = None,
    ) -> str:
        """An option, or the word beside them; returns where its value goes."""
        positional = not names[0].startswith("-")
        assert action in ("store", "store_true", "append")
        assert nargs == ("?" if positional else None)
        dest = names[-1].lstrip("-").replace("-", "_")
        for name in ("",) if positional else names:
            self._options[name] = (dest, action, type, choices)
        self._defaults[dest] = False if action == "store_true" else default
        return dest

    def add_argument_group(self, title: str) -> QuickParser:
        """A group, which only --help shows."""
        return self

    def add_mutually_exclusive_group(self) -> _Exclusive:
        """Options of which one may be given."""
        self._exclusive.append(set())
        return _Exclusive(self, self._exclusive[-1])

    def set_defaults(self, **values: Any) -> None:
        """Values that no option has to give."""
        self._defaults.update(values)

    def parse(self, words: Sequence[str]) -> Any:
        """The arguments as argparse gives them, or None where it has to be asked."""
        values = {
            dest: list(value) if isinstance(value, list) else value
            for dest, value in self._defaults.items()
        }
        given, rest = set(), iter(words)
        for word in rest:
            name, equals, text = word.partition("=")
            if not word.startswith("-"):
                name, equals, text = "", "=", word
            if name not in self._options or (not name and name in given):
                return None
            dest, action, convert, choices = self._options[name]
            given.add(dest if name else name)
            if action == "store_true":
                if equals:
                    return None
                values[dest] = True
                continue
            if not equals:
                text = next(rest, "")
                if text.startswith("-"):
                    return None
            try:
                value = text if convert is None else convert(text)
            except Exception:
                return None
            if not text or (choices is not None and value not in choices):
                return None
            if action == "append":
                values[dest].append(value)
            else:
                values[dest] = value
        if any(len(group & given) > 1 for group in self._exclusive):
            return None
        return _Arguments(values)


class _Arguments:
    """What argparse.Namespace is."""

    def __init__(self, values: dict[str, Any]) -> None:
        vars(self).update(values)


class _Exclusive:
    def __init__(self, parser: QuickParser, dests: set[str]) -> None:
        self._parser = parser
        self._dests = dests

    def add_argument(self, *names: str, **how: Any) -> None:
        self._dests.add(self._parser.add_argument(*names, **how))
