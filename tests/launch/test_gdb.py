"""The GDB server, packet by packet, on plain guests (real and simulated) and SNP guests."""

from __future__ import annotations

import random
import re
import socket
import struct
from collections.abc import Iterator

import pytest

from kvmlaunch.errors import MissingCapability
from kvmlaunch.images import LaunchPlan, PlanOptions, load_image
from kvmlaunch.launch.gdb import GdbError, GdbServer, serve_gdb
from kvmlaunch.launch.gdb_registers import REGISTERS
from kvmlaunch.launch.guest import Guest
from kvmlaunch.uapi import Platform
from tests.host import require_kvm, require_simulated_cpu
from tests.images.builders import Seg, elf64
from tests.launch.gdb_client import Client, Debugged, debugged, until
from tests.launch.rig import Wrapped, small_plan

START = 0x100000
# mov rax, 0x1122334455667788; nop; nop; nop; mov al, 0; out 0xf4, al
WALK = elf64([Seg(START, bytes.fromhex("48b88877665544332211 90 90 90 b000 e6f4"))])
AFTER_MOV, END = START + 10, START + 15
SPIN = elf64([Seg(START, b"\xeb\xfe")])
UD2 = elf64([Seg(START, b"\x0f\x0b")])

Pair = tuple[Debugged, Client]


@pytest.fixture(params=["kvm plain", "sim plain", "sim snp"])
def host(request: pytest.FixtureRequest) -> tuple[Platform, bool]:
    """(platform, whether the guest is an SNP guest)."""
    if request.param == "kvm plain":
        platform = require_kvm()
        _require_guest_debug(platform)
        return platform, False
    return require_simulated_cpu(), request.param == "sim snp"


@pytest.fixture
def walk(host: tuple[Platform, bool]) -> Iterator[Pair]:
    """The guest that walks through a few instructions."""
    with debugged(WALK, host[0], confidential=host[1]) as pair:
        yield pair


@pytest.fixture
def spin(host: tuple[Platform, bool]) -> Iterator[Pair]:
    """The guest that never ends."""
    with debugged(SPIN, host[0], confidential=host[1]) as pair:
        yield pair


def _end(run: Debugged, plain: bytes) -> bytes:
    """How WALK ends: as an SNP guest by an OUT that it has no #VC handler for."""
    return plain if run.guest.state is None else b"T0bthread:1;"


def _require_guest_debug(platform: Platform) -> None:
    with Guest(_plain(), platform) as guest:
        try:
            serve_gdb(guest).close()
        except MissingCapability as error:
            pytest.skip(str(error))


def test_question_when_guest_has_not_run_says_where_it_starts(walk: Pair) -> None:
    assert walk[1](b"?") == b"T05thread:1;"
    assert walk[1].rip == START


def test_step_when_asked_executes_one_instruction(walk: Pair) -> None:
    client = walk[1]
    assert client(b"vCont;s:1") == b"T05thread:1;"
    assert client.rip == AFTER_MOV
    assert client(b"p0") == b"8877665544332211"
    assert client(b"s") == b"T05thread:1;"
    assert client.rip == AFTER_MOV + 1


@pytest.mark.parametrize("kind", [b"0", b"1"])
def test_breakpoint_when_reached_stops_before_the_instruction(walk: Pair, kind: bytes) -> None:
    client = walk[1]
    assert client(b"Z%s,%x,1" % (kind, AFTER_MOV + 2)) == b"OK"
    assert client(b"vCont;c") == b"T05thread:1;"
    assert client.rip == AFTER_MOV + 2
    assert client(b"z%s,%x,1" % (kind, AFTER_MOV + 2)) == b"OK"
    assert client(b"c") == _end(walk[0], b"W00")


@pytest.mark.parametrize(("kind", "name"), [(b"0", b"swbreak"), (b"1", b"hwbreak")])
def test_stop_when_gdb_knows_kinds_names_that_of_the_breakpoint(
    walk: Pair, kind: bytes, name: bytes
) -> None:
    client = walk[1]
    assert client(b"qSupported:multiprocess+;swbreak+;hwbreak+").endswith(b";swbreak+;hwbreak+")
    assert client(b"Z%s,%x,1" % (kind, AFTER_MOV + 1)) == b"OK"
    assert client(b"s") == b"T05thread:1;", "the end of a step"
    assert client(b"c") == b"T05thread:1;%s:;" % name
    assert client(b"?") == b"T05thread:1;%s:;" % name


def test_stop_when_gdb_knows_no_kinds_names_none(walk: Pair) -> None:
    client = walk[1]
    assert b"break" not in client(b"qSupported:multiprocess+")
    assert client(b"Z0,%x,1" % AFTER_MOV) == b"OK"
    assert client(b"c") == b"T05thread:1;"


