"""Figures of what a model computes: attention, the logit lens, attribution, head types."""

from collections.abc import Sequence

import torch
from torch import Tensor

from glassgpt.figures import Figure, heatmap, side_by_side
from glassgpt.figures.token_row import visible
from glassgpt.interpretability.capture import ActivationCache, require_index
from glassgpt.interpretability.capture import heads as heads
from glassgpt.interpretability.head_scores import HEAD_TYPES
from glassgpt.interpretability.logit_lens import Lens
from glassgpt.interpretability.logit_lens import attribution as attribution
from glassgpt.tokenizers.builtin import Tokenizer
from glassgpt.utils.arguments import check_arguments
from glassgpt.utils.errors import UserError
from glassgpt.utils.formatting import escape_token


@check_arguments
def head(cache: ActivationCache, layer: int, head: int, tokens: Sequence[str]) -> Figure:
    """Draw one head's attention weights in the first sequence: queries (T) as rows, keys (S) as columns.

    Keys that a query cannot see are hatched. `tokens` are the texts of the S keys; the queries are the last T of them.
    Raises `UserError` before a pass, if there is no such layer or head, and for another number of tokens.
    """
    cache.require_pass()
    require_index("layer", layer, len(cache.layers))
    activations = cache.layers[layer]
    pattern = activations.pattern(head)[0].masked_fill(~activations.mask, -torch.inf)
    T, S = pattern.shape
    if len(tokens) != S:
        raise UserError(f"there are {len(tokens)} tokens and {S} keys; give the text of each key's token")
    texts = [visible(token) for token in tokens]
    title = f"Attention of layer {layer}, head {head}"
    return heatmap(pattern, rows=texts[S - T :], columns=texts, x="key", y="query", title=title)


@check_arguments
def lens(lens: Lens, tokens: Sequence[str], tokenizer: Tokenizer) -> Figure:
    """Draw a logit lens: positions (n) as rows, depths (L + 1) as columns.

    A cell holds the most likely next token at that depth and its probability. `tokens` are the texts of the n
    positions. Raises `UserError` for another number of tokens.
    """
    depths, n = lens.top_ids.shape[:2]
    if len(tokens) != n:
        raise UserError(f"there are {len(tokens)} tokens and {n} positions; give the text of each position's token")
    ids, p = lens.top_ids[..., 0].T.tolist(), lens.top_p[..., 0].T.tolist()
    texts = [
        [f"{escape_token(tokenizer.decode_bytes([i]))}\n{q:.2f}" for i, q in zip(*row, strict=True)]
        for row in zip(ids, p, strict=True)
    ]
    columns = ["embed", *(f"L{layer}" for layer in range(depths - 1))]
    rows = [visible(token) for token in tokens]
    title = "Most likely next token at each depth"
    return heatmap(p, rows=rows, columns=columns, texts=texts, limits=(0, 1), x="depth", y="position", title=title)


@check_arguments
def head_scores(scores: Tensor, types: Sequence[str] = HEAD_TYPES) -> Figure:
    """Draw head scores (types, L, H): a heat map of layers by heads for each type, all from 0 to 1."""
    _, L, H = scores.shape
    rows, columns = [f"L{i}" for i in range(L)], [f"H{i}" for i in range(H)]
    maps = zip(types, scores, strict=True)
    return side_by_side(*(heatmap(s, rows=rows, columns=columns, title=t, limits=(0, 1)) for t, s in maps))
