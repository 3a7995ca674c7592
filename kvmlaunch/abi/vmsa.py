"""VMSA page: the register state of one vCPU as firmware measures it (4096 bytes).

The fields of `Vmsa` are the table: each line gives name, offset and size, in the order of
the page, and drives encode, decode, diff and lookup. What lies between them is reserved;
non-zero reserved bytes are kept in `Vmsa.reserved`, so that decode and encode lose nothing.

Sources: AMD APM volume 2, table B-4; Linux `struct sev_es_save_area` for the names and
`struct vmcb_save_area` for spec_ctrl, which is a reserved place in the VMSA but gets KVM's
copy of the VMCB.
"""

from __future__ import annotations

from kvmlaunch.errors import FormatError

from ._check import exact_size, sized_bytes, uint
from ._layout import Runs, canonical_runs, find_gaps, find_runs
from .page import PAGE_SIZE, Buffer
from .record import Record, read_only
from .segment import SEGMENT_FIELDS, SEGMENT_SIZE, Segment, VmsaField

TYPE_CHECKING = False  # typing's takes long to import, see kvmlaunch/__init__.py
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = [
    "SEGMENT_FIELDS",
    "SEV_FEATURES",
    "VMSA_FIELDS",
    "FieldDiff",
    "Segment",
    "Vmsa",
    "VmsaField",
    "describe_sev_features",
    "diff",
    "field_at",
]

SEV_FEATURES: Mapping[str, int] = read_only(
    {
        "snp_active": 0,
        "vtom": 1,
        "reflect_vc": 2,
        "restricted_injection": 3,
        "alternate_injection": 4,
        "debug_swap": 5,
        "prevent_host_ibs": 6,
        "btb_isolation": 7,
        "vmpl_sss": 8,
        "secure_tsc": 9,
        "vmgexit_parameter": 10,
        "pmc_virtualization": 11,
        "ibs_virtualization": 12,
        "guest_intercept_control": 13,
        "vmsa_reg_prot": 14,
        "smt_protection": 15,
        "secure_avic": 16,
        "ibpb_on_entry": 21,
    }
)
"""Bit numbers of SEV_FEATURES (VMSA offset 0x3B0), by name."""


def describe_sev_features(value: int) -> list[str]:
    """Name the set bits of a SEV_FEATURES word, one line per bit."""
    names = {bit: name for name, bit in SEV_FEATURES.items()}
    uint("sev_features", value, 64)
    return [f"bit {b} {names.get(b, 'reserved')}" for b in range(64) if value >> b & 1]


_NO_SEGMENT = Segment()


# A line of the table below: offset, size, default.
def _seg(offset: int) -> Any:
    return offset, SEGMENT_SIZE, _NO_SEGMENT


def _int(offset: int, size: int) -> Any:
    return offset, size, 0


def _raw(offset: int, size: int) -> Any:
    return offset, size, bytes(size)


