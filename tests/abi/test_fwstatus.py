from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlaunch.abi import fwstatus
from kvmlaunch.abi.fwstatus import FwStatus

# kernel-snp-abi.md 1.8, without the prefix SEV_RET_
NAMES = {
    0xFFFFFFFF: "NO_FW_CALL",
    0x00: "SUCCESS",
    0x01: "INVALID_PLATFORM_STATE",
    0x02: "INVALID_GUEST_STATE",
    0x03: "INVALID_CONFIG",
    0x04: "INVALID_LEN",
    0x05: "ALREADY_OWNED",
    0x06: "INVALID_CERTIFICATE",
    0x07: "POLICY_FAILURE",
    0x08: "INACTIVE",
    0x09: "INVALID_ADDRESS",
    0x0A: "BAD_SIGNATURE",
    0x0B: "BAD_MEASUREMENT",
    0x0C: "ASID_OWNED",
    0x0D: "INVALID_ASID",
    0x0E: "WBINVD_REQUIRED",
    0x0F: "DFFLUSH_REQUIRED",
    0x10: "INVALID_GUEST",
    0x11: "INVALID_COMMAND",
    0x12: "ACTIVE",
    0x13: "HWSEV_RET_PLATFORM",
    0x14: "HWSEV_RET_UNSAFE",
    0x15: "UNSUPPORTED",
    0x16: "INVALID_PARAM",
    0x17: "RESOURCE_LIMIT",
    0x18: "SECURE_DATA_INVALID",
    0x19: "INVALID_PAGE_SIZE",
    0x1A: "INVALID_PAGE_STATE",
    0x1B: "INVALID_MDATA_ENTRY",
    0x1C: "INVALID_PAGE_OWNER",
    0x1D: "AEAD_OFLOW",
    0x1F: "EXIT_RING_BUFFER",
    0x20: "RMP_INIT_REQUIRED",
    0x21: "BAD_SVN",
    0x22: "BAD_VERSION",
    0x23: "SHUTDOWN_REQUIRED",
    0x24: "UPDATE_FAILED",
    0x25: "RESTORE_REQUIRED",
    0x26: "RMP_INITIALIZATION_FAILED",
    0x27: "INVALID_KEY",
    0x28: "SHUTDOWN_INCOMPLETE",
    0x30: "INCORRECT_BUFFER_LENGTH",
    0x31: "EXPAND_BUFFER_LENGTH_REQUEST",
    0x32: "SPDM_REQUEST",
    0x33: "SPDM_ERROR",
    0x35: "ERR_IN_DEV_CONN",
    0x36: "INVALID_DEV_CTX",
    0x37: "INVALID_TDI_CTX",
    0x38: "INVALID_TDI",
    0x39: "RECLAIM_REQUIRED",
    0x3A: "IN_USE",
    0x3B: "INVALID_DEV_STATE",
    0x3C: "INVALID_TDI_STATE",
    0x3D: "DEV_CERT_CHANGED",
    0x3E: "RESYNC_REQ",
    0x3F: "RESPONSE_TOO_LARGE",
}


def test_fwstatus_has_exactly_the_codes_of_the_kernel_list() -> None:
    assert {int(s): s.name for s in FwStatus} == NAMES


@pytest.mark.parametrize("code", NAMES)
def test_name_of_listed_code_is_the_kernels(code: int) -> None:
    assert fwstatus.name(code) == NAMES[code]


def test_name_of_minus_one_is_no_fw_call() -> None:
    assert fwstatus.name(-1) == "NO_FW_CALL"


@pytest.mark.parametrize(("code", "text"), [(0x8003, "0x8003"), (0x1E, "0x1e"), (0x34, "0x34")])
def test_name_of_unlisted_code_is_hex(code: int, text: str) -> None:
    assert fwstatus.name(code) == text


@pytest.mark.parametrize(
    ("code", "text"),
    # QEMU target/i386/sev.c, sev_fw_errlist
    [
        (0x00, ""),
        (0x01, "Platform state is invalid"),
        (0x02, "Guest state is invalid"),
        (0x07, "Policy is not allowed"),
        (0x0A, "Bad signature"),
        (0x0B, "Bad measurement"),
        (0x0C, "Asid is already owned"),
        (0x0F, "DF_FLUSH is required"),
        (0x16, "Invalid parameter"),
        (0x17, "Required firmware resource depleted"),
        (0x18, "Part-specific integrity check failure"),
        (0x8003, "unknown error"),
    ],
)
def test_text_is_what_qemu_prints(code: int, text: str) -> None:
    assert fwstatus.text(code) == text


@pytest.mark.parametrize("code", sorted(set(NAMES) - {0}))
def test_text_of_listed_code_is_not_empty(code: int) -> None:
    assert fwstatus.text(code) not in ("", "unknown error")


@pytest.mark.parametrize("code", NAMES)
def test_advice_of_listed_code_is_sentences(code: int) -> None:
    assert fwstatus.advice(code).endswith(".")


def test_advice_of_bad_measurement_names_the_id_block() -> None:
    assert "ID block" in fwstatus.advice(0x0B)


def test_advice_of_invalid_param_names_the_cpuid_page() -> None:
    assert "CPUID page" in fwstatus.advice(0x16)


def test_advice_of_reserved_code_shows_it() -> None:
    assert "0x1e" in fwstatus.advice(0x1E)


@pytest.mark.parametrize("code", [0x10000, 0x80000001])
def test_advice_above_16_bits_says_outside_the_list(code: int) -> None:
    assert "outside the SNP ABI list" in fwstatus.advice(code)


@given(st.integers())
def test_functions_of_any_number_give_text(code: int) -> None:
    assert fwstatus.name(code)
    assert isinstance(fwstatus.text(code), str)
    assert fwstatus.advice(code)
