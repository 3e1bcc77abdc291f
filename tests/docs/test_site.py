"""The built site, opened from disk: links, what pages load, how they fit a screen, and the search."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from page_harness import chromium

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]  # all lessons run once per value of their controls

# Words that a reader would type, and a page that must be among the results.
SEARCHES = {
    "rope": "reference/settings.html",
    "window_pattern": "reference/settings.html",
    "micro_batch_size": "reference/settings.html",
    "perplexity": "guides/evaluate.html",
    "hellaswag": "guides/evaluate.html",
    "parquet": "guides/data.html",
    "deduplicate": "reference/settings.html",
    "torchrun": "guides/several-processes.html",
    "slurm": "guides/slurm.html",
    "resume": "guides/train.html",
    "speedrun": "reference/recipes.html",
    "attention": "explain/architecture.html",
    "capture": "reference/python/interpretability.html",
    "logit lens": "guides/look-inside.html",
    "KVCache": "reference/python/model.html",
    "UserError": "reference/errors.html",
    "bfloat16": "explain/precision.html",
    "transformers": "guides/other-models.html",
    "status.json": "reference/files.html",
    "GLASSGPT_CACHE": "reference/environment.html",
}


@dataclass
class Page(HTMLParser):
    """What a page links to and what a browser loads for it."""

    path: Path
    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        text = self.path.read_text(encoding="utf-8")
        self.feed(text)
        self.loaded += urls_in_css(" ".join(re.findall(r"<style[^>]*>(.*?)</style>", text, re.DOTALL)))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag in ("a", "area"):
            self.links += [values["href"]] if "href" in values else []
        else:
            names = ("src", "href", "xlink:href", "data", "poster", "action")
            self.loaded += [values[name] for name in names if values.get(name)]
            self.loaded += [part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()]
        self.loaded += urls_in_css(values.get("style", ""))


def urls_in_css(text: str) -> list[str]:
    """Return the addresses that a style sheet loads."""
    found = re.findall(r"""url\(\s*["']?(.*?)["']?\s*\)|@import\s+["'](.*?)["']""", text)
    return [first or second for first, second in found]


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_the_site_has_all_sections(site: Path) -> None:
    for name in ("start", "learn", "guides", "reference", "explain", "measured", "project"):
        assert (site / name / "index.html").is_file()


def test_every_link_leads_to_a_page_and_an_anchor(site: Path, pages: dict[Path, Page]) -> None:
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert parts.scheme in ("https", "mailto"), f"{path}: {link}"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            fragment = unquote(parts.fragment)
            is_anchor = not fragment or target not in pages or fragment in pages[target].ids
            if not (target.is_file() and target.is_relative_to(site) and is_anchor):
                dead.append(f"{path.relative_to(site)}: {link}")
    assert dead == []


def test_no_page_names_anything_on_another_host_that_a_browser_loads(site: Path, pages: dict[Path, Page]) -> None:
    loaded = [(path, address) for path, page in pages.items() for address in page.loaded]
    for sheet in site.rglob("*.css"):
        loaded += [(sheet, address) for address in urls_in_css(sheet.read_text(encoding="utf-8"))]
    assert len(loaded) > 10 * len(pages)
    for path, address in loaded:
        parts = urlsplit(address)
        if parts.scheme == "data" or address.startswith("#"):
            continue
        assert not parts.scheme, f"{path}: {address}"
        assert not parts.netloc, f"{path}: {address}"
        assert (path.parent / unquote(parts.path)).is_file(), f"{path}: {address}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


class OfflineTab:
    """A page of a browser that loads files only, and collects all other requests and its errors."""

    def __init__(self, browser: Any, width: int, dark: bool) -> None:
        scheme = "dark" if dark else "light"
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.problems: list[str] = []
        self.context.route("**/*", self._files_only)
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.problems.append(f"{self.page.url}: {error}"))
        self.page.on("console", self._note)

    def _files_only(self, route: Any) -> None:
        if urlsplit(route.request.url).scheme in ("file", "data", "blob"):
            route.continue_()
        else:
            self.problems.append(f"{self.page.url}: request to {route.request.url}")
            route.abort()

    def _note(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"{self.page.url}: {message.text}")


def test_the_checks_notice_other_hosts(browser: Any, tmp_path: Path) -> None:
    hosts = [f"https://{letter}.invalid/x" for letter in "abcd"]
    style = f'@import "{hosts[2]}"; body {{ background: url({hosts[3]}) }}'
    page = tmp_path / "page.html"
    page.write_text(f'<link rel="stylesheet" href="{hosts[0]}"><img src="{hosts[1]}"><style>{style}</style>')
    assert Page(page).loaded == hosts
    tab = OfflineTab(browser, 1280, False)
    tab.page.goto(page.as_uri())
    tab.context.close()
    assert {host for host in hosts if any(f"request to {host}" in problem for problem in tab.problems)} == {*hosts}


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)], ids=["laptop", "phone"])
def test_every_page_opens_offline_and_fits_the_screen(
    browser: Any, site: Path, pages: dict[Path, Page], width: int, dark: bool
) -> None:
    tab = OfflineTab(browser, width, dark)
    for path in pages:
        tab.page.goto(path.as_uri())
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width, path
        assert tab.page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)"), path
    tab.context.close()
    assert tab.problems == []


def test_the_search_finds_words_from_disk(browser: Any, site: Path) -> None:
    tab = OfflineTab(browser, 1280, False)
    for word, wanted in SEARCHES.items():
        tab.page.goto((site / "index.html").as_uri())
        tab.page.locator(".sidebar-search").fill(word)
        tab.page.keyboard.press("Enter")
        tab.page.wait_for_function("/\\d/.test(document.querySelector('.search-summary')?.textContent ?? '')")
        found = tab.page.eval_on_selector_all("#search-results li a", "links => links.map(link => link.href)")
        files = {os.path.relpath(unquote(urlsplit(link).path), site) for link in found}
        assert wanted in files, (word, files)
    tab.context.close()
    assert tab.problems == []


def test_formulas_are_mathml(site: Path, pages: dict[Path, Page]) -> None:
    """No formula was left as TeX, and none needs a script."""
    texts = [path.read_text(encoding="utf-8") for path in pages]
    assert any("<math " in text for text in texts)
    assert not any(
        re.search(r"mathjax[\w.-]*\.js|katex|class=\"math notranslate", text, re.IGNORECASE) for text in texts
    )
