"""Import and export of Hugging Face models: each family has the logits and the generated text of transformers.

Unsupported settings are refused, so that no model is silently wrong.

Tolerances: both sides compute in float32 on a CPU, but in another order. On these models, whose logits are of the order
of 1 to 10, they differ by up to 5e-6. A wrong rotation, window or norm changes logits by 0.1 and more.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from glassgpt.config.model import ModelConfig
from glassgpt.config.recipes import recipe, recipe_names
from glassgpt.generation.generate import generate
from glassgpt.interop.hf_families import FAMILIES
from glassgpt.interop.hf_mapping import ExternalModel, Family
from glassgpt.interop.hf_models import export_hf, family_for, open_hf
from glassgpt.interop.references import export
from glassgpt.model.gpt import GPT
from glassgpt.tokenizers.builtin import BPETokenizer
from glassgpt.utils.errors import UserError
from kill_harness import fast_training

transformers: Any = pytest.importorskip("transformers", reason="parity needs transformers: pip install 'glassgpt[hf]'")
TOLERANCE = 1e-5
T = 23  # an odd length, longer than the windows of 5

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "context_length": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_embd": 32,
    "dropout": 0.1,
}
ROTARY: dict[str, Any] = {
    "position": "rope",
    "norm": "rmsnorm",
    "bias": False,
    "tied_head": False,
    "n_kv_head": 2,
    "rope_base": 500.0,
}
SWIGLU = {**ROTARY, "activation": "swiglu", "n_inner": 40}
CHAT = {"qk_norm": True, "norm_weight": False, "embedding_norm": True, "activation": "relu_squared"}
# Settings that select a family when a model is exported.
EXPORTED: list[tuple[str, dict[str, Any]]] = [
    ("GPT2", {}),
    ("GPT2", {"bias": False, "n_inner": 50, "activation": "relu", "tied_head": False, "norm_eps": 1e-3}),
    ("GPT2", {"bias": False, "norm_bias": True, "vocab_multiple": 64, "activation": "gelu"}),
    ("GPTBigCode", {"n_kv_head": 1}),
    ("GPTBigCode", {"n_kv_head": 1, "bias": False, "n_inner": 50, "tied_head": False}),
    ("Starcoder2", {"position": "rope", "n_kv_head": 2, "window": 5}),
    (
        "Starcoder2",
        {"position": "rope", "bias": False, "activation": "silu", "head_dim": 12, "tied_head": False, "norm_eps": 1e-3},
    ),
    ("Llama", SWIGLU),
    ("Llama", {**SWIGLU, "bias": True, "n_kv_head": 1, "head_dim": 12, "tied_head": True, "norm_eps": 1e-3}),
    ("GPT2", {"window": 48}),  # no text is longer than learned positions, so this is no window
    ("Mistral", {**SWIGLU, "window": 48, "vocab_multiple": 64}),  # longer texts have a window
    ("Mistral", {**SWIGLU, "window": 5}),
    ("Mistral", {**SWIGLU, "window": 5, "head_dim": 12, "tied_head": True, "n_kv_head": None}),
    # For transformers' Llama, n_head must divide n_embd.
    (
        "Mistral",
        {**SWIGLU, "n_head": 3, "n_kv_head": 1, "head_dim": 12},
    ),
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
# Configs that transformers creates; missing keys have the defaults of the family.
IMPORTED: list[tuple[str, dict[str, Any]]] = [
    ("GPT2", GPT2_SMALL),
    ("GPTBigCode", {**GPT2_SMALL, "n_inner": 56}),
    ("Starcoder2", {**HF_SMALL, "sliding_window": 5}),
    ("Llama", HF_SMALL),
    ("Mistral", {**HF_SMALL, "sliding_window": 5}),
    (
        "Ministral",
        {
            **HF_SMALL,
            "head_dim": 8,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    ("Qwen3", {**HF_SMALL, "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}),
    ("Arcee", HF_SMALL),
    ("Apertus", {**HF_SMALL, "hidden_act": "relu2"}),
    ("NanoChat", HF_SMALL),
]


@pytest.fixture(autouse=True, scope="module")
def fast() -> Iterator[None]:
    """Use one thread for the whole module, and silence the progress bars and advice of transformers."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with fast_training():
        yield


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter, including norms and biases, random values large enough to affect the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.ndim > 1 else 0.3 * noise + (1 if name.endswith("weight") else 0))


def ids(seed: int = 1, batch: int = 3) -> Tensor:
    """Return random token ids (batch, T)."""
    return torch.randint(97, (batch, T), generator=torch.Generator().manual_seed(seed))


def random_model(**settings: Any) -> GPT:
    """Return a random small model of this library."""
    model = GPT.empty(ModelConfig(**{**SMALL, **settings})).eval()
    randomize(model)
    return model


