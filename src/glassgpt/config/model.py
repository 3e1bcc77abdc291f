"""The shape of a model, and the values that follow from it."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Literal

from glassgpt.config.validation import BelowOne, Count, Length, Positive, Size, StrictConfig, above, between
from glassgpt.utils.errors import UserError

MOST_WIDTH = 2**24  # of all heads together, so that no matrix has more bytes than 64-bit integers can count


@dataclass(frozen=True, kw_only=True)
class ModelConfig(StrictConfig):
    """The shape of a model. The defaults are GPT-2 small (Radford et al., 2019), except for its vocabulary.

    A setting whose default depends on other settings is None until it is set, and `resolved_NAME` is the value in use
    (`resolved_head_dim`, `resolved_n_kv_head`, `resolved_n_inner`, `resolved_norm_bias`). Nothing derived is stored, so
    an override cannot leave a stale value.
    """

    vocab_size: Length[int | None] = None  # Number of token ids; none: the tokenizer's.
    # Pad the embedding to a multiple of this (128 suits GPUs); padded ids get no probability.
    vocab_multiple: Length[int] = 1
    context_length: Length[int] = 1024  # Longest sequence in training, in tokens.
    n_layer: Annotated[int, between(1, 4096)] = 12  # Number of blocks.
    n_head: Size[int] = 12  # Attention heads per block.
    # Key and value heads per block, each shared by n_head / n_kv_head query heads; none: n_head.
    n_kv_head: Count[int | None] = None
    head_dim: Size[int | None] = None  # Width of a head; none: n_embd / n_head.
    n_embd: Size[int] = 768  # Width of the residual stream.
    # Position information: learned or sinusoidal embeddings, rotations inside attention (rope), or none.
    position: Literal["learned", "rope", "sinusoidal", "none"] = "learned"
    # Base of the rotary angles; a larger base rotates more slowly.
    rope_base: Annotated[float, above(1, 10**15)] = 10000.0
    # Tokens visible to a sliding-window layer, including the current one; none: all earlier tokens.
    window: Count[int | None] = None
    window_globals: Count[int] = 0  # The first N tokens of a text, which windowed layers always see.
    # One letter per layer, repeated as needed: S for a sliding window, L for the whole text (SSSL: every fourth).
    window_pattern: str = "S"
    # Normalisation before attention, before the feed-forward block and before the head.
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_weight: bool = True  # RMSNorms have a weight, including those of queries and keys.
    norm_bias: bool | None = None  # LayerNorms have a bias; none: the value of `bias`.
    norm_eps: Positive[float] = 1e-5  # Added to the variance in every normalisation.
    embedding_norm: bool = False  # Normalise the embedding as well.
    qk_norm: bool = False  # RMSNorm of each head's queries and keys.
    # Nonlinearity of the feed-forward block; swiglu adds a gate, which is a third matrix.
    activation: Literal["gelu_tanh", "gelu", "relu", "relu_squared", "silu", "swiglu"] = "gelu_tanh"
    # Width of the feed-forward block; none: 4 n_embd; with swiglu 8/3 n_embd, rounded up to a multiple of 8.
    n_inner: Length[int | None] = None
    bias: bool = True  # Biases in linear layers.
    # Initial projections into the residual stream: normal(0, 0.02 / sqrt(2 n_layer)), or zero.
    residual_init: Literal["scaled", "zero"] = "scaled"
    tied_head: bool = True  # The output head shares the token embedding's weights.
    # Squash logits into (-cap, cap) by cap x tanh(logits / cap), as in Gemma 2; none: no cap.
    logit_softcap: Positive[float | None] = None
    dropout: BelowOne[float] = 0.0  # Dropout after the embedding, on attention weights and on both residual branches.
    # Attention kernel: PyTorch's fused one, the explicit formula, or FlexAttention (trains on CUDA only).
    attention: Literal["sdpa", "explicit", "flex"] = "sdpa"

    def check(self) -> None:
        if self.attention == "flex":
            self.require("dropout", self.dropout == 0, "0 with model.attention = 'flex'")
        if self.norm == "layernorm":
            self.require("norm_weight", self.norm_weight, "true unless norm = 'rmsnorm'")
        else:
            self.require("norm_bias", not self.norm_bias, "false unless norm = 'layernorm'")
        if self.head_dim is None:
            valid = f"a divisor of model.n_embd = {self.n_embd}: {nearest_divisors(self.n_embd, self.n_head)}"
            self.require("n_head", self.n_embd % self.n_head == 0, f"{valid} (or set head_dim)")
        if self.n_kv_head is not None:
            valid = f"a divisor of model.n_head = {self.n_head}: {nearest_divisors(self.n_head, self.n_kv_head)}"
            self.require("n_kv_head", self.n_kv_head >= 1 and self.n_head % self.n_kv_head == 0, valid)
        width = self.n_head * self.resolved_head_dim
        self.require("head_dim", width <= MOST_WIDTH, f"such that n_head x head_dim is at most {MOST_WIDTH:,}")
        if self.position == "rope" and self.resolved_head_dim % 2:
            width = self.resolved_head_dim
            raise UserError(f"rope needs an even head width, got {width}; change model.n_head or model.head_dim")
        letters = bool(self.window_pattern) and set(self.window_pattern) <= set("SL")
        self.require("window_pattern", letters, "made of the letters S and L")
        if self.window is None:
            self.require("window_globals", self.window_globals == 0, "0 unless model.window is set")
            self.require("window_pattern", self.window_pattern == "S", "'S' unless model.window is set")
        else:
            is_relative = self.position in ("rope", "none") and not self.window_globals  # texts may exceed the context
            most = self.context_length - self.window_globals
            fits = self.window >= 1 and (is_relative or self.window <= most)
            self.require("window", fits, f"from 1 to context_length - window_globals = {most}")
            fits = len(self.window_pattern) <= self.n_layer and "S" in self.window_pattern
            self.require("window_pattern", fits, f"at most {self.n_layer} letters, one per layer, one of them S")

    def with_shorter_context(self, context_length: int) -> "ModelConfig":
        """A copy whose context is at most this long; a window that would cover all of it is dropped."""
        if context_length >= self.context_length:
            return self
        covers_all = self.window is not None and self.window + self.window_globals > context_length
        shape = dataclasses.replace(self, window=None, window_globals=0, window_pattern="S") if covers_all else self
        return dataclasses.replace(shape, context_length=context_length)

    @property
    def resolved_n_kv_head(self) -> int:
        """Key and value heads per block."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def resolved_head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head if self.head_dim is None else self.head_dim

    @property
    def resolved_n_inner(self) -> int:
        """Width of the feed-forward block."""
        if self.n_inner is not None:
            return self.n_inner
        return math.ceil(self.n_embd / 3) * 8 if self.activation == "swiglu" else 4 * self.n_embd

    @property
    def resolved_norm_bias(self) -> bool:
        """Whether the norms have a bias."""
        return self.norm == "layernorm" and (self.bias if self.norm_bias is None else self.norm_bias)

    @property
    def windows(self) -> list[int | None]:
        """The sliding window of each layer; None for a layer that sees the whole text."""
        pattern = self.window_pattern
        return [self.window if pattern[layer % len(pattern)] == "S" else None for layer in range(self.n_layer)]

    @property
    def has_unlimited_context(self) -> bool:
        """Whether text may grow past the context: every layer has a window, and no position was untrained.

        The rotary distance to a global token grows beyond those seen in training, so global tokens exclude it.
        """
        relative = self.position == "none" or (self.position == "rope" and self.window_globals == 0)
        return relative and None not in self.windows

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary rounded up to a multiple of `vocab_multiple`."""
        if self.vocab_size is None:
            raise UserError("model.vocab_size is not set; it is taken from the tokenizer when a run starts")
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple


def nearest_divisors(number: int, wanted: int) -> str:
    """The three divisors of a number that are nearest to the wanted one."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    divisors = {*small, *(number // n for n in small)}
    return ", ".join(map(str, sorted(sorted(divisors, key=lambda n: abs(n - wanted))[:3])))
