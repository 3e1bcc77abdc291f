"""Atomic writes: files are complete or absent, for concurrent readers, after errors and after crashes."""

import errno
import hashlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from glassgpt.utils.errors import UserError
from glassgpt.utils.files import (
    _REASONS,
    PARTIAL_PREFIX,
    atomic_directory,
    explain_os_errors,
    remove_partials,
    require_writable,
    sha256_of,
    write_atomic,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Calls:
    """Records the inode of each fsync and rename, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.order: list[tuple[str, int]] = []
        self._fsync, self._replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "replace", self.replace)

    def fsync(self, descriptor: int) -> None:
        self.order.append(("fsync", os.fstat(descriptor).st_ino))
        self._fsync(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        self.order.append(("replace", source.stat().st_ino))
        self._replace(source, target)


def test_sha256_of_agrees_with_the_standards_example_and_with_hashlib(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    content = bytes(range(256)) * 5000  # more than one block of any reader
    (tmp_path / "large").write_bytes(content)
    assert sha256_of(tmp_path / "large") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("content", ["grüße\n", b"\x00\xff\n\r"])
def test_write_atomic_replaces_the_content_byte_for_byte(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "file"
    path.write_text("something longer that stood there before")
    write_atomic(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names(tmp_path) == ["file"]


def test_a_concurrent_reader_never_sees_a_partial_file(tmp_path: Path) -> None:
    path, contents = tmp_path / "file", (b"a" * 50_000, b"b" * 200_000)
    write_atomic(path, contents[0])
    wrong: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            content = path.read_bytes()
            if content not in contents:
                wrong.append(len(content))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for turn in range(40):
        write_atomic(path, contents[turn % 2])
    done.set()
    watcher.join()
    assert wrong == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_atomic_that_fails_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match=r"cannot write .*file: the disk is full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_concurrent_writers_of_a_file_leave_one_complete_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread waits before the rename until all have written their file."""
    path, barrier = tmp_path / ("x" * 250), threading.Barrier(4)
    replace, wrong = os.replace, []

    def replace_after_all_have_written(*arguments: Path) -> None:
        barrier.wait(10)
        replace(*arguments)

    def write(content: str) -> None:
        try:
            write_atomic(path, content)
        except Exception as error:
            wrong.append(error)

    monkeypatch.setattr(os, "replace", replace_after_all_have_written)
    contents = [str(number) * (number + 1) for number in range(4)]
    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert path.read_text() in contents
    assert names(tmp_path) == [path.name]


def test_a_killed_write_leaves_a_file_with_the_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names_at_each_flush: list[list[str]] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: names_at_each_flush.append(names(tmp_path)))
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        write_atomic(tmp_path / "file", "x")
    (one,), (two, file) = names_at_each_flush[0], names_at_each_flush[2]
    assert one.startswith(f"{PARTIAL_PREFIX}file.1-")
    assert two.startswith(f"{PARTIAL_PREFIX}file.2-")
    assert file == "file"


