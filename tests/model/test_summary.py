"""The model summary equals the parameters of real models and the FLOPs that PyTorch counts."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from glassgpt.config.model import ModelConfig
from glassgpt.config.recipes import recipe
from glassgpt.model.gpt import GPT
from glassgpt.model.summary import ModelSummary

BASE: dict[str, Any] = {
    "vocab_size": 65,
    "context_length": 24,
    "n_layer": 3,
    "n_head": 2,
    "n_embd": 16,
    "attention": "explicit",
}
SHAPES: list[dict[str, Any]] = [
    {},
    {"vocab_multiple": 128},
    {"tied_head": False},
    {"tied_head": False, "vocab_multiple": 32, "bias": False},
    {"bias": False},
    {"position": "rope"},
    {"position": "rope", "qk_norm": True, "n_head": 4},
    {"qk_norm": True, "bias": False, "activation": "relu_squared", "logit_softcap": 15.0},
    {"n_layer": 1, "n_head": 1, "n_embd": 6, "context_length": 1},
    {"n_kv_head": 1, "head_dim": 6, "n_inner": 20},
    {"n_head": 4, "n_kv_head": 2, "activation": "swiglu", "norm": "rmsnorm", "position": "rope"},
    {
        "activation": "swiglu",
        "bias": False,
        "norm": "rmsnorm",
        "norm_weight": False,
        "qk_norm": True,
        "embedding_norm": True,
    },
    {"embedding_norm": True, "norm_bias": False, "position": "sinusoidal"},
]
EACH = pytest.mark.parametrize("changes", SHAPES, ids=str)


def shape(changes: dict[str, Any]) -> ModelConfig:
    """Return the base config with some settings changed."""
    return ModelConfig(**(BASE | changes))


def count(config: ModelConfig, *, only: str = "") -> int:
    """Return the number of parameters, optionally only of those whose names start with `only`."""
    with torch.device("meta"):
        model = GPT(config)
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(only))


@EACH
def test_parameters_equal_those_of_the_model(changes: dict[str, Any]) -> None:
    config = shape(changes)
    summary = ModelSummary(config)
    assert summary.parameters == count(config)
    assert summary.parameters_without_padding == count(shape(changes | {"vocab_multiple": 1}))
    norms = count(config, only="norm.") + count(config, only="embedding_norm.")
    assert summary.parameters_without_embeddings == count(config, only="blocks.") + norms
    assert summary.block_parameters == count(config, only="blocks.0.")


@EACH
def test_flops_equal_those_counted_by_pytorch(changes: dict[str, Any]) -> None:
    """`FlopCounterMode` counts a forward pass, and a loss with its backward pass.

    The numbers are equal, because both count two FLOPs per multiplication and addition.
    """
    config = shape(changes)
    model, ids = GPT.create(config, 0), torch.zeros(2, config.context_length, dtype=torch.long)
    summary = ModelSummary(config)
    with FlopCounterMode(display=False) as forward:
        model(ids)
    # Without targets, the model computes no logits of padding rows.
    padding = 2 * (config.padded_vocab_size - 65) * config.n_embd
    assert summary.forward_flops_per_token - padding == forward.get_total_flops() / ids.numel()
    with FlopCounterMode(display=False) as training:
        model(ids, ids).backward()
    assert summary.training_flops_per_token == training.get_total_flops() / ids.numel()


def test_attention_flops_count_only_the_keys_in_the_window() -> None:
    """By hand: of 3 layers, the last attends to 24 keys, the others to 4 + 2, with 4 FLOPs per dimension and key."""
    full, windowed = (
        ModelSummary(shape(changes)).forward_flops_per_token
        for changes in ({}, {"window": 4, "window_globals": 2, "window_pattern": "SSL"})
    )
    assert full - windowed == 4 * 16 * (24 - 6) * 2


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "gpt2",
            [
                "12, 12 of 64, 768",
                "3072, gelu_tanh",
                "1024 tokens, learned positions; each sees all of it",
                "50,257 (padded to 50,304)",
                "124,475,904 (497.9 MB in float32)",
                "124,439,808",
                "85,056,000",
            ],
        ),
        (
            "gpt2-xl",
            ["48, 25 of 64, 1600", "6400, gelu_tanh", "1,557,686,400 (6,230.7 MB in float32)", "1,557,611,200"],
        ),
    ],
)
def test_the_summary_prints_gpt2s_dimensions(name: str, lines: list[str]) -> None:
    """Numbers are computed by hand; 85,056,000 is 12 x (12 x 768^2 + 13 x 768) + 2 x 768."""
    text = str(ModelSummary(recipe(name, model={"vocab_size": 50257}).model))
    values = [line[22:] for line in text.splitlines()]
    assert [line for line in lines if line not in values] == []


@pytest.mark.parametrize(("name", "most"), [("teaching-small", 210_000), ("teaching-tiny", 60_000)])
def test_the_teaching_recipes_have_the_intended_sizes(name: str, most: int) -> None:
    """The vocabulary is tinyshakespeare's 65 characters. The models that they replace had 209,729 and 55,168."""
    assert 0.8 * most < ModelSummary(recipe(name, model={"vocab_size": 65}).model).parameters <= most
