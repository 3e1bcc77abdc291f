"""HellaSwag: which of four endings a model finds likeliest, the context read once for all four.

Items whose contexts have about the same number of tokens go through the model together: the contexts first, into a cache, whose
rows then serve four endings each. The head sees only the positions that predict a token of an ending. What does not fit into
the model's context is cut from the left, as in lm-eval; such items have four contexts and go the plain way.

Shapes: `B` items of a batch, `R` endings of a pass, `T` time, `C` channels.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from glassgpt.distributed.group import Ranks
from glassgpt.evaluation.hellaswag_items import Item, fingerprint, wording_of
from glassgpt.evaluation.hellaswag_results import Identity, Score, merge, open_results, summarize
from glassgpt.model.gpt import GPT
from glassgpt.model.kv_cache import KVCache
from glassgpt.model.loss import IGNORED, token_losses
from glassgpt.tokenizers.builtin import Tokenizer
from glassgpt.utils.device import autocast, matmul_precision
from glassgpt.utils.errors import UserError
from glassgpt.utils.torch_internals import uncompiled

# Tokens of a batch's texts, each ending behind its own context. The more there are, the more rows have one length.
BATCH_TOKENS = 8192
# Tokens in the cache of one pass: 0.3 GB at the size of GPT-2 in float32.
CACHE_TOKENS = 4096
# Padding that is cheaper than another pass: reading the weights takes a CPU about as long as computing with so many tokens.
PASS_TOKENS = 32
ENDINGS = 4

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Question:
    """An item as tokens. `lengths` is what a normalised score divides by, one for each ending; `cut` says that tokens were lost."""

    number: int
    label: int
    context: Ids
    endings: tuple[Ids, ...]
    lengths: tuple[int, ...]
    cut: bool

    @property
    def tokens(self) -> int:
        """Of the longest of the four texts."""
        return len(self.context) + max(map(len, self.endings))


def evaluate_hellaswag(
    model: GPT,
    tokenizer: Tokenizer | None,
    items: Sequence[Item],
    *,
    style: str = "build-nanogpt",
    precision: str = "float32",
    results_path: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """The share of items whose right ending the model finds likeliest: what `summarize` returns of `score_hellaswag`.

    Each rank scores its share, and all get the figures of the whole.
    """
    ranks = ranks or Ranks()

    def told(done: int, total: int) -> None:
        ranks.heartbeat()
        if progress is not None:
            progress(done, total)

    own = score_hellaswag(
        model,
        tokenizer,
        items,
        style=style,
        precision=precision,
        results_path=results_path,
        progress=told,
        rank=ranks.rank,
        world_size=ranks.size,
    )
    ranks.enter_phase("the scores of HellaSwag")
    shares = ranks.all_gather_object([asdict(score) for score in own])
    return {"style": style, **summarize(merge([Score(**score) for score in share] for share in shares))}


@torch.no_grad()
def score_hellaswag(
    model: GPT,
    tokenizer: Tokenizer | None,
    items: Sequence[Item],
    *,
    style: str = "build-nanogpt",
    precision: str = "float32",
    results_path: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> list[Score]:
    """The losses of each item's four endings, in the order of the items' numbers; on several ranks those of this rank's share.

    With `results_path` (one for each rank) every batch is appended there, and a rerun with the same weights, items, style,
    tokenizer and precision goes on behind it, to the very same scores. `progress` is told the items done and all of them.
    Raises `UserError` for a model without a tokenizer, a text that the tokenizer does not know, and a file with other results.
    """
    if tokenizer is None:
        raise UserError("this model has no tokenizer, so HellaSwag's texts cannot be put to it")
    questions = encode(items, tokenizer, style, model.config.context_length, model.vocab_size)
    batches = share_of(plan(questions), rank, world_size)
    identity = Identity.of(model, tokenizer, fingerprint(items), style, precision) if results_path is not None else None
    scores: dict[int, Score] = {}
    total = sum(len(batch.questions) for batch in batches)
    device = model.embedding.weight.device
    was_training = model.training
    model.eval()
    try:
        with (
            open_results(results_path, identity) as results,
            uncompiled(model),
            matmul_precision(precision),
            autocast(device, precision),
        ):
            for batch in batches:
                # All of a batch or nothing: the last bits of a loss depend on what else is in the batch.
                found = [results.known[q.number] for q in batch.questions if q.number in results.known]
                if len(found) < len(batch.questions):
                    found = score_batch(model, batch)
                    results.append(found)
                scores |= {score.number: score for score in found}
                if progress is not None:
                    progress(len(scores), total)
    finally:
        model.train(was_training)
    return [scores[number] for number in sorted(scores)]


# ----------------------------------------------------------------------------------------------------------------- tokens


def encode(
    items: Sequence[Item], tokenizer: Tokenizer, style: str, context_length: int, vocab_size: int
) -> list[Question]:
    """The items as tokens, behind the tokenizer's prefix.

    Of an ending longer than `context_length` only its last tokens count. Raises `UserError` for text without ids, an id that the
    model does not have, and an ending without a token or a character.
    """
    wordings = [wording_of(style)(item) for item in items]
    contexts = _encoded(tokenizer, [wording.context for wording in wordings])
    texts = [wording.context * wording.together + text for wording in wordings for text in wording.continuations]
    encoded = _encoded(tokenizer, texts)
    prefix = np.array(tokenizer.prompt_prefix, dtype=np.int64)
    questions = []
    for i, (item, wording, context) in enumerate(zip(items, wordings, contexts, strict=True)):
        whole = encoded[i * ENDINGS : (i + 1) * ENDINGS]
        endings = [ids[len(context) :] if wording.together else ids for ids in whole]
        context = np.concatenate([prefix, context])
        kept = tuple(ids[-context_length:] for ids in endings)
        lengths = wording.characters or tuple(map(len, kept))
        if not len(context) or not all(map(len, endings)) or not all(lengths):
            raise UserError(
                f"item {item.number} of HellaSwag has a context or an ending without a token or a character ({item.ctx[:40]!r}...)"
            )
        highest = max(int(ids.max()) for ids in (context, *endings))
        if highest >= vocab_size:
            raise UserError(
                f"the tokenizer gave id {highest}, and the model has {vocab_size}: it is not this model's tokenizer"
            )
        cut = any(len(context) + len(ids) > context_length + 1 for ids in endings)
        questions.append(Question(item.number, item.label, context, kept, lengths, cut))
    return questions


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> list[Ids]:
    """The ids of each text."""
    ids, offsets = tokenizer.encode_documents(texts)
    return [ids[start:end].astype(np.int64) for start, end in itertools.pairwise(offsets.tolist())]


# --------------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Row:
    """An ending behind its context: the place of its item in the batch, the tokens, and how many of them, the last, are scored."""

    place: int
    tokens: Ids
    scored: int


@dataclass(frozen=True)
class Batch:
    """Questions that go through the model together, and how many tokens of their contexts are read once for all four endings."""

    questions: list[Question]
    shared: int

    def rows(self, context_length: int) -> list[Row]:
        """All endings, each behind its own context, of which the left is cut to what the model can read."""
        return [
            Row(place, np.concatenate([question.context, ids])[-context_length - 1 :], len(ids))
            for place, question in enumerate(self.questions)
            for ids in question.endings
        ]


def plan(questions: Iterable[Question]) -> list[Batch]:
    """All questions in batches, those that are cut and then the longest first.

    In a batch as many tokens as the shortest context has are shared; what others have more comes with each of their endings. A
    pure function of the questions, so a rerun and another number of ranks meet the same batches.
    """
    batches: list[list[Question]] = []
    room, spare, shortest = 0, 0, 0
    for question in sorted(questions, key=lambda q: (q.cut, len(q.context), q.tokens, q.number)):
        repeated = 0 if question.cut else (ENDINGS - 1) * (len(question.context) - shortest)
        if not batches or question.cut != batches[-1][0].cut or repeated > spare or ENDINGS * question.tokens > room:
            batches.append([])
            room, spare, shortest, repeated = BATCH_TOKENS, PASS_TOKENS, len(question.context), 0
        batches[-1].append(question)
        room, spare = room - ENDINGS * question.tokens, spare - repeated
    return [Batch(batch, 0 if batch[0].cut else len(batch[0].context)) for batch in reversed(batches)]


def share_of(batches: Sequence[Batch], rank: int, world_size: int) -> list[Batch]:
    """The batches that are this rank's: each `world_size`-th, so that every rank has long and short ones; maybe none."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is none of {world_size}")
    return list(batches[rank::world_size])


