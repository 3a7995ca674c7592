"""Our uAPI declarations against a mainline 6.12 kernel's own headers (tox -e abi)."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmlaunch.uapi import ffi, lib
from tests.uapi import headers
from tests.uapi.headers import BIT_FIELDS, Kernel, MissingNames

# A download may come first.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    return headers.find_kernel(tmp_path_factory.mktemp("kernel"))


def _asserts() -> str:
    return f'#include "{headers.CSRC}/uapi_asserts.h"\n'


def test_static_asserts_when_compiled_over_the_kernels_headers_hold(kernel: Kernel) -> None:
    kernel.check(_asserts())


@pytest.mark.parametrize("header", ["uapi_kvm.h", "uapi_sev.h"])
def test_declarations_when_compared_with_the_kernels_headers_are_the_same(
    kernel: Kernel, header: str
) -> None:
    different = headers.differences(kernel, header)
    assert not different, "\n".join(different)


@pytest.mark.parametrize("path", BIT_FIELDS)
def test_word_when_the_kernel_has_bit_fields_holds_them_from_bit_0_up(
    kernel: Kernel, path: str
) -> None:
    """Each of the kernel's bit fields, set to ones, reads through our word where it must."""
    struct, _, word = path.partition(".")
    info = dict(ffi.typeof(f"struct {struct}").fields)[word]
    size = ffi.sizeof(info.type)
    fields = BIT_FIELDS[path]
    asked = kernel.ask(
        f"{field} = ({{ union {{ struct {struct} s; unsigned char b[sizeof(struct {struct})]; }}"
        f" u = {{ .s.{field} = -1 }}; unsigned long long w = 0;"
        f" __builtin_memcpy(&w, u.b + {info.offset}, {size}); w; }})"
        for field in fields
    )
    assert sum(asked.values()) == 2 ** (size * 8) - 1
    assert [asked[field] & -asked[field] for field in fields[:-1]] == [
        1 << bit for bit in range(len(fields) - 1)
    ]


def test_newer_names_when_the_kernel_has_them_are_the_same(kernel: Kernel) -> None:
    assert not _newer_differences(kernel)


def _newer_differences(kernel: Kernel) -> dict[str, int]:
    found = headers.values(kernel, "|".join(headers.defines("uapi_newer.h")))
    return {name: value for name, value in found.items() if value != getattr(lib, name)}


def test_newer_names_when_the_kernel_has_another_number_are_reported(kernel: Kernel) -> None:
    """Negative: the check above would see it."""
    changed = kernel.changed(
        "linux/kvm.h",
        "#define KVM_API_VERSION 12",
        "#define KVM_API_VERSION 12\n#define KVM_CAP_GUEST_MEMFD_FLAGS 245",
    )
    assert _newer_differences(changed) == {"KVM_CAP_GUEST_MEMFD_FLAGS": 245}


def _taken(kernel: Kernel) -> dict[str, str]:
    """Numbers of ours beyond 6.12 that the kernel uses under another name."""
    spaces = {
        r"KVM_SEV_SNP_PAGE_TYPE_\w+": ["KVM_SEV_SNP_PAGE_TYPE_VMSA"],
        r"KVM_SEV_(?!NR_MAX|SNP_PAGE|SNP_ID|SNP_FINISH|SNP_VCPU)\w+": [
            "KVM_SEV_SNP_ENABLE_REQ_CERTS",
            "KVM_SEV_SNP_GET_VCPU_STATE",
            "KVM_SEV_SNP_SET_VCPU_STATE",
        ],
        r"KVM_CAP_(?!PPC|S390|ARM|ENABLE_CAP_FLAG)\w+": [
            "KVM_CAP_GUEST_MEMFD_FLAGS",
            "KVM_CAP_SNP_VCPU_STATE",
            "KVM_CAP_SNP_DIRECT_VMSA",
        ],
        r"KVM_EXIT_\w+": ["KVM_EXIT_SNP_REQ_CERTS"],
    }
    taken = {}
    for pattern, ours in spaces.items():
        numbers = {getattr(lib, name): name for name in ours}
        for name, value in headers.values(kernel, pattern).items():
            if value in numbers and name != numbers[value]:
                taken[numbers[value]] = name
    return taken


def test_proposal_numbers_when_looked_up_in_the_kernel_are_free(kernel: Kernel) -> None:
    assert not _taken(kernel)


