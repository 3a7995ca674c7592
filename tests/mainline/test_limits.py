"""What isn't compared is named, and nothing beside it is left out."""

from __future__ import annotations

from tests.mainline.compare import difference
from tests.mainline.limits import COMMANDS, LIMITS, NOT_PLAYED, mask
from tests.mainline.script import ioctl

_XSAVE = [ioctl("vcpu0", "KVM_GET_XSAVE", {})]
_FPU = [ioctl("vcpu0", "KVM_GET_FPU", {})]


def outcome(**back: int) -> dict:
    return {"steps": [{"ret": 0, "back": {k.replace("_", "."): v for k, v in back.items()}}]}


def test_every_limit_has_a_reason():
    reasons = [limit.reason for limit in LIMITS] + [*COMMANDS.values(), *NOT_PLAYED.values()]
    assert all(len(reason) > 20 for reason in reasons)


def test_mxcsr_mask_is_left_out_of_xsave_only():
    assert difference(_XSAVE, (), outcome(region_7=1), outcome(region_7=2)) is None
    assert difference(_XSAVE, (), outcome(region_6=1), outcome(region_6=2)) is not None
    assert difference(_FPU, (), outcome(region_7=1), outcome(region_7=2)) is not None


def test_flushes_are_left_out_of_the_log_only():
    done = {"steps": [{"ret": 0}], "log": [["SNP_DF_FLUSH", 0], ["SNP_ACTIVATE", 0]]}
    assert mask(_FPU, done)["log"] == [["SNP_ACTIVATE", 0]]
    assert "log" not in mask(_FPU, {"steps": [{"ret": 0}]})
