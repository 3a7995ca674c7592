"""Planted differences are found by launching prefixes: every kind, in every VMSA mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvmlaunch.abi.idblock_sign import Signer
from kvmlaunch.abi.page import PageType
from kvmlaunch.images import LaunchPlan, VmsaChoice
from kvmlaunch.images.plan import PageRange, Piece
from kvmlaunch.launch.bisect import Bisection, bisect, bisect_vmsas
from kvmlaunch.launch.measure import page_records
from kvmlaunch.launch.oracle import Answer, Oracle, Reply
from kvmlaunch.launch.verify import verify
from kvmlaunch.platforms import open_platform
from kvmlaunch.sim import SimPlatform
from kvmlaunch.uapi import Platform, Result, address_of, ffi, lib
from tests.launch.planted import (
    Change,
    OneMoreVcpu,
    OtherRegisters,
    Planted,
    Sent,
    clear_fpu,
    doubled,
    late,
    missing,
    other_content,
    other_gpa,
    other_type,
    set_register,
)
from tests.launch.rig import PAGE, Wrapped, plan, small_plan
from tests.launch.test_vmsa_mode import HALT, KERNEL, bl, load

FREE = 0x20000
# small_plan(): two NORMAL, then ZERO, SECRETS, CPUID, UNMEASURED.
GPAS = [0x1000, 0x2000, 0x4000, 0x5000, 0x6000, 0x7000]


def found(launch_plan: LaunchPlan, host: Platform, **keys: Any) -> Bisection:
    return bisect(launch_plan, Oracle(host, **keys))


def culprit(result: Bisection) -> tuple[int, str] | None:
    assert result.answer is Answer.DIFFERS
    return None if result.culprit is None else (result.culprit.gpa, result.culprit.type.name)


def at_gpa(launch_plan: LaunchPlan, gpa: int) -> tuple[int, str]:
    record = next(r for r in page_records(launch_plan) if r.gpa == gpa)
    return record.gpa, record.type.name


# Nothing planted


@pytest.mark.parametrize("mode", KERNEL)
def test_bisect_when_nothing_differs_is_right(mode: str) -> None:
    with SimPlatform(KERNEL[mode]) as platform:
        result = found(load(vcpus=2, vmsa_mode=mode), platform)
    assert (result.answer, result.culprit) == (Answer.RIGHT, None)
    assert result.launches == (4 if mode == "sync" else 3)


# Pages

EVERY = {
    "content": other_content,
    "type": lambda gpa: other_type(gpa, 4 if gpa != 0x7000 else 3),
    "gpa": lambda gpa: other_gpa(gpa, FREE),
    "missing": missing,
    "doubled": lambda gpa: doubled(gpa, FREE),
}


# Contents of other types aren't measured, and firmware takes one secrets page.
NOT_THERE = {("content", gpa) for gpa in GPAS[2:]} | {("doubled", 0x5000)}
PLANTED = [(kind, gpa) for kind in EVERY for gpa in GPAS if (kind, gpa) not in NOT_THERE]


@pytest.mark.parametrize(("kind", "gpa"), PLANTED)
def test_bisect_when_a_page_is_planted_finds_it(kind: str, gpa: int) -> None:
    launch_plan = small_plan(vcpus=2)
    with SimPlatform() as platform:
        result = found(launch_plan, Planted(platform, EVERY[kind](gpa)))
        assert platform.open_fds == ()
    assert culprit(result) == at_gpa(launch_plan, gpa)
    assert result.culprit in list(page_records(launch_plan))


@pytest.mark.parametrize("gpa", GPAS[:-1])
def test_bisect_when_two_pages_are_in_the_other_order_finds_the_first(gpa: int) -> None:
    launch_plan = small_plan()
    with SimPlatform() as platform:
        result = found(launch_plan, Planted(platform, late(gpa)))
    assert culprit(result) == at_gpa(launch_plan, gpa)


@pytest.mark.parametrize("nth", range(6))
def test_bisect_when_it_depends_on_the_pages_before_still_finds_the_first(nth: int) -> None:
    """The n-th page of every launch is another, whichever that is."""

    def make() -> Change:
        count = 0

        def change(page: Sent) -> list[Sent]:
            nonlocal count
            count += 1
            return [page._replace(gpa=FREE)] if count == nth + 1 else [page]

        return change

    launch_plan = small_plan()
    with SimPlatform() as platform:
        result = found(launch_plan, Planted(platform, make))
    assert result.culprit == list(page_records(launch_plan))[nth]


@pytest.mark.parametrize("wrong", range(1, 6))
def test_bisect_when_alone_every_page_is_right_still_finds_the_first(wrong: int) -> None:
    """A host that goes wrong only after pages enough, from the first one on."""

    def make() -> Change:
        seen: list[Sent] = []

        def change(page: Sent) -> list[Sent]:
            seen.append(page)
            late = seen[0].gpa == 0x1000 and len(seen) == wrong + 1
            return [page._replace(gpa=FREE)] if late else [page]

        return change

    launch_plan = small_plan()
    with SimPlatform() as platform:
        result = found(launch_plan, Planted(platform, make))
    assert result.culprit == list(page_records(launch_plan))[wrong]


@pytest.mark.parametrize("wrong", [4, 5])
def test_bisect_when_alone_a_page_is_wrong_that_else_is_right_finds_the_first(wrong: int) -> None:
    """A host that goes wrong wherever a launch doesn't begin with the plan's first page."""

    def make() -> Change:
        seen: list[Sent] = []

        def change(page: Sent) -> list[Sent]:
            seen.append(page)
            odd = page.gpa == GPAS[wrong] or (len(seen) == 1 and page.gpa != GPAS[0])
            return [page._replace(gpa=FREE)] if odd else [page]

        return change

    with SimPlatform() as platform:
        result = found(small_plan(), Planted(platform, make))
    assert culprit(result) == at_gpa(small_plan(), GPAS[wrong])


@pytest.mark.parametrize("keys", [{}, {"id_key": 1}, {"id_key": 1, "author_key": 1}])
def test_bisect_when_keys_sign_finds_the_same(keys: dict[str, int]) -> None:
    signers = {name: Signer.generate() for name in keys}
    with SimPlatform() as platform:
        result = found(small_plan(), Planted(platform, other_content(0x2000)), **signers)
    assert culprit(result) == (0x2000, "NORMAL")


def test_bisect_when_a_page_and_a_vmsa_differ_finds_the_page() -> None:
    with SimPlatform() as platform:
        host = OtherRegisters(platform, 0, lib.KVM_SET_REGS, set_register("rbx", 7))
        result = found(small_plan(), Planted(host, other_content(0x2000)))
    assert culprit(result) == (0x2000, "NORMAL")


# VMSAs that KVM makes


def sync_host(platform: Platform, vcpu: int, name: str, value: int) -> Platform:
    return OtherRegisters(platform, vcpu, lib.KVM_SET_REGS, set_register(name, value))


@pytest.mark.parametrize("vcpu", [0, 1, 2, 6])
def test_bisect_when_a_register_of_a_vcpu_differs_finds_the_vcpu(vcpu: int) -> None:
    with SimPlatform() as platform:
        result = found(small_plan(vcpus=7), sync_host(platform, vcpu, "rbx", 0x1234))
    assert result.culprit is not None
    assert (result.culprit.vcpu, result.culprit.type) == (vcpu, PageType.VMSA)
    assert str(result) == f"differs: VMSA of vCPU {vcpu}"
    # 0x1234 is nobody's default.
    assert result.fits is None


@pytest.mark.parametrize(
    ("name", "value", "change"),
    [
        ("rdx", 0x600, "rdx (offset 0x310): 0x800f12 predicted, 0x600 measured"),
        ("rdx", 0xA00F11, "rdx (offset 0x310): 0x800f12 predicted, 0xa00f11 measured"),
        ("rip", 0, "rip (offset 0x178): 0xfff0 predicted, 0x0 measured"),
    ],
)
def test_bisect_when_a_register_has_a_known_other_value_names_it(
    name: str, value: int, change: str
) -> None:
    with SimPlatform() as platform:
        result = found(small_plan(vcpus=2), sync_host(platform, 1, name, value))
    assert result.fits is not None
    assert result.fits.changes == (change,)


def test_bisect_when_kvm_sets_debug_swap_names_it() -> None:
    platform = open_platform("sim", profile="6.12,debug-swap").platform
    result = found(small_plan(vcpus=2), platform)
    assert (str(result), result.fits and result.fits.why) == (
        "differs: VMSA of vCPU 0",
        "SEV feature debug_swap is set",
    )
    assert result.fits is not None
    assert result.fits.changes == ("sev_features (offset 0x3b0): 0x1 predicted, 0x21 measured",)


@pytest.mark.parametrize("debug_swap", [False, True])
def test_bisect_when_kvm_leaves_out_the_fpu_names_it(debug_swap: bool) -> None:
    """As kernels before 6.10, which may also have set debug swap."""
    profile = "6.12,debug-swap" if debug_swap else "6.12"
    platform = open_platform("sim", profile=profile).platform
    result = found(small_plan(), OtherRegisters(platform, 0, lib.KVM_SET_XSAVE, clear_fpu))
    assert result.fits is not None
    assert "without FPU state" in result.fits.why
    names = [change.split(" ")[0] for change in result.fits.changes]
    assert names == [*(["sev_features"] if debug_swap else []), "mxcsr", "x87_fcw"]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_bisect_when_the_host_has_a_vcpu_more_says_so(after: int) -> None:
    with SimPlatform() as platform:
        result = found(small_plan(vcpus=3), OneMoreVcpu(platform, after))
        assert platform.open_fds == ()
    assert result.culprit is not None
    assert result.culprit.vcpu == after
    assert result.fits is not None
    assert result.fits.why == "the host measures one VMSA more behind it"
    assert len(result.fits.vmsas) == after + 2


class AfterPages(Wrapped):
    """RBX of vCPU 1 is 0x600 if pages have been launched: apart, all is right."""

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
        command = ffi.cast("struct kvm_sev_cmd *", arg)
        if request == lib.KVM_CREATE_VM:
            self.vcpus: list[int] = []
            self.pages = False
        elif request == lib.KVM_MEMORY_ENCRYPT_OP and arg:
            self.pages |= command.id == lib.KVM_SEV_SNP_LAUNCH_UPDATE
            if command.id == lib.KVM_SEV_SNP_LAUNCH_FINISH and self.pages:
                for vcpu in self.vcpus[1:2]:
                    regs = ffi.new("struct kvm_regs *")
                    super().ioctl(vcpu, lib.KVM_GET_REGS, address_of(regs))
                    regs.rbx = 0x600
                    super().ioctl(vcpu, lib.KVM_SET_REGS, address_of(regs))
        result = super().ioctl(fd, request, arg)
        if request == lib.KVM_CREATE_VCPU:
            self.vcpus.append(result.ret)
        return result


def test_bisect_when_a_vmsa_differs_only_behind_pages_finds_it() -> None:
    with SimPlatform() as platform:
        host = AfterPages(platform)
        result = found(small_plan(vcpus=3), host)
        assert verify(small_plan(vcpus=3), Oracle(host)).answer is Answer.DIFFERS
        short = bisect_vmsas(small_plan(vcpus=3), Oracle(host))
    assert str(result) == str(short) == "differs: VMSA of vCPU 1"
    # Nothing can be tried with the vCPUs alone, where all is right.
    assert result.fits is None
    assert result.launches <= 10


# VMSAs that the plan launches


@pytest.mark.parametrize("mode", ["page", "direct"])
@pytest.mark.parametrize(
    "make",
    [other_content, missing, lambda gpa: other_gpa(gpa, FREE)],
    ids=["content", "missing", "gpa"],
)
def test_bisect_when_a_vmsa_page_is_planted_finds_it(
    mode: str, make: Callable[[int], Callable[[], Change]]
) -> None:
    # Measured only, so that binding a page that isn't there doesn't fail first.
    launch_plan = load(HALT, bl(1, vcpu=None, gpa=0x9000), vcpus=2, vmsa_mode="direct")
    if mode == "page":
        launch_plan = load(vcpus=2, vmsa_mode="page")
    gpa = next(s.gpa for s in launch_plan.steps if s.type is PageType.VMSA)
    with SimPlatform(KERNEL[mode]) as platform:
        result = found(launch_plan, Planted(platform, make(gpa)))
    assert culprit(result) == (gpa, "VMSA")


@pytest.mark.parametrize("mode", ["page", "direct"])
def test_bisect_when_a_page_before_the_vmsa_is_planted_finds_it(mode: str) -> None:
    launch_plan = load(vcpus=2, vmsa_mode=mode)
    with SimPlatform(KERNEL[mode]) as platform:
        result = found(launch_plan, Planted(platform, other_content(0x1000)))
    assert culprit(result) == (0x1000, "NORMAL")


def test_bisect_when_two_direct_vmsas_differ_only_in_the_second_names_what_fits() -> None:
    launch_plan = load(HALT, VmsaChoice(0), VmsaChoice(1), vcpus=2, vmsa_mode="direct")
    gpa = launch_plan.bindings[1]

    def no_fpu() -> Change:
        def change(page: Any) -> list[Any]:
            if page.gpa != gpa:
                return [page]
            data = bytearray(page.data)
            data[0x408:0x40C] = bytes(4)  # MXCSR (APM volume 2, table B-4)
            data[0x410:0x412] = bytes(2)  # FCW
            return [page._replace(data=bytes(data))]

        return change

    with SimPlatform("direct-vmsa") as platform:
        result = found(launch_plan, Planted(platform, no_fpu))
    assert culprit(result) == (gpa, "VMSA")
    assert result.fits is not None
    assert "without FPU state" in result.fits.why


def test_bisect_when_with_vcpus_more_is_measured_says_so() -> None:
    """A plan in mode page on a kernel that doesn't take what it was given for a VMSA."""

    class MakesItsOwn(Planted):
        """Launches the page, and when there are vCPUs one that nobody asked for."""

        def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
            if request == lib.KVM_CREATE_VM:
                self.vcpus = 0
            if request == lib.KVM_CREATE_VCPU:
                self.vcpus += 1
            return super().ioctl(fd, request, arg)

    hosts: list[MakesItsOwn] = []

    def make() -> Change:
        def change(page: Sent) -> list[Sent]:
            more = [page._replace(gpa=FREE, type=3)] if hosts and hosts[0].vcpus else []
            return [page, *more] if page.gpa == 0x1000 else [page]

        return change

    with SimPlatform(KERNEL["page"]) as platform:
        hosts.append(MakesItsOwn(platform, make))
        result = found(load(vmsa_mode="page"), hosts[0])
    assert culprit(result) is None
    assert str(result) == (
        "differs: the pages are as predicted, but with vCPUs the host measures more than them"
    )


