"""One function per request of the page. Every number is the model's own.

Each function takes a loaded model and a request, and returns plain values or packed arrays. They run one at a time.

Shapes: `L` layers, `H` heads, `T` tokens, `D` head width, `V` token ids that can be generated.
"""

import dataclasses
import math
import time
from collections.abc import Generator, Sequence
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
from glassgpt.playground import schemas
from glassgpt.playground.model_pool import LoadedModel
from glassgpt.playground.wire_format import pack
from glassgpt.tokenizers.builtin import BPETokenizer, Tokenizer
from glassgpt.tokenizers.inspect import merge_states
from glassgpt.utils.errors import UserError
from glassgpt.utils.formatting import escape_token

Answer = dict[str, Any] | bytes

DEFAULT_TEXT = "When Mary and John went to the store, John gave a drink to"
"""From Wang et al., 2022: repeated names that heads can find."""
MAX_MERGE_CHARACTERS = 64
MAX_LENS_POSITIONS = 128
"""Positions per request: 32 take 0.3 s with GPT-2 on two cores, and other requests wait."""


# --- the model and its tokens -----------------------------------------------------------------------------------------


def describe_model(loaded: LoadedModel, request: schemas.ModelRequest) -> Answer:
    """The model's config, parameters and tokenizer."""
    config, tokenizer = loaded.model.config, loaded.tokenizer
    parameters = dict(loaded.model.named_parameters())
    return {
        "name": loaded.name,
        "step": loaded.step,
        "config": dataclasses.asdict(config),
        "kv_heads": config.resolved_n_kv_head,
        "head_width": config.resolved_head_dim,
        "inner_width": config.resolved_n_inner,
        "windows": config.windows,
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "tokenizer": None if tokenizer is None else tokenizer.kind,
        "vocab_size": loaded.vocab_size,
        "most_tokens": max_tokens(loaded),
        "has_merges": isinstance(tokenizer, BPETokenizer),
        "tables": list(weights.tables(loaded.model)),
        "weights": [{"name": name, "shape": list(parameter.shape)} for name, parameter in parameters.items()],
        "default_text": default_text(loaded),
        "seconds": loaded.seconds,
    }


def max_tokens(loaded: LoadedModel) -> int:
    """Most tokens of a text: the model's context, and what the page can show."""
    config = loaded.model.config
    return schemas.MAX_TOKENS if config.has_unlimited_context else min(schemas.MAX_TOKENS, config.context_length)


