"""The compiled extension and the tables over it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.enums import ENUM_DT_FLAGS

import kvmlaunch
from kvmlaunch.abi.fwstatus import FwStatus
from kvmlaunch.abi.page import PageType
from kvmlaunch.uapi import ARGUMENT, COMMAND_ARGUMENT, _ext, command_name, ffi, ioctl_name, lib
from tests.uapi import headers

_PACKAGE = Path(kvmlaunch.__file__).parent
_SOURCES = sorted(
    path for folder in ("uapi", "kvm", "snp", "launch") for path in (_PACKAGE / folder).glob("*.py")
)
_HEADERS = sorted(path.name for path in headers.CSRC.glob("uapi_*.h") if "asserts" not in path.name)
_DEFINES = [
    name for header in [*_HEADERS, "native.h", "supervise.h"] for name in headers.defines(header)
]

# The size in the number of KVM_MEMORY_ENCRYPT_OP is historical; an open array has no size;
# the others take a bare u64 by pointer.
_OTHER_SIZE = {
    "KVM_MEMORY_ENCRYPT_OP": 8,
    "KVM_SET_IDENTITY_MAP_ADDR": 8,
    "KVM_X86_SETUP_MCE": 8,
    "KVM_X86_GET_MCE_CAP_SUPPORTED": 8,
}


def test_ioctl_name_when_request_is_known_is_the_kernels() -> None:
    assert ioctl_name(lib.KVM_SET_MEMORY_ATTRIBUTES) == "KVM_SET_MEMORY_ATTRIBUTES"


def test_ioctl_name_when_request_is_unknown_is_hex() -> None:
    assert ioctl_name(0x1234ABCD) == "0x1234abcd"


def test_command_name_when_known_is_the_kernels() -> None:
    assert command_name(lib.KVM_SEV_SNP_LAUNCH_UPDATE) == "KVM_SEV_SNP_LAUNCH_UPDATE"


def test_command_name_when_unknown_has_the_number() -> None:
    assert command_name(200) == "KVM_SEV_CMD_200"


def test_tables_when_two_names_share_a_number_would_lose_one() -> None:
    """So no two do."""
    assert [ioctl_name(getattr(lib, name)) for name in ARGUMENT] == list(ARGUMENT)
    commands = list(COMMAND_ARGUMENT)
    assert [command_name(getattr(lib, name)) for name in commands] == commands


@pytest.mark.parametrize("name", _DEFINES)
def test_define_when_in_a_header_is_in_lib(name: str) -> None:
    assert isinstance(getattr(lib, name), int)


def test_lib_when_compared_with_the_headers_has_nothing_else() -> None:
    functions = {name for name in dir(lib) if name.startswith("kl_")}
    assert set(dir(lib)) - functions == set(_DEFINES)


def _numbers(source: str) -> set[int]:
    """Integers typed in Python code, whatever their spelling."""
    nodes = ast.walk(ast.parse(source))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and _is_int(node)}


def _is_int(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int


def _request_numbers(source: str) -> set[int]:
    """Typed integers that are requests: of our table, or with KVM's type byte."""
    known = {getattr(lib, name) for name in ARGUMENT}
    return {n for n in _numbers(source) if n in known or n >> 8 & 0xFF == lib.KVMIO}


def _bare_calls(source: str) -> list[int]:
    """Lines that call something named ioctl with a typed request number."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = [call for call in calls if "ioctl" in ast.unparse(call.func).rpartition(".")[2]]
    return [call.lineno for call in named if any(_is_int(arg) for arg in call.args[:2])]


@pytest.mark.parametrize("path", _SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_source_when_searched_holds_no_request_number(path: Path) -> None:
    assert _request_numbers(path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize("path", _SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_source_when_searched_calls_ioctl_with_names_only(path: Path) -> None:
    assert _bare_calls(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", ARGUMENT)
def test_number_search_when_given_any_request_finds_it(name: str) -> None:
    number = getattr(lib, name)
    assert _request_numbers(f"lib.kl_open(x, {number:#x} | {number})") == {number}


@pytest.mark.parametrize(
    "code", ["lib.kl_ioctl(fd, 44672)", "self.ioctl(0x1234, arg)", "p.ioctl_raw(5)"]
)
def test_call_search_when_given_a_bare_number_finds_it(code: str) -> None:
    assert _bare_calls(code) == [1]


@pytest.mark.parametrize("status", FwStatus, ids=lambda status: status.name)
def test_firmware_status_when_the_kernel_names_it_has_its_number(status: FwStatus) -> None:
    name = f"SEV_RET_{status.name}"
    if status >= FwStatus.SHUTDOWN_INCOMPLETE and status != FwStatus.NO_FW_CALL:
        assert not hasattr(lib, name), "newer than 6.12, so in no header yet"
    else:
        assert status == getattr(lib, name) & 0xFFFFFFFF


def test_firmware_statuses_when_in_the_kernel_are_all_in_fwstatus() -> None:
    ours = {f"SEV_RET_{status.name}" for status in FwStatus}
    assert {name for name in dir(lib) if name.startswith("SEV_RET_")} <= ours


@pytest.mark.parametrize("page", PageType, ids=lambda page: page.name)
def test_page_type_when_compared_with_the_kernel_has_its_number(page: PageType) -> None:
    assert page == getattr(lib, f"KVM_SEV_SNP_PAGE_TYPE_{page.name}")


@pytest.mark.parametrize("name", ARGUMENT)
def test_request_when_it_has_a_struct_encodes_its_size(name: str) -> None:
    size = getattr(lib, name) >> 16 & 0x3FFF
    struct = ARGUMENT[name]
    expected = ffi.sizeof(f"struct {struct}") if struct else 0
    assert size == _OTHER_SIZE.get(name, expected)


def test_encrypt_op_when_sized_is_larger_than_its_number_says() -> None:
    assert ffi.sizeof("struct kvm_sev_cmd") == 24


@pytest.mark.parametrize("command", [name for name, struct in COMMAND_ARGUMENT.items() if struct])
def test_command_struct_when_looked_up_exists(command: str) -> None:
    assert ffi.sizeof(f"struct {COMMAND_ARGUMENT[command]}") >= 48


@pytest.mark.parametrize("name", [name for name in ARGUMENT if name.startswith("KVM_")])
def test_request_when_from_kvm_has_its_type_byte(name: str) -> None:
    assert getattr(lib, name) >> 8 & 0xFF == lib.KVMIO


def test_requests_when_in_the_headers_are_all_in_the_table() -> None:
    text = headers.our_text("uapi_kvm.h") + headers.our_text("uapi_sev.h")
    assert set(re.findall(r"^#define (\w+) _IO[WR]*\(", text, re.MULTILINE)) == set(ARGUMENT)


def test_thread_local_memory_is_there_from_the_start_when_a_kick_comes() -> None:
    # A handler that has to allocate it deadlocks where it interrupts malloc().
    with Path(_ext.__file__).open("rb") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        flags = [tag.entry.d_val for tag in dynamic.iter_tags("DT_FLAGS")]
    assert flags
    assert flags[0] & ENUM_DT_FLAGS["DF_STATIC_TLS"]
