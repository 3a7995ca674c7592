"""Firmware status codes: what the secure processor answered, and who should act.

The world is open: any number has a name, a text and an advice, so that a code of newer
firmware is never hidden behind an error of ours.

Sources: AMD 56860, status codes; Linux uapi psp-sev.h (SEV_RET_*) for the names, 0x28 and
above from 7.x. `text` up to 0x18 is what QEMU prints behind ``fw_error=``, so that the
line can be searched for; QEMU 9 and 10 print "unknown error" above that.
"""

from __future__ import annotations

import enum

__all__ = ["FwStatus", "advice", "name", "text"]


class FwStatus(enum.IntEnum):
    """The codes that have a name; members are spelt as SEV_RET_* without the prefix."""

    SUCCESS = 0x00
    INVALID_PLATFORM_STATE = 0x01
    INVALID_GUEST_STATE = 0x02
    INVALID_CONFIG = 0x03
    INVALID_LEN = 0x04
    ALREADY_OWNED = 0x05
    INVALID_CERTIFICATE = 0x06
    POLICY_FAILURE = 0x07
    INACTIVE = 0x08
    INVALID_ADDRESS = 0x09
    BAD_SIGNATURE = 0x0A
    BAD_MEASUREMENT = 0x0B
    ASID_OWNED = 0x0C
    INVALID_ASID = 0x0D
    WBINVD_REQUIRED = 0x0E
    DFFLUSH_REQUIRED = 0x0F
    INVALID_GUEST = 0x10
    INVALID_COMMAND = 0x11
    ACTIVE = 0x12
    HWSEV_RET_PLATFORM = 0x13
    HWSEV_RET_UNSAFE = 0x14
    UNSUPPORTED = 0x15
    INVALID_PARAM = 0x16
    RESOURCE_LIMIT = 0x17
    SECURE_DATA_INVALID = 0x18
    INVALID_PAGE_SIZE = 0x19
    INVALID_PAGE_STATE = 0x1A
    INVALID_MDATA_ENTRY = 0x1B
    INVALID_PAGE_OWNER = 0x1C
    AEAD_OFLOW = 0x1D
    EXIT_RING_BUFFER = 0x1F
    RMP_INIT_REQUIRED = 0x20
    BAD_SVN = 0x21
    BAD_VERSION = 0x22
    SHUTDOWN_REQUIRED = 0x23
    UPDATE_FAILED = 0x24
    RESTORE_REQUIRED = 0x25
    RMP_INITIALIZATION_FAILED = 0x26
    INVALID_KEY = 0x27
    SHUTDOWN_INCOMPLETE = 0x28
    INCORRECT_BUFFER_LENGTH = 0x30
    EXPAND_BUFFER_LENGTH_REQUEST = 0x31
    SPDM_REQUEST = 0x32
    SPDM_ERROR = 0x33
    ERR_IN_DEV_CONN = 0x35
    INVALID_DEV_CTX = 0x36
    INVALID_TDI_CTX = 0x37
    INVALID_TDI = 0x38
    RECLAIM_REQUIRED = 0x39
    IN_USE = 0x3A
    INVALID_DEV_STATE = 0x3B
    INVALID_TDI_STATE = 0x3C
    DEV_CERT_CHANGED = 0x3D
    RESYNC_REQ = 0x3E
    RESPONSE_TOO_LARGE = 0x3F
    NO_FW_CALL = 0xFFFFFFFF


def name(code: int) -> str:
    """Return the code's name, or the code in hex (`0x8003`) if it has none.

    -1 and 0xFFFFFFFF are both NO_FW_CALL: the kernel's word is a u32.
    """
    known = _known(code)
    return hex(code) if known is None else known.name


def text(code: int) -> str:
    """Return the short text for ``fw_error=11 'Bad measurement'``; '' for SUCCESS."""
    known = _known(code)
    return "unknown error" if known is None else _ROWS[known][0]


def advice(code: int) -> str:
    """Return what the code means in an SNP launch and who should act."""
    known = _known(code)
    if known is not None:
        return _ROWS[known][1]
    if not 0 <= code <= 0xFFFF:
        return (
            f"{hex(code)} is outside the SNP ABI list (an extended status of the secure "
            "processor). The host's administrator should look into the kernel log."
        )
    return (
        f"{hex(code)} is not in the list known here. The host's firmware may be newer: look it "
        "up in AMD 56860, status codes."
    )


def _known(code: int) -> FwStatus | None:
    if code == -1:
        return FwStatus.NO_FW_CALL
    try:
        return FwStatus(code)
    except ValueError:
        return None


