"""How a program starts and ends on the simulated host, and who hears of it."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.cli.command import command
from tests.host import require_simulated_cpu
from tests.supervisor.rig import SECONDS, WELL, Ran, require_supervision, run, sim, words

Client = Callable[..., Ran]

pytestmark = pytest.mark.usefixtures("_supervision")


@pytest.fixture
def _supervision() -> None:
    require_supervision()


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a supervised program that says "ready" when it is."""
    running: list[subprocess.Popen[str]] = []

    def start(*program: object) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen(words(*program), text=True, **pipes))  # type: ignore[call-overload]
        assert running[-1].stdout is not None
        assert running[-1].stdout.readline() == "ready\n"
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def adopted_all(supervisor: psutil.Process) -> bool:
    try:
        return all(child.ppid() == supervisor.pid for child in supervisor.children(True))
    except psutil.NoSuchProcess:  # the program was waited for just now
        return False


@pytest.mark.parametrize("code", [0, 1, 77, 255])
def test_the_exit_code_is_passed_on_when_a_program_ends(code: int) -> None:
    assert sim("sh", "-c", f"exit {code}") == Ran(code)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_the_exit_code_tells_the_signal_when_one_ends_a_program(number: signal.Signals) -> None:
    assert sim("sh", "-c", f"kill -{number.value} $$") == Ran(128 + number)


def test_streams_are_the_programs_when_it_reads_and_writes() -> None:
    ran = sim("sh", "-c", "cat; echo to stderr >&2; ls /proc/self/fd | wc -l", input="given\n")
    # 0, 1, 2, and the folder that is listed: nothing of the supervisor's.
    assert ran == Ran(0, "given\n4\n", "to stderr\n")


def test_the_environment_is_the_callers_when_a_program_starts() -> None:
    ran = sim("sh", "-c", "echo $SOME; trap", env={**os.environ, "SOME": "thing"})
    assert ran == Ran(0, "thing\n")


@pytest.mark.parametrize("before", ["true", "trap '' INT QUIT"])  # as for what is behind &
def test_signals_are_as_they_come_when_a_program_starts(before: str) -> None:
    grep = ["grep", "-E", "^Sig(Blk|Ign)|^Shd", "/proc/self/status"]
    shell = ["sh", "-c", f'{before}; exec "$@"', "sh"]
    assert run([*shell, *words(*grep)]) == run([*shell, *grep])


@pytest.mark.parametrize(
    ("program", "sentence", "code"),
    [
        ("/nowhere/program", "/nowhere/program: no such program", 2),
        ("nowhere-at-all", "nowhere-at-all: no such program", 2),
        ("{folder}/plain", "{folder}/plain: it may not be executed", 2),
        ("{folder}/garbage", "{folder}/garbage can't be started: Exec format error", 1),
    ],
)
def test_one_sentence_says_it_when_a_program_cannot_start(
    tmp_path: Path, program: str, sentence: str, code: int
) -> None:
    (tmp_path / "plain").write_text("#!/bin/sh\n")
    (tmp_path / "garbage").write_text("nothing\n")
    (tmp_path / "garbage").chmod(0o700)
    program, sentence = program.format(folder=tmp_path), sentence.format(folder=tmp_path)
    assert sim(program) == Ran(code, "", f"kvmlaunch: {sentence}\n")


@pytest.mark.parametrize(
    "options", [("--sim", "5.0"), ("--sim", "6.12,x=1"), ("--fault", "nonsense")]
)
def test_nothing_is_started_when_options_are_bad(options: tuple[str, ...]) -> None:
    ran = sim("echo", "started", options=options)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith("kvmlaunch: ")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (("sim",), "name a program: kvmlaunch sim [options] -- COMMAND ..."),
        (("sim", "--"), "name a program: kvmlaunch sim [options] -- COMMAND ..."),
        (("sim", "--ioctls", "--", "true"), "--ioctls needs --log FILE"),
    ],
)
def test_a_command_line_is_refused_when_something_is_missing(
    line: tuple[str, ...], sentence: str
) -> None:
    assert run(command(*line)) == Ran(2, "", f"kvmlaunch: {sentence}\n")


def test_one_sentence_says_it_when_the_program_is_supervised_already() -> None:
    ran = sim(*words("true"))
    assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)
    assert "already" in ran.err
    assert "Traceback" not in ran.err