# What verify says in short


def test_bisect_vmsas_when_the_pages_differ_leaves_it_at_that() -> None:
    with SimPlatform() as platform:
        oracle = Oracle(Planted(platform, other_content(0x2000)))
        result = bisect_vmsas(small_plan(), oracle)
    assert str(result) == "differs: among the 6 pages that the plan launches"
    assert result.launches == 1


def test_bisect_vmsas_when_a_vmsa_differs_names_it() -> None:
    with SimPlatform() as platform:
        oracle = Oracle(sync_host(platform, 2, "rbx", 1))
        assert verify(small_plan(vcpus=4), oracle).answer is Answer.DIFFERS
        assert str(bisect_vmsas(small_plan(vcpus=4), oracle)) == "differs: VMSA of vCPU 2"


# Unexpected answers


@pytest.mark.parametrize("question", [2, 3, 4])
@pytest.mark.parametrize("fault", ["fw=7", "fw=0x1", "errno=EINVAL"])
def test_bisect_when_an_answer_is_unexpected_gives_up(question: int, fault: str) -> None:
    with SimPlatform(faults=[f"SNP_LAUNCH_FINISH:{fault}@{question}"]) as platform:
        result = found(small_plan(), Planted(platform, other_content(0x2000)))
    assert (result.answer, result.culprit, result.launches) == (Answer.UNKNOWN, None, question)
    assert "not expected" in str(result)


