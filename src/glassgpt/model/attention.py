"""Causal self-attention (Vaswani et al., 2017): who sees whom, kernels, rotary positions and the cache.

A kernel is a module without parameters, `kernel(q, k, v, mask)`: fast ones train, the explicit one is the formula
written out and the reference for every other. A hook on the kernel sees q, k and v from outside.

Shapes: `B` batch, `T` queries, `S` keys, `C` channels, `H` query heads, `K` key/value heads, `D` head width.
"""

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.config.model import ModelConfig

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Span:
    """How far a layer looks back: over all of the text, or a window and the text's first tokens.

    The window is the sliding one of Longformer (Beltagy et al., 2020) made causal, and the global tokens are those that
    every later token sees. W counts the token itself, as Hugging Face counts it.
    """

    window: int | None = None
    n_global: int = 0

    def visible(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """The rule that every kernel and cache follows: whether a query at `q_pos` sees a key at `k_pos`, element by element."""
        past = k_pos <= q_pos
        return past if self.window is None else past & ((q_pos - k_pos < self.window) | (k_pos < self.n_global))

    def mask(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """Positions (T,) and (S,) -> mask (T, S), true where a query sees a key."""
        return self.visible(q_pos[:, None], k_pos[None, :])


def spans(config: ModelConfig) -> list[Span]:
    """The span of each layer."""
    return [Span() if window is None else Span(window, config.window_globals) for window in config.windows]


class ExplicitKernel(nn.Module):
    """softmax(q k^T / sqrt(D)) v, written out. It holds the (T, S) weights of every head, so it is slow on long text."""

    def __init__(self, span: Span, dropout: float) -> None:
        super().__init__()
        self.span = span
        self.dropout = nn.Dropout(dropout)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q (B, H, T, D), k and v (B, K, S, D), mask (T, S) -> (B, H, T, D).

        None for a mask: the span over plain positions where T = S, and all of the keys for a single query.
        """
        if mask is None:
            positions = torch.arange(k.shape[-2], device=q.device)
            mask = self.span.mask(positions[-q.shape[-2] :], positions)
        shared_by = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared_by, dim=1), v.repeat_interleave(shared_by, dim=1)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        return self.dropout(weights) @ v  # type: ignore[no-any-return]


class SDPAKernel(nn.Module):
    """PyTorch's fused attention: flash or memory-efficient kernels, chosen by PyTorch for the device."""

    def __init__(self, span: Span, dropout: float) -> None:
        super().__init__()
        self.span = span
        self.dropout = dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Shapes as in `ExplicitKernel`."""
        if mask is None and q.shape[-2] == k.shape[-2]:
            return self.over_plain_positions(q, k, v)
        return self.fused(q, k, v, mask)

    def over_plain_positions(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All of the text: PyTorch's own causal attention."""
        return self.fused(q, k, v, causal=True)

    def fused(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """What a mask (T, S) shows, or all keys; or causal attention, T = S."""
        dropout = self.dropout if self.training else 0.0
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
        )


class WindowKernel(SDPAKernel):
    """Sliding-window attention in time and memory linear in the length: blocks of W queries, each over its own and the previous block.

    The global tokens come before both. On a GPU `FlexKernel` has fewer steps.
    """

    def over_plain_positions(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The text block by block. `split` and no slice of the whole, whose gradient would be as long as the text for each block."""
        W, G = self.span.window, self.span.n_global
        assert W is not None
        q_blocks, k_blocks, v_blocks = (torch.split(x, W, dim=-2) for x in (q, k, v))
        positions = torch.split(torch.arange(q.shape[-2], device=q.device), W)
        holding_globals = max(1, math.ceil(G / W))
        k_global, v_global = (
            torch.cat(blocks[:holding_globals], dim=-2)[..., :G, :] for blocks in (k_blocks, v_blocks)
        )
        outputs = [self.fused(q_blocks[0], k_blocks[0], v_blocks[0], causal=True)]  # the first block sees all before it
        for own in range(1, len(q_blocks)):
            before = own - 1
            seen = min(G, before * W)  # those that the previous block does not have itself
            keys = torch.cat([k_global[..., :seen, :], k_blocks[before], k_blocks[own]], dim=-2)
            values = torch.cat([v_global[..., :seen, :], v_blocks[before], v_blocks[own]], dim=-2)
            key_positions = torch.cat([torch.arange(seen, device=q.device), positions[before], positions[own]])
            outputs.append(self.fused(q_blocks[own], keys, values, self.span.mask(positions[own], key_positions)))
        return torch.cat(outputs, dim=-2)


class FlexKernel(SDPAKernel):
    """FlexAttention (Dong et al., 2024), which skips the blocks that a window hides.

    It is fast where the model is compiled, has no dropout, and no gradients on a CPU.
    """

    def __init__(self, span: Span, dropout: float) -> None:
        super().__init__(span, dropout)
        self.blocks: BlockMask | None = None

    def over_plain_positions(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The text with the span as a block mask; that of the longest text so far is kept."""
        from torch.nn.attention.flex_attention import flex_attention  # here, since it imports torch's compiler

        blocks = self.block_mask(q.shape[-2], q.device)
        grouped = q.shape[1] != k.shape[1]
        # Autocast has its fused attention cast all three alike, but not this: a norm leaves q and k in float32.
        return flex_attention(q.to(v.dtype), k.to(v.dtype), v, block_mask=blocks, enable_gqa=grouped)

    def block_mask(self, length: int, device: torch.device) -> "BlockMask":
        """The block mask of texts of this length. Called before the model is compiled, which would take the making of it for a
        part of the model, and compile it without that once more."""
        from torch.nn.attention.flex_attention import create_block_mask

        kept = self.blocks if self.blocks is None or self.blocks.kv_num_blocks.device == device else None
        if kept is not None and kept.seq_lengths == (length, length):
            return kept
        made = create_block_mask(
            lambda b, h, q_pos, k_pos: self.span.visible(q_pos, k_pos), None, None, length, length, device=device
        )
        if kept is None or length > kept.seq_lengths[0]:
            self.blocks = made
        return made


def build_kernel(config: ModelConfig, span: Span) -> nn.Module:
    """The kernel that the config asks for, for a layer with that span."""
    if config.attention == "explicit":
        return ExplicitKernel(span, config.dropout)
    if config.attention == "flex":
        return FlexKernel(span, config.dropout)
    return SDPAKernel(span, config.dropout) if span.window is None else WindowKernel(span, config.dropout)


class LayerNorm(nn.LayerNorm):
    """LayerNorm (Ba et al., 2016) over the last dimension; its weights take the dtype of its input.

    On a CPU autocast leaves that to the module, and the fused kernel has no mixed dtypes; sharded training in bfloat16 has bfloat16
    weights and a float32 residual stream.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) of any dtype -> (..., C)."""
        return F.layer_norm(
            x, self.normalized_shape, _to_dtype_of(self.weight, x), _to_dtype_of(self.bias, x), self.eps
        )


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang and Sennrich, 2019) over the last dimension; its weight takes the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) of any dtype -> (..., C)."""
        return F.rms_norm(x, self.normalized_shape, _to_dtype_of(self.weight, x), self.eps)


def _to_dtype_of(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(x.dtype)


class Rotary(nn.Module):
    """Rotary positions (Su et al., 2021): the two halves of a head's width are turned by angles that grow with the position."""

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.base = base

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, H, T, D), positions (T,) -> x turned, (B, H, T, D)."""
        # In these very steps, since a frequency's last bit is a visible angle at position 10,000, and checkpoints were trained so.
        frequencies = 1.0 / self.base ** (torch.arange(0, self.head_dim, 2, device=x.device).float() / self.head_dim)
        angles = positions[:, None].float() * frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class NoRotation(nn.Module):
    """The place of `Rotary` in a model whose positions are elsewhere."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x as it is."""
        return x


