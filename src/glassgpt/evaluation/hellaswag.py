"""HellaSwag: which of four endings the model finds most likely, with each context read once for all four.

Items whose contexts have the same length go through the model together: the contexts fill a cache, and each row of the
cache is copied for its four endings. The head is computed only at positions that predict a token of an ending. Items
longer than the model's context are cut on the left, as in lm-eval; their four contexts differ, so they share no cache.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from glassgpt.data.dataset import Ids
from glassgpt.distributed.group import Ranks
from glassgpt.evaluation.hellaswag_items import STYLES, Item, Style, fingerprint, prompt_of
from glassgpt.generation.inference import evaluation_mode
from glassgpt.interop.references import LoadedModel
from glassgpt.model.finite import nonfinite_error
from glassgpt.model.gpt import GPT
from glassgpt.model.loss import token_losses
from glassgpt.tokenizers.builtin import Tokenizer
from glassgpt.utils.device import autocast, find_precision, matmul_precision
from glassgpt.utils.download import cache_directory
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import explain_os_errors, read_file
from glassgpt.utils.torch_internals import uncompiled

BATCH_TOKENS = 16384  # of four texts per item, each with its context; the more, the more endings of equal length
PASS_TOKENS = 4096  # in the cache of one forward pass: 0.3 GB for GPT-2 small in float32
PADDING_TOKENS = 32  # cheaper than another pass: a CPU computes this many in the time of reading the weights
NEAR_TIE = 1e-4  # difference of losses, normalised or not, below which the order of a sum may decide the choice
ENDINGS = 4


@dataclass(frozen=True)
class Question:
    """An item as tokens. `lengths`: divisors of the normalised scores. `cut`: whether it exceeds the context."""

    number: int
    label: int
    context: Ids
    endings: tuple[Ids, ...]
    lengths: tuple[int, ...]
    cut: bool

    @property
    def tokens(self) -> int:
        """Tokens of the longest of its four texts."""
        return len(self.context) + max(map(len, self.endings))

    @property
    def shared(self) -> int:
        """Tokens of the context that are read once for all four texts; 0 if the item is cut."""
        return 0 if self.cut else len(self.context)


@dataclass(frozen=True)
class Score:
    """The losses of a question's endings in nats, summed over their tokens."""

    question: Question
    losses: tuple[float, ...]

    def values(self, normalised: bool) -> list[float]:
        """The losses that are compared: sums, or means per token or character."""
        divisors = self.question.lengths if normalised else (1,) * ENDINGS
        return [loss / divisor for loss, divisor in zip(self.losses, divisors, strict=True)]

    def choice(self, normalised: bool) -> int | None:
        """The ending with the lowest loss, the first if several have it; None (wrong) if a loss is not finite."""
        values = self.values(normalised)
        return values.index(min(values)) if all(map(math.isfinite, values)) else None

    def margin(self, normalised: bool) -> float:
        """Difference between the lowest and the second lowest loss."""
        best, second, *_ = sorted(self.values(normalised))
        return second - best


