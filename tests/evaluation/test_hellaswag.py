"""HellaSwag: choices equal those of a loop that scores one ending at a time, for any model, batch and rank count."""

import dataclasses
import itertools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from glassgpt.config.model import ModelConfig
from glassgpt.distributed.group import Ranks
from glassgpt.evaluation import hellaswag as module
from glassgpt.evaluation import hellaswag_items
from glassgpt.evaluation.hellaswag import (
    NEAR_TIE,
    Question,
    Score,
    encode,
    evaluate_both_styles,
    group_by_length,
    hash_model,
    make_batches,
    results_name,
    score_batch,
    score_hellaswag,
    summarize,
)
from glassgpt.evaluation.hellaswag_items import (
    STYLES,
    Item,
    Style,
    find_items,
    fingerprint,
    load_items,
    prompt_of,
    read_items,
    subset,
    without_markup,
)
from glassgpt.interop.hf_models import export_hf
from glassgpt.interop.references import LoadedModel
from glassgpt.model.gpt import GPT
from glassgpt.tokenizers.base import bytes_to_unicode
from glassgpt.tokenizers.builtin import BPETokenizer, BytesTokenizer, CharacterTokenizer, Tokenizer
from glassgpt.utils.errors import UserError
from hellaswag_harness import WORDS, some_items
from kill_harness import fast_training


@pytest.fixture(autouse=True, scope="module")
def fast() -> Iterator[None]:
    """Use one thread for the whole module."""
    with fast_training():
        yield


