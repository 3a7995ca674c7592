# What type checkers see of a record: to them it is a frozen dataclass.
from collections.abc import Mapping
from dataclasses import Field
from types import MappingProxyType
from typing import Any, ClassVar

from typing_extensions import Self, dataclass_transform

read_only = MappingProxyType

@dataclass_transform(frozen_default=True)
class Record:
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __init_subclass__(
        cls,
        *,
        kw_only: bool = ...,
        unshown: tuple[str, ...] = ...,
        unhashed: tuple[str, ...] = ...,
    ) -> None: ...
    @classmethod
    def set_defaults(cls, defaults: Mapping[str, Any]) -> None: ...
    def replace(self, **changes: Any) -> Self: ...