def evaluate_both_styles(
    loaded: LoadedModel, items: Sequence[Item], published: bool, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """The figures of `summarize` by style, with scores kept in the cache, and what was measured.

    published: whether published scores compare. progress: as in `score_hellaswag`, after the style. Raises `UserError`.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    if tokenizer is None:
        raise UserError(f"{loaded.reference} has no tokenizer, so it cannot be evaluated on HellaSwag")
    precision, model_hash = find_precision("auto", model.embedding.weight.device), hash_model(model)
    figures: dict[str, Any] = {"items": len(items), "published": published, "precision": precision, **loaded.provenance}
    for style in STYLES:
        results = cache_directory() / "hellaswag" / results_name(model_hash, tokenizer, items, style, precision)
        own = partial(progress, style)
        scores = score_hellaswag(model, tokenizer, items, style, precision=precision, results=results, progress=own)
        if not all(math.isfinite(loss) for score in scores for loss in score.losses):
            raise nonfinite_error(model)
        figures[style] = {"style": style, **summarize(scores)}
    return figures


@torch.no_grad()
def score_hellaswag(
    model: GPT,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    style: Style = "build-nanogpt",
    *,
    precision: str = "float32",
    results: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks | None = None,
) -> list[Score]:
    """The scores of the items, ordered by number. Each rank computes its share; all ranks get all scores.

    results: a file to which scores are appended, and from which a repeated call continues (see `results_name`).
    progress: called with the numbers of scored and of all items. Raises `UserError` as `encode`,
    and `StoppedError` if a rank has a `stop_signal`.
    """
    ranks = ranks or Ranks()
    questions = encode(items, tokenizer, style, model.config.context_length)
    batches = make_batches(questions)[ranks.rank :: ranks.size]
    saved = {} if results is None else _read_results(results)
    losses, device = dict[int, tuple[float, ...]](), model.embedding.weight.device
    # Uncompiled, since a caller's blocks may be compiled: each length would compile them again.
    with evaluation_mode(model), uncompiled(model), matmul_precision(precision), autocast(device, precision):
        for batch in batches:
            if ranks.stop_signal():  # `stop_if_asked` then ends the evaluation on all ranks
                break
            numbers = [question.number for question in batch]
            # All of a batch or nothing: the last bits of a loss depend on the rest of its batch.
            if not saved.keys() >= set(numbers):
                computed = dict(zip(numbers, score_batch(model, batch), strict=True))
                saved |= computed
                if results is not None:
                    _append_results(results, computed)
            losses |= {number: saved[number] for number in numbers}
            ranks.heartbeat()
            progress(len(losses), sum(map(len, batches)))
    ranks.enter_phase("the scores of HellaSwag")
    ranks.stop_if_asked()
    shares = ranks.all_gather_object(list(losses.items()))
    by_number = {question.number: question for question in questions}
    return [Score(by_number[number], tuple(four)) for number, four in sorted(itertools.chain(*shares))]


def summarize(scores: Sequence[Score]) -> dict[str, Any]:
    """Figures of one or more items: their number `n`, and `cut`, how many exceed the model's context.

    `acc`: share of items whose right ending has the lowest loss; `stderr`: its standard error; `near_ties`: items whose
    two lowest losses differ by at most `NEAR_TIE`. With the suffix `_norm`, losses are per token or per character.
    """
    n = len(scores)
    figures: dict[str, Any] = {"n": n, "cut": sum(score.question.cut for score in scores)}
    for suffix, normalised in (("", False), ("_norm", True)):
        accuracy = sum(score.choice(normalised) == score.question.label for score in scores) / n
        figures[f"acc{suffix}"] = accuracy
        # With the sample variance (n - 1), as in lm-eval.
        figures[f"stderr{suffix}"] = math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else math.nan
        figures[f"near_ties{suffix}"] = sum(score.margin(normalised) <= NEAR_TIE for score in scores)
    return figures


def hash_model(model: GPT) -> str:
    """sha256 of a model's config and weights."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def results_name(model_hash: str, tokenizer: Tokenizer, items: Sequence[Item], style: str, precision: str) -> str:
    """Name of the results file for everything that scores depend on."""
    identity = {"model": model_hash, "tokenizer": tokenizer.sha256, "items": fingerprint(items)}
    identity |= {"style": style, "precision": precision}
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32] + ".jsonl"


def _read_results(path: Path) -> dict[int, tuple[float, ...]]:
    """The saved losses by item number: a JSON line per item. A line that is incomplete, after a crash, is ignored."""
    saved: dict[int, tuple[float, ...]] = {}
    with explain_os_errors("read", path):
        lines = read_file(path).splitlines() if path.exists() else []
    for line in lines:
        with suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
            record = json.loads(line)
            if len(record["losses"]) == ENDINGS:
                saved[int(record["number"])] = tuple(map(float, record["losses"]))
    return saved


def _append_results(path: Path, losses: Mapping[int, tuple[float, ...]]) -> None:
    rows = [json.dumps({"number": number, "losses": four}) for number, four in losses.items()]
    with explain_os_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n" + "\n".join(rows) + "\n")  # the first line break ends an incomplete line


