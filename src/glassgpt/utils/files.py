"""Files that are either whole or not there: hashing, atomic writes, atomic directories."""

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from glassgpt.utils.errors import UserError

# A file or directory that is still being written carries this prefix until it is renamed to its final name.
PARTIAL_PREFIX = ".partial-"
# Characters of its name that a partial file keeps: with what is added it still fits the 255 bytes that a name may have.
_KEPT_OF_NAME = 48


def sha256_of(path: Path) -> str:
    """The file's sha256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder: Path, wanted: Callable[[str], bool], left_out: Iterable[str] = ()) -> Iterator[Path]:
    """The files in a folder and below it whose names are wanted; hidden ones, links to folders and folders left out are passed over."""

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    skipped = frozenset(left_out)
    for directory, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        yield from (Path(directory, name) for name in names if not name.startswith(".") and wanted(name))


@contextmanager
def readable(path: Path | str) -> Iterator[None]:
    """Turn every error of a file that cannot be read into a `UserError` that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def user_path(text: str | Path) -> Path:
    """The path of that name, a leading `~` replaced (`--out=~/runs` reaches a program as it is written)."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # `~nobody`: no user's home, so a name like any other
        return Path(text)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or a directory's entries, are on the disk (Windows cannot flush a directory: nothing is done)."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(
        path, os.O_RDONLY if path.is_dir() else os.O_RDWR
    )  # Windows flushes what is open for writing only
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explain_os_errors(action: str, path: Path) -> Iterator[None]:
    """Turn the errors of a full disk or of missing rights into a `UserError` that names the path; others pass."""
    try:
        yield
    except OSError as error:
        denied = (
            "permission denied" if action == "read" else "permission denied: choose a directory that you may write to"
        )
        reasons = {
            errno.ENOSPC: "the disk is full: free some space",
            errno.EDQUOT: "the disk quota is used up: free some space",
            errno.EFBIG: "a file would be larger than is allowed here (see `ulimit -f`)",
            errno.EACCES: denied,
            errno.EPERM: denied,
            errno.EROFS: "the file system is read-only: choose another directory",
            errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
            errno.EISDIR: "it is a directory: name a file",
            errno.ENOTDIR: "a part of this path is a file and no directory: choose another path",
            errno.EEXIST: "a part of this path is a file and no directory: choose another path",
        }
        if error.errno not in reasons:
            raise
        where = error.filename if action == "read" and error.filename else path
        raise UserError(f"cannot {action} {where}: {reasons[error.errno]}") from error


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one, never a part of it.

    Several threads and processes may write the same one at once: the last wins. What a SIGKILL leaves stays under
    `PARTIAL_PREFIX`. What is no regular file (`/dev/stdout`, a named pipe) is written to instead of replaced.
    """
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        with explain_os_errors("write", path):
            path.write_bytes(data)
        return
    partial = path.with_name(f"{PARTIAL_PREFIX}{path.name[:_KEPT_OF_NAME]}.{os.getpid()}-{threading.get_ident()}")
    with explain_os_errors("write", path):
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    flush_to_disk(path.parent)


@contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """A directory to fill, which takes its final name only when it is complete and on the disk.

    Whatever stood under the final name is replaced. On an exception the partial directory is removed; after a SIGKILL it
    stays behind under `PARTIAL_PREFIX`, where no reader looks: `remove_partials` clears it.
    """
    partial = final.with_name(f"{PARTIAL_PREFIX}{final.name}")
    with explain_os_errors("write", final):
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            for path in partial.iterdir():
                flush_to_disk(path)
            flush_to_disk(partial)
            if final.exists():
                shutil.rmtree(final)
            os.replace(partial, final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    flush_to_disk(final.parent)


def remove_partials(directory: Path, pattern: str = "*") -> None:
    """Remove what a killed process left half-written in a directory, of the files whose names match."""
    for path in directory.glob(f"{PARTIAL_PREFIX}{pattern}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
