"""The conformance cases on a real kernel: on an SNP host, or on mainline's code in emulation."""

from __future__ import annotations

import pytest

from kvmlaunch.selftest import Host, Spec, Verdict, run_one, select
from kvmlaunch.uapi import RealPlatform
from tests.mainline.fake import FakeHost


@pytest.mark.parametrize("spec", select(), ids=lambda spec: spec.name)
def test_case_when_it_is_run_here_passes(real_snp: RealPlatform, spec: Spec) -> None:
    # The machine's kernel has the fixes, and is thrown away afterwards.
    with Host(real_snp, risky=isinstance(real_snp, FakeHost)) as host:
        result = run_one(spec, host)
    if result.verdict is Verdict.SKIP:
        pytest.skip(result.reason)
    assert result.verdict is Verdict.PASS, result.reason
