"""Checkpoints of nanoGPT (`ckpt.pt`) and build-nanogpt (`model_19072.pt`), read as tensors and plain values only."""

import dataclasses
from functools import partial
from pathlib import Path

from torch import Tensor

from glassgpt.interop.hf_families import GPT2_TENSORS
from glassgpt.interop.hf_mapping import ExternalModel, Family
from glassgpt.tokenizers.builtin import Tokenizer, gpt2_tokenizer, load_tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.safe_pickle import read_pickle

GPT2_VOCAB_SIZE = 50257
_SETTINGS = (int, float, str, type(None))  # bool is an int
# Both have ModelConfig's defaults, and the tensor names of GPT-2's first files, with weights as nn.Linear stores them.
_BUILD_NANOGPT = Family(
    name="build-nanogpt", prefix="transformer.", layers="h", defaults={"vocab_size": GPT2_VOCAB_SIZE},
    keys={
        "vocab_size": "vocab_size", "context_length": "block_size", "n_layer": "n_layer", "n_head": "n_head",
        "n_embd": "n_embd",
    },
    tensors=GPT2_TENSORS, buffers=r"h\.\d+\.attn\.bias",
)  # fmt: skip
_NANOGPT = dataclasses.replace(
    _BUILD_NANOGPT,
    name="nanoGPT",
    fixed={"activation": "gelu"},  # the exact form, unlike GPT-2
    defaults={"vocab_size": 50304},
    keys={**_BUILD_NANOGPT.keys, "bias": "bias", "dropout": "dropout"},
)


class _PickledConfig:
    """Replaces build-nanogpt's `GPTConfig`, which its checkpoints hold pickled: attributes without code."""


def _tokenizer_of(path: Path, vocab_size: int | None) -> Tokenizer | None:
    """The tokenizer.json in the same folder, or GPT-2's for a vocabulary of its size, or None."""
    # nanoGPT's character models keep their characters in another pickle; `glassgpt prepare` on the text restores it.
    if (path.parent / "tokenizer.json").is_file():
        return load_tokenizer(path.parent / "tokenizer.json")
    return gpt2_tokenizer() if vocab_size == GPT2_VOCAB_SIZE else None


def open_nanogpt(path: Path) -> ExternalModel:
    """Read a `.pt` file of nanoGPT or build-nanogpt. Raises `UserError` with the reason for any other file."""
    modules = ("__main__", "train_gpt2", "model")
    content = read_pickle(path, [(_PickledConfig, f"{module}.GPTConfig") for module in modules])
    content = content if isinstance(content, dict) else {}
    weights, config, arguments = content.get("model"), content.get("config"), content.get("model_args")
    tensors: dict[str, Tensor] = weights if isinstance(weights, dict) else {}
    if not tensors or not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()):
        raise UserError(f"{path} is not a checkpoint of nanoGPT or build-nanogpt: 'model' must hold tensors by name")
    if isinstance(config, _PickledConfig):
        family, settings, step, loss = _BUILD_NANOGPT, vars(config), content.get("step"), content.get("val_loss")
    elif isinstance(arguments, dict):
        family, settings, step, loss = _NANOGPT, arguments, content.get("iter_num"), content.get("best_val_loss")
    else:
        raise UserError(f"{path} has neither nanoGPT's 'model_args' nor build-nanogpt's 'config'; both name the shape")
    if wrong := [key for key, value in settings.items() if not isinstance(value, _SETTINGS)]:
        raise UserError(f"cannot use {path}: the setting {wrong[0]!r} is neither a number nor text")
    try:
        shape = family.read_config(settings)
        if shape.vocab_size == 50304:  # in both projects GPT-2's 50,257 tokens and padding
            shape = dataclasses.replace(shape, vocab_size=GPT2_VOCAB_SIZE, vocab_multiple=128)
        loss_text = "unknown" if loss is None else f"{float(loss):.4f} nats per token, by its own estimate"
    except (UserError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # such as text for a number
        raise UserError(f"cannot use {path}: {error}") from None
    facts = (
        ("checkpoint", f"{path} ({family.name})"),
        ("step", f"{step:,}" if isinstance(step, int) else "unknown"),
        ("validation loss", loss_text),
    )
    return ExternalModel(path, family, shape, facts, lambda: tensors, partial(_tokenizer_of, path, shape.vocab_size))
