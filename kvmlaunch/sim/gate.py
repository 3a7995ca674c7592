"""Guest code runs only while nobody changes what it runs on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Gate"]


class Gate:
    """Many threads may be inside as runners, or one as the one who changes things.

    A change goes first: runners leave soon, and wait until it is done. Taken before the
    host's lock, never while that is held.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._runners: set[int] = set()
        self._waiting = 0
        self._owner: int | None = None
        self._depth = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Guest code may run here."""
        me = threading.get_ident()
        with self._changed:
            while self._waiting or self._owner is not None:
                self._changed.wait()
            self._runners.add(me)
        try:
            yield
        finally:
            with self._changed:
                self._runners.discard(me)
                self._changed.notify_all()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """No guest code runs here. Can be nested."""
        me = threading.get_ident()
        with self._changed:
            if self._owner != me:
                self._waiting += 1
                # A finalizer may come here out of the guest's own thread.
                while self._owner is not None or self._runners - {me}:
                    self._changed.wait()
                self._waiting -= 1
                self._owner = me
            self._depth += 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._owner = None
                    self._changed.notify_all()
