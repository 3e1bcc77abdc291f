"""A model's size on paper: dimensions, parameters, bytes and FLOPs, from its config alone."""

from glassgpt.config.model import ModelConfig


class ModelSummary:
    """Counts that follow from a `ModelConfig` whose `vocab_size` is set."""

    def __init__(self, config: ModelConfig) -> None:
        c = self.config = config
        tables = 1 if c.tied_head else 2
        positions = c.context_length if c.position == "learned" else 0
        embeddings = (tables * c.padded_vocab_size + positions) * c.n_embd
        norm = c.n_embd * (c.norm_weight + c.resolved_norm_bias)
        # A block: matrices to queries, keys, values and back, and of a feed-forward block, perhaps with a gate.
        is_gated = c.activation == "swiglu"
        attention = 2 * c.n_embd * (c.n_head + c.resolved_n_kv_head) * c.resolved_head_dim
        self.block_matrices = attention + (2 + is_gated) * c.n_embd * c.resolved_n_inner
        attention_biases = (c.n_head + 2 * c.resolved_n_kv_head) * c.resolved_head_dim + c.n_embd
        feed_forward_biases = (1 + is_gated) * c.resolved_n_inner + c.n_embd
        qk_norms = 2 * c.resolved_head_dim if c.qk_norm and c.norm_weight else 0
        biases = c.bias * (attention_biases + feed_forward_biases)
        self.block_parameters = self.block_matrices + biases + qk_norms + 2 * norm
        # Everything outside the blocks, and all of it; with the padding of the vocabulary.
        self.root_parameters = embeddings + (1 + c.embedding_norm) * norm
        self.parameters = self.root_parameters + c.n_layer * self.block_parameters
        # Without the padding of the vocabulary; without embeddings, the N of the scaling laws (Kaplan et al., 2020).
        padding = c.padded_vocab_size - (c.vocab_size or 0)
        self.parameters_without_padding = self.parameters - tables * padding * c.n_embd
        self.parameters_without_embeddings = self.parameters - embeddings
        # FLOPs of matrix products per token in a full context: 2 per weight, and 4 H D per key of attention, which
        # counts each pair of positions in its span, visible or not (Chowdhery et al., 2022, appendix B).
        keys = sum(min(c.context_length, (window or c.context_length) + c.window_globals) for window in c.windows)
        weights = c.n_layer * self.block_matrices + c.padded_vocab_size * c.n_embd
        self.forward_flops_per_token = 2 * weights + 4 * c.n_head * c.resolved_head_dim * keys
        self.training_flops_per_token = 3 * self.forward_flops_per_token  # the backward pass costs twice the forward

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
        flops = f"{self.forward_flops_per_token:,} forward, {self.training_flops_per_token:,} training"
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
            ("FLOPs per token", flops),
        )
        return "\n".join(f"{name:<22}{value}" for name, value in rows)
