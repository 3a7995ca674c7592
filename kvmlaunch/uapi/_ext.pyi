# The compiled extension. Its names are the kernel's (csrc/uapi_*.h) and csrc/native.h's;
# a test holds them against the headers, so they are not repeated here.
from typing import Any

ffi: Any
lib: Any
