"""To and from Hugging Face: the same logits and the same text as transformers, family by family, and no silently wrong model.

Tolerances: both sides compute in float32 on a CPU, in another order of operations; on these models, whose logits are of the
order of 1 to 10, that differs by up to some 5e-6. A wrong rotation, window or norm differs by 0.1 and more.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from glassgpt.config import ModelConfig
from glassgpt.generation import generate
from glassgpt.hf import HFModel, export_hf, home_of, open_hf
from glassgpt.hf_families import FAMILIES
from glassgpt.model import GPT
from kill_harness import lightly

transformers: Any = pytest.importorskip("transformers", reason="parity needs transformers: pip install 'glassgpt[hf]'")
TOLERANCE = 1e-5
T = 23  # an odd length, longer than the windows of 5

SMALL: dict[str, Any] = {"vocab_size": 97, "context_length": 48, "n_layer": 3, "n_head": 4, "n_embd": 32, "dropout": 0.1}
ROTARY: dict[str, Any] = {"position": "rope", "norm": "rmsnorm", "bias": False, "tied_head": False, "n_kv_head": 2, "rope_base": 500.0}
SWIGLU = {**ROTARY, "activation": "swiglu", "n_inner": 40}
CHAT = {"qk_norm": True, "norm_weight": False, "embedding_norm": True, "activation": "relu_squared"}
# What chooses a family, by its name.
HOMES: list[tuple[str, dict[str, Any]]] = [
    ("GPT2", {}),
    ("GPT2", {"bias": False, "n_inner": 50, "activation": "relu", "tied_head": False, "norm_eps": 1e-3}),
    ("GPT2", {"bias": False, "norm_bias": True, "vocab_multiple": 64, "activation": "gelu"}),
    ("GPTBigCode", {"n_kv_head": 1}),
    ("GPTBigCode", {"n_kv_head": 1, "bias": False, "n_inner": 50, "tied_head": False}),
    ("Starcoder2", {"position": "rope", "n_kv_head": 2, "window": 5}),
    ("Starcoder2", {"position": "rope", "bias": False, "activation": "silu", "head_dim": 12, "tied_head": False, "norm_eps": 1e-3}),
    ("Llama", SWIGLU),
    ("Llama", {**SWIGLU, "bias": True, "n_kv_head": 1, "head_dim": 12, "tied_head": True, "norm_eps": 1e-3}),
    ("Llama", {**SWIGLU, "window": 48, "vocab_multiple": 64}),  # as long as the context: no window
    ("Mistral", {**SWIGLU, "window": 5}),
    ("Mistral", {**SWIGLU, "window": 5, "head_dim": 12, "tied_head": True, "n_kv_head": None}),
    ("Mistral", {**SWIGLU, "n_head": 3, "n_kv_head": 1, "head_dim": 12}),  # transformers' Llama insists on n_head that divides n_embd
    ("Ministral", {**SWIGLU, "window": 5, "window_pattern": "SSL"}),
    ("Ministral", {**SWIGLU, "window": 5, "window_pattern": "LS", "head_dim": 12}),
    ("Qwen3", {**SWIGLU, "qk_norm": True}),
    ("Qwen3", {**SWIGLU, "qk_norm": True, "window": 5, "window_pattern": "LS", "head_dim": 12, "tied_head": True}),
    ("Qwen3", {**SWIGLU, "qk_norm": True, "window": 5, "n_kv_head": 1}),
    ("Arcee", {**ROTARY, "activation": "relu_squared"}),
    ("Arcee", {**ROTARY, "activation": "gelu_tanh", "bias": True, "head_dim": 12, "tied_head": True}),
    ("Apertus", {**ROTARY, "activation": "silu", "qk_norm": True}),
    ("Apertus", {**ROTARY, "activation": "relu", "qk_norm": True, "head_dim": 12, "tied_head": True, "n_kv_head": 4}),
    ("NanoChat", {**ROTARY, **CHAT, "logit_softcap": 4.0}),
    ("NanoChat", {**ROTARY, **CHAT, "head_dim": 12, "tied_head": True, "n_kv_head": 1}),
]

HF_SMALL = {
    "vocab_size": 97,
    "max_position_embeddings": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 56,
    "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
}
GPT2_SMALL = {"vocab_size": 97, "n_positions": 48, "n_layer": 3, "n_head": 4, "n_embd": 32}
# Configs of transformers' own making: what is not said here has the family's defaults.
THEIRS: list[tuple[str, dict[str, Any]]] = [
    ("GPT2", GPT2_SMALL),
    ("GPTBigCode", {**GPT2_SMALL, "n_inner": 56}),
    ("Starcoder2", {**HF_SMALL, "sliding_window": 5}),
    ("Llama", HF_SMALL),
    ("Mistral", {**HF_SMALL, "sliding_window": 5}),
    (
        "Ministral",
        {**HF_SMALL, "head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    ("Qwen3", {**HF_SMALL, "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}),
    ("Arcee", HF_SMALL),
    ("Apertus", {**HF_SMALL, "hidden_act": "relu2"}),
    ("NanoChat", HF_SMALL),
]


@pytest.fixture(autouse=True, scope="module")
def light() -> Iterator[None]:
    """One thread for the whole file, and nothing of transformers' progress and advice."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with lightly():
        yield