def model_for(tokenizer: Tokenizer, **changes: Any) -> GPT:
    """Return a small random model for the tokenizer's vocabulary."""
    shape: dict[str, Any] = {
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 16,
        "context_length": 256,
        "vocab_multiple": 8,
        "dropout": 0.5,
    }
    model = GPT.create(ModelConfig(vocab_size=tokenizer.vocab_size, **{**shape, **changes}), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return model.eval()


BYTES = BytesTokenizer()


def tokenizer_with_prefix() -> BPETokenizer:
    """Return a tokenizer that puts a special token before each text, like Llama's."""
    vocab = {symbol: i for i, symbol in enumerate(bytes_to_unicode())} | {"Ġa": 256, "<s>": 257}
    content = json.loads(BPETokenizer.from_merges({k: v for k, v in vocab.items() if k != "<s>"}, ["Ġ a"]).to_json())
    content["added_tokens"] = [
        {
            "id": 257,
            "content": "<s>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [257], "tokens": ["<s>"]}},
    }
    tokenizer = BPETokenizer(json.dumps(content))
    assert tokenizer.prompt_prefix == (257,)
    return tokenizer


def reference_losses(model: GPT, tokenizer: Tokenizer, item: Item, style: Style) -> tuple[list[float], list[int]]:
    """Return the four losses and the lengths by which they are normalised.

    The model scores one ending at a time, without a cache, by PyTorch's cross-entropy.
    """
    losses, lengths = [], []
    for ending in item.endings:
        if style == "build-nanogpt":
            context, new = tokenizer.encode(item.ctx).tolist(), tokenizer.encode(" " + ending).tolist()
        else:
            text = without_markup(f"{item.activity_label}: {item.ctx_a} {item.ctx_b.capitalize()}")
            context = tokenizer.encode(text.rstrip()).tolist()
            new = tokenizer.encode(text + " " + without_markup(ending)).tolist()[len(context) :]
        new = new[-model.config.context_length :]
        ids = torch.tensor([*tokenizer.prompt_prefix, *context, *new][-model.config.context_length - 1 :])
        with torch.no_grad():
            logits = model(ids[None, :-1])[0].double()
        losses.append(float(F.cross_entropy(logits[-len(new) :], ids[-len(new) :], reduction="sum")))
        lengths.append(len(new) if style == "build-nanogpt" else len(without_markup(ending)))
    return losses, lengths


MODELS: dict[str, dict[str, Any]] = {
    "learned": {},
    "learned, grouped heads": {"n_kv_head": 2},
    "rope, multi-query": {"position": "rope", "n_kv_head": 1, "qk_norm": True},
    "window": {"position": "rope", "window": 5},
    "window with globals": {"window": 5, "window_globals": 3},
    "pattern": {"position": "rope", "window": 7, "window_pattern": "SL", "bias": False, "activation": "swiglu"},
    "explicit kernel": {"attention": "explicit", "position": "sinusoidal"},
    "soft-cap, untied": {"logit_softcap": 3.0, "tied_head": False, "norm": "rmsnorm", "position": "none"},
    "some endings overflow": {"context_length": 70},
    "most endings overflow": {"context_length": 30},
    "a window, and overflow": {"context_length": 60, "position": "rope", "window": 16},
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", MODELS)
def test_choices_equal_those_of_a_loop_over_single_endings(
    name: str, style: Style, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float32 losses of up to 1e3 nats are exact to 1e-4, so choices are equal unless the two best are a near tie."""
    monkeypatch.setattr(module, "BATCH_TOKENS", 1500)  # several batches
    items, model = some_items(16), model_for(BYTES, **MODELS[name])
    scores = score_hellaswag(model, BYTES, items, style=style)
    assert [score.question.number for score in scores] == list(range(16))
    assert any(score.question.cut for score in scores) == ("overflow" in name)
    for item, score in zip(items, scores, strict=True):
        losses, lengths = reference_losses(model, BYTES, item, style)
        assert score.losses == pytest.approx(losses, rel=3e-6)
        assert list(score.question.lengths) == lengths
        assert score.question.label == item.label
        for normalised in (False, True):
            values = [loss / length for loss, length in zip(losses, lengths, strict=True)] if normalised else losses
            assert score.choice(normalised) == values.index(min(values)) or score.margin(normalised) <= NEAR_TIE


@pytest.mark.parametrize("words", ["a", "is man up"])
def test_contexts_and_endings_of_one_token_are_scored(words: str) -> None:
    """The context's last token alone predicts such an ending, so no forward pass over endings is needed."""
    tokenizer = CharacterTokenizer("abcdefghijklmnopqrstuvwxyz ")
    model = model_for(tokenizer)
    questions = [
        Question(i, 0, tokenizer.encode(word), tuple(tokenizer.encode(c) for c in "efgh"), (1, 1, 1, 1), False)
        for i, word in enumerate(words.split())
    ]
    with torch.no_grad():
        for batch in make_batches(questions):
            for question, losses in zip(batch, score_batch(model, batch), strict=True):
                log_p = model(torch.from_numpy(question.context)[None])[0, -1].double().log_softmax(dim=-1)
                assert losses == pytest.approx([-float(log_p[ids[0]]) for ids in question.endings], rel=1e-5)


@pytest.mark.parametrize("style", STYLES)
def test_prompts_start_with_the_tokenizers_prefix(style: Style) -> None:
    tokenizer = tokenizer_with_prefix()
    items, model = some_items(8), model_for(tokenizer)
    scores = score_hellaswag(model, tokenizer, items, style=style)
    assert {int(q.context[0]) for q in encode(items, tokenizer, style, 256)} == {257}
    for item, score in zip(items, scores, strict=True):
        assert score.losses == pytest.approx(reference_losses(model, tokenizer, item, style)[0], rel=3e-6)


def losses_of(scores: list[Score]) -> dict[int, tuple[float, ...]]:
    """Return the losses by the number of the item."""
    return {score.question.number: score.losses for score in scores}


def score_with(label: int, losses: tuple[float, ...], lengths: tuple[int, ...], cut: bool = False) -> Score:
    ids = np.zeros(1, dtype=np.int64)
    return Score(Question(0, label, ids, (ids,) * 4, lengths, cut), losses)


def test_accuracy_counts_correct_choices_and_near_ties() -> None:
    scores = [
        # By loss right; normalised the first of three equal ones, wrong.
        score_with(1, (9.0, 3.0, 8.0, 7.0), (9, 1, 8, 7)),
        score_with(0, (5.0, 5.00005, 9.0, 9.0), (1, 2, 9, 9), cut=True),  # by loss right, a near tie; normalised wrong
        score_with(2, (1.0, 2.0, math.nan, 3.0), (1, 1, 1, 1)),  # a NaN counts as wrong
        score_with(3, (4.0, 4.0, 4.0, 3.0), (1, 1, 1, 1)),
    ]
    figures = summarize(scores)
    assert (figures["n"], figures["cut"], figures["acc"], figures["acc_norm"]) == (4, 1, 0.75, 0.25)
    assert (figures["near_ties"], figures["near_ties_norm"]) == (1, 2)
    assert figures["stderr"] == pytest.approx(np.std([1, 1, 0, 1], ddof=1) / 2)
    assert math.isnan(summarize(scores[:1])["stderr"])


def test_training_mode_is_restored_and_dropout_is_disabled() -> None:
    items, model = some_items(6), model_for(BYTES).train()
    exact = losses_of(score_hellaswag(model, BYTES, items))
    assert losses_of(score_hellaswag(model, BYTES, items)) == exact
    assert model.training
    rough = score_hellaswag(model, BYTES, items, precision="bfloat16")
    assert [s.losses for s in rough] != [s.losses for s in score_hellaswag(model, BYTES, items)]
    for score, item in zip(rough, items, strict=True):
        assert score.losses == pytest.approx(reference_losses(model.eval(), BYTES, item, "build-nanogpt")[0], rel=0.05)


@pytest.mark.parametrize("changes", [{}, {"window": 5, "position": "rope"}])
def test_a_compiled_model_has_the_same_scores_and_is_not_compiled_again(changes: dict[str, Any]) -> None:
    items, model = some_items(6), model_for(BYTES, **changes)
    expected = losses_of(score_hellaswag(model, BYTES, items))
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    for block in model.blocks:
        block.compile(backend=backend)
    model.compile(backend=backend)
    ids = torch.zeros(1, 9, dtype=torch.int64)
    with torch.no_grad():
        before = model(ids)
        graphs = len(compiled)
        assert graphs
        assert losses_of(score_hellaswag(model, BYTES, items)) == expected
        assert torch.equal(model(ids), before)
    assert len(compiled) == graphs


# --- batches and ranks ------------------------------------------------------------------------------------------------


def test_every_item_is_in_one_batch_whose_contexts_have_equal_length() -> None:
    batches = make_batches(encode(some_items(60), BYTES, "build-nanogpt", 100))
    assert sorted(q.number for batch in batches for q in batch) == list(range(60))
    assert any(len(batch) > 1 for batch in batches)
    for batch in batches:
        assert len({(q.cut, q.cut or len(q.context)) for q in batch}) == 1
        assert 4 * len(batch) * max(q.tokens for q in batch) <= module.BATCH_TOKENS or len(batch) == 1


def test_a_forward_pass_has_little_padding() -> None:
    lengths = [5, 40, 38, 6, 39, 5, 70]
    groups = list(group_by_length(lengths))
    assert groups == [[6, 1], [4, 2], [3, 0, 5]]
    for group in groups:
        assert sum(lengths[group[0]] - lengths[row] for row in group) <= module.PADDING_TOKENS
    # A pass has at most PASS_TOKENS, or one row.
    assert list(map(len, group_by_length([1000] * 6 + [5000]))) == [1, 4, 2]


class OneRank(Ranks):
    """One of several ranks, whose gathers return only its own value."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size

    def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        return rows


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 100])
def test_the_ranks_together_give_the_scores_of_one_process(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", 1500)
    items, model = some_items(20), model_for(BYTES, context_length=100)
    expected = losses_of(score_hellaswag(model, BYTES, items))
    shares = [score_hellaswag(model, BYTES, items, ranks=OneRank(rank, world_size)) for rank in range(world_size)]
    scores = sorted(itertools.chain.from_iterable(shares), key=lambda score: score.question.number)
    assert losses_of(scores) == expected  # the same bits, because the batches are the same
    if world_size == 100:
        assert [] in shares


def test_a_subset_is_shuffled_and_a_prefix_of_larger_subsets() -> None:
    items = some_items(200)
    small, large = subset(items, 20), subset(items, 50)
    assert large[:20] == small
    assert sorted(subset(items, 999), key=lambda item: item.number) == items
    assert [item.number for item in small[:5]] == [79, 120, 108, 29, 144]  # the same on every machine
    assert 5 <= sum(item.number < 100 for item in small) <= 15
    with pytest.raises(UserError, match="at least one item"):
        subset(items, 0)


# --- resuming ---------------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    """Stops an evaluation."""


@pytest.mark.parametrize("torn", [b"", b'{"number": 3, "losses": [1.0', b"\xff\xfe", b'{"number": 19}\n'])
def test_an_interrupted_evaluation_continues(tmp_path: Path, torn: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", 1500)
    items, model, path = some_items(20), model_for(BYTES), tmp_path / "new" / "results.jsonl"
    expected = losses_of(score_hellaswag(model, BYTES, items))

    def stop(done: int, total: int) -> None:
        assert total == 20
        if done >= 8:
            raise StoppedError

    with pytest.raises(StoppedError):
        score_hellaswag(model, BYTES, items, results=path, progress=stop)
    with open(path, "ab") as file:
        file.write(torn)
    computed: list[int] = []

    def count_questions(m: GPT, batch: list[Question]) -> list[tuple[float, ...]]:
        computed.extend(question.number for question in batch)
        return score_batch(m, batch)

    monkeypatch.setattr(module, "score_batch", count_questions)
    assert losses_of(score_hellaswag(model, BYTES, items, results=path)) == expected
    assert 0 < len(computed) <= 12
    computed.clear()
    assert losses_of(score_hellaswag(model, BYTES, items, results=path)) == expected
    assert computed == []


def test_a_partly_saved_batch_is_computed_again(tmp_path: Path) -> None:
    items = [
        dataclasses.replace(item, ctx="one beginning for all, so that all are one batch") for item in some_items(6)
    ]
    model, path = model_for(BYTES), tmp_path / "results.jsonl"
    assert len(make_batches(encode(items, BYTES, "build-nanogpt", 256))) == 1
    expected = losses_of(score_hellaswag(model, BYTES, items, results=path))
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.strip()]
    path.write_bytes(b"".join(lines[:3]))
    assert losses_of(score_hellaswag(model, BYTES, items, results=path)) == expected


def test_non_finite_losses_count_as_wrong(tmp_path: Path) -> None:
    items, model, path = some_items(3), model_for(BYTES), tmp_path / "results.jsonl"
    with torch.no_grad():
        model.get_parameter("norm.weight").fill_(math.nan)
    for _ in range(2):
        figures = summarize(score_hellaswag(model, BYTES, items, results=path))
        assert (figures["acc"], figures["acc_norm"], figures["n"], figures["near_ties"]) == (0, 0, 3, 0)


def test_everything_that_scores_depend_on_has_its_own_results_file() -> None:
    items, model, other = some_items(3), model_for(BYTES), model_for(BYTES)
    with torch.no_grad():
        other.embedding.weight[5, 5] += 1e-6
    characters = CharacterTokenizer("".join(map(chr, range(256))))
    names = {
        results_name(hash_model(model_for(BYTES)), BYTES, items, "lm-eval", "float32"),
        results_name(hash_model(model), BYTES, items, "lm-eval", "float32"),
        results_name(hash_model(other), BYTES, items, "lm-eval", "float32"),
        results_name(hash_model(model), characters, items, "lm-eval", "float32"),
        results_name(hash_model(model), BYTES, items[:2], "lm-eval", "float32"),
        results_name(hash_model(model), BYTES, items, "build-nanogpt", "float32"),
        results_name(hash_model(model), BYTES, items, "lm-eval", "bfloat16"),
    }
    assert len(names) == 6  # the first two are the same model


# --- items ------------------------------------------------------------------------------------------------------------

OFFICIAL = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "split": "val",
    "split_type": "indomain",
    "label": 3,
    "endings": [
        "is using wrap.",
        "is ripping level tiles off.",
        "is holding a cube.",
        "starts [substeps] pulling   up.",
    ],
    "source_id": "activitynet~v_-JhWjGDPHMY",
}


def write_records(path: Path, *records: object) -> Path:
    """Write one JSON object per line and return the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_published_and_reduced_records_are_read(tmp_path: Path) -> None:
    reduced = {key: OFFICIAL[key] for key in ("ind", "activity_label", "ctx", "label", "endings", "split")}
    path = write_records(tmp_path / "items.jsonl", OFFICIAL, reduced, OFFICIAL | {"label": "2"})
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n\n"))
    full, short, hub = read_items(path)
    assert (full.ctx_a, full.ctx_b, full.label, full.number) == ("A man is sitting on a roof.", "he", 3, 0)
    assert (short.ctx_a, short.ctx_b, short.number) == (OFFICIAL["ctx"], "", 1)
    assert (hub.label, hub.number) == (2, 2)
    assert (
        fingerprint([full])
        == fingerprint([dataclasses.replace(full)])
        != fingerprint([dataclasses.replace(full, ctx="x")])
    )


def test_prompts_of_the_two_styles(tmp_path: Path) -> None:
    (item,) = read_items(write_records(tmp_path / "items.jsonl", OFFICIAL))
    original, cleaned = prompt_of(item, "build-nanogpt"), prompt_of(item, "lm-eval")
    assert original[0] == "A man is sitting on a roof. he"
    assert original[1][3] == " starts [substeps] pulling   up."
    assert cleaned[0] == "Roof shingle removal: A man is sitting on a roof. He"
    assert cleaned[1][3] == " starts pulling  up."  # lm-eval also turns three spaces into two
    assert cleaned[2] == [14, 27, 18, 19]
    wiki = dataclasses.replace(item, ctx_a="[header] How to fly [title] Jump. [step] Then [x]", ctx_b="")
    assert prompt_of(wiki, "lm-eval")[0] == "Roof shingle removal: How to fly. Jump. Then"
    assert prompt_of(wiki, "lm-eval")[1][0] == "  is using wrap."


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"ctx": ', "line 2: broken JSON"),
        ("[" * 100_000, "line 2: broken JSON"),
        ("[]", "line 2: .*JSON object"),
        (json.dumps({"ctx": "a", "label": 1}), "line 2: .*activity_label, ctx, endings"),
        (json.dumps(OFFICIAL | {"label": 4}), "line 2: label must be 0, 1, 2 or 3, .* got 4"),
        (json.dumps(OFFICIAL | {"label": ""}), "line 2: label must be .* got ''"),
        (json.dumps(OFFICIAL | {"label": True}), "line 2: label must be"),
        (json.dumps(OFFICIAL | {"endings": ["a", "b", "c"]}), "line 2: endings .*four texts"),
        (json.dumps(OFFICIAL | {"endings": ["a", "b", "c", 4]}), "line 2: endings .*four texts"),
        (json.dumps(OFFICIAL | {"endings": "abcd"}), "line 2: endings .*four texts"),
        (json.dumps(OFFICIAL | {"ctx": " "}), "line 2: ctx must be text"),
        (json.dumps(OFFICIAL | {"ctx_a": None}), "line 2: ctx_a must be text, got None"),
    ],
)
def test_the_error_names_the_invalid_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(OFFICIAL) + "\n" + line + "\n")
    with pytest.raises(UserError, match=f"items.jsonl, {message}"):
        read_items(path)


def test_files_without_items_are_errors(tmp_path: Path) -> None:
    for content, message in ((b"\n \n", "is empty"), (b"\xff\xfe", r"items\.jsonl.*utf-16"), (b"{", "line 1: ")):
        (tmp_path / "items.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_items(tmp_path / "items.jsonl")
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        read_items(tmp_path / "missing.jsonl")


def test_models_and_items_that_cannot_be_scored_are_errors() -> None:
    items, model = some_items(2), model_for(BYTES)
    with pytest.raises(UserError, match="tokenizer"):
        evaluate_both_styles(LoadedModel("x", model, None, None, None), items, False, lambda *numbers: None)
    letters = CharacterTokenizer("abc ")
    with pytest.raises(UserError, match="tokenizer's 4"):
        score_hellaswag(model_for(letters), letters, items)
    empty = dataclasses.replace(items[0], endings=("[step]", "b", "c", "d"))
    with pytest.raises(UserError, match="item 0 of HellaSwag"):
        score_hellaswag(model, BYTES, [empty], style="lm-eval")


def test_the_published_file_is_downloaded_to_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads: list[tuple[str, Path, str]] = []

    def download(url: str, path: Path, sha256: str, what: str, manual: str) -> Path:
        downloads.append((url, path, sha256))
        return path

    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path))
    monkeypatch.setattr(hellaswag_items, "download", download)
    path = find_items()
    assert path == tmp_path / "downloads" / "hellaswag_val.jsonl"
    assert downloads == [(hellaswag_items.URL, path, hellaswag_items.SHA256)]
    assert find_items("mine.jsonl") == Path("mine.jsonl")
    assert not load_items(write_records(tmp_path / "items.jsonl", OFFICIAL))[1]


