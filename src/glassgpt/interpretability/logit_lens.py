"""What a model predicts at each depth, and how much each of its parts contributes to a logit.

Shapes: `L` layers, `T` tokens, `n` positions, `C` channels, `H` heads, `D` head width, `V` vocabulary, `W` watched ids.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from glassgpt.figures import Figure, bars
from glassgpt.interpretability.capture import ActivationCache, LayerActivations, at_least_float32, require_index
from glassgpt.model.attention import LayerNorm, RMSNorm
from glassgpt.model.finite import require_finite
from glassgpt.model.gpt import GPT, Block
from glassgpt.model.loss import CHUNK_ELEMENTS
from glassgpt.utils.arguments import check_arguments
from glassgpt.utils.errors import UserError


@dataclass(frozen=True)
class Predictions:
    """What the head predicts after each position, soft-cap included. In a `Lens`, the depths (L + 1) come first."""

    top_ids: Tensor  # the k most likely ids (n, k), the most likely first; fewer if the vocabulary is smaller
    top_p: Tensor  # their probabilities (n, k)
    watch_rank: Tensor  # how many ids are more likely than each watched one (n, W): 0 for the most likely
    watch_p: Tensor  # probabilities of the watched ids (n, W)
    next_rank: Tensor  # how many ids are more likely than the actual next one (n); -1 after the text's last token
    next_bits: Tensor  # surprisal of the actual next token, -log2 p, (n); NaN after the last. p can underflow
    entropy: Tensor  # entropy of the predicted distribution in bits (n)

    @property
    def next_p(self) -> Tensor:
        """Probability of the actual next token (n); NaN after the last."""
        return torch.exp2(-self.next_bits)

    @property
    def surprisal(self) -> Tensor:
        """Surprisal of the token at each position in bits (n); NaN for the first."""
        return torch.cat([torch.full_like(self.next_bits[..., :1], math.nan), self.next_bits[..., :-1]], dim=-1)


@dataclass(frozen=True)
class Lens(Predictions):
    """Predictions from the embedding and from the residual stream after each block (L + 1, n, ...)."""

    norm: Tensor  # norm of the residual stream's vectors (L + 1, n), before the final norm


@check_arguments
@torch.no_grad()
def logit_lens(
    model: GPT, cache: ActivationCache, start: int = 0, stop: int | None = None, k: int = 5, watch: Sequence[int] = ()
) -> Lens:
    """The logit lens (nostalgebraist, 2020): final norm and head applied to the residual stream at each depth.

    For positions `start` to `stop` of the first sequence; the last depth is the model's own prediction. Holds 64 MiB of
    logits at a time. Raises `UserError` for positions or ids out of range, before a pass, and if logits are not finite.
    """
    cache.require_pass()
    T = cache.ids.shape[1]
    stop = T if stop is None else stop
    if not 0 <= start < stop <= T:
        raise UserError(f"there are no positions from start {start} to stop {stop}; the text has {T} tokens")
    for token in watch:
        require_index("token", token, model.vocab_size)
    x = torch.stack([stream[0, start:stop] for stream in cache.residual_stream])  # (L + 1, n, C)
    # `forward`, since a call inside a `capture` would be recorded as the model's own.
    hidden = model.norm.forward(x)
    # All depths at once: few positions of one depth would read the whole head for little work.
    rows = _predict(model, hidden.flatten(0, 1), _next_ids(cache)[start:stop].repeat(len(x)), k, watch)
    by_depth = {name: values.unflatten(0, x.shape[:2]) for name, values in vars(rows).items()}
    return Lens(**by_depth, norm=torch.linalg.vector_norm(at_least_float32(x), dim=-1))


@check_arguments
@torch.no_grad()
def predictions(model: GPT, cache: ActivationCache, k: int = 5) -> Predictions:
    """The model's predictions over the first sequence; memory and errors as in `logit_lens`."""
    cache.require_pass()
    return _predict(model, cache.ln_final[0], _next_ids(cache), k, ())


