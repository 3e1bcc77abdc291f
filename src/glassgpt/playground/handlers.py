"""One function per request of the page, with its fields as parameters (see `schema_of`).

They run one at a time, without gradients, and return plain values or packed arrays: the model's own numbers.
Shapes: `L` layers, `H` heads, `T` tokens, `D` head width, `V` token ids that can be generated.
"""

import dataclasses
import math
import re
import time
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor

from glassgpt.generation.generate import generate, prompt_ids
from glassgpt.interpretability import weights
from glassgpt.interpretability.capture import ActivationCache, attention_overview, capture, require_index
from glassgpt.interpretability.head_scores import HEAD_TYPES, head_scores
from glassgpt.interpretability.interventions import edited
from glassgpt.interpretability.logit_lens import logit_attribution, logit_lens, predictions
from glassgpt.model.finite import require_finite
from glassgpt.model.gpt import Block
from glassgpt.playground.model_pool import LoadedModel
from glassgpt.playground.schemas import MAX_TOKENS, CaptureRequest, GenerateRequest, pack
from glassgpt.tokenizers.builtin import BPETokenizer
from glassgpt.tokenizers.inspect import merge_states
from glassgpt.utils.errors import UserError
from glassgpt.utils.formatting import escape_token

Answer = dict[str, Any] | bytes

# From Wang et al., 2022: repeated names that heads can find.
DEFAULT_TEXT = "When Mary and John went to the store, John gave a drink to"
MAX_MERGE_CHARACTERS = 64
MAX_LENS_POSITIONS = 128  # per request: 32 take 0.3 s with GPT-2 on two cores, and other requests wait


def describe_model(loaded: LoadedModel) -> Answer:
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
        "bytes_per_number": loaded.model.embedding.weight.element_size(),
        "most_tokens": max_tokens(loaded),
        "has_merges": isinstance(tokenizer, BPETokenizer),
        "tables": list(weights.tables(loaded.model)),
        "weights": [{"name": name, "shape": list(parameter.shape)} for name, parameter in parameters.items()],
        "default_text": default_text(loaded),
        "seconds": loaded.load_seconds,
    }


def max_tokens(loaded: LoadedModel) -> int:
    """Most tokens of a text: the model's context, and what the page can show."""
    config = loaded.model.config
    return MAX_TOKENS if config.has_unlimited_context else min(MAX_TOKENS, config.context_length)


