"""Snapshots of a model's activations, small enough that a run keeps one per evaluation: RUN/probes/000500.safetensors.

For the same prompts each time: each head's attention, each depth's predictions, each token's surprisal; head scores and
samples. All in float32, whatever the run's precision, so the checkpoint of the same step gives the same snapshot.

Shapes: `L` layers, `H` heads, `T` tokens of a prompt, `E` predicted ids.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glassgpt.config.validation import StrictConfig
from glassgpt.generation.inference import evaluation_mode
from glassgpt.interpretability.capture import capture
from glassgpt.interpretability.head_scores import HEAD_TYPES, head_scores
from glassgpt.interpretability.logit_lens import logit_lens, predictions
from glassgpt.model.gpt import GPT
from glassgpt.runs.checkpoint import read_tensors_and_metadata, tensor_file
from glassgpt.tokenizers.builtin import Tokenizer
from glassgpt.utils.device import matmul_precision
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import explain_os_errors, own_file, parse_json, read_file, write_atomic
from glassgpt.utils.formatting import escape_token

PREDICTED = 3  # ids that a snapshot keeps per depth and token
# The tensors of each prompt, which a snapshot holds as `attention.0`, `attention.1` and so on.
_DTYPES = {
    "attention": torch.uint8,  # attention patterns w (L, H, T, T) as round(255 w)
    "lens_ids": torch.int32,  # the most likely next ids at each depth (L + 1, T, E); see `logit_lens`
    "lens_p": torch.float16,  # their probabilities (L + 1, T, E)
    "next_rank": torch.int32,  # how many ids each depth ranks above the next one (L + 1, T); -1 after the last token
    "surprisal": torch.float32,  # surprisal of each token in bits (T,); NaN for the first
}
_ZEROS = "0" * 64
_NAMES_IN_FILE = {"head_types": "kinds", "head_scores": "head_kinds"}  # those of version 0.1


@dataclass(frozen=True)
class Prompt(StrictConfig):
    """A tokenized text."""

    ids: list[int]
    pieces: list[str]  # each token's text in display form (see `escape_token`)

    def check(self) -> None:
        if not len(self.ids) == len(self.pieces) > 0:
            raise UserError(f"a prompt has {len(self.ids)} ids and {len(self.pieces)} pieces")


@dataclass(frozen=True)
class ProbeSnapshot(StrictConfig):
    """A model's activations at a training step. Raises `UserError` if shapes or dtypes do not fit."""

    step: int
    prompts: list[Prompt]
    head_types: list[str]
    samples: list[str]  # texts that the model generated at this step
    # Those of `_DTYPES` for each prompt, and `head_scores` (types, L, H), 0 to 1, float32; see `head_scores`.
    tensors: dict[str, Tensor]

    def check(self) -> None:
        heads = self.tensors["head_scores"].shape[-2:]  # L and H
        depths = [layers + 1 for layers in heads[:1]]
        shapes = {"head_scores": [len(self.head_types), *heads]}
        for i, T in enumerate(len(prompt.ids) for prompt in self.prompts):
            lens = [*depths, T, *self.tensors[f"lens_ids.{i}"].shape[-1:]]
            shapes |= {f"attention.{i}": [*heads, T, T], f"lens_ids.{i}": lens, f"lens_p.{i}": lens}
            shapes |= {f"next_rank.{i}": [*depths, T], f"surprisal.{i}": [T]}
        for name, shape in shapes.items():
            tensor, dtype = self.tensors[name], _DTYPES.get(name.partition(".")[0], torch.float32)
            if (tensor.dtype, list(tensor.shape)) != (dtype, shape):
                raise UserError(f"{name} must be {dtype} {shape}, not {tensor.dtype} {list(tensor.shape)}")

    @property
    def values(self) -> dict[str, Any]:
        """Everything except the tensors, for JSON."""
        prompts = [vars(prompt) for prompt in self.prompts]
        return {"step": self.step, "prompts": prompts, "head_types": self.head_types, "samples": self.samples}


