"""Causal self-attention (Vaswani et al., 2017): spans, kernels, rotary positions and norms.

A kernel is a module without parameters, `kernel(q, k, v, mask, bias)`. Fast kernels train; `ExplicitKernel` is the
formula written out and the reference for the others. A hook on the kernel sees q, k, v, the mask and the bias.

Shapes: `B` batch, `T` queries, `S` keys, `C` channels, `H` query heads, `K` key/value heads, `D` head width.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.config.model import ModelConfig
from glassgpt.model.kv_cache import LayerCache

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Span:
    """How far a layer looks back: over the whole text, or over a window and the first tokens of the text.

    The window is that of Longformer (Beltagy et al., 2020) made causal, and counts the token itself, as Hugging Face
    does. The global tokens are visible to every later token.
    """

    window: int | None = None
    n_global: int = 0

    def visible(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """Whether a query at `q_pos` sees a key at `k_pos`, with broadcasting: (T, 1) and (S,) give a mask (T, S)."""
        past = k_pos <= q_pos
        return past if self.window is None else past & ((q_pos - k_pos < self.window) | (k_pos < self.n_global))

    def plain_mask(self, n_queries: int, n_keys: int, device: torch.device) -> Tensor:
        """The mask (T, S) of keys at positions 0 to S - 1 and queries at the last T of these."""
        positions = torch.arange(n_keys, device=device)
        return self.visible(positions[-n_queries:, None], positions)

    def cached_mask(self, q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
        """The mask over a cache; None for the first T positions, and for one query that sees all keys."""
        if len(q_pos) == len(k_pos) or (len(q_pos) == 1 and self.window is None):
            return None
        return self.visible(q_pos[:, None], k_pos)


def attention_scores(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """q (B, H, T, D), k (B, K, S, D), bias (H, T, S) -> q k^T / sqrt(D) + bias (B, H, T, S), before the mask."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores if bias is None else scores + bias.to(scores.dtype)


class ExplicitKernel(nn.Module):
    """softmax(scores) v, written out. It holds the (T, S) weights of every head, so it is slow on long texts."""

    def __init__(self, span: Span, dropout: float) -> None:
        super().__init__()
        self.span = span
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """q (B, H, T, D), k and v (B, K, S, D), mask (T, S), bias (H, T, S) -> (B, H, T, D).

        Without a mask, keys are at positions 0 to S - 1, and T is S or 1.
        """
        if mask is None:
            mask = self.span.plain_mask(q.shape[-2], k.shape[-2], q.device)
        weights: Tensor = self.dropout(attention_scores(q, k, bias).masked_fill(~mask, -torch.inf).softmax(dim=-1))
        return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


