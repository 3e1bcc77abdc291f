"""What a model expects, depth by depth, and which part of it made it expect that.

Shapes: `L` layers, `T` tokens, `n` positions looked at, `C` channels, `H` query heads, `D` head width, `V` vocabulary, `W` watched ids.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from glassgpt.interpretability.capture import ActivationCache, LayerActivations, require_index
from glassgpt.model.attention import LayerNorm, RMSNorm
from glassgpt.model.gpt import GPT, Block
from glassgpt.model.loss import CHUNK_ELEMENTS
from glassgpt.utils.errors import UserError


@dataclass(frozen=True)
class Expectations:
    """What the head expects behind each position, soft-cap included."""

    top_ids: Tensor
    """The k likeliest ids (..., n, k), the likeliest first; fewer where the vocabulary is smaller."""
    top_p: Tensor
    """Their probabilities (..., n, k)."""
    watch_rank: Tensor
    """How many ids are likelier than each watched one (..., n, W): 0 for the likeliest."""
    watch_p: Tensor
    """Probabilities of the watched ids (..., n, W)."""
    next_rank: Tensor
    """How many ids are likelier than the one that does come next (..., n); -1 behind the text's last token."""
    next_bits: Tensor
    """Surprisal of the one that comes next, -log2 p, (..., n); NaN behind the last token. (p itself may be too small for a float32.)"""
    entropy: Tensor
    """Of the whole distribution (..., n), in bits."""

    @property
    def next_p(self) -> Tensor:
        """Probability of the token that comes next (..., n); NaN behind the last."""
        return torch.exp2(-self.next_bits)


@dataclass(frozen=True)
class Lens(Expectations):
    """`Expectations` at each depth (L + 1, n, …): of the embedding, and of the residual stream behind each block."""

    norm: Tensor
    """Length of the residual stream's vector (L + 1, n), before the last norm."""


@dataclass(frozen=True)
class Predictions:
    """How well a text was foretold."""

    surprisal: Tensor
    """Of each token, in bits (T,): NaN for the first, which nothing foretells."""
    top_ids: Tensor
    """What was expected behind each token (T, k), the likeliest first."""
    top_p: Tensor
    """Their probabilities (T, k)."""
    entropy: Tensor
    """Of what was expected behind each token (T,), in bits."""


@torch.no_grad()
def logit_lens(
    model: GPT, cache: ActivationCache, start: int = 0, stop: int | None = None, k: int = 5, watch: Sequence[int] = ()
) -> Lens:
    """The logit lens (nostalgebraist, 2020): last norm and head applied to the residual stream at each depth.

    For positions `start` to `stop` of the first sequence, in chunks of 64 MiB of logits: never are those of all there at once.
    The last depth is what the model itself expects. Raises `UserError` for positions or ids that are not there, and before a pass.
    """
    cache.require_pass()
    T = cache.ids.shape[1]
    stop = T if stop is None else stop
    if not 0 <= start < stop <= T:
        raise UserError(f"there are no positions {start} to {stop}: the text has {T} tokens")
    for token in watch:
        require_index("token", token, model.vocab_size)
    x = torch.stack([stream[0, start:stop] for stream in cache.residual_stream])  # (L + 1, n, C)
    # `forward` and no call: inside a `capture` a call would be taken for the model's own.
    hidden = model.norm.forward(x)
    # All depths in one go: a few positions of one alone would read the whole head for little.
    rows = _expectations(model, hidden.flatten(0, 1), _next_ids(cache)[start:stop].repeat(len(x)), k, watch)
    by_depth = {name: values.unflatten(0, x.shape[:2]) for name, values in vars(rows).items()}
    return Lens(**by_depth, norm=torch.linalg.vector_norm(x.to(_at_least_float32(x)), dim=-1))


@torch.no_grad()
def predictions(model: GPT, cache: ActivationCache, k: int = 5) -> Predictions:
    """Surprisal of each token of the first sequence, and what was expected in its place; memory and errors as in `logit_lens`."""
    cache.require_pass()
    expected = _expectations(model, cache.ln_final[0], _next_ids(cache), k, ())
    return Predictions(
        expected.next_bits.roll(1), expected.top_ids, expected.top_p, expected.entropy
    )  # the last one's NaN comes first