_HOST_BUG = "This points to the kernel or the firmware, not to the image: ask the host's admin."
_TIO = "This belongs to trusted I/O and is not expected in a launch: ask the host's admin."
_NOT_SNP = "This belongs to SEV commands that an SNP launch does not use: report it as a bug."

# code: (text, advice)
_ROWS: dict[FwStatus, tuple[str, str]] = {
    FwStatus.SUCCESS: (
        "",
        "The firmware had no objection; if the call failed, the kernel refused it, and errno says "
        "why.",
    ),
    FwStatus.INVALID_PLATFORM_STATE: (
        "Platform state is invalid",
        "SNP is not initialised on this host, or was shut down. The host's admin should look for "
        "SEV-SNP lines in the kernel log.",
    ),
    FwStatus.INVALID_GUEST_STATE: (
        "Guest state is invalid",
        "The guest is not in the state that the command needs, as with an update after FINISH. "
        "The launcher has its steps in the wrong order: start again with a new VM.",
    ),
    FwStatus.INVALID_CONFIG: (
        "Platform configuration is invalid",
        "The platform is not configured for this command, or pages of the same ASID are still "
        "assigned. The host's admin should act.",
    ),
    FwStatus.INVALID_LEN: (
        "Buffer too small",
        "A buffer was too short; firmware answers a question for the needed length this way. The "
        "launcher should retry with the length it was told.",
    ),
    FwStatus.ALREADY_OWNED: ("Platform is already owned", _NOT_SNP),
    FwStatus.INVALID_CERTIFICATE: ("Certificate is invalid", _NOT_SNP),
    FwStatus.POLICY_FAILURE: (
        "Policy is not allowed",
        "At START: the host does not meet the guest policy (SMT, least ABI version, a reserved "
        "bit), so the user changes the policy or the admin the host. At FINISH: the digest is "
        "right, but the ID block names another policy than the launch, so the user fixes the ID "
        "block.",
    ),
    FwStatus.INACTIVE: (
        "Guest is not active",
        "The guest has no ASID. KVM activates it at START, so start again with a new VM; if it "
        "stays, ask the host's admin.",
    ),
    FwStatus.INVALID_ADDRESS: (
        "Invalid address",
        f"A physical address in the command was refused. {_HOST_BUG}",
    ),
    FwStatus.BAD_SIGNATURE: (
        "Bad signature",
        "Digest and policy in the ID block are right; the signature of the ID block or of the ID "
        "key, or a key itself, is wrong. The user should sign the ID block again (P-384, curve "
        "code 2).",
    ),
    FwStatus.BAD_MEASUREMENT: (
        "Bad measurement",
        "The launch digest in the ID block is not that of the guest as launched. The user should "
        "compare image, vCPU count, vCPU type, guest features and policy with what was measured "
        "for the ID block.",
    ),
    FwStatus.ASID_OWNED: (
        "Asid is already owned",
        "The kernel chose an ASID that another guest has. " + _HOST_BUG,
    ),
    FwStatus.INVALID_ASID: (
        "Invalid ASID",
        "The ASID is out of the range for SNP. The host's admin should check the number of "
        "SEV-SNP ASIDs set in the BIOS (minimum SEV non-ES ASID).",
    ),
    FwStatus.WBINVD_REQUIRED: ("WBINVD is required", _HOST_BUG),
    FwStatus.DFFLUSH_REQUIRED: (
        "DF_FLUSH is required",
        "An ASID is used again before a DF_FLUSH, which is the kernel's task. " + _HOST_BUG,
    ),
    FwStatus.INVALID_GUEST: (
        "Guest handle is invalid",
        f"The guest context page is not one. {_HOST_BUG}",
    ),
    FwStatus.INVALID_COMMAND: (
        "Invalid command",
        "The firmware does not know the command. The host's admin should update the firmware.",
    ),
    FwStatus.ACTIVE: (
        "Guest is active",
        f"The guest has an ASID already. {_HOST_BUG}",
    ),
    FwStatus.HWSEV_RET_PLATFORM: (
        "Hardware error",
        "The hardware failed, but the platform is still safe. The host's admin should reset the "
        "host.",
    ),
    FwStatus.HWSEV_RET_UNSAFE: (
        "Hardware unsafe",
        "The hardware failed and the platform is no longer safe. The host's admin should take it "
        "out of use.",
    ),
    FwStatus.UNSUPPORTED: (
        "Feature not supported",
        "The platform lacks the feature asked for. The user should do without it, or the host's "
        "admin update the firmware.",
    ),
    FwStatus.INVALID_PARAM: (
        "Invalid parameter",
        "At UPDATE of a CPUID page: firmware refused the table and left a corrected one in the "
        "buffer; retry with that, once. At FINISH: digest and policy of the ID block are right, "
        "but a key algorithm in the ID auth page is not 1. Elsewhere: a reserved bit or an "
        "unaligned address, which the launcher should fix.",
    ),
    FwStatus.RESOURCE_LIMIT: (
        "Required firmware resource depleted",
        "The firmware has no room for another guest. The host's admin should stop guests.",
    ),
    FwStatus.SECURE_DATA_INVALID: (
        "Part-specific integrity check failure",
        "The processor's own stored data does not pass its check. The host's admin should turn to "
        "the vendor.",
    ),
    FwStatus.INVALID_PAGE_SIZE: (
        "RMP page size is incorrect",
        "Page size in the RMP and in the command differ, or a VMSA, SECRETS or CPUID page is not "
        f"4 KiB. {_HOST_BUG}",
    ),
    FwStatus.INVALID_PAGE_STATE: (
        "RMP page state is incorrect",
        "The page is not free for the launch, as when it was added before. The launcher should "
        "add each page once, and throw the VM away after a failed launch.",
    ),
    FwStatus.INVALID_MDATA_ENTRY: ("Metadata entry is invalid", _NOT_SNP),
    FwStatus.INVALID_PAGE_OWNER: (
        "Page ownership is incorrect",
        f"The page belongs to another guest's ASID. {_HOST_BUG}",
    ),
    FwStatus.AEAD_OFLOW: (
        "AEAD sequence number would overflow",
        "A guest message channel is used up. The guest must be launched anew.",
    ),
    FwStatus.EXIT_RING_BUFFER: ("Ring buffer mode was left", _NOT_SNP),
    FwStatus.RMP_INIT_REQUIRED: (
        "RMP must be initialized",
        "The host's admin should turn SNP on in the BIOS and the kernel, and look for SEV-SNP "
        "lines in the kernel log.",
    ),
    FwStatus.BAD_SVN: (
        "Security version is too low",
        "Firmware refuses an image older than the committed version. The host's admin should act.",
    ),
    FwStatus.BAD_VERSION: (
        "Firmware version is too low",
        "Firmware refuses an image older than the committed version. The host's admin should act.",
    ),
    FwStatus.SHUTDOWN_REQUIRED: (
        "Shutdown is required first",
        "A firmware update needs SNP shut down. The host's admin should act.",
    ),
    FwStatus.UPDATE_FAILED: (
        "Firmware update failed",
        "The host's admin should repeat or undo the firmware update.",
    ),
    FwStatus.RESTORE_REQUIRED: (
        "Earlier firmware must be restored",
        "A firmware update failed half way. The host's admin should restore the committed one.",
    ),
    FwStatus.RMP_INITIALIZATION_FAILED: (
        "RMP initialization failed",
        "The host's admin should look at the RMP settings in the BIOS, then reset the host.",
    ),
    FwStatus.INVALID_KEY: (
        "Key is invalid",
        "The key asked for does not exist or is masked on this platform, as a VLEK that was never "
        "loaded. The host's admin should act.",
    ),
    FwStatus.SHUTDOWN_INCOMPLETE: (
        "Shutdown is incomplete",
        "An earlier SNP shutdown did not finish. The host's admin should reset the host.",
    ),
    FwStatus.INCORRECT_BUFFER_LENGTH: ("Buffer length is incorrect", _TIO),
    FwStatus.EXPAND_BUFFER_LENGTH_REQUEST: ("A larger buffer is wanted", _TIO),
    FwStatus.SPDM_REQUEST: ("An SPDM request is pending", _TIO),
    FwStatus.SPDM_ERROR: ("SPDM error", _TIO),
    FwStatus.ERR_IN_DEV_CONN: ("Error in the device connection", _TIO),
    FwStatus.INVALID_DEV_CTX: ("Device context is invalid", _TIO),
    FwStatus.INVALID_TDI_CTX: ("TDI context is invalid", _TIO),
    FwStatus.INVALID_TDI: ("TDI is invalid", _TIO),
    FwStatus.RECLAIM_REQUIRED: ("Pages must be reclaimed first", _TIO),
    FwStatus.IN_USE: ("Resource is in use", _TIO),
    FwStatus.INVALID_DEV_STATE: ("Device state is invalid", _TIO),
    FwStatus.INVALID_TDI_STATE: ("TDI state is invalid", _TIO),
    FwStatus.DEV_CERT_CHANGED: ("Device certificate has changed", _TIO),
    FwStatus.RESYNC_REQ: ("Resynchronisation is required", _TIO),
    FwStatus.RESPONSE_TOO_LARGE: ("Response is too large", _TIO),
    FwStatus.NO_FW_CALL: (
        "firmware was not called",
        "The kernel gave up before it reached the firmware: errno and the kernel log say why.",
    ),
}
