"""HellaSwag's scores, item by item, the file that keeps them so that an evaluation can go on, and the figures made of them."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from glassgpt.model.gpt import GPT
from glassgpt.tokenizers.builtin import Tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import explain_os_errors, write_atomic

# Nats, for a plain score, or what normalising makes of them: nearer scores may change places with the order of a sum.
NEAR_TIE = 1e-4


@dataclass(frozen=True)
class Score:
    """The losses of an item's endings in nats, summed over their tokens, and what normalising divides each by."""

    number: int
    label: int
    losses: tuple[float, ...]
    lengths: tuple[int, ...]
    cut: bool

    def values(self, normalised: bool) -> list[float]:
        """What is compared: the losses, or those a token or a character."""
        return (
            [loss / length for loss, length in zip(self.losses, self.lengths, strict=True)]
            if normalised
            else list(self.losses)
        )

    def choice(self, normalised: bool) -> int | None:
        """The ending of least loss, the first of equals; None where a loss is no number, which counts as wrong."""
        values = self.values(normalised)
        return values.index(min(values)) if all(map(math.isfinite, values)) else None

    def margin(self, normalised: bool) -> float:
        """How much better the best ending is than the second best."""
        best, second, *_ = sorted(self.values(normalised))
        return second - best


@dataclass(frozen=True)
class Identity:
    """What scores depend on: only those of one identity belong into one file. sha256 but for style and precision."""

    model: str
    tokenizer: str
    items: str
    style: str
    precision: str

    @classmethod
    def of(cls, model: GPT, tokenizer: Tokenizer, items: str, style: str, precision: str) -> "Identity":
        """Of a model's config and weights, a tokenizer and the items' fingerprint."""
        return cls(
            _sha256_of_model(model), hashlib.sha256(tokenizer.to_json().encode()).hexdigest(), items, style, precision
        )


def _sha256_of_model(model: GPT) -> str:
    digest = hashlib.sha256(repr(model.config).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass
class Results:
    """The scores of earlier calls by item number, and the file for more; None for scores that nobody keeps."""

    known: dict[int, Score] = field(default_factory=dict)
    file: IO[bytes] | None = None

    def append(self, scores: Sequence[Score]) -> None:
        """Keep more scores, at once on the disk's side of this process: a killed one loses at most a line."""
        if self.file is not None:
            self.file.write(b"".join(_line(score) for score in scores))
            self.file.flush()


@contextmanager
def open_results(path: Path | None, identity: Identity | None) -> Iterator[Results]:
    """The results in a file, which is made where it is missing. A line that is not whole counts as not there.

    The first line is the identity. Raises `UserError` where that is another one: hours of work are not replaced unasked.
    """
    if path is None or identity is None:
        yield Results()
        return
    with explain_os_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        known = _read(path, identity) if path.exists() else {}
        write_atomic(path, b"".join([json.dumps(asdict(identity)).encode() + b"\n", *map(_line, known.values())]))
        with open(path, "ab") as file:
            yield Results(known, file)


def _read(path: Path, identity: Identity) -> dict[int, Score]:
    with explain_os_errors("read", path):
        head, *lines = path.read_bytes().split(b"\n")
    if not lines and not head:
        return {}
    recorded = _json_of(head)
    if recorded != asdict(identity):
        other = [
            key
            for key, value in asdict(identity).items()
            if not isinstance(recorded, dict) or recorded.get(key) != value
        ]
        what = (
            "no HellaSwag results"
            if not isinstance(recorded, dict)
            else f"the results of another {' and '.join(other)}"
        )
        raise UserError(f"{path} has {what}; name another file, or remove it")
    scores = (_score(_json_of(line)) for line in lines[:-1])  # behind the last newline is nothing, or a torn line
    return {score.number: score for score in scores if score is not None}


def _line(score: Score) -> bytes:
    losses = [loss if math.isfinite(loss) else None for loss in score.losses]
    return json.dumps({**asdict(score), "losses": losses}).encode() + b"\n"


def _json_of(line: bytes) -> object:
    try:
        content: object = json.loads(line)
    except ValueError:
        return None
    return content


def _score(record: object) -> Score | None:
    match record:
        case {"number": int(number), "label": int(label), "losses": [*losses], "lengths": [*lengths], "cut": bool(cut)}:
            return Score(
                number, label, tuple(math.nan if loss is None else float(loss) for loss in losses), tuple(lengths), cut
            )
    return None


# ---------------------------------------------------------------------------------------------------------------- figures


def merge(shares: Iterable[Iterable[Score]]) -> list[Score]:
    """The scores of all ranks as one process would have them. Raises `ValueError` where two shares hold the same item."""
    scores = sorted(itertools.chain.from_iterable(shares), key=lambda score: score.number)
    for one, other in itertools.pairwise(scores):
        if one.number == other.number:
            raise ValueError(f"item {one.number} is in two shares")
    return scores


def summarize(scores: Sequence[Score]) -> dict[str, Any]:
    """The figures of some items.

    `acc` and `acc_norm`: shares of items whose right ending has the least loss, and the least loss a token or a character;
    `stderr` and `stderr_norm`, their standard errors; `n` items; `near_ties` and `near_ties_norm`: items whose best two endings
    lie within `NEAR_TIE`; `cut`: items that did not fit into the model's context. Raises `ValueError` for no items.
    """
    if not scores:
        raise ValueError("there are no scores to sum up")
    figures: dict[str, Any] = {"n": len(scores), "cut": sum(score.cut for score in scores)}
    for suffix, normalised in (("", False), ("_norm", True)):
        accuracy = sum(score.choice(normalised) == score.label for score in scores) / len(scores)
        figures[f"acc{suffix}"] = accuracy
        # Of a mean of n values 0 or 1, with the n - 1 of a sample's variance, as in lm-eval.
        figures[f"stderr{suffix}"] = (
            math.sqrt(accuracy * (1 - accuracy) / (len(scores) - 1)) if len(scores) > 1 else math.nan
        )
        figures[f"near_ties{suffix}"] = sum(score.margin(normalised) <= NEAR_TIE for score in scores)
    return figures