def published_like(count: int) -> list[dict[str, Any]]:
    """Return records like the published ones, of random words.

    The context is one or more whole sentences and the start of the next one; each item has four endings. Some are long.
    """
    draw = random.Random(7)

    def words(fewest: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(fewest, most)))

    records = []
    for i in range(count):
        ctx_a = ". ".join(words(4, 12).capitalize() for _ in range(draw.choice((1, 2, 3, 8)))) + "."
        ctx_b = words(0, 2)
        endings = [words(2, 12) + "." for _ in range(4)]
        record = {"ind": i, "activity_label": words(1, 3), "ctx_a": ctx_a, "ctx_b": ctx_b, "endings": endings}
        records.append({**record, "ctx": f"{ctx_a} {ctx_b}".strip(), "label": draw.randrange(4), "split": "val"})
    return records


def test_a_file_in_the_published_format_is_read_and_scored(tmp_path: Path) -> None:
    items = read_items(write_records(tmp_path / "items.jsonl", *published_like(100)))
    assert len(items) == 100
    chosen = subset(items, 12)
    model = model_for(BYTES, context_length=300)
    for style in STYLES:
        scores = {score.question.number: score for score in score_hellaswag(model, BYTES, chosen, style=style)}
        for item in chosen:
            assert scores[item.number].losses == pytest.approx(reference_losses(model, BYTES, item, style)[0], rel=3e-6)


