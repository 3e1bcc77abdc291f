"""Models from and for Hugging Face's transformers: directories and files, in and out. `hf_families` says what they mean."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from glassgpt.config.model import ModelConfig
from glassgpt.interop.hf_families import FAMILIES, Family
from glassgpt.model.gpt import GPT
from glassgpt.runs.checkpoint import read_tensors, write_tensors
from glassgpt.tokenizers.base import begin_of_text
from glassgpt.tokenizers.builtin import BPETokenizer, Tokenizer, export_tokenizer, load_tokenizer
from glassgpt.utils.errors import UserError, did_you_mean
from glassgpt.utils.files import PARTIAL_PREFIX, atomic_directory, explain_os_errors
from glassgpt.utils.safe_pickle import read_pickle


def home_of(config: ModelConfig) -> Family:
    """The family that holds models of this config. Raises `UserError` with the settings that the nearest one cannot hold."""
    obstacles = {family.name: family.obstacles(config) for family in FAMILIES}
    nearest = min(FAMILIES, key=lambda family: len(obstacles[family.name]))
    if obstacles[nearest.name]:
        raise UserError(
            f"no family of transformers holds this model; the nearest, {nearest.name}, cannot have {', '.join(obstacles[nearest.name])}"
        )
    return nearest


@dataclass(frozen=True)
class HFModel:
    """A Hugging Face model directory, or a single .safetensors file, whose config was understood."""

    path: Path
    family: str
    """`GPT2`, `Llama`, …"""
    model_config: ModelConfig
    """The model's shape, `vocab_size` included."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer beside the weights, None where there is none. Raises `UserError` for a damaged one."""
        folder = self.path if self.path.is_dir() else self.path.parent
        vocab, merges = folder / "vocab.json", folder / "merges.txt"
        if (folder / "tokenizer.json").is_file():
            return load_tokenizer(folder / "tokenizer.json")
        if not (vocab.is_file() and merges.is_file()):
            return None
        try:
            lines = merges.read_text(encoding="utf-8").split("\n")
            pairs = [line for line in lines if line.strip() and not line.startswith("#version")]
            return BPETokenizer.from_merges(json.loads(vocab.read_bytes()), pairs)
        except (UserError, ValueError) as error:
            raise UserError(f"cannot use the tokenizer {vocab} with {merges.name}: {error}") from None

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """What `glassgpt info` tells."""
        return (("Hugging Face model", f"{self.path} ({self.family})"),)

    def load_model(self, model: GPT) -> None:
        """Fill a model's parameters in place, in their own dtype. Raises `UserError` naming the first tensor that is wrong."""
        family = next(family for family in FAMILIES if family.name == self.family)
        tensors = _tensors(self.path)
        try:
            family.fill(model, tensors)
        except UserError as error:
            raise UserError(f"cannot load {self.path}: {error}") from None


def open_hf(path: Path) -> HFModel:
    """A directory with config.json and weights, or a .safetensors file.

    The file's config may lie beside it; of the four published GPT-2 it is not needed. Raises `UserError` where anything is
    missing, damaged, or asks for what glassgpt has no slot for.
    """
    with explain_os_errors("read", path):
        file = (path if path.is_dir() else path.parent) / "config.json"
        if not path.exists():
            raise UserError(f"there is no model at {path}")
        if path.is_file() and path.suffix != ".safetensors":
            raise UserError(f"{path} is neither a Hugging Face model directory nor a .safetensors file")
        if path.is_dir():
            if not file.is_file():
                raise UserError(f"{path} is no Hugging Face model directory: it has no config.json")
            _weight_files(path)
        config = _json_object(file) if file.is_file() else _published_gpt2(path)
    family = _family_of(config, file)
    try:
        return HFModel(path, family.name, family.read(config))
    except (UserError, TypeError, AttributeError) as error:  # a text where a number belongs, say
        raise UserError(f"cannot use {file}: {error}") from None


