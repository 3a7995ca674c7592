# What type checkers see of an enumeration: to them it is one of the standard library.
from enum import Enum
from enum import IntEnum as IntEnum

class StrEnum(str, Enum):  # type: ignore[misc]  # enum has its own since Python 3.11
    _value_: str
    @property
    def value(self) -> str: ...
