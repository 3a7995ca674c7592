"""The CPUs of a machine together."""

from __future__ import annotations

from collections.abc import Callable, Collection

from .core import Core
from .cpu import SoftCpu
from .engine import Watch
from .memory import GuestMemory
from .options import CpuOptions
from .pages import Pages
from .unicorn_engine import UnicornEngine

__all__ = ["Machine"]


class Machine:
    """CPUs that share the memory of one guest.

    Raises:
        MissingCapability: the engine isn't installed.
        UnsupportedEngine: it is, but another version than this package knows.
    """

    def __init__(self, memory: GuestMemory, options: CpuOptions) -> None:
        self.options = options
        self.ticks = 0
        """What all CPUs have run together; the TSC counts it."""
        self._engine = UnicornEngine(exit_on_pause=options.exit_on_pause)
        self.current: Core | None = None
        """The CPU that runs, or ran last."""
        self._watch: tuple[Watch | None, Collection[int] | None] = (None, None)
        self._pages = Pages(memory, options)
        self._cores: list[Core] = []
        self._wants_msr: Callable[[int, bool], bool] | None = None

    def new_cpu(self) -> SoftCpu:
        """Return a CPU without state; `SoftCpu.load` gives it one."""
        core = Core(self._engine, self._engine.new_state(), self._pages, self.options)
        core.wants_msr = self._wants_msr
        self._cores.append(core)
        return SoftCpu(self, core)

    def intercept_msrs(self, wanted: Callable[[int, bool], bool]) -> None:
        """Stop (`MsrRead`, `MsrWrite`) where ``wanted(MSR, whether it is written)``: plain guests.

        The others are done as without it.
        """
        self._wants_msr = wanted
        for core in self._cores:
            core.wants_msr = wanted
        self._engine.intercept_msrs()

    def flush(self) -> None:
        """Forget all translations: pages have moved, changed sides or rights."""
        self._engine.flush_tlb()
        self._pages.flush()

    def flush_code(self) -> None:
        """Forget translated code too: somebody else than the CPUs has written to memory."""
        self.flush()
        self._engine.flush_code()

    def watch(self, ask: Watch | None, places: Collection[int] | None) -> None:
        """Call ``ask`` before instructions (see `Engine.watch`): a `DebugStop` where it says so."""
        self._watch = (ask, places)
        self.update_watch()

    def update_watch(self) -> None:
        """Watch what the owner asked for, and the instruction breakpoints of all CPUs."""
        ask, places = self._watch
        own = frozenset().union(*(core.debug.code_places() for core in self._cores))
        if not own:
            self._engine.watch(ask, places)
            return

        def ask_both(address: int, size: int) -> bool:
            if self.current is not None and self.current.debug.hits_code(address):
                return True
            if ask is None or (places is not None and address not in places):
                return False
            return ask(address, size)

        everywhere = ask is not None and places is None
        self._engine.watch(ask_both, None if everywhere else own | set(places or ()))

    def code(self, linear: int, size: int) -> bytes:
        """Return what is executed at a linear address, for what `watch` calls."""
        return self._engine.code(linear, size)

    def write(self, host: int, data: bytes) -> None:
        """Write memory of the guest, which may be code, at its host address."""
        self._engine.write(host, data)
