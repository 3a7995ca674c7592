"""The simulated host against mainline KVM's own SNP code, script by script.

The kernel runs in emulation over a fake secure processor (tests/mainline/kernel). Both must
answer each step alike, measure the same pages and VMSAs, and issue the same firmware commands.
What may differ is in limits.py. KVMLAUNCH_SEED chooses other random scripts,
KVMLAUNCH_EXAMPLES how many.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, seed, settings

from tests.mainline.compare import difference
from tests.mainline.kept import CASES, Case
from tests.mainline.script import Script
from tests.mainline.simulated import play_simulated
from tests.mainline.strategies import cases

_SEED = int(os.environ.get("KVMLAUNCH_SEED", "1"))
_EXAMPLES = int(os.environ.get("KVMLAUNCH_EXAMPLES", "300"))


@pytest.mark.parametrize("name", CASES)
def test_kernel_and_simulator_agree_when_case_is(machine, name):
    agree(machine, *CASES[name])


@pytest.mark.timeout(600)
@seed(_SEED)
@settings(
    max_examples=_EXAMPLES,
    database=None,
    deadline=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)
@given(case=cases())
def test_kernel_and_simulator_agree_when_script_is_random(machine, case: Case):
    agree(machine, *case)


def agree(machine, script: Script, orders: Sequence[str]) -> None:
    theirs = machine.ask({"play": script, "orders": list(orders)})
    # By way of JSON as well, so that tuples and keys are the same.
    ours = json.loads(json.dumps(play_simulated(script, orders)))
    found = difference(script, orders, theirs, ours)
    if found:
        pytest.fail(found, pytrace=False)
