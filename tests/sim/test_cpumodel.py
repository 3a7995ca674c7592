"""CPUID of the simulated CPUs, and what firmware makes of a host's table.

Expected values: signatures and product families from the fact sheet (snp-firmware-abi 3 and
8.2), XSAVE sizes from the APM's layout, KVM's peculiarities from kernel-snp-abi 1.3, refused
bits from snp-firmware-abi 7.5.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlaunch.abi.cpuid_page import CpuidEntry
from kvmlaunch.sim.cpuid_policy import correct_entry
from kvmlaunch.sim.cpumodel import CPU_MODELS, CpuModel, Leaf, cpu_model, xsave_size

NAMES = ("Milan", "Genoa", "Turin")
MILAN = cpu_model("Milan")
GENOA = cpu_model("Genoa")


def leaf(model: CpuModel, function: int, index: int = 0) -> Leaf:
    found = [e for e in model.supported_cpuid() if (e.function, e.index) == (function, index)]
    assert len(found) == 1
    return found[0]


def entry_of(kvm: Leaf) -> CpuidEntry:
    return CpuidEntry(kvm.function, kvm.index, 0, 0, kvm.eax, kvm.ebx, kvm.ecx, kvm.edx)


def strict(entry: CpuidEntry, model: CpuModel = MILAN) -> CpuidEntry:
    return correct_entry(entry, model, "strict")


@pytest.mark.parametrize(
    ("name", "signature"), [("Milan", 0xA00F11), ("Genoa", 0xA10F11), ("Turin", 0xB00F21)]
)
def test_signature_is_the_products(name: str, signature: int) -> None:
    model = cpu_model(name)
    assert model.signature == signature
    assert leaf(model, 1).eax == signature
    assert leaf(model, 0x80000001).eax == signature


def test_cpu_model_unknown_raises() -> None:
    with pytest.raises(KeyError):
        cpu_model("Rome")


@pytest.mark.parametrize("name", NAMES)
def test_c_bit_is_51(name: str) -> None:
    assert cpu_model(name).c_bit == 51


def test_phys_bits_reduction_of_milan_is_1() -> None:
    assert MILAN.phys_bits_reduction == 1


def test_max_snp_asid_is_below_the_lowest_sev_asid() -> None:
    hardware = MILAN.hardware_cpuid(0x8000001F)
    assert hardware is not None
    assert MILAN.max_snp_asid == hardware[3] - 1 == 99


def test_hardware_cpuid_vendor_is_authenticamd() -> None:
    hardware = MILAN.hardware_cpuid(0)
    assert hardware is not None
    _, ebx, ecx, edx = hardware
    assert struct.pack("<3I", ebx, edx, ecx) == b"AuthenticAMD"


@pytest.mark.parametrize("name", NAMES)
def test_brand_string_says_simulated(name: str) -> None:
    registers = [cpu_model(name).hardware_cpuid(0x80000002 + n) for n in range(3)]
    text = b"".join(struct.pack("<4I", *r) for r in registers if r)
    assert text.startswith(f"Simulated EPYC ({name})".encode())


@pytest.mark.parametrize("function", [0x2, 0x4, 0x40000000, 0x80000026, 0x80860000])
def test_hardware_cpuid_of_a_missing_leaf_is_none(function: int) -> None:
    assert MILAN.hardware_cpuid(function) is None


def test_hardware_cpuid_not_indexed_ignores_the_index() -> None:
    assert MILAN.hardware_cpuid(1, 5) == MILAN.hardware_cpuid(1)


@pytest.mark.parametrize(
    ("function", "index", "answer"),
    [(0xB, 9, (0, 0, 9, 0)), (0x8000001D, 4, (0, 0, 0, 0)), (0xD, 5, (0, 0, 0, 0))],
)
def test_hardware_cpuid_with_an_index_too_high_has_no_data(
    function: int, index: int, answer: tuple[int, int, int, int]
) -> None:
    assert MILAN.hardware_cpuid(function, index) == answer


@pytest.mark.parametrize(
    ("components", "standard", "compacted"),
    [(1, 0x240, 0x240), (7, 0x340, 0x340), (0x207, 0x988, 0x348), (0x2E7, 0x988, 0x988)],
)
def test_xsave_size_of_components_is_that_of_the_layout(
    components: int, standard: int, compacted: int
) -> None:
    assert xsave_size(components, compacted=False) == standard
    assert xsave_size(components, compacted=True) == compacted


@pytest.mark.parametrize("name", NAMES)
def test_supported_cpuid_fits_a_cpuid_page_and_has_no_duplicates(name: str) -> None:
    table = cpu_model(name).supported_cpuid()
    assert len(table) <= 64
    assert len({(e.function, e.index) for e in table}) == len(table)


def test_supported_cpuid_ends_with_kvms_signature() -> None:
    signature, features = MILAN.supported_cpuid()[-2:]
    assert (signature.function, features.function) == (0x40000000, 0x40000001)
    text = struct.pack("<3I", signature.ebx, signature.ecx, signature.edx)
    assert text == b"KVMKVMKVM\0\0\0"
    assert signature.eax == 0x40000001


@pytest.mark.parametrize("name", NAMES)
def test_supported_cpuid_8000001f_keeps_only_the_c_bit_of_ebx(name: str) -> None:
    model = cpu_model(name)
    kvm = leaf(model, 0x8000001F)
    hardware = model.hardware_cpuid(0x8000001F)
    assert hardware is not None
    assert kvm.ebx == 51
    assert (kvm.ecx, kvm.edx) == (hardware[2], hardware[3])
    assert kvm.eax & 0b11010 == 0b11010  # SEV, ES, SNP
    assert not kvm.eax & ~hardware[0]


@pytest.mark.parametrize("name", NAMES)
def test_supported_cpuid_has_no_svm_as_with_nested_0(name: str) -> None:
    """cpuid.c: __do_cpuid_func(), 0x8000000A, where KVM hasn't set X86_FEATURE_SVM."""
    model = cpu_model(name)
    assert not leaf(model, 0x80000001).ecx & 1 << 2
    svm = leaf(model, 0x8000000A)
    assert (svm.eax, svm.ebx, svm.ecx, svm.edx) == (0, 0, 0, 0)
    assert model.table[0x80000001, 0][2] & 1 << 2


