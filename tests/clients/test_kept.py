"""Folders of the cache: made once, whole or not at all."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path

import pytest

from tests.clients.kept import made_once
from tests.debian import DiskFull, Unavailable


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "kvmlaunch"


def make(work: Path) -> Path:
    folder = work / "made"
    folder.mkdir()
    (folder / "program").write_text("here", encoding="utf-8")
    return folder


def visible(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


def test_folder_when_asked_for_again_is_not_made_again(cache: Path) -> None:
    first = made_once("x", make)
    assert first == cache / "x"
    assert (first / "program").read_text() == "here"
    assert made_once("x", lambda work: pytest.fail("made twice")) == first
    assert visible(cache) == ["x"]


def test_folder_when_making_it_fails_leaves_nothing(cache: Path) -> None:
    def fail(work: Path) -> Path:
        make(work)
        raise Unavailable("no network")

    with pytest.raises(Unavailable, match=r"^no network$"):
        made_once("x", fail)
    assert visible(cache) == []


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, DiskFull), (errno.EROFS, Unavailable)])
def test_folder_when_it_cant_be_written_says_where(
    cache: Path, number: int, kind: type[Exception]
) -> None:
    def fail(work: Path) -> Path:
        raise OSError(number, "what the kernel says")

    with pytest.raises(Unavailable, match=rf"^{cache}/x can't be made: .*says$") as caught:
        made_once("x", fail)
    assert type(caught.value) is kind


def test_folder_when_two_ask_at_once_is_made_by_one(cache: Path) -> None:
    """flock() holds between open files, so two threads are as good as two processes."""
    makers: list[int] = []

    def slowly(work: Path) -> Path:
        makers.append(threading.get_ident())
        time.sleep(0.1)
        return make(work)

    threads = [threading.Thread(target=made_once, args=("x", slowly)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(makers) == 1
    assert visible(cache) == ["x"]
