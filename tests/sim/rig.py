"""A secure processor with memory and RMP, and the steps that tests need to get somewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvmlaunch.sim.cpumodel import cpu_model
from kvmlaunch.sim.firmware import SecureProcessor
from kvmlaunch.sim.firmware_profiles import FirmwareProfile
from kvmlaunch.sim.memory import PhysicalMemory
from kvmlaunch.sim.rmp import Rmp

POLICY = 0x30000
NOWHERE = 0x9_0000_0000


class Rig:
    """`psp` is initialised; `random` counts: the n-th draw is n in every byte, from 1."""

    def __init__(
        self,
        profile: FirmwareProfile | None = None,
        *,
        fault: Callable[[str], int | None] = lambda name: None,
        init: bool = True,
    ) -> None:
        self.memory = PhysicalMemory()
        self.rmp = Rmp()
        self.draws = 0
        profile = profile or FirmwareProfile()
        self.psp = SecureProcessor(
            profile,
            self.memory,
            self.rmp,
            model=cpu_model(profile.product),
            random=self._random,
            fault=fault,
        )
        if init:
            assert self.psp.init() == 0

    def _random(self, size: int) -> bytes:
        self.draws += 1
        return bytes([self.draws]) * size

    def firmware_page(self) -> int:
        spa = self.memory.alloc()
        assert self.rmp.make_private(spa, 0, 0, immutable=True) == 0
        return spa

    def created(self) -> int:
        """A context in state INIT."""
        gctx = self.firmware_page()
        assert self.psp.gctx_create(gctx) == 0
        return gctx

    def started(self, policy: int = POLICY, **options: int) -> int:
        """A context in state LAUNCH, without an ASID."""
        gctx = self.created()
        assert self.psp.launch_start(gctx, policy, **options) == 0  # type: ignore[arg-type]
        return gctx

    def activated(self, asid: int = 1, policy: int = POLICY, **options: int) -> int:
        """A context in state LAUNCH, with an ASID."""
        gctx = self.started(policy, **options)
        assert self.psp.activate(gctx, asid) == 0
        return gctx

    def finished(self, asid: int = 1, **options: Any) -> int:
        """A context in state RUNNING."""
        gctx = self.activated(asid)
        options = {"id_block": None, "id_auth": None, **options}
        assert self.psp.launch_finish(gctx, **options) == 0
        return gctx

    def request(self, gctx: int, message: bytes) -> tuple[int, bytes]:
        """Status of SNP_GUEST_REQUEST and the response page, which held 0xEE bytes."""
        request, response = self.memory.alloc(), self.memory.alloc()
        self.memory.page(request)[: len(message)] = message
        self.memory.page(response)[:] = b"\xee" * 4096
        assert self.rmp.make_private(response, 0, 0, immutable=True) == 0
        return self.psp.guest_request(gctx, request, response), self.contents(response)

    def pre_guest(self, gpa: int = 0x1000, contents: bytes = b"", asid: int = 1) -> int:
        """A page in the state that LAUNCH_UPDATE wants."""
        spa = self.memory.alloc()
        self.memory.page(spa)[:] = contents.ljust(4096, b"\0")
        assert self.rmp.make_private(spa, gpa, asid, immutable=True) == 0
        return spa

    def large_pre_guest(self, gpa: int = 0x200000, asid: int = 1) -> int:
        """The same, 2 MiB."""
        spa = self.memory.map_region(bytearray(2 << 20))
        code = self.rmp.rmpupdate(
            spa, assigned=True, asid=asid, gpa=gpa, immutable=True, page_size=1
        )
        assert code == 0
        return spa

    def state(self, spa: int) -> str:
        return str(self.rmp.lookup(spa).state)

    def contents(self, spa: int) -> bytes:
        return bytes(self.memory.page(spa))
