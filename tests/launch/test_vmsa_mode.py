"""VMSA modes on simulated kernels: launched, predicted, chosen by what the kernel does."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvmlaunch.errors import (
    FirmwareError,
    FormatError,
    IoctlError,
    KvmLaunchError,
    MissingCapability,
)
from kvmlaunch.images import (
    LaunchPlan,
    MemoryRegion,
    PlanOptions,
    VmsaChoice,
    VmsaMode,
    load_image,
)
from kvmlaunch.images.vmsas import supply_vmsas
from kvmlaunch.kvm.exits import FailEntryExit, SystemEventExit
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.measure import measure
from kvmlaunch.launch.pagelog import open_log
from kvmlaunch.launch.session import Session
from kvmlaunch.launch.vmsa_mode import Settled, probe_vmsa_mode, settle_vmsa_mode
from kvmlaunch.sim import SimPlatform
from kvmlaunch.sim.profiles import KernelProfile, kernel_profile
from kvmlaunch.snp.vcpu_state import VcpuState, get_vcpu_state, set_vcpu_state
from kvmlaunch.uapi import PROPOSAL_VARIABLE, Call, Proposal, Recorder, Result, ffi, lib
from tests.cli.command import events, page_events
from tests.host import require_simulated_cpu
from tests.idblock import id_auth, id_block
from tests.launch.test_snp_run import Run

HALT = b"\xf4"
# mov ecx, 0xc0010130; movzx eax, bl; shl eax, 16; mov ax, 0x100; xor edx, edx; wrmsr; rep vmmcall:
# asks the host for termination with BL as the code (GHCB MSR protocol). 16-bit code.
REPORT_BL = bytes.fromhex("66b9300101c0 660fb6c3 66c1e010 b80001 6631d2 0f30 f30f01d9 f4")
KERNEL = {"sync": "7.0", "page": "vmsa-page", "direct": "direct-vmsa"}
OTHER_NUMBERS = Proposal(
    direct_vmsa=251, vcpu_state=250, get_vcpu_state=110, set_vcpu_state=111, page_type_vmsa=9
)


def load(image: bytes | Path = HALT, *vmsas: VmsaChoice, **options: Any) -> LaunchPlan:
    options.setdefault("memory", 4 << 20)
    return load_image(image, PlanOptions(vmsas=vmsas, **options))


def bl(value: int, *, vcpu: int | None = 0, gpa: int | None = None) -> VmsaChoice:
    return VmsaChoice(vcpu=vcpu, gpa=gpa, edits=(("rbx", value),))


def other_kernel() -> KernelProfile:
    """A tree that numbers the proposal otherwise."""
    profile = kernel_profile("direct-vmsa")
    return replace(profile, vmsa=replace(profile.vmsa, proposal=OTHER_NUMBERS))


# Launched as predicted


@pytest.mark.parametrize("vcpus", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", KERNEL)
def test_launch_when_a_mode_is_asked_for_is_measured_as_predicted(mode: str, vcpus: int) -> None:
    plan = load(vcpus=vcpus, vmsa_mode=mode)
    with SimPlatform(KERNEL[mode]) as platform, Guest(plan, platform) as guest:
        guest.launch()
        assert guest.witness().agrees is True
        assert guest.digest == platform.launch_digest(guest.vm.fd) == measure(plan).digest
        assert len(guest.records) == (1 + vcpus if mode == "sync" else 2)


def test_launch_when_vmsas_are_bound_and_measured_only_is_as_predicted() -> None:
    plan = load(HALT, bl(1, vcpu=None), bl(2, gpa=0x9000), bl(3, vcpu=2), vcpus=3)
    with SimPlatform("direct-vmsa") as platform, Guest(plan, platform) as guest:
        guest.launch()
        assert guest.witness().agrees is True
        assert [record.vcpu for record in guest.records] == [None, None, 0, 2]
        states = [get_vcpu_state(vcpu, Proposal()).vmsa_gpa for vcpu in guest.vcpus]
        assert states == [0x9000, None, plan.bindings[2]]


def test_launch_when_it_is_direct_issues_the_proposals_calls_in_order() -> None:
    calls: list[Call] = []
    plan = load(vcpus=2, vmsa_mode="direct")
    with (
        SimPlatform("direct-vmsa") as platform,
        Guest(plan, Recorder(platform, calls.append)) as guest,
    ):
        guest.launch()
    wanted = (
        *("KVM_ENABLE_CAP", "KVM_CREATE_VCPU", "KVM_SET_REGS", "KVM_SET_SREGS"),
        *("KVM_SEV_SNP_LAUNCH_START", "KVM_SEV_SNP_LAUNCH_UPDATE", "KVM_SEV_SNP_LAUNCH_FINISH"),
        *("KVM_SEV_SNP_GET_VCPU_STATE", "KVM_SEV_SNP_SET_VCPU_STATE"),
    )
    names = [call.name for call in calls if call.name in wanted]
    assert names[1:] == [  # the first enables exits of hypercalls
        "KVM_ENABLE_CAP",
        *("KVM_CREATE_VCPU", "KVM_CREATE_VCPU"),
        "KVM_SEV_SNP_LAUNCH_START",
        *("KVM_SEV_SNP_LAUNCH_UPDATE", "KVM_SEV_SNP_LAUNCH_UPDATE"),
        *("KVM_SEV_SNP_GET_VCPU_STATE", "KVM_SEV_SNP_SET_VCPU_STATE"),
        "KVM_SEV_SNP_GET_VCPU_STATE",
        "KVM_SEV_SNP_LAUNCH_FINISH",
    ]


def test_launch_when_it_is_direct_keeps_the_ghcb_msr() -> None:
    with (
        SimPlatform("direct-vmsa") as platform,
        Guest(load(vmsa_mode="direct"), platform) as guest,
    ):
        guest.start()
        before = get_vcpu_state(guest.vcpus[0], Proposal()).ghcb_gpa
        list(guest.update())
        guest.finish()
        assert get_vcpu_state(guest.vcpus[0], Proposal()) == VcpuState(0x2000, before)


@pytest.mark.parametrize("mode", ["page", "direct"])
def test_id_block_when_it_is_signed_for_one_vcpu_fits_any_number(mode: str) -> None:
    block = id_block(measure(load(vmsa_mode=mode)).digest)
    for vcpus in (1, 4):
        plan = load(vcpus=vcpus, vmsa_mode=mode, **signed(block))
        with SimPlatform(KERNEL[mode]) as platform, Guest(plan, platform) as guest:
            guest.launch()
    moved = load(HALT, VmsaChoice(gpa=0x3000), vmsa_mode=mode, **signed(block))
    with (
        SimPlatform(KERNEL[mode]) as platform,
        Guest(moved, platform) as guest,
        pytest.raises(FirmwareError, match="fw_error=11 'Bad measurement'"),
    ):
        guest.launch()


def signed(block: bytes) -> dict[str, bytes]:
    return {"id_block": block, "id_auth": id_auth(block)}


# Run


@pytest.mark.parametrize("mode", KERNEL)
def test_hello_when_it_runs_in_a_mode_says_the_same(guests: Path, mode: str) -> None:
    platform = require_simulated_cpu(KERNEL[mode])
    run = Run(guests / "hello.elf", platform, True, vcpus=4, vmsa_mode=mode)
    assert run.outcome.kind == "exit-port"
    assert run.text.startswith("hello from a kvmlaunch guest\n")
    others = {vcpu for vcpu, _ in run.exits} - {0}
    assert not others or mode == "sync"


@pytest.mark.parametrize("mode", KERNEL)
def test_aps_when_the_guest_starts_them_run_in_every_mode(guests: Path, mode: str) -> None:
    """R8: by GHCB AP creation, from VMSAs of the guest's own."""
    run = Run(
        guests / "smp.elf", require_simulated_cpu(KERNEL[mode]), True, vcpus=4, vmsa_mode=mode
    )
    assert run.outcome.kind == "exit-port"
    assert run.text.endswith("all 4 vCPUs are up\n")


