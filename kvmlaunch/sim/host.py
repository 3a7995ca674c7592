"""The machine under the simulated kernel, and what the kernel keeps for all VMs."""

from __future__ import annotations

import errno
import functools
import threading
from collections.abc import Callable
from typing import TypeAlias, cast

from kvmlaunch.abi.tcb import Product
from kvmlaunch.sim.cpumodel import cpu_model
from kvmlaunch.sim.faults import Faults
from kvmlaunch.sim.fdtable import FdTable
from kvmlaunch.sim.firmware import SecureProcessor
from kvmlaunch.sim.firmware_profiles import firmware_profile
from kvmlaunch.sim.gate import Gate
from kvmlaunch.sim.guest_limits import GuestLimits, limits
from kvmlaunch.sim.memory import PhysicalMemory
from kvmlaunch.sim.profiles import KernelProfile
from kvmlaunch.sim.psp import Psp
from kvmlaunch.sim.rmp import Rmp
from kvmlaunch.sim.uaccess import OwnProcess, UserSpace, refuse
from kvmlaunch.softcpu import CpuOptions, GuestMemory, Machine

__all__ = ["AsidPool", "Host", "MachineMaker"]

MachineMaker: TypeAlias = Callable[[GuestMemory, CpuOptions], Machine]
"""What makes the CPUs of a VM."""


class AsidPool:
    """ASIDs of encrypted guests (sev.c: sev_asid_new, sev_asid_free).

    Those up to ``last_es`` are for SEV-ES and SNP, from there to ``last`` for SEV. A freed one
    may be used again only after a flush, and KVM flushes only when it has run out: so the
    numbers go up until then.
    """

    def __init__(self, last_es: int, last: int, flush: Callable[[], object]) -> None:
        self._for_es = range(1, last_es + 1)
        self._for_sev = range(last_es + 1, last + 1)
        self._flush = flush
        self._used: set[int] = set()
        self._reclaim: set[int] = set()

    def take(self, *, es: bool) -> int:
        """The lowest free ASID. ENOTTY where the host has none, EBUSY where all are taken."""
        asids = self._for_es if es else self._for_sev
        if not asids:
            refuse(errno.ENOTTY)
        free = self._free(asids)
        if free is None and not self._reclaim.isdisjoint(asids):
            self._flush()
            self._used -= self._reclaim
            self._reclaim.clear()
            free = self._free(asids)
        if free is None:
            refuse(errno.EBUSY)
        self._used.add(free)
        return free

    def give_back(self, asid: int) -> None:
        """Free an ASID."""
        self._reclaim.add(asid)

    def _free(self, asids: range) -> int | None:
        return next((asid for asid in asids if asid not in self._used), None)


class Host:
    """CPU, memory, RMP and secure processor; fd table, profile and faults of the kernel.

    ``lock`` guards all of it, ``gate`` what guest code runs on; ``seed`` is for the turns of
    vCPUs, ``machine`` makes CPUs, ``memory_generation`` and ``code_generation`` grow with
    each change of memory (see `memory_changed`).
    """

    def __init__(
        self,
        profile: KernelProfile,
        faults: Faults,
        product: str,
        random: Callable[[int], bytes],
        user: UserSpace | None = None,
        fds: FdTable | None = None,
        *,
        seed: int = 0,
        machine: MachineMaker = Machine,
    ) -> None:
        self.lock = threading.RLock()
        self.gate = Gate()
        self.seed = seed
        self.machine = machine
        self.memory_generation = self.code_generation = 0
        self.profile = profile
        self.faults = faults
        self.user: UserSpace = OwnProcess() if user is None else user
        self.fds = FdTable() if fds is None else fds
        self.cpu = cpu_model(product)
        self.cpuid = self.cpu.supported_cpuid()
        self.memory = PhysicalMemory()
        self.rmp = Rmp()
        firmware = firmware_profile(cast(Product, product))
        self.policy_bits = firmware.policy_bits
        self.tsc_khz = firmware.tsc_khz
        self.processor = SecureProcessor(
            firmware, self.memory, self.rmp, model=self.cpu, random=random
        )
        self.processor.init()
        self.psp = Psp(self.processor, self.memory, faults)
        self.asids = AsidPool(self.cpu.max_snp_asid, self.cpu.max_asid, self.processor.df_flush)

    def memory_changed(self, *, code: bool) -> None:
        """What CPUs know of memory doesn't hold any more; with ``code``, nor does its content."""
        self.memory_generation += 1
        self.code_generation += code

    def alloc_firmware_page(self) -> int | None:
        """snp_alloc_firmware_page(): a page that only firmware writes to; None if that fails."""
        spa = self.memory.alloc()
        return None if self.rmp.make_private(spa, 0, 0, immutable=True) else spa

    def free_firmware_page(self, spa: int) -> None:
        """snp_free_firmware_page(); one that can't be reclaimed is leaked, and kills nobody."""
        if not self.psp.page_reclaim(spa) and not self.rmp.make_shared(spa):
            self.memory.free(spa)

    @property
    def phys_bits(self) -> int:
        """Width of a physical address on the bare CPU."""
        leaf = self.cpu.hardware_cpuid(0x80000008)
        return leaf[0] & 0xFF if leaf else 36

    @functools.cached_property
    def guest_limits(self) -> GuestLimits:
        """What KVM's own CPUID table forbids."""
        leaves = {(leaf.function, leaf.index): leaf for leaf in self.cpuid}
        return limits(lambda function, index: leaves.get((function, index)))

    @property
    def supported_xcr0(self) -> int:
        """XCR0 bits that guests may have: leaf 0xD, sub-leaf 0."""
        for leaf in self.cpuid:
            if leaf.function == 0xD and leaf.index == 0:
                return leaf.eax | leaf.edx << 32
        return 1

    @property
    def xsave_components(self) -> dict[int, tuple[int, int]]:
        """XSAVE components beyond x87 and SSE: number -> (offset, size)."""
        leaves = [leaf for leaf in self.cpuid if leaf.function == 0xD and leaf.index >= 2]
        return {leaf.index: (leaf.ebx, leaf.eax) for leaf in leaves}

    @property
    def supported_xss(self) -> int:
        """IA32_XSS bits that guests may have: leaf 0xD, sub-leaf 1."""
        for leaf in self.cpuid:
            if leaf.function == 0xD and leaf.index == 1:
                return leaf.ecx | leaf.edx << 32
        return 0
