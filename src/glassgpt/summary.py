"""A model's size on paper: dimensions, parameters, bytes and FLOPs, from its config alone."""

from dataclasses import dataclass

from .config import ModelConfig


@dataclass(frozen=True)
class ModelSummary:
    """Counts that follow from a `ModelConfig` whose `vocab_size` is set."""

    config: ModelConfig

    @property
    def embedding_parameters(self) -> int:
        """Token embedding, learned positions and an untied head, with padding."""
        tables = 1 if self.config.tied_head else 2
        positions = self.config.context_length if self.config.position == "learned" else 0
        return (tables * self.config.padded_vocab_size + positions) * self.config.n_embd

    @property
    def block_parameters(self) -> int:
        """One block: attention 4 C^2, feed-forward 8 C^2, two norms, and the biases of all of them."""
        C, bias = self.config.n_embd, int(self.config.bias)
        attention = 4 * C * C + bias * 4 * C
        feed_forward = 8 * C * C + bias * 5 * C
        qk_norms = 2 * self.config.head_dim if self.config.qk_norm else 0
        return attention + feed_forward + qk_norms + 2 * self.norm_parameters

    @property
    def norm_parameters(self) -> int:
        """One LayerNorm."""
        return self.config.n_embd * (1 + int(self.config.bias))

    @property
    def parameters(self) -> int:
        """All parameters, with the padding of the vocabulary."""
        return self.embedding_parameters + self.config.n_layer * self.block_parameters + self.norm_parameters

    @property
    def parameters_without_padding(self) -> int:
        """All parameters that a token of the vocabulary can reach."""
        tables = 1 if self.config.tied_head else 2
        padding = self.config.padded_vocab_size - (self.config.vocab_size or 0)
        return self.parameters - tables * padding * self.config.n_embd

    @property
    def parameters_without_embeddings(self) -> int:
        """Blocks and the last norm: the N of the scaling laws (Kaplan et al., 2020)."""
        return self.parameters - self.embedding_parameters

    @property
    def forward_flops_per_token(self) -> int:
        """FLOPs of matrix products for one token in a full context, forward: 2 a weight, and 4 C T for attention's two.

        Attention counts every pair of positions, visible or not (Chowdhery et al., 2022, appendix B).
        """
        C, T = self.config.n_embd, self.config.context_length
        weights = self.config.n_layer * 12 * C * C + self.config.padded_vocab_size * C
        return 2 * weights + self.config.n_layer * 4 * C * T

    @property
    def training_flops_per_token(self) -> int:
        """Forward and backward: the backward pass costs twice the forward pass."""
        return 3 * self.forward_flops_per_token

    def __str__(self) -> str:
        c = self.config
        rows = (
            ("layers, heads, width", f"{c.n_layer}, {c.n_head} of {c.head_dim}, {c.n_embd}"),
            ("feed-forward", f"{4 * c.n_embd}, {c.activation}"),
            ("context", f"{c.context_length} tokens, {c.position} positions{', QK-norm' if c.qk_norm else ''}"),
            ("vocabulary", f"{c.vocab_size:,} (padded to {c.padded_vocab_size:,})"),
            ("head", "tied to the embedding" if c.tied_head else "untied"),
            ("bias, dropout", f"{'yes' if c.bias else 'no'}, {c.dropout}"),
            ("parameters", f"{self.parameters:,} ({4 * self.parameters / 1e6:,.1f} MB in float32)"),
            ("  without padding", f"{self.parameters_without_padding:,}"),
            ("  without embeddings", f"{self.parameters_without_embeddings:,}"),
            ("FLOPs a token", f"{self.forward_flops_per_token:,} forward, {self.training_flops_per_token:,} training"),
        )
        return "\n".join(f"{name:<22}{value}" for name, value in rows)