@pytest.mark.parametrize(
    ("mode", "state"), [("page", "AP_RESET_HOLD"), ("direct", "UNINITIALIZED")]
)
def test_aps_when_launched_without_a_vmsa_wait(guests: Path, mode: str, state: str) -> None:
    plan = load(guests / "smp.elf", vcpus=2, vmsa_mode=mode, memory=16 << 20)
    with SimPlatform(KERNEL[mode]) as platform, Guest(plan, platform) as guest:
        guest.launch()
        states = [vcpu.get_mp_state() for vcpu in guest.vcpus]
    assert states == [lib.KVM_MP_STATE_RUNNABLE, getattr(lib, f"KVM_MP_STATE_{state}")]


@pytest.mark.parametrize("chosen", [0, 1])
def test_vcpu_when_two_vmsas_are_measured_starts_from_the_bound_one(chosen: int) -> None:
    choices = [bl(0x11 + n, vcpu=0 if n == chosen else None) for n in (0, 1)]
    plan = load(REPORT_BL, *choices)
    with Guest(plan, require_simulated_cpu("direct-vmsa")) as guest:
        guest.launch()
        exit_ = guest.vcpus[0].run()
    assert isinstance(exit_, SystemEventExit)
    assert exit_.data[0] >> 16 & 0xFF == 0x11 + chosen


