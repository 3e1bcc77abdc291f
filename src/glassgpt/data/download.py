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


class _TransferError(Exception):
    """Why a transfer failed. `passing`: another attempt may succeed."""

    def __init__(self, reason: str, passing: bool = True) -> None:
        super().__init__(reason)
        self.passing = passing


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
                except _TransferError as error:
                    raise UserError(f"cannot download {what} from {url}: {error}.\n{manual}") from error
    return path


def _matches(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


def _fetch(url: str, path: Path, sha256: str, attempts: int, pause: float, timeout: float) -> None:
    """Attempt until the partial file is whole and right, then give it its name. Raises `_TransferError` with the last reason."""
    partial = path.with_name(f"{PARTIAL_PREFIX}{path.name}")
    for attempt in range(attempts):
        try:
            _transfer(url, partial, sha256, timeout)
            break
        except _TransferError as error:
            if not error.passing or attempt == attempts - 1:
                raise
            time.sleep(pause * 2**attempt)
    flush_to_disk(partial)
    os.replace(partial, path)
    flush_to_disk(path.parent)


def _transfer(url: str, partial: Path, sha256: str, timeout: float) -> None:
    """One attempt to complete the partial file, going on where it ends. Raises `_TransferError`."""
    have = partial.stat().st_size if partial.is_file() else 0
    with _request(url, partial, have, timeout) as response:
        start = _start_of(response)
        if start not in (0, have):
            raise _TransferError(f"the server sent the part from byte {start} on instead of {have}")
        with open(partial, "ab" if start else "wb") as file:
            _copy(response, file)
    if (found := sha256_of(partial)) != sha256:
        partial.unlink()  # nothing to go on from
        # Parts of two versions of a file may have met; one that came whole would come again as it is.
        raise _TransferError(f"what came is another file (sha256 {found}, expected {sha256})", passing=start > 0)


def _request(url: str, partial: Path, have: int, timeout: float) -> http.client.HTTPResponse:
    """Ask for the file, from byte `have` on."""
    headers = {"User-Agent": "glassgpt"} | ({"Range": f"bytes={have}-"} if have else {})
    # An opener of our own: the one behind `urlopen` is kept, with the proxies that the environment named at its first use.
    opener = urllib.request.build_opener()
    try:
        response: http.client.HTTPResponse = opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
        return response
    except urllib.error.HTTPError as error:
        out_of_range = error.code == 416 and have > 0  # the partial file is no start of what the server has now: begin anew
        if out_of_range:
            partial.unlink()
        passing = out_of_range or error.code in _PASSING or error.code >= 500
        raise _TransferError(f"the server answers {error.code} {error.reason}", passing) from error
    except (OSError, http.client.HTTPException) as error:
        raise _TransferError(_reason(error)) from error


def _start_of(response: http.client.HTTPResponse) -> int:
    """The offset of the response's first byte in the file: a server may ignore Range and send it all (status 200)."""
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if response.status == 206 and match else 0


def _copy(response: http.client.HTTPResponse, file: IO[bytes]) -> None:
    """Append the body to the file. Raises `_TransferError` where it ends early; what came stays in the file."""
    expected: int | None = None
    with suppress(ValueError):
        expected = int(response.headers.get("Content-Length", ""))
    received = 0
    while True:
        try:
            chunk = response.read(_CHUNK)
        except (OSError, http.client.HTTPException) as error:  # the network's, while errors of file.write are the disk's
            raise _TransferError(f"the connection broke: {_reason(error)}") from error
        if not chunk:
            break
        file.write(chunk)
        received += len(chunk)
    if expected is not None and received < expected:
        raise _TransferError(f"the connection broke after {received} of {expected} bytes")


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", "") or error or type(error).__name__)
