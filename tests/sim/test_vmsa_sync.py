"""VMSA pages that the simulated kernel measures, against facts typed from kernel-snp-abi 5."""

from __future__ import annotations

import hashlib
import struct as packed

import pytest

from kvmlaunch.abi.kvm_sync import sregs_round_trip, synced
from kvmlaunch.abi.reset import kvm_untouched, qemu_reset
from kvmlaunch.abi.vmsa import Vmsa
from kvmlaunch.sim.vmsa_sync import sync_vmsa
from kvmlaunch.uapi import ffi, lib

from .driver import PAGE, Guest, simulated, struct

# 5.3: every byte of an untouched vCPU's page that isn't zero.
SEGMENTS = {
    0x000: (0, 0x92, 0xFFFF, 0),  # es
    0x010: (0xF000, 0x9A, 0xFFFF, 0xFFFF0000),  # cs
    0x020: (0, 0x92, 0xFFFF, 0),  # ss
    0x030: (0, 0x92, 0xFFFF, 0),  # ds
    0x040: (0, 0x92, 0xFFFF, 0),  # fs
    0x050: (0, 0x92, 0xFFFF, 0),  # gs
    0x060: (0, 0, 0xFFFF, 0),  # gdtr
    0x070: (0, 0x82, 0xFFFF, 0),  # ldtr
    0x080: (0, 0, 0xFFFF, 0),  # idtr
    0x090: (0, 0x83, 0xFFFF, 0),  # tr
}
QUADS = {
    0x0D0: 0x1000,  # efer
    0x148: 0x40,  # cr4
    0x158: 0x10,  # cr0
    0x160: 0x400,  # dr7
    0x168: 0xFFFF0FF0,  # dr6
    0x170: 0x2,  # rflags
    0x178: 0xFFF0,  # rip
    0x268: 0x0007040600070406,  # g_pat
    0x310: 0x600,  # rdx
    0x3B0: 0x1,  # sev_features
    0x3E8: 0x1,  # xcr0
    0x408: 0x1F80,  # mxcsr, then ftw and fsw 0
    0x410: 0x37F,  # fcw
}


def reset_page():
    page = bytearray(PAGE)
    for offset, (selector, attrib, limit, base) in SEGMENTS.items():
        packed.pack_into("<HHIQ", page, offset, selector, attrib, limit, base)
    for offset, value in QUADS.items():
        packed.pack_into("<Q", page, offset, value)
    return page


class Vm(Guest):
    """A guest with one vCPU, whose VMSA is read when firmware gets it."""

    def __init__(self, platform, **init):
        super().__init__(platform, init=False)
        self.ok(self.init2(**init)[0])
        self.vcpu = self.add_vcpu()

    def page(self):
        """Launch, and return the VMSA's bytes as the kernel made them, and their digest."""
        vcpu = self.platform._host.fds.get(self.vcpu).vcpu
        made = sync_vmsa(vcpu.state, vcpu.vm.sev.features)
        self.ok(self.start()[0])
        self.ok(self.finish()[0])
        measured = self.platform.measured_pages(self.vm)[-1]
        assert measured.contents == hashlib.sha384(made).digest()
        return made

    def change(self, name, **fields):
        """GET, set fields, SET."""
        value = self.get(self.vcpu, getattr(lib, f"KVM_GET_{name}"))
        for field, content in fields.items():
            setattr(value, field, content)
        self.ok(self.ioctl(self.vcpu, getattr(lib, f"KVM_SET_{name}"), value))

    def set_msr(self, index, data):
        buffer = ffi.new("char[]", 24)
        header = ffi.cast("struct kvm_msrs *", buffer)
        header.nmsrs = 1
        header.entries[0].index, header.entries[0].data = index, data
        return self.ioctl(self.vcpu, lib.KVM_SET_MSRS, header).ret

    def supported_cpuid(self):
        buffer = ffi.new("char[]", 8 + 256 * 40)
        header = ffi.cast("struct kvm_cpuid2 *", buffer)
        header.nent = 256
        self.ok(self.ioctl(self.kvm, lib.KVM_GET_SUPPORTED_CPUID, header))
        self.ok(self.ioctl(self.vcpu, lib.KVM_SET_CPUID2, header))


@pytest.fixture
def vm():
    with simulated() as platform:
        yield Vm(platform)


def quad(page, offset):
    return packed.unpack_from("<Q", page, offset)[0]


def attrib(page, offset):
    return packed.unpack_from("<H", page, offset + 2)[0]


def test_untouched_vcpu_has_the_reset_page(vm):
    assert vm.page() == reset_page()


