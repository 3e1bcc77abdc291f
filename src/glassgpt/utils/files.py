"""Files that are complete or not there: atomic files and directories, hashes, bounded reads, strict JSON."""

import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import stat
import threading
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from glassgpt.utils.content import HEAD_BYTES, require_text
from glassgpt.utils.errors import UserError

# A file or directory that is still being written has this prefix until it is renamed to its final name.
PARTIAL_PREFIX = ".partial-"
_REPLACED = "replaced-"
_KEPT_OF_NAME = 48  # characters that a partial file keeps, so that its name fits the 255 bytes that a name may have

# Limits of files that are read whole (the largest of them are tokenizers), and of what is nested in JSON and TOML.
MOST_BYTES, _DEEPEST = 1 << 28, 100
_SHELL_PIPES = ("/dev/fd/", "/dev/stdin")  # of `<(command)` and `command |`: a process already writes to them
_DEEP_KEY = re.compile(rf"^[\s\[]*(?:[\w-]+\s*\.\s*){{{_DEEPEST}}}", re.MULTILINE)

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "the file would be larger than `ulimit -f` allows; raise that limit",
    errno.EROFS: "the file system is read-only; choose another directory",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EISDIR: "it is a directory; name a file",
    errno.ENOENT: "there is no such file or directory; check the path",
    errno.ELOOP: "its links form a circle; name the file itself",
    errno.ENXIO: "nobody reads from it; start its reader first, or name a file",
    errno.EIO: "the disk failed; check it, or use another one",
    **dict.fromkeys((errno.ESTALE, errno.ENOTCONN), "the file system lost its connection; mount it again"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "too many files are open; raise the limit with `ulimit -n`"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "permission denied; choose a path that you may use"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a part of this path is not a directory; choose another path"),
}


@contextmanager
def explain_os_errors(action: str, path: Path) -> Iterator[None]:
    """Turn errors of the operating system (a full disk, missing permissions) into a `UserError`; other errors pass.

    Also a broken pipe passes: the command line ends without an error then.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, BrokenPipeError):
            raise
        where = error.filename if action == "read" and error.filename else path
        raise UserError(f"cannot {action} {where}: {os_error_reason(error)}") from error


def os_error_reason(error: OSError) -> str:
    """What an error of the operating system means, and how to fix it if that is known."""
    return _REASONS.get(error.errno or 0, error.strerror or str(error))


def readable(path: Path | str) -> AbstractContextManager[None]:
    """Turn every error of reading a file that the user named into a `UserError` that names it."""
    return explain_os_errors("read", Path(path))


def user_path(text: str | Path) -> Path:
    """Return a path with a leading `~` replaced, which the shell leaves in `--out=~/runs`."""
    return Path(os.path.expanduser(text))  # noqa: PTH111  # Path's own raises for a `~nobody` without a home directory


def decoded(data: bytes, origin: str) -> str:
    """Text in UTF-8, without a byte-order mark. Raises `UserError` that names the origin, and what the data is."""
    require_text(data[:HEAD_BYTES], origin)
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        where = f"byte {data[error.start]:#04x} at offset {error.start}"
        raise UserError(f"{origin} is not valid UTF-8: {where}; convert it to UTF-8, if it is text") from None


def open_regular(path: Path | str) -> BufferedReader:
    """Open a file to read. Raises `UserError` for a named pipe or a device, which may have no end, and `OSError`."""

    def without_waiting(name: str, flags: int) -> int:  # otherwise opening a named pipe waits for its writer
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    file = open(path, "rb", opener=without_waiting)  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise UserError(f"{path} is a named pipe or a device, not a regular file; copy its content to a file first")


def own_file(path: Path) -> Path:
    """The path of a file in a directory that may come from others. Raises `UserError` for a link out of it.

    The page and the report would show the content of any file of this machine: a link is resolved, whatever is there.
    """
    if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(path.parent)):
        raise UserError(f"{path} is a link to a place outside of its directory; put a copy of the file there")
    return path


def read_file(path: Path | str, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file, or of a pipe of the shell's. Raises `UserError` for others and too many bytes."""
    is_from_shell = str(path).startswith(_SHELL_PIPES) and Path(path).is_fifo()
    with open(path, "rb") if is_from_shell else open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size  # 0 for pipes and files of the kernel
        content = b"" if size > most else file.read(min(most, max(size, MOST_BYTES)) + 1) or b""  # or None: nothing now
    if max(size, len(content)) > most:
        raise UserError(f"{path} has more than {most:,} bytes, too many for a file of its kind")
    return content


