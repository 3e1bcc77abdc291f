"""A model's size on paper: dimensions, parameters, bytes and FLOPs, from its config alone."""

from dataclasses import dataclass

from glassgpt.config.model import ModelConfig


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
    def attention_weights(self) -> int:
        """Matrices of one attention: to queries, keys and values, and back."""
        c = self.config
        return 2 * c.n_embd * (c.n_head + c.resolved_n_kv_head) * c.resolved_head_dim

    @property
    def feed_forward_weights(self) -> int:
        """Matrices of one feed-forward block: two, or three with a gate."""
        return (3 if self.config.activation == "swiglu" else 2) * self.config.n_embd * self.config.resolved_n_inner

    @property
    def norm_parameters(self) -> int:
        """One normalisation of the residual stream."""
        return self.config.n_embd * (self.config.norm_weight + self.config.resolved_norm_bias)

    @property
    def block_matrices(self) -> int:
        """Elements of the matrices of one block."""
        return self.attention_weights + self.feed_forward_weights

    @property
    def block_parameters(self) -> int:
        """One block: matrices, biases and norms."""
        c = self.config
        attention = (c.n_head + 2 * c.resolved_n_kv_head) * c.resolved_head_dim + c.n_embd
        feed_forward = (2 if c.activation == "swiglu" else 1) * c.resolved_n_inner + c.n_embd
        qk_norms = 2 * c.resolved_head_dim if c.qk_norm and c.norm_weight else 0
        return self.block_matrices + c.bias * (attention + feed_forward) + qk_norms + 2 * self.norm_parameters

    @property
    def root_parameters(self) -> int:
        """Everything outside the blocks."""
        return self.embedding_parameters + (1 + self.config.embedding_norm) * self.norm_parameters

    @property
    def parameters(self) -> int:
        """All parameters, with the padding of the vocabulary."""
        return self.root_parameters + self.config.n_layer * self.block_parameters

    @property
    def parameters_without_padding(self) -> int:
        """All parameters that a token of the vocabulary can reach."""
        tables = 1 if self.config.tied_head else 2
        padding = self.config.padded_vocab_size - (self.config.vocab_size or 0)
        return self.parameters - tables * padding * self.config.n_embd

    @property
    def parameters_without_embeddings(self) -> int:
        """Blocks and norms: the N of the scaling laws (Kaplan et al., 2020)."""
        return self.parameters - self.embedding_parameters

    @property
    def forward_flops_per_token(self) -> int:
        """Forward FLOPs of matrix products per token in a full context: 2 per weight, and 4 H D per key of attention.

        Attention counts every pair of positions within its span, visible or not (Chowdhery et al., 2022, appendix B).
        """
        c = self.config
        keys = sum(min(c.context_length, (window or c.context_length) + c.window_globals) for window in c.windows)
        return (
            2 * (c.n_layer * self.block_matrices + c.padded_vocab_size * c.n_embd)
            + 4 * c.n_head * c.resolved_head_dim * keys
        )

    @property
    def training_flops_per_token(self) -> int:
        """Forward and backward: the backward pass costs twice the forward pass."""
        return 3 * self.forward_flops_per_token

    def __str__(self) -> str:
        c = self.config
        shared = f" on {c.resolved_n_kv_head} key/value heads" if c.resolved_n_kv_head < c.n_head else ""
        norm = [c.norm, f"eps {c.norm_eps:g}", *["without weight"] * (not c.norm_weight)]
        norm += ["without bias"] * (not c.resolved_norm_bias) + ["also of the embedding"] * c.embedding_norm
        norm += ["also of queries and keys"] * c.qk_norm
        visible = "all of it"
        if c.window is not None:
            first = f" and the first {c.window_globals}" if c.window_globals else ""
            pattern = f", layers {c.window_pattern}" if "L" in c.window_pattern else ""
            visible = f"windows of {c.window}{first}{pattern}"
        rows = (
            ("layers, heads, width", f"{c.n_layer}, {c.n_head} of {c.resolved_head_dim}{shared}, {c.n_embd}"),
            ("feed-forward", f"{c.resolved_n_inner}, {c.activation}"),
            ("norm", ", ".join(norm)),
            ("context", f"{c.context_length} tokens, {c.position} positions; each sees {visible}"),
            ("vocabulary", f"{c.vocab_size:,} (padded to {c.padded_vocab_size:,})"),
            ("head", "tied to the embedding" if c.tied_head else "untied"),
            ("bias, dropout", f"{'yes' if c.bias else 'no'}, {c.dropout}"),
            ("parameters", f"{self.parameters:,} ({4 * self.parameters / 1e6:,.1f} MB in float32)"),
            ("  without padding", f"{self.parameters_without_padding:,}"),
            ("  without embeddings", f"{self.parameters_without_embeddings:,}"),
            (
                "FLOPs per token",
                f"{self.forward_flops_per_token:,} forward, {self.training_flops_per_token:,} training",
            ),
        )
        return "\n".join(f"{name:<22}{value}" for name, value in rows)
