"""Files that are there completely or not at all, private keys, and page logs read back."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from kvmlaunch.abi.idblock_sign import Signer
from kvmlaunch.errors import FormatError, ImageError, KvmLaunchError
from kvmlaunch.launch import keyfiles
from kvmlaunch.launch.files import read_small, write_files
from kvmlaunch.launch.keyfiles import load_signer, make_keys, new_passphrase
from kvmlaunch.launch.measure import measure, page_records
from kvmlaunch.launch.pagelog import PageLog
from kvmlaunch.launch.pagelog_reader import read_log
from tests.launch.rig import small_plan

VARIABLE = "KVMLAUNCH_TEST_PASSPHRASE"
SECRET = "tr0ub4dor&3"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def there(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_write_when_files_are_new_makes_all_with_their_mode(tmp_path: Path) -> None:
    paths = tmp_path / "a", tmp_path / "b"
    write_files({str(paths[0]): b"1", str(paths[1]): b"2"}, mode=0o600, replace=False)
    assert [path.read_bytes() for path in paths] == [b"1", b"2"]
    assert [mode(path) for path in paths] == [0o600, 0o600]
    assert there(tmp_path) == ["a", "b"]


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o077, 0o600)])
def test_write_when_anybody_may_read_it_keeps_to_the_umask(
    tmp_path: Path, umask: int, expected: int
) -> None:
    before = os.umask(umask)
    try:
        write_files({str(tmp_path / "a"): b"x"})
    finally:
        assert os.umask(before) == umask
    assert mode(tmp_path / "a") == expected


def test_write_when_one_is_there_and_may_not_be_replaced_writes_none(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"old")
    with pytest.raises(FormatError, match="b is there already"):
        write_files({str(tmp_path / name): b"x" for name in "abc"}, replace=False)
    assert there(tmp_path) == ["b"]
    assert (tmp_path / "b").read_bytes() == b"old"


def test_write_when_somebody_makes_it_meanwhile_writes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    (tmp_path / "b").write_bytes(b"old")
    with pytest.raises(FormatError, match="b is there already"):
        write_files({str(tmp_path / name): b"x" for name in "ab"}, replace=False)
    assert there(tmp_path) == ["b"]
    assert (tmp_path / "b").read_bytes() == b"old"


def test_write_when_a_name_is_a_link_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="a is there already"):
        write_files({str(tmp_path / "a"): b"x"}, replace=False)
    assert there(tmp_path) == ["a"]
    write_files({str(tmp_path / "a"): b"x"}, replace=True)
    assert (tmp_path / "a").is_symlink()
    assert (tmp_path / "elsewhere").read_bytes() == b"x"


@pytest.mark.parametrize("bad", ["nofolder/b", "folder"])
def test_write_when_one_can_not_be_written_writes_none(tmp_path: Path, bad: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(KvmLaunchError) as caught:
        write_files({str(tmp_path / "a"): b"x", str(tmp_path / bad): b"x"})
    assert str(tmp_path / bad) in str(caught.value)
    assert there(tmp_path) == ["folder"]


def test_write_when_the_disk_is_full_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KvmLaunchError, match="a: No space left on device"):
        write_files({str(tmp_path / "a"): b"x"})
    assert there(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_read_when_larger_than_allowed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(11))
    assert len(read_small(str(path), 11)) == 11
    with pytest.raises(ImageError, match="larger than 10 bytes"):
        read_small(str(path), 10)


# Keys


@pytest.mark.parametrize("passphrase", [None, SECRET.encode()])
def test_keys_when_made_are_loaded_and_private(tmp_path: Path, passphrase: bytes | None) -> None:
    paths = [str(tmp_path / "id.pem"), str(tmp_path / "author.pem")]
    made = make_keys(paths, passphrase=passphrase)
    (tmp_path / "pass").write_text(f"{SECRET}\nsecond line\n")
    for path in paths:
        assert mode(Path(path)) == 0o600
        loaded = load_signer(path, passphrase_file=str(tmp_path / "pass"))
        assert loaded.public_key == made[path].public_key
    assert made[paths[0]].public_key != made[paths[1]].public_key


def test_keys_when_one_file_is_named_twice_are_not_made(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="two keys"):
        make_keys([str(tmp_path / "a"), f"{tmp_path}/./a"])
    assert there(tmp_path) == []


def test_keys_when_replaced_keep_the_mode(tmp_path: Path) -> None:
    path = tmp_path / "id.pem"
    path.write_bytes(b"old")
    path.chmod(0o644)
    make_keys([str(path)], replace=True)
    assert mode(path) == 0o600


@pytest.fixture
def encrypted(tmp_path: Path) -> str:
    path = str(tmp_path / "id.pem")
    make_keys([path], passphrase=SECRET.encode())
    return path


def test_passphrase_when_in_the_environment_is_taken(
    encrypted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, SECRET)
    assert isinstance(load_signer(encrypted, variable=VARIABLE), Signer)


def test_passphrase_when_there_is_a_terminal_is_asked_for(
    encrypted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyfiles, "_at_a_terminal", lambda: True)
    monkeypatch.setattr(keyfiles.getpass, "getpass", lambda prompt: SECRET)
    assert isinstance(load_signer(encrypted, variable=VARIABLE), Signer)


@pytest.mark.parametrize(
    ("given", "rule"), [(None, "encrypted"), ("wr0ngs3cret", "is wrong"), ("", "encrypted")]
)
def test_passphrase_when_missing_or_wrong_is_one_sentence(
    encrypted: str, monkeypatch: pytest.MonkeyPatch, given: str | None, rule: str
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(keyfiles, "_at_a_terminal", lambda: False)
    if given is not None:
        monkeypatch.setenv(VARIABLE, given)
    with pytest.raises(ImageError, match=rule) as caught:
        load_signer(encrypted, variable=VARIABLE)
    text = str(caught.value)
    assert text.startswith(f"{encrypted}: ")
    assert "\n" not in text
    assert "wr0ngs3cret" not in text


@pytest.mark.parametrize(("answers", "rule"), [((SECRET, "x"), "differ"), (("", ""), "empty")])
def test_new_passphrase_when_asked_for_is_asked_twice(
    monkeypatch: pytest.MonkeyPatch, answers: tuple[str, str], rule: str
) -> None:
    queue = list(answers)
    monkeypatch.setattr(keyfiles, "_at_a_terminal", lambda: True)
    monkeypatch.setattr(keyfiles.getpass, "getpass", lambda prompt: queue.pop(0))
    with pytest.raises(FormatError, match=rule):
        new_passphrase(None, VARIABLE)
    assert queue == []


def test_new_passphrase_when_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(keyfiles, "_at_a_terminal", lambda: False)
    with pytest.raises(FormatError, match="there is no passphrase"):
        new_passphrase(None, VARIABLE)


# Page logs


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "x.jsonl"
    plan = small_plan(vcpus=2, policy=0xB0000)
    with PageLog(str(path)) as log:
        log.header(plan, platform="sim", profile="6.12", vmsa_mode="sync")
        for record in page_records(plan):
            log.record(record)
        log.finish(measure(plan).digest, plan.npages + 2)
    return path


def test_log_when_read_has_digest_and_policy(log: Path) -> None:
    logged = read_log(str(log))
    assert (logged.digest, logged.policy, logged.pages) == (
        measure(small_plan(vcpus=2)).digest,
        0xB0000,
        8,
    )


@pytest.mark.parametrize("line", range(1, 10))
def test_log_when_a_digest_was_changed_names_the_line(log: Path, line: int) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    event = json.loads(lines[line])
    event["digest"] = f"{int(event['digest'], 16) ^ 1:096x}"
    lines[line] = json.dumps(event).encode() + b"\n"
    log.write_bytes(b"".join(lines))
    with pytest.raises(ImageError, match=rf"line {line + 1}: digest .* doesn't follow"):
        read_log(str(log))


def test_log_when_a_page_is_missing_is_refused(log: Path) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:3] + lines[4:]))
    with pytest.raises(ImageError, match="line 4: digest"):
        read_log(str(log))


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"", "is no page log"),
        (b"\xff\xfe", "line 1: is not JSON"),
        (b"[]\n", "line 1: is not an event"),
        (b'{"event":"page"}\n', "line 1: is not the header"),
        (b'{"event":"header","schema":"other/1"}\n', "line 1: is not the header"),
        (b'{"event":"header","schema":"kvmlaunch.log/1"}\n', "line 1: policy is not"),
        (b"[" * 100000, "line 1: is not JSON"),
    ],
)
def test_log_when_it_is_none_is_one_sentence(tmp_path: Path, data: bytes, rule: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        read_log(str(path))
    assert str(caught.value).startswith(f"{path}: {rule}")


def test_log_when_it_never_ends_is_refused() -> None:
    with pytest.raises(ImageError, match="line 1: is not JSON"):
        read_log("/dev/zero")


def test_log_when_the_launch_did_not_end_is_refused(log: Path) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(ImageError, match="ends before the launch does"):
        read_log(str(log))


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("type", "NORMALER", "there is no page type 'NORMALER'"),
        ("type", None, "there is no page type None"),
        ("gpa", "0x1001", "page-aligned"),
        ("gpa", "xyz", "gpa is not a hex number"),
        ("gpa", 4096, "gpa is not a hex number"),
        ("contents", "00", "contents is not 96 hex digits"),
        ("contents", None, "contents is not 96 hex digits"),
    ],
)
def test_log_when_an_event_is_malformed_names_the_line(
    log: Path, name: str, value: object, rule: str
) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    lines[2] = json.dumps({**json.loads(lines[2]), name: value}).encode() + b"\n"
    log.write_bytes(b"".join(lines))
    with pytest.raises(ImageError) as caught:
        read_log(str(log))
    assert str(caught.value).startswith(f"{log}: line 3: ")
    assert rule in str(caught.value)


@pytest.mark.parametrize("there_before", [False, True])
def test_write_when_the_second_can_not_get_its_name_takes_back_the_first_if_it_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there_before: bool
) -> None:
    real, calls = os.replace, []

    def fails_once(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise PermissionError(13, "Permission denied", source, None, target)
        real(source, target)

    if there_before:
        (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(KvmLaunchError, match="b: Permission denied"):
        write_files({str(tmp_path / "a"): b"x", str(tmp_path / "b"): b"x"})
    assert there(tmp_path) == (["a"] if there_before else [])
