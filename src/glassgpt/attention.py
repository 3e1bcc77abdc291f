"""Causal self-attention (Vaswani et al., 2017), its kernels and its cache.

A kernel is a module without parameters, `kernel(q, k, v, mask)`: the fast one trains, the explicit one is the formula
written out and the reference for every other. A hook on the kernel sees q, k and v from outside.

Shapes: `B` batch, `T` queries, `S` keys, `C` channels, `H` heads, `D` head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig


def visible(q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """The causal rule, the one truth that kernels and caches follow: a query sees its own position and those before.

    Positions (T,) and (S,) -> boolean mask (T, S), true where the query may look.
    """
    return k_pos[None, :] <= q_pos[:, None]


class SDPAKernel(nn.Module):
    """PyTorch's fused attention: flash or memory-efficient kernels, chosen by PyTorch for the device."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q (B, H, T, D), k and v (B, H, S, D), mask (T, S) or None for plain causal attention with T = S -> (B, H, T, D)."""
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)


class ExplicitKernel(nn.Module):
    """softmax(q k^T / sqrt(D)) v, written out. It holds the (T, S) weights of every head, so it is slow on long text."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Shapes as in `SDPAKernel`."""
        if mask is None:
            positions = torch.arange(q.shape[-2], device=q.device)
            mask = visible(positions, positions)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        return self.dropout(weights) @ v  # type: ignore[no-any-return]


KERNELS: dict[str, type[SDPAKernel] | type[ExplicitKernel]] = {"sdpa": SDPAKernel, "explicit": ExplicitKernel}


class Rotary(nn.Module):
    """Rotary positions (Su et al., 2021): the two halves of a head's width are turned by angles that grow with the position."""

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        self.n_pairs = head_dim // 2
        self.base = base

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, H, T, D), positions (T,) -> x turned, (B, H, T, D)."""
        frequencies = self.base ** (torch.arange(self.n_pairs, device=x.device) / -self.n_pairs)
        angles = positions[:, None] * frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class HeadNorm(nn.RMSNorm):
    """RMSNorm (Zhang and Sennrich, 2019) over the width of a head."""

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, T, D) of any dtype. The weight follows it, which autocast on a CPU leaves undone: mixed, the fused kernel is lost."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class NoRotation(nn.Module):
    """The place of `Rotary` in a model whose positions are elsewhere."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x as it is."""
        return x


class LayerCache:
    """Keys and values that one layer has computed so far, in buffers of fixed size (B, H, capacity, D)."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, H, T, D) behind what is there; return all of it, (B, H, length, D)."""
        end = self.length + k.shape[-2]
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class KVCache:
    """One `LayerCache` a layer, for `batch_size` sequences of up to `capacity` tokens (at most the context length)."""

    def __init__(self, config: ModelConfig, batch_size: int, *, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        if capacity > config.context_length:
            raise ValueError(f"a cache of {capacity} positions exceeds the context length of {config.context_length}")
        shape = (batch_size, config.n_head, capacity, config.head_dim)
        self.layers = [LayerCache(shape, dtype, device) for _ in range(config.n_layer)]
        self.capacity = capacity

    @property
    def length(self) -> int:
        """Positions that are filled."""
        return self.layers[0].length


class Attention(nn.Module):
    """Multi-head causal self-attention with fused query, key and value projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.q_norm = HeadNorm(config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(config.head_dim) if config.qk_norm else nn.Identity()
        self.rotary = Rotary(config.head_dim, config.rope_base) if config.position == "rope" else NoRotation()
        self.kernel = KERNELS[config.attention](config.dropout)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """x (B, T, C) at positions (T,) -> (B, T, C). A cache holds the keys before x, and mask (T, S) says what is seen."""
        B, T, C = x.shape
        q, k, v = (part.view(B, T, -1, self.head_dim).transpose(1, 2) for part in self.qkv(x).split(C, dim=-1))
        q, k = self.rotary(self.q_norm(q), positions), self.rotary(self.k_norm(k), positions)
        if cache is not None:
            k, v = cache.append(k, v)
        y = self.kernel(q, k, v, mask)
        return self.out(y.transpose(1, 2).reshape(B, T, C))  # type: ignore[no-any-return]
