"""The numbers on the page, in a real browser, equal the values in the model's tensors.

The library or PyTorch computes the tensors. The page's numbers are read from its CSVs, which contain them in full
precision, from its elements, and from the pixels of its canvases. JavaScript prints float32 exactly, so results of the
same call are equal.
`ROUNDING` applies to float32 sums in another order, `PAGE` to sums that the page computes in float64.
"""

import csv
import dataclasses
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from allpairspy import AllPairs
from torch import Tensor

import glassgpt
from glassgpt.config.schema import SamplingConfig
from glassgpt.data.training_data import open_training_data
from glassgpt.generation.generate import sampling_distribution
from glassgpt.interpretability.capture import ActivationCache, capture
from glassgpt.interpretability.interventions import Edit, effects
from glassgpt.interpretability.logit_lens import logit_attribution, logit_lens
from glassgpt.interpretability.snapshots import read_probe, take_probe
from glassgpt.interpretability.weights import principal_components, tables
from glassgpt.model.gpt import GPT, Block, SwiGLU
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.tokenizers.builtin import Tokenizer
from glassgpt.training.run import train
from glassgpt.utils.formatting import escape_token
from kill_harness import Quiet, records_of, tiny_config, write_text
from page_harness import MonitoredPage, chromium, monitored_page
from play_harness import GPT2_LIKE, WINDOWED, serving, small_bpe, write_run
from slot_harness import SLOTS, combined

TEXTS = {"plain": "the theban: abab thé, abbot’s", "windowed": "the theban: abab thé"}
"""Texts of about 20 tokens; one character has several tokens."""
ROUNDING = 2e-5
"""Relative, and absolute near 0: about a hundred float32 roundings of 6e-8 each."""
PAGE = 1e-6
"""Relative: the error of numbers that are recomputed in float64 from float32 vectors of 4 values."""

Floats = npt.NDArray[np.float64]


@dataclass
class Case:
    """A model and its activations for a text."""

    name: str
    text: str
    model: GPT
    tokenizer: Tokenizer
    ids: list[int]
    seen: ActivationCache

    @property
    def logits(self) -> Tensor:
        """Return the logits after each token (T, V)."""
        return logits_of(self.model, self.ids)

    def piece(self, token: int) -> str:
        """Return the display form of a token."""
        return escape_token(self.tokenizer.decode_bytes([token], after=token))