def parse_json(content: bytes | str, origin: str, *, unique_keys: bool = False) -> Any:
    """The value of JSON text. Raises `UserError` that names the origin, also if it is nested too deeply.

    `unique_keys`: refuse objects that have a key twice, of which Python's parser keeps the last value.
    """
    try:
        text = decoded(content, origin) if isinstance(content, bytes) else content
        value = json.loads(text, object_pairs_hook=_unique if unique_keys else None)
        require_flat(value)
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{origin} is not valid JSON: {_why(error)}") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(value := dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return value


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises `UserError` if it is missing, too large, damaged, or nested too deeply."""
    with readable(path):
        return parse_json(read_file(path), str(path))


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `UserError` as `read_json` does, and if it is another value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it is not a JSON object")
    return value


def sealed_json(value: Mapping[str, Any]) -> str:
    """A JSON object with a hash of its content, by which `read_sealed` notices damage."""
    return json.dumps({**value, "checksum": _checksum(value)}, indent=1) + "\n"


def read_sealed(path: Path, *, needs_checksum: bool = True) -> dict[str, Any]:
    """The object that `sealed_json` wrote to a file. Raises `UserError` if it is missing or damaged."""
    with readable(path):
        content = read_file(path, 1 << 30)  # the manifest of a dataset names every file of its source
    value = parse_json(content, str(path), unique_keys=True)
    if isinstance(value, dict):
        own = _checksum(value)
        if value.pop("checksum", None if needs_checksum else own) == own:
            return value
    raise UserError(f"{path} is damaged: its content has changed")


def _checksum(value: Mapping[str, Any]) -> str:
    content = {key: each for key, each in value.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def parse_toml(text: str, origin: str) -> dict[str, Any]:
    """The table in TOML text. Raises `UserError` that names the origin, also if it is nested too deeply."""
    try:
        if _DEEP_KEY.search(text):  # tomllib would take minutes
            raise RecursionError
        table = tomllib.loads(text)
        require_flat(table)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin} is not valid TOML: {_why(error)}") from None
    return table


def _why(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def require_flat(value: Any) -> None:
    """Raise `RecursionError` for values inside more than `_DEEPEST` others: each code that walks them would."""
    level = [value]
    for _ in range(_DEEPEST):
        nested = [each for each in level if isinstance(each, (dict, list))]  # ten times as fast as `dict | list`
        if not nested:
            return
        level = [inner for each in nested for inner in (each.values() if isinstance(each, dict) else each)]
    raise RecursionError


def sha256_of(path: Path) -> str:
    """Return the file's sha256 in hexadecimal."""
    with open_regular(path) as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):  # not `file_digest`: it never ends for a file of the kernel without content
            digest.update(chunk)
        return digest.hexdigest()


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one, never a part.

    If several threads or processes write the same file, the last one wins. After a SIGKILL a file with `PARTIAL_PREFIX`
    remains. A path that is not a regular file (`/dev/stdout`, a named pipe) is written to directly.
    """
    data = content.encode() if isinstance(content, str) else content
    with explain_os_errors("write", path):
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        partial = _partial_of(path)
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


def _partial_of(path: Path) -> Path:
    return path.with_name(f"{PARTIAL_PREFIX}{path.name[:_KEPT_OF_NAME]}.{os.getpid()}-{threading.get_ident()}")


def require_writable(path: Path) -> None:
    """Raise `UserError` if `write_atomic` cannot write this file. Call it before long work. Makes the file's folder."""
    with explain_os_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            # Without waiting for a pipe's reader. It stays open until this process ends: its reader would end, too.
            os.write(os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0)), b"")
            return
        if path.exists():
            path.open("r+b").close()  # a file that is read-only is not replaced
        partial = _partial_of(path)
        try:
            partial.write_bytes(bytes(4096))  # a full disk has no room for it
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Yield a directory to fill; it replaces `final` when the block ends and all of it is on the disk.

    On an exception it is removed. After a SIGKILL it remains with `PARTIAL_PREFIX`, until `remove_partials`. An
    existing `final` is renamed before it is deleted, so that at every moment one of the two versions is complete.
    """
    partial, replaced = (final.with_name(f"{PARTIAL_PREFIX}{kind}{final.name}") for kind in ("", _REPLACED))
    with explain_os_errors("write", final):
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            for path in (*partial.iterdir(), partial):
                flush_to_disk(path)
            shutil.rmtree(replaced, ignore_errors=True)
            if final.is_dir():
                os.replace(final, replaced)
            os.replace(partial, final)
        except BaseException:
            if replaced.exists() and not final.exists():
                os.replace(replaced, final)
            shutil.rmtree(partial, ignore_errors=True)
            raise
        flush_to_disk(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def unused_path(path: Path) -> Path:
    """The path, or if it exists, the first unused one of `NAME-2`, `NAME-3` and so on."""
    unused, numbers = path, itertools.count(2)
    while os.path.lexists(unused):
        unused = path.with_name(f"{path.name}-{next(numbers)}")
    return unused


def remove_partials(directory: Path, pattern: str = "*") -> None:
    """Remove partial files and directories that a killed process left, and restore a version it was replacing."""
    for path in directory.glob(f"{PARTIAL_PREFIX}{pattern}"):
        final = path.with_name(path.name.removeprefix(PARTIAL_PREFIX + _REPLACED))
        if final != path and not final.exists():  # killed between the two renames of `atomic_directory`
            os.replace(path, final)
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """Return the value with None instead of numbers that JSON cannot hold (infinite, NaN), and tuples as lists."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value: Any) -> str:
    """Return the value as JSON on one line of ASCII, with null instead of numbers that are not finite."""
    return json.dumps(finite(value), allow_nan=False, separators=(",", ":"))
