"""What a host would refuse of an IGVM file, found before a launch, and where loaders differ.

What loaders make of a file: image-formats 1.4 to 1.12 of the project's reference, from their
sources and from trying them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from kvmlaunch.abi.idblock import ALGO_ECDSA_P384_SHA384, IdAuth, IdBlock
from kvmlaunch.abi.idblock_sign import check_signatures
from kvmlaunch.abi.page import PAGE_SIZE
from kvmlaunch.abi.policy import GuestPolicy
from kvmlaunch.errors import FormatError, KvmLaunchError
from kvmlaunch.images import ImageSource, LaunchPlan, PlanOptions
from kvmlaunch.images.igvm import format as fmt
from kvmlaunch.images.igvm.directives import walk
from kvmlaunch.images.igvm.format import DataType, HeaderType, PageFlag, PlatformType
from kvmlaunch.images.igvm.parse import IgvmFile, Item, parse
from kvmlaunch.images.igvm.plan import plan_of
from kvmlaunch.images.plan import SYNC_VMSA_GPA
from kvmlaunch.images.vmsas import check_vmsas
from kvmlaunch.kvm import Kvm
from kvmlaunch.launch.guest import Guest
from kvmlaunch.launch.igvm_orders import overtakers
from kvmlaunch.launch.measure import measure
from kvmlaunch.launch.vmsa_mode import settle_vmsa_mode
from kvmlaunch.uapi import Platform, Proposal

__all__ = ["Finding", "check"]

_QEMU_PARAMETERS = {
    HeaderType.VP_COUNT_PARAMETER,
    HeaderType.ENVIRONMENT_INFO_PARAMETER,
    HeaderType.MEMORY_MAP,
    HeaderType.MADT,
}


class Finding(NamedTuple):
    """Something that is refused, or that loaders treat differently; ``by`` whom."""

    refused: bool
    by: str
    rule: str

    def __str__(self) -> str:
        return f"{'refused by' if self.refused else 'differs in'} {self.by}: {self.rule}"


def check(
    source: ImageSource,
    options: Callable[[IgvmFile], PlanOptions],
    platform: Platform,
    *,
    proposal: Proposal | None = None,
) -> list[Finding]:
    """What would happen on this host. On a simulated one the launch is tried as well.

    Raises what opening the host raises.
    """
    try:
        file = parse(source)
        chosen = options(file)
        plan = plan_of(file, chosen)
    except FormatError as error:
        return [Finding(True, "kvmlaunch", str(error))]
    found = [*_refusals(plan), *_host(plan, platform, proposal)]
    return [*found, *_warnings(file, chosen)]


def _refusals(plan: LaunchPlan) -> Iterator[Finding]:
    """What firmware or kernel refuse whatever the host is."""
    try:
        GuestPolicy.from_int(plan.policy)
    except FormatError as error:
        yield Finding(True, "firmware", f"SNP_LAUNCH_START, POLICY_FAILURE: {error.rule}")
    try:
        check_vmsas(plan)
    except FormatError as error:
        yield Finding(True, "kernel", f"KVM_SEV_SNP_LAUNCH_UPDATE of a VMSA: {error.rule}")
    if plan.id_block is not None and plan.id_auth is not None:
        yield from _id_block(plan, plan.id_block, plan.id_auth)


def _id_block(plan: LaunchPlan, raw_block: bytes, raw_auth: bytes) -> Iterator[Finding]:
    """SNP_LAUNCH_FINISH's checks but the digest's, which depends on who makes the VMSAs."""
    block, auth = IdBlock.decode(raw_block), IdAuth.decode(raw_auth)
    if block.version != 1:
        rule = f"SNP_LAUNCH_FINISH, INVALID_PARAM: the ID block's version is {block.version}, not 1"
        yield Finding(True, "firmware", rule)
    algorithms = [auth.id_key_algo] + [auth.auth_key_algo] * plan.author_key_enabled
    if any(algorithm != ALGO_ECDSA_P384_SHA384 for algorithm in algorithms):
        rule = f"SNP_LAUNCH_FINISH, INVALID_PARAM: key algorithms {algorithms} are not all 1"
        yield Finding(True, "firmware", rule)
        return
    for wrong in check_signatures(block, auth, author=plan.author_key_enabled):
        yield Finding(True, "firmware", f"SNP_LAUNCH_FINISH, BAD_SIGNATURE: {wrong}")


def _host(plan: LaunchPlan, platform: Platform, proposal: Proposal | None) -> Iterator[Finding]:
    with Kvm.open(platform) as kvm:
        features = kvm.vmsa_features() or 0
    if missing := plan.sev_features & ~1 & ~features:
        rule = f"KVM_SEV_INIT2: SEV features {missing:#x} are not among the host's {features:#x}"
        yield Finding(True, "kernel", rule)
        return
    try:
        settled = settle_vmsa_mode(plan, platform, proposal=proposal, allow_digest_change=True)
    except FormatError as error:
        yield Finding(True, "kernel", error.rule)
        return
    for change in settled.changes:
        yield Finding(True, "kernel", f"{change} (run: --allow-digest-change)")
    digest = measure(settled.plan).digest
    if plan.id_block is not None and (wanted := IdBlock.decode(plan.id_block).ld) != digest:
        rule = (
            f"SNP_LAUNCH_FINISH, BAD_MEASUREMENT: the ID block expects {wanted.hex()}, the launch "
            f"gives {digest.hex()} (VMSA mode {settled.plan.vmsa_mode})"
        )
        yield Finding(True, "firmware", rule)
    elif platform.name == "sim":
        yield from _tried(settled.plan, platform, proposal)


def _tried(plan: LaunchPlan, platform: Platform, proposal: Proposal | None) -> Iterator[Finding]:
    try:
        with Guest(plan, platform, proposal=proposal) as guest:
            guest.launch()
    except KvmLaunchError as error:
        yield Finding(True, "the simulated host", str(error).replace("\n", " "))


def _warnings(file: IgvmFile, options: PlanOptions) -> Iterator[Finding]:
    platform = file.platform(PlatformType.SEV_SNP)
    if len(file.source.data) == file.data_start:
        yield _differ("Microsoft's parser (QEMU, OpenVMM)", "a file without data")
    if file.skipped:
        rule = "optional headers of unknown types, which the format lets a loader skip"
        yield _differ("Microsoft's parser (QEMU, OpenVMM)", rule)
    if platform.highest_vtl:
        yield _differ("OpenVMM on KVM", f"highest VTL {platform.highest_vtl}, it takes 0")
    if platform.shared_gpa_boundary:
        boundary = f"shared GPA boundary {platform.shared_gpa_boundary:#x}, it takes 0"
        yield _differ("OpenVMM on KVM", boundary)
    if not file.counts.get(HeaderType.GUEST_POLICY):
        yield _differ("OpenVMM and Microsoft's measuring tool", "no GUEST_POLICY")
    yield from _once(_of_headers(file, platform.mask))
    batched = walk(file, options, batched=True)
    for first, second in overtakers(batched):
        rule = f"header {first} (PARAMETER_INSERT) is measured before header {second}'s pages"
        yield Finding(False, "QEMU", rule)


def _once(found: Iterator[tuple[str, Finding]]) -> Iterator[Finding]:
    """The first finding of each kind."""
    seen = set()
    for kind, finding in found:
        if kind not in seen:
            seen.add(kind)
            yield finding


def _differ(by: str, rule: str) -> Finding:
    return Finding(False, by, f"doesn't take {rule}")


def _of_headers(file: IgvmFile, mask: int) -> Iterator[tuple[str, Finding]]:
    for item in file.runs_for(mask):
        rule = _HEADER_RULES.get(item.kind)
        if item.kind in fmt.PARAMETERS:
            rule = _parameter
        if rule is not None:
            yield from rule(file, item)


def _page(file: IgvmFile, item: Item) -> Iterator[tuple[str, Finding]]:
    page: fmt.PageData = item.value
    if page.flags & PageFlag.IS_2MB:
        yield "2mb", Finding(False, "Microsoft's parser", f"{item}: takes 4 KiB of a 2 MiB page")
    if page.flags & PageFlag.SHARED:
        rule = f"{item}: measures a shared page as NORMAL"
        yield "shared", Finding(False, "igvmmeasure", rule)
        if page.flags & PageFlag.UNMEASURED:
            rule = f"{item}: both unmeasured and shared; OpenVMM and kvmlaunch take unmeasured"
            yield "both", Finding(False, "the format", rule)
    elif page.data_type == DataType.NORMAL and not page.file_offset and not page.flags:
        rule = f"{item}: launches a page without data as ZERO, others as NORMAL (--native-zero)"
        yield "zero", Finding(False, "Cloud Hypervisor", rule)
    if page.data_type == DataType.CPUID_XF:
        yield "cpuid-xf", _differ("OpenVMM on KVM", f"{item}: CPUID_XF")


def _area(file: IgvmFile, item: Item) -> Iterator[tuple[str, Finding]]:
    if item.value.file_offset:
        rule = f"{item}: leaves out the area's bytes in the file"
        yield "area-data", Finding(False, "QEMU", rule)
    if item.value.number_of_bytes > PAGE_SIZE:
        rule = f"{item}: measures only the first page of the area"
        yield "area-size", Finding(False, "igvmmeasure", rule)


def _parameter(file: IgvmFile, item: Item) -> Iterator[tuple[str, Finding]]:
    if item.kind not in _QEMU_PARAMETERS:
        yield f"qemu-{item.kind}", _differ("QEMU", f"{item}")
    if item.kind == HeaderType.MEMORY_MAP:
        if item.value.byte_offset:
            rule = f"{item}: writes it to the area's start instead of {item.value.byte_offset:#x}"
            yield "map-offset", Finding(False, "QEMU", rule)
        rule = f"{item}: it has all RAM, also pages that are launched and so validated already"
        yield "map", Finding(False, "a guest's memory map", rule)


def _context(file: IgvmFile, item: Item) -> Iterator[tuple[str, Finding]]:
    if item.value.gpa != SYNC_VMSA_GPA:
        rule = f"{item}: a VMSA at GPA {item.value.gpa:#x}, it wants {SYNC_VMSA_GPA:#x}"
        yield "gpa", _differ("QEMU", rule)
    if item.value.vp_index:
        yield "several", _differ("OpenVMM (older ones)", f"{item}: vCPU {item.value.vp_index}")
    page = file.source.data[item.value.file_offset :][:PAGE_SIZE]
    features = int.from_bytes(page[0x3B0:0x3B8], "little")
    if features != 1:
        rule = f"{item}: SEV features {features:#x}, it wants 0x1"
        yield "features", _differ("QEMU", rule)


def _error_range(file: IgvmFile, item: Item) -> Iterator[tuple[str, Finding]]:
    yield "error-range", _differ("QEMU", f"{item}")


_HEADER_RULES: dict[int, Callable[[IgvmFile, Item], Iterator[tuple[str, Finding]]]] = {
    HeaderType.PAGE_DATA: _page,
    HeaderType.PARAMETER_AREA: _area,
    HeaderType.VP_CONTEXT: _context,
    HeaderType.ERROR_RANGE: _error_range,
}
