"""Snapshots of a model's activations, small enough that a run keeps one per evaluation: RUN/probes/000500.safetensors.

For the same prompts each time: each head's attention, each depth's predictions, each token's surprisal; head scores and
samples. All in float32, whatever the run's precision, so the checkpoint of the same step gives the same snapshot.

Shapes: `L` layers, `H` heads, `T` tokens of a prompt, `E` predicted ids.
"""

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
from glassgpt.utils.files import explain_os_errors, write_atomic
from glassgpt.utils.formatting import escape_token

PREDICTED = 3  # ids that a snapshot keeps per depth and token
_DTYPES = {
    "attention": torch.uint8,
    "lens_ids": torch.int32,
    "lens_p": torch.float16,
    "next_rank": torch.int32,
    "surprisal": torch.float32,
}
_NAMES_IN_FILE = {"head_types": "kinds", "head_scores": "head_kinds"}  # those of version 0.1


def _require_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: list[int]) -> None:
    if (tensor.dtype, list(tensor.shape)) != (dtype, shape):
        raise UserError(f"{name} must be {dtype} {shape}, not {tensor.dtype} {list(tensor.shape)}")


@dataclass(frozen=True)
class Prompt(StrictConfig):
    """A tokenized text."""

    ids: list[int]
    pieces: list[str]  # each token's text in display form (see `escape_token`)

    def check(self) -> None:
        if not len(self.ids) == len(self.pieces) > 0:
            raise UserError(f"a prompt has {len(self.ids)} ids and {len(self.pieces)} pieces")


@dataclass(frozen=True)
class PromptActivations(StrictConfig):
    """What a model computes over a prompt. Raises `UserError` if shapes or dtypes do not fit."""

    prompt: Prompt
    attention: Tensor  # attention patterns w (L, H, T, T) as round(255 w), uint8
    lens_ids: Tensor  # the most likely next ids at each depth (L + 1, T, E), int32; see `logit_lens`
    lens_p: Tensor  # their probabilities (L + 1, T, E), float16
    next_rank: Tensor  # how many ids each depth ranks above the next one (L + 1, T), int32; -1 after the last token
    surprisal: Tensor  # surprisal of each token in bits (T,), float32; NaN for the first

    def check(self) -> None:
        T, heads = len(self.prompt.ids), list(self.attention.shape[:2])
        depths, predicted = [layers + 1 for layers in heads[:1]], list(self.lens_ids.shape[-1:])
        shapes = {"attention": [*heads, T, T], "next_rank": [*depths, T], "surprisal": [T]}
        shapes["lens_ids"] = shapes["lens_p"] = [*depths, T, *predicted]
        for name, dtype in _DTYPES.items():
            _require_tensor(f"{name} of a prompt of {T} tokens", getattr(self, name), dtype, shapes[name])


@dataclass(frozen=True)
class ProbeSnapshot(StrictConfig):
    """A model's activations at a training step. Raises `UserError` if shapes or dtypes do not fit."""

    step: int
    prompts: list[PromptActivations]
    head_types: list[str]
    head_scores: Tensor  # each head's score for each type (types, L, H), 0 to 1, float32; see `head_scores`
    samples: list[str]  # texts that the model generated at this step

    def check(self) -> None:
        heads = [each.attention.shape[:2] for each in self.prompts] or [self.head_scores.shape[-2:]]
        for shape in heads:
            _require_tensor("head scores", self.head_scores, torch.float32, [len(self.head_types), *shape])

    def flat(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All tensors by name (`attention.0` is that of prompt 0), and the other values."""
        tensors = {f"{name}.{i}": getattr(each, name) for i, each in enumerate(self.prompts) for name in _DTYPES}
        prompts = [{"ids": each.prompt.ids, "pieces": each.prompt.pieces} for each in self.prompts]
        values = {"step": self.step, "prompts": prompts, "head_types": self.head_types, "samples": self.samples}
        return {**tensors, "head_scores": self.head_scores}, values


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
        return ProbeSnapshot(step, activations, list(HEAD_TYPES), head_scores(model).cpu(), list(samples))


def _activations(model: GPT, prompt: Prompt) -> PromptActivations:
    with capture(model) as cache:
        model.hidden(torch.tensor([prompt.ids], device=model.embedding.weight.device))
    lens = logit_lens(model, cache, k=PREDICTED)
    # Layer by layer, since float32 patterns of all layers would take four times the memory, on the device.
    patterns = [(255 * layer.pattern()[0]).round_().to("cpu", torch.uint8) for layer in cache.layers]
    tensors = {"attention": torch.stack(patterns), "surprisal": predictions(model, cache).surprisal}
    tensors |= {"lens_ids": lens.top_ids, "lens_p": lens.top_p, "next_rank": lens.next_rank}
    return PromptActivations(prompt, **{name: tensors[name].to("cpu", dtype) for name, dtype in _DTYPES.items()})


def write_probe(path: Path, snapshot: ProbeSnapshot) -> None:
    """Write a snapshot atomically. Raises `UserError` if the disk is full."""
    tensors, values = ({_NAMES_IN_FILE.get(k, k): v for k, v in part.items()} for part in snapshot.flat())
    with explain_os_errors("write", path):
        path.parent.mkdir(exist_ok=True)
    write_atomic(path, tensor_file(tensors, {"snapshot": json.dumps(values)}))


def read_probe(path: Path) -> ProbeSnapshot:
    """Read a snapshot. Raises `UserError` with the path if it is damaged, `FileNotFoundError` if it is missing."""
    tensors, metadata = read_tensors_and_metadata(path)
    try:
        values = json.loads(metadata["snapshot"])
        prompts = [
            PromptActivations(Prompt(**prompt), **{name: tensors[f"{name}.{number}"] for name in _DTYPES})
            for number, prompt in enumerate(values["prompts"])
        ]
        return ProbeSnapshot(values["step"], prompts, values["kinds"], tensors["head_kinds"], values["samples"])
    except KeyError as error:
        raise UserError(f"{path} is not a complete probe snapshot: {error} is missing") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a complete probe snapshot: {error}") from None
