"""Every attribute that transformers reads from a config, with odd values: refused, or the logits are transformers'.

The attributes of a family are recorded while transformers builds and runs a model. Texts are longer than the positions
of rotary models, so windows and limits matter. If transformers itself refuses a value, it must change nothing here.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import glassgpt as g
from glassgpt.interop.hf_families import FAMILIES
from glassgpt.interop.hf_mapping import Family
from glassgpt.utils.errors import UserError
from kill_harness import fast_training

transformers: Any = pytest.importorskip("transformers", reason="parity needs transformers: pip install 'glassgpt[hf]'")

ROTARY = {
    "vocab_size": 97, "max_position_embeddings": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 56,
    "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
}  # fmt: skip
LEARNED = {"vocab_size": 97, "n_positions": 48, "n_layer": 3, "n_head": 4, "n_embd": 32}
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
MORE: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 5},
    "Starcoder2": {"sliding_window": 5},
    "Ministral": {"sliding_window": 5, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "Qwen3": {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1, "head_dim": 8},
    "Apertus": {"hidden_act": "silu"},
}
MORE["Ministral"]["num_hidden_layers"] = 4
VALUES: tuple[Any, ...] = (None, 0, False, True, 2, -1, "", [], {}, 1e30, math.nan, "2", 0.5, 1000)
HOLDERS = ("rope_parameters", "rope_scaling")
INSIDE = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "attention_factor")
# Keys of one family that others must not take for settings without a meaning.
COMMON = {
    "is_causal", "rope_theta", "rope_scaling", "partial_rotary_factor", "layer_types", "sliding_window", "head_dim",
    "attention_bias", "mlp_bias", "final_logit_softcapping", "attn_logit_softcapping", "scale_attn_weights",
    "use_sliding_window", "num_key_value_heads", "tie_word_embeddings",
    *(f"{holder}.{key}" for holder in HOLDERS for key in INSIDE),
}  # fmt: skip
IDS = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True, scope="module")
def fast() -> Iterator[None]:
    """Use one thread, and silence transformers, which reports every odd value."""
    transformers.utils.logging.set_verbosity(60)
    transformers.utils.logging.disable_progress_bar()
    with fast_training():
        yield


@torch.no_grad()
def their_logits(folder: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    logits: Tensor = model(IDS).logits
    return logits


@torch.no_grad()
def our_logits(folder: Path) -> Tensor:
    logits: Tensor = g.load(folder)[0](IDS)
    return logits


def save_model(family: Family, folder: Path) -> set[str]:
    """Save a random model of the family; return the attributes of its config that transformers reads."""
    shape = {**(ROTARY if family.rope_theta else LEARNED), **NO_IDS, **MORE.get(family.name, {})}
    config = transformers.AutoConfig.for_model(family.model_type, **json.loads(json.dumps(shape)))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scaled = 0.2 * noise if parameter.ndim > 1 else 0.3 * noise + float(name.endswith("weight"))
            parameter.copy_(scaled)
    model.save_pretrained(folder)
    read: set[str] = set()

    class Recorded(type(config)):  # type: ignore[misc]
        def __getattribute__(self, key: str) -> Any:
            read.add(key)
            return super().__getattribute__(key)

    plain, config.__class__ = type(config), Recorded
    type(model)._from_config(config)(IDS)
    methods = {
        key for key in read if callable(getattr(plain, key, None)) or isinstance(getattr(plain, key, 0), property)
    }
    stored = set(json.loads((folder / "config.json").read_text()))
    attributes = {key for key in read if not key.startswith("_")} - methods | stored
    return attributes - {"model_type", "name_or_path", "base_config_key", "sub_configs", "attribute_map"}


def with_value(config: dict[str, Any], attribute: str, value: Any) -> dict[str, Any]:
    """Return a config with another value of an attribute, such as `head_dim` or `rope_scaling.factor`."""
    holder, _, key = attribute.rpartition(".")
    if not holder:
        return {**config, key: value}
    inside = {**config.get("rope_parameters", {}), key: value}
    return {**{k: v for k, v in config.items() if k != "rope_parameters"}, holder: inside}


def disagreements(folder: Path, attributes: set[str], values: Sequence[Any] = VALUES) -> list[str]:
    """Return each attribute with a value that is neither refused nor read as transformers reads it."""
    path = folder / "config.json"
    config, expected, wrong = json.loads(path.read_text()), our_logits(folder), []
    torch.testing.assert_close(expected, their_logits(folder), rtol=0, atol=1e-5)
    for attribute in sorted(attributes):
        for value in values:
            if attribute.endswith(("_eps", "_epsilon", "_softcapping")) and type(value) is int:
                continue  # transformers refuses a whole number here
            path.write_text(json.dumps(with_value(config, attribute, value)))
            try:
                actual = our_logits(folder)
            except UserError:
                continue
            try:
                theirs = their_logits(folder)
            except Exception:  # transformers has no type of its own
                theirs = expected
            if actual.shape != theirs.shape or not bool((actual - theirs).abs().max() < 1e-5):
                wrong.append(f"{attribute} = {value!r}")
    path.write_text(json.dumps(config))
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_attribute_of_a_config_is_read_as_transformers_does_or_refused(family: Family, tmp_path: Path) -> None:
    attributes = save_model(family, tmp_path) | COMMON
    assert len(attributes) > 50
    assert disagreements(tmp_path, attributes) == []


FEW = {
    "GPT2": {"is_causal", "num_hidden_layers", "scale_attn_weights"},
    "Mistral": {"is_causal", "rope_theta", "rope_parameters.rope_theta", "sliding_window", "max_position_embeddings"},
}


@pytest.mark.parametrize("name", FEW)
def test_the_attributes_that_were_once_misread(name: str, tmp_path: Path) -> None:
    assert save_model(next(f for f in FAMILIES if f.name == name), tmp_path) >= {"vocab_size"}
    assert disagreements(tmp_path, FEW[name], (None, 0, 2)) == []