def test_processes_are_waited_for_when_a_program_leaves_them_behind(clients: Path) -> None:
    with subprocess.Popen(
        words(clients / "processes", "leaves"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.7)
        # It still has a simulated host, and the exit code is that of the program itself.
        assert process.communicate(timeout=SECONDS) == ("left\n", None)
        assert process.returncode == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_forwarded_when_the_supervisor_gets_them(
    clients: Path, started: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    process = started(clients / "processes", "waits")
    process.send_signal(number)
    assert process.communicate(timeout=SECONDS) == (f"{number.value}\n", "")
    assert process.returncode == 5


def test_signals_are_forwarded_when_only_what_was_left_behind_is_there(
    clients: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    process = started(clients / "processes", "waits", "as-a-child")
    supervisor = psutil.Process(process.pid)
    wait_until(lambda: adopted_all(supervisor))
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=SECONDS) == (f"{signal.SIGTERM.value}\n", "")
    assert process.returncode == 0


def test_ctrl_c_is_the_programs_when_it_comes_from_the_terminal(clients: Path) -> None:
    pid, terminal = pty.fork()
    if not pid:
        command = words(clients / "processes", "waits")
        os.execv(command[0], command)
    seen = b""
    while b"ready" not in seen:
        seen += os.read(terminal, 100)
    os.write(terminal, b"\x03")
    while select.select([terminal], [], [], SECONDS)[0]:
        try:
            seen += os.read(terminal, 100)
        except OSError:  # everybody has closed it
            break
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    assert seen.replace(b"^C", b"").split() == [b"ready", str(signal.SIGINT.value).encode()]


def test_programs_end_when_their_supervisor_is_killed(
    clients: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    process = started(clients / "processes", "loops")
    (program,) = psutil.Process(process.pid).children()
    process.kill()
    wait_until(lambda: is_gone(program.pid))


def test_the_supervisor_ends_when_its_program_is_killed(
    clients: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    process = started(clients / "processes", "loops")
    (program,) = psutil.Process(process.pid).children()
    program.kill()
    assert process.communicate(timeout=SECONDS) == ("", "")
    assert process.returncode == 128 + signal.SIGKILL


LEFT = """
import os, sys, threading
from kvmlaunch.sim.spec import parse_spec
from kvmlaunch.supervisor import Supervisor

def mine():
    return sorted(os.listdir("/proc/self/fd")), threading.active_count()

def run():
    return Supervisor(parse_spec("6.12")).run(sys.argv[1:])

assert run() == 0
before = mine()
assert run() == 0
assert mine() == before, (before, mine())
assert not [link for link in os.listdir("/proc/self/map_files")
            if "simulated" in os.readlink(f"/proc/self/map_files/{link}")]
"""


def test_nothing_is_left_when_a_program_ends_with_all_its_files_open(clients: Path) -> None:
    assert run([sys.executable, "-c", LEFT, str(clients / "running"), "two"]) == WELL


NOT_STARTED = """
import errno, os, sys
import psutil
from kvmlaunch.errors import KvmLaunchError
from kvmlaunch.sim.spec import parse_spec
from kvmlaunch.supervisor import Supervisor, descriptors, dispatcher

def fail(program):
    try:
        Supervisor(parse_spec("6.12")).run([program])
    except KvmLaunchError as error:
        print(error)
    return os.listdir("/proc/self/fd"), psutil.Process().children()

def no_memfd(name, size):
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

class NoInotify:
    class kl_watch_new:
        ret, err = -1, errno.EMFILE

def no_thread(self):
    raise RuntimeError("can't start new thread")

before = fail(sys.argv[1])
assert fail(sys.argv[1]) == before, before
for module, name, lacking in (
    (descriptors, "new_memfd", no_memfd),
    (descriptors, "lib", NoInotify),
    (dispatcher.threading.Thread, "start", no_thread),
):
    there = getattr(module, name)
    setattr(module, name, lacking)
    left = fail("cat")
    assert left == before, (name, left, before)
    setattr(module, name, there)
"""


def test_nothing_is_left_when_a_program_cannot_start_or_be_watched(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage"
    garbage.write_text("nothing\n")
    garbage.chmod(0o700)
    ran = run([sys.executable, "-c", NOT_STARTED, str(garbage)])
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines() == [
        *[f"{garbage} can't be started: Exec format error"] * 2,
        "cat can't be watched: Too many open files",
        "inotify_init: Too many open files (fs.inotify.max_user_instances?)",
        "this host lacks one more thread, needed for kvmlaunch sim",
    ]


BUG = """
import sys
from kvmlaunch.cli import main
from kvmlaunch.sim.system import KvmDevice

def wrong(self, request, arg):
    raise ValueError("it is wrong")

KvmDevice.ioctl = wrong
sys.exit(main(sys.argv[1:]))
"""
MANY = """
import fcntl
kvm = open("/dev/kvm")
for _ in range(2000):
    assert fcntl.ioctl(kvm, 0xAE00, 0) == 12
print("all is well")
"""
AT_ONCE = """
import sys, threading, time
from kvmlaunch.sim.spec import parse_spec
from kvmlaunch.supervisor import Supervisor

alone = threading.Lock()
calls = []

def on_call(tid, call):
    assert alone.acquire(blocking=False)
    time.sleep(0.5 if call.name == "KVM_RUN" else 0)
    calls.append(call.name)
    alone.release()

assert not Supervisor(parse_spec("6.12"), on_call=on_call).run(sys.argv[1:])
assert calls.count("KVM_RUN") == 2
"""


def test_calls_are_told_one_by_one_when_two_vcpus_run(clients: Path) -> None:
    # A log's lines would be lost, or there twice.
    require_simulated_cpu()
    assert run([sys.executable, "-c", AT_ONCE, str(clients / "running"), "two"]) == WELL


def test_the_program_is_not_bothered_when_its_log_cannot_be_written() -> None:
    ran = sim(sys.executable, "-c", MANY, options=("--log", "/dev/full", "--ioctls"))
    assert (ran.code, ran.out) == (1, "all is well\n")
    assert ran.err == "kvmlaunch: log /dev/full: No space left on device\n"


ASKS = """
import fcntl
kvm = open("/dev/kvm")
try:
    fcntl.ioctl(kvm, 0xAE00, 0)
except OSError as error:
    print(error.errno)
print("goes on")
"""


def test_the_end_tells_of_it_when_the_simulated_host_has_a_bug() -> None:
    arguments = words(sys.executable, "-c", ASKS)[len(command()) :]
    ran = run([sys.executable, "-c", BUG, *arguments])
    assert (ran.code, ran.out) == (1, "5\ngoes on\n")  # EIO
    sentence = r"kvmlaunch: a bug of the simulated host: ValueError: it is wrong \(.*:\d+\)\n"
    assert re.fullmatch(sentence, ran.err)
