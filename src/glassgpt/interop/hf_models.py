"""Read and write model directories and files of Hugging Face's transformers. `hf_mapping` translates their contents."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glassgpt.config.model import ModelConfig
from glassgpt.interop.hf_families import FAMILIES
from glassgpt.interop.hf_mapping import ExternalModel, Family, plain_names
from glassgpt.model.gpt import GPT
from glassgpt.runs.checkpoint import read_tensors, write_tensors
from glassgpt.tokenizers.builtin import TOKENIZER_CONFIG, BPETokenizer, Tokenizer, export_tokenizer, load_tokenizer
from glassgpt.utils.errors import UserError, did_you_mean
from glassgpt.utils.files import (
    PARTIAL_PREFIX,
    atomic_directory,
    decoded,
    explain_os_errors,
    read_file,
    read_json,
    read_object,
)
from glassgpt.utils.safe_pickle import read_pickle

_EXPORTED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", TOKENIZER_CONFIG}
EXPORT_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def open_hf(path: Path) -> ExternalModel:
    """Open a directory with config.json and weights, or a .safetensors file in the folder of its config.json.

    The four published GPT-2 need no config.json. Raises `UserError` if anything is missing, damaged or not supported.
    """
    file = (path if path.is_dir() else path.parent) / "config.json"
    if path.is_dir():
        if not file.is_file():
            raise UserError(f"{path} is not a Hugging Face model directory: it has no config.json")
        _weight_files(path)
    config = read_object(file) if file.is_file() else _published_gpt2(path)
    known, name = {family.model_type: family for family in FAMILIES}, str(config.get("model_type"))
    if name not in known:
        hint = did_you_mean(name, known)
        raise UserError(f"{file}: model_type {name!r} is not supported{hint}; supported: {', '.join(known)}")
    try:
        shape, ends = known[name].read_config(config), _end_ids(file.parent, config)
    except (UserError, TypeError, AttributeError) as error:  # such as text instead of a number
        raise UserError(f"cannot use {file}: {error}") from None
    facts = (("Hugging Face model", f"{path} ({known[name].name})"),)
    readers = partial(_read_all, path), partial(_tokenizer_in, file.parent)
    return ExternalModel(path, known[name], shape, facts, *readers, ends)


def _tokenizer_in(folder: Path) -> Tokenizer | None:
    """The tokenizer.json, or a tokenizer of vocab.json and merges.txt, or None."""
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder / "tokenizer.json")
    if not (vocab.is_file() and merges.is_file()):
        return None
    try:
        lines = decoded(read_file(merges), merges.name).split("\n")
        pairs = [line for line in lines if line.strip() and not line.startswith("#version")]
        return BPETokenizer.from_merges(read_json(vocab), pairs)
    except (ValueError, TypeError) as error:  # also for a vocabulary that is not a dictionary
        raise UserError(f"cannot use the tokenizer {vocab} with {merges.name}: {error}") from None


def chat_template_in(folder: Path) -> Any:
    """The template that formats a chat, of chat_template.jinja or tokenizer_config.json, or None."""
    file, settings = folder / "chat_template.jinja", folder / TOKENIZER_CONFIG
    if file.is_file():
        return decoded(read_file(file), str(file))
    return read_object(settings).get("chat_template") if settings.is_file() else None


def family_for(config: ModelConfig) -> Family:
    """The first family that can hold models of this config. Raises `UserError` with the settings that none can hold."""
    nearest = min(FAMILIES, key=lambda family: len(family.obstacles(config)))
    if settings := ", ".join(nearest.obstacles(config)):
        raise UserError(f"no family of transformers holds this model; the nearest, {nearest.name}, lacks {settings}")
    return nearest


def export_hf(
    model: GPT, tokenizer: Tokenizer | None, directory: Path, dtype: str = "float32", chat_template: Any = None
) -> str:
    """Write a directory that transformers can load. Returns the family's name; raises as `export`."""
    if dtype not in EXPORT_DTYPES:
        raise UserError(f"dtype must be {', '.join(EXPORT_DTYPES)}, got {dtype!r}")
    family = family_for(model.config)
    begin, end = (None, None) if tokenizer is None else (tokenizer.begin_of_text, tokenizer.end_of_text)
    ends = end if model.end_ids is None else model.end_ids[0] if len(model.end_ids) == 1 else list(model.end_ids)
    # Without a padding id: transformers does not train the embedding of the config's padding id.
    ids = {"bos_token_id": begin, "eos_token_id": ends, "pad_token_id": None}
    about = {"architectures": [family.architecture], "model_type": family.model_type, "dtype": dtype}
    config = {**about, "use_cache": True, **family.write_config(model.config), **ids}
    with _filled(directory) as partial:
        for name, content in (("config.json", config), ("generation_config.json", {**ids, "pad_token_id": end})):
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        tensors = family.export_tensors(model, EXPORT_DTYPES[dtype])
        write_tensors(partial / "model.safetensors", tensors, metadata={"format": "pt"})
        if tokenizer is not None:
            export_tokenizer(tokenizer, partial, model.config.context_length)
            if chat_template is not None:
                settings = read_object(partial / TOKENIZER_CONFIG) | {"chat_template": chat_template}
                (partial / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return family.name


@contextmanager
def _filled(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory whose files are moved to `directory` when they are complete, config.json last.

    An existing directory is filled and not replaced: it may be a mount point, a link, or the current directory. The
    temporary directory in it shows the next export that a killed one left files, which it replaces.
    """
    with explain_os_errors("write", directory):
        exists, inner = directory.is_dir(), directory / ".export"
        left = _EXPORTED if inner.is_dir() else set()
        present = {path.name: path for path in directory.iterdir()} if exists else {}
        if present.keys() - left - {inner.name, f"{PARTIAL_PREFIX}{inner.name}"}:
            raise UserError(f"{directory} is not empty; choose another directory, or remove it first")
        for name in present.keys() & left:
            present[name].unlink()
    with atomic_directory(inner if exists else directory) as partial:
        yield partial
    if exists:
        for path in sorted(inner.iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(directory / path.name)
        inner.rmdir()


def _end_ids(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The ids that end a text, by transformers' order: generation_config.json if it exists, otherwise config.json."""
    file, ids = folder / "generation_config.json", list[Any]()
    for settings in (config, read_object(file)) if file.is_file() else (config,):
        value = settings.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int for i in ids):
            raise UserError(f"eos_token_id must be a whole number or a list of them, got {value!r:.60}")
    return tuple(ids) or None


def _published_gpt2(path: Path) -> dict[str, Any]:
    """The config of one of OpenAI's four GPT-2, by the shapes of its tensors; all have heads of width 64."""
    tensors = plain_names(read_tensors(path))
    shapes = {name.removeprefix("transformer."): tuple(tensor.shape) for name, tensor in tensors.items()}
    layers = sum(bool(re.fullmatch(r"h\.\d+\.ln_1\.weight", name)) for name in shapes)
    for n_layer, n_embd in ((12, 768), (24, 1024), (36, 1280), (48, 1600)):
        if (layers, shapes.get("wte.weight"), shapes.get("wpe.weight")) == (n_layer, (50257, n_embd), (1024, n_embd)):
            return {"model_type": "gpt2", "n_layer": n_layer, "n_embd": n_embd, "n_head": n_embd // 64}
    raise UserError(f"{path} needs its config.json in the same folder: it is not one of the four published GPT-2")


def _weight_files(path: Path) -> list[Path]:
    """The file or files of a model's weights. Raises `UserError` if one is missing."""
    if path.is_file():
        return [path]
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if (path / name).is_file():
            return [path / name]
        if index.is_file():
            weight_map = read_object(index).get("weight_map")
            shards = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
            if not shards or any(Path(shard).name != shard for shard in shards):
                raise UserError(f"{index} is damaged: its weight_map does not name files of the same folder")
            files = [path / shard for shard in shards]
            if missing := [file.name for file in files if not file.is_file()]:
                raise UserError(f"{path} is incomplete: {missing[0]} is missing ({len(missing)} of {len(files)} files)")
            return files
    raise UserError(f"{path} has no weights: neither model.safetensors nor pytorch_model.bin, whole or in shards")


def _read_all(path: Path) -> dict[str, Tensor]:
    """The tensors of all files of a model."""
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(path):
        content = read_tensors(file) if file.suffix == ".safetensors" else read_pickle(file)
        items = content.items() if isinstance(content, dict) else [(None, content)]
        if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in items):
            raise UserError(f"{file} does not hold tensors by name")
        if repeated := tensors.keys() & content.keys():
            raise UserError(f"{file} repeats the tensor {min(repeated)!r} of another file")
        tensors |= content
    return tensors
