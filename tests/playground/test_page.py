"""The page in a real browser: views, links, keys, window widths, exports, and hostile or long texts.

A request to another host or an error or warning in the console fails a test (see `page_harness`).
"""

import shutil
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit
from xml.etree import ElementTree

import pytest

from glassgpt.playground.model_pool import kept_checkpoints
from glassgpt.tokenizers.base import END_OF_TEXT, bytes_to_unicode
from glassgpt.tokenizers.builtin import BPETokenizer, BytesTokenizer, CharacterTokenizer
from kill_harness import SENTENCE, write_text
from page_harness import VIEWS, MonitoredPage, chromium, monitored_page
from play_harness import GPT2_LIKE, WINDOWED, ServerThread, serving, small_bpe, write_run

TEXT = "the quick brown fox\nthe quick"
HOSTILE = (
    "<b>bold<!-->text</b><img src=x onerror=hacked=1></script><script>hacked=1</script>"
    "<svg onload=hacked=1>&lt;b>]]>'\"`${hacked=1}"
    "\0\1\x1b[31m\x7f\x85\ufffe\r\n\t=1+1\u202e\u0634\u0644\u0645\u2066e\u0301\u0489\u0489\U0001f469\u200d\U0001f680"
    + " " * 400
    + "a"
)
MODELS = ("windowed", "bpe", "characters")


MERGES = [
    "< !",
    "- -",
    "-- >",
    "<! -->",
    "< b",
    "<b >",
    "< /",
    "</ b",
    "</b >",
    "< i",
    "<i m",
    "<im g",
    "& l",
    "&l t",
    "&lt ;",
]
MARKUP = [merge.replace(" ", "") for merge in MERGES]


def markup_bpe() -> BPETokenizer:
    """Return a tokenizer with all bytes and some tokens that are markup.

    Encoding yields only one of them, `<!-->`: text is split into words before merging, which separates the others.
    """
    symbols = [*bytes_to_unicode(), *MARKUP, END_OF_TEXT]
    return BPETokenizer.from_merges({symbol: i for i, symbol in enumerate(symbols)}, MERGES)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return one browser for the module; closing it also ends Playwright's event loop."""
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the paths of runs with two checkpoints each, by name."""
    folder = tmp_path_factory.mktemp("models")
    characters = CharacterTokenizer.from_texts([SENTENCE])
    kinds: dict[str, tuple[dict[str, Any], Any]] = {
        "characters": ({**GPT2_LIKE, "context_length": 48}, characters),
        "bpe": ({**GPT2_LIKE, "context_length": 48}, small_bpe()),
        "windowed": ({**WINDOWED, "context_length": 48}, None),
        "markup": ({**GPT2_LIKE, "context_length": 1024}, markup_bpe()),
        "deep": ({**WINDOWED, "n_layer": 48, "context_length": 48}, None),
        "many heads": ({"n_layer": 12, "n_head": 12, "n_embd": 144, "context_length": 1024}, BytesTokenizer()),
    }
    return {
        name: write_run(folder / name, model, tokenizer, steps=(1, 2)).path
        for name, (model, tokenizer) in kinds.items()
    }


@pytest.fixture(scope="module")
def server(models: dict[str, Path]) -> Iterator[ServerThread]:
    """Return a server for all models."""
    with serving(*models.values()) as served:
        yield served


@pytest.fixture
def page(browser: Any, server: ServerThread) -> Iterator[MonitoredPage]:
    """Return a page as wide as a laptop's screen."""
    with monitored_page(browser, server.url) as opened:
        yield opened


def follow_link(page: MonitoredPage, view: str, **state: Any) -> Any:
    """Follow a link to a view within the open page, which keeps its scripts loaded. Returns Playwright's page."""
    if not page.page.url.startswith(page.url):
        return page.open(view, **state)
    script = """hash => new Promise(done => {
        addEventListener('hashchange', () => setTimeout(done), {once: true});
        location.hash = hash;
    })"""
    page.page.evaluate(script, urlencode({"view": view, **state}))
    return page.ready(view)


def hook(name: str) -> str:
    """Return the CSS selector of an element by its `data-test` name."""
    return f'[data-test="{name}"]'


def colours(page: Any, name: str) -> int:
    """Return the number of colours in a canvas; 1 if nothing is drawn."""
    script = """canvas => {
        const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        return new Set(new Uint32Array(data.buffer)).size;
    }"""
    return int(page.locator(hook(name)).evaluate(script))


def value(page: Any, name: str) -> float:
    """Return the full-precision value of a displayed number."""
    return float(page.locator(hook(name)).get_attribute("data-value"))


# --- views ------------------------------------------------------------------------------------------------------------


def shows_model(page: Any, model: str) -> None:
    layers = 3 if model == "windowed" else 2
    assert page.locator("[data-layer]").count() == layers
    assert page.locator(f"{hook('open-layer')} .model-head").count() == 4
    assert page.locator(hook("kv-head")).count() == (2 if model == "windowed" else 0)
    assert page.locator(f"{hook('flow-top')} tbody tr").count() == 5
    page.locator("[data-layer='1']").click()
    page.wait_for_selector(f"{hook('open-layer')}[aria-label='Layer 1']")


def shows_text(page: Any, model: str) -> None:
    pieces = page.locator(".tokens .token").all_text_contents()
    shown = {" ": "␣", "\n": "⏎"}
    assert "".join(pieces) == "".join(shown.get(c, c) for c in TEXT)
    assert len(pieces) == (len(TEXT) if model != "bpe" else len(small_bpe().encode(TEXT)))
    page.locator(".tokens .token").nth(3).click()
    assert page.locator('[aria-label="Predictions at this position"] tbody tr').count() == 5
    assert page.locator('[aria-label="Token"]').inner_text().count("bits") == 2


