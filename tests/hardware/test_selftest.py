"""The conformance cases on a real kernel: on an SNP host, or on mainline's code in emulation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvmlaunch.selftest import Host, Spec, Verdict, run_one, select
from tests.host import require_snp
from tests.mainline.fake import FakeHost


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """Opened once: what it offers doesn't change."""
    platform = require_snp()
    # The machine's kernel has the fixes, and is thrown away afterwards.
    with Host(platform, risky=isinstance(platform, FakeHost)) as opened:
        yield opened


@pytest.mark.parametrize("spec", select(), ids=lambda spec: spec.name)
def test_case_when_it_is_run_here_passes(host: Host, spec: Spec) -> None:
    if isinstance(host.platform, FakeHost):
        host.platform.begin(())  # or it tells what it measured of all guests so far, each time
    result = run_one(spec, host)
    if result.verdict is Verdict.SKIP:
        pytest.skip(result.reason)
    assert result.verdict is Verdict.PASS, result.reason
