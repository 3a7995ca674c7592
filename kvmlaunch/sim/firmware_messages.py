"""Secure processor: SNP_GUEST_REQUEST, the messages of a running guest.

A request that can be decrypted and is in sequence gets an answer; what is wrong with its
payload is said in the answer's STATUS, encrypted like the rest, while the command itself
succeeds. Source: AMD 56860, SNP_GUEST_REQUEST and guest messages; order of checks and choice
of keys as observed (obs).

Reserved bytes of the header are not looked at (obs); those of a payload must be zero.
Answered are attestation report, derived key and TSC information.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TypeAlias

from kvmlaunch.abi.fwstatus import FwStatus
from kvmlaunch.abi.guest_message import (
    AuthTagError,
    MessageHeader,
    MessageType,
    SecretKey,
    seal,
    unseal,
)
from kvmlaunch.abi.guest_payload import (
    KeyRequest,
    KeyResponse,
    KeySelect,
    ReportRequest,
    ReportResponse,
    TscInfoRequest,
    TscInfoResponse,
)
from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.abi.report import PLATFORM_INFO, AttestationReport, SigningKey, key_info
from kvmlaunch.abi.signature import ALGO_ECDSA_P384_SHA384
from kvmlaunch.abi.tcb import Tcb
from kvmlaunch.errors import FormatError

from .certificates import CertificateChain
from .endorsement import derive
from .firmware_platform import PlatformCommands
from .guest_context import GuestContext, GuestState
from .rmp import PageState

__all__ = ["MessageCommands"]

_Answer: TypeAlias = ReportResponse | KeyResponse | TscInfoResponse

_MAX_SEQNO = (1 << 64) - 1
_MAX_VMPL = 3
_TSC_SCALE_ONE = 1 << 32
_REPORT_HAS_CPUID, _REPORT_HAS_MIT_VECTORS = 3, 5

# GUEST_FIELD_SELECT.
_POLICY, _IMAGE_ID, _FAMILY_ID, _MEASUREMENT, _SVN, _TCB, _MIT_VECTOR = (1 << n for n in range(7))
_FIELDS_V1 = _MIT_VECTOR - 1
_KEY_ALWAYS = struct.Struct("<IQ32s48s")


class MessageCommands(PlatformCommands):
    """Guest messages, and the certificates of the keys that sign reports."""

    def guest_request(self, gctx: int, request: int, response: int) -> int:
        """SNP_GUEST_REQUEST: read the message in page `request`, answer in page `response`.

        `response` must be a Firmware page. Anything but SUCCESS leaves it, and the guest's
        message count, as they were.
        """
        if (ordered := self._fault("SNP_GUEST_REQUEST")) is not None:
            return ordered
        # 1 alignment, 2 platform, 3 context
        bad = request % PAGE_SIZE or response % PAGE_SIZE
        status, guest = self._guest(gctx, bad_parameter=bool(bad))
        if guest is None:
            return status
        # 4 response page, 5 state
        entry = self._rmp.lookup(response)
        if entry.state is not PageState.FIRMWARE:
            return FwStatus.INVALID_PAGE_STATE
        if entry.page_size:
            return FwStatus.INVALID_PAGE_SIZE
        if guest.state != GuestState.RUNNING:
            return FwStatus.INVALID_GUEST_STATE
        try:
            message = bytes(self._memory.page(request))
        except ValueError:  # GEN
            return FwStatus.INVALID_ADDRESS
        status, answer = self._converse(guest, message)
        self._memory.page(response)[: len(answer)] = answer
        return status

    def certificate_chain(self, kind: SigningKey = SigningKey.VCEK) -> CertificateChain | None:
        """Return the certificates of the VCEK or VLEK of REPORTED_TCB; None without a VLEK.

        No command shows these: AMD's key server would hand them out.
        """
        if kind is SigningKey.VLEK and self._vlek is None:
            return None
        tcb = self._reported_tcb
        key = self._keys.public_key(kind, self._tcb_version(tcb), self._hashstick(kind))
        return self._authority.chain(kind, key, tcb, self.profile.hwid)

    # Helpers.

    def _converse(self, guest: GuestContext, message: bytes) -> tuple[FwStatus, bytes]:
        """Check, decrypt and answer one message; no answer unless SUCCESS."""
        # 6 header
        header = MessageHeader.decode(message)
        try:
            header.check()
        except FormatError:
            return FwStatus.INVALID_PARAM, b""
        # 7 tag
        key = SecretKey(guest.vmpck[header.msg_vmpck])
        try:
            payload = unseal(key, message)
        except AuthTagError:
            return FwStatus.BAD_MEASUREMENT, b""
        # 8 sequence: both this message and its answer need a number
        if header.seqno != guest.msg_count[header.msg_vmpck] + 1 or header.seqno == _MAX_SEQNO:
            return FwStatus.AEAD_OFLOW, b""
        # 9 type, version and size of the payload; what is in it is the answer's business
        answer = self._answer(guest, header, payload)
        if answer is None:
            return FwStatus.INVALID_PARAM, b""
        reply = MessageHeader(
            answer.TYPE, header.seqno + 1, header.msg_vmpck, msg_version=header.msg_version
        )
        sealed = seal(key, reply, answer.encode())
        guest.msg_count[header.msg_vmpck] = reply.seqno
        return FwStatus.SUCCESS, sealed

    def _answer(self, guest: GuestContext, header: MessageHeader, payload: bytes) -> _Answer | None:
        """Return the answer to a payload, None to one of unknown type, version or size."""
        what = header.msg_type, header.msg_version, len(payload)
        if what == (MessageType.REPORT_REQ, 1, len(ReportRequest().encode())):
            return self._report(guest, header.msg_vmpck, payload)
        if what == (MessageType.KEY_REQ, 1, len(KeyRequest().encode(1))):
            return self._derived_key(guest, header.msg_vmpck, payload, _FIELDS_V1)
        if what == (MessageType.KEY_REQ, 2, len(KeyRequest().encode(2))) and self._has_mitigation:
            return self._derived_key(guest, header.msg_vmpck, payload, _FIELDS_V1 | _MIT_VECTOR)
        if what == (MessageType.TSC_INFO_REQ, 1, len(TscInfoRequest().encode())):
            return self._tsc_info(guest, payload)
        return None

    def _report(self, guest: GuestContext, vmpck: int, payload: bytes) -> ReportResponse:
        try:
            request = ReportRequest.decode(payload)
        except FormatError:
            return ReportResponse(FwStatus.INVALID_PARAM, report_size=0)
        if not vmpck <= request.vmpl <= _MAX_VMPL:
            return ReportResponse(FwStatus.INVALID_PARAM, report_size=0)
        kind = self._chosen_key(guest, request.key_sel)
        if kind is None:
            return ReportResponse(FwStatus.INVALID_KEY, report_size=0)
        signed_by = kind
        if kind is SigningKey.VCEK and self._mask_chip_key:
            signed_by = SigningKey.NONE
        report = self._report_body(guest, request, signed_by)
        if signed_by is not SigningKey.NONE:
            tcb = self._tcb_version(self._reported_tcb)
            signature = self._keys.sign(kind, tcb, report.signed_bytes, self._hashstick(kind))
            report = replace(report, signature=signature)
        return ReportResponse(report=report.encode())

    def _report_body(
        self, guest: GuestContext, request: ReportRequest, signed_by: SigningKey
    ) -> AttestationReport:
        """Return the report without its signature."""
        profile = self.profile
        major, minor, build = profile.version
        committed_major, committed_minor, committed_build = self._committed_version
        report = AttestationReport(
            version=profile.report_version,
            guest_svn=guest.guest_svn,
            policy=guest.policy,
            family_id=guest.family_id,
            image_id=guest.image_id,
            vmpl=request.vmpl,
            signature_algo=ALGO_ECDSA_P384_SHA384,
            current_tcb=self._tcb_version(profile.current_tcb),
            platform_info=self._platform_info(),
            key_info=key_info(
                signed_by,
                author_key_en=guest.author_key_en,
                mask_chip_key=self._mask_chip_key,
            ),
            report_data=request.report_data,
            measurement=guest.measurement.value,
            host_data=guest.host_data,
            id_key_digest=guest.id_key_digest,
            author_key_digest=guest.author_key_digest,
            report_id=guest.report_id,
            report_id_ma=guest.report_id_ma,
            reported_tcb=self._tcb_version(self._reported_tcb),
            chip_id=bytes(64) if self._mask_chip_id else profile.chip_id,
            committed_tcb=self._tcb_version(self._committed_tcb),
            current_build=build,
            current_minor=minor,
            current_major=major,
            committed_build=committed_build,
            committed_minor=committed_minor,
            committed_major=committed_major,
            launch_tcb=guest.launch_tcb,
        )
        if profile.report_version >= _REPORT_HAS_CPUID:
            cpu = self.model
            report = replace(
                report, cpuid_fam_id=cpu.family, cpuid_mod_id=cpu.model, cpuid_step=cpu.stepping
            )
        if self._has_mitigation:
            report = replace(
                report,
                launch_mit_vector=guest.launch_mit_vector,
                current_mit_vector=profile.mit_vector,
            )
        return report

    @property
    def _has_mitigation(self) -> bool:
        """Whether this firmware knows mitigation vectors; GEN for KEY_REQ."""
        return self.profile.report_version >= _REPORT_HAS_MIT_VECTORS

    def _tcb_version(self, tcb: Tcb) -> int:
        return tcb.encode(self.profile.product)

    def _platform_info(self) -> int:
        profile = self.profile
        flags = {
            "smt_en": profile.smt_enabled,
            "tsme_en": profile.tsme_enabled,
            "ecc_en": profile.ecc_enabled,
            "rapl_dis": profile.rapl_disabled,
            "ciphertext_hiding_dram_en": profile.ciphertext_hiding,
            # GEN: only reports of version 3 and up have the bit.
            "alias_check_complete": profile.alias_check_complete
            and profile.report_version >= _REPORT_HAS_CPUID,
        }
        return sum(on << PLATFORM_INFO[name] for name, on in flags.items())

    def _chosen_key(self, guest: GuestContext, key_sel: int) -> SigningKey | None:
        """Return what KEY_SEL means here; None (INVALID_KEY) if that may not be used."""
        if key_sel == KeySelect.AUTO:
            key_sel = KeySelect.VCEK if self._vlek is None else KeySelect.VLEK
        if key_sel == KeySelect.VCEK:
            return None if guest.vcek_dis else SigningKey.VCEK
        return SigningKey.VLEK if key_sel == KeySelect.VLEK and self._vlek is not None else None

    def _hashstick(self, kind: SigningKey) -> bytes:
        return self._vlek or b"" if kind is SigningKey.VLEK else b""

    def _derived_key(
        self, guest: GuestContext, vmpck: int, payload: bytes, known_fields: int
    ) -> KeyResponse:
        try:
            request = KeyRequest.decode(payload)
        except FormatError:
            return KeyResponse(FwStatus.INVALID_PARAM)
        if not vmpck <= request.vmpl <= _MAX_VMPL or request.fields & ~known_fields:
            return KeyResponse(FwStatus.INVALID_PARAM)
        if self._mixes_too_much(guest, request):
            return KeyResponse(FwStatus.INVALID_PARAM)
        if request.use_vmrk:
            return KeyResponse(derived_key=_mix(SecretKey(guest.vmrk), guest, request))
        kind = self._chosen_key(guest, request.key_sel)
        if kind is None or self._mask_chip_key:
            return KeyResponse(FwStatus.INVALID_KEY)
        tcb = self._tcb_version(self._reported_tcb)
        root = self._keys.root(kind, tcb, self._hashstick(kind))
        return KeyResponse(derived_key=_mix(root, guest, request))

    def _mixes_too_much(self, guest: GuestContext, request: KeyRequest) -> bool:
        """Whether the key would be one of a newer guest or platform than this one is."""
        if request.fields & _SVN and request.guest_svn > guest.guest_svn:
            return True
        tcb = Tcb.decode(self.profile.product, request.tcb_version)
        if request.fields & _TCB and not self._committed_tcb.covers(tcb):
            return True
        # GEN: by analogy with the two above.
        missing = request.launch_mit_vector & ~guest.launch_mit_vector
        return bool(request.fields & _MIT_VECTOR and missing)

    def _tsc_info(self, guest: GuestContext, payload: bytes) -> TscInfoResponse:
        try:
            TscInfoRequest.decode(payload)
        except FormatError:
            return TscInfoResponse(FwStatus.INVALID_PARAM)
        scale, factor = self._tsc_scale(guest), self.profile.tsc_factor
        return TscInfoResponse(guest_tsc_scale=scale, tsc_factor=factor)

    def _tsc_scale(self, guest: GuestContext) -> int:
        """GUEST_TSC_SCALE, 8.32 fixed point."""
        nominal = self.profile.tsc_khz
        return (guest.desired_tsc_khz or nominal) * _TSC_SCALE_ONE // nominal


def _mix(root: SecretKey, guest: GuestContext, request: KeyRequest) -> SecretKey:
    """Return the key derived from root, VMPL, field selection, host data, owner and the fields.

    Inputs as in 56860 (obs); the function is the simulator's own.
    """
    owner = bytes(48)
    if guest.author_key_en:
        owner = guest.author_key_digest
    elif guest.id_block_en:
        owner = guest.id_key_digest
    info = _KEY_ALWAYS.pack(request.vmpl, request.fields, guest.host_data, owner)
    choices = {
        _POLICY: guest.policy.to_bytes(8, "little"),
        _IMAGE_ID: guest.image_id,
        _FAMILY_ID: guest.family_id,
        _MEASUREMENT: guest.measurement.value,
        _SVN: request.guest_svn.to_bytes(4, "little"),
        _TCB: request.tcb_version.to_bytes(8, "little"),
        _MIT_VECTOR: request.launch_mit_vector.to_bytes(8, "little"),
    }
    info += b"".join(value for bit, value in choices.items() if request.fields & bit)
    return SecretKey(derive(root, info))
