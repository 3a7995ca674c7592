"""kvmlaunch run: launch, comparison with the host, and the guest's end."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmlaunch.uapi import RealPlatform
from tests.cli.command import Cli
from tests.guests import ENDS_BADLY
from tests.images.builders import ovmf as synthetic_ovmf

PLAIN = ("--platform", "kvm", "--vm-type", "plain")
SIM = ("--platform", "sim")


@pytest.fixture
def firmware(tmp_path: Path) -> Path:
    """Firmware of 16 KiB with SEV metadata, so with a CPUID page."""
    path = tmp_path / "FIRMWARE.fd"
    path.write_bytes(synthetic_ovmf())
    return path


def test_run_sim_hello_says_every_step_in_order(cli: Cli, guests: Path) -> None:
    image = guests / "hello.elf"
    digest = cli("measure", image).out.strip()
    done = cli("run", *SIM, image)
    assert done.code == 0
    assert done.out == ("hello from a kvmlaunch guest\nSEV-SNP guest, C-bit 51, GHCB protocol 2\n")
    (pages,) = set(re.findall(r"\b([0-9]+) pages", done.err))
    assert done.err.splitlines() == [
        "platform sim (6.12): a simulated host, as asked",
        f"VMSA mode sync: {image} has no VMSA of its own, KVM makes them",
        f"launched {image}: {pages} pages measured, policy 0x30000",
        f"launch digest {digest}",
        f"prediction and host agree on all {pages} pages",
        "vCPU 0: the guest wrote 0x0 to the exit port",
    ]


@pytest.mark.parametrize("profile", ["6.12", "6.18", "7.0"])
def test_run_sim_profile_is_named_in_the_summary(cli: Cli, halt: Path, profile: str) -> None:
    done = cli("run", *SIM, "--sim", profile, halt)
    assert done.err.startswith(f"platform sim ({profile}): a simulated host")


def test_run_sim_debian_ovmf_agrees_with_the_host(cli: Cli, ovmf: Path) -> None:
    # 512 pages of firmware, 31 of metadata (29 zero, secrets, CPUID), 4 VMSAs.
    # How far it boots then is not the matter here.
    done = cli("run", *SIM, "--vcpus", 4, "--timeout", 1, "--ovmf", ovmf)
    assert "prediction and host agree on all 547 pages" in done.err


def test_run_sim_quiet_says_nothing(cli: Cli, halt: Path) -> None:
    done = cli("-q", "run", *SIM, halt)
    assert (done.code, done.out, done.err) == (0, "", "")


def test_run_sim_verbose_shows_every_page(cli: Cli, halt: Path) -> None:
    lines = cli("-v", "run", *SIM, halt).err.splitlines()
    assert [line.split()[2] for line in lines if line.startswith("     ")] == ["NORMAL", "VMSA"]


def test_run_sim_plain_launches_nothing(cli: Cli, halt: Path) -> None:
    done = cli("run", *SIM, "--vm-type", "plain", halt)
    assert done.code == 0
    assert "launch digest" not in done.err


def test_run_sim_uses_no_colour_when_not_on_a_terminal(cli: Cli, guests: Path) -> None:
    done = cli("-v", "run", *SIM, guests / "hello.elf")
    assert "\x1b" not in done.out + done.err


def test_run_auto_names_the_platform_it_took(cli: Cli, halt: Path) -> None:
    first = cli("run", "--timeout", 10, halt).err.splitlines()[0]
    assert first.startswith(("platform kvm: ", "platform sim (6.12): a simulated host, since "))


def test_run_host_that_measures_otherwise_fails_at_the_page(
    cli: Cli, halt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvmlaunch.sim import SimPlatform

    measured = SimPlatform.measured_pages

    def other(self: SimPlatform, vm_fd: int) -> object:
        pages = list(measured(self, vm_fd))
        return [*pages[:-1], pages[-1]._replace(contents=bytes(48))]

    monkeypatch.setattr(SimPlatform, "measured_pages", other)
    done = cli("run", *SIM, halt)
    assert done.code == 1
    assert done.errors[0].startswith(
        "kvmlaunch: prediction and host differ first at page 1: predicted "
    )


def test_run_host_that_cannot_be_asked_says_so(
    cli: Cli, halt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvmlaunch.sim import SimPlatform

    monkeypatch.setattr(SimPlatform, "measured_pages", lambda self, vm_fd: None)
    done = cli("run", *SIM, halt)
    assert done.code == 0
    assert "the host can't be asked what it measured" in done.err


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        # The status words and their texts: AMD 56860, status codes.
        (
            "SNP_LAUNCH_START:fw=7",
            "SNP_LAUNCH_START ret=-5 fw_error=7 'Policy is not allowed' policy=0x30000",
        ),
        (
            "SNP_LAUNCH_UPDATE:fw=0x1a",
            "SNP_LAUNCH_UPDATE ret=-5 fw_error=26 'RMP page state is incorrect' "
            "gpa=0x1000 type=0x1",
        ),
        (
            "KVM_CREATE_VCPU:errno=ENOMEM",
            "KVM_CREATE_VCPU ret=-12 (ENOMEM: Cannot allocate memory) vcpu=0x0",
        ),
        ("KVM_CREATE_VM:errno=EBUSY", "KVM_CREATE_VM ret=-16 (EBUSY: Device or resource busy)"),
    ],
)
def test_run_sim_fault_is_the_first_line_of_the_failure(
    cli: Cli, halt: Path, fault: str, line: str
) -> None:
    done = cli("run", *SIM, "--sim-fault", fault, halt)
    assert done.code == 1
    assert [error.removeprefix("kvmlaunch: ")[: len(line)] for error in done.errors] == [line]


def test_run_sim_partial_progress_is_continued(cli: Cli, guests: Path) -> None:
    done = cli("run", *SIM, "--sim-fault", "SNP_LAUNCH_UPDATE:partial=2", guests / "halt.elf")
    assert done.code == 0
    assert "prediction and host agree on all 8 pages" in done.err


def test_run_sim_vm_killed_by_the_kernel_is_named(cli: Cli, halt: Path) -> None:
    faults = ("--sim-fault", "SNP_LAUNCH_UPDATE:fw=0x1a", "--sim-fault", "SNP_PAGE_RECLAIM:fail")
    done = cli("run", *SIM, *faults, halt)
    assert (done.code, len(done.errors)) == (1, 1)


def test_run_refused_cpuid_page_shows_the_correction(cli: Cli, firmware: Path) -> None:
    fault = "CPUID:correct=0x80000008.ebx"
    done = cli("run", *SIM, "--sim-fault", fault, "--ovmf", firmware)
    assert done.code == 1
    assert done.errors[0].startswith("kvmlaunch: SNP_LAUNCH_UPDATE ret=-5 fw_error=22 ")
    assert "0x80000008" in done.err.splitlines()[-1]


def test_run_refused_cpuid_page_is_taken_when_retried(cli: Cli, firmware: Path) -> None:
    fault = "CPUID:correct=0x80000008.ebx"
    done = cli("run", *SIM, "--retry-cpuid", "--sim-fault", fault, "--ovmf", firmware)
    assert "CPUID page corrected by the firmware: leaf 0x80000008 index 0x0 EBX: " in done.err
    assert "prediction and host agree" in done.err


def test_run_plain_hello_prints_on_stdout_only(
    cli: Cli, guests: Path, real_kvm: RealPlatform
) -> None:
    done = cli("run", *PLAIN, guests / "hello.elf")
    assert (done.code, done.out) == (0, "hello from a kvmlaunch guest\n")
    assert done.err.splitlines() == [
        "platform kvm: this machine's kernel",
        "vCPU 0: the guest wrote 0x0 to the exit port",
    ]


def test_run_plain_quiet_leaves_the_guests_text(
    cli: Cli, guests: Path, real_kvm: RealPlatform
) -> None:
    done = cli("-q", "run", *PLAIN, guests / "hello.elf")
    assert (done.out, done.err) == ("hello from a kvmlaunch guest\n", "")


def test_run_plain_halt_ends_well(cli: Cli, guests: Path, real_kvm: RealPlatform) -> None:
    done = cli("run", *PLAIN, guests / "halt.elf")
    assert (done.code, done.err.splitlines()[-1]) == (0, "vCPU 0: the guest halted")


def test_run_plain_guest_that_ends_badly_fails_with_its_value(
    cli: Cli, tmp_path: Path, real_kvm: RealPlatform
) -> None:
    path = tmp_path / "bad.bin"
    path.write_bytes(ENDS_BADLY)
    done = cli("run", *PLAIN, path)
    assert done.code == 1
    assert done.errors == ["kvmlaunch: vCPU 0: the guest wrote 0x1 to the exit port"]


def test_run_plain_access_to_nothing_names_address_and_neighbour(
    cli: Cli, guests: Path, real_kvm: RealPlatform
) -> None:
    done = cli("run", *PLAIN, guests / "misbehave.elf")
    assert done.code == 1
    assert done.errors == [
        "kvmlaunch: vCPU 0: KVM_EXIT_MMIO read gpa=0xd0000000 size=4: nothing is at this GPA "
        "(nearest launched range: segment 0x100000..0x101000)"
    ]


def test_run_plain_triple_fault_is_named(cli: Cli, guests: Path, real_kvm: RealPlatform) -> None:
    done = cli("run", *PLAIN, "--entry", "0x100100", guests / "misbehave.elf")
    assert done.code == 1
    assert done.errors == ["kvmlaunch: vCPU 0: KVM_EXIT_SHUTDOWN: triple fault"]


def test_run_plain_verbose_shows_the_exit(cli: Cli, guests: Path, real_kvm: RealPlatform) -> None:
    done = cli("-v", "run", *PLAIN, guests / "halt.elf")
    assert "vCPU 0: KVM_EXIT_HLT" in done.err.splitlines()


def test_run_plain_with_two_vcpus_ends_when_both_halted(
    cli: Cli, halt: Path, real_kvm: RealPlatform
) -> None:
    assert cli("run", *PLAIN, "--vcpus", 2, halt).code == 0


# Where the C-bit is


def test_run_64_bit_image_takes_the_hosts_c_bit(
    cli: Cli, guests: Path, tells_cbitpos: Callable[[int], None]
) -> None:
    tells_cbitpos(47)
    digest = cli("measure", "--cbitpos", 47, guests / "halt.elf").out.strip()
    assert digest != cli("measure", guests / "halt.elf").out.strip()
    # What the processor does with such page tables is another matter.
    done = cli("run", *SIM, guests / "halt.elf")
    assert f"launch digest {digest}" in done.err.splitlines()


def test_run_64_bit_image_on_a_host_that_does_not_tell_asks_for_the_option(
    cli: Cli, guests: Path, silent_cpuid: None
) -> None:
    done = cli("run", *SIM, guests / "halt.elf")
    assert (done.code, done.out) == (2, "")
    assert done.errors == [
        f"kvmlaunch: {guests / 'halt.elf'} needs page tables with the C-bit, and this host's "
        "CPUID doesn't say which bit that is: give --cbitpos BIT"
    ]


def test_run_64_bit_image_with_the_option_is_launched_on_a_host_that_does_not_tell(
    cli: Cli, guests: Path, silent_cpuid: None
) -> None:
    done = cli("run", *SIM, "--cbitpos", 46, guests / "halt.elf")
    assert "prediction and host agree on all" in done.err


def test_run_32_bit_image_is_launched_on_a_host_that_does_not_tell(
    cli: Cli, guests: Path, silent_cpuid: None
) -> None:
    assert cli("run", *SIM, guests / "hello.elf").code == 0


def test_run_with_another_c_bit_than_the_hosts_is_refused(cli: Cli, guests: Path) -> None:
    done = cli("run", *SIM, "--cbitpos", 47, guests / "halt.elf")
    assert done.code == 2
    assert "have the C-bit at bit 47, but on this host it is bit 51" in done.err


@pytest.mark.parametrize(
    ("sim", "profile", "says"),
    [
        ([], "multi-vmpl", "VMPL1: may read"),
        (["--sim", "6.12"], "6.12", "VMPL0 only"),
        (["--sim", "seed=3"], "multi-vmpl,seed=3", "VMPL1: may read"),
    ],
)
def test_run_sim_image_that_asks_for_vmpls_gets_a_host_with_them_unless_told(
    cli: Cli, guests: Path, sim: list[str], profile: str, says: str
) -> None:
    done = cli("run", *SIM, *sim, guests / "vmpl.elf")
    assert done.err.startswith(f"platform sim ({profile}): ")
    assert says in done.out
