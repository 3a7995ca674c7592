"""The edits of kernel files, on files of our own; the build itself needs the packages."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from tests.mainline import module
from tests.mainline.errors import StepFailed
from tests.mainline.module import EDITS, FAKES, Edit, apply_edits, build


def _tree(tmp_path: Path, text: str) -> Path:
    (tmp_path / "svm").mkdir()
    (tmp_path / "svm/sev.c").write_text(text)
    return tmp_path


def test_apply_edits_changes_the_file_when_the_text_is_there_once(tmp_path: Path) -> None:
    tree = _tree(tmp_path, "one\ntwo\nthree\n")
    apply_edits(tree, [Edit("svm/sev.c", "two\n", "two\ntwo and a half\n")], tmp_path / "log")
    assert (tree / "svm/sev.c").read_text() == "one\ntwo\ntwo and a half\nthree\n"


def test_apply_edits_works_in_order_when_two_edits_touch_one_file(tmp_path: Path) -> None:
    tree = _tree(tmp_path, "a b")
    edits = [Edit("svm/sev.c", "a", "b2"), Edit("svm/sev.c", "b2 b", "c")]
    apply_edits(tree, edits, tmp_path / "log")
    assert (tree / "svm/sev.c").read_text() == "c"


@pytest.mark.parametrize(("text", "times"), [("nothing here", 0), ("two two", 2)])
def test_apply_edits_names_edit_and_file_when_it_fits_not_exactly_once(
    tmp_path: Path, text: str, times: int
) -> None:
    tree, log = _tree(tmp_path, text), tmp_path / "log"
    with pytest.raises(StepFailed) as caught:
        apply_edits(tree, [Edit("svm/sev.c", "two", "2")], log)
    message = str(caught.value)
    assert "'two' in svm/sev.c no longer fits this kernel" in message
    assert f"found {times} times" in message
    assert str(log) in message
    assert "\n" not in message
    assert (tree / "svm/sev.c").read_text() == text
    assert "no longer fits" in log.read_text()


def test_apply_edits_fails_clearly_when_the_file_is_gone(tmp_path: Path) -> None:
    tree = _tree(tmp_path, "")
    with pytest.raises(StepFailed, match=r"in svm/gone\.c no longer fits"):
        apply_edits(tree, [Edit("svm/gone.c", "x", "y")], tmp_path / "log")


def test_edits_include_only_headers_that_exist_when_looked_up() -> None:
    included = {line for edit in EDITS for line in edit.new.splitlines() if '"fake_' in line}
    assert included
    for line in included:
        assert (FAKES / line.split('"')[1]).is_file()


def test_headers_carry_the_kernel_licence_and_stay_short_when_read() -> None:
    headers = sorted(FAKES.glob("*.h"))
    assert headers
    for header in headers:
        lines = header.read_text().splitlines()
        assert lines[0] == "/* SPDX-License-Identifier: GPL-2.0-only */", header.name
        assert len(lines) < 500, header.name


def _tarball(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:xz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


def test_build_names_the_tarball_when_it_has_no_kvm(tmp_path: Path) -> None:
    source = _tarball(tmp_path / "linux.tar.xz", {"linux-source-6.12/README": "hello"})
    with pytest.raises(StepFailed, match=r"linux\.tar\.xz has no arch/x86/kvm/"):
        build(source, tmp_path / "headers", tmp_path / "work")


def test_build_fails_in_one_sentence_when_the_tarball_is_cut_off(tmp_path: Path) -> None:
    whole = _tarball(tmp_path / "linux.tar.xz", {"linux-source-6.12/arch/x86/kvm/x": "x" * 9999})
    cut = tmp_path / "cut.tar.xz"
    cut.write_bytes(whole.read_bytes()[:100])
    with pytest.raises(StepFailed, match="unpacking the kernel's source failed"):
        build(cut, tmp_path / "headers", tmp_path / "work")


def test_build_takes_only_kvm_out_and_names_the_edit_when_the_source_moved_on(
    tmp_path: Path,
) -> None:
    source = _tarball(
        tmp_path / "linux.tar.xz",
        {
            "linux-source-6.12/arch/x86/boot/main.c": "no",
            "linux-source-6.12/arch/x86/kvm/svm/sev.c": "int x;\n",
            "linux-source-6.12/arch/x86/lib/x.c": "no",
        },
    )
    with pytest.raises(StepFailed, match=r"svm/sev\.c no longer fits this kernel"):
        build(source, tmp_path / "headers", tmp_path / "work")
    unpacked = [p.name for p in (tmp_path / "work").rglob("*") if p.is_file()]
    assert sorted(unpacked) == ["build.log", "sev.c"]


def test_build_names_the_package_when_the_common_headers_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _tarball(tmp_path / "l.tar.xz", {"linux/arch/x86/kvm/svm/sev.c": ""})
    monkeypatch.setattr(module, "EDITS", ())
    headers = tmp_path / "linux-headers-6.12.1+deb12-amd64"
    with pytest.raises(StepFailed, match=r"6\.12\.1\+deb12-common isn't unpacked"):
        build(source, headers, tmp_path / "work")
