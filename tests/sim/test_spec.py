"""``--sim PROFILE[,KEY=VALUE...]``."""

from __future__ import annotations

import pytest

from kvmlaunch.errors import FormatError
from kvmlaunch.platforms import open_platform
from kvmlaunch.sim.spec import SimSpec, parse_spec, with_profile


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("6.12", SimSpec("6.12", "Milan", 0)),
        ("7.0,seed=7", SimSpec("7.0", "Milan", 7)),
        ("6.12,debug-swap", SimSpec("6.12", "Milan", 0, debug_swap=True)),
        ("6.12,debug-swap,seed=2", SimSpec("6.12", "Milan", 2, debug_swap=True)),
        ("6.18,product=Turin,seed=0x10", SimSpec("6.18", "Turin", 16)),
    ],
)
def test_spec_when_well_written_is_taken(text, spec):
    assert parse_spec(text) == spec


KERNELS = "6.12, 6.18, 7.0, multi-vmpl, vmsa-page, direct-vmsa"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("5.15", f"no kernel profile is named '5.15'; known are {KERNELS}"),
        ("", f"no kernel profile is named ''; known are {KERNELS}"),
        ("seed=1", f"no kernel profile is named 'seed=1'; known are {KERNELS}"),
        (
            "6.12,speed=9",
            "'speed=9' is nothing that a simulated host has; known are product=..., seed=..., "
            "debug-swap",
        ),
        (
            "6.12,seed",
            "'seed' is nothing that a simulated host has; known are product=..., seed=..., "
            "debug-swap",
        ),
        ("6.12,seed=-1", "a seed is a number from 0 up, not '-1'"),
        ("6.12,seed=x", "a seed is a number from 0 up, not 'x'"),
        ("6.12,seed=1,seed=1", "seed of the simulated host is given twice"),
        ("6.12,debug-swap,debug-swap", "debug-swap of the simulated host is given twice"),
        ("6.12,product=Rome", "no CPU is named 'Rome'; known are Milan, Genoa, Turin"),
    ],
)
def test_spec_when_badly_written_is_one_sentence(text, sentence):
    with pytest.raises(FormatError) as info:
        parse_spec(text)
    assert str(info.value) == sentence


def test_platform_when_opened_by_a_spec_is_that_one():
    choice = open_platform("sim", profile="6.18,seed=4,product=Genoa")
    assert choice.platform.profile == "6.18"
    assert choice.why == "platform sim (6.18,seed=4,product=Genoa): a simulated host, as asked"


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("", "6.12"),
        ("seed=3", "6.12,seed=3"),
        ("debug-swap,seed=3", "6.12,debug-swap,seed=3"),
        ("7.0", "7.0"),
        ("7.0,product=Genoa", "7.0,product=Genoa"),
    ],
)
def test_spec_without_a_profile_gets_the_default_one(text, whole):
    assert with_profile(text, "6.12") == whole
