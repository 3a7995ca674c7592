"""sev-snp-measure's SVSM and its firmware, or files that stand in for them.

Digests that tools print for them, and that guests have reported, are published; the files are
5 MB. A stand-in has the same number of pages and the same last one, which says how the file is
launched; its other pages are numbers, whose CONTENTS are those of the true pages
(fixtures/README.md).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from kvmlaunch.abi.digest import LaunchDigest
from kvmlaunch.images import LaunchPlan
from kvmlaunch.images.sync_vmsas import finish_vmsas

FIXTURES = Path(__file__).parent / "fixtures"
SVSM, FIRMWARE = "svsm.bin", "svsm_ovmf.fd"

_PAGES = {SVSM: (278, "svsm_suffix.bin"), FIRMWARE: (892, "svsm_ovmf_suffix.bin")}
_PAGE, _DIGEST = 4096, 48


class SvsmFiles:
    """A folder with both files; ``known`` says what counts for a page instead of its SHA-384."""

    def __init__(self, folder: Path, known: dict[bytes, bytes]) -> None:
        self.folder = folder
        self._known = known

    def digest(self, plan: LaunchPlan) -> str:
        """The launch digest, page by page."""
        chain = LaunchDigest()
        for step, index in plan.pages():
            contents = bytes(_DIGEST)
            if step.type.measures_contents:
                page = bytes(step.page(index))
                contents = self._known.get(page) or hashlib.sha384(page).digest()
            chain.update_contents(step.type, step.gpa + index * _PAGE, contents)
        for _, vmsa in finish_vmsas(plan):
            chain.update(2, plan.vmsa_gpa, vmsa.encode())
        return chain.hex()


def stand_ins(folder: Path) -> SvsmFiles:
    """Both files in ``folder``."""
    contents = (FIXTURES / "svsm_contents.bin").read_bytes()
    known = {}
    for name, (npages, suffix) in _PAGES.items():
        pages = [f"{name} {number}".encode().ljust(_PAGE, b"\0") for number in range(npages - 1)]
        for page in pages:
            known[page], contents = contents[:_DIGEST], contents[_DIGEST:]
        last = (FIXTURES / suffix).read_bytes()
        (folder / name).write_bytes(b"".join((*pages, last)))
    assert not contents
    return SvsmFiles(folder, known)
