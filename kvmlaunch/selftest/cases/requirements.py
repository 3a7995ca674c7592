"""What was asked of VMSAs from user space, as requirements R1 to R15 of the discussion.

R3 is in `golden`; R9, every refusal with its errno and without side effects, is the cases C, U and
S of `vmsa_pages` and `vcpu_state`.
"""

from __future__ import annotations

from kvmlaunch.abi.fwstatus import FwStatus
from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.errors import IoctlError
from kvmlaunch.kvm.exits import FailEntryExit, SystemEventExit
from kvmlaunch.launch.guest import Guest
from kvmlaunch.selftest import payloads
from kvmlaunch.selftest.answer import Answer
from kvmlaunch.selftest.case import Case, case
from kvmlaunch.selftest.guests import c_bit, launch, payload_plan, report, run_alone
from kvmlaunch.selftest.idblock import flipped
from kvmlaunch.selftest.vm import GPA, LaunchVm
from kvmlaunch.selftest.vmsa_vm import VmsaVm, a_vmsa
from kvmlaunch.uapi import ffi, lib

_COUNTS = (1, 2, 4, 8)
_LARGE_PAGE = 2 << 20
_NO_APIC_IDS = 0xE6


def _launched(t: Case, *, vcpus: int = 1, vmsa_page: int = 1) -> VmsaVm:
    """A page, then a VMSA page that the first vCPU starts from; not finished."""
    vm = VmsaVm.with_pages(t, vcpus=vcpus)
    t.taken(vm.update())
    t.taken(vm.update_vmsa(vmsa_page))
    if t.host.vmsa_mode == "direct":
        t.taken(vm.bind(vmsa_page))
    return vm


@case("r1.any-number-of-vcpus")
def r1(t: Case) -> None:
    """One launch digest for 1, 2, 4 and 8 vCPUs, where VMSAs come from user space"""
    digests = set()
    for vcpus in _COUNTS:
        vm = _launched(t, vcpus=vcpus)
        digests.add(vm.digest)
        vm.confirm()
    t.equal("number of launch digests", len(digests), 1)


@case("r1.sync-control")
def r1_control(t: Case) -> None:
    """Where KVM makes the VMSAs, each number of vCPUs has a launch digest of its own"""
    digests: list[bytes] = []
    for vcpus in _COUNTS:
        vm = LaunchVm.started(t, pages=1, vcpus=vcpus)
        t.taken(vm.update())
        digests.append(vm.expect_vmsas())
        vm.confirm()
    t.equal("number of launch digests", len(set(digests)), len(_COUNTS))
    vm = LaunchVm.started(t, pages=1, vcpus=2)
    t.taken(vm.update())
    t.refused(vm.finish_expecting(digests[0]), "EIO", fw=FwStatus.BAD_MEASUREMENT)


@case("r2.order")
def r2(t: Case) -> None:
    """The launch digest follows from pages and VMSA in the order of their updates alone"""
    vm = VmsaVm.with_pages(t)
    t.taken(vm.update(0))
    t.taken(vm.update_vmsa(1))
    t.taken(vm.update(2))
    other = VmsaVm.with_pages(t)
    t.taken(other.update(0))
    t.taken(other.update(2))
    t.taken(other.update_vmsa(1))
    t.refused(vm.finish_expecting(other.digest), "EIO", fw=FwStatus.BAD_MEASUREMENT)
    vm.confirm()
    other.confirm()


@case("r4.gpa")
def r4(t: Case) -> None:
    """The GPA of the VMSA is the image's choice, and measured: two GPAs, two digests"""
    one, other = (_launched(t, vmsa_page=page) for page in (1, 3))
    t.expect(one.digest != other.digest, "two GPAs of the VMSA: expected two predicted digests")
    one.confirm()
    t.refused(other.finish_expecting(one.digest), "EIO", fw=FwStatus.BAD_MEASUREMENT)
    again = _launched(t, vmsa_page=3)
    again.confirm()