def test_vcpu_when_its_registers_were_set_by_ioctl_starts_from_the_page_alone() -> None:
    """R14: nothing is synchronised into the page."""
    with Guest(load(REPORT_BL, bl(0x42)), require_simulated_cpu("direct-vmsa")) as guest:
        guest.vcpus[0].set_regs({"rbx": 0x77, "rip": 0x2000, "rflags": 2})
        guest.launch()
        assert guest.witness().agrees is True
        exit_ = guest.vcpus[0].run()
    assert isinstance(exit_, SystemEventExit)
    assert exit_.data[0] >> 16 & 0xFF == 0x42


@pytest.mark.parametrize("mode", ["page", "direct"])
def test_vcpu_when_it_has_no_vmsa_can_not_be_run(mode: str) -> None:
    """KVM refuses to enter it, as one whose VMSA the guest destroyed; `run` leaves it alone."""
    with Guest(load(vcpus=2, vmsa_mode=mode), require_simulated_cpu(KERNEL[mode])) as guest:
        guest.launch()
        assert isinstance(guest.vcpus[1].run(), FailEntryExit)


# Chosen by what the kernel does


@pytest.mark.parametrize(
    ("kernel", "mode", "why"),
    [
        ("6.12", "sync", "KVM_CAP_SNP_DIRECT_VMSA (252) can't be enabled, and .* gives EINVAL"),
        ("6.18", "sync", "KVM_CAP_SNP_DIRECT_VMSA (252) can't be enabled, and .* gives EINVAL"),
        ("7.0", "sync", "KVM_CAP_SNP_DIRECT_VMSA (252) can't be enabled, and .* gives EINVAL"),
        ("vmsa-page", "page", "KVM_SEV_SNP_PAGE_TYPE_VMSA is taken for vCPU 0"),
        ("direct-vmsa", "direct", "KVM_CAP_SNP_DIRECT_VMSA and vCPU state commands work"),
    ],
)
def test_probe_when_a_kernel_is_asked_finds_its_best_mode(kernel: str, mode: str, why: str) -> None:
    with SimPlatform(kernel) as platform:
        offer = probe_vmsa_mode(platform)
        assert platform.open_fds == ()
    pattern = why.replace("(", r"\(").replace(")", r"\)")
    assert offer.mode == mode
    assert re.fullmatch(pattern, offer.why)


