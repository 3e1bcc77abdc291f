"""The playground's page in a real browser. The harness records requests to other hosts and console messages."""

import csv
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest

from play_harness import TOKEN

ARGUMENTS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM_PATHS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
VIEWS = ("model", "text", "heads", "neurons", "lens", "interventions", "generation", "weights", "training", "compare")


def chromium_path(playwright: Any) -> str | None:
    """Return the path of an installed Chromium or Chrome, or of Playwright's own, or None."""
    installed = [shutil.which(name) for name in CHROMIUM_NAMES]
    paths = [*installed, *CHROMIUM_PATHS, playwright.chromium.executable_path]
    return next((path for path in paths if path and Path(path).exists()), None)


@contextmanager
def chromium() -> Iterator[Any]:
    """Start a headless browser. Skip the test if Playwright or a browser is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    root = ["--no-sandbox"] if os.geteuid() == 0 else []  # its sandbox does not start as root
    with api.sync_playwright() as playwright:
        path = chromium_path(playwright)
        if path is None:
            pytest.skip(
                f"no browser: none of {', '.join(CHROMIUM_NAMES)}, and not Playwright's (playwright install chromium)"
            )
        browser = playwright.chromium.launch(executable_path=path, args=[*ARGUMENTS, *root])
        try:
            yield browser
        finally:
            browser.close()


class MonitoredPage:
    """A page of the playground that collects errors, warnings, and requests to other hosts in `problems`."""

    def __init__(
        self,
        browser: Any,
        url: str,
        width: int = 1280,
        height: int = 900,
        dark: bool = False,
        token: str | None = TOKEN,
    ) -> None:
        self.url = url
        self.problems: list[str] = []
        self.requests: list[str] = []
        scheme = "dark" if dark else "light"
        self._context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True
        )
        if token is not None:  # as if logged in
            cookie = {"name": f"glassgpt-{urlsplit(url).port}", "value": token, "url": url}
            self._context.add_cookies([cookie])
        self._context.route("**/*", self._block_other_hosts)
        self.page = self._context.new_page()
        self.page.on("console", lambda message: self._record_message(message.type, message.text))
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.set_default_timeout(20_000)

    def _block_other_hosts(self, route: Any) -> None:
        address = route.request.url
        self.requests.append(address)
        if urlsplit(address).netloc == urlsplit(self.url).netloc or urlsplit(address).scheme in ("data", "blob"):
            route.continue_()
        else:
            self.problems.append(f"request to {address}")
            route.abort()

    def _record_message(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.problems.append(f"{kind}: {text}")

    def open(self, view: str, **state: Any) -> Any:
        """Open a view by its link, wait until it is ready, and return Playwright's page."""
        self.page.goto("about:blank")
        self.page.goto(f"{self.url}#{urlencode({'view': view, **state})}")
        return self.ready(view)

    def ready(self, view: str) -> Any:
        """Wait until a view is ready, and return Playwright's page."""
        self.page.wait_for_selector(f'body[data-ready="{view}"]')
        return self.page

    def wait(self, condition: str, argument: Any = None) -> None:
        """Wait until a JavaScript expression is true. It may use the variable `argument`."""
        self.page.wait_for_function(f"(argument) => {condition}", arg=argument)

    def csv_of(self, card: str) -> list[list[str]]:
        """Return the rows of the CSV that the card with this heading exports."""
        with self.page.expect_download() as download:
            self.page.locator(f'section.card[aria-label="{card}"] [data-export="csv"]').click()
        return list(csv.reader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"), newline="")))

    def saved(self, card: str, kind: str) -> bytes:
        """Return the picture that a card exports as `png` or `svg`."""
        with self.page.expect_download() as download:
            self.page.locator(f'section.card[aria-label="{card}"] [data-export="{kind}"]').click()
        return Path(download.value.path()).read_bytes()

    def close(self) -> None:
        """Close the page."""
        self._context.close()


@contextmanager
def monitored_page(browser: Any, url: str, **size: Any) -> Iterator[MonitoredPage]:
    """Open a page. Fail at the end if there were console errors or warnings, or requests to another host."""
    page = MonitoredPage(browser, url, **size)
    try:
        yield page
        assert page.problems == []
    finally:
        page.close()