def shows_heads(page: Any, model: str) -> None:
    assert (
        min(colours(page, name) for name in ("head-grid", "head-matrix", "row-bars", "term-bars", "value-strips")) > 3
    )
    assert value(page, "weights-sum") == pytest.approx(1, abs=1e-6)  # a sum of about 30 float32 weights
    assert value(page, "difference") < 1e-5
    for name in ("kv-legend", "rotary-strips"):
        assert page.locator(hook(name)).count() == (model == "windowed")
    assert ("the last 5" in page.locator(hook("span")).inner_text()) == (model == "windowed")


def shows_neurons(page: Any, model: str) -> None:
    assert page.locator(f"{hook('neurons-table')} tbody tr").count() == 12
    assert page.locator(f"{hook('neuron-top')} tbody tr").count() == 10
    page.locator(f"{hook('neurons-table')} [data-neuron]").nth(3).click()
    page.wait_for_function("() => new URLSearchParams(location.hash.slice(1)).has('neuron')")
    page.wait_for_function(
        "() => document.activeElement.matches('[data-neuron][aria-pressed=true]')"
    )  # the focus stays
    page.locator(hook("search")).click()
    page.wait_for_selector(f"{hook('neuron-texts')} mark")


def shows_lens(page: Any, model: str) -> None:
    assert (
        min(colours(page, name) for name in ("lens-grid", "stream-grid", "attribution-bars", "attribution-heads")) > 3
    )
    # A horizontal line has no height, so Playwright does not consider it visible.
    page.wait_for_selector(f"{hook('rank-chart')} .scatterlayer .trace path.js-line", state="attached")
    assert page.locator(f"{hook('lens-top')} table").first.locator("tbody tr").count() == 5
    assert value(page, "parts-sum") == pytest.approx(value(page, "logit"), abs=1e-4)


def shows_interventions(page: Any, model: str) -> None:
    layers, heads = (3, 4) if model == "windowed" else (2, 4)
    assert page.locator(f"{hook('switches')} button[data-code]").count() == layers * (heads + 3)
    assert page.locator(hook("kl")).inner_text() == "0 bits"
    page.locator(f"{hook('switches')} [data-code=b1]").click()
    page.wait_for_function("hook => document.querySelector(hook).textContent !== '0 bits'", arg=hook("kl"))
    assert page.locator(f"{hook('change-bars')} .bars-row").count() > 5


def shows_generation(page: Any, model: str) -> None:
    assert page.locator(hook("next-sum")).inner_text() == page.locator(hook("sampled-sum")).inner_text() == "1.000000"
    assert page.locator(f"{hook('next-bars')} .bars-row:visible").count() == 25
    before = page.locator(hook("generated")).inner_text()
    page.locator(hook("accept")).click()
    page.wait_for_function(
        "([hook, before]) => document.querySelector(hook).innerText.length > before",
        arg=[hook("generated"), len(before)],
    )
    page.locator(hook("generate")).click()
    page.wait_for_function("hook => document.querySelector(hook).textContent.includes('tokens in')", arg=hook("speed"))
    assert all(page.locator(".continuation").all_inner_texts())


def shows_weights(page: Any, model: str) -> None:
    assert min(colours(page, name) for name in ("map", "weight")) > 3
    assert page.locator(f"{hook('near-bars')} .bars-row:visible").count() == 12
    page.locator(hook("gradients")).click()
    page.wait_for_selector(f"{hook('gradient-bars')} .bars-row")
    assert "nats" in page.locator(hook("gradient-loss")).inner_text()


def shows_training(page: Any, model: str) -> None:
    facts = page.locator('[aria-label="Run"] .facts').all_inner_texts()
    assert any("checkpoints\n1, 2" in text for text in facts)
    assert "no snapshots" in page.locator(hook("snapshot-problem")).inner_text()


def shows_compare(page: Any, model: str) -> None:
    assert page.locator(f"{hook('totals')} tbody tr").count() > 1
    assert page.locator("section.card .token").count() >= 10


SHOWN = {name.removeprefix("shows_"): check for name, check in globals().items() if name.startswith("shows_")}


@pytest.mark.parametrize("model", [MODELS[0], *(pytest.param(model, marks=pytest.mark.slow) for model in MODELS[1:])])
def test_every_view_shows_its_values_without_errors(page: MonitoredPage, models: dict[str, Path], model: str) -> None:
    assert list(SHOWN) == list(VIEWS)
    for view, check in SHOWN.items():
        check(follow_link(page, view, model=models[model], text=TEXT), model)
        assert page.problems == [], view


# --- a run in training ------------------------------------------------------------------------------------------------

# Slow training that waits for a signal file at steps 60 and 300, so that the page always catches up.
TRAINER = """
import sys, time
from pathlib import Path
from kill_harness import Quiet, tiny_config
from glassgpt.training.run import train

text, run, signs = map(Path, sys.argv[1:])
cadence = {"steps": 300, "eval_every": 25, "checkpoint_every": 100, "keep_checkpoints": 3}
config = tiny_config(text, **cadence, batch_tokens=512, micro_batch_size=16)

class Paced(Quiet):
    def step(self, record):
        time.sleep(0.01)
        while record["step"] in (60, 300) and not (signs / str(record["step"])).exists():
            time.sleep(0.01)

train(config, run, progress=Paced())
"""