def test_bisect_when_everything_is_called_a_bad_measurement_blames_no_page() -> None:
    with SimPlatform(faults=["SNP_LAUNCH_FINISH:fw=0x0b@1+"]) as platform:
        result = found(small_plan(), platform)
    assert (result.answer, result.culprit, result.fits) == (Answer.DIFFERS, None, None)
    assert str(result) == "differs: the host measures something even where nothing is launched"


@pytest.mark.parametrize("vcpus", [1, 2])
def test_bisect_when_the_plan_has_no_pages_finds_the_vmsa(vcpus: int) -> None:
    with SimPlatform() as platform:
        assert found(plan([], vcpus=vcpus), platform).answer is Answer.RIGHT
        result = found(plan([], vcpus=vcpus), sync_host(platform, vcpus - 1, "rbx", 5))
    assert str(result) == f"differs: VMSA of vCPU {vcpus - 1}"


class Unasked(Planted):
    """Measures a page that nobody asked for, at each FINISH."""

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
        if request == lib.KVM_MEMORY_ENCRYPT_OP and arg:
            command = ffi.cast("struct kvm_sev_cmd *", arg)
            if command.id == lib.KVM_SEV_SNP_LAUNCH_FINISH:
                self._send(fd, command, Sent(FREE, 3, bytes(PAGE)))
        return super().ioctl(fd, request, arg)


