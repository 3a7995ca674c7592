# The compiled extension: csrc/hashing.h and pagelog.h by cffi.
from typing import Any

ffi: Any
lib: Any
