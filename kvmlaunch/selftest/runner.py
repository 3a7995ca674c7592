"""Runs cases one after the other and tells each result at once."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Sequence

from kvmlaunch.errors import FormatError, IoctlError, KvmLaunchError, MissingCapability
from kvmlaunch.selftest.case import REGISTRY, Case, Failure, Skip, Spec
from kvmlaunch.selftest.host import Host
from kvmlaunch.selftest.result import Report, Result, Verdict
from kvmlaunch.uapi import Platform, Proposal

__all__ = ["conduct", "exit_code", "run", "run_one", "select"]

# Exit codes of kselftest (kselftest.h): KSFT_PASS, KSFT_FAIL, KSFT_SKIP.
PASSED = 0
FAILED = 1
ALL_SKIPPED = 4

_RISK = "a kernel with a known bug may crash here; --risky runs it"


def select(patterns: Sequence[str] = ()) -> list[Spec]:
    """The cases whose name matches one of the globs; all without one.

    Raises FormatError for a pattern that matches none.
    """
    import kvmlaunch.selftest.cases  # noqa: F401 - registers them

    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(spec.name, pattern) for spec in REGISTRY):
            raise FormatError(f"no case's name matches {pattern!r}: see --list")
    if not patterns:
        return list(REGISTRY)
    return [
        spec
        for spec in REGISTRY
        if any(fnmatch.fnmatchcase(spec.name, pattern) for pattern in patterns)
    ]


def conduct(
    platform: Platform,
    specs: Sequence[Spec],
    report: Report,
    *,
    proposal: Proposal | None = None,
    risky: bool = False,
) -> int:
    """Run the cases on a platform and report as they go; the exit code.

    A host without SNP is a run that is skipped as a whole. Raises IoctlError where the host's
    devices may not be used.
    """
    try:
        host = Host(platform, proposal=proposal, risky=risky)
    except MissingCapability as error:
        report.skip_all(str(error))
        return ALL_SKIPPED
    except IoctlError as error:
        if not error.no_device:
            raise
        report.skip_all(str(error).splitlines()[0])
        return ALL_SKIPPED
    verdicts: Counter[Verdict] = Counter()
    with host:
        report.begin(host, len(specs))
        for result in run(specs, host):
            verdicts[result.verdict] += 1
            report.result(result)
    report.end(verdicts)
    return exit_code(verdicts)


def run(specs: Sequence[Spec], host: Host) -> Iterator[Result]:
    """Run the cases in their order; a result as soon as each is over."""
    for spec in specs:
        yield run_one(spec, host)


def run_one(spec: Spec, host: Host) -> Result:
    """Run one case and close what it opened."""
    if spec.may_crash and not host.risky:
        return Result(spec, Verdict.SKIP, _RISK, (), 0)
    running = Case(host)
    with running.stack:
        verdict, reason = _verdict(spec, running)
    return Result(spec, verdict, reason, tuple(running.notes), running.checks)


def _verdict(spec: Spec, running: Case) -> tuple[Verdict, str]:
    try:
        spec.function(running)
    except Failure as failure:
        return Verdict.FAIL, str(failure)
    except (Skip, MissingCapability) as reason:
        return Verdict.SKIP, str(reason)
    except KvmLaunchError as error:
        return Verdict.ERROR, str(error).splitlines()[0]
    except Exception as error:  # the run goes on: the other cases have VMs of their own
        return Verdict.ERROR, f"{type(error).__name__}: {error}"
    if not running.checks:
        return Verdict.ERROR, "checked nothing"
    return Verdict.PASS, ""


def exit_code(verdicts: Counter[Verdict]) -> int:
    """The exit code of a run: 0 all well, 1 something failed or broke, 4 all skipped."""
    if verdicts[Verdict.FAIL] or verdicts[Verdict.ERROR]:
        return FAILED
    return PASSED if verdicts[Verdict.PASS] else ALL_SKIPPED