@contextmanager
def training(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Train a run in another process. Yields the run and the folder in which files named 60 and 300 let it continue."""
    run, signs = folder / "run", folder / "signs"
    signs.mkdir()
    arguments = [sys.executable, "-c", TRAINER, str(write_text(folder / "text.txt")), str(run), str(signs)]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(arguments, cwd=Path(__file__).parents[1], stdout=output, stderr=subprocess.STDOUT)
    try:
        give_up = time.monotonic() + 60
        while not (run / "config.toml").is_file():
            assert (process.poll(), time.monotonic() < give_up) == (None, True), (folder / "output").read_text()
            time.sleep(0.05)
        yield run, signs
    finally:
        process.kill()
        process.wait()


def steps_shown(page: Any) -> tuple[int, int, int]:
    """Return the last step, the largest step of the slider, and the number of points in the loss chart."""
    points = page.locator("[data-test=chart-loss] .chart").evaluate("e => e.data[0].x.length")
    return (
        int(page.locator(hook("run-step")).get_attribute("data-step")),
        int(page.locator(hook("step-range")).get_attribute("max")),
        points,
    )


def newest_requested_snapshot(addresses: list[str]) -> int:
    """Return the step of the newest snapshot that was requested, or -1."""
    parsed = [urlsplit(address) for address in addresses]
    return max((int(dict(parse_qsl(url.query))["step"]) for url in parsed if url.path == "/api/snapshot"), default=-1)


@pytest.mark.slow
def test_a_run_is_followed_while_it_trains(browser: Any, tmp_path: Path) -> None:
    with (
        training(tmp_path) as (run, signs),
        serving(run) as served,
        monitored_page(browser, served.url) as opened,
    ):
        page = opened.open("training")
        page.wait_for_selector(f"{hook('run-state')}[data-state=running]")
        page.wait_for_selector("[data-test=chart-loss] .scatterlayer .trace")
        opened.wait("Number(document.querySelector('[data-test=step-range]').max) > 0")
        page.wait_for_selector(hook("snapshot-lens"))
        page.evaluate("window.isTheSame = true")
        first, n_requests = steps_shown(page), len(opened.requests)
        with page.expect_request(lambda request: newest_requested_snapshot([request.url]) > 60):
            (signs / "60").touch()
        opened.wait(
            """Number(document.querySelector('[data-test=run-step]').dataset.step) > argument[0]
            && Number(document.querySelector('[data-test=step-range]').max) > argument[1]
            && document.querySelector('[data-test=chart-loss] .chart').data[0].x.length > argument[2]""",
            list(first),
        )
        assert page.evaluate("window.isTheSame") is True
        endpoints = {address.partition("?")[0].rpartition("/")[2] for address in opened.requests[n_requests:]}
        assert not endpoints & {"history", "training.js", ""}, "the event stream sends everything except the snapshots"
        assert min(colours(page, name) for name in ("snapshot-heads", "snapshot-lens")) > 3
        opened.wait("!/checkpointsnone yet/.test(document.querySelector('[aria-label=\"Run\"]').textContent)")
        for view in VIEWS:
            page = follow_link(opened, view)
            assert page.locator("#view section.card").count() >= 1
            assert opened.problems == [], view
        page = follow_link(opened, "training", axis="tokens")
        page.wait_for_selector(f"{hook('run-state')}[data-state=running]")
        # Training waits at step 300.
        opened.wait("Number(document.querySelector('[data-test=run-step]').dataset.step) >= 299")
        page = follow_link(opened, "compare")
        names = page.locator(hook("other-step")).locator("option").all_inner_texts()
        listed = {int(name.removeprefix("step ")) for name in names if name.startswith("step ")}
        side_a = int(page.locator(hook("side-a")).inner_text().rpartition(" ")[2])
        assert page.locator(hook("other-step")).input_value() == str(max(listed - {side_a})), (
            "the oldest checkpoint must not be the default, because it is deleted next"
        )
        page = follow_link(opened, "training", axis="tokens")
        (signs / "300").touch()
        page.wait_for_selector(f"{hook('run-state')}[data-state=finished]")
        assert page.locator(hook("run-step")).get_attribute("data-step") == "300"
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            fits(page)


@pytest.mark.slow
def test_compare_offers_the_checkpoints_that_exist_now(browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", GPT2_LIKE, steps=(25, 50))
    with serving(run.path) as served, monitored_page(browser, served.url) as opened:
        opened.open("text", text="the quick")
        write_run(run.path, GPT2_LIKE, steps=(75, 100))
        for step, path in kept_checkpoints(run).items():
            if step < 75:
                shutil.rmtree(path)
        page = follow_link(opened, "compare", text="the quick")
        assert page.locator(f"{hook('totals')} tbody tr").count() > 1
        assert page.locator(hook("other-step")).locator("option").all_inner_texts()[-2:] == ["step 100", "step 75"]


@pytest.mark.slow
def test_compare_replaces_a_deleted_default_checkpoint(browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", GPT2_LIKE, steps=(25, 50, 75))
    with serving(run.path) as served:
        opened = MonitoredPage(browser, served.url)

        def drop(route: Any) -> None:
            if route.request.post_data_json["step"] == 25 and 25 in kept_checkpoints(run):
                shutil.rmtree(kept_checkpoints(run)[25])
            route.fallback()

        opened.page.route("**/api/model", drop)
        try:
            page = opened.open("compare", text="the quick")
            assert page.locator(f"{hook('totals')} tbody tr").count() > 1
            assert page.locator(hook("other-step")).input_value() == "50"
            assert ["400" in problem for problem in opened.problems] == [True]
            page = opened.open("compare", text="the quick", other_step=25)
            assert "no checkpoint of step 25" in page.locator("#view .notice.error").inner_text()
        finally:
            opened.close()


# --- the model as a picture ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_part_of_the_model_opens_its_view(page: MonitoredPage, models: dict[str, Path]) -> None:
    shown = page.open("model", model=models["windowed"], text=TEXT, layer=2, position=9)
    parts: dict[str, tuple[str, dict[str, str]]] = {
        "Token": ("text", {"position": "9"}),
        "Embedding": ("weights", {"table": "embedding", "row": str(ord(TEXT[9]))}),
        "RMSNorm, then attention": ("heads", {"layer": "2", "query": "9"}),
        "RMSNorm, then feed-forward": ("neurons", {"layer": "2", "position": "9"}),
        "Residual stream after": ("lens", {"position": "9", "depth": "3"}),
        "Logits and probabilities": ("generation", {}),
    }
    for part, (view, state) in parts.items():
        shown.get_by_role("button", name=part, exact=True).click()
        page.ready(view)
        assert state.items() <= state_of(shown).items(), part
        shown.go_back()
        page.ready("model")
    shown.locator(".model-head").nth(3).click()
    page.ready("heads")
    state = state_of(shown)
    assert (state["layer"], state["head"], state["query"]) == ("2", "3", "9")
    assert shown.locator(hook("head-facts")).inner_text().startswith("Layer 2, head 3")


@pytest.mark.slow
def test_a_deep_model_folds_its_layers(page: MonitoredPage, models: dict[str, Path]) -> None:
    """Each layer belongs to one row, and a folded row opens one of its layers."""
    shown = page.open("model", model=models["deep"], text=TEXT, layer=20)
    for _ in range(4):
        rows = [
            name.split("–")
            for name in shown.locator("[data-layer]").evaluate_all("rows => rows.map(row => row.dataset.layer)")
        ]
        assert len(rows) <= 9
        assert [i for row in rows for i in range(int(row[0]), int(row[-1]) + 1)] == list(range(48))
        first, last = (int(i) for i in shown.locator("[data-layer].folded").last.get_attribute("data-layer").split("–"))
        before = f"Layer {state_of(shown)['layer']}"
        shown.locator("[data-layer].folded").last.click()
        page.wait("document.querySelector('[data-test=open-layer]').ariaLabel !== argument", before)
        opened = int(state_of(shown)["layer"])
        assert first <= opened <= last
        if opened == 47:
            break
        page.wait("document.querySelector('[data-test=open-layer]').ariaLabel === argument", f"Layer {opened}")


def test_the_picture_of_the_model_keeps_the_focus(page: MonitoredPage, models: dict[str, Path]) -> None:
    shown = page.open("model", model=models["windowed"], text=TEXT)
    shown.locator(".tokens .token").nth(28).focus()
    for position in ("27", "26", "25"):
        shown.keyboard.press("ArrowLeft")
        page.wait("document.querySelector('[data-test=cache-row] .new').title.includes(` at ${argument}:`)", position)
        assert (focused(shown), state_of(shown)["position"]) == (position, position)
    shown.locator("[data-layer='2']").focus()
    shown.keyboard.press("Enter")
    page.wait("document.querySelector('[data-test=open-layer]').ariaLabel === 'Layer 2'")
    assert shown.evaluate("document.activeElement.dataset.layer") == "2"


@pytest.mark.slow
def test_a_link_holds_no_more_generated_tokens_than_it_restores(page: MonitoredPage, models: dict[str, Path]) -> None:
    shown = page.open("model", model=models["windowed"], text=TEXT)
    shown.locator(hook("next-token")).click()
    page.wait("location.hash.includes('paths')")
    tag, _, token = state_of(shown)["paths"].partition("~")
    for tokens, is_disabled in ((299, False), (300, True)):
        shown = follow_link(page, "text", model=models["windowed"], text=TEXT)
        link = {"model": models["windowed"], "text": TEXT, "paths": f"{tag}~{'.'.join([token] * tokens)}"}
        shown = follow_link(page, "model", **link)
        assert shown.locator(hook("next-token")).is_disabled() == is_disabled


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_the_flow_of_a_generated_token_follows_the_preference_for_motion(
    page: MonitoredPage, models: dict[str, Path], motion: str
) -> None:
    page.page.emulate_media(reduced_motion=motion)
    shown = page.open("model", model=models["windowed"], text=TEXT)
    shown.locator(hook("next-token")).click()
    page.wait("document.querySelectorAll('.tokens .token').length === 30")
    running = "document.querySelector('[data-test=model]').getAnimations({subtree: true}).length"
    assert (shown.evaluate(running) > 10) == (motion == "no-preference")
    state = state_of(shown)
    shown.locator(hook("take-back")).click()
    page.wait("document.querySelectorAll('.tokens .token').length === 29")
    assert "paths" in state
    assert "paths" not in state_of(shown)


# --- links and keys ---------------------------------------------------------------------------------------------------


def state_of(page: Any) -> dict[str, str]:
    """Return the state in the page's address."""
    return dict(parse_qsl(urlsplit(page.url).fragment))


def focused(page: Any) -> str:
    """Return the name of the focused element."""
    return str(
        page.evaluate(
            "document.activeElement.id || document.activeElement.dataset.test || document.activeElement.dataset.i || ''"
        )
    )


def texts_of_heads(page: Any) -> list[str]:
    """Return the texts about the selected head and row."""
    return [page.locator(hook(name)).inner_text() for name in ("head-facts", "span", "row-table", "weights-sum")] + [
        page.locator("#text").input_value()
    ]


@pytest.mark.slow
def test_a_link_restores_the_selection(
    browser: Any, page: MonitoredPage, models: dict[str, Path], server: ServerThread
) -> None:
    shown = page.open("heads", model=models["windowed"], text="a&b=c #%+ é")
    before = texts_of_heads(shown)
    width = shown.locator(hook("head-grid")).bounding_box()["width"]
    side = min(120, (width - 30) / 4)
    shown.locator(hook("head-grid")).click(position={"x": 26 + 2.5 * side, "y": 20 + 1.5 * side})
    page.wait("document.querySelector('[data-test=head-facts]').textContent.startsWith('Layer 1, head 2')")
    shown.locator(hook("head-matrix")).focus()
    for key in ("ArrowUp", "ArrowUp", "ArrowLeft"):
        shown.keyboard.press(key)
    page.wait("document.querySelector('[data-test=row-table]').textContent !== argument", before[2])
    state = state_of(shown)
    assert (state["layer"], state["head"], state["query"], state["text"]) == ("1", "2", "9", "a&b=c #%+ é")
    with monitored_page(browser, server.url) as other:
        other.page.goto(shown.url)
        assert texts_of_heads(other.ready("heads")) == texts_of_heads(shown) != before


@pytest.mark.slow
def test_back_undoes_a_change_of_view_and_of_model(page: MonitoredPage, models: dict[str, Path]) -> None:
    shown = page.open("heads", model=models["windowed"], text=TEXT, layer=2, head=1)
    before = texts_of_heads(shown)
    shown.keyboard.press("2")
    page.ready("text")
    shown.locator("#model").select_option(str(models["bpe"]))
    page.wait("document.querySelectorAll('.tokens .token').length < 29")
    shown.go_back()
    page.wait("document.querySelectorAll('.tokens .token').length === 29")
    assert shown.locator("#model").input_value() == str(models["windowed"])
    shown.go_back()
    assert texts_of_heads(page.ready("heads")) == before
    shown.go_forward()
    page.ready("text")


@pytest.mark.slow
def test_keys_switch_views_theme_model_and_help(page: MonitoredPage, models: dict[str, Path]) -> None:
    shown = page.open("text", model=models["windowed"], text=TEXT)
    for number, view in enumerate(VIEWS, 1):
        shown.keyboard.press(str(number % 10))
        page.ready(view)
    shown.keyboard.press("m")
    assert focused(shown) == "model"
    shown.keyboard.press("Escape")
    theme = "() => document.documentElement.dataset.theme"
    shown.keyboard.press("t")
    assert shown.evaluate(theme) == "dark"
    shown.keyboard.press("?")
    assert shown.locator("dialog.keys").is_visible()
    shown.keyboard.press("2")  # view keys are disabled while the dialog is open
    shown.keyboard.press("Escape")
    assert not shown.locator("dialog.keys").is_visible()
    assert state_of(shown)["view"] == "compare"


def test_the_menu_of_models_has_a_name(page: MonitoredPage, models: dict[str, Path]) -> None:
    shown = page.open("text", model=models["windowed"], text=TEXT)
    assert shown.get_by_role("combobox", name="Model", exact=True).input_value() == str(models["windowed"])


def test_typing_a_text_triggers_no_shortcuts(page: MonitoredPage, models: dict[str, Path]) -> None:
    shown = page.open("text", model=models["windowed"], text="")
    shown.keyboard.press("/")
    assert focused(shown) == "text"
    shown.keyboard.press("Control+a")
    shown.keyboard.type("2t?m/ 1")
    page.wait("document.querySelectorAll('.tokens .token').length === 7")
    assert shown.locator("#text").input_value() == state_of(shown)["text"] == "2t?m/ 1"
    assert state_of(shown)["view"] == "text"
    assert "theme" not in state_of(shown)
    assert not shown.locator("dialog.keys").is_visible()
    shown.keyboard.press("Escape")
    shown.keyboard.press("3")
    page.ready("heads")


def test_an_emptied_text_shows_the_default_text(page: MonitoredPage, models: dict[str, Path]) -> None:
    shown = page.open("text", model=models["windowed"], text="abc")
    area = shown.locator("#text")
    area.fill("")
    page.wait("document.querySelectorAll('.tokens .token').length > 3")
    default = area.get_attribute("placeholder")
    assert default
    area.blur()
    assert area.input_value() == default


def test_arrow_keys_walk_through_tokens_and_heads(page: MonitoredPage, models: dict[str, Path]) -> None:
    shown = page.open("text", model=models["windowed"], text=TEXT)
    shown.locator(".tokens .token").first.focus()
    for key, position in (
        ("ArrowRight", "1"),
        ("ArrowRight", "2"),
        ("End", "28"),
        ("ArrowRight", "28"),
        ("ArrowLeft", "27"),
        ("Home", "0"),
    ):
        shown.keyboard.press(key)
        assert (focused(shown), state_of(shown).get("position")) == (position, position), key
        assert shown.locator(".tokens [aria-pressed=true]").get_attribute("data-i") == position
    shown = page.open("heads", model=models["windowed"], text=TEXT)
    shown.locator(hook("head-grid")).focus()
    for key, layer, head in (
        ("ArrowRight", 0, 1),
        ("ArrowDown", 1, 1),
        ("End", 1, 3),
        ("ArrowRight", 1, 3),
        ("Home", 1, 0),
    ):
        shown.keyboard.press(key)
        page.wait(
            "document.querySelector('[data-test=head-facts]').textContent.startsWith(argument)",
            f"Layer {layer}, head {head}",
        )
        assert shown.locator("#live").inner_text().startswith(f"layer {layer}, head {head}, key/value head {head // 2}")


@pytest.mark.slow
@pytest.mark.parametrize("view", ["model", "heads", "generation"])
def test_tab_reaches_every_control(page: MonitoredPage, models: dict[str, Path], view: str) -> None:
    shown = page.open(view, model=models["windowed"], text=TEXT)
    for chart in shown.locator(".chart").all():  # a chart is drawn when it is scrolled into view
        chart.scroll_into_view_if_needed()
        chart.locator(".modebar").wait_for(state="attached")
    page.wait("document.getElementById('busy').hidden")
    count_focusable = """() => {
        const all = document.querySelectorAll('a, button, select, input, textarea, [tabindex]');
        const reachable = [...all].filter(e => e.tabIndex >= 0 && !e.disabled && e.checkVisibility());
        reachable.forEach((e, i) => { e.dataset.reached = i; });
        return reachable.length;
    }"""
    expected, reached = shown.evaluate(count_focusable), set()
    for _ in range(expected):
        shown.keyboard.press("Tab")
        place, outline, name = shown.evaluate("""() => {
            const e = document.activeElement, {outlineStyle, outlineWidth} = getComputedStyle(e);
            const width = outlineStyle === 'none' ? 0 : parseFloat(outlineWidth);
            return [e.dataset.reached, width, e.outerHTML.slice(0, 200)];
        }""")
        assert outline == 2, name
        reached.add(place)
    assert len(reached) == expected > 20


# --- widths and themes ------------------------------------------------------------------------------------------------

WIDTHS = (390, 820, 1280)


def fits(page: Any) -> None:
    """Assert that nothing is wider than the window after the charts were resized."""
    script = """async () => {
        const isTooWide = () => document.documentElement.scrollWidth > innerWidth;
        for (let tries = 0; tries < 100 && isTooWide(); tries++) await new Promise(done => setTimeout(done, 20));
        if (!isTooWide()) return [];
        const wide = [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth);
        return [location.hash, innerWidth, ...wide.slice(0, 9).map(e => e.outerHTML.slice(0, 200))];
    }"""
    assert page.evaluate(script) == []


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bpe", "windowed"])
def test_every_view_fits_every_width(browser: Any, server: ServerThread, models: dict[str, Path], model: str) -> None:
    with monitored_page(browser, server.url, dark=True) as page:
        for view in VIEWS:
            follow_link(page, view, model=models[model], text=TEXT)
            for width in WIDTHS:
                page.page.set_viewport_size({"width": width, "height": 900})
                fits(page.page)


@pytest.mark.slow
def test_the_theme_follows_the_system_and_the_switch_and_is_kept_in_the_address(
    browser: Any, server: ServerThread, models: dict[str, Path]
) -> None:
    background = "() => getComputedStyle(document.body).backgroundColor"
    backgrounds = []
    for dark in (False, True):
        with monitored_page(browser, server.url, dark=dark) as page:
            shown = page.open("lens", model=models["windowed"], text=TEXT)
            initial, initial_image = (
                shown.evaluate(background),
                shown.locator(hook("lens-grid")).evaluate("canvas => canvas.toDataURL()"),
            )
            shown.locator("[aria-label='Dark or light']").click()
            toggled = shown.evaluate(background)
            assert shown.locator(hook("lens-grid")).evaluate("canvas => canvas.toDataURL()") != initial_image
            backgrounds.append((initial, toggled))
            page.page.reload()
            assert page.ready("lens").evaluate(background) == toggled, "the address keeps the chosen theme"
    (light, toggled_to_dark), (dark_background, toggled_to_light) = backgrounds
    assert (light, toggled_to_dark) == (toggled_to_light, dark_background)
    assert light != dark_background


# --- exports ----------------------------------------------------------------------------------------------------------


def size_of_png(content: bytes) -> tuple[int, int]:
    """Return width and height in pixels from the file's header."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


@pytest.mark.parametrize(
    ("view", "card", "picture"),
    [
        pytest.param("heads", "All heads", hook("head-grid"), id="canvas"),
        pytest.param("lens", "Rank by layer", hook("rank-chart"), id="chart", marks=pytest.mark.slow),
    ],
)
def test_figures_are_saved(page: MonitoredPage, models: dict[str, Path], view: str, card: str, picture: str) -> None:
    shown = page.open(view, model=models["windowed"], text=TEXT)
    box = shown.locator(picture).bounding_box()
    width, height = size_of_png(page.saved(card, "png"))
    # The picture has twice the resolution; the page rounds down to whole pixels.
    assert (width / 2, height / 2) == pytest.approx((box["width"], box["height"]), abs=1)
    svg = ElementTree.fromstring(page.saved(card, "svg"))
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    assert float(svg.attrib["width"]) == pytest.approx(box["width"], abs=1)
    assert len(list(svg.iter())) > 30
    names, *rows = page.csv_of(card)
    assert len(rows) == {"heads": 3 * 4, "lens": 4 * 1}[view]  # one row per head; one row per depth of the top token
    assert all(len(row) == len(names) and float(row[-1]) >= 0 for row in rows)


def test_saved_tokens_have_the_width_and_the_texts_of_the_page(page: MonitoredPage, models: dict[str, Path]) -> None:
    shown = page.open("text", model=models["windowed"], text=TEXT)
    box = shown.locator(".tokens").bounding_box()
    width, _ = size_of_png(page.saved("Tokens", "png"))
    assert width / 2 == pytest.approx(box["width"], abs=1)
    svg = ElementTree.fromstring(page.saved("Tokens", "svg"))
    texts = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == shown.locator(".tokens button").all_text_contents()


@pytest.mark.slow
def test_the_saved_picture_of_the_model_is_what_the_page_shows(page: MonitoredPage, models: dict[str, Path]) -> None:
    """The saved picture holds all vectors, and each character of the text as often as the page."""
    shown = page.open("model", model=models["windowed"], text=TEXT)
    picture = shown.locator(hook("model"))
    width, height = size_of_png(page.saved("Model", "png"))
    box = picture.bounding_box()
    assert (width / 2, height / 2) == pytest.approx((box["width"], box["height"]), abs=1)
    svg = ElementTree.fromstring(page.saved("Model", "svg"))
    space = "{http://www.w3.org/2000/svg}"
    assert len(list(svg.iter(f"{space}image"))) == picture.locator("canvas").count() > 10
    saved = " ".join(element.text or "" for element in svg.iter(f"{space}text"))
    assert Counter("".join(saved.split())) == Counter("".join(picture.inner_text().split()))
    assert "Adds nothing here:" in saved


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_restarted_server_asks_for_its_token(browser: Any, models: dict[str, Path]) -> None:
    """The page addresses models by number, so an open page would show another model under the old name.

    A restarted server has a new token, so the page must log in and load the list of models again.
    """
    with serving(models["characters"]) as first, monitored_page(browser, first.url) as page:
        port = first.client.port
        page.open("text", model=models["characters"], text="abc")
        first.stop()
        with serving(models["windowed"], models["characters"], port=port, token="another"):
            page.page.keyboard.press("3")
            page.ready("login")
            page.page.locator(hook("token")).fill("wrong")
            page.page.get_by_role("button", name="Log in").click()
            page.page.wait_for_selector(f"{hook('login')}:has-text('wrong')")
            page.page.locator(hook("token")).fill("another")
            page.page.get_by_role("button", name="Log in").click()
            page.ready("heads")
            facts = page.page.locator('[data-test="head-grid"]').get_attribute("aria-label")
            assert facts is not None
            assert page.page.locator("#model").input_value() == str(models["characters"])
            # Only the other model shares key/value heads.
            assert page.page.locator('[data-test="kv-legend"]').count() == 0
        page.problems = [
            problem for problem in page.problems if "401" not in problem and "ERR_CONNECTION" not in problem
        ]


def test_the_address_with_the_token_logs_in(browser: Any, models: dict[str, Path]) -> None:
    with serving(models["characters"], token="secret") as served:
        page = MonitoredPage(browser, served.url, token=None)
        try:
            page.page.goto(f"{served.url}#view=text&token=secret")
            page.ready("text")
            assert "token" not in page.page.url
            assert "view=text" in page.page.url
            page.page.reload()  # the browser keeps the cookie
            page.ready("text")
            assert page.problems == []
        finally:
            page.close()


def test_a_missing_model_is_an_error(browser: Any, models: dict[str, Path]) -> None:
    with serving(models["characters"]) as served, monitored_page(browser, served.url) as page:
        page.page.goto(f"{served.url}#view=text&model=runs/none")
        page.ready("error")
        assert "runs/none" in page.page.locator("#view").inner_text()
        page.page.locator("#model").select_option(str(models["characters"]))
        page.ready("text")


@pytest.mark.slow
def test_a_text_that_is_too_long_is_an_error(browser: Any, models: dict[str, Path]) -> None:
    with serving(models["characters"]) as served, monitored_page(browser, served.url) as page:
        for view in ("text", "heads", "lens", "interventions", "compare"):
            page.page.goto("about:blank")
            page.page.goto(f"{served.url}#view={view}&text={'abc' * 100}")
            page.ready("error")
            assert "shorten it" in page.page.locator("#view").inner_text()
            assert page.page.locator("#view canvas").count() == 0
        page.open("generation", text="abc" * 100)


# --- hostile and long texts -------------------------------------------------------------------------------------------


def elements_of_text(page: Any) -> list[str]:
    """Return the elements that the hostile text could have created, and "ran" if one of its scripts ran."""
    selector = "main :is(img, script, b, i, iframe, object), main svg[onload]"
    script = f"() => [...document.querySelectorAll('{selector}')].map(e => e.outerHTML)"
    return [*page.evaluate(script), *(["ran"] if page.evaluate("() => 'hacked' in window") else [])]


SYMBOLS = [*bytes_to_unicode(), *MARKUP]
BOLD = SYMBOLS.index("<b>")


@pytest.mark.slow
def test_markup_and_scripts_in_a_text_are_shown_as_text(page: MonitoredPage, models: dict[str, Path]) -> None:
    ids = markup_bpe().encode(HOSTILE)
    for view in VIEWS:
        shown = follow_link(page, view, model=models["markup"], text=HOSTILE, row=BOLD, track=BOLD)
        if view == "weights":
            assert "<b>" in shown.locator(hook("near-of")).inner_text()
        if view == "generation":
            shown.locator(hook("find")).fill("<b>")
            assert "<b>" in shown.locator(hook("matches")).inner_text()
        assert elements_of_text(shown) == [], view
        assert page.problems == [], view
        fits(shown)
    shown = page.open("text", model=models["markup"], text=HOSTILE)
    pieces = shown.locator(".tokens .token").all_text_contents()
    assert len(pieces) == len(ids)
    assert "<!-->" in pieces
    assert "".join(pieces).startswith(HOSTILE[:60].replace(" ", "␣"))
    rows = page.csv_of("Tokens")
    assert [row[1] for row in rows[1:]] == [str(i) for i in ids]
    assert "".join(row[2].removeprefix("'") for row in rows[1:]).startswith(HOSTILE[:60].replace(" ", "␣")), (
        "a cell that begins with = is quoted, so that it is not a formula"
    )
    shown = page.open("heads", model=models["markup"], text=HOSTILE[:12], layer=1)
    svg = ElementTree.fromstring(page.saved("One head", "svg"))
    assert any((element.text or "").startswith("< ") for element in svg.iter()), (
        "an axis label is the token and its position"
    )
    shown = page.open("generation", model=models["markup"], text=HOSTILE[:100])
    assert HOSTILE[:100].replace(" ", "␣") in shown.locator(hook("generated")).inner_text()


@pytest.mark.slow
def test_markup_in_a_chart_is_shown_as_text(page: MonitoredPage, models: dict[str, Path]) -> None:
    watch = [SYMBOLS.index(text) for text in ("<b>", "</b>", "<img", "&lt;")]
    shown = page.open("lens", model=models["markup"], text=HOSTILE[:60], track=",".join(map(str, watch)), position=5)
    shown.wait_for_selector(f"{hook('rank-chart')} .legendtext", state="attached")
    names = shown.locator(f"{hook('rank-chart')} .legendtext").all_text_contents()
    chips = [text.removesuffix(" ×") for text in shown.locator(f"{hook('tracked')} button").all_inner_texts()]
    assert {"<b>", "</b>", "<img", "&lt;"} == set(chips)
    assert set(chips) <= set(names)
    assert elements_of_text(shown) == []
    svg = ElementTree.fromstring(page.saved("Rank by layer", "svg"))
    assert {"<b>", "&lt;"} <= {"".join(element.itertext()) for element in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {row[2] for row in page.csv_of("Rank by layer")} >= {"<b>", "&lt;"}


TILE_BYTES = 4 * 1024**2  # the float32 weights (1024, 1024) of one head


@pytest.mark.slow
def test_a_long_text_loads_one_head_at_a_time(page: MonitoredPage, models: dict[str, Path]) -> None:
    answers: list[Any] = []
    page.page.on("response", lambda answer: answers.append(answer))
    shown = page.open("heads", model=models["many heads"], text=(SENTENCE * 12)[:1024])

    def sizes_by_endpoint() -> dict[str, list[int]]:
        sizes: dict[str, list[int]] = {"attention": [], "head": [], "vectors": []}
        for answer in answers:
            sizes.get(answer.url.rpartition("/")[2], []).append(int(answer.headers.get("content-length", 0)))
        return sizes

    first = sizes_by_endpoint()
    assert {name: len(sizes) for name, sizes in first.items()} == {"attention": 1, "head": 1, "vectors": 1}
    assert first["head"][0] == pytest.approx(TILE_BYTES, abs=1000)  # and a header
    assert first["attention"][0] < TILE_BYTES / 10, "144 thumbnails are smaller than one head"
    assert first["vectors"][0] < TILE_BYTES / 10
    for name, keys in (("head-matrix", ["ArrowUp", "ArrowLeft"] * 5), ("head-grid", ["ArrowRight", "ArrowDown"] * 3)):
        shown.locator(hook(name)).focus()
        for key in keys:
            shown.keyboard.press(key)
            shown.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        if name == "head-matrix":
            assert sizes_by_endpoint() == first, "selecting another row of the same head sends no request"
    page.wait("document.querySelector('[data-test=head-facts]').textContent.startsWith('Layer 3, head 3')")
    assert [len(sizes) <= limit for sizes, limit in zip(sizes_by_endpoint().values(), (1, 7, 7), strict=True)] == [
        True
    ] * 3


# --- without a server -------------------------------------------------------------------------------------------------


GONE = "The server does not answer. Is `glassgpt play` still running?"


@pytest.mark.parametrize("when", ["before the charts are loaded", pytest.param("afterwards", marks=pytest.mark.slow)])
def test_a_stopped_server_is_an_error(browser: Any, models: dict[str, Path], when: str) -> None:
    with serving(models["windowed"]) as served:
        page = MonitoredPage(browser, served.url)
        if when != "afterwards":
            page.page.route("**/plotly.js", lambda route: route.abort())
        shown = page.open("heads", text=TEXT)
        shown.locator(hook("distance-chart")).scroll_into_view_if_needed()
        if when == "afterwards":
            shown.wait_for_selector(f"{hook('distance-chart')} .main-svg", state="attached")
    try:
        shown.locator(hook("head-grid")).focus()
        shown.keyboard.press("ArrowRight")
        card = shown.locator("[aria-label='One head'] .notice.error")
        card.wait_for()
        assert card.inner_text() == GONE
        if when != "afterwards":
            shown.wait_for_selector(f"{hook('distance-chart')} .notice")
        shown.keyboard.press("2")
        page.ready("error")
        assert shown.locator("#view").inner_text() == GONE
        shown.locator("#text").fill("another")
        page.wait("location.hash.includes('text=another')")
        page.ready("error")
        assert shown.locator("#view").inner_text() == GONE
        assert all("Failed to load resource" in problem for problem in page.problems), page.problems
    finally:
        page.close()