def export_hf(model: GPT, tokenizer: Tokenizer | None, directory: Path) -> str:
    """Write a directory that transformers loads as it is, in float32, and return the family's name.

    Raises `UserError` where no family holds the model, the directory has something in it, or the disk is full.
    """
    family = home_of(model.config)
    end = None if tokenizer is None else tokenizer.end_of_text
    begin = None if tokenizer is None else begin_of_text(tokenizer)
    # No padding id in the config: transformers would not train the embedding of the id that is named there.
    ids = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": None}
    about = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": "float32",
        "use_cache": True,
    }
    with _filled(directory) as partial:
        _write_json(partial / "config.json", {**about, **family.write(model.config), **ids})
        _write_json(partial / "generation_config.json", {**ids, "pad_token_id": end})
        write_tensors(partial / "model.safetensors", family.tensors_of(model), metadata={"format": "pt"})
        if tokenizer is not None:
            export_tokenizer(tokenizer, partial, model.config.context_length)
    return family.name


@contextmanager
def _filled(directory: Path) -> Iterator[Path]:
    """A directory to fill, whose content is in `directory` when it is complete; `config.json` comes last, without which it is no model.

    A directory that is there is filled and not replaced: it may be a mount point, a link, or where the user stands.
    """
    with explain_os_errors("write", directory):
        there = directory.is_dir()
        inner = directory / ".export"
        leftovers = {inner.name, f"{PARTIAL_PREFIX}{inner.name}"}
        if there and {path.name for path in directory.iterdir()} - leftovers:
            raise UserError(f"{directory} is not empty; choose another directory, or remove it first")
    with atomic_directory(inner if there else directory) as partial:
        yield partial
    if there:
        for path in sorted(inner.iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(directory / path.name)
        inner.rmdir()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # invalid JSON or UTF-8
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return content


def _family_of(config: Mapping[str, Any], file: Path) -> Family:
    known = {family.model_type: family for family in FAMILIES}
    if "model_type" not in config:
        raise UserError(f"{file} names no model_type; glassgpt knows {', '.join(known)}")
    model_type = str(config["model_type"])
    if model_type not in known:
        near = did_you_mean(model_type, known)
        raise UserError(
            f"{file}: glassgpt does not know the model_type {model_type!r}{near} (it knows {', '.join(known)})"
        )
    return known[model_type]


def _published_gpt2(path: Path) -> dict[str, Any]:
    """The config of one of OpenAI's four GPT-2, which all have heads of 64, by the shapes of its tensors."""
    shapes = {name.removeprefix("transformer."): tuple(tensor.shape) for name, tensor in read_tensors(path).items()}
    layers = sum(bool(re.fullmatch(r"h\.\d+\.ln_1\.weight", name)) for name in shapes)
    for n_layer, n_embd in ((12, 768), (24, 1024), (36, 1280), (48, 1600)):
        if (layers, shapes.get("wte.weight"), shapes.get("wpe.weight")) == (n_layer, (50257, n_embd), (1024, n_embd)):
            return {"model_type": "gpt2", "n_layer": n_layer, "n_embd": n_embd, "n_head": n_embd // 64}
    raise UserError(
        f"{path} has no config.json beside it, and its shapes are of none of the four published GPT-2; put its config.json there"
    )


def _weight_files(path: Path) -> list[Path]:
    """The file or files of a model's weights. Raises `UserError` where one is missing."""
    if path.is_file():
        return [path]
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if (path / name).is_file():
            return [path / name]
        if index.is_file():
            shards = _json_object(index).get("weight_map")
            if not isinstance(shards, dict) or not all(
                isinstance(shard, str) and Path(shard).name == shard for shard in shards.values()
            ):
                raise UserError(f"{index} is damaged: it has no weight_map of files beside it")
            files = [path / shard for shard in sorted(set(shards.values()))]
            if missing := [file for file in files if not file.is_file()]:
                raise UserError(
                    f"{path} is not complete: {missing[0].name} is missing ({len(missing)} of {len(files)} files)"
                )
            return files
    raise UserError(f"{path} has no weights: neither model.safetensors nor pytorch_model.bin, whole or in shards")


def _tensors(path: Path) -> dict[str, Tensor]:
    with explain_os_errors("read", path):
        return dict(itertools.chain.from_iterable(_read(file).items() for file in _weight_files(path)))


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return read_tensors(file)
    content = read_pickle(file)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{file} holds other things than tensors by name")
    return content