def _next_ids(cache: ActivationCache) -> Tensor:
    """The id after each token of the first sequence (T,): -1 after the last."""
    ids = cache.ids[0]
    return torch.cat([ids[1:], ids.new_full((1,), -1)])


def _predict(model: GPT, hidden: Tensor, next_ids: Tensor, k: int, watch: Sequence[int]) -> Predictions:
    """Predictions from hidden (n, C), chunk by chunk; `next_ids` (n,) are the actual next ids, -1 for none."""
    rows = max(1, CHUNK_ELEMENTS // model.vocab_size)
    watched = torch.tensor(watch, dtype=torch.int64, device=hidden.device)
    chunks = []
    for i in range(0, len(hidden), rows):
        logits = model.logits(hidden[i : i + rows])
        require_finite(logits, model)
        chunks.append(_summarize(logits, next_ids[i : i + rows], k, watched))
    return Predictions(**{name: torch.cat([vars(chunk)[name] for chunk in chunks]) for name in vars(chunks[0])})


def _summarize(logits: Tensor, next_ids: Tensor, k: int, watched: Tensor) -> Predictions:
    """Predictions from logits (n, V)."""
    logits = at_least_float32(logits)
    total = logits.logsumexp(dim=-1, keepdim=True)
    top = logits.topk(min(k, logits.shape[-1]), dim=-1)
    ids = torch.cat([watched.expand(len(logits), -1), next_ids.clamp(min=0)[:, None]], dim=1)
    chosen = logits.gather(1, ids)  # (n, W + 1), the next token's last
    # Summed as floats, which is twice as fast as bools and exact up to 2^24 ids.
    above = torch.empty_like(logits)
    ranks = [torch.gt(logits, one[:, None], out=above).sum(dim=-1).long() for one in chosen.unbind(dim=1)]
    is_last = next_ids < 0
    return Predictions(
        top_ids=top.indices,
        top_p=(top.values - total).exp(),
        watch_rank=torch.stack(ranks, dim=1)[:, :-1],
        watch_p=(chosen[:, :-1] - total).exp(),
        next_rank=ranks[-1].masked_fill(is_last, -1),
        next_bits=((total[:, 0] - chosen[:, -1]) / math.log(2)).masked_fill(is_last, math.nan),
        entropy=torch.special.entr((logits - total).exp_()).sum(dim=-1) / math.log(2),
    )


@dataclass(frozen=True)
class Contribution:
    """What one part of the model adds to a logit."""

    name: str
    kind: Literal["embedding", "head", "attention_bias", "feed_forward", "patch", "norm_bias"]
    layer: int | None
    head: int | None
    value: float


@dataclass(frozen=True)
class Attribution:
    """A logit, or the difference of two, as a sum over the parts that added to the residual stream."""

    logit: float  # the token's, before a soft-cap
    against_logit: float | None  # that of the token that it is compared with
    parts: list[Contribution]  # their values sum to logit - against_logit

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return str(attribution(self))


@check_arguments
def attribution(attribution: Attribution, count: int = 12) -> Figure:
    """Draw the `count` largest contributions to a logit (or to a difference) as bars, and the sum of the others.

    The largest absolute values come first. All bars sum to the value in the title.
    """
    parts = sorted(attribution.parts, key=lambda part: -abs(part.value))
    values = {part.name: part.value for part in parts[:count]}
    if parts[count:]:
        values[f"{len(parts) - count} others"] = sum(part.value for part in parts[count:])
    total = attribution.logit - (attribution.against_logit or 0.0)
    name = "logit" if attribution.against_logit is None else "difference of the logits"
    return bars(values, form="+.2f", title=f"Contributions to the {name}: {total:.2f}")


@check_arguments
@torch.no_grad()
def logit_attribution(
    model: GPT, cache: ActivationCache, position: int, token: int, against: int | None = None
) -> Attribution:
    """Direct logit attribution (Elhage et al., 2021): what each part adds to a token's logit, in the first sequence.

    The residual stream is a sum, the head is linear, and so is the final norm once its scale is fixed to its value
    here. So the logit is a sum over embedding, heads, biases and feed-forward blocks. With `against`, it is the
    difference to another token's logit. Computed in float64, so only the model's own rounding remains.

    There is a part `patch` only if the stream after a layer is not the sum of what was added to it: it was patched, or
    dropout was on. Raises `UserError` for a position or token out of range, and if the logit is not finite.
    """
    cache.require_pass()
    require_index("position", position, cache.ids.shape[1])
    require_index("token", token, model.vocab_size)
    if against is not None:
        require_index("token", against, model.vocab_size)
    head = model.head.weight
    own, other = _exact(head[token]), None if against is None else _exact(head[against])
    wanted = own if other is None else own - other
    stream = cache.residual_stream
    direction, bias = _direction_before_norm(model.norm, _exact(stream[-1][0, position]), wanted)
    parts = [Contribution("embedding", "embedding", None, None, float(_exact(stream[0][0, position]) @ direction))]
    for number, (layer, block) in enumerate(zip(cache.layers, model.blocks, strict=True)):
        parts += _layer_contributions(number, layer, cast(Block, block), position, direction)
    if bias is not None:
        parts.append(Contribution("final norm's bias", "norm_bias", None, None, bias))
    hidden = _exact(cache.ln_final[0, position])
    require_finite(hidden @ wanted, model)
    return Attribution(float(hidden @ own), None if other is None else float(hidden @ other), parts)


def _direction_before_norm(norm: nn.Module, x: Tensor, wanted: Tensor) -> tuple[Tensor, float | None]:
    """The direction (C,) and bias with norm(x) @ wanted = x @ direction + bias, at the norm's scale for x (C,)."""
    assert isinstance(norm, LayerNorm | RMSNorm)
    weighted = (wanted if norm.weight is None else wanted * _exact(norm.weight)) * norm_scale(norm, x)
    if isinstance(norm, RMSNorm):
        return weighted, None
    # LayerNorm subtracts the mean of x. That is linear, so it is subtracted from the direction instead.
    return weighted - weighted.mean(), None if norm.bias is None else float(_exact(norm.bias) @ wanted)


def norm_scale(norm: LayerNorm | RMSNorm, x: Tensor) -> Tensor:
    """What a norm multiplies x (C,) by: 1 / its standard deviation, for RMSNorm 1 / its root mean square."""
    assert norm.eps is not None
    square = x.var(correction=0) if isinstance(norm, LayerNorm) else x.square().mean()
    return (square + norm.eps).rsqrt()


def _layer_contributions(
    number: int, layer: LayerActivations, block: Block, position: int, direction: Tensor
) -> list[Contribution]:
    """What a block's heads, attention bias and feed-forward block add along a direction (C,)."""
    out, place = block.attention.out, f"layer {number}"
    heads = _exact(layer.z[0, :, position])  # (H, D)
    columns = (_exact(out.weight).T @ direction).view_as(heads)  # each head's columns of `out`, along the direction
    values = (heads * columns).sum(dim=-1)
    parts = [Contribution(f"{place}, head {h}", "head", number, h, value) for h, value in enumerate(values.tolist())]
    tensors = (layer.resid_pre, layer.attn_out, layer.mlp_out, layer.resid_post)
    before, attention, feed_forward, after = (_exact(x[0, position]) for x in tensors)
    if out.bias is not None:
        # Computed from what attention added beyond its heads, since an edit can switch the bias off, too.
        bias = float(attention @ direction - values.sum())
        parts.append(Contribution(f"{place}, attention's bias", "attention_bias", number, None, bias))
    mlp = float(feed_forward @ direction)
    parts.append(Contribution(f"{place}, feed-forward", "feed_forward", number, None, mlp))
    rest = after - before - attention - feed_forward
    largest = max(float(x.norm()) for x in (before, attention, feed_forward, after))
    if rest.norm() > 32 * torch.finfo(layer.resid_post.dtype).eps * largest:  # more than rounding
        parts.append(Contribution(f"{place}, patched in", "patch", number, None, float(rest @ direction)))
    return parts


def _exact(x: Tensor) -> Tensor:
    """In float64, on the CPU, since MPS has no float64."""
    return x.cpu().double()
