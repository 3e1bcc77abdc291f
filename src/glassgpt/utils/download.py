"""Files from the network: resumed where they broke, verified by their hash, and whole or not there.

Proxies come from the usual environment variables (`https_proxy`, `no_proxy`, ...), which urllib reads.
"""

import email.utils
import http.client
import os
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import filelock
import platformdirs

from glassgpt.utils.errors import UserError
from glassgpt.utils.files import PARTIAL_PREFIX, explain_os_errors, flush_to_disk, sha256_of

_CHUNK = 1 << 20
# Answers of a server that may be gone a moment later; any other 4xx stays as it is.
_PASSING = {408, 425, 429}
# Whoever is told to come back later than this many seconds is told so, instead of left before a program that seems to hang.
_LONGEST_WAIT = 600.0


class DownloadError(UserError):
    """A download that no attempt could make. `status`: the server's last answer, where there was one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class DownloadStoppedError(Exception):
    """A download was ended by its `stop`; what came stays for the next one."""


class _TransferError(Exception):
    """Why a transfer failed. `passing`: another attempt may succeed, after `wait` seconds at least."""

    def __init__(self, reason: str, passing: bool = True, status: int | None = None, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.passing = passing
        self.status = status
        self.wait = wait


@dataclass(frozen=True)
class _Wanted:
    """What tells the right file from any other."""

    hash: str | None
    hash_of: Callable[[Path], str]
    size: int | None

    def is_at(self, path: Path) -> bool:
        """Whether the right file lies there; it is read only where its size can be right."""
        if not path.is_file() or (self.size is not None and path.stat().st_size != self.size):
            return False
        return self.hash is None or self.hash_of(path) == self.hash


def cache_directory() -> Path:
    """Where downloads and prepared datasets are kept: $GLASSGPT_CACHE, or the user's cache directory of this system."""
    return Path(os.environ.get("GLASSGPT_CACHE") or platformdirs.user_cache_dir("glassgpt")).expanduser().absolute()


def partial_path(path: Path) -> Path:
    """Where what has come of a file lies until it is whole."""
    return path.with_name(f"{PARTIAL_PREFIX}{path.name}")


def download(
    url: str,
    path: Path,
    sha256: str,
    what: str | None = None,
    manual: str | None = None,
    *,
    size: int | None = None,
    hash_of: Callable[[Path], str] = sha256_of,
    headers: Mapping[str, str] | None = None,
    stop: threading.Event | None = None,
    attempts: int = 4,
    pause: float = 1.0,
    timeout: float = 30.0,
) -> Path:
    """Download `url` to `path`, unless a file with this sha256 is there already, and return `path`.

    `what` names the file in an error, and `manual` says there how to go on without network. `size` is the file's, where it is
    known: a server's word on it counts for less. `hash_of` makes `sha256` a hash of another kind. `headers` are sent along,
    an Authorization to no other host than the URL's. `stop`, set by another thread, ends the download with `DownloadStoppedError`.

    `attempts` are made in all, and as many again after one that brought the file forward; the first pause between two takes
    `pause` seconds and each further one twice as long, by chance up to half as much again, and as long as the server asks for.
    `timeout` seconds of silence break an attempt. Raises `DownloadError`, a `UserError`, where no attempt succeeds, or where
    the whole file comes and is not the expected one.
    """
    what = what or path.name
    manual = manual or f"Without network: get {url} on another machine and put it at {path}"
    wanted = _Wanted(sha256, hash_of, size)
    if wanted.is_at(path):
        return path
    with explain_os_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(f".{path.name}.lock")):  # two trainers may want the same file at once
            if not wanted.is_at(path):
                try:
                    request = _Request(url, headers or {}, timeout, stop or threading.Event())
                    _fetch(request, path, wanted, attempts, pause)
                except _TransferError as error:
                    raise DownloadError(
                        f"cannot download {what} from {url}: {error}.\n{manual}", error.status
                    ) from error
    return path


@dataclass(frozen=True)
class _Request:
    """What is asked for at each attempt, and until when."""

    url: str
    headers: Mapping[str, str]
    timeout: float
    stop: threading.Event

    def rest(self, seconds: float) -> None:
        """Wait, or raise `DownloadStoppedError` as soon as that is asked for."""
        if self.stop.wait(seconds):
            raise DownloadStoppedError