def test_probe_when_the_numbers_are_others_needs_them() -> None:
    """Without them it must not take a v2 kernel, which measures KVM's VMSAs too, for a v1."""
    with SimPlatform(other_kernel()) as platform:
        assert probe_vmsa_mode(platform).mode is VmsaMode.SYNC
        almost = replace(OTHER_NUMBERS, direct_vmsa=252)
        offer = probe_vmsa_mode(platform, almost)
        assert offer.mode is VmsaMode.SYNC
        assert offer.why.endswith("other numbers may do (--proposal-cap)")
        assert probe_vmsa_mode(platform, OTHER_NUMBERS).mode is VmsaMode.DIRECT


def test_probe_when_only_the_command_is_numbered_otherwise_says_so() -> None:
    with SimPlatform("direct-vmsa") as platform:
        offer = probe_vmsa_mode(platform, Proposal(get_vcpu_state=99))
    assert offer.mode is VmsaMode.SYNC
    assert offer.why.startswith("KVM_SEV_SNP_GET_VCPU_STATE (99) doesn't work, and KVM measures ")


def test_numbers_when_the_environment_has_them_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = "KVM_CAP_SNP_DIRECT_VMSA=251,GET_VCPU_STATE=110,set_vcpu_state=0x6f,PAGE_TYPE_VMSA=9"
    monkeypatch.setenv(PROPOSAL_VARIABLE, numbers)
    with SimPlatform(other_kernel()) as platform:
        assert probe_vmsa_mode(platform).mode is VmsaMode.DIRECT
        with Guest(load(vmsa_mode="direct"), platform) as guest:
            guest.launch()
            assert guest.witness().agrees is True


def test_mode_direct_when_the_kernel_lacks_it_names_capability_and_number() -> None:
    with SimPlatform("7.0") as platform, pytest.raises(MissingCapability) as caught:
        Guest(load(vmsa_mode="direct"), platform)
    assert str(caught.value) == (
        "this host lacks KVM_CAP_SNP_DIRECT_VMSA (number 252: --proposal-cap), "
        "needed for VMSA mode direct"
    )


def test_mode_page_when_the_kernel_lacks_it_names_the_page_and_the_rule() -> None:
    with (
        SimPlatform("7.0") as platform,
        Guest(load(vmsa_mode="page"), platform) as guest,
        pytest.raises(IoctlError, match=r"^SNP_LAUNCH_UPDATE ret=-22 .* gpa=0x2000 type=0x2"),
    ):
        guest.launch()


def settle(plan: LaunchPlan, kernel: str, asked: str | None = None, **options: Any) -> Settled:
    with SimPlatform(kernel) as platform:
        return settle_vmsa_mode(plan, platform, asked, **options)


def test_mode_when_the_image_has_no_vmsa_is_sync_on_every_kernel() -> None:
    for kernel in KERNEL.values():
        settled = settle(load(), kernel)
        assert settled.plan == load()
        assert settled.why == "VMSA mode sync: <bytes> has no VMSA of its own, KVM makes them"


@pytest.mark.parametrize("asked", ["sync", "page", "direct"])
def test_mode_when_there_is_no_vmsa_is_as_asked_only_if_that_was_sync(asked: str) -> None:
    settled = settle(load(), "direct-vmsa", asked)
    assert settled.plan == load()
    assert settled.why.endswith(": as asked") == (asked == "sync")


@pytest.mark.parametrize("mode", ["page", "direct"])
def test_mode_when_the_image_has_a_vmsa_is_the_best_that_keeps_the_digest(mode: str) -> None:
    plan = load(HALT, VmsaChoice(gpa=0x9000), vcpus=2)
    settled = settle(plan, KERNEL[mode])
    assert settled.plan.vmsa_mode == mode
    assert measure(settled.plan) == measure(plan)
    assert settled.why.startswith(f"VMSA mode {mode}: ")
    assert settled.changes == ()


def test_mode_when_asked_for_is_not_probed() -> None:
    calls: list[Call] = []
    with SimPlatform("6.12") as platform:
        settled = settle_vmsa_mode(load(vmsa_mode="page"), Recorder(platform, calls.append), "page")
    assert (settled.plan.vmsa_mode, settled.why) == (VmsaMode.PAGE, "VMSA mode page: as asked")
    assert calls == []


