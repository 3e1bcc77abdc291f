"""GPT-2 (Radford et al., 2019): a decoder of pre-LayerNorm blocks. Variants are slots chosen in `__init__`.

Shapes: `B` batch, `T` time, `C` channels, `V` padded vocabulary.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.config.model import ModelConfig
from glassgpt.model.attention import Attention, LayerNorm, NoPositions, RMSNorm
from glassgpt.model.kv_cache import KVCache, LayerCache
from glassgpt.model.loss import cross_entropy, soft_cap, token_losses
from glassgpt.utils.arguments import check_arguments
from glassgpt.utils.errors import UserError
from glassgpt.utils.rng import generator_for
from glassgpt.utils.torch_internals import SkipInit

Reduction = Literal["mean", "none"]


class ReLUSquared(nn.Module):
    """max(0, x)^2 (So et al., 2021)."""

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape."""
        return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "relu_squared": ReLUSquared,
    "silu": nn.SiLU,
}


class LearnedPositions(nn.Module):
    """One learned vector per position, added to the embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.context_length, config.n_embd)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, T, C), positions (T,) -> (B, T, C)."""
        table: Tensor = self.table(positions)
        return x + table


class SinusoidalPositions(nn.Module):
    """Sines and cosines of wavelengths from 2 pi to 20,000 pi (Vaswani et al., 2017, sections 3.4 and 3.5).

    The embedding, drawn from normal(0, 0.02) and so far smaller, is first multiplied by sqrt(C), as in the paper.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_embd = config.n_embd

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, T, C), positions (T,) -> (B, T, C)."""
        frequencies = 10000.0 ** (-torch.arange(0, self.n_embd, 2, device=x.device) / self.n_embd)
        angles = positions[:, None] * frequencies
        # Dimensions 2i and 2i + 1 are sine and cosine of one angle; an odd width ends with a sine.
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, : self.n_embd]
        return x * math.sqrt(self.n_embd) + table.to(x.dtype)


POSITIONS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "learned": LearnedPositions,
    "sinusoidal": SinusoidalPositions,
    "rope": lambda config: NoPositions(),
    "none": lambda config: NoPositions(),
}


def build_norm(config: ModelConfig) -> nn.Module:
    """A normalisation over the width of the residual stream."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, eps=config.norm_eps, elementwise_affine=config.norm_weight)
    return LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.resolved_norm_bias)


class FeedForward(nn.Module):
    """Two linear layers with a nonlinearity in between."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.resolved_n_inner, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]()
        self.down = nn.Linear(config.resolved_n_inner, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        out: Tensor = self.down(self.activation(self.up(x)))
        return out


class SwiGLU(nn.Module):
    """silu(x G) * (x U) D: a feed-forward block with a gate (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.resolved_n_inner, bias=config.bias)
        self.up = nn.Linear(config.n_embd, config.resolved_n_inner, bias=config.bias)
        self.activation = nn.SiLU()
        self.down = nn.Linear(config.resolved_n_inner, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        out: Tensor = self.down(self.activation(self.gate(x)) * self.up(x))
        return out


class Block(nn.Module):
    """Attention and feed-forward, each after a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = Attention(config, window)
        self.feed_forward_norm = build_norm(config)
        self.feed_forward = SwiGLU(config) if config.activation == "swiglu" else FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, positions: Tensor, cache: LayerCache | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C); the rest as in `Attention`."""
        x = x + self.dropout(self.attention(self.attention_norm(x), positions, cache))
        x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x


class GPT(nn.Module):
    """The language model. `model(ids)` gives logits, `model(ids, targets)` the loss. `create` makes a new one."""

    @check_arguments
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size or 0
        self.limit = config.context_length if config.position == "learned" else None
        self.end_ids: tuple[int, ...] | None = None  # they end a generated text; None: the tokenizer's end of text
        self.embedding = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.positions = POSITIONS[config.position](config)
        self.embedding_norm = build_norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, window) for window in config.windows)
        self.norm = build_norm(config)
        # A tied head is the embedding module itself, so nothing can untie the two.
        self.head: nn.Embedding | nn.Linear = self.embedding
        if not config.tied_head:
            self.head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)

    @classmethod
    @check_arguments
    def create(cls, config: ModelConfig, seed: int, device: torch.device | str = "cpu") -> "GPT":
        """A new model with weights drawn from `seed`: the same on every device."""
        model = cls.empty(config, device)
        initialize(model, seed)
        return model

    @classmethod
    @check_arguments
    def empty(cls, config: ModelConfig, device: torch.device | str = "cpu") -> "GPT":
        """A model with uninitialised weights, to be filled by `initialize` or from a file."""
        with SkipInit(), torch.device(device):
            return cls(config)

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, cache: KVCache | None = None, reduction: Reduction = "mean"
    ) -> Tensor:
        """Logits (B, T, vocab_size), or with targets (B, T) the loss in nats.

        The loss is the mean, with gradients; with `reduction="none"` it is that of each token, (B, T), without
        gradients. Padded ids have no logits and no probability. Raises `ValueError` for more tokens than learned
        positions or the cache allow.
        """
        hidden = self.hidden(ids, cache)
        if targets is None:
            return self.logits(hidden)
        loss = cross_entropy if reduction == "mean" else token_losses
        return loss(hidden, self.head.weight, targets, self.vocab_size, self.config.logit_softcap)

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids (B, T) -> the residual stream after the last norm (B, T, C). A cache takes in these tokens."""
        if not (isinstance(ids, Tensor) and ids.dim() == 2 and ids.numel() and ids.dtype in (torch.int32, torch.int64)):
            raise UserError("ids must be an int64 tensor (B, T); for text: torch.tensor(tokenizer.encode(text))[None]")
        start, limit = (0, self.limit) if cache is None else (cache.length, cache.limit)
        end = start + ids.shape[1]
        if limit is not None and end > limit:
            raise ValueError(f"{end} tokens do not fit into {limit} positions")
        positions = torch.arange(start, end, device=ids.device)
        x = self.dropout(self.embedding_norm(self.positions(self.embedding(ids), positions)))
        layer_caches = cache.layers if cache is not None else [None] * len(self.blocks)
        for block, layer_cache in zip(self.blocks, layer_caches, strict=True):
            x = block(x, positions, layer_cache)
        hidden: Tensor = self.norm(x)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> logits (..., vocab_size)."""
        return soft_cap(F.linear(hidden, self.head.weight[: self.vocab_size]), self.config.logit_softcap)

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache on the model's device, for `batch_size` sequences of up to `capacity` tokens."""
        return KVCache(self.config, batch_size, capacity, self.embedding.weight.detach())


@torch.no_grad()
def initialize(model: GPT, seed: int) -> None:
    """Draw all weights: normal(0, 0.02), biases 0, norms 1.

    The two projections that write into the residual stream have 0.02 / sqrt(2 n_layer) instead, so that its variance
    does not grow with depth (Radford et al., 2019, section 2.3), or start at zero if the config asks for it. Each
    parameter is drawn on the CPU from a generator named after it, so it depends on nothing else.
    """
    residual_std = 0.0 if model.config.residual_init == "zero" else 0.02 / math.sqrt(2 * model.config.n_layer)
    for name, module in model.named_modules():
        if isinstance(module, (LayerNorm, RMSNorm)):
            module.reset_parameters()
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            std = residual_std if name.endswith(("attention.out", "feed_forward.down")) else 0.02
            generator = generator_for(seed, "init", f"{name}.weight")
            module.weight.copy_(torch.normal(0.0, std, module.weight.shape, generator=generator))
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