def _fetch(request: _Request, path: Path, wanted: _Wanted, attempts: int, pause: float) -> None:
    """Attempt until the partial file is whole and right, then give it its name. Raises `_TransferError` with the last reason."""
    partial = partial_path(path)
    failed, longest = 0, _size(partial)
    while True:
        try:
            _transfer(request, partial, wanted)
            break
        except _TransferError as error:
            # A connection that breaks after every gigabyte is slow and no failure, as long as the file grows.
            failed = failed + 1 if _size(partial) <= longest else 1
            longest = max(longest, _size(partial))
            if not error.passing or failed >= attempts:
                raise
            # By chance, so that the machines of a cluster that failed together do not come back together.
            backoff = pause * 2 ** (failed - 1) * (1 + random.SystemRandom().random() / 2)
            request.rest(max(backoff, error.wait))
    flush_to_disk(partial)
    os.replace(partial, path)
    flush_to_disk(path.parent)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _transfer(request: _Request, partial: Path, wanted: _Wanted) -> None:
    """One attempt to complete the partial file, going on where it ends. Raises `_TransferError`."""
    if wanted.size is not None and _size(partial) > wanted.size:
        partial.unlink()
    start = _size(partial)
    if wanted.size is None or start < wanted.size:
        try:
            start = _receive(request, partial, wanted.size)
        except _TransferError as error:
            if wanted.hash is None or not wanted.is_at(partial):
                if error.status == 416 and start:
                    partial.unlink()  # it is no start of what the server has now: begin anew
                raise
            # It is all there: the server promised more than there is, or was asked for what comes after the end.
    if (found := _size(partial)) < (wanted.size or 0):
        raise _TransferError(f"the server sent {found} bytes of {wanted.size}")
    if not wanted.is_at(partial):
        found_hash = wanted.hash_of(partial)
        partial.unlink()  # nothing to go on from
        # Parts of two versions of a file may have met, or bytes of the right number been damaged on the way; what came whole and
        # of a length that nobody knew would come again as it is.
        reason = f"what came is another file (its hash is {found_hash}, expected {wanted.hash})"
        raise _TransferError(reason, passing=start > 0 or wanted.size is not None)


def _receive(request: _Request, partial: Path, size: int | None) -> int:
    """Append what the server has after the end of the partial file; returns the offset from which it was sent."""
    have = _size(partial)
    with _open(request, have) as response:
        start = _start_of(response)
        if start not in (0, have):
            raise _TransferError(f"the server sent the part from byte {start} on instead of {have}")
        with open(partial, "ab" if start else "wb") as file:
            _copy(response, file, request, None if size is None else size - start)
    return start


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, a token to the same host only: stores behind a hub have their own, and refuse a second one."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and urllib.parse.urlsplit(newurl)[:2] != urllib.parse.urlsplit(req.full_url)[:2]:
            new.remove_header("Authorization")
        return new


def _open(request: _Request, have: int) -> http.client.HTTPResponse:
    """Ask for the file, from byte `have` on."""
    headers = {"User-Agent": "glassgpt", **request.headers} | ({"Range": f"bytes={have}-"} if have else {})
    # An opener of our own: the one behind `urlopen` is kept, with the proxies that the environment named at its first use.
    opener = urllib.request.build_opener(_Redirects)
    try:
        asked = urllib.request.Request(request.url, headers=headers)
        response: http.client.HTTPResponse = opener.open(asked, timeout=request.timeout)
        return response
    except urllib.error.HTTPError as error:
        raise _refusal(error, have) from error
    except (OSError, http.client.HTTPException) as error:
        raise _TransferError(_reason(error)) from error


def _refusal(error: urllib.error.HTTPError, have: int) -> _TransferError:
    """What an answer other than the file means."""
    wait = _retry_after(error.headers.get("Retry-After", ""))
    passing = (error.code == 416 and have > 0) or error.code in _PASSING or error.code >= 500
    asks = f" and asks to come back in {wait:.0f} seconds" if wait > _LONGEST_WAIT else ""
    return _TransferError(
        f"the server answers {error.code} {error.reason}{asks}", passing and not asks, error.code, wait
    )


def _retry_after(value: str) -> float:
    """The seconds a server asks to wait for: a number, or a date (RFC 9110, 10.2.3); 0 without or with neither."""
    if value.strip().isdecimal():
        return float(value)
    with suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def _start_of(response: http.client.HTTPResponse) -> int:
    """The offset of the response's first byte in the file: a server may ignore Range and send it all (status 200)."""
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if response.status == 206 and match else 0


def _copy(response: http.client.HTTPResponse, file: IO[bytes], request: _Request, missing: int | None) -> None:
    """Append the body to the file, of which `missing` bytes are wanted, where that is known.

    Raises `_TransferError` where the body ends early, and as soon as it is too long; what came stays in the file.
    """
    expected: int | None = None
    with suppress(ValueError):
        expected = int(response.headers.get("Content-Length", ""))
    received = 0
    while True:
        request.rest(0)
        try:
            chunk = response.read1(_CHUNK)  # what is there: `read` would wait for the whole chunk, and `stop` with it
        except (
            OSError,
            http.client.HTTPException,
        ) as error:  # the network's, while errors of file.write are the disk's
            raise _TransferError(f"the connection broke: {_reason(error)}") from error
        if not chunk:
            break
        file.write(chunk)
        received += len(chunk)
        if missing is not None and received > missing:
            raise _TransferError(f"the server sends more than the {missing} bytes that were missing")
    if expected is not None and received < expected:
        raise _TransferError(f"the connection broke after {received} of {expected} bytes")


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", "") or error or type(error).__name__)