def test_breakpoint_when_one_of_two_kinds_is_removed_still_stops(walk: Pair) -> None:
    client = walk[1]
    for packet in (b"Z0", b"Z1", b"z0"):
        assert client(b"%s,%x,1" % (packet, AFTER_MOV)) == b"OK"
    assert client(b"c") == b"T05thread:1;"
    assert client.rip == AFTER_MOV


def test_registers_when_written_are_the_guests(walk: Pair) -> None:
    run, client = walk
    assert client(b"P10=%s" % struct.pack("<Q", AFTER_MOV).hex().encode()) == b"OK"
    assert client.rip == AFTER_MOV
    assert client(b"s") == b"T05thread:1;"
    assert client.rip == AFTER_MOV + 1
    assert client(b"p0") == b"0000000000000000", "the MOV was jumped over"
    everything = client(b"g")
    assert len(everything) == 2 * sum(register.size for register in REGISTERS)
    assert client(b"G5500000000000000" + everything[16:]) == b"OK"
    assert client(b"p0") == b"5500000000000000"
    assert run.guest.registers(0) is not None


def test_memory_when_written_is_what_the_guest_executes(walk: Pair) -> None:
    run, client = walk
    assert client(b"m%x,a" % START) == b"48b88877665544332211"
    assert client(b"M%x,2:b001" % (END - 2)) == b"OK"  # mov al, 1
    assert client(b"m%x,2" % (END - 2)) == b"b001"
    assert client(b"X%x,1:\x90" % AFTER_MOV) == b"OK"
    assert client(b"c") == b"T0bthread:1;", "a guest that fails can be looked at"
    assert client(b"c") == b"W01"
    end = "the guest wrote 0x1 to the exit port"
    assert run.outcome().detail == end or run.guest.state is not None


def test_memory_when_nothing_is_there_is_an_error(walk: Pair) -> None:
    client = walk[1]
    assert client(b"m7ffffffff000,4") == b"E0e"
    assert client(b"M7ffffffff000,1:00") == b"E0e"
    assert client(b"mffffffffffffffff,8") == b"E0e"


def test_interrupt_when_guest_runs_stops_it(spin: Pair) -> None:
    client = spin[1]
    client.send(b"vCont;c")
    until(lambda: spin[0].server.debugger.is_running)
    client.socket.sendall(b"\x03")
    assert client.receive() == b"T02thread:1;"
    assert client.rip == START


def test_kill_when_asked_ends_the_run(spin: Pair) -> None:
    spin[1].send(b"k")
    assert spin[0].outcome().detail == "ended by the debugger"
    assert spin[0].outcome().kind == "interrupted"


@pytest.mark.parametrize("how", ["detach", "disconnect", "disconnect while it runs"])
def test_gdb_when_it_leaves_lets_the_guest_go_on_and_may_come_back(spin: Pair, how: str) -> None:
    run, client = spin
    assert client(b"Z0,%x,1" % START) == b"OK"
    if how == "detach":
        assert client(b"D") == b"OK"
    elif how == "disconnect while it runs":
        assert client(b"z0,%x,1" % START) == b"OK"
        client.send(b"c")
        until(lambda: run.server.debugger.is_running)
    client.close()
    until(lambda: run.server.debugger.is_running and not run.server.debugger.present)
    again = Client(run.server.port)
    assert again(b"?") in (b"T02thread:1;", b"T05thread:1;")
    assert again.rip == START
    again.close()


def test_guest_when_it_dies_can_be_looked_at(host: tuple[Platform, bool]) -> None:
    with debugged(UD2, host[0], confidential=host[1]) as (run, client):
        assert client(b"c") == b"T0bthread:1;"
        if host[0].name == "sim":
            assert client.rip == START, "a real KVM has reset the registers"
        assert client(b"c") == b"W01"
        assert run.outcome().kind == "shutdown"


def test_vcpus_when_there_are_two_are_threads_of_their_own(host: tuple[Platform, bool]) -> None:
    with debugged(WALK, host[0], vcpus=2) as (_run, client):
        assert client(b"qfThreadInfo") == b"m1,2"
        assert client(b"qsThreadInfo") == b"l"
        assert bytes.fromhex(client(b"qThreadExtraInfo,2").decode()) == b"vCPU 1"
        assert client(b"vCont;s:2") == b"T05thread:2;"
        assert client.rip == AFTER_MOV
        assert client(b"Hg1") == b"OK"
        assert client.rip == START, "the other one stays where it is"
        assert client(b"vCont;s:1") == b"T05thread:1;"
        assert client(b"p10") != struct.pack("<Q", START).hex().encode()
        assert client(b"T3") == b"E01"