def test_write_atomic_flushes_before_it_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    write_atomic(tmp_path / "file", "content")
    inode, folder = (tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino
    # Renaming first can leave an empty file after a power cut; without the last flush, the rename may be undone.
    assert calls.order == [("fsync", inode), ("replace", inode), ("fsync", folder)]


def test_a_directory_gets_its_final_name_only_when_it_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "new" / "000010"
    with atomic_directory(final) as partial:
        (partial / "a").write_text("1")
        assert not final.exists()
        assert names(final.parent) == [f"{PARTIAL_PREFIX}000010"]
        (partial / "b").write_text("2")
    assert names(final) == ["a", "b"]
    assert names(final.parent) == ["000010"]


def test_a_directory_is_flushed_before_it_gets_its_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    with atomic_directory(tmp_path / "final") as partial:
        for name in ("a", "b"):
            (partial / name).write_text(name)
    renamed = calls.order.index(("replace", (tmp_path / "final").stat().st_ino))
    flushed = {inode for kind, inode in calls.order[:renamed] if kind == "fsync"}
    assert flushed == {
        path.stat().st_ino for path in (tmp_path / "final", tmp_path / "final" / "a", tmp_path / "final" / "b")
    }
    assert calls.order[renamed + 1 :] == [("fsync", tmp_path.stat().st_ino)]


def test_an_exception_leaves_the_old_directory(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with atomic_directory(final) as partial:
        (partial / "a").write_text("old")

    def rewrite() -> None:
        with atomic_directory(final) as partial:
            (partial / "a").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewrite()
    assert (final / "a").read_text() == "old"
    assert names(tmp_path) == ["final"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_directory_whose_replacement_fails_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    final, replace, calls = tmp_path / "final", os.replace, 0
    final.mkdir()
    (final / "a").write_text("old")

    def fail(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        assert "old" in [
            (folder / "a").read_text() for folder in tmp_path.iterdir()
        ]  # the old version is never deleted first
        if calls == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="disk is full"), atomic_directory(final) as partial:
        (partial / "a").write_text("new")
    assert (final / "a").read_text() == "old"
    assert names(tmp_path) == ["final"]


def test_a_version_that_a_killed_process_was_replacing_is_restored(tmp_path: Path) -> None:
    """A kill between the two renames leaves both versions under partial names."""
    for name, text in (("replaced-final", "old"), ("final", "new")):
        folder = tmp_path / f"{PARTIAL_PREFIX}{name}"
        folder.mkdir()
        (folder / "a").write_text(text)
    remove_partials(tmp_path)
    assert names(tmp_path) == ["final"]
    assert (tmp_path / "final" / "a").read_text() == "old"


def test_a_directory_replaces_the_old_one_and_leftovers_of_a_killed_writer(tmp_path: Path) -> None:
    final, names_at_each_flush = tmp_path / "final", tmp_path / f"{PARTIAL_PREFIX}final"
    for folder in (final, names_at_each_flush):
        folder.mkdir()
        (folder / "former").write_text("x")
    with atomic_directory(final) as partial:
        (partial / "a").write_text("new")
    assert names(final) == ["a"]
    assert names(tmp_path) == ["final"]


def test_remove_partials_removes_only_files_and_folders_with_the_prefix(tmp_path: Path) -> None:
    (tmp_path / f"{PARTIAL_PREFIX}000001").mkdir()
    (tmp_path / f"{PARTIAL_PREFIX}000001" / "a").write_text("x")
    (tmp_path / f"{PARTIAL_PREFIX}file").write_text("x")
    (tmp_path / "000001").mkdir()
    (tmp_path / "partial").write_text("x")
    remove_partials(tmp_path, "fi*")
    assert names(tmp_path) == [f"{PARTIAL_PREFIX}000001", "000001", "partial"]
    remove_partials(tmp_path)
    assert names(tmp_path) == ["000001", "partial"]


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permission denied"),
        (errno.EPERM, "permission denied"),
        (errno.EROFS, "read-only"),
        (errno.ENOTDIR, "not a directory"),
    ],
)
def test_errors_that_a_user_can_fix_are_explained(number: int, reason: str) -> None:
    with (
        pytest.raises(UserError, match=rf"cannot write some/file: .*{reason}") as caught,
        explain_os_errors("write", Path("some/file")),
    ):
        raise OSError(number, os.strerror(number))
    assert isinstance(caught.value.__cause__, OSError)


def test_every_known_reason_says_what_to_do() -> None:
    """`reason; remedy`, so that advice which follows, such as how to resume, does not stand for the remedy."""
    assert [reason for reason in _REASONS.values() if reason.count("; ") != 1] == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EMFILE, errno.ELOOP, errno.EBUSY])
def test_every_error_of_the_operating_system_names_the_file(number: int) -> None:
    with pytest.raises(UserError, match="some/file"), explain_os_errors("read", Path("some/file")):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("error", [OSError("no number"), BrokenPipeError(errno.EPIPE, "pipe"), ValueError("value")])
def test_other_errors_are_raised_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explain_os_errors("write", Path("file")):
        raise error
    assert caught.value is error


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    wrong = [tmp_path / name for name in ("folder", "pipe", "old/x", "x" * 300)]
    wrong += [path for path in map(Path, ("/proc/x", "/dev/full", "/sys/x")) if path.parent.exists()]
    for path in wrong:
        with pytest.raises(UserError, match=re.escape(str(UserError(path)))):
            require_writable(path)
    for path in (tmp_path / "old", tmp_path / "new/x", Path(os.devnull)):
        require_writable(path)
    assert (tmp_path / "old").read_text() == "old"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "new", "old", "pipe"]


def test_a_pipe_with_a_reader_can_be_written_after_the_check(tmp_path: Path) -> None:
    """The check does not end the reader's input."""
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as cat:
        code = "import sys, pathlib, glassgpt.utils.files as f; path = pathlib.Path(sys.argv[1]); "
        code += "f.require_writable(path); f.write_atomic(path, 'text')"
        while subprocess.run([sys.executable, "-c", code, tmp_path / "pipe"], stderr=subprocess.DEVNULL).returncode:
            assert cat.poll() is None  # it has not opened the pipe yet
        assert cat.communicate()[0] == b"text"


def test_a_pipe_is_written_to_directly(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomic(tmp_path / "pipe", "figures")
        assert os.read(reader, 99) == b"figures"
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