# --- lm-eval ----------------------------------------------------------------------------------------------------------

TASK = """
task: hellaswag_local
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {items}}}}}
output_type: multiple_choice
validation_split: validation
process_docs: !function steps.process_docs
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "choices"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
# lm-eval prepares our items by its own code; the test adds none.
STEPS = "from lm_eval.tasks.hellaswag.utils import process_docs\n"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "context_length"), [("bytes", 1024), ("bytes", 400), ("with prefix", 1024)])
def test_lm_eval_gives_an_exported_model_the_same_scores(
    kind: str, context_length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracies and the choice of every item are equal, also for contexts that are too long; no network is used."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'lm_eval[hf]'")
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    path = write_records(tmp_path / "items.jsonl", *published_like(120))
    items = read_items(path)
    (tmp_path / "hellaswag_local.yaml").write_text(TASK.format(items=path))
    (tmp_path / "steps.py").write_text(STEPS)
    tokenizer: Tokenizer = BYTES if kind == "bytes" else tokenizer_with_prefix()
    model = model_for(tokenizer, context_length=context_length)
    export_hf(model, tokenizer, tmp_path / "model")
    # lm-eval needs the text of the tokenizer's first special token, and fails if there is none.
    without_special = {"prefix_token_id": 0} if tokenizer.end_of_text is None and not tokenizer.prompt_prefix else {}
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "model"), "dtype": "float32", **without_special},
        tasks=["hellaswag_local"],
        task_manager=tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=4,
        log_samples=True,
        bootstrap_iters=0,
    )
    scores = score_hellaswag(model, tokenizer, items, style="lm-eval")
    expected, figures = summarize(scores), results["results"]["hellaswag_local"]
    samples = sorted(results["samples"]["hellaswag_local"], key=lambda sample: sample["doc_id"])
    # An ending longer than the context stops lm-eval, so only contexts are too long here.
    assert any(score.question.cut for score in scores) == (context_length == 400)
    for score, sample in zip(scores, samples, strict=True):
        answers = [float(answer[0]) for answer in itertools.chain.from_iterable(sample["resps"])]
        assert [-loss for loss in score.losses] == pytest.approx(answers, rel=1e-5)
        assert (sample["acc"], sample["acc_norm"]) == tuple(
            float(score.choice(norm) == score.question.label) for norm in (False, True)
        )
    assert (figures["acc,none"], figures["acc_norm,none"]) == (expected["acc"], expected["acc_norm"])
    assert 0 < expected["acc"] < 1