class SDPAKernel(nn.Module):
    """PyTorch's fused attention: flash or memory-efficient kernels, chosen by PyTorch for the device."""

    def __init__(self, span: Span, dropout: float) -> None:
        super().__init__()
        self.span = span
        self.dropout = dropout

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Shapes as in `ExplicitKernel`. A bias takes the general path, with T x S numbers per head."""
        T, S = q.shape[-2], k.shape[-2]
        if bias is not None:
            mask = self.span.plain_mask(T, S, q.device) if mask is None else mask
            # With a batch dimension: PyTorch's fused CPU kernel refuses a mask (H, T, S).
            return self.fused(q, k, v, bias.to(q.dtype).masked_fill(~mask, -torch.inf)[None])
        return self.plain(q, k, v) if mask is None and T == S else self.fused(q, k, v, mask)

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of positions 0 to T - 1 over themselves."""
        return self.fused(q, k, v, causal=True)

    def fused(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Attention by a mask (T, S) or (1, H, T, S), over all keys, or causal (T = S)."""
        dropout = self.dropout if self.training else 0.0
        options = {"is_causal": causal, "enable_gqa": q.shape[1] != k.shape[1]}
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, **options)


class WindowKernel(SDPAKernel):
    """Sliding-window attention, block by block, in time and memory linear in the length. `FlexKernel` suits GPUs."""

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each block of W queries sees the first G tokens, the previous block and its own."""
        W, G = self.span.window, self.span.n_global
        assert W is not None
        # `split` rather than slices, whose gradients would each be as long as the text.
        q_blocks, k_blocks, v_blocks = (torch.split(x, W, dim=-2) for x in (q, k, v))
        positions = torch.split(torch.arange(q.shape[-2], device=q.device), W)
        n_global_blocks = max(1, math.ceil(G / W))
        k_global, v_global = (torch.cat(x[:n_global_blocks], dim=-2)[..., :G, :] for x in (k_blocks, v_blocks))
        outputs = [self.fused(q_blocks[0], k_blocks[0], v_blocks[0], causal=True)]  # the first block sees all before it
        for own in range(1, len(q_blocks)):
            previous = own - 1
            seen = min(G, previous * W)  # the global tokens that the previous block does not hold
            keys = torch.cat([k_global[..., :seen, :], k_blocks[previous], k_blocks[own]], dim=-2)
            values = torch.cat([v_global[..., :seen, :], v_blocks[previous], v_blocks[own]], dim=-2)
            k_pos = torch.cat([torch.arange(seen, device=q.device), positions[previous], positions[own]])
            outputs.append(self.fused(q_blocks[own], keys, values, self.span.visible(positions[own][:, None], k_pos)))
        return torch.cat(outputs, dim=-2)


class FlexKernel(SDPAKernel):
    """FlexAttention (Dong et al., 2024), which skips the blocks that a window hides.

    It is fast if the model is compiled, has no dropout, and has no gradients on a CPU.
    """

    longest: "BlockMask | None" = None  # the block mask of the longest texts so far

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """With the span as a block mask."""
        from torch.nn.attention.flex_attention import flex_attention  # here: it imports torch's compiler

        grouped = q.shape[1] != k.shape[1]
        # Under autocast only fused attention casts all three, and a norm leaves q and k in float32.
        mask = self.block_mask(q.shape[-2], q.device)
        return flex_attention(q.to(v.dtype), k.to(v.dtype), v, block_mask=mask, enable_gqa=grouped)

    def block_mask(self, length: int, device: torch.device) -> "BlockMask":
        """The block mask of texts of this length; the longest so far is kept.

        Call it before compiling the model, which would otherwise be compiled with the building of the mask.
        """
        from torch.nn.attention.flex_attention import create_block_mask

        kept = self.longest if self.longest is not None and self.longest.kv_num_blocks.device == device else None
        if kept is not None and kept.seq_lengths == (length, length):
            return kept
        visible = self.span.visible
        mask = create_block_mask(lambda b, h, q, k: visible(q, k), None, None, length, length, device=device)
        if kept is None or length > kept.seq_lengths[0]:
            self.longest = mask
        return mask


def build_kernel(config: ModelConfig, window: int | None) -> ExplicitKernel | SDPAKernel:
    """The kernel that the config asks for, for a layer with that window."""
    span, sdpa = (Span(), SDPAKernel) if window is None else (Span(window, config.window_globals), WindowKernel)
    kinds: dict[str, type[ExplicitKernel | SDPAKernel]] = {"explicit": ExplicitKernel, "sdpa": sdpa, "flex": FlexKernel}
    return kinds[config.attention](span, config.dropout)


class LayerNorm(nn.LayerNorm):
    """LayerNorm (Ba et al., 2016) over the last dimension, with its weights in the dtype of its input.

    Autocast on a CPU and sharded bfloat16 training mix dtypes, which the fused kernel does not support.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) of any dtype -> (..., C)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang and Sennrich, 2019) over the last dimension, with its weight in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) of any dtype -> (..., C)."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class Rotary(nn.Module):
    """Rotary positions (Su et al., 2021): angles that grow with the position rotate the halves of a head."""

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.base = base

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, H, T, D), positions (T,) -> x rotated, (B, H, T, D)."""
        # Keep exactly these steps: the last bit of a frequency changes angles, and checkpoints depend on them.
        frequencies = 1.0 / self.base ** (torch.arange(0, self.head_dim, 2, device=x.device).float() / self.head_dim)
        angles = positions[:, None].float() * frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class NoPositions(nn.Module):
    """Stands in for `Rotary` or a position embedding in a model that has its positions elsewhere, or none."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x unchanged."""
        return x


class NoBias(nn.Module):
    """Stands in for a position bias, which maps positions (T,) and (S,) to what is added to the scores (H, T, S)."""

    def forward(self, q_pos: Tensor, k_pos: Tensor) -> None:
        """Nothing to add."""


class Attention(nn.Module):
    """Causal self-attention. Query heads may share key/value heads (Ainslie et al., 2023)."""

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        D = self.head_dim = config.resolved_head_dim
        self.split = [config.n_head * D, config.resolved_n_kv_head * D, config.resolved_n_kv_head * D]
        self.qkv = nn.Linear(config.n_embd, sum(self.split), bias=config.bias)
        self.q_norm = RMSNorm(D, config.norm_eps, config.norm_weight) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.norm_eps, config.norm_weight) if config.qk_norm else nn.Identity()
        self.rotary = Rotary(D, config.rope_base) if config.position == "rope" else NoPositions()
        self.position_bias = NoBias()
        self.kernel = build_kernel(config, window)
        self.out = nn.Linear(config.n_head * D, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, positions: Tensor, cache: LayerCache | None = None) -> Tensor:
        """x (B, T, C) at positions (T,) -> (B, T, C). Keys and values of x are added to the cache."""
        B, T, _ = x.shape
        q, k, v = (part.view(B, T, -1, self.head_dim).transpose(1, 2) for part in self.qkv(x).split(self.split, dim=-1))
        q, k = self.rotary(self.q_norm(q), positions), self.rotary(self.k_norm(k), positions)
        mask, k_pos = None, positions
        if cache is not None:
            k, v, k_pos = cache.append(k, v, positions)
            mask = self.kernel.span.cached_mask(positions, k_pos)
        heads = self.kernel(q, k, v, mask, self.position_bias(positions, k_pos))
        out: Tensor = self.out(heads.transpose(1, 2).reshape(B, T, -1))
        return out
