"""A host that measures something else than it was told: the differences that bisect must find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from kvmlaunch.uapi import Platform, Result, address_of, ffi, lib, peek, poke
from tests.launch.rig import PAGE, Wrapped


class Sent(NamedTuple):
    """One page on its way to the host."""

    gpa: int
    type: int
    data: bytes


Change = Callable[[Sent], list[Sent]]


class Planted(Wrapped):
    """Sends each page of SNP_LAUNCH_UPDATE by itself, as ``change`` makes it.

    ``change`` is made anew for each VM.
    """

    def __init__(self, inner: Platform, make_change: Callable[[], Change]) -> None:
        super().__init__(inner)
        self._make_change = make_change
        self._change = make_change()

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
        if request == lib.KVM_CREATE_VM:
            self._change = self._make_change()
        if request == lib.KVM_MEMORY_ENCRYPT_OP and arg:
            command = ffi.cast("struct kvm_sev_cmd *", arg)
            if command.id == lib.KVM_SEV_SNP_LAUNCH_UPDATE:
                return self._update(fd, command)
        return super().ioctl(fd, request, arg)

    def _update(self, fd: int, command: Any) -> Result:
        update = ffi.cast("struct kvm_sev_snp_launch_update *", command.data)
        while update.len:
            gpa, data = update.gfn_start * PAGE, bytes(PAGE)
            if update.uaddr:
                data = peek(update.uaddr, PAGE)
            for page in self._change(Sent(gpa, update.type, data)):
                result = self._send(fd, command, page)
                if result.ret < 0:
                    return result
            update.gfn_start += 1
            update.len -= PAGE
            if update.uaddr:
                update.uaddr += PAGE
        return Result(0, 0)

    def _send(self, fd: int, command: Any, page: Sent) -> Result:
        source = ffi.new("char[]", 2 * PAGE)
        start = -address_of(source) % PAGE
        ffi.buffer(source)[start : start + PAGE] = page.data
        update = ffi.new(
            "struct kvm_sev_snp_launch_update *",
            {
                "gfn_start": page.gpa // PAGE,
                "type": page.type,
                "len": PAGE,
                "uaddr": address_of(source) + start if page.type != 3 else 0,
            },
        )
        mine = ffi.new("struct kvm_sev_cmd *", command[0])
        mine.id, mine.data = lib.KVM_SEV_SNP_LAUNCH_UPDATE, address_of(update)
        result = super().ioctl(fd, lib.KVM_MEMORY_ENCRYPT_OP, address_of(mine))
        command.error = mine.error
        return result


def at(gpa: int, change: Callable[[Sent], list[Sent]]) -> Callable[[], Change]:
    """Change the page at ``gpa`` only."""
    return lambda: lambda page: change(page) if page.gpa == gpa else [page]


def other_content(gpa: int) -> Callable[[], Change]:
    """One bit of the page is another."""
    return at(gpa, lambda page: [page._replace(data=page.data[:-1] + bytes([page.data[-1] ^ 1]))])


def other_type(gpa: int, kind: int) -> Callable[[], Change]:
    """The page is of another type."""
    return at(gpa, lambda page: [page._replace(type=kind)])


def other_gpa(gpa: int, to: int) -> Callable[[], Change]:
    """The page goes elsewhere."""
    return at(gpa, lambda page: [page._replace(gpa=to)])


def missing(gpa: int) -> Callable[[], Change]:
    """The page isn't launched."""
    return at(gpa, lambda page: [])


def doubled(gpa: int, to: int) -> Callable[[], Change]:
    """The page is launched a second time, elsewhere: no page can be launched twice."""
    return at(gpa, lambda page: [page, page._replace(gpa=to)])


def late(gpa: int) -> Callable[[], Change]:
    """The page is launched behind the one that should follow it."""

    def make() -> Change:
        held: list[Sent] = []

        def change(page: Sent) -> list[Sent]:
            if page.gpa == gpa:
                held.append(page)
                return []
            both = [page, *held]
            held.clear()
            return both

        return change

    return make


class OtherRegisters(Wrapped):
    """Changes registers of a vCPU on their way: ``vcpu`` counts those of one VM from 0."""

    def __init__(self, inner: Platform, vcpu: int, request: int, change: Callable[[int], None]):
        super().__init__(inner)
        self._vcpu, self._request, self._change = vcpu, request, change
        self._fds: list[int] = []

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
        if request == self._request and self._fds[self._vcpu : self._vcpu + 1] == [fd]:
            self._change(arg)
        result = super().ioctl(fd, request, arg)
        if request == lib.KVM_CREATE_VM:
            self._fds = []
        elif request == lib.KVM_CREATE_VCPU and result.ret >= 0:
            self._fds.append(result.ret)
        return result


def set_register(name: str, value: int) -> Callable[[int], None]:
    """For KVM_SET_REGS."""

    def change(arg: int) -> None:
        setattr(ffi.cast("struct kvm_regs *", arg), name, value)

    return change


def clear_fpu(arg: int) -> None:
    """For KVM_SET_XSAVE: FCW and MXCSR (APM volume 4, XSAVE format) are zero."""
    poke(arg, bytes(2))
    poke(arg + 24, bytes(4))


class OneMoreVcpu(Wrapped):
    """A vCPU that nobody asked for, right behind the ``after``-th of a VM."""

    def __init__(self, inner: Platform, after: int = 0) -> None:
        super().__init__(inner)
        self._after = after
        self._left: list[int] = []

    def ioctl(self, fd: int, request: int, arg: int = 0) -> Result:
        result = super().ioctl(fd, request, arg)
        if request == lib.KVM_CREATE_VCPU and arg == self._after and result.ret >= 0:
            self._left.append(super().ioctl(fd, request, 100).ret)
        return result

    def close(self, fd: int) -> Result:
        while self._left:
            super().close(self._left.pop())
        return super().close(fd)