def read(path: Path) -> tuple[ExternalModel, GPT]:
    """Open a Hugging Face directory or file; return its description and the loaded model."""
    external = open_hf(path)
    model = GPT.empty(external.model_config).eval()
    external.load_model(model)
    return external, model


def load_with_transformers(path: Path, kernel: str = "sdpa") -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation=kernel).eval()


def random_hf_model(family: str, settings: dict[str, Any]) -> Any:
    """Return a random model of transformers."""
    config = transformers.AutoConfig.for_model(next(f.model_type for f in FAMILIES if f.name == family), **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomize(model)
    return model


def assert_same_logits(model: GPT, other: Any, batch: int = 3) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(ids(batch=batch)), other(ids(batch=batch)).logits, rtol=0, atol=TOLERANCE)


def assert_same_text(model: GPT, other: Any) -> None:
    """Assert that greedy generation gives the same tokens, with both KV caches and past the windows."""
    prompts = ids(2, batch=4)[:, :9]
    other.generation_config.eos_token_id = None  # do not stop at the default end token
    expected = other.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=30, do_sample=False, pad_token_id=0
    )[:, 9:]
    actual = [
        [token.token_id for token in generate(model, None, prompt, max_new_tokens=30, temperature=0)]
        for prompt in prompts.tolist()
    ]
    assert actual == expected.tolist()
    # With a tied head, a random model tends to repeat its last token.
    assert model.config.tied_head or len(expected.unique()) > 3, "texts of fewer tokens would test little"


@pytest.mark.parametrize(("family", "settings"), EXPORTED)
def test_an_exported_model_gives_the_same_logits_and_text_in_transformers(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = random_model(**settings)
    assert family_for(model.config).name == family
    assert export_hf(model, None, tmp_path / "out") == family
    other = load_with_transformers(tmp_path / "out", "eager" if settings.get("n_kv_head") == 1 else "sdpa")
    assert type(other).__name__ == next(f.architecture for f in FAMILIES if f.name == family)
    assert_same_logits(model, other)
    assert_same_text(model, other)
    external, reimported = read(tmp_path / "out")
    assert external.family.name == family
    with torch.no_grad():
        # The same bits, unless zeros were inserted for missing biases: the product is then summed in another order.
        exact = model.config.bias or model.config.norm == "rmsnorm"
        torch.testing.assert_close(reimported(ids()), model(ids()), rtol=0, atol=0 if exact else TOLERANCE)


@pytest.mark.parametrize(("family", "settings"), IMPORTED)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_transformers_is_imported_and_exported_unchanged(
    family: str, settings: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    other = random_hf_model(family, {**settings, "tie_word_embeddings": tied})
    other.save_pretrained(tmp_path / "in")
    external, model = read(tmp_path / "in")
    assert external.family.name == family
    assert_same_logits(model, other, batch=2)
    assert_same_text(model, other)
    assert export_hf(model, None, tmp_path / "out") == family
    before, after = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert open_hf(tmp_path / "out").model_config == external.model_config


def test_every_family_is_tested_in_both_directions() -> None:
    names = {family.name for family in FAMILIES}
    assert len(names) == 10
    assert {name for name, _ in EXPORTED} == {name for name, _ in IMPORTED} == names


# --- families and defaults --------------------------------------------------------------------------------------------

UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"position": "sinusoidal"}, "GPT2, lacks position = 'sinusoidal'$"),
    ({"position": "none"}, "GPT2, lacks position = 'none'$"),
    ({"logit_softcap": 30.0}, "GPT2, lacks logit_softcap = 30.0$"),
    ({"head_dim": 12}, "GPT2, lacks head_dim = 12$"),
    ({"n_kv_head": 2}, "GPT2, lacks n_kv_head = 2$"),
    ({**SWIGLU, "window": 5, "window_globals": 2}, "Mistral, lacks window_globals = 2$"),
    ({**SWIGLU, "window": 5, "bias": True}, r"Llama, lacks window = 5$"),
    ({**SWIGLU, "qk_norm": True, "bias": True}, "lacks qk_norm = True$"),
    ({**SWIGLU, "embedding_norm": True}, "Llama, lacks embedding_norm = True$"),
    ({**ROTARY, "activation": "relu", "window": 5}, "Starcoder2, lacks norm = 'rmsnorm'$"),
    ({**SWIGLU, "norm": "layernorm"}, "Starcoder2, lacks activation = 'swiglu'$"),
    ({"activation": "swiglu"}, "GPT2, lacks activation = 'swiglu'$"),
    ({**ROTARY, **CHAT, "bias": True}, "NanoChat, lacks bias = True$"),
]


