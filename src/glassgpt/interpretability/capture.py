"""The glass: what a forward pass computes, read from outside by hooks.

    with capture(model) as seen:
        model(ids)
    seen.layers[3].weights(head=0)  # (B, T, S)

The model's own code has no part in it: hooks sit on its small modules, and attention's weights, which fast kernels never form, are
formed anew from q, k and v. How far that is from what the kernel gave, `LayerActivations.difference` measures.

Shapes: `B` batch, `T` tokens, `S` keys, `C` channels, `H` query heads, `K` key/value heads, `D` head width, `F` feed-forward width.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from glassgpt.model.attention import Attention, Span
from glassgpt.model.gpt import GPT, Block
from glassgpt.utils.errors import UserError
from glassgpt.utils.torch_internals import uncompiled


@dataclass
class LayerActivations:
    """What one block computed. The tensors are the model's own, without gradients: to be read, not changed."""

    span: Span
    """How far this layer looks back."""
    resid_pre: Tensor = field(init=False)
    """The residual stream before the block (B, T, C)."""
    q_plain: Tensor = field(init=False)
    """Queries before rotary positions, behind the QK-norm if there is one (B, H, T, D)."""
    k_plain: Tensor = field(init=False)
    """Keys likewise (B, K, T, D): those of this pass alone, where there is a cache."""
    q: Tensor = field(init=False)
    """Queries as the kernel has them (B, H, T, D)."""
    k: Tensor = field(init=False)
    """Keys as the kernel has them (B, K, S, D); query head h uses key/value head h // (H / K)."""
    v: Tensor = field(init=False)
    """Values (B, K, S, D)."""
    mask: Tensor | None = field(init=False)
    """The mask (T, S) that the kernel was given, None where the span over plain positions says it all."""
    kernel_out: Tensor = field(init=False)
    """What each head took from the values, before the output projection (B, H, T, D)."""
    z: Tensor = field(init=False)
    """What the output projection was given of each head (B, H, T, D): `kernel_out`, but where a head was switched off or patched."""
    attn_out: Tensor = field(init=False)
    """What attention wrote into the stream (B, T, C)."""
    activations: Tensor = field(init=False)
    """The feed-forward block's inner values, behind nonlinearity and gate (B, T, F)."""
    mlp_out: Tensor = field(init=False)
    """What the feed-forward block wrote into the stream (B, T, C)."""
    resid_post: Tensor = field(init=False)
    """The residual stream behind the block (B, T, C)."""

    @property
    def visible(self) -> Tensor:
        """Which key each query sees (T, S), bool."""
        if self.mask is not None:
            return self.mask
        positions = torch.arange(self.k.shape[-2], device=self.k.device)
        return self.span.mask(positions[-self.q.shape[-2] :], positions)

    def scores(self, head: int | None = None) -> Tensor:
        """q k^T / sqrt(D) before the mask: of one head (B, T, S), or of all (B, H, T, S). At least float32."""
        q, k = self._heads(self.q, head), self._heads(self.k, head)
        return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])

    def weights(self, head: int | None = None) -> Tensor:
        """Attention's weights, softmax(mask(scores)): of one head (B, T, S), or of all (B, H, T, S)."""
        return self.scores(head).masked_fill(~self.visible, -torch.inf).softmax(dim=-1)

    def difference(self, weights: Tensor | None = None, head: int | None = None) -> float:
        """The largest difference between weights v, with `weights` (B, H, T, S) as formed here, and what the kernel gave.

        Of one head alone, its weights (B, T, S). It is rounding alone where nothing was dropped out (`model.eval()`).
        """
        formed = (self.weights(head) if weights is None else weights) @ self._heads(self.v, head)
        given = self.kernel_out if head is None else self.kernel_out[:, head]
        return float((formed - given.to(formed.dtype)).abs().amax())

    def _heads(self, x: Tensor, head: int | None) -> Tensor:
        """Queries, keys or values (B, H or K, T, D), each for its query head; of one head (B, T, D). At least float32."""
        shared_by = self.q.shape[1] // x.shape[1]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x.repeat_interleave(shared_by, dim=1) if head is None else x[:, head // shared_by]