CHANGES = (
    "vCPU 0: KVM can't carry cr2 (offset 0x240): 0x5 in the VMSA, 0x0 measured",
    "not launched: the VMSA at GPA 0x9000 (kvmlaunch:vmsa), which no vCPU starts from",
)


def carrying() -> LaunchPlan:
    edited = VmsaChoice(edits=(("cr2", 5), ("rbx", 7)))
    return load(HALT, edited, VmsaChoice(vcpu=None, gpa=0x9000))


def test_fallback_when_it_changes_the_digest_is_refused_with_each_field() -> None:
    with pytest.raises(MissingCapability) as caught:
        settle(carrying(), "7.0")
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("this host lacks VMSAs of user space (KVM_CAP_SNP_DIRECT_VMSA (252)")
    assert "--allow-digest-change" in first
    sync = load_image(HALT, PlanOptions(memory=4 << 20))
    changed = replace(sync, vcpus=(sync.vcpus[0].replace(rbx=7),))
    digests = f"from {measure(carrying())} to {measure(changed)}"
    assert rest == [*CHANGES, f"the launch digest changes {digests}"]


def test_fallback_when_sync_is_asked_for_is_bad_input_unless_allowed() -> None:
    with pytest.raises(FormatError, match=r"^mode sync changes the launch digest; --allow-digest"):
        settle(carrying(), "direct-vmsa", "sync")
    settled = settle(carrying(), "direct-vmsa", "sync", allow_digest_change=True)
    assert settled.why == "VMSA mode sync: as asked"
    assert settled.changes[:2] == CHANGES


def test_fallback_when_allowed_launches_what_it_said() -> None:
    settled = settle(carrying(), "7.0", allow_digest_change=True)
    assert settled.changes[2].endswith(f" to {measure(settled.plan)}")
    with SimPlatform("7.0") as platform, Guest(settled.plan, platform) as guest:
        guest.launch()
        assert guest.witness().agrees is True
        assert guest.digest == measure(settled.plan).digest


def test_fallback_when_the_vmsa_is_where_kvm_puts_its_own_changes_nothing() -> None:
    """At 0xfffffffff000, last, for the only vCPU: QEMU's condition for IGVM files."""
    own = MemoryRegion(0xFFFFFFFFF000, 0x1000, "vmsa")
    plain = load()
    plan = supply_vmsas(
        replace(plain, memory=(*plain.memory, own)), VmsaMode.DIRECT, [VmsaChoice(gpa=own.gpa)]
    )
    assert measure(plan) == measure(plain)
    settled = settle(plan, "7.0")
    assert (settled.plan.vmsa_mode, settled.changes) == (VmsaMode.SYNC, ())


def test_fallback_when_page_mode_can_not_take_the_vmsas_says_why() -> None:
    with pytest.raises(MissingCapability, match="but VMSA mode page takes one VMSA"):
        settle(load(HALT, bl(1), bl(2, vcpu=1), vcpus=2), "vmsa-page")


def test_mode_when_the_vm_is_plain_is_no_matter() -> None:
    plan = load(confidential=False)
    assert settle(plan, "7.0") == Settled(plan, "")


# Forced


@pytest.mark.parametrize(
    ("choice", "refused"),
    [
        (VmsaChoice(edits=(("vmpl", 1),)), "SNP_LAUNCH_UPDATE ret=-22 .* gpa=0x2000 type=0x2"),
        (VmsaChoice(edits=(("sev_features", 0),)), "SNP_LAUNCH_UPDATE ret=-22 .* gpa=0x2000"),
        (VmsaChoice(gpa=0x40000000), "SNP_LAUNCH_UPDATE ret=-22 .* gpa=0x40000000 type=0x2"),
        (VmsaChoice(gpa=0x9001), "SNP_SET_VCPU_STATE ret=-22 .* vmsa_gpa=0x9001"),
        (VmsaChoice(gpa=0x200000), "SNP_SET_VCPU_STATE ret=-22 .* vmsa_gpa=0x200000"),
    ],
)
def test_vmsa_when_forced_is_refused_by_the_kernel(choice: VmsaChoice, refused: str) -> None:
    plan = load(HALT, choice, forced=True)
    with (
        SimPlatform("direct-vmsa") as platform,
        Guest(plan, platform) as guest,
        pytest.raises(IoctlError, match=f"^{refused}"),
    ):
        guest.launch()


