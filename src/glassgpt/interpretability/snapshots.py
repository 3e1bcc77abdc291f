"""Snapshots of what a model computes, small enough that a run keeps one of each evaluation, for a page to leaf through.

    RUN/probes/000500.safetensors

The prompts are the same each time: how each head attends, what each depth expects, how surprising each token is. Beside them, what
kinds the heads are of, and what the model wrote. All of it is computed in float32, whatever the run computes in: it is a picture of
the weights, and the checkpoint of the same step gives the same one.

Shapes: `L` layers, `H` heads, `T` tokens of a prompt, `E` ids expected.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glassgpt.config.validation import StrictConfig
from glassgpt.interpretability.capture import capture
from glassgpt.interpretability.head_scores import HEAD_TYPES, head_scores
from glassgpt.interpretability.logit_lens import logit_lens, predictions
from glassgpt.model.gpt import GPT
from glassgpt.runs.checkpoint import read_tensors_and_metadata, tensor_file
from glassgpt.tokenizers.builtin import Tokenizer
from glassgpt.utils.device import matmul_precision
from glassgpt.utils.errors import UserError
from glassgpt.utils.escape import escape_token
from glassgpt.utils.files import explain_os_errors, write_atomic

EXPECTED = 3
_DTYPES = {
    "attention": torch.uint8,
    "lens_ids": torch.int32,
    "lens_p": torch.float16,
    "next_rank": torch.int32,
    "surprisal": torch.float32,
}


@dataclass(frozen=True)
class Prompt(StrictConfig):
    """A text that models are looked into with, as its tokens."""

    ids: list[int]
    pieces: list[str]
    """What each id stands for, made visible (see `visible`)."""

    def check(self) -> None:
        if not len(self.ids) == len(self.pieces) > 0:
            raise UserError(f"a prompt has {len(self.ids)} ids and {len(self.pieces)} pieces")


@dataclass(frozen=True)
class PromptSeen(StrictConfig):
    """What a model makes of a prompt. Raises `UserError` for tensors that do not fit together."""

    prompt: Prompt
    attention: Tensor
    """Each head's weights w (L, H, T, T) as round(255 w), uint8."""
    lens_ids: Tensor
    """The ids that each depth holds for the likeliest behind each token (L + 1, T, E), likeliest first, int32; see `logit_lens`."""
    lens_p: Tensor
    """Their probabilities (L + 1, T, E), float16."""
    next_rank: Tensor
    """How many ids each depth holds for likelier than the one that does come next (L + 1, T), int32; -1 behind the last token."""
    surprisal: Tensor
    """Of each token (T,), in bits, float32; NaN for the first."""

    def check(self) -> None:
        T, E = len(self.prompt.ids), self.lens_ids.shape[-1:]
        layers = self.attention.shape[:1]
        depths = [n + 1 for n in layers]
        shapes = {
            "attention": [*self.attention.shape[:2], T, T],
            "lens_ids": [*depths, T, *E],
            "lens_p": [*depths, T, *E],
            "next_rank": [*depths, T],
            "surprisal": [T],
        }
        for name, dtype in _DTYPES.items():
            found: Tensor = getattr(self, name)
            if (found.dtype, list(found.shape)) != (dtype, shapes[name]):
                raise UserError(
                    f"{name} of a prompt of {T} tokens is {found.dtype} {list(found.shape)}, not {dtype} {shapes[name]}"
                )


@dataclass(frozen=True)
class ProbeSnapshot(StrictConfig):
    """What was seen of a model at a step of its training. Raises `UserError` for tensors that do not fit together."""

    step: int
    prompts: list[PromptSeen]
    head_types: list[str]
    head_scores: Tensor
    """Each head's score for each type (types, L, H), 0 to 1, float32; see `head_scores`."""
    samples: list[str]
    """What the model wrote."""

    def check(self) -> None:
        found = self.head_scores
        if found.dtype != torch.float32 or found.dim() != 3 or len(found) != len(self.head_types):
            raise UserError(
                f"the scores of {len(self.head_types)} kinds of heads are {found.dtype} {list(found.shape)}"
            )
        for seen in self.prompts:
            if seen.attention.shape[:2] != found.shape[1:]:
                raise UserError(
                    f"a prompt's attention is that of {list(seen.attention.shape[:2])} heads, not {list(found.shape[1:])}"
                )