def test_supported_cpuid_80000008_has_the_bare_cpus_address_width() -> None:
    # cpuid.c, __do_cpuid_func: with TDP the raw width, and GuestPhysAddrSize in bits 23:16.
    assert leaf(MILAN, 0x80000008).eax == 0x303030
    assert leaf(cpu_model("Genoa"), 0x80000008).eax == 0x343934


def test_supported_cpuid_flags_only_indexed_leaves() -> None:
    flagged = {e.function for e in MILAN.supported_cpuid() if e.flags == 1}
    assert flagged == {0x7, 0xB, 0xD, 0x8000001D}
    assert {e.flags for e in MILAN.supported_cpuid()} == {0, 1}


def test_supported_cpuid_has_hypervisor_bit_and_no_osxsave() -> None:
    assert leaf(MILAN, 1).ecx >> 31 & 1
    assert not leaf(MILAN, 1).ecx >> 27 & 1


@pytest.mark.parametrize(("name", "avx512"), [("Milan", 0), ("Genoa", 1), ("Turin", 1)])
def test_supported_cpuid_avx512_is_genoas_and_turins(name: str, avx512: int) -> None:
    assert leaf(cpu_model(name), 7).ebx >> 16 & 1 == avx512
    assert leaf(cpu_model(name), 0xD).eax >> 5 & 1 == avx512


def test_repr_of_a_leaf_is_in_hex() -> None:
    assert repr(Leaf(0xD, 1, 1, 15, 0, 0, 0)) == "<Leaf 0xd.0x1 eax=0xf ebx=0x0 ecx=0x0 edx=0x0>"