class LayerCache:
    """Keys and values that one layer may still need: all of them, or a window's last W and the first G.

    The buffers (B, K, slots, D) stay where they are: a position's slot is its own number, and behind the first G they go round.
    """

    def __init__(
        self, span: Span, batch_size: int, capacity: int, config: ModelConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.span = span
        slots = capacity if span.window is None else min(capacity, span.window + span.n_global)
        shape = (batch_size, config.resolved_n_kv_head, slots, config.resolved_head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.positions = torch.arange(slots, device=device)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take in k and v (B, K, T, D) of the next T positions; return what these see, (B, K, S, D) each, and the mask (T, S).

        No mask for the first T positions, which see each other by the plain span, and for a single one that sees all before it.
        """
        start, T, slots = self.length, k.shape[-2], self.k.shape[-2]
        if start and T > 1 and start + T > slots:
            # What is overwritten may be seen by one of these positions.
            filled = min(start, slots)
            seen_k, seen_v = (
                torch.cat([self.k[:, :, :filled], k], dim=-2),
                torch.cat([self.v[:, :, :filled], v], dim=-2),
            )
            seen = torch.cat([self.positions[:filled], torch.arange(start, start + T, device=k.device)])
            self._store(k, v)
        else:
            self._store(k, v)
            if start == 0:
                return k, v, None
            filled = min(self.length, slots)
            seen_k, seen_v, seen = self.k[:, :, :filled], self.v[:, :, :filled], self.positions[:filled]
            if T == 1 and self.span.window is None:
                return seen_k, seen_v, None
        return seen_k, seen_v, self.span.mask(torch.arange(start, start + T, device=k.device), seen)

    def select(self, rows: Tensor) -> "LayerCache":
        """A copy with these rows (n,) of the batch, in this order; a row may come more than once."""
        chosen = copy.copy(self)
        chosen.k, chosen.v, chosen.positions = self.k[rows], self.v[rows], self.positions.clone()
        return chosen

    def _store(self, k: Tensor, v: Tensor) -> None:
        """Keep what a later position may see."""
        slots, G, start = self.k.shape[-2], self.span.n_global, self.length
        self.length += k.shape[-2]
        if self.length <= slots:  # where each position's slot has been its own number from the start
            self.k[:, :, start : self.length], self.v[:, :, start : self.length] = k, v
            return
        positions = torch.arange(start, self.length, device=k.device)
        kept = (positions < G) | (positions >= self.length - (slots - G))
        positions = positions[kept]
        slot = torch.where(positions < slots, positions, G + (positions - G) % (slots - G))
        self.k[:, :, slot], self.v[:, :, slot], self.positions[slot] = k[:, :, kept], v[:, :, kept], positions


class KVCache:
    """One `LayerCache` a layer, for `batch_size` sequences of up to `capacity` tokens.

    `limit` is the capacity, at most the context length. There is none where positions are relative, all layers have windows
    and the capacity holds one of these.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, *, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if capacity > config.context_length and not config.has_unlimited_context:
            raise ValueError(f"a cache of {capacity} positions exceeds the context length of {config.context_length}")
        self.layers = [LayerCache(span, batch_size, capacity, config, dtype, device) for span in spans(config)]
        window_and_globals = (config.window or 0) + config.window_globals
        self.limit = None if config.has_unlimited_context and capacity >= window_and_globals else capacity

    @property
    def length(self) -> int:
        """Tokens so far."""
        return self.layers[0].length

    def select(self, rows: Tensor) -> "KVCache":
        """A copy with these rows (n,) of the batch, in this order; a row may come more than once, so that texts share a beginning."""
        chosen = copy.copy(self)
        chosen.layers = [layer.select(rows) for layer in self.layers]
        return chosen


class Attention(nn.Module):
    """Causal self-attention with a fused projection; several query heads may share a key/value head (Ainslie et al., 2023)."""

    def __init__(self, config: ModelConfig, span: Span) -> None:
        super().__init__()
        D = self.head_dim = config.resolved_head_dim
        self.split = [config.n_head * D, config.resolved_n_kv_head * D, config.resolved_n_kv_head * D]
        self.qkv = nn.Linear(config.n_embd, sum(self.split), bias=config.bias)
        self.q_norm = RMSNorm(D, config.norm_eps, config.norm_weight) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.norm_eps, config.norm_weight) if config.qk_norm else nn.Identity()
        self.rotary = Rotary(D, config.rope_base) if config.position == "rope" else NoRotation()
        self.kernel = build_kernel(config, span)
        self.out = nn.Linear(config.n_head * D, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, positions: Tensor, cache: LayerCache | None = None) -> Tensor:
        """x (B, T, C) at positions (T,) -> (B, T, C). A cache holds the keys and values before x, and takes in its own."""
        B, T, _ = x.shape
        q, k, v = (part.view(B, T, -1, self.head_dim).transpose(1, 2) for part in self.qkv(x).split(self.split, dim=-1))
        q, k = self.rotary(self.q_norm(q), positions), self.rotary(self.k_norm(k), positions)
        k, v, mask = cache.append(k, v) if cache is not None else (k, v, None)
        return self.out(self.kernel(q, k, v, mask).transpose(1, 2).reshape(B, T, -1))  # type: ignore[no-any-return]
