"""Keys and values of past tokens, so that each new token needs one position's computation only.

Shapes: `B` batch, `T` new and `S` returned positions, `K` key/value heads, `D` head width, `W` window, `G` globals.
"""

import copy

import torch
from torch import Tensor

from glassgpt.config.model import ModelConfig


class LayerCache:
    """Keys and values that one layer may still need: all of them, or the last W and the first G.

    Buffers are (B, K, slots, D). Position p is in slot p; when all are full, the slots after the first G form a ring.
    """

    def __init__(self, config: ModelConfig, window: int | None, batch_size: int, capacity: int, like: Tensor) -> None:
        """`like`: a tensor with the dtype and device of the buffers."""
        self.n_global = 0 if window is None else config.window_globals
        slots = capacity if window is None else min(capacity, window + self.n_global)
        shape = (batch_size, config.resolved_n_kv_head, slots, config.resolved_head_dim)
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)
        self.positions = torch.arange(slots, device=like.device)
        self.length = 0

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store k and v (B, K, T, D) of the next positions (T,).

        Returns the keys and values that these may see, (B, K, S, D) each, and their positions (S,), in any order.
        """
        slots = self.k.shape[-2]
        filled = min(self.length, slots)
        if filled == 0:
            self._store(k, v, positions)
            return k, v, positions
        if len(positions) > 1 and self.length + len(positions) > slots:  # the first may see what is overwritten
            seen_k, seen_v = (torch.cat([old[:, :, :filled], new], -2) for old, new in ((self.k, k), (self.v, v)))
            seen = torch.cat([self.positions[:filled], positions])
            self._store(k, v, positions)
            return seen_k, seen_v, seen
        self._store(k, v, positions)
        filled = min(self.length, slots)
        return self.k[:, :, :filled], self.v[:, :, :filled], self.positions[:filled]

    def select(self, rows: Tensor) -> "LayerCache":
        """A copy with these rows (n,) of the batch, in this order; a row may be repeated."""
        chosen = copy.copy(self)
        chosen.k, chosen.v, chosen.positions = self.k[rows], self.v[rows], self.positions.clone()
        return chosen

    def _store(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Keep what later positions may see."""
        slots, G, start = self.k.shape[-2], self.n_global, self.length
        self.length += len(positions)
        if self.length <= slots:
            self.k[:, :, start : self.length], self.v[:, :, start : self.length] = k, v
            return
        kept = (positions < G) | (positions >= self.length - (slots - G))
        positions = positions[kept]
        slot = torch.where(positions < slots, positions, G + (positions - G) % (slots - G))
        self.k[:, :, slot], self.v[:, :, slot], self.positions[slot] = k[:, :, kept], v[:, :, kept], positions


class KVCache:
    """One `LayerCache` per layer, for `batch_size` sequences of up to `capacity` tokens.

    Raises `ValueError` for a capacity over the context length, unless the model has no limit.
    """

    def __init__(self, config: ModelConfig, batch_size: int, capacity: int, like: Tensor) -> None:
        if capacity > config.context_length and not config.has_unlimited_context:
            raise ValueError(f"a cache of {capacity} positions exceeds the context length of {config.context_length}")
        self.layers = [LayerCache(config, window, batch_size, capacity, like) for window in config.windows]
        window_and_globals = (config.window or 0) + config.window_globals
        # None (no limit) if positions are relative, all layers have windows, and the capacity holds a window.
        self.limit = None if config.has_unlimited_context and capacity >= window_and_globals else capacity

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, also if they are on the device `meta`."""
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self.layers)

    @property
    def length(self) -> int:
        """Tokens so far."""
        return self.layers[0].length

    def select(self, rows: Tensor) -> "KVCache":
        """A copy with these rows (n,) of the batch. Repeat a row to continue one text in several ways."""
        chosen = copy.copy(self)
        chosen.layers = [layer.select(rows) for layer in self.layers]
        return chosen
