"""kvmlaunch measure: the digest on stdout, the one that sev-snp-measure prints."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path

import pytest

from kvmlaunch.hashing import backends
from tests.cli.command import Cli, spawn
from tests.images.builders import ovmf as synthetic_ovmf

witness = pytest.importorskip("sevsnpmeasure.guest")
CPU_SIGS = pytest.importorskip("sevsnpmeasure.vcpu_types").CPU_SIGS
GCTX = pytest.importorskip("sevsnpmeasure.gctx").GCTX
SevMode = pytest.importorskip("sevsnpmeasure.sev_mode").SevMode
vmsa_module = pytest.importorskip("sevsnpmeasure.vmsa")


@pytest.fixture
def firmware(tmp_path: Path) -> Path:
    """Firmware of 16 KiB with SEV metadata."""
    path = tmp_path / "FIRMWARE.fd"
    path.write_bytes(synthetic_ovmf())
    return path


def expected(path: Path, vcpus: int, signature: int, features: int = 1) -> str:
    """The digest that sev-snp-measure calculates."""
    digest: bytes = witness.calc_launch_digest(
        SevMode.SEV_SNP, vcpus, signature, str(path), "", "", "", features
    )
    return digest.hex()


def expected_halt() -> bytes:
    """The digest of one page at 0x1000 and one VMSA in real mode, by sev-snp-measure's parts."""
    context = GCTX()
    context.update_normal_pages(0x1000, b"\xf4".ljust(0x1000, b"\0"))
    area = vmsa_module.VMSA.build_save_area(0xFFFFFFF0, 1, CPU_SIGS["EPYC-v4"])
    area.cs = vmsa_module.VmcbSeg(0, 0x9B, 0xFFFF, 0)
    area.rip = 0x1000
    context.update_vmsa_page(bytes(area))
    digest: bytes = context.ld()
    return digest


def test_measure_flat_prints_the_digest_on_one_line(cli: Cli, halt: Path) -> None:
    assert cli("measure", halt).out == expected_halt().hex() + "\n"


def test_measure_says_nothing_else(cli: Cli, halt: Path) -> None:
    assert cli("measure", halt).err == ""


def test_measure_base64_prints_the_same_digest(cli: Cli, halt: Path) -> None:
    done = cli("measure", halt, "--output-format", "base64")
    assert done.out == base64.b64encode(expected_halt()).decode() + "\n"


def test_measure_hello_elf_gives_96_hex_digits(cli: Cli, guests: Path) -> None:
    done = cli("measure", guests / "hello.elf")
    assert (done.code, len(done.out.strip())) == (0, 96)
    bytes.fromhex(done.out)


def test_measure_hello_elf_is_what_the_simulated_firmware_measures(cli: Cli, guests: Path) -> None:
    predicted = cli("measure", guests / "hello.elf").out.strip()
    done = cli("run", "--platform", "sim", guests / "hello.elf")
    assert f"launch digest {predicted}" in done.err.splitlines()
    assert "prediction and host agree on all " in done.err


@pytest.mark.parametrize("vcpus", [1, 2, 4, 16])
@pytest.mark.parametrize("features", ["0x1", "0x21"])
@pytest.mark.parametrize("cpu", ["EPYC", "EPYC-v4", "EPYC-Milan", "EPYC-Genoa-v1"])
def test_measure_debian_ovmf_is_what_sev_snp_measure_says(
    cli: Cli, ovmf: Path, vcpus: int, features: str, cpu: str
) -> None:
    options = ("--vcpus", vcpus, "--vcpu-type", cpu, "--guest-features", features)
    done = cli("measure", "--ovmf", ovmf, *options)
    assert done.out.strip() == expected(ovmf, vcpus, CPU_SIGS[cpu], int(features, 16))