@pytest.mark.parametrize(("settings", "message"), UNSUPPORTED)
def test_the_error_names_settings_that_no_family_supports(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        family_for(ModelConfig(**{**SMALL, **settings}))
    with pytest.raises(UserError, match=message):
        export_hf(random_model(**settings), None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def family(name: str) -> Any:
    """Return a family by its name."""
    return next(f for f in FAMILIES if f.name == name)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_defaults_belong_to_keys_and_fixed_settings_have_none(family: Family) -> None:
    """A fixed setting is in the spelling of `ModelConfig`; a default is in that of transformers."""
    assert family.defaults.keys() <= family.keys.keys()
    assert not family.fixed.keys() & family.keys.keys()
    ModelConfig(**{**family.fixed, "vocab_size": 97})
    activation = family.defaults.get("activation")
    assert activation is None or activation in transformers.activations.ACT2FN


@pytest.mark.parametrize("name", [f.name for f in FAMILIES])
def test_missing_keys_have_the_defaults_of_transformers(name: str) -> None:
    # Apertus' default activation and rotary scaling are not supported, so these two keys are set.
    config = {"hidden_act": "silu", "rope_parameters": {"rope_type": "default"}} if name == "Apertus" else {}
    full_config = json.loads(
        transformers.AutoConfig.for_model(family(name).model_type, **config).to_json_string(use_diff=False)
    )
    assert family(name).read_config(config) == family(name).read_config(full_config)


def test_the_defaults_are_those_of_published_models() -> None:
    assert family("GPT2").read_config({}) == ModelConfig(vocab_size=50257, dropout=0.1)
    mistral = family("Mistral").read_config({})
    assert (mistral.window, mistral.n_kv_head, mistral.context_length, mistral.n_inner) == (4096, 8, 131072, 14336)


def test_old_and_new_forms_of_rotary_settings_are_read() -> None:
    read = family("Llama").read_config
    for config in (
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None, "rope_parameters": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4},
        {"rope_scaling": {"type": "default", "rope_theta": 5e5}},
        {"rope_theta": 500000, "rope_scaling": {"rope_type": "default"}, "partial_rotary_factor": 1.0},
    ):
        assert read(config).rope_base == 5e5
        assert transformers.LlamaConfig(**json.loads(json.dumps(config))).rope_parameters["rope_theta"] == 5e5
    assert read({}).rope_base == 10000.0


@pytest.mark.parametrize("name", [f.name for f in FAMILIES if f.rope_theta])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_a_missing_rotary_base_has_the_default_of_transformers(name: str, key: str) -> None:
    """The default is 10,000 for all families except Apertus, which has 12,000,000."""
    config = {key: {"rope_type": "default"}} | ({"hidden_act": "silu"} if name == "Apertus" else {})
    expected = transformers.AutoConfig.for_model(
        family(name).model_type, **json.loads(json.dumps(config))
    ).rope_parameters["rope_theta"]
    assert family(name).read_config(config).rope_base == expected


# Additional keys of published config.json files, as far as known; none of them changes logits.
_LLAMA_2 = {
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "pretraining_tp": 1,
    "torch_dtype": "float16",
    "bos_token_id": 1,
    "use_cache": True,
}
_GPT_2 = {
    "n_ctx": 1024,
    "summary_type": "cls_index",
    "summary_activation": None,
    "task_specific_params": {"text-generation": {"max_length": 50}},
}
PUBLISHED_CONFIGS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("gpt2", "GPT2", _GPT_2, {}),
    ("distilgpt2", "GPT2", {**_GPT_2, "n_layer": 6, "_num_labels": 1, "id2label": {"0": "LABEL_0"}}, {"n_layer": 6}),
    (
        "gpt2-medium",
        "GPT2",
        {**_GPT_2, "n_embd": 1024, "n_head": 16, "n_special": 0, "predict_special_tokens": True},
        {"n_embd": 1024},
    ),
    ("gpt2-xl", "GPT2", {**_GPT_2, "n_embd": 1600, "n_head": 25, "n_layer": 48, "output_past": True}, {"n_head": 25}),
    ("Llama 2", "Llama", _LLAMA_2, {"norm_eps": 1e-5, "rope_base": 1e4}),
    (
        "Llama 3",
        "Llama",
        {**_LLAMA_2, "rope_theta": 5e5, "num_key_value_heads": 8, "mlp_bias": False},
        {"n_kv_head": 8, "rope_base": 5e5},
    ),
    (
        "SmolLM2",
        "Llama",
        {**_LLAMA_2, "is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"a": 1}},
        {},
    ),
    (
        "of another maker",
        "Llama",
        {**_LLAMA_2, "max_sequence_length": 2048, "unsloth_version": "2024.9", "unsloth_fixed": True},
        {},
    ),
    (
        "Mistral 7B v0.1",
        "Mistral",
        {"max_position_embeddings": 32768, "sliding_window": 4096, "rope_theta": 1e4},
        {"window": 4096},
    ),
    (
        "Mistral 7B v0.3",
        "Mistral",
        {"sliding_window": None, "rope_theta": 1e6, "vocab_size": 32768},
        {"window": None, "rope_base": 1e6},
    ),
    (
        "Qwen3",
        "Qwen3",
        {"sliding_window": None, "use_sliding_window": False, "rope_theta": 1000000},
        {"qk_norm": True, "window": None},
    ),
    (
        "StarCoder2",
        "Starcoder2",
        {
            "mlp_type": "default",
            "norm_type": "layer_norm",
            "activation_function": "gelu",
            "layer_norm_epsilon": 1e-5,
            "rms_norm_eps": 1e-6,
        },
        {"activation": "gelu_tanh", "norm": "layernorm", "norm_eps": 1e-5},
    ),
    (
        "StarCoder",
        "GPTBigCode",
        {"validate_runner_input": True, "pad_key_length": True, "inference_runner": 0},
        {"n_kv_head": 1},
    ),
]


@pytest.mark.parametrize(
    ("model", "name", "config", "expected"), PUBLISHED_CONFIGS, ids=[model for model, *_ in PUBLISHED_CONFIGS]
)
def test_published_configs_are_read(model: str, name: str, config: dict[str, Any], expected: dict[str, Any]) -> None:
    shape = family(name).read_config({"model_type": family(name).model_type, **config})
    assert {key: getattr(shape, key) for key in expected} == expected


def test_windows_are_read_per_layer() -> None:
    def windows(name: str, **config: Any) -> list[int | None]:
        result: list[int | None] = (
            family(name).read_config({"num_hidden_layers": 4, "max_position_embeddings": 64, **config}).windows
        )
        return result

    full, sliding = "full_attention", "sliding_attention"
    assert windows("Mistral", sliding_window=8) == [8] * 4
    for length in (64, 65, None):  # a window at least as long as the context matters for longer texts
        assert windows("Mistral", sliding_window=length) == [length] * 4
    assert windows("Starcoder2") == windows("Qwen3") == windows("Llama") == [None] * 4
    assert windows("Qwen3", sliding_window=8) == [None] * 4
    assert windows("Qwen3", sliding_window=8, use_sliding_window=True, max_window_layers=3) == [None, None, None, 8]
    assert windows("Qwen3", sliding_window=8, use_sliding_window=True, layer_types=[full, sliding] * 2) == [None, 8] * 2
    assert windows("Ministral", sliding_window=8) == [8] * 4
    assert windows("Ministral", sliding_window=8, layer_types=[full] * 4) == [None] * 4
    assert windows("Ministral", sliding_window=8, layer_types=[sliding, sliding, full, sliding]) == [8, 8, None, 8]


# --- refused settings -------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("GPT2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ("GPT2", {"scale_attn_weights": False}, "scale_attn_weights = False"),
    ("GPT2", {"add_cross_attention": True}, "add_cross_attention = True"),
    ("GPT2", {"is_encoder_decoder": True}, "is_encoder_decoder = True"),
    ("GPT2", {"pruned_heads": {"0": [1]}}, "pruned_heads = "),
    ("GPT2", {"activation_function": "mish"}, "activation_function = 'mish'"),
    ("GPT2", {"rope_theta": 1e4}, "rope_theta = 10000.0"),
    ("GPT2", {"n_head": 5}, r"model\.n_head"),
    ("GPT2", {"n_layer": "12"}, r"model\.n_layer must be a whole number, got '12'"),
    ("GPT2", {"vocab_size": None}, "vocab_size = None"),
    ("GPTBigCode", {"multi_query": False}, "multi_query = False"),
    ("Starcoder2", {"sliding_window": "8"}, "sliding_window = '8'"),
    ("Starcoder2", {"norm_type": "rms_norm"}, "norm_type = 'rms_norm'"),
    ("Qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": "a"}, "max_window_layers = 'a'"),
    ("Qwen3", {"layer_types": 5}, "layer_types = 5"),
    ("Llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling\.type = 'linear'"),
    ("Llama", {"rope_scaling": {"factor": 2.0}}, r"rope_scaling\.factor = 2.0"),
    ("Llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"rope_parameters\.rope_type = 'yarn'"),
    ("Llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, r"rope_parameters\.partial_rotary_factor = 0.5"),
    ("Llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, r"rope_parameters\.full_attention = "),
    ("Llama", {"rope_scaling": {"factor": 8.0, "rope_type": "llama3"}}, r"rope_scaling\.rope_type = 'llama3'"),
    ("Llama", {"rope_parameters": 5}, "rope_parameters = 5"),
    ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ("Llama", {"attention_bias": True}, "attention_bias = True and mlp_bias = False differ"),
    ("Llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("Llama", {"quantization_config": {"bits": 4}}, "quantization_config = "),
    ("Llama", {"is_causal": False}, "is_causal = False"),
    ("Llama", {"is_causal": None}, "is_causal = None"),
    ("Llama", {"rope_theta": 0}, "got 0"),
    ("Llama", {"rope_theta": False}, "got False"),
    ("Llama", {"rope_parameters": {"rope_theta": False}}, "got False"),
    ("Llama", {"rope_parameters": {"rope_type": None}}, r"rope_parameters\.rope_type = None"),
    ("Ministral", {"layer_types": []}, "layer_types has 0 entries"),
    ("Llama", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map = "),
    ("Llama", {"embedding_multiplier": 12.0}, "embedding_multiplier = 12.0"),
    ("Llama", {"sliding_window": 8}, "sliding_window = 8"),
    ("Llama", {"head_dim": 7}, "even head width, got 7"),
    ("Mistral", {"attention_bias": True}, "attention_bias = True"),
    ("Mistral", {"layer_types": ["full_attention"] * 32}, "layer_types = "),
    ("Ministral", {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
    ("Ministral", {"layer_types": ["linear_attention"] * 32}, "layer_types = "),
    ("Qwen3", {"attention_bias": True}, "attention_bias = True"),
    ("Qwen3", {"layer_types": ["sliding_attention"] * 32}, "layer_types = "),  # use_sliding_window is not set
    ("Arcee", {"hidden_act": "xielu"}, "hidden_act = 'xielu'"),
    ("Apertus", {"hidden_act": "silu"}, r"rope_parameters\.rope_type = 'llama3'"),
    ("Apertus", {"rope_parameters": {"rope_type": "default"}}, "hidden_act = 'xielu'"),
    ("NanoChat", {"attention_bias": True}, "attention_bias = True"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_the_error_names_an_unsupported_setting(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": family(name).model_type, **changes}))
    (folder / "model.safetensors").touch()
    with pytest.raises(UserError, match=message) as error:
        open_hf(folder)
    assert str(folder / "config.json") in str(error.value)
    assert "\n" not in str(error.value)


# --- forms of files ---------------------------------------------------------------------------------------------------


def save_hf_model(folder: Path, name: str = "GPT2", settings: dict[str, Any] | None = None, **options: Any) -> Any:
    """Save a random small model of transformers in a directory, and return the model."""
    other = random_hf_model(
        name, (GPT2_SMALL if name.startswith("GPT") else HF_SMALL) if settings is None else settings
    )
    other.save_pretrained(folder, **options)
    return other


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Replace the tensors of a directory by `change` of them."""
    path = folder / "model.safetensors"
    safetensors.torch.save_file(
        change({name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}), path
    )


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
@pytest.mark.parametrize(
    "form",
    ["shards", "bin", "bin shards", "no prefix", "buffers", "untied head in a tied model", "file without directory"],
)
def test_every_form_of_files_is_read(name: str, form: str, tmp_path: Path) -> None:
    settings = {
        **(GPT2_SMALL if name == "GPT2" else HF_SMALL),
        "tie_word_embeddings": form == "untied head in a tied model",
    }
    folder, prefix = tmp_path / "model", {"GPT2": "transformer.", "Llama": "model."}[name]
    other = save_hf_model(folder, name, settings, max_shard_size="20KB" if form == "shards" else "5GB")
    path = folder
    if form == "shards":
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    elif form.startswith("bin"):
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        if form == "bin":
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            names = sorted(tensors)
            for part in (0, 1):
                torch.save({name: tensors[name] for name in names[part::2]}, folder / f"part{part}.bin")
            index = {"weight_map": {name: f"part{i % 2}.bin" for i, name in enumerate(names)}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    elif form == "no prefix":
        rewrite(folder, lambda tensors: {name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    elif form == "buffers":
        # transformers 2 to 4 saved these buffers.
        gpt2 = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 48, 48) for i in range(3)} | {
            f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)
        }
        llama = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
        rewrite(folder, lambda tensors: tensors | (gpt2 if name == "GPT2" else llama))
    elif form == "untied head in a tied model":
        embedding = f"{prefix}{'wte' if name == 'GPT2' else 'embed_tokens'}.weight"
        rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors[embedding].clone()})
    else:
        path = folder / "model.safetensors"
    external, model = read(path)
    assert external.family.name == name
    assert_same_logits(model, other)


def test_half_precision_files_are_widened_exactly(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        random_hf_model("Llama", HF_SMALL).to(dtype).save_pretrained(folder)
        assert safetensors.torch.load_file(folder / "model.safetensors")["lm_head.weight"].dtype == dtype
        _, model = read(folder)
        other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert model.embedding.weight.dtype == torch.float32
        assert torch.equal(model.embedding.weight, other.model.embed_tokens.weight)
        assert_same_logits(model, other)


def test_a_config_with_only_non_default_keys_is_read(tmp_path: Path) -> None:
    """transformers 4 wrote such configs, with its own names of rotary settings."""
    other = save_hf_model(tmp_path, "Llama")
    shape = {key: value for key, value in HF_SMALL.items() if key != "rope_parameters"}
    old = {
        "model_type": "llama",
        **shape,
        "rope_theta": 700.0,
        "rope_scaling": None,
        "torch_dtype": "float32",
        "_name_or_path": "x",
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert_same_logits(read(tmp_path)[1], other)


PUBLISHED = [(12, 768, 124_439_808), (24, 1024, 354_823_168), (36, 1280, 774_030_080), (48, 1600, 1_557_611_200)]


@pytest.mark.parametrize(("n_layer", "n_embd", "parameters"), PUBLISHED)
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_published_gpt2_is_recognised_by_its_shapes(
    n_layer: int, n_embd: int, parameters: int, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.GPT2Config(n_layer=n_layer, n_embd=n_embd, n_head=n_embd // 64)
    with torch.device("meta"):
        tensors = {f"{prefix}{name}": tensor for name, tensor in transformers.GPT2Model(config).state_dict().items()}
    # The real files have 0.5 to 6 GB.
    monkeypatch.setattr("glassgpt.interop.hf_models.read_tensors", lambda path: tensors)
    (tmp_path / "any.safetensors").touch()
    external = open_hf(tmp_path / "any.safetensors")
    assert external.model_config == ModelConfig(
        vocab_size=50257, n_layer=n_layer, n_embd=n_embd, n_head=n_embd // 64, dropout=0.1
    )
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(external.model_config).parameters()) == parameters


def test_the_error_names_a_wrong_tensor_and_no_parameter_changes(tmp_path: Path) -> None:
    save_hf_model(tmp_path / "good", "Mistral", {**HF_SMALL, "sliding_window": 5})
    q, bias, norm = (
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "model.norm.weight",
    )
    wrong: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
        f"'{norm}' .* is missing": lambda t: {name: tensor for name, tensor in t.items() if name != norm},
        f"1 tensors .* '{bias}'": lambda t: t | {bias: torch.zeros(32)},
        rf"'{q}' is .*\(32, 31\)": lambda t: t | {q: t[q][:, :31].contiguous()},
        f"'{q}' is torch.int8": lambda t: t | {q: t[q].to(torch.int8)},
        "'lm_head.weight' .* is missing": lambda t: {
            name: tensor for name, tensor in t.items() if name != "lm_head.weight"
        },
    }
    for message, change in wrong.items():
        folder = Path(shutil.copytree(tmp_path / "good", tmp_path / "bad", dirs_exist_ok=True))
        rewrite(folder, change)
        model = GPT.create(open_hf(folder).model_config, seed=0)
        before = [parameter.clone() for parameter in model.parameters()]
        with pytest.raises(UserError, match=message) as error:
            open_hf(folder).load_model(model)
        assert str(folder) in str(error.value)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    folder = tmp_path / "tied"
    save_hf_model(folder, "GPT2")
    rewrite(folder, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1})
    with pytest.raises(UserError, match=r"lm_head.weight differs from transformer.wte.weight"):
        read(folder)


def test_damaged_directories_give_errors_of_one_line(tmp_path: Path) -> None:
    save_hf_model(tmp_path / "good", "GPT2")
    save_hf_model(tmp_path / "shards", "GPT2", max_shard_size="20KB")
    shard = sorted((tmp_path / "shards").glob("model-*"))[1]

    def copy(change: Callable[[Path], object], source: str = "good") -> Path:
        folder = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        change(Path(shutil.copytree(tmp_path / source, folder)))
        return folder

    def write(name: str, content: str | bytes) -> Callable[[Path], object]:
        return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    weights = (tmp_path / "good" / "model.safetensors").read_bytes()

    def only_bin(content: bytes) -> Callable[[Path], object]:
        return lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin").write_bytes(content)

    (tmp_path / "lonely").mkdir()
    shutil.copy(tmp_path / "good" / "model.safetensors", tmp_path / "lonely")
    index = "model.safetensors.index.json"
    cases: list[tuple[Path, str]] = [
        (tmp_path / "lonely", "has no config.json"),
        (tmp_path / "lonely" / "model.safetensors", "needs its config.json"),
        (copy(write("config.json", "{")), "config.json is (damaged|not valid)"),
        (copy(write("config.json", b"\xff")), "config.json is (damaged|not valid)"),
        (copy(write("config.json", "[1]")), "config.json is (damaged|not valid)"),
        (copy(write("config.json", "{}")), "config.json: model_type .* gpt2, "),
        (copy(write("config.json", '{"model_type": "lama"}')), "model_type 'lama' .*did you mean 'llama'.* gpt2, "),
        (copy(lambda folder: (folder / "model.safetensors").unlink()), "has no weights"),
        (copy(write("model.safetensors", weights[:-7])), "model.safetensors cannot be read as safetensors"),
        (copy(write("model.safetensors", weights[:100])), "model.safetensors cannot be read as safetensors"),
        (copy(write("model.safetensors", "")), "model.safetensors cannot be read as safetensors"),
        (copy(lambda folder: (folder / shard.name).unlink(), "shards"), f"{shard.name} is missing"),
        (copy(write(index, "{"), "shards"), "index.json is (damaged|not valid)"),
        (copy(write(index, "{}"), "shards"), "index.json is damaged: .*weight_map"),
        (
            copy(write(index, '{"weight_map": {"a": "../model.safetensors"}}'), "shards"),
            "index.json is damaged: .*weight_map",
        ),
        (copy(only_bin(b"")), "pytorch_model.bin is empty"),
        (copy(only_bin(b"PK\x03\x04 no zip")), "pytorch_model.bin is damaged"),
        (
            copy(only_bin(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00echo\x85R.")),
            "pytorch_model.bin is refused.*os.system",
        ),
    ]
    for path, message in cases:
        with pytest.raises(UserError, match=message) as error:
            read(path)
        assert "\n" not in str(error.value), str(error.value)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def small_bpe() -> BPETokenizer:
    """Return a byte-level BPE tokenizer with three merges and an end of text."""
    symbols = [*range(33, 127), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144)]
    vocab = {chr(symbol): i for i, symbol in enumerate(symbols)}
    vocab |= {"th": 256, "the": 257, "Ġthe": 258, "<|endoftext|>": 259}
    return BPETokenizer.from_merges(vocab, ["t h", "th e", "Ġ the"])


TEXT = "the fox and the naïve 狐狸,\n  then the end"


def test_an_exported_directory_contains_model_tokenizer_and_special_tokens(tmp_path: Path) -> None:
    tokenizer = small_bpe()
    model = random_model(vocab_size=260, vocab_multiple=128)
    export_hf(model, tokenizer, tmp_path / "out")
    other, encode = (
        load_with_transformers(tmp_path / "out"),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    assert encode(TEXT)["input_ids"] == tokenizer.encode(TEXT).tolist()
    assert (
        encode.eos_token_id
        == other.config.eos_token_id
        == other.generation_config.eos_token_id
        == tokenizer.end_of_text
        == 259
    )
    assert other.config.bos_token_id == 259
    assert other.config.pad_token_id is None
    assert other.dtype == torch.float32
    weights = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert weights["transformer.wte.weight"].shape == (260, 32)
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    exported_tokenizer = open_hf(tmp_path / "out").tokenizer
    assert exported_tokenizer is not None
    assert exported_tokenizer.to_json() == tokenizer.to_json()
    with pytest.raises(UserError, match="is not empty"):
        export_hf(model, tokenizer, tmp_path / "out")


def test_the_start_token_of_an_exported_model_is_that_of_its_tokenizer(tmp_path: Path) -> None:
    """If the tokenizer puts <s> before texts, like Llama's, the config and the tokenizer's files name <s> too."""
    content = json.loads(small_bpe().to_json())
    start = {**content["added_tokens"][0], "id": 260, "content": "<s>"}
    content["added_tokens"].append(start)
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": [260], "tokens": ["<s>"]}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single * 2,
        "special_tokens": special,
    }
    tokenizer = BPETokenizer(json.dumps(content))
    assert tokenizer.prompt_prefix == (260,)
    export_hf(random_model(vocab_size=261), tokenizer, tmp_path / "out")
    other, encode = (
        load_with_transformers(tmp_path / "out"),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    assert encode.bos_token_id == other.config.bos_token_id == other.generation_config.bos_token_id == 260
    assert (
        encode.eos_token_id
        == other.config.eos_token_id
        == other.generation_config.pad_token_id
        == tokenizer.end_of_text
        == 259
    )


def test_an_export_without_tokenizer_has_no_end_of_text(tmp_path: Path) -> None:
    export_hf(random_model(**SWIGLU), None, tmp_path / "out")
    other = load_with_transformers(tmp_path / "out")
    assert other.config.bos_token_id is other.config.eos_token_id is other.generation_config.eos_token_id is None
    assert open_hf(tmp_path / "out").tokenizer is None


def test_a_half_precision_model_is_written_in_float32(tmp_path: Path) -> None:
    model = random_model(**SWIGLU).to(torch.bfloat16)
    export_hf(model, None, tmp_path / "out")
    _, reimported = read(tmp_path / "out")
    assert all(torch.equal(a.float(), b) for a, b in zip(model.parameters(), reimported.parameters(), strict=True))


# Rounding a number changes it by at most 2^-8 of itself in bfloat16, and 2^-11 in float16, above its smallest numbers.
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_an_export_in_half_precision_has_the_rounded_weights(dtype: str, tolerance: float, tmp_path: Path) -> None:
    for name, settings in (("GPT2", {"bias": False}), ("Mistral", {**SWIGLU, "window": 5})):
        model, out = random_model(**settings), tmp_path / name
        assert export_hf(model, None, out, dtype) == name
        assert json.loads((out / "config.json").read_text())["dtype"] == dtype
        other = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        assert other.dtype == getattr(torch, dtype)
        _, reimported = read(out)
        shared = dict(reimported.named_parameters())
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(shared[key], parameter, rtol=tolerance, atol=2**-25)
        assert_same_logits(reimported, other.float().eval())
    with torch.no_grad():
        model.get_parameter("norm.weight")[3] = 1e6
    with pytest.raises(UserError, match=r"norm\.weight"):
        export_hf(model, None, tmp_path / "large", "float16")
    with pytest.raises(UserError, match="'int4'"):
        export_hf(model, None, tmp_path / "other", "int4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["GPT2", "Mistral"]


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_the_chat_template_of_a_hugging_face_model_is_exported(place: str, tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message['content'] }}the{% endfor %}"
    export_hf(random_model(vocab_size=260), small_bpe(), tmp_path / "in")
    if place == "chat_template.jinja":
        (tmp_path / "in" / place).write_text(template)
    else:
        settings = json.loads((tmp_path / "in" / place).read_text())
        (tmp_path / "in" / place).write_text(json.dumps({**settings, "chat_template": template}))
    export(tmp_path / "in", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "fox"}], tokenize=False) == "foxthe"
    assert tokenizer.unk_token == tokenizer.eos_token == "<|endoftext|>"


@pytest.mark.parametrize(
    "settings", [{}, {"n_kv_head": 1}, {**SWIGLU, "window": 5}], ids=["GPT2", "BigCode", "Mistral"]
)
def test_ctranslate2_converts_an_export_and_generates_the_same_text(settings: dict[str, Any], tmp_path: Path) -> None:
    reason = "CTranslate2 is not installed: pip install ctranslate2"
    ctranslate2: Any = pytest.importorskip("ctranslate2", reason=reason)
    converters: Any = pytest.importorskip("ctranslate2.converters", reason=reason)
    model = random_model(vocab_size=260, **settings)
    export_hf(model, small_bpe(), tmp_path / "out")
    converters.TransformersConverter(str(tmp_path / "out")).convert(str(tmp_path / "converted"))
    start = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").convert_ids_to_tokens([1, 2, 3])
    options = {"max_length": 12, "sampling_topk": 1, "include_prompt_in_result": False, "end_token": []}
    results = ctranslate2.Generator(str(tmp_path / "converted"), device="cpu").generate_batch([start], **options)
    expected = [token.token_id for token in generate(model, None, [1, 2, 3], max_new_tokens=12, temperature=0)]
    assert results[0].sequences_ids[0] == expected


def test_vocab_json_and_merges_txt_of_an_old_tokenizer_are_read(tmp_path: Path) -> None:
    save_hf_model(tmp_path, "GPT2")
    content = json.loads(small_bpe().to_json())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(content["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ the\n", encoding="utf-8")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        tokenizer = open_hf(path).tokenizer
        assert tokenizer is not None
        assert tokenizer.encode(TEXT).tolist() == small_bpe().encode(TEXT).tolist()
        assert tokenizer.end_of_text == 259
    one_id = json.dumps({**content["vocab"], "th": 0})
    for damaged in ("{}", "5", "null", "[]", "[[]]", '"a"', '{"a": 1000000000000}', '{"a": -1}', one_id, "[" * 5000):
        (tmp_path / "vocab.json").write_text(damaged)
        with pytest.raises(UserError, match=r"vocab\.json"):
            _ = open_hf(tmp_path).tokenizer
    (tmp_path / "vocab.json").unlink()
    assert open_hf(tmp_path).tokenizer is None


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_exported(name: str) -> None:
    is_modern = name in ("demo", "induction", "speedrun", "shakespeare-best", "gpt2-speedrun")
    assert family_for(recipe(name, model={"vocab_size": 100}).model).name == ("Qwen3" if is_modern else "GPT2")