def logits_of(model: GPT, ids: Sequence[int]) -> Tensor:
    """Return the model's logits (T, V)."""
    with torch.no_grad():
        return model(torch.tensor([list(ids)]))[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two models.

    `plain` is like GPT-2 with byte-level BPE; `windowed` has bytes, grouped queries, a window, a soft-cap and RoPE.
    """
    folder = tmp_path_factory.mktemp("values")
    write_run(folder / "plain", GPT2_LIKE, small_bpe())
    write_run(folder / "windowed", WINDOWED)
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """Return a run of ten steps, with a checkpoint and a snapshot after steps 5 and 10."""
    text = write_text(folder / "text.txt")
    config = tiny_config(text, model={"n_layer": 2}, probe={"tokens": 12})
    return train(config, folder / "trained", progress=Quiet())


@pytest.fixture(scope="module")
def url(folder: Path, trained: Path) -> Iterator[str]:
    with serving(folder / "plain", folder / "windowed", trained) as served:
        yield served.url


@pytest.fixture(scope="module", params=["windowed", pytest.param("plain", marks=pytest.mark.slow)])
def case(request: pytest.FixtureRequest, folder: Path) -> Case:
    return case_of(folder / request.param, TEXTS[request.param])


def case_of(path: Path, text: str) -> Case:
    """Return a run's model with its activations for a text."""
    model, tokenizer = glassgpt.load(path)
    assert tokenizer is not None
    ids = [*tokenizer.prompt_prefix, *(int(i) for i in tokenizer.encode(text))]
    with torch.no_grad(), capture(model) as seen:
        model(torch.tensor([ids]))
    return Case(str(path), text, model, tokenizer, ids, seen)


@pytest.fixture(scope="module")
def window(browser: Any, url: str) -> Iterator[MonitoredPage]:
    """One page for all tests.

    Charts are not drawn: Plotly's 5 MB would take half of the time, and a chart's CSV contains the same numbers.
    """
    with monitored_page(browser, url) as page:
        script = "window.Plotly = {react: async () => {}, purge() {}};"
        page.page.route("**/static/plotly.js", lambda route: route.fulfill(content_type="text/javascript", body=script))
        yield page


@pytest.fixture
def shown(window: MonitoredPage) -> Iterator[MonitoredPage]:
    """Return the page, and fail the test if the page recorded a problem."""
    yield window
    problems = window.problems[:]
    window.problems.clear()
    assert problems == []


def assert_close(actual: Any, expected: Any, tolerance: float = 0.0) -> None:
    """Assert equality within a tolerance that is relative, and absolute near 0. A tolerance of 0 requires equality."""
    expected = expected.detach().double().numpy() if isinstance(expected, Tensor) else np.asarray(expected, np.float64)
    assert np.shape(actual) == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def column(rows: list[list[str]], name: str) -> Floats:
    """Return a column of a CSV by its name; empty cells are NaN."""
    at = rows[0].index(name)
    return np.array([float(row[at] or "nan") for row in rows[1:]])


def texts(rows: list[list[str]], name: str) -> list[str]:
    """Return a column of a CSV as texts, without the quote that the page puts before formulas."""
    at = rows[0].index(name)
    return [re.sub(r"^'(?=[=+\-@])", "", row[at]) for row in rows[1:]]


def hook(shown: MonitoredPage, name: str) -> Any:
    """Return an element by its `data-test` name."""
    return shown.page.locator(f'[data-test="{name}"]')


def value(shown: MonitoredPage, name: str) -> float:
    """Return the full-precision value of a displayed number."""
    return float(hook(shown, name).get_attribute("data-value"))


def go(shown: MonitoredPage, **state: Any) -> None:
    """Change keys of the state in the page's address."""
    shown.page.evaluate(
        """(state) => {
            const now = new URLSearchParams(location.hash.slice(1));
            for (const [key, value] of Object.entries(state)) value === null ? now.delete(key) : now.set(key, value);
            location.hash = now;
        }""",
        state,
    )


def facts(shown: MonitoredPage, card: str) -> dict[str, str]:
    """Return the name and value pairs of a card."""
    pairs = shown.page.locator(f'section.card[aria-label="{card}"] dl.facts > div')
    return {pair.locator("dt").inner_text(): pair.locator("dd").inner_text() for pair in pairs.all()}


def number(text: str) -> float:
    """Return the first number in a text of the page."""
    match = re.search(r"−?[\d,]+(\.\d+)?(e−?\d+)?", text)
    assert match, text
    return float(match[0].replace("−", "-").replace(",", ""))


# --- text -------------------------------------------------------------------------------------------------------------


def test_surprisal_equals_pytorchs_cross_entropy(shown: MonitoredPage, case: Case) -> None:
    """The page shows surprisal in bits per token of the text, and its means per token and per byte."""
    shown.open("text", model=case.name, text=case.text, position=3)
    bits = F.cross_entropy(case.logits[:-1], torch.tensor(case.ids[1:]), reduction="none").double() / math.log(2)
    rows = shown.csv_of("Tokens")
    assert texts(rows, "id") == [str(i) for i in case.ids]
    assert "".join(texts(rows, "bytes")) == case.text.encode().hex()
    assert_close(column(rows, "surprisal in bits"), [math.nan, *bits.tolist()], ROUNDING)
    bytes_after_first = len(case.text.encode()) - len(bytes.fromhex(texts(rows, "bytes")[0]))
    page = shown.page.locator('section.card[aria-label="Text statistics"]').inner_text()
    assert f"{bits.mean():.3f} bits per token" in page
    assert f"{bits.sum() / bytes_after_first:.3f} bits per byte" in page
    assert f"{2 ** bits.mean():,.2f}" in page
    token_facts = facts(shown, "Token")
    assert (token_facts["id"], token_facts["surprisal"]) == (str(case.ids[3]), f"{bits[2]:.3f} bits")
    # The page shows tenths of a percent.
    assert number(token_facts["probability"]) / 100 == pytest.approx(2 ** -float(bits[2]), abs=5e-4)
    before = case.logits[2].softmax(dim=-1)
    assert number(token_facts["entropy of the prediction"]) == pytest.approx(
        float(torch.special.entr(before).sum()) / math.log(2), abs=0.005 + 1e-5
    )
    top = before.topk(5)
    lines = shown.page.locator('section.card[aria-label="Predictions at this position"] tbody tr')
    assert lines.locator("th").all_inner_texts() == [case.piece(i) for i in top.indices.tolist()]
    assert_close([number(text) / 100 for text in lines.locator("td:last-child").all_inner_texts()], top.values, 5e-4)


# --- model ------------------------------------------------------------------------------------------------------------


def numbers(shown: MonitoredPage, name: str) -> list[float]:
    """Return the full-precision values of all displayed numbers with this name."""
    return [float(x) for x in hook(shown, name).evaluate_all("all => all.map(one => one.dataset.value)")]


def part(rows: list[list[str]], name: str) -> list[float]:
    """Return the values of a part in the CSV of the model's picture."""
    return [float(row[2]) for row in rows[1:] if row[0] == name]


def close_to_hooks(actual: Any, expected: Any) -> None:
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize(("position", "layer"), [(0, 0), (7, 1), (None, -1)], ids=["first", "middle", "last"])
def test_the_picture_of_the_model_equals_its_activations(
    shown: MonitoredPage, case: Case, position: int | None, layer: int
) -> None:
    """All numbers of the picture, of the open layer and of the others, are those of hooks on the model."""
    check_picture(shown, case, position, layer % case.model.config.n_layer)


@pytest.mark.slow
def test_the_picture_is_right_for_every_pair_of_slots(browser: Any, tmp_path: Path) -> None:
    for number, values in enumerate(AllPairs(list(map(list, SLOTS.values())))):
        config = dataclasses.asdict(combined(dict(zip(SLOTS, values, strict=True))))
        write_run(tmp_path / str(number), config)
    folders = sorted(tmp_path.iterdir())
    with serving(*folders) as served, monitored_page(browser, served.url) as page:
        for folder in folders:
            case = case_of(folder, "the thé")
            check_picture(page, case, 6, 1)
            check_cache(page, case, case.ids[:7])


def check_picture(shown: MonitoredPage, case: Case, position: int | None, layer: int) -> None:
    """Compare all numbers of the picture to the activations; position None is the default, the last token."""
    state = {} if position is None else {"position": position}
    shown.open("model", model=case.name, text=case.text, layer=layer, **state)
    t, seen = len(case.ids) - 1 if position is None else position, case.seen
    rows, one = shown.csv_of("Model"), seen.layers[layer]
    assert (part(rows, "id"), hook(shown, "flow-id").inner_text()) == ([case.ids[t]], str(case.ids[t]))
    vectors = {
        "embedding": case.model.embedding.weight[case.ids[t]], "first": seen.layers[0].resid_pre[0, t],
        "resid_pre": one.resid_pre[0, t], "attn_out": one.attn_out[0, t], "mlp_post": one.mlp_post[0, t],
        "mlp_out": one.mlp_out[0, t], "resid_post": one.resid_post[0, t], "ln_final": seen.ln_final[0, t],
        "logit": case.logits[t], "probability": case.logits[t].softmax(-1),
    }  # fmt: skip
    for name, expected in vectors.items():
        close_to_hooks(part(rows, name), expected)
    norms = {"embedding-norm": "embedding", "first-norm": "first", "pre-norm": "resid_pre", "attn-norm": "attn_out",
             "mlp-norm": "mlp_out", "post-norm": "resid_post", "final-norm": "ln_final"}  # fmt: skip
    for shown_as, name in norms.items():
        close_to_hooks(value(shown, shown_as), vectors[name].norm())
    for name, tensors in {
        "attention-adds": [each.attn_out for each in seen.layers],
        "feed-forward-adds": [each.mlp_out for each in seen.layers],
        "stream-after": [each.resid_post for each in seen.layers],
    }.items():
        close_to_hooks(numbers(shown, name), torch.stack(tensors)[:, 0, t].norm(dim=-1))
    close_to_hooks(numbers(shown, "head-most"), one.pattern()[0, :, t].amax(dim=-1))
    neurons = vectors["mlp_post"]
    assert (value(shown, "active"), value(shown, "largest-neuron")) == (
        int((neurons > 0).sum()),
        int(neurons.abs().argmax()),
    )
    close_to_hooks(value(shown, "largest-value"), neurons[neurons.abs().argmax()])
    top = case.logits[t].topk(5)
    close_to_hooks(numbers(shown, "top-logit"), top.values)
    close_to_hooks(numbers(shown, "top-p"), vectors["probability"][top.indices])
    if position is not None:
        assert hook(shown, "chosen").inner_text() == case.piece(case.ids[t + 1])
        close_to_hooks(value(shown, "chosen-p"), vectors["probability"][case.ids[t + 1]])


def test_next_token_fills_the_cache_as_generation_does(shown: MonitoredPage, case: Case) -> None:
    """Positions and bytes are those of the library's `KVCache` over the same tokens; the tokens those of Generation."""
    text = case.text[:12]
    page = shown.open("model", model=case.name, text=text, temperature=1.5, seed=3)
    prompt, steps = [*case.tokenizer.prompt_prefix, *(int(i) for i in case.tokenizer.encode(text))], 4
    for count in range(steps + 1):
        shown.wait("document.querySelectorAll('.tokens .token').length === argument", len(prompt) + count)
        ids = [
            int(i)
            for i in page.locator(".tokens .token").evaluate_all(
                "all => all.map(one => one.title.match(/id (\\d+)/)[1])"
            )
        ]
        check_cache(shown, case, ids)
        if count < steps:
            chosen = hook(shown, "chosen").inner_text()
            hook(shown, "next-token").click()
            shown.wait("document.querySelectorAll('.tokens .token').length === argument", len(prompt) + count + 1)
            assert page.locator(".tokens .token").last.inner_text() == chosen
    go(shown, view="generation")
    shown.ready("generation")
    assert generated(shown)[0] == ids[len(prompt) :]


def check_cache(shown: MonitoredPage, case: Case, ids: list[int]) -> None:
    """Compare the picture of the cache to a cache that took in the tokens one by one."""
    cache = case.model.new_cache(1, case.model.config.context_length)
    with torch.no_grad():
        for i in ids:
            case.model.hidden(torch.tensor([[i]]), cache)
    kept: dict[int, set[int]] = {}
    for row in hook(shown, "cache-row").all():
        cells = row.locator(".cell").evaluate_all("all => all.map(one => /kept|new/.test(one.className))")
        for layer in row.get_attribute("data-layers").split():
            kept[int(layer)] = {p for p, is_kept in enumerate(cells) if is_kept}
    filled = [layer.k[:, :, : min(layer.length, len(layer.positions))] for layer in cache.layers]
    assert kept == {
        i: set(layer.positions[: k.shape[2]].tolist())
        for i, (layer, k) in enumerate(zip(cache.layers, filled, strict=True))
    }
    assert value(shown, "cache-bytes") == sum(2 * k.numel() * k.element_size() for k in filled)


def test_a_full_context_drops_the_older_half(shown: MonitoredPage, folder: Path) -> None:
    model, _ = glassgpt.load(folder / "windowed")
    page = shown.open("model", model=folder / "windowed", text="a" * model.config.context_length)
    hook(shown, "next-token").click()
    shown.wait("document.querySelectorAll('.tokens .token').length < 24")
    ids = [
        int(i)
        for i in page.locator(".tokens .token").evaluate_all("all => all.map(one => one.title.match(/id (\\d+)/)[1])")
    ]
    assert ids[:-1] == [ord("a")] * (model.config.context_length // 2)
    logits = logits_of(model, ids)[-1]
    close_to_hooks(numbers(shown, "top-logit"), logits.topk(5).values)


# --- feed-forward -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("position", "layer", "neuron"), [(3, 0, None), (None, -1, 5)], ids=["strongest", "chosen"])
def test_neurons_equal_hooks(
    shown: MonitoredPage, case: Case, position: int | None, layer: int, neuron: int | None
) -> None:
    check_neurons(shown, case, position, layer % case.model.config.n_layer, neuron)


@pytest.mark.slow
def test_neurons_are_right_for_every_pair_of_slots(browser: Any, tmp_path: Path) -> None:
    for number, values in enumerate(AllPairs(list(map(list, SLOTS.values())))):
        write_run(tmp_path / str(number), dataclasses.asdict(combined(dict(zip(SLOTS, values, strict=True)))))
    folders = sorted(tmp_path.iterdir())
    with serving(*folders) as served, monitored_page(browser, served.url) as page:
        for folder in folders:
            check_neurons(page, case_of(folder, "the thé"), 6, 1, None)


def check_neurons(shown: MonitoredPage, case: Case, position: int | None, layer: int, neuron: int | None) -> None:
    """Compare values, direct effects and, for a run whose data is not there, the search of the page's text to hooks."""
    state = {name: x for name, x in (("position", position), ("neuron", neuron)) if x is not None}
    shown.open("neurons", model=case.name, text=case.text, layer=layer, search="on", **state)
    t, one = len(case.ids) - 1 if position is None else position, case.seen.layers[layer]
    post, block = one.mlp_post[0], cast(Block, case.model.blocks[layer])
    rows, feed_forward, down = shown.csv_of("Neurons"), block.feed_forward, block.feed_forward.down.weight
    is_gated = isinstance(feed_forward, SwiGLU)
    with torch.no_grad():
        x = block.feed_forward_norm(one.resid_mid[0, t])
        linear = feed_forward.up(x)
        pre = feed_forward.gate(x) if isinstance(feed_forward, SwiGLU) else linear
    close_to_hooks(column(rows, "norm added"), post[t].abs() * down.norm(dim=0))
    expected = {"before SiLU": pre, "gate: after SiLU": F.silu(pre), "value it gates": linear} if is_gated else {
        "before": pre
    }  # fmt: skip
    for name, values in (expected | {"their product" if is_gated else "after": post[t]}).items():
        close_to_hooks(column(rows, name), values)
    listed = post[t].abs().argsort(descending=True, stable=True)[:12]  # ReLU: many are 0
    close_to_hooks(numbers(shown, "neuron-post")[:12], post[t, listed])
    close_to_hooks(numbers(shown, "neuron-pre")[:12], pre[listed])
    assert value(shown, "active") == int((post[t] > 0).sum())
    n = int(listed[0]) if neuron is None else neuron
    close_to_hooks(column(shown.csv_of("Neuron by token"), "value"), post[:, n])
    close_to_hooks(value(shown, "neuron-value"), post[t, n])
    effects = direct_effects(case.model, one=case.seen.layers[-1].resid_post[0, t], w=down[:, n])
    rows = shown.csv_of("What the neuron writes")
    top, bottom = (effects.topk(10, largest=largest) for largest in (True, False))
    assert texts(rows, "id") == [str(i) for i in (*top.indices.tolist(), *bottom.indices.tolist())]
    close_to_hooks(column(rows, "per unit"), torch.cat([top.values, bottom.values]))
    close_to_hooks(column(rows, "here"), torch.cat([top.values, bottom.values]) * post[t, n])
    close_to_hooks(numbers(shown, "top-unit"), top.values)
    close_to_hooks(numbers(shown, "bottom-here"), bottom.values * post[t, n])
    hook(shown, "neuron-texts").locator("mark").wait_for()
    best = 1 + int(post[1:, n].argmax())
    close_to_hooks(numbers(shown, "text-value"), post[best : best + 1, n])
    assert hook(shown, "neuron-texts").locator("mark").inner_text() == case.piece(case.ids[best])


def direct_effects(model: GPT, one: Tensor, w: Tensor) -> Tensor:
    """Return head @ norm(w) in float64, with the norm's scale for the stream `one`."""
    one, w = one.double(), w.detach().double()
    if model.config.norm == "layernorm":
        one, w = one - one.mean(), w - w.mean()
    w = w / (one.square().mean() + model.config.norm_eps).sqrt()
    weight = dict(model.named_parameters()).get("norm.weight")
    head = model.head.weight[: model.vocab_size].detach().double()
    return head @ (w if weight is None else w * weight.detach().double())


def test_the_texts_of_a_neuron_are_those_of_the_validation_split(shown: MonitoredPage, trained: Path) -> None:
    """The listed values are the largest in windows of the split; the search stays for another neuron."""
    model, tokenizer = glassgpt.load(trained)
    assert tokenizer is not None
    config = RunDirectory(trained).read_config()
    stream = open_training_data(config.data, None, lambda line: None).datasets[0].validation
    length = min(128, config.model.context_length)
    count = min(len(stream), 16_384) // length
    starts = [int(i * (len(stream) - length) / max(1, count - 1)) for i in range(count)]
    windows = torch.from_numpy(stream.windows(np.array(starts), length))
    with torch.no_grad(), capture(model) as seen:
        model.hidden(windows)
    shown.open("neurons", model=str(trained), text="the quick", layer=1, neuron=3)
    assert hook(shown, "neuron-texts").locator("li").count() == 0
    hook(shown, "search").click()
    for neuron in (3, 8):
        go(shown, neuron=neuron)
        done = "document.querySelector('[data-test=search]').hidden"
        shown.wait(f"document.querySelector('#view').innerText.includes(argument) && {done}", f"neuron {neuron} has")
        post = seen.layers[1].mlp_post[:, 1:, neuron]
        top = post.amax(dim=1).topk(min(5, count))
        close_to_hooks(numbers(shown, "text-value"), top.values)
        best = [int(windows[row, 1 + int(post[row].argmax())]) for row in top.indices.tolist()]
        names = [escape_token(tokenizer.decode_bytes([i], after=i)) for i in best]
        assert hook(shown, "neuron-texts").locator("mark").all_inner_texts() == names
        assert f"{count * length:,} of {count * length:,} tokens" in hook(shown, "search-status").inner_text()


# --- heads ------------------------------------------------------------------------------------------------------------

SIZES = [(255, 255, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107)]
"""The page's colours for numbers from 0 to 1, in the light theme."""


def colour_of(weight: float) -> list[int]:
    """Return the page's colour (r, g, b) for an attention weight from 0 to 1."""
    place = round(255 * weight) / 255 * (len(SIZES) - 1)
    low = min(len(SIZES) - 2, int(place))
    return [round(a + (b - a) * (place - low)) for a, b in zip(SIZES[low], SIZES[low + 1], strict=True)]


def visible_keys(case: Case, layer: int) -> Tensor:
    """Return which keys each query can see (T, T), by the definition of the window and the global tokens."""
    window, first = case.model.config.windows[layer], case.model.config.window_globals
    t, s = torch.arange(len(case.ids))[:, None], torch.arange(len(case.ids))
    return (s <= t) & ((t - s < window) | (s < first) if window is not None else torch.ones(1, dtype=torch.bool))


def scores_of(case: Case, layer: int, head: int) -> Tensor:
    """Return a head's scores (T, T) before the mask, computed from q and k."""
    seen = case.seen.layers[layer]
    shared_by = seen.rot_q.shape[1] // seen.rot_k.shape[1]
    return seen.rot_q[0, head] @ seen.rot_k[0, head // shared_by].T / math.sqrt(seen.rot_q.shape[-1])


def weights_of(case: Case, layer: int, head: int) -> Tensor:
    """Return a head's attention weights (T, T); masked ones are NaN."""
    scores = scores_of(case, layer, head)
    masked = ~visible_keys(case, layer)
    return scores.masked_fill(masked, -torch.inf).softmax(dim=-1).masked_fill(masked, torch.nan)


def matrix_of(rows: list[list[str]]) -> Floats:
    """Return the values of a CSV whose first row and column are labels."""
    return np.array([[float(cell or "nan") for cell in row[1:]] for row in rows[1:]])


def test_attention_weights_and_pixels_of_two_heads(shown: MonitoredPage, case: Case) -> None:
    """The page shows weights, mask and colours of the first head and of one that is selected with arrow keys."""
    page = shown.open("heads", model=case.name, text=case.text)
    most = max(layer.kernel_error() for layer in case.seen.layers)
    assert value(shown, "difference") == most
    last = case.model.config.n_layer - 1
    for layer, head in ((0, 0), (last, 1)):
        for key in ["ArrowDown"] * layer + ["ArrowRight"] * head:
            hook(shown, "head-grid").press(key)
        shown.wait(
            "document.querySelector('[data-test=head-facts]').textContent.startsWith(argument)",
            f"Layer {layer}, head {head}",
        )
        expected = case.seen.layers[layer].pattern(head)[0]
        assert_close(
            expected.masked_fill(~visible_keys(case, layer), torch.nan), weights_of(case, layer, head), ROUNDING
        )
        assert_close(matrix_of(shown.csv_of("One head")), expected.masked_fill(~visible_keys(case, layer), torch.nan))
        assert_close(pixels_of_cells(page, "head-matrix", len(case.ids)), colours(expected, visible_keys(case, layer)))
        window = case.model.config.windows[layer]
        expected_text = "sees all earlier tokens" if window is None else f"the last {window} tokens, itself included"
        assert expected_text in hook(shown, "span").inner_text()
    entropies = torch.stack(
        [torch.special.entr(layer.pattern()[0]).sum(dim=-1).mean(dim=-1) for layer in case.seen.layers]
    ) / math.log(2)
    assert_close(column(shown.csv_of("All heads"), "mean entropy in bits"), entropies.flatten(), ROUNDING)
    shared = case.model.config.resolved_n_kv_head != case.model.config.n_head
    legend = hook(shown, "kv-legend")
    assert legend.count() == shared
    if shared:
        assert "key/value head 0: query heads 0–1" in legend.inner_text()
        assert "key/value head 1: query heads 2–3" in legend.inner_text()


def colours(weights: Tensor, visible: Tensor) -> Floats:
    """Return the colours (T, T, 3) of a head's matrix; masked cells have the background colour."""
    background = [0xE9, 0xEC, 0xF0]
    return np.array(
        [
            [colour_of(w) if s else background for w, s in zip(*row, strict=True)]
            for row in zip(weights.tolist(), visible.tolist(), strict=True)
        ]
    )


def pixels_of_cells(page: Any, name: str, size: int) -> Floats:
    """Return the pixel (r, g, b) in the middle of each cell of a square matrix."""
    pixels = page.evaluate(
        """([name, size]) => {
            const canvas = document.querySelector(`[data-test="${name}"]`), scale = devicePixelRatio;
            const left = Math.min(92, 0.25 * canvas.clientWidth);
            const cell = Math.min(26, (canvas.clientWidth - left - 1) / size);
            const top = canvas.clientHeight - 1 - cell * size;
            // Read a copy: Chromium warns if the page's own canvas is read more than once.
            const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d');
            copy.drawImage(canvas, 0, 0);
            const {data, width} = copy.getImageData(0, 0, canvas.width, canvas.height);
            const middle = (start, i) => Math.floor(scale * (start + (i + 0.5) * cell));
            const pixel = (r, c) => 4 * (middle(top, r) * width + middle(left, c));
            const cells = Array.from({length: size}, (_, i) => i);
            return cells.map(r => cells.map(c => [...data.slice(pixel(r, c), pixel(r, c) + 3)]));
        }""",
        [name, size],
    )
    return np.array(pixels, dtype=np.float64)


def test_numbers_of_an_attention_row_equal_the_activations(shown: MonitoredPage, case: Case) -> None:
    """Score, dot product, denominator, weight and output are right for visible, global and masked keys."""
    layer, head = 0, 3
    shown.open("heads", model=case.name, text=case.text, layer=layer, head=head)
    seen, sees = case.seen.layers[layer], visible_keys(case, layer)
    scores = scores_of(case, layer, head).double()
    values = seen.v[0, head * seen.v.shape[1] // case.model.config.n_head].double()
    for row, col in ((9, 6), (12, 0), (15, 5), (4, 8)):
        go(shown, query=row, key=col)
        shown.wait(
            "document.querySelector('[data-test=score-lead]').textContent.endsWith(argument)",
            f"at {col}.",
        )
        assert_close(value(shown, "score"), scores[row, col], PAGE)
        assert_close(value(shown, "dot"), scores[row, col] * math.sqrt(seen.rot_q.shape[-1]), PAGE)
        assert_close(value(shown, "weights-sum"), 1.0, PAGE)
        assert hook(shown, "weight").count() == hook(shown, "denominator").count() == int(sees[row, col])
        if sees[row, col]:
            kept, weight = scores[row][sees[row]], seen.pattern(head)[0, row, col]
            assert_close(value(shown, "weight"), weight)
            assert_close(value(shown, "weight-here"), weight, PAGE)
            assert_close(value(shown, "denominator"), (kept - kept.max()).exp().sum(), PAGE)
        assert value(shown, "output-difference") < 1e-5
        if case.model.config.position == "rope":
            unrotated = (
                seen.q_norm[0, head, row].double()
                @ seen.k_norm[0, head // 2, col].double()
                / math.sqrt(seen.rot_q.shape[-1])
            )
            assert_close(value(shown, "score-plain"), unrotated, PAGE)
            assert_close(value(shown, "score-rotated"), scores[row, col], PAGE)
    rows = shown.csv_of("Attention row")
    assert_close(column(rows, "score"), scores[row], PAGE)
    assert [bool(int(cell)) for cell in texts(rows, "visible")] == sees[row].tolist()
    assert_close(column(rows, "norm of value"), values.norm(dim=-1), PAGE)
    lines = {line[0]: [float(cell) for cell in line[1:]] for line in shown.csv_of("Weighted values")[1:]}
    assert_close(lines["output"], seen.kernel_out[0, head, row])
    assert_close(lines["sum"], torch.nan_to_num(weights_of(case, layer, head)[row]).double() @ values, 1e-5)


# --- logit lens -------------------------------------------------------------------------------------------------------


def test_logit_lens_equals_final_norm_and_output_head_at_each_depth(shown: MonitoredPage, case: Case) -> None:
    """PyTorch computes the top tokens, probabilities, ranks, entropies and norms of the residual stream."""
    position, watch = 6, [ord("b"), 101, 3]
    shown.open("lens", model=case.name, text=case.text, position=position, track=",".join(map(str, watch)), depth=1)
    with torch.no_grad():
        stream = torch.stack([x[0] for x in case.seen.residual_stream])
        logits = case.model.logits(case.model.norm(stream))
    p = logits.double().softmax(dim=-1)
    rows = shown.csv_of("Logit lens")
    depths = ["embedding", *(f"layer {i}" for i in range(case.model.config.n_layer))]
    places = [(depths.index(row[1]), int(row[2])) for row in rows[1:]]
    assert {depth for depth, _ in places} == set(range(len(depths)))
    assert len(places) >= len(depths) * 5
    at = tuple(torch.tensor(places).T)
    assert texts(rows, "top token") == [case.piece(i) for i in logits[at].argmax(dim=-1).tolist()]
    assert_close(column(rows, "top probability"), p[at].amax(dim=-1), ROUNDING)
    following = torch.tensor([*case.ids[1:], -1])[at[1]]
    p_next = p[at].gather(-1, following.clamp(min=0)[:, None])
    last = following < 0
    assert_close(column(rows, "probability of the next token"), p_next[:, 0].masked_fill(last, torch.nan), ROUNDING)
    assert_close(
        column(rows, "rank of the next token"), ((p[at] > p_next).sum(dim=-1) + 1).double().masked_fill(last, torch.nan)
    )
    assert_close(column(rows, "entropy in bits"), torch.special.entr(p[at]).sum(dim=-1) / math.log(2), ROUNDING)
    assert_close(column(shown.csv_of("Residual stream norm"), "norm"), stream[at].double().norm(dim=-1), ROUNDING)

    rows = shown.csv_of("Rank by layer")
    here = p[:, position]
    shown_ids = torch.tensor([int(i) for i in texts(rows, "id")])
    depth = torch.tensor([depths.index(name) for name in texts(rows, "depth")])
    assert {case.ids[position + 1], int(here[-1].argmax()), *watch} == set(shown_ids.tolist())
    assert_close(column(rows, "probability"), here[depth, shown_ids], ROUNDING)
    ranks = (here[depth] > here[depth, shown_ids][:, None]).sum(dim=-1) + 1
    assert_close(column(rows, "rank"), ranks)
    for token in watch:
        rank = shown.page.locator(f'[data-rank-of="{token}"]').inner_text()
        assert int(rank) == ranks[(depth == 1) & (shown_ids == token)].item()
    top = hook(shown, "lens-top").locator("table").first.locator("tbody th").all_inner_texts()
    assert top == [case.piece(i) for i in here[1].topk(5).indices.tolist()]


@pytest.mark.parametrize("against", [None, 100])
def test_attribution_sums_to_the_logit(shown: MonitoredPage, case: Case, against: int | None) -> None:
    """The components sum to the logit before the soft-cap, or to the difference of two logits."""
    position, target = 5, 97
    state = {} if against is None else {"against": against}
    shown.open("lens", model=case.name, text=case.text, position=position, target=target, **state)
    attribution = logit_attribution(case.model, case.seen, position, target, against)
    rows = shown.csv_of("Logit attribution")
    assert texts(rows, "part") == [part.name for part in attribution.parts]
    assert_close(column(rows, "contribution"), [part.value for part in attribution.parts])
    heads = [part.value for part in attribution.parts if part.kind == "head"]
    assert_close(matrix_of(shown.csv_of("Attribution by head")).flatten(), heads)
    head = case.model.head.weight.detach().double()
    direction = head[target] - (0 if against is None else head[against])
    # Both sides are float64.
    assert_close(value(shown, "logit"), case.seen.ln_final[0, position].double() @ direction, 1e-12)
    assert_close(value(shown, "parts-sum"), column(rows, "contribution").sum(), 1e-12)
    assert_close(value(shown, "parts-sum"), value(shown, "logit"), 1e-4)


# --- interventions ----------------------------------------------------------------------------------------------------


def kl_in_bits(before: Tensor, after: Tensor) -> float:
    """Return the Kullback–Leibler divergence in bits between the distributions of two logit vectors."""
    p, q = before.double().log_softmax(dim=-1), after.double().log_softmax(dim=-1)
    return float((p.exp() * (p - q)).sum()) / math.log(2)


def check_effect(
    shown: MonitoredPage, case: Case, edits: Sequence[Edit], source: ActivationCache | None = None
) -> None:
    """Assert the logits of the last position before and after the edits, and the surprisal of the text."""
    ids = torch.tensor([case.ids])
    both = effects(case.model, ids, edits, source)
    before, after = (logits[0, -1] for logits in both)
    assert kl_in_bits(before, after) > 1e-4  # otherwise the edit would have no effect to test
    divergence = f"{short(kl_in_bits(before, after))} bits"
    shown.wait("document.querySelector('[data-test=kl]')?.textContent === argument", divergence)
    rows = shown.csv_of("Next token")
    order = [int(i) for i in texts(rows, "id")]
    assert sorted(order) == list(range(case.tokenizer.vocab_size))
    assert_close(column(rows, "logit before"), before[order], ROUNDING)
    assert_close(column(rows, "logit after"), after[order], ROUNDING)
    for name, logits in (("before", before), ("after", after)):
        assert_close(column(rows, name), logits.double().softmax(dim=-1)[order], ROUNDING)
        assert math.fsum(column(rows, name)) == pytest.approx(1, abs=1e-12)
    bits = [float(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")) / math.log(2) for logits in both]
    assert f"{bits[0]:.2f} → {bits[1]:.2f} bits" in hook(shown, "bits").inner_text()
    for name, logits in (("before-bars", before), ("after-bars", after)):
        first = hook(shown, name).locator(".bars-name").all_inner_texts()
        assert first == [case.piece(i) for i in logits.topk(10).indices.tolist()]


def short(x: float) -> str:
    """Return a number below 1,000 as the page formats it."""
    if x >= 0.001:
        return f"{float(f'{x:.3g}'):g}"
    digits, power = f"{x:.1e}".split("e")
    return f"{digits}e−{-int(power)}"


def test_ablations_and_hidden_tokens_change_the_predictions(shown: MonitoredPage, case: Case) -> None:
    """Heads, feed-forward and attention are ablated by zero or the mean; a token is hidden; a reset undoes it all."""
    page = shown.open("interventions", model=case.name, text=case.text)
    page.locator('[data-code="h0.1"]').click()
    check_effect(shown, case, [Edit("head", layer=0, head=1)])
    page.locator('[data-code="f1"]').click()
    check_effect(shown, case, [Edit("head", layer=0, head=1), Edit("feed_forward", layer=1)])
    page.get_by_role("button", name="by the mean").click()
    check_effect(shown, case, [Edit("head", layer=0, head=1, by="mean"), Edit("feed_forward", layer=1, by="mean")])
    hook(shown, "reset").click()
    page.get_by_role("button", name="by zero").click()
    hook(shown, "hide").locator('[data-i="0"]').click()  # a global token, which all queries can see
    check_effect(shown, case, [Edit("position", position=0)])
    page.locator('[data-code="a1"]').click()
    check_effect(shown, case, [Edit("position", position=0), Edit("attention", layer=1)])
    hook(shown, "reset").click()
    shown.wait("document.querySelector('[data-test=kl]').textContent === '0 bits'")
    assert hook(shown, "ablated").inner_text() == "Nothing is ablated."


def test_patching_from_a_second_text(shown: MonitoredPage, case: Case) -> None:
    """The residual stream is patched at all tokens, then a feed-forward at one token."""
    page = shown.open("interventions", model=case.name, text=case.text)
    second = f"{case.text[:-3]}x{case.text[-2:]}"  # a changed character near the end has a large effect
    ids = [*case.tokenizer.prompt_prefix, *(int(i) for i in case.tokenizer.encode(second))]
    with torch.no_grad(), capture(case.model) as source:
        case.model(torch.tensor([ids]))
    hook(shown, "second-text").fill(second)  # the page reads the text without Enter
    card = hook(shown, "patching")
    hook(shown, "patch").click()
    check_effect(shown, case, [Edit("residual", layer=0, by="patch")], source)
    hook(shown, "patches").get_by_role("button").click()
    place = next(i for i, (a, b) in enumerate(zip(case.ids, ids, strict=True)) if a != b)
    card.get_by_label("patch", exact=True).select_option("f")
    card.get_by_label("at", exact=True).select_option(str(place))
    hook(shown, "patch").click()
    check_effect(shown, case, [Edit("feed_forward", layer=0, position=place, by="patch")], source)
    page.wait_for_selector(f'[data-test=patches] button:has-text("token {place}")')


def test_head_importance_is_the_divergence_after_ablating_each_head_alone(shown: MonitoredPage, case: Case) -> None:
    shown.open("interventions", model=case.name, text=case.text)
    hook(shown, "heads-sweep-start").click()
    shown.wait("document.getElementById('live').textContent.endsWith(': done')")
    # The cells must be repainted when their values change in place.
    count_background_pixels = """canvas => {
        const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        let n = 0;
        for (let i = 0; i < data.length; i += 4) n += data[i] === 233 && data[i + 1] === 236 && data[i + 2] === 240;
        return n;
    }"""
    # Less than half a cell; edges of letters have this colour too.
    assert hook(shown, "heads-sweep").evaluate(count_background_pixels) < 300
    ids, config = torch.tensor([case.ids]), case.model.config
    ablations = [
        [Edit("head", layer=layer, head=head)] for layer in range(config.n_layer) for head in range(config.n_head)
    ]
    results = [effects(case.model, ids, edits, position=len(case.ids) - 1) for edits in ablations]
    expected = [kl_in_bits(before[0], after[0]) for before, after in results]
    assert_close(matrix_of(shown.csv_of("Head importance")).flatten(), expected, ROUNDING)


# --- generation -------------------------------------------------------------------------------------------------------

NAMES = ("temperature", "top-k", "top-p", "min-p")
FULL = (0.05, 0.1, 0.25, 0.5, 1)
"""The probabilities that a full bar can stand for; the page uses the smallest that fits."""


def check_distribution(shown: MonitoredPage, case: Case, temperature: float = 0.8, **settings: Any) -> None:
    """Assert the next token's probabilities, the sampling distribution, their sums, and the lengths of the bars."""
    logits = case.logits[-1]
    p = logits.double().softmax(dim=-1)
    q = sampling_distribution(logits[None], SamplingConfig(temperature=temperature, **settings))[0]
    rows = shown.csv_of("Next token")
    order = [int(i) for i in texts(rows, "id")]
    assert sorted(order) == list(range(case.tokenizer.vocab_size))
    assert_close(column(rows, "logit"), logits[order], ROUNDING)
    assert_close(column(rows, "probability"), p[order], ROUNDING)
    assert_close(column(rows, "sampled from"), q[order], ROUNDING)
    assert_close(column(rows, "sampled from") > 0, q[order] > 0)
    for name, hooked in (("probability", "next-sum"), ("sampled from", "sampled-sum")):
        assert math.fsum(column(rows, name)) == pytest.approx(1, abs=1e-12)
        assert hook(shown, hooked).inner_text() == "1.000000"
    assert hook(shown, "next-kept").inner_text() == f"{int((q > 0).sum())} of {len(q)}"
    assert number(hook(shown, "next-entropy").inner_text()) == pytest.approx(
        float(torch.special.entr(p).sum()) / math.log(2), abs=6e-4
    )
    full = next(
        full
        for full in FULL
        if max(column(rows, "probability")[:25].max(), column(rows, "sampled from")[:25].max()) <= full
    )
    assert_close(bars_of(shown)[:, 1], 100 * q[order[:25]] / full, 1e-3)  # the browser stores widths with six digits
    assert_close(bars_of(shown)[:, 0], 100 * p[order[:25]] / full, 1e-3)


def bars_of(shown: MonitoredPage) -> Floats:
    """Return the widths of the bars (25, 2) in percent."""
    widths = shown.page.evaluate(
        """() => [...document.querySelectorAll('[data-test="next-bars"] .bars-track')].map(
            track => [...track.children].map(bar => parseFloat(bar.style.width)))"""
    )
    return np.array(widths)


def slide(shown: MonitoredPage, name: str, to: float) -> None:
    """Move a slider to a value."""
    shown.page.locator(f"[data-test=settings] input[type=range] >> nth={NAMES.index(name)}").evaluate(
        "(input, to) => { input.value = to; input.dispatchEvent(new Event('input', {bubbles: true})); }", to
    )


def test_sliders_change_the_bars(shown: MonitoredPage, case: Case) -> None:
    """For every slider, the page's sampling distribution equals `sampling_distribution` of the model's logits."""
    page = shown.open("generation", model=case.name, text=case.text)
    before = bars_of(shown)
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        page.get_by_label("temperature", exact=True).press(key)
    assert np.abs(bars_of(shown) - before).max() > 0.01
    assert "temperature=0.85" in page.url
    check_distribution(shown, case, temperature=0.85)
    moves: list[tuple[str, float, dict[str, Any]]] = [
        ("temperature", 1.6, {"temperature": 1.6}),
        ("temperature", 0, {"temperature": 0}),
        ("temperature", 0.8, {}),
        ("top-k", 100 * math.log(7) / math.log(case.tokenizer.vocab_size), {"top_k": 7}),
        ("top-p", 0.5, {"top_k": 7, "top_p": 0.5}),
        ("top-k", 100, {"top_p": 0.5}),
        ("min-p", 0.3, {"top_p": 0.5, "min_p": 0.3}),
        ("min-p", 0.6, {"top_p": 0.5, "min_p": 0.6}),
    ]
    for name, to, settings in moves:
        before = bars_of(shown)
        slide(shown, name, to)
        assert np.abs(bars_of(shown) - before).max() > 0.01, name
        check_distribution(shown, case, **settings)


def test_a_link_sets_the_sliders(shown: MonitoredPage, case: Case) -> None:
    page = shown.open("generation", model=case.name, text=case.text)
    go(shown, temperature=1.6, top_p=0.5, seed=7)
    check_distribution(shown, case, temperature=1.6, top_p=0.5)
    for label, value in (("temperature", "1.6"), ("top-p", "0.5"), ("top-k", "100"), ("seed", "7")):
        assert page.get_by_label(label, exact=True).input_value() == value


def generated(shown: MonitoredPage) -> tuple[list[int], Floats]:
    """Return the generated ids and their probabilities."""
    rows = shown.csv_of("Generated text")
    current = [rows[0], *(row for row in rows[1:] if row[0] == "current")]
    return [int(i) for i in texts(current, "id")], column(current, "probability")


def press(shown: MonitoredPage, name: str, tokens: int) -> None:
    """Press a button, then wait until this many tokens are generated and the next distribution is shown."""
    hook(shown, name).click()
    shown.wait(
        "document.querySelectorAll('[data-test=generated] .token').length === argument"
        " && document.querySelector('[data-test=step]').ariaDisabled !== 'true'",
        tokens,
    )


def test_steps_sample_from_the_top_k_and_a_seed_repeats_its_tokens(shown: MonitoredPage, case: Case) -> None:
    shown.open("generation", model=case.name, text=case.text[:-3], top_k=6, temperature=1.5, seed=1)
    start = [*case.tokenizer.prompt_prefix, *(int(i) for i in case.tokenizer.encode(case.text[:-3]))]
    ids_by_run = []
    for seed in (1, 1, 2):
        go(shown, seed=seed)
        for count in range(1, 4):
            press(shown, "step", count)
        ids, p = generated(shown)
        ids_by_run.append(ids)
        logits = logits_of(case.model, [*start, *ids])[len(start) - 1 : -1]
        assert all(token in top for token, top in zip(ids, logits.topk(6).indices.tolist(), strict=True))
        assert_close(p, logits.double().softmax(dim=-1)[range(3), ids], ROUNDING)
        for count in (2, 1, 0):
            press(shown, "back", count)
    assert ids_by_run[0] == ids_by_run[1] != ids_by_run[2]


def test_accept_reject_back_and_branch_change_the_generated_tokens(shown: MonitoredPage, case: Case) -> None:
    shown.open("generation", model=case.name, text=case.text[:-3], top_k=2)
    start = [*case.tokenizer.prompt_prefix, *(int(i) for i in case.tokenizer.encode(case.text[:-3]))]
    press(shown, "accept", 1)
    press(shown, "accept", 2)
    ids, _ = generated(shown)
    greedy = list(start)
    for _ in range(2):
        greedy.append(int(logits_of(case.model, greedy)[-1].argmax()))
    assert ids == greedy[-2:]
    hook(shown, "branch").click()
    hook(shown, "branches").locator(".branch").nth(1).wait_for()
    press(shown, "reject", 2)
    rejected, _ = generated(shown)
    logits = logits_of(case.model, [*start, ids[0]])[-1]
    second, third = logits.topk(3).indices.tolist()[1:]
    assert rejected[0] == ids[0]
    assert rejected[1] in (second, third)  # top-k is applied to the tokens that are not rejected
    press(shown, "back", 1)
    assert generated(shown)[0] == ids[:1]
    hook(shown, "branches").locator(".branch").nth(0).click()
    shown.wait("document.querySelectorAll('[data-test=generated] .token').length === 2")
    assert generated(shown)[0] == ids


def test_continuations_equal_generate(shown: MonitoredPage, case: Case) -> None:
    """The same seed and settings give the same texts and probabilities."""
    settings: dict[str, Any] = {
        "temperature": 1.2,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.01,
        "n": 3,
        "seed": 5,
        "max_new_tokens": 9,
    }
    shown.open(
        "generation",
        model=case.name,
        text=case.text,
        temperature=1.2,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        n=3,
        seed=5,
        max_new_tokens=9,
    )
    hook(shown, "generate").click()
    shown.wait("document.querySelector('[data-test=speed]').textContent.includes('tokens/s')")
    pieces = list(glassgpt.generate(case.model, case.tokenizer, case.text, probabilities=True, **settings))
    expected = ["".join(p.text for p in pieces if p.sample == sample) for sample in range(3)]
    assert shown.page.locator(".continuation").evaluate_all("texts => texts.map(text => text.textContent)") == expected
    rows = shown.csv_of("Continuations")
    assert [int(i) for i in texts(rows, "id")] == [p.token_id for p in pieces]
    assert_close(column(rows, "probability"), [p.probability for p in pieces])
    assert "27 tokens in" in hook(shown, "speed").inner_text()


# --- weights ----------------------------------------------------------------------------------------------------------


def csv_of_export(shown: MonitoredPage, name: str) -> list[list[str]]:
    """Return the CSV of an export by its name."""
    with shown.page.expect_download() as download:
        shown.page.locator(f'.exports[aria-label="Save {name}"] [data-export="csv"]').click()
    return list(csv.reader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"), newline="")))


@pytest.mark.parametrize("which", [0, 1])
def test_embedding_map_and_nearest_neighbours(shown: MonitoredPage, case: Case, which: int) -> None:
    """Two tables have the right principal components, explained variances and nearest rows by cosine similarity."""
    name, table = list(tables(case.model).items())[which]
    token, label = (3, "3") if name == "positions" else (97, case.piece(97))
    shown.open("weights", model=case.name, table=name, row=token)
    assert hook(shown, "near-of").inner_text() == f"{label} ({token})"
    points, explained = principal_components(table)
    rows = shown.csv_of("Embedding map")
    assert_close(np.stack([column(rows, axis) for axis in ("first", "second", "third")], axis=1), points.float())
    first, second, _ = (f"{100 * share:.1f} %" for share in explained.tolist())
    shares = hook(shown, "explained").inner_text()
    assert re.findall(r"component (\d), ([\d.]+ %)", shares) == [("1", first), ("2", second)]
    cosines = F.cosine_similarity(table, table[token][None])
    cosines[token] = -1
    top = cosines.topk(12)
    rows = shown.csv_of("Nearest neighbours")
    assert_close(column(rows, "cosine"), top.values, ROUNDING)
    assert texts(rows, "") == [str(i) if name == "positions" else case.piece(i) for i in top.indices.tolist()]


def test_a_late_answer_does_not_replace_a_newer_one(shown: MonitoredPage, folder: Path) -> None:
    page = shown.open("weights", model=str(folder / "plain"), row=97)
    page.evaluate(
        """() => {
            const {fetch} = window;
            let wait = 250;
            window.answered = 0;
            window.fetch = async (address, ...rest) => {
                const answer = await fetch(address, ...rest);
                if (!String(address).endsWith('/near')) return answer;
                const [mine] = [wait, wait = 0];
                await new Promise(resolve => setTimeout(resolve, mine));
                window.answered++;
                return answer;
            };
        }"""
    )
    go(shown, row=98)
    page.wait_for_timeout(100)
    go(shown, row=99)
    shown.wait("window.answered === 2")
    shown.wait("document.querySelector('[data-test=near-of]').textContent === 'c (99)'")
    page.wait_for_timeout(50)
    assert hook(shown, "near-of").inner_text() == "c (99)"


def test_weights_and_gradients(shown: MonitoredPage, case: Case) -> None:
    """A parameter's values, statistics and singular values and the norms of weights and gradients are PyTorch's."""
    name = "blocks.1.feed_forward.down.weight"
    shown.open("weights", model=case.name, text=case.text, parameter=name)
    weight = case.model.get_parameter(name).detach()
    hook(shown, "weight-facts").wait_for()
    assert_close(matrix_of(shown.csv_of("Parameter")), weight)
    shown_facts = facts(shown, "Parameter")
    assert shown_facts["shape"] == " × ".join(map(str, weight.shape))
    for key, exact in (
        ("Frobenius norm", weight.norm()),
        ("standard deviation", weight.std(correction=0)),
        ("largest magnitude", weight.abs().max()),
    ):
        assert number(shown_facts[key]) == pytest.approx(float(exact), rel=5e-3)  # the page shows three digits
    hook(shown, "spectrum").click()
    hook(shown, "spectrum-facts").wait_for()
    singular = torch.linalg.svdvals(weight.double())
    assert_close(column(csv_of_export(shown, "singular-values"), "y"), singular, PAGE)
    assert number(facts(shown, "Parameter")["spectral norm"]) == pytest.approx(float(singular[0]), rel=5e-3)

    hook(shown, "gradients").click()
    ids = torch.tensor(case.ids)
    case.model.zero_grad()
    loss = F.cross_entropy(case.model(ids[None, :-1])[0], ids[1:])
    loss.backward()  # type: ignore[no-untyped-call]
    assert f"Loss over the {len(ids)} tokens of the text: {loss:.4f} nats." == hook(shown, "gradient-loss").inner_text()
    rows = shown.csv_of("Weight and gradient norms")
    parameters = dict(case.model.named_parameters())
    assert texts(rows, "parameter") == list(parameters)
    assert_close(column(rows, "norm of the weights"), [float(p.detach().norm()) for p in parameters.values()], ROUNDING)
    # The loss is computed in chunks and autograd sums in another order: 10 times the rounding of a forward pass.
    assert_close(
        column(rows, "norm of the gradient"),
        [float(p.grad.norm()) for p in parameters.values() if p.grad is not None],
        10 * ROUNDING,
    )
    case.model.zero_grad()


# --- training ---------------------------------------------------------------------------------------------------------


def series_of(rows: list[list[str]]) -> dict[str, tuple[list[float], list[float]]]:
    """Return x and y of each series of a chart's CSV, by name."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for name, x, y in rows[1:]:
        xs, ys = series.setdefault(name, ([], []))
        xs.append(float(x))
        ys.append(float(y))
    return series


def test_charts_show_the_records_of_the_run(shown: MonitoredPage, trained: Path) -> None:
    """Loss, learning rate, gradient norm, validation loss and weight norms equal those in metrics.jsonl."""
    shown.open("training", model=str(trained))
    records = records_of(trained)
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if record.get("val_loss") is not None]
    assert len(steps) == 10
    loss = series_of(shown.csv_of("Loss"))
    assert loss["each step"] == ([record["step"] for record in steps], [record["loss"] for record in steps])
    assert loss["validation"] == (
        [record["step"] for record in evaluations],
        [record["val_loss"] for record in evaluations],
    )
    for card, name, key in (("Learning rate", "learning rate", "lr"), ("Gradient norm", "each step", "grad_norm")):
        assert series_of(shown.csv_of(card))[name][1] == [record[key] for record in steps]
    parts = series_of(shown.csv_of("Weight norms by parameter group"))
    assert parts["attention"][1] == [
        record["weight_norms"]["attention"] for record in records if "weight_norms" in record
    ]
    assert f"{steps[-1]['loss']:.4f}" in shown.page.locator(".run-facts").inner_text()


def test_a_selected_step_shows_what_its_checkpoint_computes(shown: MonitoredPage, trained: Path) -> None:
    """Attention, logit lens, surprisal and head scores of two steps equal those of the checkpoints."""
    page = shown.open("training", model=str(trained), layer=1, head=1)
    attention_by_step = []
    for step in (10, 5):
        if step == 5:
            hook(shown, "step-range").press("ArrowLeft")
        text = f"Layer 1, head 1, at step {step}"
        page.wait_for_function(
            "(text) => document.querySelector('[data-test=snapshot-head]')?.textContent === text", arg=text
        )
        model, tokenizer = glassgpt.load(f"{trained}@{step}")
        assert tokenizer is not None
        prompt = read_probe(RunDirectory(trained).probe_path(step)).prompts[0]
        taken = take_probe(model, [prompt], [], step)
        seen = {name.removesuffix(".0"): tensor for name, tensor in taken.tensors.items()}
        attention_by_step.append(np.nan_to_num(matrix_of(csv_of_export(shown, "head-of-a-step"))))
        assert_close(attention_by_step[-1], seen["attention"][1, 1].double() / 255)
        weights = torch.cat(
            [torch.zeros(0), *(row[: i + 1] for i, row in enumerate(seen["attention"][1, 1].double() / 255))]
        )
        # Each weight is rounded to a multiple of 1/255.
        assert float(weights.sum()) == pytest.approx(len(prompt.ids), abs=len(weights) / 510)
        rows = shown.csv_of("Logit lens")
        assert_close(column(rows, "top probability"), seen["lens_p"][..., 0].flatten())
        assert_close(
            column(rows, "rank of the next token"),
            (seen["next_rank"] + 1).double().masked_fill(seen["next_rank"] < 0, torch.nan).flatten(),
        )
        names = [
            escape_token(tokenizer.decode_bytes([i], after=i)) for i in seen["lens_ids"][..., 0].flatten().tolist()
        ]
        assert texts(rows, "top token") == names
        assert_close(column(shown.csv_of("Surprisal"), "surprisal in bits"), seen["surprisal"])
        assert_close(column(shown.csv_of("Head scores"), "score"), seen["head_scores"].flatten())
    assert np.abs(attention_by_step[0] - attention_by_step[1]).max() > 1 / 255


@pytest.mark.slow
def test_a_damaged_snapshot_hides_the_cards(shown: MonitoredPage, trained: Path) -> None:
    """The cards must be hidden, because they would show another step under the error."""
    page = shown.open("training", model=str(trained))
    body = '{"error": "the snapshot is damaged"}'
    page.route("**/api/snapshot*", lambda route: route.fulfill(status=400, content_type="application/json", body=body))
    try:
        page.evaluate("location.reload()")
        page.wait_for_selector('[data-test="snapshot-problem"] .notice.error:has-text("damaged")')
        assert not hook(shown, "snapshot-head").is_visible()
    finally:
        page.unroute("**/api/snapshot*")
    assert shown.problems
    assert all("400" in problem for problem in shown.problems)
    shown.problems.clear()


# --- compare ----------------------------------------------------------------------------------------------------------


def surprisal_of(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """Return the bits of each token (T,); the first is NaN."""
    bits = F.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:]), reduction="none") / math.log(2)
    return torch.cat([torch.full((1,), torch.nan, dtype=torch.float64), bits])


def totals_of(shown: MonitoredPage) -> dict[str, list[float]]:
    return {row[0]: [float(cell) for cell in row[1:]] for row in shown.csv_of("Totals")[1:]}


@pytest.mark.slow
def test_comparison_of_two_checkpoints(shown: MonitoredPage, trained: Path) -> None:
    """Bits, top tokens, divergences, ranks by depth and a head of each model equal the library's."""
    text, token = "the quick fox", 4
    shown.open(
        "compare",
        model=str(trained),
        step=10,
        other=str(trained),
        other_step=5,
        text=text,
        position=token,
        head=1,
        other_layer=1,
    )
    logits, ranks, names = [], [], []
    for step, (layer, head), save in ((10, (0, 1), "head-A"), (5, (1, 0), "head-B")):
        model, tokenizer = glassgpt.load(f"{trained}@{step}")
        assert tokenizer is not None
        ids = [int(i) for i in tokenizer.encode(text)]
        with torch.no_grad(), capture(model) as seen:
            logits.append(model(torch.tensor([ids]))[0])
        lens = logit_lens(model, seen, token - 1, token)
        ranks.append((lens.next_rank[:, 0] + 1).tolist())
        names = [escape_token(tokenizer.decode_bytes([i], after=i)) for i in range(tokenizer.vocab_size)]
        assert_close(np.nan_to_num(matrix_of(csv_of_export(shown, save))), seen.layers[layer].pattern(head)[0])
    bits = [surprisal_of(each, ids) for each in logits]
    totals = totals_of(shown)
    for key, tolerance, expected in (("tokens", 0, [len(ids)] * 2), ("bits", 0.0051, [each.nansum() for each in bits])):
        assert_close(totals[key], np.array([float(x) for x in expected]), tolerance)
    # The page shows this many digits.
    assert_close(totals["bits per token"], np.array([float(each.nanmean()) for each in bits]), 0.00051)
    rows = shown.csv_of("Surprisal")
    assert_close(column(rows, "bits under A"), bits[0], ROUNDING)
    assert_close(column(rows, "bits under B"), bits[1], ROUNDING)
    assert_close(column(rows, "B - A"), bits[1] - bits[0], ROUNDING)
    a, b = (each[token - 1].double() for each in logits)
    p, q = a.softmax(dim=-1), b.softmax(dim=-1)
    rows = shown.csv_of("Predictions at this position")
    expected_ids = sorted({*p.topk(10).indices.tolist(), *q.topk(10).indices.tolist()}, key=lambda i: -max(p[i], q[i]))
    assert texts(rows, "token") == [names[i] for i in expected_ids]
    assert_close(column(rows, "probability under A"), p[expected_ids], ROUNDING)
    assert_close(column(rows, "under B"), q[expected_ids], ROUNDING)
    middle = (p + q) / 2
    spread = [float(torch.special.entr(each).sum()) / math.log(2) for each in (p, q, middle)]
    distances = [*spread[:2], kl_in_bits(a, b), kl_in_bits(b, a), spread[2] - (spread[0] + spread[1]) / 2]
    assert_close(column(shown.csv_of("Divergence"), "value"), distances, ROUNDING)
    series = series_of(shown.csv_of("Rank by depth"))
    assert [values for _, values in series.values()] == ranks


def test_comparison_of_models_with_different_tokenizers(shown: MonitoredPage, folder: Path) -> None:
    """Segments are the longer tokens; the bits of the bytes in a segment are summed."""
    text = TEXTS["windowed"]
    shown.open("compare", model=str(folder / "plain"), other=str(folder / "windowed"), text=text)
    bits, ids_by_model = [], []
    for name in ("plain", "windowed"):
        model, tokenizer = glassgpt.load(folder / name)
        assert tokenizer is not None
        ids_by_model.append([int(i) for i in tokenizer.encode(text)])
        bits.append(surprisal_of(logits_of(model, ids_by_model[-1]), ids_by_model[-1]))
    bpe, sizes = small_bpe(), []
    for before, token in zip([None, *ids_by_model[0]], ids_by_model[0], strict=False):
        sizes.append(len(bpe.decode_bytes([token], after=before)))
    summed = torch.stack([part.sum() for part in bits[1].split(sizes)])  # type: ignore[no-untyped-call]
    assert max(sizes) > 1
    rows = shown.csv_of("Surprisal")
    assert [int(cell) for cell in texts(rows, "bytes")] == sizes
    assert_close(column(rows, "bits under A"), bits[0], ROUNDING)
    assert_close(column(rows, "bits under B"), summed, ROUNDING)
    totals = totals_of(shown)
    both = ~(bits[0] + summed).isnan()
    common = np.array([float(each[both].sum()) for each in (bits[0], summed)])
    assert_close(totals["bits of the text that both predicted"], common, 0.0051)  # the page shows this many digits
    assert_close(
        totals["its bits per byte"],
        common / sum(size for size, one in zip(sizes, both.tolist(), strict=True) if one),
        0.00051,
    )