@dataclass
class ActivationCache:
    """What the last forward pass inside a `capture` computed; nothing is there before one."""

    layers: list[LayerActivations]
    ids: Tensor = field(init=False)
    """Token ids (B, T)."""
    hidden: Tensor = field(init=False)
    """The residual stream behind the last norm (B, T, C): what the head reads."""

    @property
    def stream(self) -> list[Tensor]:
        """The residual stream at each depth: before the first block, and behind each (n_layer + 1 of (B, T, C))."""
        return [self.layers[0].resid_pre, *(layer.resid_post for layer in self.layers)]

    def require_pass(self) -> None:
        """Raise `UserError` unless a forward pass was seen."""
        if "hidden" not in vars(self):
            raise UserError("nothing was seen yet: call the model inside `capture`, with its tokens, and ask then")


@contextmanager
def capture(model: GPT) -> Iterator[ActivationCache]:
    """Record what the model computes inside, in any mode and on any device; a later pass replaces an earlier one.

    On a model that is compiled or has a cache, too: inside, modules run as they are written, since hooks on a compiled one
    never fire; the compiled code is left as it is. The hooks are gone at the end, whatever ends it.
    """
    blocks = [cast(Block, block) for block in model.blocks]
    seen = ActivationCache([LayerActivations(block.attention.kernel.span) for block in blocks])  # type: ignore[arg-type]
    handles = [_after(model.embedding, lambda given, _: setattr(seen, "ids", given[0]))]
    handles.append(_after(model.norm, lambda _, gives: setattr(seen, "hidden", gives.detach())))
    try:
        for block, layer in zip(blocks, seen.layers, strict=True):
            handles += _watch(block, layer)
        with uncompiled(model):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


Watcher = Callable[[tuple[Any, ...], Any], None]


def _after(module: nn.Module, watcher: Watcher) -> RemovableHandle:
    """Call the watcher with what a module was given and what it gives, each time."""

    def hook(_: nn.Module, given: tuple[Any, ...], gives: Any) -> None:
        watcher(given, gives)

    return module.register_forward_hook(hook)


def _watch(block: Block, layer: LayerActivations) -> list[RemovableHandle]:
    attention: Attention = block.attention

    def at_kernel(given: tuple[Any, ...], gives: Any) -> None:
        layer.q, layer.k, layer.v = (x.detach() for x in given[:3])
        layer.mask, layer.kernel_out = given[3], gives.detach()
        # Of a cache they may be its own buffers, which go on to change: with a mask, or more keys than queries.
        if layer.mask is not None or layer.k.shape[-2] != layer.q.shape[-2]:
            layer.k, layer.v = layer.k.clone(), layer.v.clone()

    def at_out(given: tuple[Any, ...], _: Any) -> None:
        layer.z = given[0].detach().unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    def at_block(given: tuple[Any, ...], gives: Any) -> None:
        layer.resid_pre, layer.resid_post = given[0].detach(), gives.detach()

    def at(name: str) -> Watcher:
        return lambda _, gives: setattr(layer, name, gives.detach())

    return [
        _after(attention.q_norm, at("q_plain")),
        _after(attention.k_norm, at("k_plain")),
        _after(attention.kernel, at_kernel),
        _after(attention.out, at_out),
        _after(attention, at("attn_out")),
        _after(block.feed_forward.down, lambda given, _: setattr(layer, "activations", given[0].detach())),
        _after(block.feed_forward, at("mlp_out")),
        _after(block, at_block),
    ]


@dataclass(frozen=True)
class AttentionPicture:
    """All heads' attention at a glance, for one sequence."""

    thumbnails: Tensor
    """Weights of each head (layers, H, R, R), where R is the number of tokens, or less: then each is the largest of its cells."""
    entropies: Tensor
    """Mean entropy of each head's rows (layers, H), in bits: 0 where each token looks at one."""
    differences: list[float]
    """`LayerActivations.difference` of each layer."""


@torch.no_grad()
def attention_picture(seen: ActivationCache, size: int = 48) -> AttentionPicture:
    """Thumbnails of at most size x size of the first sequence, layer by layer: never more than one layer's weights are there.

    Raises `UserError` before a pass.
    """
    seen.require_pass()
    thumbnails, entropies, differences = [], [], []
    for layer in seen.layers:
        weights = layer.weights()
        differences.append(layer.difference(weights))
        first = weights[0]
        shape = [min(size, length) for length in first.shape[-2:]]
        thumbnails.append(F.adaptive_max_pool2d(first, shape))  # the largest: a mean would wash out single bright cells
        entropies.append(torch.special.entr(first).sum(dim=-1).mean(dim=-1) / math.log(2))
    return AttentionPicture(torch.stack(thumbnails), torch.stack(entropies), differences)
