"""unicorn as the engine: the only module that imports it.

The guest runs inside unicorn's own SVM emulation: with HF_GUEST set and all intercepts on, each
instruction that a hypervisor could intercept stops with exact RIP. Its softmmu asks our `Fill`
for translations, and what it takes for physical addresses are host addresses: the whole address
space of the process is mapped once, and the guest reaches the pages that `Fill` grants, no other.

unicorn lets IN and OUT through, so new blocks are searched for them and hooks set there.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import re
import weakref
from collections.abc import Collection
from typing import Any

from kvmlaunch.errors import KvmLaunchError, MissingCapability

from . import _hooks
from .decode import io_instructions
from .engine import FETCH, READ, WRITE, EngineState, Fill, Stop, Watch
from .unicorn_env import CONTEXT_HEADER, Block, Env, TlbEntry, control_page, set_msr_intercepts
from .unicorn_state import UnicornState

_unicorn: Any = None
_lib: Any = None
try:
    _unicorn = importlib.import_module("unicorn")
    _lib = importlib.import_module("unicorn.unicorn_py3.unicorn").uclib
except ImportError:
    pass
else:
    const: Any = importlib.import_module("unicorn.unicorn_const")
    x86: Any = importlib.import_module("unicorn.x86_const")

__all__ = ["UnicornEngine", "UnsupportedEngine", "require_unicorn"]

_PAGE = 0xFFF
_LINEAR_64 = 0xFFFFFFFFFFFFFFFF
_KINDS = {16: READ, 17: WRITE, 18: FETCH}  # UC_MEM_READ, _WRITE, _FETCH
_IO_OPCODE = re.compile(rb"[\xe4-\xe7\xec-\xef\x6c-\x6f]")
_OK, _INVALID_INSTRUCTION, _EXCEPTION = 0, 10, 21
_UD = 0x46
_HOST_BITS = 47
_OLDEST = (2, 1, 3)
_MAX_CODE_PAGES, _MAX_IO_HOOKS = 4096, 1024
"""A guest must not make the engine grow for ever; at the limit it starts afresh."""

# Exit codes 0x60 + bit: LTR (TR write), RDTSC, RDPMC, CPUID, RSM, software interrupts, INVD, HLT,
# INVLPGA, MSR, SHUTDOWN, VMRUN..SKINIT, ICEBP, WBINVD, MONITOR, MWAIT.
_INTERCEPTS = (
    *(0x6D, 0x6E, 0x6F, 0x72, 0x73, 0x75, 0x76, 0x78, 0x7A, 0x7C, 0x7F),
    *(0x80, 0x81, 0x82, 0x83, 0x84, 0x85, 0x86, 0x88, 0x89, 0x8A, 0x8B),
)
_PAUSE = 0x77
_CR_READS, _CR_WRITES = 1 << 8, 1 << 0 | 1 << 4 | 1 << 8

_ZERO = ctypes.c_uint64(0)


def _control_call(number: int, arguments: int = 0) -> ctypes.c_int:
    """The number of a uc_ctl that writes: UC_CTL_WRITE."""
    return ctypes.c_int(number | arguments << 26 | 1 << 30)


_TB_REMOVE, _TB_FLUSH, _TLB_FLUSH = _control_call(9, 2), _control_call(10), _control_call(11)

_OTHER_FORM = "this version of unicorn keeps its CPU state in another form"
_PROBE_ADDRESS = 0x7ADEF123456788
_PROBE = b"\xeb\x00\xe4\x10\x48\xb8" + _PROBE_ADDRESS.to_bytes(8, "little") + b"\x8b\x18"
"""jmp behind itself; in al, 0x10; mov rax, address; mov ebx, [rax]"""


class UnsupportedEngine(KvmLaunchError):
    """The installed unicorn isn't laid out as this module needs it."""


def require_unicorn() -> None:
    """Raise MissingCapability, with the install command, where there is no fitting unicorn."""
    if _lib is None or _version() < _OLDEST:
        name = f"unicorn {'.'.join(map(str, _OLDEST))} or newer"
        error = MissingCapability(name, "the software CPU")
        error.args = (f"{error} (pip install 'kvmlaunch[softcpu]')",)
        raise error


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", str(_unicorn.__version__))[:3])