@pytest.mark.parametrize("profile", ["6.12", "6.18", "7.0"])
def test_ap_has_the_same_reset_page(profile):
    with simulated(profile) as platform:
        vm = Vm(platform)
        vm.add_vcpu(1)
        expected = hashlib.sha384(reset_page()).digest()
        vm.page()
        pages = platform.measured_pages(vm.vm)
        assert [page.contents for page in pages] == [expected] * 2


def test_sev_features_of_init2_are_in_the_page():
    with simulated() as platform:
        assert quad(Vm(platform, vmsa_features=0x20).page(), 0x3B0) == 0x21


def test_sregs_round_trip_changes_the_data_segments_only(vm):
    vm.change("SREGS")
    expected = reset_page()
    for offset in (0x000, 0x030, 0x040, 0x050):  # es ds fs gs; not ss, cs or tr
        packed.pack_into("<H", expected, offset + 2, 0x93)
    assert vm.page() == expected


def test_regs_fpu_and_xcrs_round_trip_changes_nothing(vm):
    for name in ("REGS", "FPU", "XSAVE", "XCRS", "DEBUGREGS"):
        vm.change(name)
    assert vm.page() == reset_page()


GENERAL = {
    "rax": 0x1F8,
    "rbx": 0x318,
    "rcx": 0x308,
    "rdx": 0x310,
    "rsi": 0x330,
    "rdi": 0x338,
    "rsp": 0x1D8,
    "rbp": 0x328,
    "r8": 0x340,
    "r9": 0x348,
    "r10": 0x350,
    "r11": 0x358,
    "r12": 0x360,
    "r13": 0x368,
    "r14": 0x370,
    "r15": 0x378,
    "rip": 0x178,
}


def test_regs_are_each_at_their_offset(vm):
    values = {name: 0x1111 * (n + 1) << 32 | n for n, name in enumerate(GENERAL)}
    vm.change("REGS", **values, rflags=0)
    page = vm.page()
    assert {name: quad(page, GENERAL[name]) for name in GENERAL} == values
    assert quad(page, 0x170) == 2  # the fixed bit is set again


def test_get_sregs_shows_cr0_with_cd_and_nw_and_neither_svme_nor_mce(vm):
    sregs = vm.get(vm.vcpu, lib.KVM_GET_SREGS)
    assert (sregs.cr0, sregs.cr4, sregs.efer) == (0x60000010, 0, 0)
    assert (sregs.ds.type, sregs.ss.type, sregs.cs.type, sregs.tr.type) == (3, 2, 0xA, 3)


@pytest.mark.parametrize(
    ("fields", "offset", "value"),
    [
        ({"cr0": 0x60000011}, 0x158, 0x11),
        ({"cr0": 0x31}, 0x158, 0x31),
        ({"cr2": 0x1234}, 0x240, 0),
        ({"cr3": 0x5000}, 0x150, 0x5000),
        ({"cr4": 0x20}, 0x148, 0x60),
        ({"efer": 0x1}, 0x0D0, 0x1001),
        ({"apic_base": 0xFEE00800}, 0x178, 0xFFF0),
    ],
)
def test_sregs_field_lands_in_the_page(vm, fields, offset, value):
    vm.change("SREGS", **fields)
    assert quad(vm.page(), offset) == value


def disable_cd_nw_quirk(vm):
    cap = struct("kvm_enable_cap", cap=lib.KVM_CAP_DISABLE_QUIRKS2)
    cap.args[0] = lib.KVM_X86_QUIRK_CD_NW_CLEARED
    vm.ok(vm.ioctl(vm.vm, lib.KVM_ENABLE_CAP, cap))


def test_cr0_keeps_cd_and_nw_when_the_quirk_is_off(vm):
    disable_cd_nw_quirk(vm)
    vm.change("SREGS")
    assert quad(vm.page(), 0x158) == 0x60000010


def test_cr0_of_a_new_vcpu_keeps_cd_and_nw_when_the_quirk_is_off(vm):
    disable_cd_nw_quirk(vm)
    vm.vcpu = vm.add_vcpu(1)
    assert quad(vm.page(), 0x158) == 0x60000010


def test_long_mode_is_taken_with_c_bit_once_cpuid_is_known(vm):
    long_mode = {"cr0": 0x80000011, "cr4": 0x20, "efer": 0x500, "cr3": 1 << 51 | 0x1000}
    value = vm.get(vm.vcpu, lib.KVM_GET_SREGS)
    for field, content in long_mode.items():
        setattr(value, field, content)
    assert vm.ioctl(vm.vcpu, lib.KVM_SET_SREGS, value).ret == -1
    vm.supported_cpuid()
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_SREGS, value))
    page = vm.page()
    assert quad(page, 0x150) == 1 << 51 | 0x1000
    assert quad(page, 0x0D0) == 0x1500