@pytest.mark.parametrize("launch_plan", [plan([]), small_plan()])
def test_bisect_when_more_is_measured_than_asked_for_blames_no_page(
    launch_plan: LaunchPlan,
) -> None:
    with SimPlatform() as platform:
        host = Unasked(platform, lambda: lambda page: [page])
        result = found(launch_plan, host)
        assert verify(launch_plan, Oracle(host)).answer is Answer.DIFFERS
        short = bisect_vmsas(launch_plan, Oracle(host))
    assert culprit(result) is None
    assert str(result) == "differs: the host measures something even where nothing is launched"
    assert str(short) == (
        str(result)
        if not launch_plan.npages
        else "differs: among the 6 pages that the plan launches"
    )


# Size


def big(npages: int) -> LaunchPlan:
    """Pages that are all different."""
    data = b"".join(n.to_bytes(4, "little") * (PAGE // 4) for n in range(npages))
    piece = Piece(0, memoryview(data), "big.bin")
    step = PageRange(0x100000, npages * PAGE, PageType.NORMAL, "image", "big.bin", (piece,))
    return plan([step], memory=[(0, (npages + 512) * PAGE)])


@pytest.mark.parametrize("page", [0, 1, 300, 511])
def test_bisect_when_the_plan_is_long_takes_log_n_launches(page: int) -> None:
    launch_plan = big(512)
    with SimPlatform() as platform:
        result = found(launch_plan, Planted(platform, other_content(0x100000 + page * PAGE)))
    assert result.culprit is not None
    assert result.culprit.seq == page
    assert result.culprit.origin == f"big.bin+{page * PAGE:#x}"
    # All pages, then the search, then the two prefixes that prove it.
    assert result.launches <= 3 + 9


class Knows(Oracle):
    """Answers by itself: one page of the plan is wrong."""

    def __init__(self, platform: Platform, gpa: int) -> None:
        super().__init__(platform)
        self.gpa = gpa
        self.pages = 0

    def ask(self, plan: LaunchPlan, digest: bytes) -> Reply:
        self.launches += 1
        self.pages += plan.npages
        wrong = plan.step_at(self.gpa) is not None
        return Reply(Answer.DIFFERS if wrong else Answer.RIGHT, digest, 0x0A, 5, False)


@pytest.mark.parametrize("page", [0, 1, 32767, 32768, 65534, 65535])
def test_bisect_when_the_plan_has_65536_pages_takes_at_most_20_launches(page: int) -> None:
    pages = PageRange(0x100000, 65536 * PAGE, PageType.ZERO, "zero", "kvmlaunch:zero")
    oracle = Knows(SimPlatform(), 0x100000 + page * PAGE)
    result = bisect(plan([pages], memory=[(0, 65536 * PAGE + 0x100000)]), oracle)
    assert result.culprit is not None
    assert result.culprit.seq == page
    assert result.launches == oracle.launches <= 20
    # What it costs is pages: those of a few whole launches, not of 20.
    assert oracle.pages <= 4 * 65536
