"""Programs of our own in the place of others'."""

from __future__ import annotations

from pathlib import Path


def stub(folder: Path, name: str, script: str) -> None:
    """A program ``name`` in ``folder`` that runs a shell script."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