def test_proposal_number_when_the_kernel_uses_it_is_reported(kernel: Kernel) -> None:
    """Negative: the check above would see it, in an enum as in a define."""
    changed = kernel.changed(
        "asm/kvm.h",
        "KVM_SEV_SNP_LAUNCH_FINISH,",
        "KVM_SEV_SNP_LAUNCH_FINISH,\n\tKVM_SEV_SNP_OTHER = 105,",
    ).changed(
        "asm/kvm.h",
        "#define KVM_SEV_SNP_PAGE_TYPE_ZERO",
        "#define KVM_SEV_SNP_PAGE_TYPE_OTHER 2\n#define KVM_SEV_SNP_PAGE_TYPE_ZERO",
    )
    assert _taken(changed) == {
        "KVM_SEV_SNP_SET_VCPU_STATE": "KVM_SEV_SNP_OTHER",
        "KVM_SEV_SNP_PAGE_TYPE_VMSA": "KVM_SEV_SNP_PAGE_TYPE_OTHER",
    }


@pytest.mark.parametrize("name", ["KVM_CAP_SNP_VCPU_STATE", "KVM_CAP_SNP_DIRECT_VMSA"])
def test_proposal_capability_when_compared_with_the_kernels_is_above_all(
    kernel: Kernel, name: str
) -> None:
    capabilities = headers.values(kernel, r"KVM_CAP_\w+")
    assert len(capabilities) > 150
    assert getattr(lib, name) > max(capabilities.values())


def test_check_when_an_assert_is_wrong_fails_and_names_it(kernel: Kernel) -> None:
    wrong = "KL_OFFSET(struct kvm_sev_snp_launch_finish, host_data, 18);\n"
    with pytest.raises(MissingNames, match=r"kvm_sev_snp_launch_finish.*host_data"):
        kernel.check(_asserts() + wrong)


def test_check_when_the_kernels_struct_differs_names_field_and_both_offsets(
    kernel: Kernel,
) -> None:
    changed = kernel.changed("asm/kvm.h", "__u8 host_data[", "__u8 extra; __u8 host_data[")
    assert (
        "kvm_sev_snp_launch_finish.host_data:offset: 0x13 in csrc/uapi_kvm.h, "
        "0x14 in the kernel's headers"
    ) in headers.differences(changed, "uapi_kvm.h")


def test_check_when_the_kernel_lacks_a_name_fails_and_names_it(kernel: Kernel) -> None:
    changed = kernel.changed("linux/psp-sev.h", "SEV_RET_INVALID_KEY ", "SEV_RET_OTHER_KEY ")
    with pytest.raises(MissingNames, match="SEV_RET_INVALID_KEY"):
        headers.differences(changed, "uapi_sev.h")


@pytest.mark.parametrize("header", ["uapi_kvm.h", "uapi_sev.h"])
def test_questions_when_made_from_a_header_cover_each_define_and_struct(header: str) -> None:
    facts = headers.questions(header)
    text = headers.our_text(header)
    assert text.count("\n#define ") == sum(":" not in name for name in facts)
    assert text.count("\nstruct ") == sum(name.startswith("sizeof:") for name in facts)


@pytest.mark.parametrize(
    "fact",
    [
        "kvm_run.io.data_offset:offset",
        "kvm_run.s.padding:size",
        "kvm_vcpu_events.smi.latched_init:offset",
        "kvm_irq_routing_entry.u.msi.devid:offset",
        "kvm_cpuid2.entries:offset",
    ],
)
def test_questions_when_a_field_is_nested_or_open_ended_include_it(fact: str) -> None:
    assert fact in headers.questions("uapi_kvm.h")


def test_fetch_when_not_asked_for_skips(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("KVMLAUNCH_KERNEL_HEADERS", "KVMLAUNCH_FETCH", "KVMLAUNCH_REQUIRE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(pytest.skip.Exception, match="KVMLAUNCH_FETCH"):
        headers.find_kernel(tmp_path)


def test_headers_when_required_and_missing_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVMLAUNCH_KERNEL_HEADERS", str(tmp_path))
    monkeypatch.setenv("KVMLAUNCH_REQUIRE", "kvm,headers")
    with pytest.raises(pytest.fail.Exception, match=r"has no include/uapi/linux/kvm\.h"):
        headers.find_kernel(tmp_path)