class Vmsa(Record):
    """One VMSA page. Fields are unsigned integers unless typed otherwise; default 0.

    Raises:
        FormatError: a value doesn't fit its field, which is named.
        TypeError: there is no such field.
    """

    es: Segment = _seg(0x000)
    cs: Segment = _seg(0x010)
    ss: Segment = _seg(0x020)
    ds: Segment = _seg(0x030)
    fs: Segment = _seg(0x040)
    gs: Segment = _seg(0x050)
    gdtr: Segment = _seg(0x060)
    ldtr: Segment = _seg(0x070)
    idtr: Segment = _seg(0x080)
    tr: Segment = _seg(0x090)
    pl0_ssp: int = _int(0x0A0, 8)
    pl1_ssp: int = _int(0x0A8, 8)
    pl2_ssp: int = _int(0x0B0, 8)
    pl3_ssp: int = _int(0x0B8, 8)
    u_cet: int = _int(0x0C0, 8)
    vmpl: int = _int(0x0CA, 1)
    cpl: int = _int(0x0CB, 1)
    efer: int = _int(0x0D0, 8)
    xss: int = _int(0x140, 8)
    cr4: int = _int(0x148, 8)
    cr3: int = _int(0x150, 8)
    cr0: int = _int(0x158, 8)
    dr7: int = _int(0x160, 8)
    dr6: int = _int(0x168, 8)
    rflags: int = _int(0x170, 8)
    rip: int = _int(0x178, 8)
    dr0: int = _int(0x180, 8)
    dr1: int = _int(0x188, 8)
    dr2: int = _int(0x190, 8)
    dr3: int = _int(0x198, 8)
    dr0_addr_mask: int = _int(0x1A0, 8)
    dr1_addr_mask: int = _int(0x1A8, 8)
    dr2_addr_mask: int = _int(0x1B0, 8)
    dr3_addr_mask: int = _int(0x1B8, 8)
    rsp: int = _int(0x1D8, 8)
    s_cet: int = _int(0x1E0, 8)
    ssp: int = _int(0x1E8, 8)
    isst_addr: int = _int(0x1F0, 8)
    rax: int = _int(0x1F8, 8)
    star: int = _int(0x200, 8)
    lstar: int = _int(0x208, 8)
    cstar: int = _int(0x210, 8)
    sfmask: int = _int(0x218, 8)
    kernel_gs_base: int = _int(0x220, 8)
    sysenter_cs: int = _int(0x228, 8)
    sysenter_esp: int = _int(0x230, 8)
    sysenter_eip: int = _int(0x238, 8)
    cr2: int = _int(0x240, 8)
    g_pat: int = _int(0x268, 8)
    dbgctl: int = _int(0x270, 8)
    br_from: int = _int(0x278, 8)
    br_to: int = _int(0x280, 8)
    last_excp_from: int = _int(0x288, 8)
    last_excp_to: int = _int(0x290, 8)
    spec_ctrl: int = _int(0x2E0, 8)
    pkru: int = _int(0x2E8, 4)
    tsc_aux: int = _int(0x2EC, 4)
    guest_tsc_scale: int = _int(0x2F0, 8)
    guest_tsc_offset: int = _int(0x2F8, 8)
    reg_prot_nonce: int = _int(0x300, 8)
    rcx: int = _int(0x308, 8)
    rdx: int = _int(0x310, 8)
    rbx: int = _int(0x318, 8)
    rbp: int = _int(0x328, 8)
    rsi: int = _int(0x330, 8)
    rdi: int = _int(0x338, 8)
    r8: int = _int(0x340, 8)
    r9: int = _int(0x348, 8)
    r10: int = _int(0x350, 8)
    r11: int = _int(0x358, 8)
    r12: int = _int(0x360, 8)
    r13: int = _int(0x368, 8)
    r14: int = _int(0x370, 8)
    r15: int = _int(0x378, 8)
    guest_exit_info_1: int = _int(0x390, 8)
    guest_exit_info_2: int = _int(0x398, 8)
    guest_exit_int_info: int = _int(0x3A0, 8)
    guest_nrip: int = _int(0x3A8, 8)
    sev_features: int = _int(0x3B0, 8)
    vintr_ctrl: int = _int(0x3B8, 8)
    guest_exit_code: int = _int(0x3C0, 8)
    virtual_tom: int = _int(0x3C8, 8)
    tlb_id: int = _int(0x3D0, 8)
    pcpu_id: int = _int(0x3D8, 8)
    event_inj: int = _int(0x3E0, 8)
    xcr0: int = _int(0x3E8, 8)
    x87_dp: int = _int(0x400, 8)
    mxcsr: int = _int(0x408, 4)
    x87_ftw: int = _int(0x40C, 2)
    x87_fsw: int = _int(0x40E, 2)
    x87_fcw: int = _int(0x410, 2)
    x87_fop: int = _int(0x412, 2)
    x87_ds: int = _int(0x414, 2)
    x87_cs: int = _int(0x416, 2)
    x87_rip: int = _int(0x418, 8)
    fpreg_x87: bytes = _raw(0x420, 80)
    """ST0..ST7: 8 x the low 8 bytes, then 8 x the high 2 bytes."""
    fpreg_xmm: bytes = _raw(0x470, 256)
    """XMM0..XMM15."""
    fpreg_ymm: bytes = _raw(0x570, 256)
    """High halves of YMM0..YMM15."""
    reserved: Runs = ()
    """(offset, bytes) of what is not zero outside the fields; at most one run per gap."""

    def __init__(self, *, reserved: Runs = (), **fields: Any) -> None:
        """Take fields by their names; refuse a value that does not fit its field."""
        values = vars(self)
        values.update(_DEFAULTS)
        for name, value in fields.items():
            if name not in _DEFAULTS:
                raise TypeError(f"Vmsa has no field {name!r}")
            kind, size = type(_DEFAULTS[name]), _SIZES[name]
            if kind is bytes:
                value = sized_bytes(name, value, size)
            elif kind is int:
                uint(name, value, size * 8)
            elif not isinstance(value, Segment):
                raise FormatError(f"{name} takes a segment, not {value!r}")
            values[name] = value
        values["reserved"] = canonical_runs(reserved, _GAPS) if reserved else ()

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other) if isinstance(other, Vmsa) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))

    def encode(self) -> bytes:
        """Return the page, 4096 bytes."""
        page = bytearray(PAGE_SIZE)
        for f in VMSA_FIELDS:
            page[f.offset : f.offset + f.size] = _to_bytes(getattr(self, f.name), f.size)
        for offset, data in self.reserved:
            page[offset : offset + len(data)] = data
        return bytes(page)

    @classmethod
    def decode(cls, buf: Buffer) -> Vmsa:
        """Read a page; any 4096 bytes are a VMSA.

        Raises:
            FormatError: not 4096 bytes.
        """
        page = exact_size("a VMSA", buf, PAGE_SIZE)
        fields: dict[str, Any] = {}
        for f in VMSA_FIELDS:
            raw = page[f.offset : f.offset + f.size]
            kind = type(_DEFAULTS[f.name])
            if kind is Segment:
                fields[f.name] = Segment.decode(raw)
            else:
                fields[f.name] = raw if kind is bytes else int.from_bytes(raw, "little")
        return cls(**fields, reserved=tuple(find_runs(page, _GAPS)))

    def replace(self, **changes: Any) -> Vmsa:
        """Return a copy with the named fields changed.

        Raises:
            FormatError: no such field, or a value that doesn't fit.
        """
        for name in changes:
            if name not in _DEFAULTS and name != "reserved":
                raise _unknown(name)
        return super().replace(**changes)

    def get(self, name: str) -> int | bytes | Segment:
        """Return the value of a field by its name, also dotted (`cs.attrib`)."""
        head, sub = _split(name)
        value: int | bytes | Segment = getattr(self, head)
        return getattr(value, sub) if sub else value

    def with_field(self, name: str, value: int | bytes | Segment) -> Vmsa:
        """Return a copy with one field changed, by its name, also dotted (`cs.attrib`).

        Raises:
            FormatError: no such field, or a value of the wrong kind or size.
        """
        return self.with_fields({name: value})

    def with_fields(self, changes: Mapping[str, int | bytes | Segment]) -> Vmsa:
        """Return a copy with several fields changed, by their names as in `with_field`.

        Raises:
            FormatError: no such field, or a value of the wrong kind or size.
        """
        changed: dict[str, Any] = {}
        for name, value in changes.items():
            head, sub = _split(name)
            want = int if sub else type(_DEFAULTS[head])
            if not isinstance(value, want):
                kind = {int: "a number", bytes: "bytes", Segment: "a segment"}[want]
                raise FormatError(f"{name} takes {kind}, not {value!r}")
            if sub:
                segment = changed.get(head, getattr(self, head))
                try:
                    value = segment.replace(**{sub: value})
                except FormatError as error:
                    raise FormatError(f"{head}.{error.rule}") from None
            changed[head] = value
        return self.replace(**changed)

    def __repr__(self) -> str:
        """Return an expression with the fields that are not 0."""
        shown = [
            f"{f.name}={hex(v) if isinstance(v, int) else repr(v)}"
            for f in VMSA_FIELDS
            if (v := getattr(self, f.name)) != _DEFAULTS[f.name]
        ]
        if self.reserved:
            shown.append(f"reserved={self.reserved!r}")
        return f"Vmsa({', '.join(shown)})"