def encode(items: Sequence[Item], tokenizer: Tokenizer, style: Style, context_length: int) -> list[Question]:
    """The items as tokens, after the tokenizer's prefix. Only the last `context_length` tokens of an ending are scored.

    Raises `UserError` for text without ids, and for an ending without a token or a character.
    """
    prompts = [prompt_of(item, style) for item in items]
    contexts = _encoded(tokenizer, [context for context, _, _ in prompts])
    if style == "lm-eval":  # an ending's tokens are those that it adds to the context's
        texts = [context + ending for context, endings, _ in prompts for ending in endings]
    else:
        texts = [ending for _, endings, _ in prompts for ending in endings]
    encoded = iter(_encoded(tokenizer, texts))
    prefix = np.array(tokenizer.prompt_prefix, dtype=np.int64)
    questions = []
    for item, (_, _, characters), own in zip(items, prompts, contexts, strict=True):
        start = len(own) if style == "lm-eval" else 0
        endings = tuple(ids[start:][-context_length:] for ids in itertools.islice(encoded, ENDINGS))
        context = np.concatenate([prefix, own])
        lengths = tuple(characters if style == "lm-eval" else [len(ids) for ids in endings])
        if not all((len(context), *map(len, endings), *lengths)):
            raise UserError(f"item {item.number} of HellaSwag has an empty context or ending ({item.ctx[:40]!r}...)")
        cut = any(len(context) + len(ids) > context_length + 1 for ids in endings)
        questions.append(Question(item.number, item.label, context, endings, lengths, cut))
    return questions


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> list[Ids]:
    """The ids of each text."""
    ids, offsets = tokenizer.encode_documents(texts)
    return [ids[start:end].astype(np.int64) for start, end in itertools.pairwise(offsets.tolist())]


def make_batches(questions: Iterable[Question]) -> list[list[Question]]:
    """All questions in batches of contexts of equal length, the longest first; those that are cut come first of all."""
    batches: list[list[Question]] = []
    ordered = sorted(questions, key=lambda q: (q.cut, q.shared, q.tokens, q.number), reverse=True)
    for _, group in itertools.groupby(ordered, key=lambda q: q.shared):
        rest = list(group)
        while rest:
            size = max(1, BATCH_TOKENS // (ENDINGS * rest[0].tokens))
            batches.append(rest[:size])
            rest = rest[size:]
    return batches


def group_by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """The rows of each pass, longest first: at most `PADDING_TOKENS` of padding and `PASS_TOKENS`, or a single row."""
    group, padding = list[int](), 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        longest = lengths[group[0]] if group else lengths[row]
        padding += longest - lengths[row]
        if padding > PADDING_TOKENS or (group and (len(group) + 1) * longest > PASS_TOKENS):
            yield group
            group, padding = [], 0
        group.append(row)
    yield group


def score_batch(model: GPT, questions: Sequence[Question]) -> list[tuple[float, ...]]:
    """The losses of the four endings of each question, summed over their tokens in float64."""
    device, limit, shared = model.embedding.weight.device, model.config.context_length + 1, questions[0].shared
    endings = [ids for question in questions for ids in question.endings]
    rows = [np.concatenate([q.context, ids])[-limit:] for q in questions for ids in q.endings]
    lengths = [len(row) for row in rows]
    if shared:
        contexts = torch.from_numpy(np.stack([question.context for question in questions])).to(device)
        cache = model.new_cache(len(questions), max(lengths) - 1)
        last = model.hidden(contexts, cache)[:, -1:]
    losses = [0.0] * len(rows)
    for group in group_by_length(lengths):
        hidden, own_cache = [], None
        if shared:
            items = torch.tensor(group, device=device) // ENDINGS
            hidden, own_cache = [last[items]], cache.select(items)
        if shared + 1 < lengths[group[0]]:  # otherwise all endings have one token
            # Padding comes after an ending, so no token of it attends to padding.
            inputs = pad_sequence([torch.from_numpy(rows[row][shared:-1]) for row in group], batch_first=True)
            hidden.append(model.hidden(inputs.to(device), own_cache))
        # The first position that predicts a token of the ending: with a cache, the context's last one.
        counts = [len(endings[row]) for row in group]
        starts = [0 if shared else lengths[row] - 1 - count for row, count in zip(group, counts, strict=True)]
        parts = zip(torch.cat(hidden, dim=1), starts, counts, strict=True)
        states = torch.cat([hidden_row[start : start + count] for hidden_row, start, count in parts])
        targets = torch.from_numpy(np.concatenate([endings[row] for row in group])).to(device)
        values = token_losses(states, model.head.weight, targets, model.vocab_size, model.config.logit_softcap)
        for row, own in zip(group, torch.split(values.cpu().double(), counts), strict=True):
            losses[row] = float(own.sum())
    return [tuple(losses[first : first + ENDINGS]) for first in range(0, len(losses), ENDINGS)]
