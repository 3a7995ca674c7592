"""Entry point of ``python -m kvmlaunch.cli``."""

from __future__ import annotations

import sys

from kvmlaunch.cli import main

if __name__ == "__main__":
    sys.exit(main())
