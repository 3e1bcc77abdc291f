"""Open a page of a local server in the user's browser, without its token on a command line, which other users see."""

import html
import os
import sys
import tempfile
import webbrowser
from functools import partial
from pathlib import Path

from glassgpt.utils.threads import in_background


def open_in_browser(url: str) -> Path | None:
    """Open a file that only this user can read and that leads to `url`. Returns it, to be removed when the server ends.

    Returns None without a window system: Python would open a browser that runs in this terminal.
    """
    if sys.platform == "linux" and not os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY", "BROWSER"}:
        return None
    with tempfile.NamedTemporaryFile("w", prefix="glassgpt-", suffix=".html", delete=False) as file:  # mode 0600
        file.write(f'<!doctype html><meta http-equiv="refresh" content="0; url={html.escape(url)}">')
    path = Path(file.name)
    in_background(partial(webbrowser.open, path.as_uri()), "glassgpt-browser")
    return path