_TABLE = {name: vars(Vmsa)[name] for name in Vmsa.__annotations__ if name != "reserved"}

VMSA_FIELDS = tuple(VmsaField(name, at, size) for name, (at, size, _) in _TABLE.items())
"""Every named field, in the order of the page."""

_DEFAULTS: dict[str, int | bytes | Segment] = {name: line[2] for name, line in _TABLE.items()}
Vmsa.set_defaults(_DEFAULTS)
_SIZES = {f.name: f.size for f in VMSA_FIELDS}

_GAPS = find_gaps(((f.offset, f.size) for f in VMSA_FIELDS), PAGE_SIZE)


class FieldDiff(Record):
    """One field in which two VMSAs differ; `offset` in the page, `a` and `b` the values."""

    name: str
    offset: int
    a: int | bytes
    b: int | bytes

    def __str__(self) -> str:
        """Explain the difference on one line."""
        a, b = (hex(v) if isinstance(v, int) else v.hex() for v in (self.a, self.b))
        return f"{self.name} (offset {self.offset:#x}): {a} != {b}"


def diff(a: Vmsa, b: Vmsa) -> list[FieldDiff]:
    """Return the fields that differ, in the order of the page.

    Segments are compared by part (`cs.attrib`). Each reserved gap gives at most one entry,
    named after the gap's offset (`reserved_0x670`), from its first to its last difference.
    """
    found: list[FieldDiff] = []
    for field in VMSA_FIELDS:
        old, new = getattr(a, field.name), getattr(b, field.name)
        if old == new:
            continue
        if isinstance(old, Segment):
            for part in SEGMENT_FIELDS:
                if (x := getattr(old, part.name)) != (y := getattr(new, part.name)):
                    name, at = f"{field.name}.{part.name}", field.offset + part.offset
                    found.append(FieldDiff(name, at, x, y))
        else:
            found.append(FieldDiff(field.name, field.offset, old, new))
    if a.reserved != b.reserved:
        page_a, page_b = a.encode(), b.encode()
        for start, end in _GAPS:
            where = [i for i in range(start, end) if page_a[i] != page_b[i]]
            if where:
                run = slice(where[0], where[-1] + 1)
                name = f"reserved_{start:#x}"
                found.append(FieldDiff(name, run.start, page_a[run], page_b[run]))
    return sorted(found, key=lambda d: d.offset)