def default_text(loaded: LoadedModel) -> str:
    """The text that the page starts with."""
    if loaded.tokenizer is None:
        return " ".join(str(i) for i in range(min(8, loaded.vocab_size)))
    try:
        if len(encode_text(loaded.tokenizer, DEFAULT_TEXT)) <= max_tokens(loaded):
            return DEFAULT_TEXT
        return loaded.tokenizer.decode(loaded.tokenizer.encode(DEFAULT_TEXT)[: max_tokens(loaded) // 2])
    except UserError:  # the vocabulary lacks some of its characters
        return loaded.tokenizer.decode(range(min(8, loaded.vocab_size)))


def vocabulary(loaded: LoadedModel, request: schemas.ModelRequest) -> Answer:
    """The display form of each token id."""
    tokenizer, size = loaded.tokenizer, loaded.model.vocab_size
    if tokenizer is None:
        return {"pieces": [str(i) for i in range(size)]}
    known = [escape_token(tokenizer.decode_bytes([i], after=i)) for i in range(loaded.vocab_size)]
    return {"pieces": known + [f"<{i}>" for i in range(loaded.vocab_size, size)]}


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of a text, with the tokens that the model expects before a prompt. Raises `UserError`."""
    return [*tokenizer.prompt_prefix, *tokenizer.encode(text).tolist()]


def tokens(loaded: LoadedModel, request: schemas.EncodeRequest) -> Answer:
    """The tokens of a text. For a model without a tokenizer, the text is token ids separated by white space."""
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        ids = parse_ids(request.text)
        require_ids(loaded, ids)
        return {"ids": ids, "pieces": [str(i) for i in ids], "partial": [False] * len(ids), "bytes": [""] * len(ids)}
    ids = encode_text(tokenizer, request.text)
    pieces = [tokenizer.decode_bytes([i], after=before) for before, i in zip([None, *ids], ids, strict=False)]
    return {
        "ids": ids,
        "pieces": [escape_token(piece) for piece in pieces],
        "partial": [is_partial(piece) for piece in pieces],
        "bytes": [piece.hex() for piece in pieces],
    }


def parse_ids(text: str) -> list[int]:
    """The token ids in a text. Raises `UserError` if it contains anything else."""
    words = text.split()
    wrong = [word for word in words if not (word.isascii() and word.isdigit() and len(word) <= 9)]
    if wrong or not words:
        got = f", got {wrong[0]!r}" if wrong else ""
        raise UserError(f"this model has no tokenizer: write token ids separated by spaces{got}")
    return [int(word) for word in words]


def is_partial(piece: bytes) -> bool:
    """Whether bytes contain part of a character."""
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False


def merges(loaded: LoadedModel, request: schemas.EncodeRequest) -> Answer:
    """The states of a text as byte-level BPE merges it."""
    if not isinstance(loaded.tokenizer, BPETokenizer):
        raise UserError("this model's tokenizer has no merges: it is not byte-level BPE")
    if len(request.text) > MAX_MERGE_CHARACTERS:
        raise UserError(f"text must have at most {MAX_MERGE_CHARACTERS} characters, got {len(request.text):,}")
    states = merge_states(loaded.tokenizer, request.text)
    return {"states": [[escape_token(piece) for piece in state] for state in states]}


# --- activations over a text ------------------------------------------------------------------------------------------


def require_ids(loaded: LoadedModel, ids: Sequence[int]) -> None:
    """Raise `UserError` for an id that the model does not have."""
    for i in ids:
        require_index("token", i, loaded.vocab_size)


def ids_on_device(loaded: LoadedModel, ids: Sequence[int]) -> Tensor:
    """A text's ids (1, T) for the model. Raises `UserError` if it cannot read them at once."""
    require_ids(loaded, ids)
    if len(ids) > max_tokens(loaded):
        raise UserError(f"the text has {len(ids):,} tokens; this model's limit is {max_tokens(loaded):,}")
    return torch.tensor([ids], device=loaded.model.embedding.weight.device)


def activations(loaded: LoadedModel, request: schemas.CaptureRequest) -> ActivationCache:
    """The activations over a text with the request's edits, from the cache if it was asked for before."""
    edits = (tuple(request.edits), tuple(request.source or ())) if request.edits else ()
    return loaded.captures.get(loaded, (tuple(request.ids), *edits), lambda: _compute_activations(loaded, request))


@torch.no_grad()
def _compute_activations(loaded: LoadedModel, request: schemas.CaptureRequest) -> ActivationCache:
    with apply_edits(loaded, request), capture(loaded.model) as cache:
        loaded.model.hidden(ids_on_device(loaded, request.ids))
    for layer in cache.layers:
        del layer.mlp_post, layer.resid_mid  # nearly a third of the memory, and no request reads them
    return cache


def apply_edits(loaded: LoadedModel, request: schemas.CaptureRequest) -> AbstractContextManager[None]:
    """A context in which the model has the request's edits. Raises `UserError` for a part that does not exist."""
    if not request.edits:
        return nullcontext()
    source = None
    if request.source is not None:
        source = activations(loaded, schemas.CaptureRequest(model=request.model, ids=request.source))
    return edited(loaded.model, [Edit(**vars(edit)) for edit in request.edits], source)


def attention(loaded: LoadedModel, request: schemas.CaptureRequest) -> Answer:
    """Thumbnails of all heads' patterns, and their entropies."""
    overview = attention_overview(activations(loaded, request))
    thumbnails = (255 * overview.thumbnails).round().to(torch.uint8)
    values = {"differences": overview.kernel_errors, "tokens": len(request.ids), "cells": thumbnails.shape[-1]}
    return pack({"thumbnails": thumbnails, "entropies": overview.entropies}, values)


def find_head(loaded: LoadedModel, request: schemas.HeadRequest) -> tuple[LayerActivations, int]:
    """The request's layer, and the key/value head that its head uses. Raises `UserError` if they do not exist."""
    config = loaded.model.config
    require_index("layer", request.layer, config.n_layer)
    require_index("head", request.head, config.n_head)
    kv_head = request.head * config.resolved_n_kv_head // config.n_head
    return activations(loaded, request).layers[request.layer], kv_head


def head(loaded: LoadedModel, request: schemas.HeadRequest) -> Answer:
    """One head's attention pattern (T, T)."""
    layer, kv_head = find_head(loaded, request)
    pattern = layer.pattern(request.head)
    values = {
        "kv_head": kv_head,
        "window": layer.span.window,
        "globals": layer.span.n_global,
        "difference": layer.kernel_error(pattern, request.head),
    }
    return pack({"pattern": pattern[0]}, values)


def vectors(loaded: LoadedModel, request: schemas.HeadRequest) -> Answer:
    """One head's queries and keys before and after rotary positions, values, and kernel outputs: each (T, D)."""
    layer, kv_head = find_head(loaded, request)
    arrays = {
        "q_norm": layer.q_norm[0, request.head],
        "k_norm": layer.k_norm[0, kv_head],
        "rot_q": layer.rot_q[0, request.head],
        "rot_k": layer.rot_k[0, kv_head],
        "v": layer.v[0, kv_head],
        "kernel_out": layer.kernel_out[0, request.head],
    }
    scale = 1 / math.sqrt(loaded.model.config.resolved_head_dim)
    return pack({name: array.float() for name, array in arrays.items()}, {"scale": scale})


def predict(loaded: LoadedModel, request: schemas.CaptureRequest) -> Answer:
    """The surprisal of each token, and the most likely tokens at each position."""
    result = predictions(loaded.model, activations(loaded, request))
    names = ("surprisal", "top_ids", "top_p", "entropy")
    return pack({name: getattr(result, name) for name in names}, {})


def lens(loaded: LoadedModel, request: schemas.LensRequest) -> Answer:
    """The logit lens: the predictions from each layer (L + 1, positions, ...)."""
    start, stop, cache = request.start, request.stop, activations(loaded, request)
    if not 0 <= start < stop <= min(len(request.ids), start + MAX_LENS_POSITIONS):
        limits = f"0 <= start < stop <= {len(request.ids)} and stop - start <= {MAX_LENS_POSITIONS}"
        raise UserError(f"the positions must satisfy {limits}, got start {start} and stop {stop}")
    result = logit_lens(loaded.model, cache, start, stop, request.k, request.watch)
    names = ("top_ids", "top_p", "watch_rank", "watch_p", "next_rank", "next_p", "entropy", "norm")
    return pack({name: getattr(result, name) for name in names}, {})


def attribution(loaded: LoadedModel, request: schemas.AttributionRequest) -> Answer:
    """What each part of the model adds to a logit."""
    cache = activations(loaded, request)
    result = logit_attribution(loaded.model, cache, request.position, request.token, request.against)
    return {**dataclasses.asdict(result), "capped": loaded.model.config.logit_softcap is not None}


@torch.no_grad()
def next_logits(loaded: LoadedModel, request: schemas.NextRequest) -> Answer:
    """The logits (V) of the token after a position."""
    position = len(request.ids) - 1 if request.position is None else request.position
    require_index("position", position, len(request.ids))
    if request.edits:  # sweeps try each edit once: a capture would never be used again
        with apply_edits(loaded, request):
            hidden = loaded.model.hidden(ids_on_device(loaded, request.ids))
    else:
        hidden = activations(loaded, request).ln_final
    return pack({"logits": loaded.model.logits(hidden[0, position])[: loaded.vocab_size].float()}, {})


# --- generation -------------------------------------------------------------------------------------------------------


def generate_text(loaded: LoadedModel, request: schemas.GenerateRequest) -> Generator[dict[str, Any]]:
    """The continuation of a text, token by token, as `glassgpt generate` with the same options."""
    require_ids(loaded, request.ids)
    generated = generate(
        loaded.model,
        loaded.tokenizer,
        request.ids,
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        min_p=request.min_p,
        n=request.n,
        seed=request.seed,
        probabilities=True,
    )
    begin, count = time.perf_counter(), 0
    for token in generated:
        count += 1
        text = token.text if loaded.tokenizer is not None else f" {token.token_id}"
        yield {"sample": token.sample, "token": token.token_id, "text": text, "p": token.probability}
    yield {"done": True, "tokens": count, "seconds": time.perf_counter() - begin}


# --- weights ----------------------------------------------------------------------------------------------------------


def score_heads(loaded: LoadedModel, request: schemas.ModelRequest) -> Answer:
    """Each head's score for each head type."""
    return {"head_types": list(HEAD_TYPES), "head_scores": head_scores(loaded.model).tolist()}


def table_of(loaded: LoadedModel, name: str) -> Tensor:
    """One of the model's tables (N, C). Raises `UserError` if it has no such table."""
    tables = weights.tables(loaded.model)
    if name not in tables:
        raise UserError(f"this model has no table {name!r}; it has {', '.join(tables)}")
    return tables[name]


def table_map(loaded: LoadedModel, request: schemas.TableRequest) -> Answer:
    """A table's rows along its principal components."""
    points, explained = weights.principal_components(table_of(loaded, request.table))
    return pack({"points": points, "explained": explained}, {})


def neighbours(loaded: LoadedModel, request: schemas.NeighboursRequest) -> Answer:
    """The rows nearest to one row."""
    ids, cosines = weights.nearest(table_of(loaded, request.table), request.id, request.k)
    return {"ids": ids.tolist(), "cosines": cosines.tolist()}


def weight(loaded: LoadedModel, request: schemas.WeightRequest) -> Answer:
    """A parameter as a picture, with statistics."""
    tensor = weights.weight_of(loaded.model, request.name)
    values = {"shape": list(tensor.shape), **weights.statistics(tensor)}
    return pack({"picture": weights.thumbnail(tensor, request.size)}, values)


def spectrum(loaded: LoadedModel, request: schemas.WeightRequest) -> Answer:
    """A matrix's singular values."""
    return pack({"singular_values": weights.singular_values(weights.weight_of(loaded.model, request.name))}, {})


def gradients(loaded: LoadedModel, request: schemas.TextRequest) -> Answer:
    """The norm of each parameter's gradient for a text."""
    loss, norms = weights.gradient_norms(loaded.model, ids_on_device(loaded, request.ids))
    parts = [{"name": name, "weight_norm": w, "gradient_norm": g} for name, (w, g) in norms.items()]
    return {"loss": loss, "parts": parts}
