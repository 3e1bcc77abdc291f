"""The page's files, all of them read at the start: no request's path reaches the file system."""

import gzip
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources

TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
    "json": "application/json",
}
PLOTLY = "plotly.js"
WORTH_COMPRESSING = 4096


@dataclass(frozen=True)
class Asset:
    """A file as it is served."""

    content: bytes
    type: str

    @cached_property
    def etag(self) -> str:
        """Changes with the content."""
        return f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'

    @cached_property
    def compressed(self) -> bytes | None:
        """With gzip, where that is worth it."""
        if len(self.content) < WORTH_COMPRESSING or self.type.startswith("image/png"):
            return None
        return gzip.compress(self.content, compresslevel=6, mtime=0)


Assets = Mapping[str, Callable[[], Asset]]
"""By its name, what gives the file; what is large is read when it is first asked for."""


def page_files() -> dict[str, Asset]:
    """Everything in `static/` by its path below it: `index.html`, `views/text.js`."""
    found: dict[str, Asset] = {}
    folders = [("", resources.files(__package__) / "static")]
    while folders:
        prefix, folder = folders.pop()
        for entry in folder.iterdir() if folder.is_dir() else ():
            name = f"{prefix}{entry.name}"
            ending = entry.name.rpartition(".")[2]
            if entry.is_dir():
                folders.append((f"{name}/", entry))
            elif ending in TYPES:
                found[name] = Asset(entry.read_bytes(), TYPES[ending])
    return found


def plotly_script() -> Asset:
    """The charts' library, 5 MB, out of the installed wheel."""
    from plotly.offline import get_plotlyjs

    return Asset(get_plotlyjs().encode(), TYPES["js"])