def test_measure_with_pasted_options_prints_what_the_other_tool_prints(
    cli: Cli, firmware: Path
) -> None:
    options = ["--ovmf", str(firmware), "--vcpus", "2", "--vcpu-type", "EPYC-v4"]
    options += ["--guest-features", "0x1", "--output-format", "base64"]
    other = subprocess.run(
        [Path(sys.executable).parent / "sev-snp-measure", "--mode", "snp", *options],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert cli("measure", *options).out == other.stdout


@pytest.mark.parametrize("cpu", sorted(CPU_SIGS))
def test_measure_every_vcpu_type_is_what_sev_snp_measure_says(
    cli: Cli, firmware: Path, cpu: str
) -> None:
    done = cli("measure", "--ovmf", firmware, "--vcpu-type", cpu)
    assert done.out.strip() == expected(firmware, 1, CPU_SIGS[cpu])


@pytest.mark.parametrize(
    "options",
    [
        ("--vcpu-sig", "0x00a10f10"),
        ("--vcpu-sig", "10555152"),
        ("--vcpu-family", "25", "--vcpu-model", "17", "--vcpu-stepping", "0"),
        ("--vcpu-family", "0x19", "--vcpu-model", "0x11", "--vcpu-stepping", "0x0"),
    ],
)
def test_measure_cpu_given_by_number_is_that_of_its_name(
    cli: Cli, firmware: Path, options: tuple[str, ...]
) -> None:
    # CPUID leaf 1 EAX of family 0x19, model 0x11, stepping 0: 0x00a10f10.
    done = cli("measure", "--ovmf", firmware, *options)
    assert done.out.strip() == expected(firmware, 1, 0xA10F10)


def test_measure_image_named_without_option_is_the_same_as_with(cli: Cli, firmware: Path) -> None:
    assert cli("measure", firmware).out == cli("measure", "--ovmf", firmware).out


@pytest.mark.parametrize(
    "options",
    [
        ("--policy", "smt,debug"),
        ("--host-data", "11" * 32),
        ("--memory", "1G"),
        ("--cbitpos", "47"),
    ],
)
def test_measure_what_is_not_measured_does_not_change_the_digest(
    cli: Cli, firmware: Path, options: tuple[str, ...]
) -> None:
    assert cli("measure", "--ovmf", firmware, *options).out == cli("measure", firmware).out


def test_measure_verbose_lists_every_page_on_stderr(cli: Cli, halt: Path) -> None:
    done = cli("-v", "measure", halt)
    assert done.out == expected_halt().hex() + "\n"
    assert [line.split()[:3] for line in done.err.splitlines()[1:]] == [
        ["0", "0x000000001000", "NORMAL"],
        ["1", "0xfffffffff000", "VMSA"],
    ]


def test_measure_image_from_a_pipe_is_that_of_the_file(halt: Path) -> None:
    done = spawn("measure", "/dev/stdin", input=halt.read_bytes())
    assert done.out == expected_halt().hex() + "\n"


def test_measure_needs_no_compiled_extension(halt: Path) -> None:
    program = (
        "import sys; sys.modules['kvmlaunch.uapi'] = None; sys.modules['kvmlaunch.kvm'] = None\n"
        "from kvmlaunch.cli import main\n"
        f"sys.exit(main(['measure', {str(halt)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=30
    )
    assert (done.returncode, done.stdout) == (0, expected_halt().hex() + "\n")


@pytest.mark.parametrize("name", backends())
def test_measure_with_each_way_of_hashing_prints_the_same(
    cli: Cli, halt: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("KVMLAUNCH_HASH", name)
    assert cli("measure", halt).out == expected_halt().hex() + "\n"


def test_measure_with_an_unknown_way_of_hashing_names_those_there_are(
    cli: Cli, halt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMLAUNCH_HASH", "md5")
    done = cli("measure", halt)
    assert (done.code, done.out, len(done.err.splitlines())) == (1, "", 1)
    (sentence,) = done.errors
    assert "KVMLAUNCH_HASH=md5" in sentence
    assert sentence.endswith("hashlib")


def test_measure_of_standard_input_is_that_of_the_file(halt: Path) -> None:
    done = spawn("measure", "/dev/stdin", input=halt.read_bytes())
    assert (done.code, done.out) == (0, expected_halt().hex() + "\n")


def test_measure_of_a_pipe_that_was_cut_off_is_one_sentence(guests: Path) -> None:
    image = (guests / "hello.elf").read_bytes()
    done = spawn("measure", "/dev/stdin", input=image[: len(image) // 2])
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1)
    assert done.errors[0].startswith("kvmlaunch: /dev/stdin: ")
    assert "the file at" in done.errors[0]