def prompt_of(ids: Sequence[int], tokenizer: Tokenizer) -> Prompt:
    """The prompt of these ids."""
    begins = {*tokenizer.prompt_prefix, tokenizer.end_of_text}  # what stands behind them begins a text
    pairs = zip([None, *ids[:-1]], ids, strict=True)
    pieces = [
        escape_token(tokenizer.decode_bytes([i], after=None if before in begins else before)) for before, i in pairs
    ]
    return Prompt(list(ids), pieces)


@torch.no_grad()
def take_probe(model: GPT, prompts: Sequence[Prompt], samples: Sequence[str], step: int) -> ProbeSnapshot:
    """A snapshot of the model as it is, on the host. It is left in the mode that it was in, and no generator but own ones is moved."""
    was_training = model.training
    model.eval()
    try:
        with matmul_precision("float32"):
            return ProbeSnapshot(
                step,
                [_seen(model, each) for each in prompts],
                list(HEAD_TYPES),
                head_scores(model).cpu(),
                list(samples),
            )
    finally:
        model.train(was_training)


def _seen(model: GPT, prompt: Prompt) -> PromptSeen:
    with capture(model) as seen:
        model.hidden(torch.tensor([prompt.ids], device=model.embedding.weight.device))
    lens = logit_lens(model, seen, k=EXPECTED)
    found = {
        # A layer at a time: of all of them, float32 would take four times the memory of what is kept, and on the device.
        "attention": torch.stack([(255 * layer.pattern()[0]).round_().to("cpu", torch.uint8) for layer in seen.layers]),
        "lens_ids": lens.top_ids,
        "lens_p": lens.top_p,
        "next_rank": lens.next_rank,
        "surprisal": predictions(model, seen).surprisal,
    }
    return PromptSeen(prompt, **{name: found[name].to("cpu", dtype) for name, dtype in _DTYPES.items()})


def write_probe(path: Path, snapshot: ProbeSnapshot) -> None:
    """Write a snapshot so that a reader, or a kill, finds it whole or not at all. Raises `UserError` when the disk is full."""
    tensors = {"head_kinds": snapshot.head_scores}
    for number, seen in enumerate(snapshot.prompts):
        tensors |= {f"{name}.{number}": getattr(seen, name) for name in _DTYPES}
    prompts = [{"ids": seen.prompt.ids, "pieces": seen.prompt.pieces} for seen in snapshot.prompts]
    told = {"step": snapshot.step, "prompts": prompts, "kinds": snapshot.head_types, "samples": snapshot.samples}
    with explain_os_errors("write", path):
        path.parent.mkdir(exist_ok=True)
    write_atomic(path, tensor_file(tensors, {"snapshot": json.dumps(told)}))


def read_probe(path: Path) -> ProbeSnapshot:
    """Read a snapshot. Raises `UserError` where it is damaged or none, `FileNotFoundError` where it is not there (any more: a run
    that goes on from an earlier step removes it)."""
    tensors, metadata = read_tensors_and_metadata(path)
    try:
        told = json.loads(metadata["snapshot"])
        prompts = [
            PromptSeen(Prompt(**prompt), **{name: tensors[f"{name}.{number}"] for name in _DTYPES})
            for number, prompt in enumerate(told["prompts"])
        ]
        return ProbeSnapshot(told["step"], prompts, told["kinds"], tensors["head_kinds"], told["samples"])
    except KeyError as error:
        raise UserError(f"{path} is no whole probe snapshot: it has no {error}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no whole probe snapshot: {error}") from None
