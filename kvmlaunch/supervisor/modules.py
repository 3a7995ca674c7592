"""Parameters of the kernel modules kvm and kvm_amd, as a host that launches SNP guests has them.

Programs look there for what no ioctl tells; what isn't simulated is off.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["PARAMETERS", "parameter"]

_FOLDER = "/sys/module/"
_INTEL = "kvm_intel"

PARAMETERS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "kvm": {
            "eager_page_split": "N",
            "enable_pmu": "N",
            "force_emulation_prefix": "0",
            "ignore_msrs": "N",
            "nx_huge_pages": "N",
            "tdp_mmu": "Y",
        },
        "kvm_amd": {
            **{"sev": "Y", "sev_es": "Y", "sev_snp": "Y", "npt": "Y", "nrips": "Y"},
            **{"avic": "N", "nested": "0", "vgif": "0", "vls": "0"},
        },
        _INTEL: {},
    }
)
"""Module -> parameter -> content of its file, without the end of the line."""


def parameter(path: str) -> str | None:
    """Content of a parameter's file: empty where the host has none of that name.

    None where ``path`` is no parameter of these modules.
    """
    module, _, name = path.removeprefix(_FOLDER).partition("/parameters/")
    if not path.startswith(_FOLDER) or module not in PARAMETERS or not name:
        return None
    content = PARAMETERS[module].get(name)
    return "" if content is None else f"{content}\n"