def test_set_vcpu_state_when_refused_names_the_rules_and_the_arguments() -> None:
    with (
        SimPlatform("direct-vmsa") as platform,
        Guest(load(vmsa_mode="direct"), platform) as guest,
    ):
        guest.start()
        with pytest.raises(IoctlError) as caught:
            set_vcpu_state(guest.vcpus[0], VcpuState(0x200000, None), Proposal())
    first, second = str(caught.value).splitlines()
    assert first == (
        "SNP_SET_VCPU_STATE ret=-22 (EINVAL: Invalid argument) vcpu=0x0 "
        "valid_fields=0x1 vmsa_gpa=0x200000 ghcb_gpa=0x0"
    )
    assert "is aligned to 2 MiB" in second


class Deaf:
    """A kernel that takes SET_VCPU_STATE and does nothing."""

    def __init__(self, platform: SimPlatform) -> None:
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
        if request == lib.KVM_MEMORY_ENCRYPT_OP and arg:
            command = ffi.cast("struct kvm_sev_cmd *", arg)
            if command.id == lib.KVM_SEV_SNP_SET_VCPU_STATE:
                return Result(0, 0)
        return self._platform.ioctl(fd, request, arg)


def test_launch_when_the_kernel_binds_something_else_is_an_error() -> None:
    with (
        SimPlatform("direct-vmsa") as platform,
        Guest(load(vmsa_mode="direct"), Deaf(platform)) as guest,
        pytest.raises(KvmLaunchError) as caught,
    ):
        guest.launch()
    assert re.fullmatch(
        r"vCPU 0 was given VMSA GPA 0x2000 and GHCB GPA (0x[0-9a-f]+), "
        r"but KVM says that it has VMSA none and GHCB GPA \1",
        str(caught.value),
    )


def test_set_vcpu_state_when_nothing_is_given_takes_both_away() -> None:
    with SimPlatform("direct-vmsa") as platform, Guest(load(vmsa_mode="direct"), platform) as guest:
        guest.start()
        list(guest.update())
        set_vcpu_state(guest.vcpus[0], VcpuState(0x2000, 0x3000), Proposal())
        set_vcpu_state(guest.vcpus[0], VcpuState(), Proposal())
        assert get_vcpu_state(guest.vcpus[0], Proposal()) == VcpuState(None, None)


def test_finish_when_refused_with_vmsas_of_user_space_can_be_tried_again() -> None:
    block = id_block(bytes(48))
    plan = load(vmsa_mode="direct", **signed(block))
    with SimPlatform("direct-vmsa") as platform, Guest(plan, platform) as guest:
        with pytest.raises(FirmwareError, match="Bad measurement") as caught:
            guest.launch()
        assert "This VM can't be used any more" not in str(caught.value)
        guest.plan = load(vmsa_mode="direct")
        guest.finish()
        assert guest.witness().agrees is True


# Log


def test_log_when_vmsas_are_ours_says_who_starts_from_which(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    plan = load(HALT, bl(1, vcpu=None, gpa=0x8000), bl(2, gpa=0x9000), vcpus=2)
    with (
        SimPlatform("direct-vmsa") as platform,
        open_log(str(path)) as log,
        Session(plan, platform, log=log) as session,
    ):
        session.launch()
    assert events(path)[0]["vmsa_mode"] == "direct"
    vmsas = [event for event in page_events(path) if event["event"] == "vmsa"]
    assert [(v["vcpu"], v["gpa"], v["type"], v["origin"]) for v in vmsas] == [
        (None, "0x8000", "VMSA", "kvmlaunch:vmsa"),
        (0, "0x9000", "VMSA", "kvmlaunch:vmsa"),
    ]