@case("r5.id-block")
def r5(t: Case) -> None:
    """An ID block with the predicted digest is taken; with one bit flipped firmware refuses it"""
    vm = _launched(t)
    answer = vm.finish_expecting(flipped(vm.digest, 17))
    t.refused(answer, "EIO", fw=FwStatus.BAD_MEASUREMENT)
    _launched(t).confirm()


@case("r6.unselected")
def r6(t: Case) -> None:
    """A VMSA page that no vCPU is bound to is measured, and doesn't run"""
    vm = _two_vmsas(t)
    t.taken(vm.bind(2))
    vm.confirm()
    _expect_report(t, vm, 0x22)


@case("r7.rebinding")
def r7(t: Case) -> None:
    """The last SET counts: GET tells it, and the vCPU starts there"""
    for first, last, code in ((1, 2, 0x22), (2, 1, 0x11)):
        vm = _two_vmsas(t)
        t.taken(vm.bind(first))
        t.taken(vm.bind(last))
        vm.check_vmsa(0, GPA + last * PAGE_SIZE)
        t.taken(vm.finish())
        _expect_report(t, vm, code)


@case("r8.ap")
def r8(t: Case) -> None:
    """Other vCPUs are uninitialised until the guest starts one by AP creation"""
    t.needs("page", "direct")
    bit = c_bit(t)
    states = (payloads.start_ap(bit), Vmsa())
    guest = launch(t, payload_plan(states, t.host.vmsa_mode, c_bit=bit, apic=True))
    if t.host.vmsa_mode == "direct":
        # Otherwise it had to be parked, or AP creation would go unnoticed.
        state = guest.vcpus[1].get_mp_state()
        t.equal("MP state of vCPU 1 after FINISH", state, lib.KVM_MP_STATE_UNINITIALIZED)
    vcpu, word = report(t, guest)
    t.equal("report of the guest", word, payloads.reported(payloads.AP_STARTED))
    t.equal("vCPU that reports", vcpu, 1)


@case("r10.too-late")
def r10(t: Case) -> None:
    """What makes the VMSAs is settled before the first vCPU: a late enable changes nothing"""
    t.needs("direct")
    vm = VmsaVm.ready(t, vcpus=1)
    t.errno(vm.enable(), "EINVAL")
    t.taken(vm.start())
    t.taken(vm.update())
    vm.expect_vmsas()
    vm.confirm()


@case("r11.sync")
def r11(t: Case) -> None:
    """Without the proposals' switch KVM makes and measures the VMSA, and the guest starts there"""
    guest = launch(t, payload_plan([payloads.report_bl(0x5A)], "sync"))
    t.equal("report of the guest", report(t, guest)[1], payloads.reported(0x5A))