def _next_ids(cache: ActivationCache) -> Tensor:
    """The id behind each token of the first sequence (T,): -1 behind the last."""
    ids = cache.ids[0]
    return torch.cat([ids[1:], ids.new_full((1,), -1)])


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _expectations(model: GPT, hidden: Tensor, following: Tensor, k: int, watch: Sequence[int]) -> Expectations:
    """What the head makes of hidden (n, C), of which `following` (n,) are the next ids, -1 for none."""
    rows = max(1, CHUNK_ELEMENTS // model.vocab_size)
    watched = torch.tensor(watch, dtype=torch.int64, device=hidden.device)
    starts = range(0, len(hidden), rows)
    chunks = [_expected_by(model.logits(hidden[i : i + rows]), following[i : i + rows], k, watched) for i in starts]
    names = [field.name for field in dataclasses.fields(Expectations)]
    return Expectations(*(torch.cat([getattr(chunk, name) for chunk in chunks]) for name in names))


def _expected_by(logits: Tensor, following: Tensor, k: int, watched: Tensor) -> Expectations:
    """The same for logits (n, V)."""
    logits = logits.to(_at_least_float32(logits))
    total = logits.logsumexp(dim=-1, keepdim=True)
    top = logits.topk(min(k, logits.shape[-1]), dim=-1)
    ids = torch.cat([watched.expand(len(logits), -1), following.clamp(min=0)[:, None]], dim=1)
    chosen = logits.gather(1, ids)  # (n, W + 1), that of the next token last
    # Summed up as floats: twice as fast as truth values are, and exact up to 2^24 ids.
    above = torch.empty_like(logits)
    ranks = torch.stack(
        [torch.gt(logits, one[:, None], out=above).sum(dim=-1) for one in chosen.unbind(dim=1)], dim=1
    ).long()
    last = following < 0
    return Expectations(
        top_ids=top.indices,
        top_p=(top.values - total).exp(),
        watch_rank=ranks[:, :-1],
        watch_p=(chosen[:, :-1] - total).exp(),
        next_rank=ranks[:, -1].masked_fill(last, -1),
        next_bits=((total[:, 0] - chosen[:, -1]) / math.log(2)).masked_fill(last, math.nan),
        entropy=torch.special.entr((logits - total).exp_()).sum(dim=-1) / math.log(2),
    )


PartKind = Literal["embedding", "head", "attention_bias", "feed_forward", "patch", "norm_bias"]


@dataclass(frozen=True)
class Part:
    """What one part of the model adds to a logit."""

    name: str
    kind: PartKind
    layer: int | None
    head: int | None
    value: float


@dataclass(frozen=True)
class Attribution:
    """A logit, or the difference of two, as a sum over the parts that wrote into the residual stream."""

    logit: float
    """The token's logit before a soft-cap."""
    against_logit: float | None
    """That of the token that it is held against."""
    parts: list[Part]
    """Their values sum to logit - against_logit."""


@torch.no_grad()
def logit_attribution(
    model: GPT, cache: ActivationCache, position: int, token: int, against: int | None = None
) -> Attribution:
    """Direct logit attribution (Elhage et al., 2021): how much each part raises a token's logit at a position of the first sequence.

    The residual stream is a sum, and the head is linear, and so is the last norm once its scale is held at what it was. So the logit
    is a sum over embedding, heads, biases and feed-forward blocks of what each wrote. With `against`, that of the difference to another
    token's logit, in which what raises all tokens alike drops out. All in float64; what rounding leaves is the model's own.
    A part `patch` is there only where the stream behind a layer is not the sum of what was written into it: it was patched, or dropout
    was on. Raises `UserError` for a position or token that is not there.
    """
    cache.require_pass()
    require_index("position", position, cache.ids.shape[1])
    for index in (token, *([] if against is None else [against])):
        require_index("token", index, model.vocab_size)
    head = model.head.weight
    own, other = _exact(head[token]), None if against is None else _exact(head[against])
    wanted = own if other is None else own - other
    direction, bias = _through_norm(model.norm, _exact(cache.residual_stream[-1][0, position]), wanted)
    parts = [
        Part("embedding", "embedding", None, None, float(_exact(cache.residual_stream[0][0, position]) @ direction))
    ]
    for number, (layer, block) in enumerate(zip(cache.layers, model.blocks, strict=True)):
        parts += _parts_of_layer(number, layer, cast(Block, block), position, direction)
    if bias is not None:
        parts.append(Part("last norm's bias", "norm_bias", None, None, bias))
    hidden = _exact(cache.ln_final[0, position])
    return Attribution(float(hidden @ own), None if other is None else float(hidden @ other), parts)


def _through_norm(norm: nn.Module, x: Tensor, wanted: Tensor) -> tuple[Tensor, float | None]:
    """The direction in the residual stream (C,) that norm, at the scale that it has for x (C,), turns into `wanted` (C,).

    And what the norm's bias adds: norm(x) @ wanted = x @ direction + bias.
    """
    assert isinstance(norm, LayerNorm | RMSNorm)
    assert norm.eps is not None
    weighted = wanted if norm.weight is None else wanted * _exact(norm.weight)
    if isinstance(norm, RMSNorm):
        return weighted * (x.square().mean() + norm.eps).rsqrt(), None
    # LayerNorm takes the mean off x; as that is linear too, it can be taken off the direction instead.
    direction = (weighted - weighted.mean()) * (x.var(correction=0) + norm.eps).rsqrt()
    return direction, None if norm.bias is None else float(_exact(norm.bias) @ wanted)


def _parts_of_layer(number: int, layer: LayerActivations, block: Block, position: int, direction: Tensor) -> list[Part]:
    """What a block's heads, attention's bias and feed-forward block write along a direction (C,)."""
    out = block.attention.out
    heads = _exact(layer.z[0, :, position])  # (H, D)
    reading = (_exact(out.weight).T @ direction).view_as(
        heads
    )  # what each head's own columns of `out` make of the direction
    values = (heads * reading).sum(dim=-1)
    place = f"layer {number}"
    parts = [Part(f"{place}, head {head}", "head", number, head, value) for head, value in enumerate(values.tolist())]
    written = (layer.resid_pre, layer.attn_out, layer.mlp_out, layer.resid_post)
    before, attention, feed_forward, behind = (_exact(x[0, position]) for x in written)
    if out.bias is not None:
        # What attention wrote beyond its heads: the bias, but where all of attention was switched off.
        parts.append(
            Part(
                f"{place}, attention's bias",
                "attention_bias",
                number,
                None,
                float(attention @ direction - values.sum()),
            )
        )
    parts.append(Part(f"{place}, feed-forward", "feed_forward", number, None, float(feed_forward @ direction)))
    rest = behind - before - attention - feed_forward
    rounding = torch.finfo(layer.resid_post.dtype).eps * max(
        float(x.norm()) for x in (before, attention, feed_forward, behind)
    )
    if rest.norm() > 32 * rounding:
        parts.append(Part(f"{place}, patched in", "patch", number, None, float(rest @ direction)))
    return parts


def _exact(x: Tensor) -> Tensor:
    """In float64, on the CPU: MPS has none."""
    return x.cpu().double()
