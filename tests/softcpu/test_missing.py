"""Without unicorn: the package can be imported, a machine can't be made."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
{prepare}
import kvmlaunch.softcpu as softcpu
from kvmlaunch.errors import MissingCapability
try:
    softcpu.Machine(None, softcpu.CpuOptions(snp=True))
except MissingCapability as error:
    print(error)
"""


@pytest.mark.parametrize(
    "prepare",
    ['sys.modules["unicorn"] = None', 'import unicorn; unicorn.__version__ = "2.1.2"'],
    ids=["missing", "old"],
)
def test_machine_when_unicorn_is_not_there_names_the_install_command(prepare: str) -> None:
    if "import" in prepare:
        pytest.importorskip("unicorn", reason="unicorn isn't there to be called old")
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(prepare=prepare)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert run.stderr == ""
    assert run.stdout == (
        "this host lacks unicorn 2.1.3 or newer, needed for the software CPU "
        + "(pip install 'kvmlaunch[softcpu]')\n"
    )
