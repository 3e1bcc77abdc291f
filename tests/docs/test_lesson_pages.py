"""The lessons on the site: each control, moved by key to both ends, shows what the notebook computes for that value."""

import re
from html import unescape
from pathlib import Path

import pytest
from playwright.sync_api import Page

import lessons as exporter
from glassgpt.learn.catalog import Lesson, lessons
from page_harness import chromium

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]  # the site runs all lessons
TEXT = "element => element.textContent"


def plain(markup: str) -> str:
    """Return the text of HTML without its white space."""
    return "".join(unescape(re.sub(r"<[^>]*>", "", markup)).split())


@pytest.mark.parametrize("lesson", lessons(), ids=lambda lesson: lesson.path.stem)
def test_controls_show_what_the_notebook_computes(lesson: Lesson, site: Path) -> None:
    app = exporter.load_app(lesson.path)
    cells = list(exporter.cells_of(lesson.path.read_text(encoding="utf-8")))
    controls = exporter.controls_of(app.run()[1])
    assert controls
    requests = []
    with chromium() as browser:
        page = browser.new_page()
        page.route("**/*", lambda route: route.continue_() if route.request.url.startswith("file:") else route.abort())
        page.on("request", lambda request: requests.append(request.url))
        page.goto((site / "learn" / "lessons" / f"{lesson.path.stem}.html").as_uri())
        for name, control in controls.items():
            assert page.locator(f"[data-control='control-{name}']").count() > 0, f"no result depends on {name}"
            values = list(control.values.values())
            for key, value in (("Home", values[0]), ("End", values[-1])):
                page.locator(f"#control-{name}").press(key)
                expected = [exporter.as_html(x) for x in exporter.run(app, cells, {name: value}) if x is not None]
                texts, found = {plain(text) for text in expected}, shown(page, f"control-{name}")
                assert len(found) == page.locator(f"[data-control='control-{name}']").count()  # one of each is visible
                assert set(found) <= texts, (name, value)
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


def test_answers_are_folded(site: Path) -> None:
    with chromium() as browser:
        page = browser.new_page()
        for lesson in lessons():
            page.goto((site / "learn" / "lessons" / f"{lesson.path.stem}.html").as_uri())
            answers = page.locator("details.answer")
            assert answers.count() >= 3
            assert page.locator("details.answer[open]").count() == 0
            first = answers.nth(0)
            assert not first.locator("pre, p").first.is_visible()
            first.locator("summary").click()
            assert first.locator("pre, p").first.is_visible()


def shown(page: Page, control: str) -> list[str]:
    """Return the texts of the visible results that depend on a control."""
    visible = page.locator(f"[data-control='{control}'] > div:not([hidden])").all()
    assert all(variant.is_visible() for variant in visible)
    return ["".join(str(variant.evaluate(TEXT)).split()) for variant in visible]
