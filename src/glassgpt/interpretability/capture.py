"""Record what a forward pass computes, with hooks on the model's modules.

    with capture(model) as cache:
        model(ids)
    cache.layers[3].pattern(head=0)  # (B, T, S)

The names are TransformerLens's hook points: `q` of layer 3 is its `blocks.3.attn.hook_q`. The differences:

- Heads come before positions: (B, H, T, D) instead of (B, T, H, D).
- `scores` and `pattern` are methods. Fast kernels never form them, so they are computed when called, in float32 or
  float64, from what the kernel received. `kernel_error` measures how far that is from what the kernel returned.

Shapes: `B` batch, `T` tokens, `S` keys, `C` channels, `H` query heads, `K` key/value heads, `D` head width, `F` inner.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from numbers import Integral
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.figures import Figure, heatmap_grid
from glassgpt.model.attention import Span, attention_scores
from glassgpt.model.gpt import GPT, Block
from glassgpt.utils.arguments import check_arguments
from glassgpt.utils.errors import UserError, shown
from glassgpt.utils.torch_internals import uncompiled

HEADS_CELLS = 24_000  # in the figure of all heads, which then has at most about 150 kB
Hook = Callable[..., None]  # what is called after a module's forward pass


def require_index(what: str, index: int, count: int) -> None:
    """Raise `UserError` unless there is a layer, head, position or token id with this number."""
    if isinstance(index, bool) or not isinstance(index, Integral):
        raise UserError(f"{what} must be a whole number, got {shown(index)}")
    if not 0 <= index < count:
        raise UserError(f"there is no {what} {index}; valid: 0 to {count - 1}")


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Recorded:
    """Its annotated attributes are set by a forward pass; to read one before that is a `UserError`."""

    if not TYPE_CHECKING:  # mypy would accept any name

        def __getattr__(self, name: str) -> Any:
            if name in type(self).__annotations__:
                raise UserError("no activations captured yet; run the model inside `capture` first")
            return self.__getattribute__(name)


class LayerActivations(_Recorded):
    """What one block computed. The tensors are the model's own, detached: read them, do not change them."""

    resid_pre: Tensor  # the residual stream before the block (B, T, C)
    q: Tensor  # queries (B, H, T, D), as projected
    k: Tensor  # keys (B, K, T, D), as projected: those of this pass alone, also over a KV cache
    q_norm: Tensor  # queries after the QK-norm (B, H, T, D); `q` without one
    k_norm: Tensor  # keys after the QK-norm (B, K, T, D); `k` without one
    rot_q: Tensor  # queries after rotary positions (B, H, T, D), or without any: what the kernel received
    rot_k: Tensor  # keys after rotary positions (B, K, S, D). Query head h uses key/value head h // (H / K)
    v: Tensor  # values (B, K, S, D), over a KV cache those of all keys
    kernel_mask: Tensor | None  # the mask (T, S) that the kernel received; None if it derived the mask from the span
    kernel_bias: Tensor | None  # the position bias (H, T, S) that the kernel received
    kernel_out: Tensor  # what the kernel returned (B, H, T, D): `pattern @ v`
    z: Tensor  # the input of the output projection (B, H, T, D): `kernel_out`, or what an edit replaced it with
    attn_out: Tensor  # what attention added to the residual stream (B, T, C)
    resid_mid: Tensor  # the residual stream between attention and the feed-forward block (B, T, C)
    mlp_post: Tensor  # the feed-forward block's inner values, after activation and gate (B, T, F)
    mlp_out: Tensor  # what the feed-forward block added to the residual stream (B, T, C)
    resid_post: Tensor  # the residual stream after the block (B, T, C)

    def __init__(self, span: Span) -> None:
        self.span = span  # how far this layer looks back

    @property
    def mask(self) -> Tensor:
        """Which keys each query sees (T, S), bool."""
        if self.kernel_mask is not None:
            return self.kernel_mask
        return self.span.plain_mask(self.rot_q.shape[-2], self.rot_k.shape[-2], self.rot_k.device)

    @check_arguments
    def scores(self, head: int | None = None) -> Tensor:
        """q k^T / sqrt(D) plus the position bias, -inf if masked: of one head (B, T, S), or of all (B, H, T, S)."""
        bias = self.kernel_bias if head is None or self.kernel_bias is None else self.kernel_bias[head : head + 1]
        scores = attention_scores(self._of_head(self.rot_q, head), self._of_head(self.rot_k, head), bias)
        scores = scores.masked_fill(~self.mask, -torch.inf)
        return scores if head is None else scores[:, 0]

    @check_arguments
    def pattern(self, head: int | None = None) -> Tensor:
        """Attention weights, softmax(scores): of one head (B, T, S), or of all (B, H, T, S)."""
        return self.scores(head).softmax(dim=-1)

    @check_arguments
    def row(self, position: int) -> Tensor:
        """Attention weights of one query in all heads (B, H, S): a row of `pattern`, without the other rows."""
        require_index("position", position, self.rot_q.shape[-2])
        rows = slice(position, position + 1)
        bias = None if self.kernel_bias is None else self.kernel_bias[:, rows]
        scores = attention_scores(at_least_float32(self.rot_q[:, :, rows]), at_least_float32(self.rot_k), bias)
        return scores.masked_fill(~self.mask[rows], -torch.inf).softmax(dim=-1)[:, :, 0]

    @check_arguments
    def kernel_error(self, pattern: Tensor | None = None, head: int | None = None) -> float:
        """The largest difference between `pattern @ v` and the kernel's output: rounding, unless dropout was on."""
        pattern = self.pattern(head) if pattern is None else pattern
        v, actual = self._of_head(self.v, head), self._of_head(self.kernel_out, head)
        if head is None:
            v = v.repeat_interleave(pattern.shape[1] // v.shape[1], dim=1)
        else:
            pattern = pattern[:, None]
        return float((pattern @ v - actual).abs().amax())

    def _of_head(self, x: Tensor, head: int | None) -> Tensor:
        """x (B, H or K, T, D) in at least float32: all of it, or what query head `head` uses (B, 1, T, D)."""
        x = at_least_float32(x)
        if head is None:
            return x
        require_index("head", head, self.rot_q.shape[1])
        return x[:, [head * x.shape[1] // self.rot_q.shape[1]]]


class ActivationCache(_Recorded):
    """What the last forward pass inside a `capture` computed."""

    ids: Tensor  # token ids (B, T)
    ln_final: Tensor  # the residual stream after the final norm (B, T, C). TransformerLens: `ln_final.hook_normalized`

    def __init__(self, layers: list[LayerActivations]) -> None:
        self.layers = layers

    @property
    def residual_stream(self) -> list[Tensor]:
        """The residual stream before the first block and after each block: n_layer + 1 of (B, T, C)."""
        return [self.layers[0].resid_pre, *(layer.resid_post for layer in self.layers)]

    def require_pass(self) -> None:
        """Raise `UserError` unless a forward pass was captured."""
        _ = self.ln_final

    def _repr_html_(self) -> str:
        """What a notebook shows: the shapes, and all heads' attention."""
        if "ln_final" not in vars(self):
            return "no activations captured yet"
        (B, T), (_, H, _, D), C = self.ids.shape, self.layers[0].rot_q.shape, self.ln_final.shape[-1]
        shapes = f"batch {B}, tokens {T}, layers {len(self.layers)}, heads {H} of width {D}, channels {C}"
        return f"<div>ActivationCache: {shapes}</div>{heads(self)}"


@check_arguments
@contextmanager
def capture(model: GPT) -> Iterator[ActivationCache]:
    """Record each forward pass inside, also over a KV cache; a later pass replaces an earlier one.

    A compiled model runs uncompiled inside, since hooks on compiled modules never fire; its compiled code is kept.
    """
    blocks = cast(list[Block], list(model.blocks))
    cache = ActivationCache([LayerActivations(block.attention.kernel.span) for block in blocks])
    hooks = [(model.embedding, _store(cache, ("ids",))), (model.norm, _store(cache, output="ln_final"))]
    for block, layer in zip(blocks, cache.layers, strict=True):
        hooks += _hooks_of(block, layer)
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.enter_context(module.register_forward_hook(hook))
        stack.enter_context(uncompiled(model))
        yield cache


def _store(target: object, inputs: tuple[str, ...] = (), output: str | None = None) -> Hook:
    """A forward hook that stores a module's first inputs and its output as attributes of `target`."""

    def hook(_: nn.Module, values: Any, result: Tensor) -> None:
        for name, value in (*zip(inputs, values, strict=False), (output, result)):
            if name is not None:
                setattr(target, name, None if value is None else value.detach())

    return hook


def _hooks_of(block: Block, layer: LayerActivations) -> list[tuple[nn.Module, Hook]]:
    attention, feed_forward = block.attention, block.feed_forward

    def after_out(_: nn.Module, inputs: Any, output: Tensor) -> None:
        layer.z = inputs[0].detach().unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    def after_attention(_: nn.Module, inputs: Any, output: Tensor) -> None:
        layer.attn_out = output.detach()
        if inputs[2] is not None:  # a KV cache: keys and values may be its buffers, which the next pass overwrites
            layer.rot_k, layer.v = layer.rot_k.clone(), layer.v.clone()

    return [
        (attention.q_norm, _store(layer, ("q",), "q_norm")),
        (attention.k_norm, _store(layer, ("k",), "k_norm")),
        (attention.kernel, _store(layer, ("rot_q", "rot_k", "v", "kernel_mask", "kernel_bias"), "kernel_out")),
        (attention.out, after_out),
        (attention, after_attention),
        (block.feed_forward_norm, _store(layer, ("resid_mid",))),
        (feed_forward.down, _store(layer, ("mlp_post",))),
        (feed_forward, _store(layer, output="mlp_out")),
        (block, _store(layer, ("resid_pre",), "resid_post")),
    ]


@check_arguments
@torch.no_grad()
def attention_overview(cache: ActivationCache, size: int = 48) -> tuple[Tensor, Tensor, list[float]]:
    """All heads' attention in the first sequence. Raises `UserError` before a pass.

    Returns thumbnails of the patterns (layers, H, R, R), with the largest weight per cell if R = `size` is below T; the
    mean entropy of each head's rows in bits (layers, H), 0 if each token attends to one; each layer's `kernel_error`.
    """
    cache.require_pass()
    thumbnails, entropies, errors = [], [], []
    for layer in cache.layers:
        pattern = layer.pattern()
        errors.append(layer.kernel_error(pattern))
        first = pattern[0]
        shape = [min(size, length) for length in first.shape[-2:]]
        thumbnails.append(F.adaptive_max_pool2d(first, shape))  # not the mean, in which single bright cells would fade
        entropies.append(torch.special.entr(first).sum(dim=-1).mean(dim=-1) / math.log(2))
    return torch.stack(thumbnails), torch.stack(entropies), errors


@check_arguments
def heads(cache: ActivationCache) -> Figure:
    """Draw all heads' attention in the first sequence: layers as rows, heads as columns.

    In a head, rows are queries and columns are keys; a text of more tokens than cells shows the largest weight per
    cell. The tooltips hold the mean entropies of `attention_overview`. Raises `UserError` before a pass.
    """
    cache.require_pass()
    H = cache.layers[0].rot_q.shape[1]
    size = max(12, min(48, math.isqrt(HEADS_CELLS // (len(cache.layers) * H))))
    patterns, entropies, _ = attention_overview(cache, size)
    rows, columns = [f"L{i}" for i in range(len(patterns))], [f"H{i}" for i in range(H)]
    tips = [
        [f"{row} {column}: mean entropy {bits:.2f} bits" for column, bits in zip(columns, each, strict=True)]
        for row, each in zip(rows, entropies.tolist(), strict=True)
    ]
    return heatmap_grid(patterns, rows=rows, columns=columns, tooltips=tips, title="Attention of all heads")