def prompt_of(ids: Sequence[int], tokenizer: Tokenizer) -> Prompt:
    """The prompt with these ids."""
    starts = {*tokenizer.prompt_prefix, tokenizer.end_of_text}  # a new text begins after these
    pairs = zip([None, *ids[:-1]], ids, strict=True)
    pieces = [tokenizer.decode_bytes([i], after=None if before in starts else before) for before, i in pairs]
    return Prompt(list(ids), [escape_token(piece) for piece in pieces])


@torch.no_grad()
def take_probe(model: GPT, prompts: Sequence[Prompt], samples: Sequence[str], step: int) -> ProbeSnapshot:
    """A snapshot of the model, on the CPU. The model's mode and the caller's generators are left as they were."""
    with evaluation_mode(model), matmul_precision("float32"):
        activations = [_activations(model, prompt) for prompt in prompts]
        tensors = {f"{name}.{i}": each[name] for i, each in enumerate(activations) for name in _DTYPES}
        tensors["head_scores"] = head_scores(model).cpu()
    return ProbeSnapshot(step, list(prompts), list(HEAD_TYPES), list(samples), tensors)


def _activations(model: GPT, prompt: Prompt) -> dict[str, Tensor]:
    """What the model computes over a prompt: the tensors of `_DTYPES`."""
    with capture(model) as cache:
        model.hidden(torch.tensor([prompt.ids], device=model.embedding.weight.device))
    lens = logit_lens(model, cache, k=PREDICTED)
    # Layer by layer, since float32 patterns of all layers would take four times the memory, on the device.
    patterns = [(255 * layer.pattern()[0]).round_().to("cpu", torch.uint8) for layer in cache.layers]
    tensors = {"attention": torch.stack(patterns), "surprisal": predictions(model, cache).surprisal}
    tensors |= {"lens_ids": lens.top_ids, "lens_p": lens.top_p, "next_rank": lens.next_rank}
    return {name: tensor.to("cpu", _DTYPES[name]) for name, tensor in tensors.items()}


def write_probe(path: Path, snapshot: ProbeSnapshot) -> None:
    """Write a snapshot atomically. Raises `UserError` if the disk is full."""
    parts = (snapshot.tensors, snapshot.values)
    tensors, values = ({_NAMES_IN_FILE.get(k, k): v for k, v in part.items()} for part in parts)
    # The file holds its own sha256, computed while zeros are in its place.
    content = tensor_file(tensors, {"snapshot": json.dumps({"sha256": _ZEROS, **values})})
    with explain_os_errors("write", path):
        path.parent.mkdir(exist_ok=True)
    write_atomic(path, content.replace(_ZEROS.encode(), hashlib.sha256(content).hexdigest().encode(), 1))


def read_probe(path: Path) -> ProbeSnapshot:
    """Read a snapshot. Raises `UserError` with the path if it is damaged, `FileNotFoundError` if it is missing."""
    content, (stored, metadata) = read_file(own_file(path)), read_tensors_and_metadata(path)
    try:
        values = dict(parse_json(metadata["snapshot"], "its metadata"))
        sha256 = str(values.pop("sha256", ""))  # version 0.2 wrote none
        if values.keys() != {"step", "prompts", "kinds", "samples"}:
            raise ValueError("it has other keys")
        if sha256 and hashlib.sha256(content.replace(sha256.encode(), _ZEROS.encode(), 1)).hexdigest() != sha256:
            raise ValueError("its sha256 does not match")
        prompts = [Prompt(**prompt) for prompt in values["prompts"]]
        names = [f"{name}.{i}" for i in range(len(prompts)) for name in _DTYPES]
        tensors = {name: stored[name] for name in names} | {"head_scores": stored["head_kinds"]}
        return ProbeSnapshot(values["step"], prompts, values["kinds"], values["samples"], tensors)
    except (KeyError, ValueError, TypeError) as error:
        problem = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is not a complete probe snapshot: {problem}") from None