def enliven(module: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter, norms and biases included, values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.ndim > 1 else 0.3 * noise + (1 if name.endswith("weight") else 0))


def ids(seed: int = 1, batch: int = 3) -> Tensor:
    return torch.randint(97, (batch, T), generator=torch.Generator().manual_seed(seed))


def lively(**settings: Any) -> GPT:
    model = GPT.empty(ModelConfig(**{**SMALL, **settings})).eval()
    enliven(model)
    return model


def read(path: Path) -> tuple[HFModel, GPT]:
    found = open_hf(path)
    model = GPT.empty(found.model_config).eval()
    found.load_model(model)
    return found, model


def theirs(path: Path, kernel: str = "sdpa") -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation=kernel).eval()


def their_model(family: str, settings: dict[str, Any]) -> Any:
    """A lively model of transformers' own, its tied weights still one."""
    config = transformers.AutoConfig.for_model(next(f.model_type for f in FAMILIES if f.name == family), **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    enliven(model)
    return model


def assert_same_logits(model: GPT, other: Any, batch: int = 3) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(ids(batch=batch)), other(ids(batch=batch)).logits, rtol=0, atol=TOLERANCE)


def assert_same_text(model: GPT, other: Any) -> None:
    """Greedy, token for token, through both caches and past the windows."""
    prompt = ids(2, batch=1)[:, :9]
    other.generation_config.eos_token_id = None  # all of it, whatever the default end is
    written = other.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False, pad_token_id=0)
    ours = [piece.token for piece in generate(model, None, prompt[0].tolist(), max_new_tokens=30, temperature=0)]
    assert ours == written[0, 9:].tolist()
    # With a tied head a random model tends to repeat its last token.
    assert model.config.tied_head or len(set(ours)) > 5, "a text of few tokens would show little"


@pytest.mark.parametrize(("family", "settings"), HOMES)
def test_our_model_in_transformers(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = lively(**settings)
    assert home_of(model.config).name == family
    assert export_hf(model, None, tmp_path / "out") == family
    other = theirs(tmp_path / "out", "eager" if settings.get("n_kv_head") == 1 else "sdpa")
    assert type(other).__name__ == next(f.architecture for f in FAMILIES if f.name == family)
    assert_same_logits(model, other)
    assert_same_text(model, other)
    found, back = read(tmp_path / "out")
    assert found.family == family
    with torch.no_grad():
        # Bitwise, but where zeros were put in for biases: the product is then summed in another order.
        exact = model.config.bias or model.config.norm == "rmsnorm"
        torch.testing.assert_close(back(ids()), model(ids()), rtol=0, atol=0 if exact else TOLERANCE)


@pytest.mark.parametrize(("family", "settings"), THEIRS)
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_model_here_and_back(family: str, settings: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    other = their_model(family, {**settings, "tie_word_embeddings": tied})
    other.save_pretrained(tmp_path / "in")
    found, model = read(tmp_path / "in")
    assert found.family == family
    assert_same_logits(model, other, batch=2)
    assert_same_text(model, other)
    assert export_hf(model, None, tmp_path / "out") == family
    before, after = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert open_hf(tmp_path / "out").model_config == found.model_config


def test_every_family_is_tried_both_ways() -> None:
    names = {family.name for family in FAMILIES}
    assert len(names) == 10
    assert {name for name, _ in HOMES} == {name for name, _ in THEIRS} == names
