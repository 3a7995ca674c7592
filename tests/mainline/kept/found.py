"""Scripts that hypothesis found, each once a difference: name -> (script, orders)."""

from __future__ import annotations

from tests.mainline.script import Script

__all__ = ["FOUND"]

FOUND: dict[str, tuple[Script, tuple[str, ...]]] = {}
