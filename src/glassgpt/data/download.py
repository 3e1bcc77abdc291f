"""Files from the network: resumed where they broke, verified by sha256, and whole or not there.

Proxies come from the usual environment variables (`https_proxy`, `no_proxy`, ...), which urllib reads.
"""

import http.client
import os
import re
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import IO

import filelock
import platformdirs

from ..errors import UserError
from ..files import PARTIAL_PREFIX, explained, flush_to_disk, sha256_of

_CHUNK = 1 << 20
# Answers of a server that may be gone a moment later; any other 4xx stays as it is.
_PASSING = {408, 425, 429}


class _Broken(Exception):
    """A transfer that failed in a way that another attempt may mend."""


def cache_directory() -> Path:
    """Where downloads and prepared datasets are kept: $GLASSGPT_CACHE, or the user's cache directory of this system."""
    return Path(os.environ.get("GLASSGPT_CACHE") or platformdirs.user_cache_dir("glassgpt")).expanduser().absolute()


def download(
    url: str,
    path: Path,
    sha256: str,
    what: str | None = None,
    manual: str | None = None,
    *,
    attempts: int = 4,
    pause: float = 1.0,
    timeout: float = 30.0,
) -> Path:
    """Download `url` to `path`, unless a file with this sha256 is there already, and return `path`.

    `what` names the file in an error, and `manual` says there how to go on without network. `attempts` are made in all, the
    first pause between two takes `pause` seconds and each further one twice as long; `timeout` seconds of silence break an
    attempt. Raises `UserError` where no attempt succeeds, or where the whole file comes and is not the expected one.
    """
    what = what or path.name
    manual = manual or f"Without network: get {url} on another machine and put it at {path}"
    if _matches(path, sha256):
        return path
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(f".{path.name}.lock")):  # two trainers may want the same file at once
            if not _matches(path, sha256):
                try:
                    _fetch(url, path, sha256, attempts, pause, timeout)
                except _Broken as error:
                    raise UserError(f"cannot download {what} from {url}: {error}.\n{manual}") from error
    return path


def _matches(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


def _fetch(url: str, path: Path, sha256: str, attempts: int, pause: float, timeout: float) -> None:
    """Attempt until the partial file is whole and right, then give it its name. Raises `_Broken` with the last reason."""
    partial = path.with_name(f"{PARTIAL_PREFIX}{path.name}")
    for attempt in range(attempts):
        resumed = partial.is_file() and partial.stat().st_size > 0
        try:
            _transfer(url, partial, timeout)
            if (found := sha256_of(partial)) != sha256:
                partial.unlink()  # never resumed from again
                raise _Broken(f"what came has sha256 {found}, expected {sha256}")
            break
        except _Broken as error:
            # A whole file that is wrong stays wrong; one put together from parts of two versions does not.
            final = isinstance(error.__cause__, urllib.error.HTTPError) and not _is_passing(error.__cause__.code)
            wrong = not resumed and not partial.exists() and error.__cause__ is None
            if final or wrong or attempt == attempts - 1:
                raise
            time.sleep(pause * 2**attempt)
    flush_to_disk(partial)
    os.replace(partial, path)
    flush_to_disk(path.parent)


def _is_passing(status: int) -> bool:
    return status in _PASSING or status >= 500


def _transfer(url: str, partial: Path, timeout: float) -> None:
    """One attempt to complete the partial file, going on where it ends. Raises `_Broken`."""
    have = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "glassgpt"} | ({"Range": f"bytes={have}-"} if have else {}))
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            start = _start_of(response)
            with open(partial, "ab" if have and start == have else "wb") as file:
                if start not in (0, have):
                    raise _Broken(f"the server sent the part from byte {start} instead of {have}")
                _copy(response, file)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # the partial file is no start of what the server has now: begin anew
            partial.unlink()
        raise _Broken(f"the server answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _Broken(str(error.reason)) from error


def _start_of(response: http.client.HTTPResponse) -> int:
    """The offset of the response's first byte in the file: a server may ignore Range and send it all (status 200)."""
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if response.status == 206 and match else 0


def _copy(response: http.client.HTTPResponse, file: IO[bytes]) -> None:
    """Append the body to the file. Raises `_Broken` where it ends early; what came stays in the file."""
    expected: int | None = None
    with suppress(ValueError):
        expected = int(response.headers.get("Content-Length", ""))
    received = 0
    while True:
        try:
            chunk = response.read(_CHUNK)
        except (OSError, http.client.HTTPException) as error:  # the network's, while errors of file.write are the disk's
            raise _Broken(f"the connection broke ({error or type(error).__name__})") from error
        if not chunk:
            break
        file.write(chunk)
        received += len(chunk)
    if expected is not None and received < expected:
        raise _Broken(f"the connection broke after {received} of {expected} bytes")