@pytest.mark.parametrize(
    ("packet", "answer"),
    [
        (b"qAttached", b"1"),
        (b"qC", b"QC1"),
        (b"vCont?", b"vCont;c;C;s;S"),
        (b"vMustReplyEmpty", b""),
        (b"qXfer:threads:read::0,100", b""),
        (b"Z2,1000,4", b""),
        (b"m", b"E01"),
        (b"mzz,4", b"E01"),
        (b"m1000", b"E01"),
        (b"m-1,4", b"E01"),
        (b"p999", b"E01"),
        (b"p-1", b"E01"),
        (b"P0=12", b"E01"),
        (b"G00", b"E01"),
        (b"Hg7", b"E01"),
        (b"Hx0", b"E01"),
        (b"Z0,zz,1", b"E01"),
        (b"Z", b"E01"),
        (b"Z0,1ffffffffffffffffff,1", b"E01"),
        (b"vCont;q", b"E01"),
        (b"vCont;s:99", b"E01"),
        (b"vCont;", b"E01"),
        (b"M1000,4:00", b"E01"),
        (b"qXfer:features:read:target.xml:zz", b"E01"),
        (b"", b""),
    ],
)
def test_packet_when_odd_or_bad_has_the_answer_of_the_manual(
    spin: Pair, packet: bytes, answer: bytes
) -> None:
    assert spin[1](packet) == answer
    assert spin[1](b"?") == b"T05thread:1;"


def test_description_when_read_in_parts_names_every_register(spin: Pair) -> None:
    text, offset = b"", 0
    while True:
        part = spin[1](b"qXfer:features:read:target.xml:%x,100" % offset)
        text, offset = text + part[1:], offset + len(part) - 1
        if part[:1] == b"l":
            break
    sizes = [int(bits) // 8 for bits in re.findall(rb'bitsize="(\d+)"', text)]
    assert b"<architecture>i386:x86-64</architecture>" in text
    assert sizes[:17] == [8] * 17
    assert sizes[17:24] == [4] * 7  # eflags, six selectors
    assert sizes[24:32] == [10] * 8
    assert 2 * sum(sizes) == len(spin[1](b"g"))


def test_checksum_when_wrong_is_refused(spin: Pair) -> None:
    client = spin[1]
    client.socket.sendall(b"$?#00")
    assert client.socket.recv(1) == b"-"
    assert client(b"?") == b"T05thread:1;"


def test_garbage_when_sent_changes_nothing() -> None:
    platform = require_simulated_cpu()
    numbers = random.Random(4)
    with debugged(SPIN, platform) as (run, client):
        for _ in range(200):
            noise = bytes(numbers.choice(b"$#}m0,:;gGpPZzX\xff") for _ in range(40))
            # Nothing that lets the guest go, or ends it.
            client.socket.sendall(noise)
        client.socket.sendall(b"$" + b"A" * 100_000 + b"#00")
        client.close()
        again = Client(run.server.port)
        assert again(b"?")[:1] == b"T"
        again.close()


def test_gdb_when_it_reads_no_answers_is_left_alone() -> None:
    with debugged(SPIN, require_simulated_cpu()) as (run, client):
        client.socket.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.socket.sendall(b"$g#67" * (8 << 20))
        debugger = run.server.debugger
        until(lambda: debugger.is_running and not debugger.present)


def test_server_when_it_listens_is_on_the_loopback_only() -> None:
    with Guest(_plain(), require_simulated_cpu()) as guest, serve_gdb(guest) as server:
        address, port = server._listener.getsockname()
        assert (address, port) == ("127.0.0.1", server.port)
        assert port > 0
        with pytest.raises(GdbError, match=f"gdb port {port}: Address already in use"):
            serve_gdb(guest, port)


@pytest.mark.parametrize("port", [-1, 65536])
def test_port_when_there_is_no_such_says_so(port: int) -> None:
    with Guest(_plain(), require_simulated_cpu()) as guest, pytest.raises(GdbError, match="ports"):
        serve_gdb(guest, port)


def test_server_when_closed_twice_has_no_thread_left() -> None:
    with Guest(_plain(), require_simulated_cpu()) as guest:
        server: GdbServer = serve_gdb(guest)
        server.close()
        server.close()
        with pytest.raises(ConnectionError):
            socket.create_connection(("127.0.0.1", server.port), timeout=1).recv(1)


def test_target_when_guest_is_protected_by_a_real_host_is_missing() -> None:
    class Hides(Wrapped):
        def inspector(self, vm_fd: int) -> None:
            return None

    with (
        Guest(small_plan(), Hides(require_simulated_cpu())) as guest,
        pytest.raises(MissingCapability, match="protected guest"),
    ):
        serve_gdb(guest)


def _plain() -> LaunchPlan:
    return load_image(SPIN, PlanOptions(memory=4 << 20, confidential=False))
