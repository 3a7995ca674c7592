"""The kernel's KVM selftests on the simulated host, unmodified: which pass, which not, and why."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.supervisor import rig

PASS, SKIP = 0, 4
_SECONDS = 100


class Case(NamedTuple):
    """Exit code, arguments that make it quick, and why it doesn't pass.

    With ``on_some_machines`` it is this machine that decides whether it skips.
    """

    code: int = PASS
    arguments: tuple[str, ...] = ()
    why: str = ""
    on_some_machines: bool = False


def _skips(why: str) -> Case:
    return Case(SKIP, (), why)


NO_VMX = _skips("VMX is Intel's")
NO_NESTED = _skips("no nested virtualization, as with kvm_amd.nested=0")
NO_HYPERV = _skips("Hyper-V's interfaces aren't simulated")
NO_PMU = _skips("no PMU is simulated: kvm.enable_pmu=N")
NO_XEN = _skips("Xen's interfaces aren't simulated")
NO_SW_PROTECTED = _skips("VM type 1 needs CONFIG_KVM_SW_PROTECTED_VM, which Debian leaves out")

CASES = {
    "amx_test": _skips("AMX is Intel's"),
    "coalesced_io_test": Case(),
    "cpuid_test": Case(),
    "cr4_cpuid_sync_test": Case(),
    "debug_regs": Case(),
    "demand_paging_test": Case(arguments=("-b", "8M")),
    "dirty_log_page_splitting_test": _skips("no huge pages are simulated"),
    "exit_on_emulation_failure_test": Case(),
    "fix_hypercall_test": Case(),
    "get_msr_index_features": Case(),
    "guest_memfd_test": Case(),
    "guest_print_test": Case(),
    "hwcr_msr_test": Case(),
    **dict.fromkeys(
        (
            *("hyperv_clock", "hyperv_cpuid", "hyperv_extended_hypercalls", "hyperv_features"),
            *("hyperv_ipi", "hyperv_svm_test", "hyperv_tlb_flush"),
        ),
        NO_HYPERV,
    ),
    "kvm_binary_stats_test": _skips(
        "the simulated kernel counts nothing (KVM_CAP_BINARY_STATS_FD)"
    ),
    "kvm_clock_test": Case(why="wants the clock source tsc", on_some_machines=True),
    "kvm_create_max_vcpus": Case(),
    "kvm_page_table_test": Case(arguments=("-b", "8M")),
    "kvm_pv_test": Case(),
    "max_vcpuid_cap_test": Case(),
    "memslot_modification_stress_test": Case(arguments=("-b", "8M", "-i", "3")),
    "nested_exceptions_test": NO_NESTED,
    "nx_huge_pages_test": _skips("AMD's CPUs need no such workaround"),
    "platform_info_test": Case(),
    **dict.fromkeys(("pmu_counters_test", "pmu_event_filter_test"), NO_PMU),
    "pre_fault_memory_test": Case(),
    **dict.fromkeys(
        ("private_mem_conversions_test", "private_mem_kvm_exits_test"), NO_SW_PROTECTED
    ),
    "recalc_apic_map_test": Case(),
    "set_boot_cpu_id": Case(),
    "set_memory_region_test": Case(),
    "set_sregs_test": Case(),
    "sev_init2_tests": Case(),
    "smm_test": Case(),
    "sev_migrate_tests": _skips("VMs of this host can't migrate"),
    "smaller_maxphyaddr_emulation_test": _skips("not with nested paging on AMD"),
    **dict.fromkeys(
        (
            *("svm_int_ctl_test", "svm_nested_shutdown_test", "svm_nested_soft_inject_test"),
            *("svm_vmcall_test", "triple_fault_event_test"),
        ),
        NO_NESTED,
    ),
    "sync_regs_test": Case(),
    "tsc_msrs_test": Case(),
    "ucna_injection_test": _skips("corrected machine check interrupts are Intel's"),
    "userspace_io_test": Case(),
    "userspace_msr_exit_test": Case(),
    **dict.fromkeys(
        (
            *("hyperv_evmcs", "vmx_apic_access_test", "vmx_close_while_nested_test"),
            *("vmx_dirty_log_test", "vmx_exception_with_invalid_guest_state"),
            *("vmx_invalid_nested_guest_state", "vmx_msrs_test", "vmx_nested_tsc_scaling_test"),
            *("vmx_pmu_caps_test", "vmx_preemption_timer_test", "vmx_set_nested_state_test"),
            "vmx_tsc_adjust_test",
        ),
        NO_VMX,
    ),
    "xapic_ipi_test": Case(),
    "xcr0_cpuid_test": Case(),
    **dict.fromkeys(("xen_shinfo_test", "xen_vmcall_test"), NO_XEN),
    "xss_msr_test": Case(),
}
"""Program -> what it does here."""

TOO_MUCH = {
    "access_tracking_perf_test": "about this machine's kernel: its idle page tracking",
    "apic_bus_clock_test": "seconds of guest time by RDTSC; passes in 20 s with -d 1",
    "dirty_log_perf_test": "1 GiB, copied: passes in minutes",
    "dirty_log_test": "passes in a minute with -I 3 -i 10 -M dirty-log",
    "hardware_disable_test": "512 VMs with 64 threads each: passes in two minutes",
    "max_guest_memory_test": "3/4 of this machine's memory; passes in 90 s with -m 1 -s 1 -c 1",
    "memslot_perf_test": "minutes; passes with -f 0 -e 4 -l 1 -s 512",
    "monitor_mwait_test": "about this machine's CPU: whether it has MWAIT",
    "rseq_test": "asks for thousands of KVM_RUNs a second; passes without that check (-u)",
    "sev_smoke_test": "launches SEV and SEV-ES guests, which aren't simulated",
    "state_test": "its guest uses AVX, which the software CPU lacks",
    "steal_time": "the stolen time of a simulated vCPU would not be the same in every run",
    "system_counter_offset_test": "the guest's TSC counts what it executed",
    "tsc_scaling_sync": "20 vCPUs spin for 5 s of guest time: 2e11 instructions",
    "xapic_state_test": "needs KVM_CAP_X2APIC_API; all before that passes, in a minute",
}
"""Program -> why it isn't run here."""


@pytest.mark.timeout(300)
def test_every_selftest_when_built_has_a_line_in_the_table(kernel_selftests: Path) -> None:
    built = {path.name for path in kernel_selftests.iterdir()}
    assert sorted(built) == sorted(CASES.keys() | TOO_MUCH.keys())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
def test_selftest_when_run_on_the_simulated_host_ends_as_the_table_says(
    kernel_selftests: Path, name: str
) -> None:
    rig.require_supervision()
    case = CASES[name]
    ran = rig.sim(kernel_selftests / name, *case.arguments, seconds=_SECONDS)
    codes = (PASS, SKIP) if case.on_some_machines else (case.code,)
    assert ran.code in codes, ran.out + ran.err
    assert "Traceback" not in ran.err
