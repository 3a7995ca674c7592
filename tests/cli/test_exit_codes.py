"""Exit codes: 0, 1, 2, 4, 124 and 130, each with its sentence."""

from __future__ import annotations

import base64
import errno
import os
import shlex
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from kvmlaunch.uapi import RealPlatform, Result
from tests.cli.command import SECONDS, Cli, command, spawn
from tests.guests import LINE_THEN_SPIN

PLAIN = ("--platform", "kvm", "--vm-type", "plain")
SIM = ("--platform", "sim")


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``no_device(errno)`` makes every open of a device fail on the real platform."""

    def fail(code: int) -> None:
        monkeypatch.setattr(RealPlatform, "open", lambda self, path, flags: Result(-1, code))

    return fail


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENXIO, errno.ENODEV])
@pytest.mark.parametrize("vm_type", ["snp", "plain"])
def test_missing_device_that_was_asked_for_is_4(
    cli: Cli, halt: Path, no_device: Any, vm_type: str, code: int
) -> None:
    no_device(code)
    done = cli("run", "--platform", "kvm", "--vm-type", vm_type, halt)
    assert (done.code, done.out, len(done.errors)) == (4, "", 1)
    assert done.errors[0].startswith(f"kvmlaunch: open /dev/kvm ret=-{code} ")


def test_missing_device_comes_with_advice(cli: Cli, halt: Path, no_device: Any) -> None:
    no_device(errno.ENOENT)
    done = cli("run", *PLAIN, halt)
    assert done.err.splitlines()[-1].startswith("This machine has no KVM: load kvm_amd")


def test_unreadable_device_is_1_with_advice(cli: Cli, halt: Path, no_device: Any) -> None:
    no_device(errno.EACCES)
    done = cli("run", *PLAIN, halt)
    assert (done.code, done.out, len(done.errors)) == (1, "", 1)
    assert done.errors[0].startswith("kvmlaunch: open /dev/kvm ret=-13 (EACCES: Permission denied)")
    assert done.err.splitlines()[-1].startswith("Your user may not open it: join group kvm")


def test_missing_device_that_nobody_asked_for_is_simulated(
    cli: Cli, halt: Path, no_device: Any
) -> None:
    no_device(errno.ENOENT)
    done = cli("run", halt)
    assert done.code == 0
    assert done.err.splitlines()[0] == (
        "platform sim (6.12): a simulated host, since open /dev/kvm ret=-2 "
        "(ENOENT: No such file or directory)"
    )


def test_missing_device_leaves_a_log_of_whole_lines(
    cli: Cli, halt: Path, no_device: Any, tmp_path: Path
) -> None:
    no_device(errno.ENOENT)
    log = tmp_path / "x.jsonl"
    cli("run", *PLAIN, "--log", log, halt)
    assert log.read_bytes().endswith(b"}\n")


def test_host_without_snp_that_was_asked_for_is_4(
    cli: Cli, halt: Path, real_kvm: RealPlatform
) -> None:
    if "simulated" not in cli("run", "--timeout", 10, halt).err.splitlines()[0]:
        pytest.skip("this host has SNP")
    done = cli("run", "--platform", "kvm", halt)
    assert (done.code, done.out, len(done.errors)) == (4, "", 1)
    assert done.errors[0].startswith("kvmlaunch: this host lacks SEV-SNP")


def test_host_without_a_capability_that_nobody_asked_for_is_1(cli: Cli, halt: Path) -> None:
    fault = ("--sim-fault", "KVM_CHECK_EXTENSION:errno=EINVAL@1+")
    assert cli("run", *SIM, *fault, halt).code == 1


def test_timeout_is_124(cli: Cli, spin: Path, real_kvm: RealPlatform) -> None:
    done = cli("run", *PLAIN, "--timeout", "0.2", spin)
    assert (done.code, done.out) == (124, "")
    assert done.errors == ["kvmlaunch: the guest still ran after 0.2 s"]


def test_interrupt_is_130(tmp_path: Path, real_kvm: RealPlatform) -> None:
    image = tmp_path / "spin.bin"
    image.write_bytes(LINE_THEN_SPIN)
    process = subprocess.Popen(
        command("run", *PLAIN, "--timeout", SECONDS, image),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        process.stdout.readline()  # the guest runs
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[1:] == ["kvmlaunch: interrupted by the user"]


def test_interrupt_before_the_guest_runs_is_130(
    cli: Cli, halt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvmlaunch.cli.measure.plan_from", interrupted)
    done = cli("measure", halt)
    assert (done.code, done.out, done.err) == (130, "", "kvmlaunch: interrupted\n")


@pytest.fixture
def identity(tmp_path: Path) -> Any:
    """``identity(digest)`` writes an ID block and its authentication; returns the options.

    Made by snp-create-id-block, that is sevsnpmeasure.id_block.
    """
    other = pytest.importorskip("sevsnpmeasure.id_block")
    keys = []
    for name in ("id.pem", "author.pem"):
        key = ec.generate_private_key(ec.SECP384R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
        (tmp_path / name).write_bytes(key)
        keys.append(str(tmp_path / name))

    def make(digest: bytes) -> tuple[object, ...]:
        text = other.snp_calc_id_block(digest, *keys).splitlines()[0]
        block, auth = (part.split("=", 1)[1] for part in text.split(",", 1))
        (tmp_path / "block.b64").write_text(block)
        (tmp_path / "auth.bin").write_bytes(base64.b64decode(auth))
        return ("--id-block", tmp_path / "block.b64", "--id-auth", tmp_path / "auth.bin")

    return make


def test_id_block_with_the_digest_is_0(cli: Cli, halt: Path, identity: Any) -> None:
    digest = bytes.fromhex(cli("measure", halt).out)
    options = (*identity(digest), "--author-key-enabled")
    assert cli("run", *SIM, *options, halt).code == 0


def test_id_block_with_another_digest_is_1_with_the_searchable_line_first(
    cli: Cli, halt: Path, identity: Any
) -> None:
    digest = bytes.fromhex(cli("measure", halt).out)
    done = cli("-q", "run", *SIM, *identity(bytes(48)), halt)
    assert (done.code, done.out) == (1, "")
    lines = done.err.splitlines()
    assert lines[0] == "kvmlaunch: SNP_LAUNCH_FINISH ret=-5 fw_error=11 'Bad measurement'"
    assert bytes(48).hex() in lines[1]
    assert digest.hex() in lines[1]


def test_id_block_with_another_policy_is_1(cli: Cli, halt: Path, identity: Any) -> None:
    digest = bytes.fromhex(cli("measure", halt).out)
    done = cli("-q", "run", *SIM, *identity(digest), "--policy", "smt,debug", halt)
    assert done.code == 1
    assert done.errors[0].startswith("kvmlaunch: SNP_LAUNCH_FINISH ret=-5 fw_error=7 ")


def test_id_block_signed_by_another_key_is_1(
    cli: Cli, halt: Path, identity: Any, tmp_path: Path
) -> None:
    options = identity(bytes.fromhex(cli("measure", halt).out))
    auth = bytearray((tmp_path / "auth.bin").read_bytes())
    auth[0x40] ^= 1  # first byte of the ID block's signature
    (tmp_path / "auth.bin").write_bytes(auth)
    done = cli("-q", "run", *SIM, *options, halt)
    assert done.code == 1
    assert done.errors[0].startswith("kvmlaunch: SNP_LAUNCH_FINISH ret=-5 fw_error=10 ")


@pytest.mark.parametrize(("enabled", "code"), [((), 0), (("--author-key-enabled",), 1)])
def test_id_key_with_a_bad_author_signature_counts_only_when_enabled(
    cli: Cli, halt: Path, identity: Any, tmp_path: Path, enabled: tuple[str, ...], code: int
) -> None:
    options = identity(bytes.fromhex(cli("measure", halt).out))
    auth = bytearray((tmp_path / "auth.bin").read_bytes())
    auth[0x680] ^= 1  # first byte of the ID key's signature by the author key
    (tmp_path / "auth.bin").write_bytes(auth)
    assert cli("-q", "run", *SIM, *options, *enabled, halt).code == code


def test_log_to_a_reader_that_goes_away_is_1(tmp_path: Path) -> None:
    image = tmp_path / "big.bin"
    image.write_bytes(bytes(400 * 4096))  # more events than a pipe holds
    pipe = f"{shlex.join(command('measure', '--log', '-', image))} | head -1; "
    done = subprocess.run(
        ["bash", "-c", pipe + "exit ${PIPESTATUS[0]}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    assert "Traceback" not in done.stderr


def test_result_to_a_closed_pipe_is_1_without_a_word(halt: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        done = spawn("inspect", halt, stdout=pipe)
    assert (done.code, done.err) == (1, "")


@pytest.mark.parametrize("args", [("measure",), ("inspect",), ("measure", "--log", "-")])
def test_result_to_a_closed_stdout_is_1(halt: Path, args: tuple[str, ...]) -> None:
    done = spawn(*args, halt, preexec_fn=lambda: os.close(1))
    assert (done.code, len(done.errors)) == (1, 1)


def test_guests_text_to_a_closed_stdout_is_1(guests: Path, real_kvm: RealPlatform) -> None:
    done = spawn("run", *PLAIN, guests / "hello.elf", preexec_fn=lambda: os.close(1))
    assert done.code == 1
    assert done.errors == ["kvmlaunch: standard output: Bad file descriptor"]


def test_launch_without_output_to_a_closed_stdout_is_0(halt: Path) -> None:
    assert spawn("run", *SIM, halt, preexec_fn=lambda: os.close(1)).code == 0


@pytest.mark.parametrize("args", [("measure",), ("inspect",), ("inspect", "--json")])
def test_result_to_a_full_disk_is_1(halt: Path, args: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        done = spawn(*args, "--vcpus", 64, halt, stdout=full)
    assert done.code == 1
    assert done.err == "kvmlaunch: standard output: No space left on device\n"


def test_talk_to_a_closed_stderr_is_lost_and_changes_nothing(halt: Path) -> None:
    done = spawn("run", *SIM, halt, preexec_fn=lambda: os.close(2))
    assert (done.code, done.out) == (0, "")


def test_talk_to_a_full_disk_is_lost_and_changes_nothing(halt: Path) -> None:
    with open("/dev/full", "wb") as full:
        assert spawn("run", *SIM, halt, stderr=full).code == 0


def test_failure_with_closed_stderr_keeps_its_code() -> None:
    assert spawn("measure", "nosuch", preexec_fn=lambda: os.close(2)).code == 2


def test_image_with_a_name_in_no_encoding_is_inspected(halt: Path) -> None:
    path = os.fsencode(halt.parent) + b"/\xff.bin"
    with open(path, "wb") as file:
        file.write(halt.read_bytes())
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = spawn("inspect", os.fsdecode(path), env=environment)
    assert (done.code, done.out.splitlines()[0]) == (0, f"{halt.parent}/\\udcff.bin: flat")


@pytest.mark.parametrize("args", [("--version",), ("--help",), ("measure", "--help")])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_help_to_a_full_disk_is_1(
    args: tuple[str, ...], unbuffered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with open("/dev/full", "wb") as full:
        done = spawn(*args, stdout=full)
        mute = spawn(*args, stdout=full, preexec_fn=lambda: os.close(2))
    assert done.code == mute.code == 1
    assert done.err == "kvmlaunch: standard output: No space left on device\n"


@pytest.mark.parametrize("args", [("--version",), ("--help",), ("measure", "--help")])
def test_help_to_a_closed_stdout_is_1(args: tuple[str, ...]) -> None:
    done = spawn(*args, preexec_fn=lambda: os.close(1))
    assert (done.code, done.err) == (1, "kvmlaunch: standard output: Bad file descriptor\n")


def test_installed_command_is_the_one_that_is_tested(halt: Path) -> None:
    (found,) = metadata.entry_points(group="console_scripts", name="kvmlaunch")
    assert found.value == "kvmlaunch.cli:command"
    installed = Path(sys.executable).with_name("kvmlaunch")
    if not installed.exists():
        pytest.skip("kvmlaunch is not installed in this environment")
    done = subprocess.run([installed, "measure", halt], capture_output=True, timeout=SECONDS)
    assert (done.returncode, done.stdout.decode()) == (0, spawn("measure", halt).out)


def test_module_does_the_same_as_the_command(halt: Path) -> None:
    words = [sys.executable, "-m", "kvmlaunch.cli", "measure", halt]
    done = subprocess.run(words, capture_output=True, timeout=SECONDS)
    assert (done.returncode, done.stdout.decode()) == (0, spawn("measure", halt).out)


def test_command_takes_nothing_apart_at_its_end(halt: Path) -> None:
    python, option, program, *words = command("measure", halt)
    register = "import atexit; atexit.register(print, 'the end'); "
    words = [python, option, register + program, *words]
    done = subprocess.run(words, capture_output=True, timeout=SECONDS)
    assert (done.returncode, done.stdout.decode()) == (0, spawn("measure", halt).out)


@pytest.mark.parametrize(
    ("error", "code"),
    [("FormatError('x')", 2), ("KvmLaunchError('x')", 1), ("KeyboardInterrupt", 130)],
)
@pytest.mark.parametrize("full", [False, True])
def test_what_was_printed_before_a_failure_is_not_lost(
    halt: Path, monkeypatch: pytest.MonkeyPatch, error: str, code: int, full: bool
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    planted = (
        "from kvmlaunch.cli import measure\nfrom kvmlaunch.errors import *\n"
        f"def fail(*args):\n print('a result')\n raise {error}\n"
        "measure._measure = fail\n"
    )
    python, option, program, *words = command("measure", halt)
    with open("/dev/full", "wb") as nowhere:
        done = subprocess.run(
            [python, option, planted + program, *words],
            stdout=nowhere if full else subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=SECONDS,
        )
    assert (done.returncode, done.stdout) == (code, None if full else b"a result\n")
    assert (b"No space left on device" in done.stderr) == full