def test_segment_fields_are_packed_into_attrib(vm):
    sregs = vm.get(vm.vcpu, lib.KVM_GET_SREGS)
    for name, value in {"type": 0xB, "s": 1, "dpl": 3, "present": 1, "avl": 1, "g": 1}.items():
        setattr(sregs.cs, name, value)
    sregs.cs.db, sregs.cs.base, sregs.cs.limit, sregs.cs.selector = 1, 0x1234, 0xFFFFFFFF, 8
    sregs.ss.dpl = 3
    sregs.fs.unusable = 1
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_SREGS, sregs))
    page = vm.page()
    assert packed.unpack_from("<HHIQ", page, 0x010) == (8, 0xDFB, 0xFFFFFFFF, 0x1234)
    assert attrib(page, 0x020) == 0xF2
    assert page[0x0CB] == 3  # cpl follows ss.dpl
    assert attrib(page, 0x040) == 0x13  # not present


def test_descriptor_tables_are_base_and_limit(vm):
    sregs = vm.get(vm.vcpu, lib.KVM_GET_SREGS)
    sregs.gdt.base, sregs.gdt.limit, sregs.idt.base, sregs.idt.limit = 0x1000, 0x17, 0x2000, 0x3F
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_SREGS, sregs))
    page = vm.page()
    assert packed.unpack_from("<HHIQ", page, 0x060) == (0, 0, 0x17, 0x1000)
    assert packed.unpack_from("<HHIQ", page, 0x080) == (0, 0, 0x3F, 0x2000)


@pytest.mark.parametrize(
    ("index", "offset", "value"),
    [
        (0xC0000081, 0x200, 0x1122),
        (0xC0000082, 0x208, 0x1122),
        (0xC0000083, 0x210, 0x1122),
        (0xC0000084, 0x218, 0x1122),
        (0xC0000102, 0x220, 0x1122),
        (0xC0000100, 0x048, 0x1122),
        (0xC0000101, 0x058, 0x1122),
        (0x174, 0x228, 0x1122),
        (0x175, 0x230, 0x1122),
        (0x176, 0x238, 0x1122),
        (0x277, 0x268, 0x0000000000060604),
        (0x1D9, 0x270, 0x1),
        (0x48, 0x2E0, 0x4),
    ],
)
def test_msr_lands_in_the_page(vm, index, offset, value):
    assert vm.set_msr(index, value) == 1
    assert quad(vm.page(), offset) == value


@pytest.mark.parametrize(("index", "offset"), [(0x175, 0x230), (0x176, 0x238)])
def test_sysenter_msr_lands_with_its_lower_half(vm, index, offset):
    assert vm.set_msr(index, 5 << 32 | 7) == 1
    assert quad(vm.page(), offset) == 7


# svm_set_msr(): the bits of external pins (5:2) and BTF are dropped, the rest but LBR refused.
@pytest.mark.parametrize(("value", "done", "kept"), [(0x3F, 1, 1), (0x3E, 1, 0), (0x40, 0, 0)])
def test_debugctl_keeps_lbr_only(vm, value, done, kept):
    assert vm.set_msr(0x1D9, value) == done
    assert quad(vm.page(), 0x270) == kept


def test_efer_msr_gets_svme(vm):
    assert vm.set_msr(0xC0000080, 0x901) == 1
    assert quad(vm.page(), 0x0D0) == 0x1901


def test_tsc_aux_msr_does_not_reach_the_page(vm):
    assert vm.set_msr(0xC0000103, 7) == 1
    assert vm.page() == reset_page()


def test_debugregs_give_dr6_but_no_addresses(vm):
    regs = struct("kvm_debugregs", dr6=0xFFFF0FF1, dr7=0x400)
    regs.db = [1, 2, 3, 4]
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_DEBUGREGS, regs))
    page = vm.page()
    assert quad(page, 0x168) == 0xFFFF0FF1
    assert page[0x180:0x1C0] == bytes(0x40)


def test_xcr0_of_set_xcrs_is_in_the_page(vm):
    vm.supported_cpuid()
    xcrs = struct("kvm_xcrs", nr_xcrs=1)
    xcrs.xcrs[0].value = 7
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_XCRS, xcrs))
    assert quad(vm.page(), 0x3E8) == 7