@case("r12.large-page")
def r12(t: Case) -> None:
    """A VMSA page aligned to 2 MiB can be measured, though not bound"""
    vm = VmsaVm.direct(t)
    vm.add_memory(1, _LARGE_PAGE)
    answer = vm.update_vmsa(0, gfn_start=_LARGE_PAGE // PAGE_SIZE)
    t.taken(answer)
    t.errno(vm.bind(0, vmsa_gpa=_LARGE_PAGE), "EINVAL")
    vm.confirm()


@case("r13.apic-ids")
def r13(t: Case) -> None:
    """The guest learns the APIC IDs of all vCPUs by the GHCB event, which is advertised"""
    t.needs("page", "direct")
    bit = c_bit(t)
    states = (payloads.apic_ids(bit), Vmsa(), Vmsa(), Vmsa())
    guest = launch(t, payload_plan(states, t.host.vmsa_mode, c_bit=bit, apic=True))
    word = report(t, guest)[1]
    if word >> 16 & 0xFF == _NO_APIC_IDS:
        t.skip(f"this host doesn't advertise the APIC ID list (features {word >> 32:#x})")
    t.equal("report of the guest", word, payloads.reported(len(states), 0b1111))


@case("r14.registers")
def r14(t: Case) -> None:
    """The guest starts with the registers of its VMSA page, whatever KVM_SET_REGS said"""
    t.needs("page", "direct")
    bit = c_bit(t)
    state = payloads.report_vmsa_state(bit)
    plan = payload_plan([state], t.host.vmsa_mode, c_bit=bit)
    guest = launch(t, plan, before=_other_registers)
    checksum = payloads.state_checksum(state)
    expected = payloads.reported(checksum & 0xFF, checksum)
    t.equal("report of the guest", report(t, guest)[1], expected)


@case("r15.odd-values")
def r15(t: Case) -> None:
    """Only VMPL and SEV_FEATURES of a VMSA page are looked at: whatever else is taken"""
    vm = VmsaVm.with_pages(t, pages=8)
    odd = ({"cpl": 3}, {"rflags": 0}, {"cr0": 1 << 63}, {"rip": 1 << 62}, {"dr7": 0}, {"xcr0": 0})
    # Proposal v1 is for one page.
    for page, fields in enumerate(odd if t.host.vmsa_mode == "direct" else odd[:1]):
        name, value = next(iter(fields.items()))
        t.taken(vm.update_vmsa(page, a_vmsa(**fields), note=f" of {name} {value:#x}"))
    vm.confirm()


@case("r15.bad-values")
def r15_bad(t: Case) -> None:
    """A VMSA that VMRUN can't take shows at KVM_RUN: KVM_EXIT_FAIL_ENTRY"""
    vm = VmsaVm.direct(t)
    t.taken(vm.update_vmsa(0, a_vmsa(efer=0)))
    t.taken(vm.bind(0))
    t.taken(vm.finish())
    exit_ = run_alone(t, vm.vcpus[0])
    failed = isinstance(exit_, FailEntryExit)
    t.expect(failed, f"KVM_RUN with EFER.SVME clear: expected KVM_EXIT_FAIL_ENTRY, got {exit_}")


@case("vmsa.registers-after-finish")
def registers_after_finish(t: Case) -> None:
    """After FINISH the registers of a vCPU are hidden, with a VMSA or without: EINVAL"""
    vm = VmsaVm.direct(t, vcpus=2)
    t.taken(vm.update_vmsa(0))
    t.taken(vm.bind(0))
    t.taken(vm.finish())
    for vcpu in vm.vcpus:
        result = vcpu.ioctl_raw("KVM_GET_REGS", ffi.new("struct kvm_regs *"))
        what = f"KVM_GET_REGS of vCPU {vcpu.vcpu_id} after FINISH"
        t.errno(Answer(what, result.errno), "EINVAL")


@case("vmsa.run-unbound")
def run_unbound(t: Case) -> None:
    """A vCPU without a VMSA can't run, with an answer that nobody has settled"""
    vm = VmsaVm.direct(t)
    t.taken(vm.update_vmsa(0))
    t.taken(vm.finish())
    try:
        exit_ = run_alone(t, vm.vcpus[0])
    except IoctlError as error:
        t.one_of(Answer("KVM_RUN without a VMSA", error.errno or 0), "KVM_RUN without a VMSA")
        return
    failed = isinstance(exit_, FailEntryExit)
    t.expect(failed, f"KVM_RUN without a VMSA: expected KVM_EXIT_FAIL_ENTRY, got {exit_}")


def _two_vmsas(t: Case) -> VmsaVm:
    """The payload that reports BL, and two VMSAs for it: 0x11 and 0x22."""
    vm = VmsaVm.direct(t)
    vm.fill(0, payloads.build(0)[payloads.BASE])
    t.taken(vm.update(0))
    for page, code in ((1, 0x11), (2, 0x22)):
        t.taken(vm.update_vmsa(page, payloads.report_bl(code).encode()))
    return vm


def _expect_report(t: Case, vm: VmsaVm, code: int) -> None:
    exit_ = run_alone(t, vm.vcpus[0])
    told = exit_.data[0] if isinstance(exit_, SystemEventExit) else exit_
    t.equal("report of the guest", told, payloads.reported(code))


def _other_registers(guest: Guest) -> None:
    """Registers for the first vCPU that its VMSA doesn't have."""
    vcpu = guest.vcpus[0]
    vcpu.set_regs({"rip": 0x1234, "rflags": 2, "rbx": 0xBAD, "r15": 0xBAD})
    vcpu.set_sregs({**vcpu.get_sregs(), "cr3": 0x5000})
