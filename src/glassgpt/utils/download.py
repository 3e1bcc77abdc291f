"""Downloads of files of a few megabytes, verified by their sha256, through proxies of `https_proxy`, `no_proxy`, ..."""

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

import filelock
import platformdirs

from glassgpt.utils.errors import UserError
from glassgpt.utils.files import explain_os_errors, sha256_of, write_atomic

_ATTEMPTS = 4
_PAUSE = 1.0  # seconds before the second attempt; doubled before each further one
_LARGEST = 1 << 26  # bytes that are read at most, whatever a server sends
_TIMEOUT = 30.0  # seconds of silence that break an attempt


def cache_directory() -> Path:
    """Return the directory of downloads and prepared datasets: $GLASSGPT_CACHE, or the system's for the user."""
    return Path(os.environ.get("GLASSGPT_CACHE") or platformdirs.user_cache_dir("glassgpt")).expanduser().absolute()


def download(url: str, path: Path, sha256: str, what: str, manual: str) -> Path:
    """Download `url` to `path`, unless a file with this sha256 is there already, and return `path`.

    `what` names the file in errors, and `manual` says there what to do without network. Raises `UserError` if the
    download fails or is another file; nothing is left at `path` then.
    """
    with explain_os_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(f".{path.name}.lock")):  # two processes may want the same file
            if path.is_file() and sha256_of(path) == sha256:
                return path
            content = _get(url, f"cannot download {what} from {url}", manual)
            if (actual := hashlib.sha256(content).hexdigest()) != sha256:
                raise UserError(f"{url} is not {what}: its sha256 is {actual}, not {sha256}\n{manual}")
            write_atomic(path, content)
    return path


def _get(url: str, failure: str, manual: str) -> bytes:
    """Return the content of a URL, asked for again after errors that may pass. Raises `UserError`."""
    opener = urllib.request.build_opener()  # `urlopen` would keep the proxies of its first use
    request = urllib.request.Request(url, headers={"User-Agent": "glassgpt"})
    for attempt in range(_ATTEMPTS):
        time.sleep(_PAUSE * 2 ** (attempt - 1) if attempt else 0)
        try:
            with opener.open(request, timeout=_TIMEOUT) as response:
                content: bytes = response.read(_LARGEST)
                if response.length and len(content) < _LARGEST:  # bytes that the header promised and nobody sent
                    raise http.client.IncompleteRead(content, response.length)
                return content
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            if error.code not in (408, 429) and error.code < 500:
                break
        except (OSError, http.client.HTTPException) as error:  # no connection, or one that broke
            reason = str(getattr(error, "reason", "") or error or type(error).__name__)
    raise UserError(f"{failure}: {reason}\n{manual}")