@pytest.mark.parametrize(
    ("function", "register", "bit"),
    [
        (0x1, "ecx", 24),  # TSC_DEADLINE
        (0x7, "ebx", 1),  # TSC_ADJUST
        (0x7, "edx", 26),  # SPEC_CTRL
        (0x7, "edx", 27),  # STIBP
        (0x7, "edx", 29),  # ARCH_CAPABILITIES
        (0x7, "edx", 31),  # SSBD
        (0x80000008, "ebx", 25),  # VIRT_SSBD
        (0x80000021, "eax", 9),  # NO_SMM_CTL_MSR
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_policy_of_what_kvm_emulates_clears_that_bit(
    name: str, function: int, register: str, bit: int
) -> None:
    """KVM offers these, firmware refuses them: VMMs clear them beforehand."""
    sent = entry_of(leaf(cpu_model(name), function))
    assert getattr(sent, register) >> bit & 1
    corrected = strict(sent, cpu_model(name))
    assert not getattr(corrected, register) >> bit & 1


def test_policy_clears_nothing_but_what_is_refused() -> None:
    sent = entry_of(leaf(MILAN, 1))
    assert strict(sent).ecx == sent.ecx & ~(1 << 24)


@pytest.mark.parametrize(
    ("function", "register", "mask"),
    [
        (0x1, "ebx", 0xFF000000),  # APIC id
        (0x1, "ecx", 1 << 27 | 1 << 31),  # OSXSAVE, hypervisor
        (0x7, "ecx", 1 << 4),  # OSPKE
        (0x8000001E, "eax", 0xFFFFFFFF),  # extended APIC id
        (0xB, "edx", 0xFFFFFFFF),
    ],
)
@pytest.mark.parametrize("value", [0, 0xFFFFFFFF])
def test_policy_of_guest_state_is_free(function: int, register: str, mask: int, value: int) -> None:
    hardware = MILAN.hardware_cpuid(function)
    assert hardware is not None
    registers = dict(zip(("eax", "ebx", "ecx", "edx"), hardware, strict=True))
    registers[register] = registers[register] & ~mask | value & mask
    entry = CpuidEntry(function, **registers)
    assert strict(entry) == entry


@pytest.mark.parametrize("function", [0x40000000, 0x40000001, 0x10000, 0x80010000, 0xC0000001])
def test_policy_of_other_ranges_passes_anything(function: int) -> None:
    entry = CpuidEntry(function, 0, 0, 0, 1, 2, 3, 0xFFFFFFFF)
    assert strict(entry) is entry


@pytest.mark.parametrize("function", [0x2, 0xFFFF, 0x80000026, 0x8000FFFF])
def test_policy_of_an_unknown_leaf_is_all_zero(function: int) -> None:
    assert strict(CpuidEntry(function, 0, 0, 0, 1, 2, 3, 4)) == CpuidEntry(function)


def test_policy_of_the_published_refusal_expects_2_for_6() -> None:
    """nvtrust issue 91: 8000_001D index 3 EDX provided 6, expected 2."""
    hardware = MILAN.hardware_cpuid(0x8000001D, 3)
    assert hardware is not None
    eax, ebx, ecx, _ = hardware
    assert strict(CpuidEntry(0x8000001D, 3, 0, 0, eax, ebx, ecx, 6)).edx == 2


@pytest.mark.parametrize(("sent", "corrected"), [(0, 0), (1, 1), (3, 3), (4, 0), (1 << 31, 0)])
def test_policy_of_a_caches_sets_and_inclusiveness_is_free(sent: int, corrected: int) -> None:
    """They only describe; complex indexing, bit 2, is a feature."""
    for sets in (0, 0x7FFF, 0xFFFFFFFF):
        entry = strict(CpuidEntry(0x8000001D, 3, 0, 0, 0, 0, sets, sent))
        assert (entry.ecx, entry.edx) == (sets, corrected)


@pytest.mark.parametrize(
    ("index", "xcr0", "xss", "size"),
    [
        (0, 1, 0, 0x240),
        (0, 0, 0, 0x240),
        (0, 7, 0, 0x340),
        (0, 0x207, 0, 0x988),
        (0, 0xE7, 0, 0x340),  # Milan has no AVX-512
        (1, 1, 0, 0x240),
        (1, 0x207, 0, 0x348),
        (1, 7, 0x1800, 0x368),
    ],
)
def test_policy_of_xsave_size_follows_xcr0_in_and_xss_in(
    index: int, xcr0: int, xss: int, size: int
) -> None:
    entry = CpuidEntry(0xD, index, xcr0, xss, 1, 0xFFF, 0, 0)
    assert strict(entry).ebx == size
    assert correct_entry(entry, MILAN, "permissive").ebx == size


@pytest.mark.parametrize(
    ("sent", "corrected"),
    [
        (0x33, 0x33),
        (0x32, 0x33),
        (0x1033, 0x1033),
        (0x4033, 0x4033),
        (0x5033, 0x4033),  # more VMPLs than there are
        (0x73, 0x73),
        (0xB3, 0x73),  # more address bits lost than there are
        (0, 0x33),
    ],
)
def test_policy_of_8000001f_ebx_wants_the_c_bit_and_limits_the_rest(
    sent: int, corrected: int
) -> None:
    assert strict(CpuidEntry(0x8000001F, ebx=sent)).ebx == corrected


def test_policy_permissive_frees_counts_but_not_features() -> None:
    many = CpuidEntry(0x8000001D, 3, 0, 0, 0x03FFC163, 0x03C0003F, 0xFFFF, 6)
    corrected = correct_entry(many, MILAN, "permissive")
    assert (corrected.eax, corrected.ecx, corrected.edx) == (0x03FFC163, 0xFFFF, 2)
    assert strict(many).eax == 0x0003C163


def test_policy_of_an_entry_without_outputs_passes() -> None:
    for function in (0x0, 0x1, 0xD, 0x80000008, 0x1234):
        assert strict(CpuidEntry(function)) == CpuidEntry(function)


words = st.integers(0, 0xFFFFFFFF)
entries = st.builds(
    CpuidEntry,
    st.sampled_from(sorted({f for m in CPU_MODELS.values() for f, _ in m.table})) | words,
    st.integers(0, 12) | words,
    st.integers(0, 0x3FF),
    st.integers(0, 0x1FFF),
    words,
    words,
    words,
    words,
)


@given(entries, st.sampled_from(NAMES))
def test_policy_of_a_corrected_entry_takes_it(entry: CpuidEntry, name: str) -> None:
    model = cpu_model(name)
    for policy in ("strict", "permissive"):
        corrected = correct_entry(entry, model, policy)
        assert correct_entry(corrected, model, policy) == corrected


@pytest.mark.parametrize("name", NAMES)
def test_policy_takes_the_hardwares_own_table(name: str) -> None:
    model = cpu_model(name)
    for (function, index), registers in model.table.items():
        entry = CpuidEntry(function, index, 0x2E7, 0x1800, *registers)
        assert strict(entry, model) == entry
