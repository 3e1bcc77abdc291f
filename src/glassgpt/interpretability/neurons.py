"""Neurons of the feed-forward blocks: their values, what they write, and the tokens with their largest values.

A neuron is one inner unit of a feed-forward block. It reads the residual stream along a row of `up` (or `gate`), and
adds its value times a column of `down`, its output vector, to the stream: a key and a value (Geva et al., 2021).

Shapes: `L` layers, `T` tokens, `C` channels, `F` neurons of a block, `V` vocabulary, `N` windows.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from glassgpt.generation.inference import evaluation_mode
from glassgpt.interpretability.capture import ActivationCache, at_least_float32, require_index
from glassgpt.interpretability.logit_lens import norm_scale
from glassgpt.model.attention import LayerNorm, RMSNorm
from glassgpt.model.finite import nonfinite_error
from glassgpt.model.gpt import GPT, Block, FeedForward
from glassgpt.utils.arguments import check_arguments
from glassgpt.utils.errors import UserError
from glassgpt.utils.torch_internals import uncompiled

BATCH_TOKENS = 128  # of one step of a search: other requests of the page wait for it


@dataclass(frozen=True)
class NeuronValues:
    """The values of a block's neurons (..., F). The names are TransformerLens's, except `gate`."""

    pre: Tensor  # before the activation
    gate: Tensor | None  # SwiGLU: SiLU(pre); None without a gate
    pre_linear: Tensor | None  # SwiGLU: what the gate multiplies; None without a gate
    post: Tensor  # after the activation and the gate: what multiplies the neuron's output vector


@check_arguments
@torch.no_grad()
def neuron_values(model: GPT, layer: int, resid_mid: Tensor) -> NeuronValues:
    """The values of a layer's neurons for residual streams between attention and feed-forward (..., C).

    A capture has these streams as `resid_mid`. Raises `UserError` for a layer out of range.
    """
    require_index("layer", layer, len(model.blocks))
    block = cast(Block, model.blocks[layer])
    x, feed_forward = block.feed_forward_norm.forward(resid_mid), block.feed_forward
    up = feed_forward.up.forward(x)
    if isinstance(feed_forward, FeedForward):
        return NeuronValues(up, None, None, feed_forward.activation(up))
    pre = feed_forward.gate.forward(x)
    gate = feed_forward.activation(pre)
    return NeuronValues(pre, gate, up, gate * up)


@check_arguments
@torch.no_grad()
def neuron_logits(model: GPT, cache: ActivationCache, layer: int, neuron: int, position: int) -> Tensor:
    """What a neuron's output vector adds to each logit (V,) at a position of the first sequence, per unit of its value.

    The vector w goes through the final norm, whose scale is fixed to its value at the position, and the head:
    `head @ (weight * (w - mean(w)) / std)`, for RMSNorm without the mean and with the root mean square. This is the
    direct effect, before the soft-cap: later layers, which read the vector as well, are not included. Other positions
    only have another scale, so the order of the tokens is the same. Raises `UserError` for numbers out of range.
    """
    cache.require_pass()
    require_index("layer", layer, len(model.blocks))
    require_index("position", position, cache.ids.shape[1])
    down = cast(Block, model.blocks[layer]).feed_forward.down.weight
    require_index("neuron", neuron, down.shape[1])
    w, norm = at_least_float32(down[:, neuron]), model.norm
    assert isinstance(norm, LayerNorm | RMSNorm)
    x = at_least_float32(cache.layers[-1].resid_post[0, position])
    scaled = (w - w.mean() if isinstance(norm, LayerNorm) else w) * norm_scale(norm, x)
    direct = scaled if norm.weight is None else scaled * norm.weight
    return at_least_float32(model.head.weight[: model.vocab_size]) @ direct


class NeuronSearch:
    """Find the windows of a text in which the values of neurons are largest, for all neurons of all layers at once.

    search = NeuronSearch(model, windows)
    search.run()
    search.values[layer, :, neuron]  # the k largest, each of another window

    A window's value is the largest `post` of its tokens. The first token does not count if there are others: models
    treat the start of a text unlike the rest. `advance` searches the next few windows, so a search can be interrupted.
    """

    def __init__(self, model: GPT, windows: Tensor, k: int = 5) -> None:
        """windows: token ids (N, T), int64, on any device. Raises `UserError` if they are empty."""
        if windows.dim() != 2 or not windows.numel():
            raise UserError(f"windows must be token ids (N, T), at least one, got shape {tuple(windows.shape)}")
        self._model, self.windows, self._k = model, windows, min(k, len(windows))
        self.searched = 0  # windows that were searched
        empty = torch.empty(len(model.blocks), 0, model.config.resolved_n_inner)
        self.values = empty  # the largest values (L, k, F), the largest first; fewer than k at first
        self.rows = empty.long()  # the windows they are in (L, k, F)
        self.positions = empty.long()  # their positions in these (L, k, F)

    @property
    def is_done(self) -> bool:
        """Whether all windows were searched."""
        return self.searched >= len(self.windows)

    def run(self) -> None:
        """Search all windows that were not searched yet."""
        while not self.is_done:
            self.advance()

    @torch.no_grad()
    def advance(self) -> None:
        """Search about `BATCH_TOKENS` tokens more. Raises `UserError` if the values are not finite."""
        count = max(1, BATCH_TOKENS // self.windows.shape[1])
        batch = self.windows[self.searched : self.searched + count]
        values, positions = self._maxima(batch)
        rows = torch.arange(self.searched, self.searched + len(batch))[:, None].expand_as(values)
        values, rows, positions = (
            torch.cat(pair, dim=1) for pair in ((self.values, values), (self.rows, rows), (self.positions, positions))
        )
        top = values.topk(min(self._k, values.shape[1]), dim=1)
        self.values, self.searched = top.values, self.searched + len(batch)
        self.rows, self.positions = rows.gather(1, top.indices), positions.gather(1, top.indices)

    def _maxima(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """The largest values in windows (N, T), and their positions, both (L, N, F), on the CPU."""
        found: list[tuple[Tensor, Tensor]] = []
        first = min(1, batch.shape[1] - 1)

        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            largest = inputs[0][:, first:].float().max(dim=1)
            found.append((largest.values.cpu(), largest.indices.cpu() + first))

        downs = [cast(Block, block).feed_forward.down for block in self._model.blocks]
        handles = [down.register_forward_pre_hook(hook) for down in downs]
        try:
            with evaluation_mode(self._model), uncompiled(self._model):
                self._model.hidden(batch.to(self._model.embedding.weight.device))
        finally:
            for handle in handles:
                handle.remove()
        values, positions = (torch.stack(parts) for parts in zip(*found, strict=True))
        if not values.isfinite().all():
            raise nonfinite_error(self._model)
        return values, positions
