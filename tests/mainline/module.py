"""Build kvm-amd.ko from the distribution's kernel source over the fakes in ``kernel/``.

Only kvm-amd is rebuilt: kvm.ko, ccp.ko and the kernel stay stock. The kernel's own files
come out of the source package into the work directory, get the few edits of `EDITS` there,
and are compiled against the headers package, which is only read.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.mainline.errors import StepFailed

FAKES = Path(__file__).parent / "kernel"
_KVM = "arch/x86/kvm/"
_MAKE_SECONDS = 300

# As arch/x86/kvm/Makefile, for kvm-amd alone; vmenter.S needs the generated offsets.
_MAKEFILE = """\
obj-m := kvm-amd.o
kvm-amd-y := svm/svm.o svm/vmenter.o svm/pmu.o svm/nested.o svm/avic.o svm/sev.o
kvm-amd-y += svm/hyperv.o svm/svm_onhyperv.o

ccflags-y += -I$(src) -I$(src)/svm
AFLAGS_svm/vmenter.o := -iquote $(obj)

$(obj)/svm/vmenter.o: $(obj)/kvm-asm-offsets.h
$(obj)/kvm-asm-offsets.h: $(obj)/kvm-asm-offsets.s FORCE
\t$(call filechk,offsets,__KVM_ASM_OFFSETS_H__)
targets += kvm-asm-offsets.s
"""


@dataclass(frozen=True)
class Edit:
    """One change of a kernel file: text that must be there exactly once, and its successor."""

    file: str
    old: str
    new: str


EDITS = (
    # Behind the last include: what follows calls the fakes.
    Edit("svm/sev.c", '#include "trace.h"\n', '#include "trace.h"\n#include "fake_cpu.h"\n'),
    # The fake CPU wants to be at the end, but is put before the last function.
    Edit(
        "svm/sev.c",
        "\nint sev_private_max_mapping_level(",
        '\n#include "fake_vcpu.h"\n\nint sev_private_max_mapping_level(',
    ),
    # Where an SEV-ES guest would be entered.
    Edit("svm/svm.c", '#include "svm_ops.h"\n', '#include "svm_ops.h"\n#include "fake_run.h"\n'),
    # The emulated CPU has no LBR virtualization; with it KVM keeps the guest's DEBUGCTL.
    Edit("svm/svm.c", "if (!boot_cpu_has(X86_FEATURE_LBRV))", "if (false)"),
)


def build(source_tar: Path, headers: Path, work: Path) -> Path:
    """Build the module in ``work`` and return it; everything said is in ``work/build.log``.

    ``source_tar`` is linux-source's tarball, ``headers`` the unpacked
    ``usr/src/linux-headers-VERSION-amd64`` with its ``-common`` and ``linux-kbuild`` packages
    unpacked into the same root. Raises StepFailed.
    """
    log = work / "build.log"
    tree = work / "kvm"
    try:
        work.mkdir(parents=True, exist_ok=True)
        log.write_text("")
        shutil.rmtree(tree, ignore_errors=True)
        _extract(source_tar, tree, log)
        apply_edits(tree, EDITS, log)
        for fake in sorted(FAKES.glob("*.h")):
            shutil.copy(fake, tree / "svm")
        (tree / "Makefile").write_text(_MAKEFILE)
        return _make(headers, tree, log)
    except OSError as error:
        raise StepFailed("building kvm-amd.ko", log, str(error)) from error


def apply_edits(tree: Path, edits: Iterable[Edit], log: Path) -> None:
    """Change the files in ``tree``. Raises StepFailed naming an edit that doesn't fit."""
    for edit in edits:
        path = tree / edit.file
        text = path.read_text() if path.is_file() else ""
        found = text.count(edit.old)
        if found != 1:
            why = f"the edit at {edit.old.strip()!r} in {edit.file} no longer fits this kernel"
            why += f": found {found} times, not once"
            _note(log, why)
            raise StepFailed("patching the kernel's files", log, why)
        path.write_text(text.replace(edit.old, edit.new))


def _extract(source_tar: Path, tree: Path, log: Path) -> None:
    """Take arch/x86/kvm out of the tarball, and stop reading behind it."""
    inside = False
    try:
        with tarfile.open(source_tar, "r|xz") as tar:
            for member in tar:
                _, found, name = member.name.partition(_KVM)
                if inside and not found:
                    break
                inside = inside or bool(found)
                if found and member.isfile():
                    _copy_out(tar, member, tree / name)
    except (tarfile.TarError, EOFError) as error:
        raise StepFailed("unpacking the kernel's source", log, f"{source_tar}: {error}") from error
    if not inside:
        raise StepFailed("unpacking the kernel's source", log, f"{source_tar} has no {_KVM}")


def _copy_out(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    source = tar.extractfile(member)
    assert source is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        shutil.copyfileobj(source, out)


def _make(headers: Path, tree: Path, log: Path) -> Path:
    step = "compiling kvm-amd.ko"
    common = headers.with_name(headers.name.removesuffix("-amd64") + "-common")
    if not (common / "Makefile").is_file():
        raise StepFailed(step, log, f"{common} isn't unpacked beside {headers.name}")
    # The headers' own Makefile includes the common one by its installed path.
    command = ["make", "-C", str(headers), "-f", str(common / "Makefile"), f"M={tree}"]
    command += [f"CC={_compiler()}", "CONFIG_DEBUG_INFO_BTF_MODULES=", f"-j{_jobs()}", "modules"]
    _note(log, " ".join(command))
    with log.open("a") as out:
        try:
            code = subprocess.run(
                command, stdout=out, stderr=subprocess.STDOUT, timeout=_MAKE_SECONDS, check=False
            ).returncode
        except FileNotFoundError:
            raise StepFailed(step, log, "make isn't installed") from None
        except subprocess.TimeoutExpired:
            raise StepFailed(step, log, f"not done after {_MAKE_SECONDS} s") from None
    module = tree / "kvm-amd.ko"
    if code or not module.is_file():
        raise StepFailed(step, log, _first_error(log) or f"make ended with {code}")
    return module


def _compiler() -> str:
    """The compiler that the kernel was built with, else whatever gcc there is."""
    return "gcc-12" if shutil.which("gcc-12") else "gcc"


def _jobs() -> int:
    return len(os.sched_getaffinity(0))


def _first_error(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return next((line.strip() for line in lines if "error:" in line or "Error" in line), "")


def _note(log: Path, line: str) -> None:
    with log.open("a") as out:
        out.write(line + "\n")
