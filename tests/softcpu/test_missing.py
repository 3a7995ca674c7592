"""Without unicorn: the package can be imported, a machine can't be made."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
sys.modules["unicorn"] = None
import kvmlaunch.softcpu as softcpu
from kvmlaunch.errors import MissingCapability
assert "unicorn" in sys.modules and sys.modules["unicorn"] is None
try:
    softcpu.Machine(None, softcpu.CpuOptions(snp=True))
except MissingCapability as error:
    print(error)
"""


def test_machine_when_unicorn_is_missing_names_the_install_command() -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=30, check=False
    )
    assert run.stderr == ""
    assert run.stdout == (
        "this host lacks unicorn, needed for the software CPU (pip install 'kvmlaunch[softcpu]')\n"
    )
