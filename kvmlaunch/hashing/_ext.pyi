# The compiled extension: csrc/hashing.h by cffi.
from typing import Any

ffi: Any
lib: Any