def default_text(loaded: LoadedModel) -> str:
    """The text that the page starts with."""
    if loaded.tokenizer is None:
        return " ".join(str(i) for i in range(min(8, loaded.vocab_size)))
    try:
        if prompt_ids(loaded.model, loaded.tokenizer, DEFAULT_TEXT).numel() <= max_tokens(loaded):
            return DEFAULT_TEXT
        return loaded.tokenizer.decode(loaded.tokenizer.encode(DEFAULT_TEXT)[: max_tokens(loaded) // 2])
    except UserError:  # the vocabulary lacks some of its characters
        return loaded.tokenizer.decode(range(min(8, loaded.vocab_size)))


def vocabulary(loaded: LoadedModel) -> Answer:
    tokenizer, size = loaded.tokenizer, loaded.model.vocab_size
    if tokenizer is None:
        return {"pieces": [str(i) for i in range(size)]}
    known = [escape_token(tokenizer.decode_bytes([i], after=i)) for i in range(loaded.vocab_size)]
    return {"pieces": known + [f"<{i}>" for i in range(loaded.vocab_size, size)]}


def tokens(loaded: LoadedModel, text: str) -> Answer:
    """The tokens of a text. For a model without a tokenizer, the text is token ids separated by white space."""
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        words = text.split()
        wrong = [word for word in words if not re.fullmatch("[0-9]{1,9}", word)]
        if wrong or not words:
            got = f", got {wrong[0]!r}" if wrong else ""
            raise UserError(f"this model has no tokenizer: write token ids separated by spaces{got}")
        ids = [int(word) for word in words]
        require_ids(loaded, ids)
        return {"ids": ids, "pieces": [str(i) for i in ids], "partial": [False] * len(ids), "bytes": [""] * len(ids)}
    ids = prompt_ids(loaded.model, tokenizer, text)[0].tolist()
    pieces = [tokenizer.decode_bytes([i], after=before) for before, i in zip([None, *ids], ids, strict=False)]
    return {
        "ids": ids,
        "pieces": [escape_token(piece) for piece in pieces],
        "partial": [piece.decode(errors="ignore").encode() != piece for piece in pieces],  # has a part of a character
        "bytes": [piece.hex() for piece in pieces],
    }


def merges(loaded: LoadedModel, text: str) -> Answer:
    """The states of a text as byte-level BPE merges it."""
    if not isinstance(loaded.tokenizer, BPETokenizer):
        raise UserError("this model's tokenizer has no merges: it is not byte-level BPE")
    if len(text) > MAX_MERGE_CHARACTERS:
        raise UserError(f"text must have at most {MAX_MERGE_CHARACTERS} characters, got {len(text):,}")
    return {"states": [[escape_token(piece) for piece in state] for state in merge_states(loaded.tokenizer, text)]}


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


def activations(loaded: LoadedModel, request: CaptureRequest) -> ActivationCache:
    """The activations over a text with the request's edits, from the cache if it was asked for before."""

    def compute() -> ActivationCache:
        with apply_edits(loaded, request), capture(loaded.model) as cache:
            hidden = loaded.model.hidden(ids_on_device(loaded, request.ids))
        require_finite(hidden, loaded.model)
        for layer in cache.layers:
            del layer.mlp_post, layer.resid_mid  # nearly a third of the memory, and no request reads them
        return cache

    edits = (tuple(request.edits), tuple(request.source or ())) if request.edits else ()
    return loaded.captures.get(loaded, (tuple(request.ids), *edits), compute)


def apply_edits(loaded: LoadedModel, request: CaptureRequest) -> AbstractContextManager[None]:
    """A context in which the model has the request's edits. Raises `UserError` for a part that does not exist."""
    source = None
    if request.edits and request.source is not None:
        source = activations(loaded, CaptureRequest(model=request.model, ids=request.source))
    return edited(loaded.model, request.edits, source)


def attention(loaded: LoadedModel, request: CaptureRequest) -> Answer:
    """Thumbnails of all heads' patterns, and their entropies."""
    thumbnails, entropies, errors = attention_overview(activations(loaded, request))
    values = {"differences": errors, "tokens": len(request.ids), "cells": thumbnails.shape[-1]}
    return pack({"thumbnails": (255 * thumbnails).round().to(torch.uint8), "entropies": entropies}, values)


def kv_head_of(loaded: LoadedModel, layer: int, head: int) -> int:
    """The key/value head that a head uses. Raises `UserError` for a layer or head out of range."""
    config = loaded.model.config
    require_index("layer", layer, config.n_layer)
    require_index("head", head, config.n_head)
    return head * config.resolved_n_kv_head // config.n_head


def head(loaded: LoadedModel, request: CaptureRequest, layer: int, head: int) -> Answer:
    """One head's attention pattern (T, T)."""
    kv_head, cache = kv_head_of(loaded, layer, head), activations(loaded, request).layers[layer]
    pattern = cache.pattern(head)
    values = {"kv_head": kv_head, "window": cache.span.window, "globals": cache.span.n_global}
    return pack({"pattern": pattern[0]}, {**values, "difference": cache.kernel_error(pattern, head)})


def vectors(loaded: LoadedModel, request: CaptureRequest, layer: int, head: int) -> Answer:
    """One head's queries and keys before and after rotary positions, values, outputs (T, D), and any bias (T, T)."""
    kv_head, cache = kv_head_of(loaded, layer, head), activations(loaded, request).layers[layer]
    heads = {"q_norm": head, "k_norm": kv_head, "rot_q": head, "rot_k": kv_head, "v": kv_head, "kernel_out": head}
    arrays = {name: getattr(cache, name)[0, index].float() for name, index in heads.items()}
    if cache.kernel_bias is not None:
        arrays["bias"] = cache.kernel_bias[head].float()
    return pack(arrays, {"scale": 1 / math.sqrt(loaded.model.config.resolved_head_dim)})


def flow(loaded: LoadedModel, request: CaptureRequest, position: int, layer: int) -> Answer:
    """What one token passes through: all layers' norms (L, 4), and the vectors and weights (H, T) of one layer.

    A row of `norms` is what attention and feed-forward add, and the residual stream before and after the layer.
    """
    model, cache = loaded.model, activations(loaded, request)
    require_index("position", position, len(request.ids))
    require_index("layer", layer, model.config.n_layer)
    at = [
        (one.attn_out[0, position], one.mlp_out[0, position], one.resid_pre[0, position], one.resid_post[0, position])
        for one in cache.layers
    ]
    norms = torch.stack([torch.linalg.vector_norm(torch.stack(rows).float(), dim=-1) for rows in at])
    one, block = cache.layers[layer], cast(Block, model.blocks[layer])
    attn_out, mlp_out, before, after = at[layer]
    inner: list[Tensor] = []  # computed again for this one token: keeping it for all would take much memory
    with block.feed_forward.down.register_forward_pre_hook(lambda _, inputs: inner.append(inputs[0])):
        block.feed_forward(block.feed_forward_norm(before + attn_out))
    arrays = {
        "norms": norms, "embedding": model.embedding.weight[request.ids[position]],
        "resid_pre": before, "attn_out": attn_out, "mlp_post": inner[0], "mlp_out": mlp_out, "resid_post": after,
        "first": cache.layers[0].resid_pre[0, position], "ln_final": cache.ln_final[0, position],
        "pattern": one.row(position)[0],
    }  # fmt: skip
    return pack({name: array.float() for name, array in arrays.items()}, {})


def predict(loaded: LoadedModel, request: CaptureRequest) -> Answer:
    """The surprisal of each token, and the most likely tokens at each position."""
    result = predictions(loaded.model, activations(loaded, request))
    return pack({name: getattr(result, name) for name in ("surprisal", "top_ids", "top_p", "entropy")}, {})


def lens(
    loaded: LoadedModel, request: CaptureRequest, start: int, stop: int, k: int = 5, watch: list[int] | None = None
) -> Answer:
    """The logit lens: the predictions from each layer (L + 1, positions, ...), and of the tokens `watch`."""
    if stop - start > MAX_LENS_POSITIONS:
        raise UserError(f"at most {MAX_LENS_POSITIONS} positions at once, got start {start} and stop {stop}")
    result = logit_lens(loaded.model, activations(loaded, request), start, stop, k, watch or ())
    names = ("top_ids", "top_p", "watch_rank", "watch_p", "next_rank", "next_p", "entropy", "norm")
    return pack({name: getattr(result, name) for name in names}, {})


def attribution(
    loaded: LoadedModel, request: CaptureRequest, position: int, token: int, against: int | None = None
) -> Answer:
    """What each part of the model adds to a logit."""
    result = logit_attribution(loaded.model, activations(loaded, request), position, token, against)
    return {**dataclasses.asdict(result), "capped": loaded.model.config.logit_softcap is not None}


def next_logits(loaded: LoadedModel, request: CaptureRequest, position: int | None = None) -> Answer:
    """The logits (V) of the token after a position, by default the last one."""
    position = len(request.ids) - 1 if position is None else position
    require_index("position", position, len(request.ids))
    if request.edits:  # sweeps try each edit once: a capture would never be used again
        with apply_edits(loaded, request):
            hidden = loaded.model.hidden(ids_on_device(loaded, request.ids))
    else:
        hidden = activations(loaded, request).ln_final
    logits = loaded.model.logits(hidden[0, position])[: loaded.vocab_size].float()
    require_finite(logits, loaded.model)
    return pack({"logits": logits}, {})


def generate_text(loaded: LoadedModel, request: GenerateRequest) -> Generator[dict[str, Any]]:
    """The continuation of a text, token by token, as `glassgpt generate` with the same options."""
    require_ids(loaded, request.ids)
    options = {name: value for name, value in vars(request).items() if name not in ("model", "step", "ids")}
    begin, count = time.perf_counter(), 0
    for token in generate(loaded.model, loaded.tokenizer, request.ids, **options, probabilities=True):
        count += 1
        text = token.text if loaded.tokenizer is not None else f" {token.token_id}"
        yield {"sample": token.sample, "token": token.token_id, "text": text, "p": token.probability}
    yield {"done": True, "tokens": count, "seconds": time.perf_counter() - begin}


def score_heads(loaded: LoadedModel) -> Answer:
    return {"head_types": list(HEAD_TYPES), "head_scores": head_scores(loaded.model).tolist()}


def table_of(loaded: LoadedModel, name: str) -> Tensor:
    """One of the model's tables (N, C). Raises `UserError` if it has no such table."""
    tables = weights.tables(loaded.model)
    if name not in tables:
        raise UserError(f"this model has no table {name!r}; it has {', '.join(tables)}")
    return tables[name]


def table_map(loaded: LoadedModel, table: str) -> Answer:
    """A table's rows along its principal components."""
    points, explained = weights.principal_components(table_of(loaded, table))
    return pack({"points": points, "explained": explained}, {})


def neighbours(loaded: LoadedModel, table: str, id: int, k: int = 12) -> Answer:
    """The rows nearest to one row."""
    ids, cosines = weights.nearest(table_of(loaded, table), id, k)
    return {"ids": ids.tolist(), "cosines": cosines.tolist()}


def weight(loaded: LoadedModel, name: str, size: int = 256) -> Answer:
    """A parameter as a picture of at most `size` rows and columns, with statistics."""
    tensor = weights.weight_of(loaded.model, name)
    values = {"shape": list(tensor.shape), **weights.statistics(tensor)}
    return pack({"picture": weights.thumbnail(tensor, size)}, values)


def spectrum(loaded: LoadedModel, name: str) -> Answer:
    return pack({"singular_values": weights.singular_values(weights.weight_of(loaded.model, name))}, {})


def gradients(loaded: LoadedModel, ids: list[int]) -> Answer:
    """The norm of each parameter's gradient for a text."""
    loss, norms = weights.gradient_norms(loaded.model, ids_on_device(loaded, ids))
    parts = [{"name": name, "weight_norm": w, "gradient_norm": g} for name, (w, g) in norms.items()]
    return {"loss": loss, "parts": parts}