def test_set_fpu_gives_registers_but_no_mxcsr(vm):
    fpu = struct("kvm_fpu", fcw=0x27F, fsw=1, ftwx=3, last_opcode=5, last_ip=6, last_dp=7)
    fpu.mxcsr = 0x1FFF
    ffi.buffer(fpu.fpr)[:] = b"".join(bytes([n + 1] * 10 + [0xEE] * 6) for n in range(8))
    ffi.buffer(fpu.xmm)[:] = bytes(range(256))
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_FPU, fpu))
    page = vm.page()
    assert packed.unpack_from("<QIHHHH", page, 0x400) == (7, 0x1F80, 3, 1, 0x27F, 5)
    assert packed.unpack_from("<HHQ", page, 0x414) == (0, 0, 6)
    assert page[0x420:0x460] == b"".join(bytes([n + 1] * 8) for n in range(8))
    assert page[0x460:0x470] == b"".join(bytes([n + 1] * 2) for n in range(8))
    assert page[0x470:0x570] == bytes(range(256))


def xsave_image(in_use, mxcsr=0x1F80):
    """An image with every component filled, of which ``in_use`` counts."""
    image = bytearray(b"\x5a" * PAGE)
    packed.pack_into("<HH", image, 0, 0x27F, 0)
    packed.pack_into("<I", image, 24, mxcsr)
    image[512:576] = packed.pack("<Q", in_use).ljust(64, b"\0")
    return image


@pytest.mark.parametrize(
    ("in_use", "fcw", "mxcsr", "xmm", "ymm"),
    [
        (0x7, 0x27F, 0x1F00, True, True),
        (0x3, 0x27F, 0x1F00, True, False),
        (0x1, 0x27F, 0x1F00, False, False),
        (0x4, 0x37F, 0x1F00, False, True),
        (0x0, 0x37F, 0x1F80, False, False),
    ],
)
def test_set_xsave_gives_what_is_in_use(vm, in_use, fcw, mxcsr, xmm, ymm):
    area = struct("kvm_xsave")
    ffi.buffer(area)[:] = xsave_image(in_use, mxcsr=0x1F00)
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_XSAVE, area))
    page = vm.page()
    assert packed.unpack_from("<H", page, 0x410) == (fcw,)
    assert packed.unpack_from("<I", page, 0x408) == (mxcsr,)
    assert page[0x470:0x570] == (b"\x5a" if xmm else b"\0") * 256
    assert page[0x570:0x670] == (b"\x5a" if ymm else b"\0") * 256


def test_pkru_of_set_xsave_is_in_the_page(vm):
    area = struct("kvm_xsave")
    image = xsave_image(1 << 9)
    packed.pack_into("<I", image, 0x980, 0x55555554)  # AMD: PKRU at 0x980 (CPUID 0xD, 9)
    ffi.buffer(area)[:] = image
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_XSAVE, area))
    assert packed.unpack_from("<I", vm.page(), 0x2E8) == (0x55555554,)


def test_events_mp_state_and_cpuid_do_not_reach_the_page(vm):
    vm.supported_cpuid()
    vm.change("VCPU_EVENTS")
    vm.change("MP_STATE")
    assert vm.page() == reset_page()


# Against the launcher's prediction, which was written apart from this model.


def test_reset_page_is_what_abi_predicts_for_an_untouched_vcpu(vm):
    decoded = Vmsa.decode(vm.page())
    assert synced(decoded, sev_features=1) == decoded


def test_round_trip_is_what_abi_predicts(vm):
    before = Vmsa.decode(bytes(reset_page()))
    vm.change("SREGS")
    assert Vmsa.decode(vm.page()) == synced(sregs_round_trip(before), sev_features=1)


def test_untouched_vcpu_is_what_abi_predicts(vm):
    assert vm.page() == kvm_untouched(sev_features=1).encode()


def qemu_like(vm):
    """What QEMU writes into a vCPU of type EPYC-v4 at reset."""
    sregs = vm.get(vm.vcpu, lib.KVM_GET_SREGS)
    sregs.cs.type, sregs.tr.type = 0xB, 0xB
    for name in ("ds", "es", "fs", "gs", "ss"):
        getattr(sregs, name).type = 3
    vm.ok(vm.ioctl(vm.vcpu, lib.KVM_SET_SREGS, sregs))
    vm.change("REGS", rdx=0x800F12)
    return vm.page()


def test_qemu_reset_state_gives_the_published_page(vm):
    """SHA-384 of sev-snp-measure's VMSA page, QEMU BSP EPYC-v4 (snp-firmware-abi 3.2)."""
    published = (
        "77920c4c629ff47e90c0e174fc1ad0eb6fa664f88cd4739488058a8c6cb1a77b"
        "3856f55378e9518d0da99452d51c553a"
    )
    assert hashlib.sha384(qemu_like(vm)).hexdigest() == published


def test_qemu_reset_state_is_what_abi_predicts(vm):
    expected = qemu_reset(0xFFFFFFF0, signature=0x800F12, sev_features=1)
    assert Vmsa.decode(qemu_like(vm)) == expected