def field_at(offset: int) -> str:
    """Return the name of the field that holds the byte at `offset` in the page.

    Raises:
        FormatError: the offset is outside the page.
    """
    if not 0 <= offset < PAGE_SIZE:
        raise FormatError(f"offset {offset:#x} is outside the VMSA page")
    for field in VMSA_FIELDS:
        start = field.offset
        if start <= offset < start + field.size:
            if not isinstance(_DEFAULTS[field.name], Segment):
                return field.name
            parts = (p.name for p in SEGMENT_FIELDS if p.offset <= offset - start)
            return f"{field.name}.{list(parts)[-1]}"
    return next(f"reserved_{start:#x}" for start, end in _GAPS if start <= offset < end)


def _to_bytes(value: int | bytes | Segment, size: int) -> bytes:
    if isinstance(value, Segment):
        return value.encode()
    return value.to_bytes(size, "little") if isinstance(value, int) else value


def _split(name: str) -> tuple[str, str]:
    head, _, sub = name.partition(".")
    is_segment = isinstance(_DEFAULTS.get(head), Segment)
    parts = {f.name for f in SEGMENT_FIELDS} if is_segment else set()
    if head not in _DEFAULTS or ("." in name and sub not in parts):
        raise _unknown(name)
    return head, sub


def _unknown(name: str) -> FormatError:
    dotted = [
        f"{f}.{p.name}"
        for f, v in _DEFAULTS.items()
        if isinstance(v, Segment)
        for p in SEGMENT_FIELDS
    ]
    import difflib  # only here

    close = difflib.get_close_matches(name, [*_DEFAULTS, *dotted])
    hint = f"; close are {', '.join(close)}" if close else ""
    return FormatError(f"a VMSA has no field {name!r}{hint}")
