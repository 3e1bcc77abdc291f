"""Answers to the page's questions: every number is the model's own.

Each function takes a model that is held and a question, and gives plain values, or packed arrays. They run one at a time.

Shapes: `L` layers, `H` heads, `T` tokens, `R` cells of a thumbnail, `D` head width, `V` ids that may be drawn.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from glassgpt.generation.generate import generate
from glassgpt.interpretability import weights
from glassgpt.interpretability.capture import (
    ActivationCache,
    LayerActivations,
    attention_overview,
    capture,
    require_index,
)
from glassgpt.interpretability.head_scores import HEAD_TYPES, head_scores
from glassgpt.interpretability.interventions import Edit, edited
from glassgpt.interpretability.logit_lens import logit_attribution, logit_lens, predictions
from glassgpt.playground.model_pool import Captures, Held
from glassgpt.playground.schemas import (
    MOST_TOKENS,
    AttributionQuestion,
    CutQuestion,
    HeadQuestion,
    LensQuestion,
    MergesQuestion,
    NearQuestion,
    NextQuestion,
    PictureQuestion,
    Question,
    SeenQuestion,
    TableQuestion,
    TextQuestion,
    WeightQuestion,
    WriteQuestion,
)
from glassgpt.playground.wire_format import pack
from glassgpt.tokenizers.builtin import BPETokenizer, Tokenizer
from glassgpt.tokenizers.inspect import merge_states
from glassgpt.utils.errors import UserError
from glassgpt.utils.escape import escape_token

Answer = dict[str, Any] | bytes
Capturing = Callable[[SeenQuestion], ActivationCache]

DEFAULT_TEXT = "When Mary and John went to the store, John gave a drink to"
"""Of Wang et al., 2022: names that come again, for heads to find."""

LENS_POSITIONS = 32
"""Positions at once: 0.3 s with GPT-2 on two cores."""


# --- the model and its tokens -----------------------------------------------------------------------------------------------


def model_facts(held: Held, question: Question) -> Answer:
    """What a model is."""
    config, tokenizer = held.model.config, held.tokenizer
    parameters = dict(held.model.named_parameters())
    return {
        "name": held.name,
        "step": held.step,
        "config": dataclasses.asdict(config),
        "kv_heads": config.resolved_n_kv_head,
        "head_width": config.resolved_head_dim,
        "inner_width": config.resolved_n_inner,
        "windows": config.windows,
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "tokenizer": None if tokenizer is None else tokenizer.kind,
        "vocab_size": held.vocab_size,
        "most_tokens": most_tokens(held),
        "has_merges": isinstance(tokenizer, BPETokenizer),
        "tables": list(weights.tables(held.model)),
        "weights": [{"name": name, "shape": list(parameter.shape)} for name, parameter in parameters.items()],
        "default_text": default_text(held),
        "seconds": held.seconds,
    }


def most_tokens(held: Held) -> int:
    """Tokens of a text that can be looked at: as many as the context has, within what the page can show."""
    config = held.model.config
    return MOST_TOKENS if config.has_unlimited_context else min(MOST_TOKENS, config.context_length)


def default_text(held: Held) -> str:
    """A text to begin with, in the model's own ids."""
    if held.tokenizer is None:
        return " ".join(str(i) for i in range(min(8, held.vocab_size)))
    try:
        ids = ids_of(held.tokenizer, DEFAULT_TEXT)
        if len(ids) <= most_tokens(held):
            return DEFAULT_TEXT
        return held.tokenizer.decode(held.tokenizer.encode(DEFAULT_TEXT)[: most_tokens(held) // 2])
    except UserError:  # characters that it does not know
        return held.tokenizer.decode(range(min(8, held.vocab_size)))


def vocabulary(held: Held, question: Question) -> Answer:
    """Every id as it looks within a text."""
    tokenizer, size = held.tokenizer, held.model.vocab_size
    if tokenizer is None:
        return {"pieces": [str(i) for i in range(size)]}
    known = [escape_token(tokenizer.decode_bytes([i], after=i)) for i in range(held.vocab_size)]
    return {"pieces": known + [f"<{i}>" for i in range(held.vocab_size, size)]}


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text of its own, what the model expects before it first. Raises `UserError` where it has none."""
    return [*tokenizer.prompt_prefix, *tokenizer.encode(text).tolist()]


def tokens(held: Held, question: CutQuestion) -> Answer:
    """A text cut into tokens. For a model without a tokenizer the text is ids, with white space between."""
    tokenizer = held.tokenizer
    if tokenizer is None:
        ids = numbers(question.text)
        require_ids(held, ids)
        return {"ids": ids, "pieces": [str(i) for i in ids], "partial": [False] * len(ids), "bytes": [""] * len(ids)}
    ids = ids_of(tokenizer, question.text)
    parts = [tokenizer.decode_bytes([i], after=before) for before, i in zip([None, *ids], ids, strict=False)]
    return {
        "ids": ids,
        "pieces": [escape_token(part) for part in parts],
        "partial": [is_partial(part) for part in parts],
        "bytes": [part.hex() for part in parts],
    }


def numbers(text: str) -> list[int]:
    """The ids that a text spells. Raises `UserError` where it is anything else."""
    words = text.split()
    wrong = next((word for word in words if not (word.isascii() and word.isdigit() and len(word) <= 9)), None)
    if wrong is not None or not words:
        raise UserError(
            "this model has no tokenizer: write token ids, with spaces between"
            + (f", and not {wrong!r}" if wrong else "")
        )
    return [int(word) for word in words]


def is_partial(data: bytes) -> bool:
    """Whether bytes are no whole characters."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False


def merges(held: Held, question: MergesQuestion) -> Answer:
    """How byte-level BPE merges a text, state after state."""
    if not isinstance(held.tokenizer, BPETokenizer):
        raise UserError("this model's tokenizer has no merges to show: it is no byte-level BPE")
    return {"states": [[escape_token(part) for part in state] for state in merge_states(held.tokenizer, question.text)]}


# --- what it computes over a text -------------------------------------------------------------------------------------------


def require_ids(held: Held, ids: Sequence[int]) -> None:
    """Raise `UserError` for an id that the model does not have."""
    wrong = next((i for i in ids if not 0 <= i < held.vocab_size), None)
    if wrong is not None:
        raise UserError(f"there is no token {wrong}: the ids are 0 to {held.vocab_size - 1}")


def require_text(held: Held, ids: Sequence[int]) -> None:
    """Raise `UserError` for a text that the model cannot read at once."""
    require_ids(held, ids)
    if len(ids) > most_tokens(held):
        raise UserError(
            f"the text has {len(ids):,} tokens, and {most_tokens(held):,} is the most that can be looked at"
        )


def seen_by(captures: Captures, held: Held) -> Capturing:
    """What a model computes over a question's text, its changes made: the last ones are kept."""

    def seen(question: SeenQuestion) -> ActivationCache:
        changes = (tuple(question.edits), tuple(question.source or ())) if question.edits else ()
        return captures.get(held, (tuple(question.ids), *changes), lambda: looked(question))

    @torch.no_grad()
    def looked(question: SeenQuestion) -> ActivationCache:
        with changed(held, question, seen), capture(held.model) as found:
            held.model.hidden(ids_on_device(held, question.ids))
        for layer in found.layers:
            del layer.mlp_post, layer.resid_mid  # nearly a third of all, and no request reads them
        return found

    return seen


def ids_on_device(held: Held, ids: Sequence[int]) -> Tensor:
    """A text's ids (1, T) for the model. Raises `UserError` where it cannot read them at once."""
    require_text(held, ids)
    return torch.tensor([ids], device=held.model.embedding.weight.device)


def changed(held: Held, question: SeenQuestion, seen: Capturing) -> AbstractContextManager[None]:
    """The model with a question's changes made. Raises `UserError` for a part that is not there."""
    if not question.edits:
        return nullcontext()
    source = None
    if question.source is not None:
        source = seen(SeenQuestion(model=question.model, step=question.step, ids=question.source))
    return edited(held.model, [Edit(**vars(choice)) for choice in question.edits], source)


def attention(held: Held, question: SeenQuestion, seen: Capturing) -> Answer:
    """All heads at a glance."""
    overview = attention_overview(seen(question))
    thumbnails = (255 * overview.thumbnails).round().to(torch.uint8)
    values = {"differences": overview.kernel_errors, "tokens": len(question.ids), "cells": thumbnails.shape[-1]}
    return pack({"thumbnails": thumbnails, "entropies": overview.entropies}, values)


def layer_of(held: Held, question: HeadQuestion, seen: Capturing) -> LayerActivations:
    """The layer that a question is about. Raises `UserError` where there is no such layer, or head."""
    require_index("layer", question.layer, held.model.config.n_layer)
    require_index("head", question.head, held.model.config.n_head)
    return seen(question).layers[question.layer]


def shared_head(held: Held, head: int) -> int:
    """The key/value head that a query head uses."""
    config = held.model.config
    return head // (config.n_head // config.resolved_n_kv_head)


def head(held: Held, question: HeadQuestion, seen: Capturing) -> Answer:
    """One head's attention pattern."""
    layer = layer_of(held, question, seen)
    pattern = layer.pattern(question.head)
    values = {
        "kv_head": shared_head(held, question.head),
        "window": layer.span.window,
        "globals": layer.span.n_global,
        "difference": layer.kernel_error(pattern, question.head),
    }
    return pack({"pattern": pattern[0]}, values)


def vectors(held: Held, question: HeadQuestion, seen: Capturing) -> Answer:
    """One head's queries, keys and values, before rotary positions and behind them, and what it took from the values."""
    layer, shared = layer_of(held, question, seen), shared_head(held, question.head)
    arrays = {
        "q_norm": layer.q_norm[0, question.head],
        "k_norm": layer.k_norm[0, shared],
        "rot_q": layer.rot_q[0, question.head],
        "rot_k": layer.rot_k[0, shared],
        "v": layer.v[0, shared],
        "kernel_out": layer.kernel_out[0, question.head],
    }
    return pack(
        {name: array.float() for name, array in arrays.items()},
        {"scale": 1 / math.sqrt(held.model.config.resolved_head_dim)},
    )


def expectations(held: Held, question: SeenQuestion, seen: Capturing) -> Answer:
    """What was expected in each token's place."""
    found = predictions(held.model, seen(question))
    return pack(
        {"surprisal": found.surprisal, "top_ids": found.top_ids, "top_p": found.top_p, "entropy": found.entropy}, {}
    )


def lens(held: Held, question: LensQuestion, seen: Capturing) -> Generator[None, None, Answer]:
    """What would be expected at each depth. A long text takes seconds: some positions at a time, so that others have their turn."""
    found = seen(question)
    if not 0 <= question.start < question.stop <= len(question.ids):
        raise UserError(
            f"there are no positions {question.start} to {question.stop}: the text has {len(question.ids)} tokens"
        )
    parts = []
    for start in range(question.start, question.stop, LENS_POSITIONS):
        stop = min(start + LENS_POSITIONS, question.stop)
        parts.append(logit_lens(held.model, found, start, stop, question.k, question.watch))
        yield
    names = ("top_ids", "top_p", "watch_rank", "watch_p", "next_rank", "next_p", "entropy", "norm")
    return pack({name: torch.cat([getattr(part, name) for part in parts], dim=1) for name in names}, {})


def attribution(held: Held, question: AttributionQuestion, seen: Capturing) -> Answer:
    """What each part adds to a logit."""
    found = logit_attribution(held.model, seen(question), question.position, question.token, question.against)
    return {**dataclasses.asdict(found), "capped": held.model.config.logit_softcap is not None}


@torch.no_grad()
def next_logits(held: Held, question: NextQuestion, seen: Capturing) -> Answer:
    """The logits of what may come behind a position."""
    position = len(question.ids) - 1 if question.position is None else question.position
    require_index("position", position, len(question.ids))
    if question.edits:  # asked for one change after the other: nothing but the end of the pass is of use
        with changed(held, question, seen):
            hidden = held.model.hidden(ids_on_device(held, question.ids))
    else:
        hidden = seen(question).ln_final
    return pack({"logits": held.model.logits(hidden[0, position])[: held.vocab_size].float()}, {})


# --- what it writes ---------------------------------------------------------------------------------------------------------


def writing(held: Held, question: WriteQuestion) -> Generator[dict[str, Any], None, None]:
    """A text's continuation, token by token: that of `glassgpt generate` with the same settings. Raises `UserError` at once."""
    require_ids(held, question.ids)
    tokens = generate(
        held.model,
        held.tokenizer,
        question.ids,
        max_new_tokens=question.max_new_tokens,
        temperature=question.temperature,
        top_k=question.top_k,
        top_p=question.top_p,
        min_p=question.min_p,
        n=question.n,
        seed=question.seed,
        probabilities=True,
    )

    def told() -> Generator[dict[str, Any], None, None]:
        begin, count = time.perf_counter(), 0
        for token in tokens:
            count += 1
            text = token.text if held.tokenizer is not None else f" {token.token_id}"
            yield {"sample": token.sample, "token": token.token_id, "text": text, "p": token.probability}
        yield {"done": True, "tokens": count, "seconds": time.perf_counter() - begin}

    return told()


# --- what it knows ----------------------------------------------------------------------------------------------------------


def scored_heads(held: Held, question: Question) -> Answer:
    """Each head's score for each known type."""
    return {"head_types": list(HEAD_TYPES), "head_scores": head_scores(held.model).tolist()}


def table_of(held: Held, name: str) -> Tensor:
    """One of the model's tables (N, C). Raises `UserError` where it has no such table."""
    found = weights.tables(held.model)
    if name not in found:
        raise UserError(f"this model has no table {name!r}: it has {', '.join(found)}")
    return found[name]


def table_map(held: Held, question: TableQuestion) -> Answer:
    """A table's rows along its principal components."""
    found = weights.principal_components(table_of(held, question.table))
    return pack({"points": found.points, "explained": found.explained}, {})


def near(held: Held, question: NearQuestion) -> Answer:
    """The rows nearest to one."""
    found = weights.nearest(table_of(held, question.table), question.id, question.k)
    return {"ids": found.ids.tolist(), "cosines": found.cosines.tolist()}


def weight(held: Held, question: PictureQuestion) -> Answer:
    """A parameter's picture, and a few numbers of it."""
    found = weights.weight_of(held.model, question.name)
    values = {"shape": list(found.shape), **dataclasses.asdict(weights.statistics(found))}
    return pack({"picture": weights.thumbnail(found, question.size)}, values)


def spectrum(held: Held, question: WeightQuestion) -> Answer:
    """A matrix's singular values."""
    return pack({"singular_values": weights.singular_values(weights.weight_of(held.model, question.name))}, {})


def gradients(held: Held, question: TextQuestion) -> Answer:
    """How hard a text pulls at each parameter."""
    return dataclasses.asdict(weights.gradient_norms(held.model, ids_on_device(held, question.ids)))