class _RunState(ctypes.Structure):
    """struct run_state of csrc/softcpu_hooks.c."""

    _fields_ = (
        ("ticks_left", ctypes.c_int64),
        ("event", ctypes.c_int64),
        ("stop", ctypes.c_void_p),
        ("first_block", ctypes.c_uint64),
        ("blocks", ctypes.c_uint64),
    )


_FILL = ctypes.CFUNCTYPE(
    ctypes.c_bool,
    ctypes.c_void_p,
    ctypes.c_uint64,
    ctypes.c_int,
    ctypes.POINTER(TlbEntry),
    ctypes.c_void_p,
)
_EDGE = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.POINTER(Block), ctypes.POINTER(Block), ctypes.c_void_p
)
_CODE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p)


class UnicornEngine:
    """`Engine` by unicorn.

    Raises:
        MissingCapability: unicorn isn't installed.
        UnsupportedEngine: a unicorn that isn't laid out as expected.
    """

    def __init__(self, *, exit_on_pause: bool) -> None:
        require_unicorn()
        self._uc = _unicorn.Uc(const.UC_ARCH_X86, const.UC_MODE_64)
        self._uc.ctl_set_cpu_model(x86.UC_CPU_X86_EPYC_ROME)
        self._handle = self._uc._uch
        self._uc.ctl_exits_enabled(True)
        self._uc.ctl_set_tlb_mode(const.UC_TLB_VIRTUAL)
        self._call(
            "uc_mem_map_ptr",
            ctypes.c_uint64(0x1000),
            ctypes.c_size_t((1 << _HOST_BITS) - 0x2000),
            ctypes.c_uint32(READ | WRITE | FETCH),
            ctypes.c_void_p(0x1000),
        )
        self._run = _RunState(stop=ctypes.cast(_lib.uc_emu_stop, ctypes.c_void_p).value)
        self._control = control_page()
        self._intercept = functools.reduce(
            lambda bits, code: bits | 1 << code - 0x60,
            (*_INTERCEPTS, _PAUSE) if exit_on_pause else _INTERCEPTS,
            0,
        )
        self._fill: Fill | None = None
        self._error: BaseException | None = None
        self._pristine: bytes | None = None
        self._state: UnicornState | None = None
        self._last: UnicornState | None = None
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self._exact = True
        """Whether unicorn's own state is that of the CPU which runs."""
        self._code_pages: dict[int, int] = {}
        """Linear page -> host page, of what was fetched lately."""
        self._code_hosts: set[int] = set()
        """Host pages that hold translated code."""
        self._io_hooks: dict[int, ctypes.c_size_t] = {}
        self._new_io: list[tuple[int, int, list[int]]] = []
        self._stale = False
        self._skip = -1
        self.watching = True
        self._ask: Watch | None = None
        self._watched: Collection[int] | None = ()
        self._watch_hooks: list[ctypes.c_size_t] = []
        self.ticks_left = 0
        self.fault_address = 0
        self._add_hooks()
        weakref.finalize(self, _free_contexts, self._contexts)
        self._fault_field = ctypes.c_uint64()
        self._fault_field = self._check_layout()

    # -- the Engine protocol

    def new_state(self) -> EngineState:
        """Return the registers of one more CPU."""
        context = ctypes.c_void_p()
        self._call("uc_context_alloc", ctypes.byref(context))
        _lib.uc_context_save(self._handle, context)
        assert context.value is not None
        state = UnicornState(context.value + CONTEXT_HEADER, self)
        self._contexts[id(state)] = context
        env = state.env
        if self._pristine is not None:
            ctypes.memmove(ctypes.addressof(env), self._pristine, len(self._pristine))
        env.vm_vmcb = ctypes.addressof(self._control)
        env.intercept = self._intercept
        env.intercept_cr_read, env.intercept_cr_write = _CR_READS, _CR_WRITES
        state.catch_debug_registers = False
        env.intercept_exceptions = 0xFFFFFFFF
        env.old_exception = -1
        return state

    def run(self, state: EngineState, fill: Fill, ticks: int) -> int:
        """Execute until something happens; return a `Stop` or an SVM exit code."""
        assert isinstance(state, UnicornState)
        if state is not self._last:
            _lib.uc_ctl(self._handle, _TLB_FLUSH)
            self._last = state
        context = self._contexts[id(state)]
        self._fill, self._state = fill, state
        run, self._run.ticks_left = self._run, ticks
        while True:
            run.event = run.blocks = 0
            _lib.uc_context_restore(self._handle, context)
            result = _lib.uc_emu_start(
                self._handle, ctypes.c_uint64(state.env.rip), _ZERO, _ZERO, _ZERO
            )
            _lib.uc_context_save(self._handle, context)
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self._stale:
                self._stale = False
                self.flush_tlb()
                self.flush_code()
            elif self._new_io:
                self._hook_io()
            else:
                break
        self._skip = -1
        self.ticks_left = run.ticks_left
        event = int(run.event)
        if event > 0xFF:
            return event - 0x100
        if event:
            return event
        if result == _EXCEPTION:
            self.fault_address = self._fault_field.value
            return Stop.MEMORY
        if result == _INVALID_INSTRUCTION:
            return _UD
        raise UnsupportedEngine(f"unicorn stopped for no known reason, error {result}")

    def flush_tlb(self) -> None:
        """Forget what `fill` has answered."""
        _lib.uc_ctl(self._handle, _TLB_FLUSH)
        self._code_pages.clear()

    def write(self, host: int, data: bytes) -> None:
        """Write memory that may hold code which the engine has translated."""
        ctypes.memmove(host, data, len(data))
        if host & ~_PAGE in self._code_hosts:
            # unicorn drops blocks by linear address, so give it one: the host's.
            running, self._fill = self._fill, _OnePage(host & ~_PAGE, host & ~_PAGE)
            self._exact = False
            self.flush_tlb()
            self._remove_blocks(host, len(data))
            self.flush_tlb()
            self._fill, self._exact = running, True

    def intercept_msrs(self) -> None:
        """Stop at each RDMSR and WRMSR: leave no MSR to the guest."""
        set_msr_intercepts(self._control, every=True)

    def _remove_blocks(self, linear: int, size: int) -> None:
        end = ctypes.c_uint64(linear + size)
        _lib.uc_ctl(self._handle, _TB_REMOVE, ctypes.c_uint64(linear), end)

    def flush_code(self) -> None:
        """Forget translated code."""
        self._code_hosts.clear()
        _lib.uc_ctl(self._handle, _TB_FLUSH)

    def pass_io(self, address: int) -> None:
        """Let the next run execute what is at a linear address, although a hook is there."""
        self._skip = address

    def watch(self, ask: Watch | None, places: Collection[int] | None) -> None:
        """Call ``ask`` before the instructions at these places, or before all."""
        for hook in self._watch_hooks:
            self._call("uc_hook_del", hook)
        self._ask, self._watched = ask, () if ask is None else places
        # A range of 1 to 0 is everywhere.
        ranges = [(1, 0)] if self._watched is None else [(at, at) for at in self._watched]
        self._watch_hooks = [
            self._hook(const.UC_HOOK_CODE, self._watch_callback, *range_) for range_ in ranges
        ]
        self.flush_code()

    def code(self, linear: int, size: int) -> bytes:
        """Return the code at an address that is being executed."""
        return self._code(linear, size) or b""

    # -- callbacks; an exception must not pass through C

    def _on_fill(self, _uc: int, page: int, kind: int, entry: Any, _data: int) -> bool:
        try:
            state, fill = self._state, self._fill
            assert fill is not None
            if self._exact:
                _lib.uc_context_save(self._handle, self._contexts[id(state)])
            granted = fill.fill(page, _KINDS[kind])
            if not granted:
                return False
            found = entry.contents
            found.address = granted & ~_PAGE
            found.rights = granted & _PAGE
            if granted & FETCH:
                if len(self._code_pages) >= _MAX_CODE_PAGES:
                    self._code_pages.clear()
                self._code_pages[page] = granted & ~_PAGE
        except BaseException as error:
            self._error = error
            return False
        return True

    def _on_new_block(self, _uc: int, block: Any, _previous: Any, _data: int) -> None:
        try:
            found, state = block.contents, self._state
            assert state is not None
            _lib.uc_context_save(self._handle, self._contexts[id(state)])
            address, size = found.address, found.size
            code = self._code(address, size)
            if code is None:  # translated by an old page table entry: don't run that
                self._stale = True
                _lib.uc_emu_stop(self._handle)
                return
            if not _IO_OPCODE.search(code):
                return
            places = io_instructions(code, state.bits, found.count)
            new = [p for p in places if address + p not in self._io_hooks]
            if new:
                self._new_io.append((address, size, new))
                _lib.uc_emu_stop(self._handle)
        except BaseException as error:
            self._error = error
            _lib.uc_emu_stop(self._handle)

    def _on_watched(self, _uc: int, address: int, size: int, _data: int) -> None:
        try:
            if self._run.event:
                return
            if self.watching and self._ask is not None and self._ask(address, size):
                self._run.event = Stop.DEBUG
                _lib.uc_emu_stop(self._handle)
            elif address in self._io_hooks:
                self._stop_for_io(address)
        except BaseException as error:
            self._error = error
            _lib.uc_emu_stop(self._handle)

    def _on_io(self, _uc: int, address: int, _size: int, _data: int) -> None:
        # Where both hooks are, the debugger is asked first.
        if self._watched is not None and address not in self._watched:
            self._stop_for_io(address)

    def _stop_for_io(self, address: int) -> None:
        if address != self._skip:
            self._run.event = Stop.IO
            _lib.uc_emu_stop(self._handle)

    # -- details

    def _code(self, address: int, size: int) -> bytes | None:
        """Return a block's code, None if it can't be fetched any more."""
        code = b""
        while size > 0:
            page, offset = address & ~_PAGE, address & _PAGE
            part = min(size, _PAGE + 1 - offset)
            host = self._code_pages.get(page)
            if host is None:  # forgotten
                assert self._fill is not None
                host = self._fill.fill(page, FETCH) & ~_PAGE
                if not host:
                    return None
            self._code_hosts.add(host)
            code += ctypes.string_at(host + offset, part)
            address, size = address + part & _LINEAR_64, size - part
        return code

    def _hook_io(self) -> None:
        if len(self._io_hooks) >= _MAX_IO_HOOKS:
            for hook in self._io_hooks.values():
                self._call("uc_hook_del", hook)
            self._io_hooks.clear()
            self.flush_code()
        for address, size, places in self._new_io:
            for place in places:
                at = address + place
                self._io_hooks[at] = self._hook(const.UC_HOOK_CODE, self._io_callback, at, at)
            self._remove_blocks(address, max(size, 1))
        self._new_io.clear()

    def load_fpu_control(self, state: UnicornState, mxcsr: int, fcw: int) -> None:
        """Load MXCSR and FCW, from which unicorn derives rounding modes."""
        context = self._contexts[id(state)]
        _lib.uc_context_restore(self._handle, context)
        for register, value in (
            (x86.UC_X86_REG_MXCSR, ctypes.c_uint32(mxcsr)),
            (x86.UC_X86_REG_FPCW, ctypes.c_uint16(fcw)),
        ):
            self._call("uc_reg_write", ctypes.c_int(register), ctypes.byref(value))
        _lib.uc_context_save(self._handle, context)

    def _check_layout(self) -> ctypes.c_uint64:
        """Compare `Env` with what unicorn's own calls say; return where it keeps fault addresses.

        This also executes a first block of code to its end: unicorn reports no new block before.
        """
        if _lib.uc_context_size(self._handle) != CONTEXT_HEADER + ctypes.sizeof(Env):
            raise UnsupportedEngine(_OTHER_FORM)
        state = self.new_state()
        assert isinstance(state, UnicornState)
        self._pristine = ctypes.string_at(ctypes.addressof(state.env), ctypes.sizeof(Env))
        code = ctypes.create_string_buffer(_PROBE, 2 * (_PAGE + 1))
        host = (ctypes.addressof(code) + _PAGE) & ~_PAGE
        ctypes.memmove(host, _PROBE, len(_PROBE))
        state.rip = 0x1000
        if self.run(state, _OnePage(0x1000, host), 1000) != Stop.IO:
            raise UnsupportedEngine("this version of unicorn doesn't report new blocks of code")
        state.rip += 2
        self.run(state, _OnePage(0x1000, host), 1000)
        env, known = state.env, self._uc.reg_read
        for field, value in (
            (env.gpr[0], _PROBE_ADDRESS),
            (env.cr[4], known(x86.UC_X86_REG_CR4)),
            (env.efer, self._uc.msr_read(0xC0000080)),
            (env.mxcsr, known(x86.UC_X86_REG_MXCSR)),
            (env.g_pat, self._uc.msr_read(0x277)),
            (env.dr[6], known(x86.UC_X86_REG_DR6)),
        ):
            if field != value:
                raise UnsupportedEngine(_OTHER_FORM)
        words = (ctypes.c_uint64 * 512).from_address(self._handle.value)
        places = [n for n, word in enumerate(words) if word == _PROBE_ADDRESS]
        if len(places) != 1:
            raise UnsupportedEngine("this version of unicorn hides the address of a fault")
        return ctypes.c_uint64.from_address(self._handle.value + 8 * places[0])

    def _add_hooks(self) -> None:
        state = ctypes.byref(self._run)
        self._hook(const.UC_HOOK_BLOCK, ctypes.c_void_p(_hooks.BLOCK), data=state)
        self._hook(const.UC_HOOK_INTR, ctypes.c_void_p(_hooks.INTERRUPT), data=state)
        for instruction, function in (
            (x86.UC_X86_INS_SYSCALL, _hooks.SYSCALL),
            (x86.UC_X86_INS_SYSENTER, _hooks.SYSENTER),
        ):
            self._hook(
                const.UC_HOOK_INSN,
                ctypes.c_void_p(function),
                data=state,
                extra=(ctypes.c_int(instruction),),
            )
        me = weakref.proxy(self)  # the callbacks must not keep the engine alive
        # What is called from C has to live as long as the engine.
        self._fill_callback = _FILL(lambda *a: me._on_fill(*a))
        self._block_callback = _EDGE(lambda *a: me._on_new_block(*a))
        self._io_callback = _CODE(lambda *a: me._on_io(*a))
        self._watch_callback = _CODE(lambda *a: me._on_watched(*a))
        self._hook(const.UC_HOOK_TLB_FILL, self._fill_callback)
        self._hook(const.UC_HOOK_EDGE_GENERATED, self._block_callback)

    def _hook(
        self,
        kind: int,
        callback: Any,
        first: int = 1,
        last: int = 0,
        data: Any = None,
        extra: tuple[Any, ...] = (),
    ) -> ctypes.c_size_t:
        handle = ctypes.c_size_t()
        self._call(
            "uc_hook_add",
            ctypes.byref(handle),
            ctypes.c_int(kind),
            callback,
            data,
            ctypes.c_uint64(first),
            ctypes.c_uint64(last),
            *extra,
        )
        return handle

    def _call(self, name: str, *arguments: Any) -> None:
        result = getattr(_lib, name)(self._handle, *arguments)
        if result != _OK:
            raise UnsupportedEngine(f"{name} failed in unicorn, error {result}")


class _OnePage:
    """One linear page of code, nothing else."""

    def __init__(self, linear: int, host: int) -> None:
        self._linear = linear
        self._host = host

    def fill(self, page: int, _kind: int) -> int:
        return self._host | READ | FETCH if page == self._linear else 0


def _free_contexts(contexts: dict[int, ctypes.c_void_p]) -> None:
    for context in contexts.values():
        _lib.uc_context_free(context)
