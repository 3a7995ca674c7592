"""QEMU, unmodified, on the simulated host: what it launches, and what its guests do."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests import debian, guests
from tests.cli.command import command, events, page_events
from tests.clients.qemu import Command
from tests.host import require_simulated_cpu
from tests.supervisor import rig

_SNP = "q35,confidential-guest-support=sev0,memory-backend=ram,kernel-irqchip=split"
_QUIT = ("-monitor", "stdio")


def _snp_guest(firmware: Path, vcpus: int, cpu: str) -> list[str]:
    return [
        *("-machine", _SNP, "-accel", "kvm", "-cpu", cpu, "-smp", str(vcpus), "-m", "256"),
        *("-object", "memory-backend-memfd,id=ram,size=256M,share=true,prealloc=false"),
        *("-object", "sev-snp-guest,id=sev0,policy=0x30000,cbitpos=51,reduced-phys-bits=1"),
        *("-bios", str(firmware), "-display", "none", "-nodefaults", "-no-reboot"),
    ]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("vcpus", "cpu", "product"),
    [(1, "EPYC-v4", "Milan"), (4, "EPYC-v4", "Genoa"), (1, "EPYC-Milan", "Milan")],
)
def test_qemu_when_it_launches_an_snp_guest_has_the_predicted_digest(
    qemu10: Command, tmp_path: Path, vcpus: int, cpu: str, product: str
) -> None:
    rig.require_supervision()
    firmware = debian.ovmf()
    log, prediction = tmp_path / "log", tmp_path / "prediction"
    guest = _snp_guest(firmware, vcpus, cpu)
    options = ("--sim", f"6.12,product={product}", "--log", str(log))
    ran = rig.sim(*qemu10, *guest, *_QUIT, options=options, input="quit\n")
    assert ran.code == 0, ran.err
    measure = ("measure", "--vmm-type", "QEMU", "--ovmf", firmware, "--log", prediction)
    predicted = rig.run(command(*measure, "--vcpus", vcpus, "--vcpu-type", cpu))
    header, *_, finish = events(log)
    assert (header["platform"], header["profile"]) == ("sim", "6.12")
    assert finish["digest"] == predicted.out.strip()
    taken, foreseen = page_events(log), page_events(prediction)
    for field in ("gpa", "type", "contents", "digest"):
        assert [page[field] for page in taken] == [page[field] for page in foreseen]


@pytest.mark.timeout(300)
def test_qemu_when_the_firmware_refuses_says_so_in_its_words(
    qemu10: Command, tmp_path: Path
) -> None:
    rig.require_supervision()
    guest = _snp_guest(debian.ovmf(), 1, "EPYC-v4")
    options = ("--fault", "SNP_LAUNCH_FINISH:fw=0x0b")
    ran = rig.sim(*qemu10, *guest, *_QUIT, options=options, input="quit\n")
    assert ran.code == 1
    assert "SNP_LAUNCH_FINISH ret=-5 fw_error=11 'Bad measurement'" in ran.err


@pytest.mark.timeout(300)
def test_snp_guest_of_qemu_when_run_gets_as_far_as_its_firmware_does(qemu10: Command) -> None:
    """Debian 12's OVMF shares pages by GHCB, and then takes the APIC for encrypted memory.

    Newer releases map that page unencrypted (edk2, OvmfPkg/Sec: SecMapApicBaseUnencrypted).
    """
    rig.require_supervision()
    require_simulated_cpu()
    line = rig.words(*qemu10, *_snp_guest(debian.ovmf(), 1, "EPYC-v4"), "-monitor", "none")
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = process.stderr.readline()  # then it shows the registers, and waits
        finally:
            process.terminate()
    assert "Convert non guest_memfd backed memory region (0xfee00000 ,+ 0x1000) to private" in said


@pytest.mark.timeout(700)
def test_snp_guest_of_qemu_when_its_firmware_is_new_comes_to_a_shell(
    qemu10: Command, tmp_path: Path
) -> None:
    """``KVMLAUNCH_NEW_OVMF``: an OVMF.fd as of 2024, such as that of Debian 13. Takes minutes."""
    firmware = os.environ.get("KVMLAUNCH_NEW_OVMF")
    if firmware is None:
        pytest.skip("KVMLAUNCH_NEW_OVMF names no OVMF.fd as of 2024")
    console = tmp_path / "console"
    guest = _snp_guest(Path(firmware), 1, "EPYC-v4")
    line = rig.words(*qemu10, *guest, "-monitor", "none", "-serial", f"file:{console}")
    with subprocess.Popen(line) as process:
        try:
            while b"Shell> " not in (console.read_bytes() if console.exists() else b""):
                assert process.poll() is None
                time.sleep(1)
        finally:
            process.terminate()


@pytest.mark.timeout(300)
def test_plain_machine_when_its_firmware_loads_a_kernel_runs_it(
    qemu: Command, tmp_path: Path
) -> None:
    """SeaBIOS, which relocates SMM, then its option ROM, then a PVH kernel in 64-bit mode."""
    rig.require_supervision()
    kernel = guests.build(tmp_path) / "hello.elf"
    machine = [
        # PIC and IOAPIC aren't simulated.
        *("-machine", "pc,kernel-irqchip=split", "-accel", "kvm", "-m", "64"),
        *("-display", "none", "-monitor", "none", "-nodefaults", "-no-reboot"),
        *("-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
        *("-kernel", str(kernel)),
    ]
    ran = rig.sim(*qemu, *machine, seconds=200)
    assert ran.out.startswith("hello from a kvmlaunch guest")
    assert ran.code == 1, ran.err  # isa-debug-exit: twice what was written, and one
