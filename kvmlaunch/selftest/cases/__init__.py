"""The cases, a module per command; importing this registers them in the order in which they run."""

from __future__ import annotations

from kvmlaunch.selftest.cases import command, init2, start, update, finish  # isort: skip

__all__ = ["command", "finish", "init2", "start", "update"]
