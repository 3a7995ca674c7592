"""PEP 517 backend: writes the cffi extensions' C sources, then hands over to setuptools.

The declarations that cffi needs are the very headers that the compiler reads:
structs and prototypes go over as they stand, and every define becomes
``#define NAME ...`` so that the compiler fills in its number.
"""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no source)

_HERE = Path(__file__).resolve().parent
_OUTPUT = _HERE / "_generated_ext.c"
_HASHING_OUTPUT = _HERE / "_generated_hashing.c"
_HEADERS = (
    ("uapi_kvm.h", False),
    ("uapi_sev.h", True),
    ("uapi_newer.h", False),
    ("uapi_proposal.h", False),
    ("native.h", False),
    ("supervise.h", False),
)
_DEFINE = re.compile(r"^#define (\w+) .*$", re.MULTILINE)


def declarations(header: Path) -> str:
    """The cdef text of one header."""
    return _DEFINE.sub(r"#define \1 ...", header.read_text(encoding="utf-8"))


def make_ffi() -> FFI:
    """The FFI of the extension ``kvmlaunch.uapi._ext``."""
    ffi = FFI()
    for name, packed in _HEADERS:
        ffi.cdef(declarations(_HERE / name), packed=packed)
    ffi.set_source("kvmlaunch.uapi._ext", '#include "kvmlaunch.h"\n')
    return ffi


def make_hashing_ffi() -> FFI:
    """The FFI of the extension ``kvmlaunch.hashing._ext``."""
    ffi = FFI()
    for name in ("hashing.h", "pagelog.h"):
        ffi.cdef(declarations(_HERE / name))
    ffi.set_source(
        "kvmlaunch.hashing._ext",
        '#include <stddef.h>\n#include <stdint.h>\n#include "hashing.h"\n#include "pagelog.h"\n',
    )
    return ffi


def _generate() -> None:
    make_ffi().emit_c_code(str(_OUTPUT))
    make_hashing_ffi().emit_c_code(str(_HASHING_OUTPUT))


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):  # type: ignore[no-untyped-def]
    _generate()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):  # type: ignore[no-untyped-def]
    _generate()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):  # type: ignore[no-untyped-def]
    # An sdist carries the sources; who builds from it generates anew.
    for output in (_OUTPUT, _HASHING_OUTPUT):
        output.unlink(missing_ok=True)
    return build_meta.build_sdist(sdist_directory, config_settings)
