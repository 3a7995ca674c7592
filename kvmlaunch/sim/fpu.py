"""A vCPU's extended state in the XSAVE standard format (APM 2, 11.5; arch/x86/kernel/fpu)."""

from __future__ import annotations

import struct
from collections.abc import Mapping

__all__ = ["FpuState"]

_LEGACY_SIZE = 512
_HEADER = _LEGACY_SIZE
_HEADER_SIZE = 64
_MXCSR_AT, _SOFTWARE_AT = 24, 464
_ST, _XMM, _XMM_SIZE = 32, 160, 256
_MXCSR_MASK = 0x0002FFFF
_INIT_FCW, _INIT_MXCSR = 0x37F, 0x1F80
_X87, _SSE, _YMM, _PKRU = 0, 1, 2, 9


class FpuState:
    """x87, SSE and what else XSAVE knows.

    ``area`` is the kernel's own copy: a component that is in its initial state keeps
    stale bytes in it, which KVM_GET_XSAVE hides and sev_es_sync_vmsa() doesn't.
    ``components`` maps the number of each further component to (offset, size).
    """

    def __init__(self, supported: int, components: Mapping[int, tuple[int, int]]) -> None:
        self._supported = supported
        self._components = {
            number: place for number, place in components.items() if supported >> number & 1
        }
        ends = (offset + size for offset, size in self._components.values())
        self._area = bytearray(max(ends, default=_LEGACY_SIZE + _HEADER_SIZE))
        self._area[:_LEGACY_SIZE] = self._initial_legacy()
        self._in_use = 0

    @property
    def legacy(self) -> bytes:
        """The FXSAVE image as the kernel has it."""
        return bytes(self._area[:_LEGACY_SIZE])

    @property
    def ymm_high(self) -> bytes:
        """High halves of YMM0-15: zeros unless AVX state is in use."""
        return self._component(_YMM) or bytes(256)

    @property
    def pkru(self) -> int:
        """Protection keys."""
        return int.from_bytes(self._component(_PKRU)[:4], "little")

    def get_xsave(self, size: int) -> bytes:
        """The area for KVM_GET_XSAVE, ``size`` bytes."""
        out = bytearray(size)
        out[: len(self._area)] = self._area
        initial = self._initial_legacy()
        if not self._in_use >> _X87 & 1:
            out[:_MXCSR_AT] = initial[:_MXCSR_AT]
            out[_ST:_XMM] = initial[_ST:_XMM]
        if not self._in_use & (1 << _SSE | 1 << _YMM):
            out[_MXCSR_AT:_ST] = initial[_MXCSR_AT:_ST]
        if not self._in_use >> _SSE & 1:
            out[_XMM : _XMM + _XMM_SIZE] = bytes(_XMM_SIZE)
        for number, (offset, length) in self._components.items():
            if not self._in_use >> number & 1:
                out[offset : offset + length] = bytes(length)
        struct.pack_into("<QQ", out, _HEADER, self._in_use, 0)
        return bytes(out)

    def set_xsave(self, image: bytes) -> bool:
        """Take KVM_SET_XSAVE's area; False where the kernel says EINVAL."""
        in_use, compaction = struct.unpack_from("<QQ", image, _HEADER)
        reserved = image[_HEADER + 16 : _HEADER + _HEADER_SIZE]
        if in_use & ~self._supported or compaction or any(reserved):
            return False
        (mxcsr,) = struct.unpack_from("<I", image, _MXCSR_AT)
        with_mxcsr = in_use & (1 << _X87 | 1 << _SSE | 1 << _YMM)
        if with_mxcsr and mxcsr & ~_MXCSR_MASK:
            return False
        if in_use >> _X87 & 1:
            self._area[:_MXCSR_AT] = image[:_MXCSR_AT]
            self._area[_ST:_XMM] = image[_ST:_XMM]
        if with_mxcsr:
            self._area[_MXCSR_AT:_ST] = image[_MXCSR_AT:_ST]
        if in_use >> _SSE & 1:
            self._area[_XMM : _XMM + _XMM_SIZE] = image[_XMM : _XMM + _XMM_SIZE]
        for number, (offset, length) in self._components.items():
            if in_use >> number & 1:
                self._area[offset : offset + length] = image[offset : offset + length]
        self._in_use = in_use
        return True

    def set_legacy(self, head: bytes, st: bytes, xmm: bytes) -> None:
        """KVM_SET_FPU: everything but MXCSR, whatever is in use."""
        self._area[:_MXCSR_AT] = head
        self._area[_ST:_XMM] = st
        self._area[_XMM : _XMM + _XMM_SIZE] = xmm

    def load(self, fxsave: bytes, ymm_high: bytes, pkru: int) -> None:
        """What the guest has left in its registers."""
        self._area[: len(fxsave)] = fxsave
        struct.pack_into("<I", self._area, _MXCSR_AT + 4, _MXCSR_MASK)
        self._in_use |= 1 << _X87 | 1 << _SSE
        self._put_component(_YMM, ymm_high)
        self._put_component(_PKRU, pkru.to_bytes(4, "little"))

    def _put_component(self, number: int, data: bytes) -> None:
        """Zeros leave a component in its initial state."""
        if number in self._components and (any(data) or self._in_use >> number & 1):
            offset, _ = self._components[number]
            self._area[offset : offset + len(data)] = data
            self._in_use |= 1 << number

    def _component(self, number: int) -> bytes:
        if number not in self._components or not self._in_use >> number & 1:
            return b""
        offset, length = self._components[number]
        return bytes(self._area[offset : offset + length])

    def _initial_legacy(self) -> bytes:
        out = bytearray(_LEGACY_SIZE)
        struct.pack_into("<H", out, 0, _INIT_FCW)
        struct.pack_into("<II", out, _MXCSR_AT, _INIT_MXCSR, _MXCSR_MASK)
        # Bytes for software: the kernel writes the mask of features there.
        struct.pack_into("<Q", out, _SOFTWARE_AT, self._supported)
        return bytes(out)