def passes(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows, longest first, in groups of nearly one length: padding costs less than another pass over the weights would."""
    group: list[Row] = []
    spare = PASS_TOKENS
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        padding = len(group[0].tokens) - len(row.tokens) if group else 0
        if padding > spare or (group and (len(group) + 1) * len(group[0].tokens) > CACHE_TOKENS):
            yield group
            group, spare, padding = [], PASS_TOKENS, 0
        group.append(row)
        spare -= padding
    yield group


@dataclass(frozen=True)
class Beginning:
    """What a batch's items share with their own endings: `length` tokens in the cache, and the hidden states (B, 1, C) of the last."""

    length: int
    cache: KVCache
    last: Tensor


def score_batch(model: GPT, batch: Batch) -> list[Score]:
    """The losses of the endings of a batch."""
    rows = batch.rows(model.config.context_length)
    beginning = read_beginnings(model, batch, max(len(row.tokens) for row in rows) - 1) if batch.shared else None
    losses: dict[int, float] = {}
    for group in passes(rows):
        losses |= zip(map(id, group), losses_of(model, group, beginning), strict=True)
    sums = iter([losses[id(row)] for row in rows])
    return [Score(q.number, q.label, tuple(itertools.islice(sums, ENDINGS)), q.lengths, q.cut) for q in batch.questions]


def read_beginnings(model: GPT, batch: Batch, capacity: int) -> Beginning:
    """The contexts of a batch, as far as they are shared, in a cache that has room for `capacity` tokens."""
    ids = torch.from_numpy(np.stack([question.context[: batch.shared] for question in batch.questions]))
    cache = model.new_cache(len(batch.questions), capacity)
    last = model.hidden(ids.to(model.embedding.weight.device), cache)[:, -1:]
    return Beginning(batch.shared, cache, last)


def losses_of(model: GPT, rows: Sequence[Row], beginning: Beginning | None) -> list[float]:
    """The loss of each row's ending, summed over its tokens in float64. What the beginning has is not read again."""
    device = model.embedding.weight.device
    read = beginning.length if beginning is not None else 0
    targets = padded([_targets(row)[max(0, read - 1) :] for row in rows], IGNORED)
    parts = []
    if beginning is not None:
        places = torch.tensor([row.place for row in rows], device=device)
        parts.append(beginning.last[places])
    if read + 1 < len(rows[0].tokens):  # the longest row; else all endings have one token
        # Padding stands behind an ending, where no token of it looks.
        inputs = padded([row.tokens[read:-1] for row in rows], 0).to(device)
        parts.append(model.hidden(inputs, beginning.cache.select(places) if beginning is not None else None))
    scored = targets != IGNORED
    hidden = torch.cat(parts, dim=1)[scored.to(device)]
    losses = token_losses(
        hidden, model.head.weight, targets[scored].to(device), model.vocab_size, model.config.logit_softcap
    )
    line = np.repeat(np.arange(len(rows)), scored.sum(dim=1).numpy())
    sums: list[float] = np.bincount(line, weights=losses.cpu().double().numpy()).tolist()
    return sums


def _targets(row: Row) -> Ids:
    """What each token but the last is to predict, `IGNORED` before the ending."""
    targets = row.tokens[1:].copy()
    targets[: len(targets) - row.scored] = IGNORED
    return targets


def padded(rows: Sequence[Ids], value: int) -> Tensor:
    """Rows of any lengths as one tensor (R, T), filled up with `value` at their ends."""
    table = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(table)
