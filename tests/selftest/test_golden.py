"""The golden digests, made anew from their inputs by two programs that share no code with ours.

`from_scratch` is struct and hashlib alone, after snp-firmware-abi 1.1 (PAGE_INFO) and appendix B of
kernel-snp-abi (offsets of the VMSA); `by_sev_snp_measure` has the digest chained by AMD's tool.
``python -m tests.selftest.test_golden`` prints the table's digests.
"""

from __future__ import annotations

import hashlib
import struct

import pytest

from kvmlaunch.selftest.golden import GOLDEN, PAGES, STATES, Golden

GPA = 0x100000
VMSA_GPA = 0xFFFFFFFFF000
NORMAL, VMSA, ZERO, UNMEASURED, SECRETS = 1, 2, 3, 4, 5

# Offsets of struct sev_es_save_area: segments of 16 bytes, words, and blocks of registers.
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr")
QUADS = {
    **{"efer": 0xD0, "cr4": 0x148, "cr3": 0x150, "cr0": 0x158, "dr7": 0x160, "dr6": 0x168},
    **{"rflags": 0x170, "rip": 0x178, "rsp": 0x1D8, "rax": 0x1F8, "star": 0x200, "lstar": 0x208},
    **{"cstar": 0x210, "sfmask": 0x218, "kernel_gs_base": 0x220, "sysenter_cs": 0x228},
    **{"sysenter_esp": 0x230, "sysenter_eip": 0x238, "g_pat": 0x268, "rcx": 0x308, "rdx": 0x310},
    **{"rbx": 0x318, "rbp": 0x328, "rsi": 0x330, "rdi": 0x338, "xcr0": 0x3E8, "x87_dp": 0x400},
    **{"x87_rip": 0x418, **{f"r{n}": 0x300 + 8 * n for n in range(8, 16)}},
}
DOUBLES = {"mxcsr": 0x408}
WORDS = {"x87_ftw": 0x40C, "x87_fsw": 0x40E, "x87_fcw": 0x410, "x87_fop": 0x412}
BLOCKS = {"fpreg_x87": 0x420, "fpreg_xmm": 0x470}
SEV_FEATURES = 0x3B0


def vmsa_page(name: str, features: int) -> bytes:
    page = bytearray(4096)
    for field, value in STATES[name].items():
        if field in SEGMENTS:
            struct.pack_into("<HHIQ", page, 16 * SEGMENTS.index(field), *value)
        elif field in QUADS:
            struct.pack_into("<Q", page, QUADS[field], value)
        elif field in DOUBLES:
            struct.pack_into("<I", page, DOUBLES[field], value)
        elif field in WORDS:
            struct.pack_into("<H", page, WORDS[field], value)
        else:
            page[BLOCKS[field] : BLOCKS[field] + len(value)] = value
    struct.pack_into("<Q", page, SEV_FEATURES, features | 1)
    return bytes(page)


def pages(golden: Golden) -> list[tuple[int, int, bytes]]:
    """(type, GPA, bytes) of all that is measured, in order."""
    launched = [(int(kind), GPA + n * 4096, data) for n, (kind, data) in enumerate(PAGES)]
    vmsas = [(VMSA, VMSA_GPA, vmsa_page(name, golden.features)) for name in golden.states]
    return launched + vmsas


def from_scratch(golden: Golden) -> str:
    digest = bytes(48)
    for kind, gpa, data in pages(golden):
        contents = hashlib.sha384(data).digest() if kind in (NORMAL, VMSA) else bytes(48)
        info = digest + contents + struct.pack("<HBB4xQ", 0x70, kind, 0, gpa)
        digest = hashlib.sha384(info).digest()
    return digest.hex()


def by_sev_snp_measure(golden: Golden) -> str:
    from sevsnpmeasure.gctx import GCTX

    context = GCTX()
    for kind, gpa, data in pages(golden):
        if kind == NORMAL:
            context.update_normal_pages(gpa, data)
        elif kind == VMSA:
            context.update_vmsa_page(data)
        elif kind == ZERO:
            context.update_zero_pages(gpa, len(data))
        elif kind == UNMEASURED:
            context.update_unmeasured_pages(gpa, len(data))
        else:
            context.update_secrets_page(gpa)
    return bytes(context.ld()).hex()


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.name)
@pytest.mark.parametrize("program", [from_scratch, by_sev_snp_measure])
def test_golden_when_made_anew_by_another_program_is_the_same(program, golden: Golden) -> None:
    assert program(golden) == golden.digest


def test_golden_when_listed_has_every_vcpu_count_and_debug_swap() -> None:
    assert {len(golden.states) for golden in GOLDEN} == {1, 2, 4}
    assert {golden.features for golden in GOLDEN} == {0, 0x20}
    assert len({golden.digest for golden in GOLDEN}) == len(GOLDEN) == len({g.name for g in GOLDEN})


if __name__ == "__main__":
    for each in GOLDEN:
        print(each.name, from_scratch(each), by_sev_snp_measure(each))
