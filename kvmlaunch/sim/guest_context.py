"""Guest context: what the secure processor keeps of one guest (AMD 56860, GCTX)."""

from __future__ import annotations

import dataclasses
import enum
from typing import NamedTuple, NoReturn

from .measurement import Measurement

__all__ = ["GuestContext", "GuestState", "MeasuredPage"]

_NO_KEY = bytes(32)


class GuestState(enum.IntEnum):
    """GSTATE."""

    INIT = 0
    LAUNCH = 1
    RUNNING = 2


class MeasuredPage(NamedTuple):
    """One page that entered the launch digest; `digest` is the digest after it."""

    page_type: int
    gpa: int
    contents: bytes
    digest: bytes


@dataclasses.dataclass(eq=False)
class GuestContext:
    """One guest. `repr` shows no keys and no report id, and it can't be pickled or copied.

    `asid` is 0 until ACTIVATE. `id_key_digest` and the fields beside it are zero without an
    ID block. `msg_count` is the number of the last message under each VMPCK.
    """

    state: GuestState = GuestState.INIT
    policy: int = 0
    asid: int = 0
    imi_en: bool = False
    gosvw: bytes = dataclasses.field(default=bytes(16), repr=False)
    desired_tsc_khz: int = 0
    ma_gctx: int = 0
    launch_tcb: int = 0
    launch_mit_vector: int = 0

    measurement: Measurement = dataclasses.field(default_factory=Measurement)
    imi_measurement: Measurement = dataclasses.field(default_factory=Measurement, repr=False)
    pages: list[MeasuredPage] = dataclasses.field(default_factory=list, repr=False)

    vmpck: tuple[bytes, bytes, bytes, bytes] = dataclasses.field(
        default=(_NO_KEY, _NO_KEY, _NO_KEY, _NO_KEY), repr=False
    )
    vmrk: bytes = dataclasses.field(default=_NO_KEY, repr=False)
    msg_count: list[int] = dataclasses.field(default_factory=lambda: [0] * 4, repr=False)
    report_id: bytes = dataclasses.field(default=bytes(32), repr=False)
    report_id_ma: bytes = dataclasses.field(default=b"\xff" * 32, repr=False)

    id_block_en: bool = False
    author_key_en: bool = False
    vcek_dis: bool = False
    guest_svn: int = 0
    family_id: bytes = dataclasses.field(default=bytes(16), repr=False)
    image_id: bytes = dataclasses.field(default=bytes(16), repr=False)
    id_key_digest: bytes = dataclasses.field(default=bytes(48), repr=False)
    author_key_digest: bytes = dataclasses.field(default=bytes(48), repr=False)
    host_data: bytes = dataclasses.field(default=bytes(32), repr=False)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a guest context can't be pickled or copied")
