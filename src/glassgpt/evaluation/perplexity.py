"""Loss of a model over a text: every token but the first predicted once, the same number for any batch size."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from glassgpt.config.schema import TrainConfig
from glassgpt.data.dataset import Ids, TokenStream
from glassgpt.data.shards import SPLITS
from glassgpt.data.sources import PreparedDataset, absolute_source, resolve
from glassgpt.data.training_data import TrainingData, open_training_data
from glassgpt.distributed.group import Ranks
from glassgpt.generation.inference import device_for
from glassgpt.generation.inference import quantize as quantize_model
from glassgpt.interop.references import ModelSource, load_source, read_reference
from glassgpt.model.gpt import GPT
from glassgpt.runs.checkpoint import Checkpoint
from glassgpt.tokenizers.builtin import Tokenizer, tokenizer_file
from glassgpt.utils.device import autocast, find_device, find_precision, matmul_precision
from glassgpt.utils.errors import UserError
from glassgpt.utils.torch_internals import uncompiled

# Tokens in one forward pass of an evaluation. No gradients are kept, so memory is small; larger is slower on a CPU, and a GPU would
# wait for its work with less.
EVALUATION_TOKENS = 4096
GPU_EVALUATION_TOKENS = 32768


@dataclass
class Measurement:
    """Losses of the predicted tokens of a text, added up in float64."""

    nats_by_position: npt.NDArray[np.float64]
    """Sum of the losses (T,) at each place of the context, in nats."""
    tokens_by_position: npt.NDArray[np.int64]
    """Tokens predicted (T,) at each place: the first has one token before it to go by."""
    text_bytes: int
    """Bytes of the predicted tokens; special tokens have none."""
    documents: "DocumentLosses | None"
    """The same for each document, where it is known where they start."""

    @property
    def figures(self) -> dict[str, Any]:
        """`loss` in nats a token, `perplexity`, `bits_per_byte` (so that tokenizers compare) and `tokens`."""
        total, tokens = float(self.nats_by_position.sum()), int(self.tokens_by_position.sum())
        loss = total / tokens
        return {
            "loss": loss,
            "perplexity": _perplexity(loss),
            "bits_per_byte": total / math.log(2) / self.text_bytes if self.text_bytes else math.nan,
            "tokens": tokens,
        }

    @property
    def loss_by_position(self) -> list[float]:
        """Mean loss at each place of the context, in nats; ends where no window had a token."""
        reached = np.count_nonzero(self.tokens_by_position)
        return (self.nats_by_position[:reached] / self.tokens_by_position[:reached]).tolist()  # type: ignore[no-any-return]


class DocumentLosses:
    """Losses of each document's own tokens, the marks before it left out.

    starts: first token (documents,) of each in the stream. What stands before the first one belongs to none.
    """

    def __init__(self, starts: Ids) -> None:
        self.starts = starts
        self.nats = np.zeros(len(starts))
        self.tokens = np.zeros(len(starts), dtype=np.int64)
        self.bytes = np.zeros(len(starts), dtype=np.int64)

    def add(self, first: int, losses: npt.NDArray[np.float64], byte_lengths: Ids) -> None:
        """Count losses and bytes (n,) of the tokens from `first` on."""
        if not len(self.starts):
            return
        places = np.arange(first, first + len(losses))
        documents = np.searchsorted(self.starts, places, side="right") - 1
        own = (byte_lengths > 0) & (documents >= 0)
        if not own.any():
            return
        low, high = documents[own][0], documents[own][-1] + 1
        numbers = documents[own] - low
        self.nats[low:high] += np.bincount(numbers, losses[own], high - low)
        self.bytes[low:high] += np.bincount(numbers, byte_lengths[own], high - low).astype(np.int64)
        self.tokens[low:high] += np.bincount(numbers, minlength=high - low)

    def columns(self, numbers: Ids) -> dict[str, list[Any]]:
        """Number, tokens, mean loss in nats and bits a byte of documents (n,) that have tokens, as columns of n each."""
        nats, tokens = self.nats[numbers], self.tokens[numbers]
        bits_per_byte = nats / math.log(2) / self.bytes[numbers]
        columns = {"document": numbers, "tokens": tokens, "loss": nats / tokens, "bits_per_byte": bits_per_byte}
        return {name: column.tolist() for name, column in columns.items()}

    def worst(self, count: int, shortest: int) -> Ids:
        """The documents with the highest mean loss, worst first, of those with at least `shortest` measured tokens."""
        eligible = np.flatnonzero(self.tokens >= shortest)
        means = self.nats[eligible] / self.tokens[eligible]
        return eligible[np.argsort(-means, kind="stable")[:count]]


@torch.no_grad()
def measure_stream(
    model: GPT,
    stream: TokenStream,
    tokenizer: Tokenizer,
    *,
    precision: str = "float32",
    limit: int | None = None,
    batch_size: int | None = None,
    ranks: Ranks | None = None,
) -> Measurement:
    """The losses of a token stream in windows that do not overlap, the remainder included: every token but the first once.

    `limit` stops after that many predicted tokens. On several ranks, those of this rank's share of the windows, maybe of none.
    Raises `UserError` for fewer than two tokens.
    """
    context_length, ranks = model.config.context_length, ranks or Ranks()
    device = model.embedding.weight.device
    batch_size = batch_size or max(
        1, (EVALUATION_TOKENS if device.type == "cpu" else GPU_EVALUATION_TOKENS) // context_length
    )
    byte_lengths = tokenizer.byte_lengths()
    starts = stream.document_starts()
    documents = None if starts is None else DocumentLosses(starts)
    found = Measurement(np.zeros(context_length), np.zeros(context_length, dtype=np.int64), 0, documents)
    was_training = model.training
    model.eval()
    try:
        for first, inputs, targets in stream.evaluation_batches(
            context_length, batch_size, limit, ranks.rank, ranks.size
        ):
            ranks.heartbeat()
            is_whole = inputs.shape == (batch_size, context_length)
            with autocast(device, precision), nullcontext() if is_whole else uncompiled(model):
                losses = model(
                    torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device), reduction="none"
                )
            nats = losses.cpu().double().numpy()  # MPS has no float64, hence the way over the CPU
            found.nats_by_position[: targets.shape[1]] += nats.sum(axis=0)
            found.tokens_by_position[: targets.shape[1]] += targets.shape[0]
            sizes = byte_lengths[targets.ravel()]
            found.text_bytes += int(sizes.sum())
            if documents is not None:
                documents.add(first, nats.ravel(), sizes)
    finally:
        model.train(was_training)
    return found


def evaluate_data(
    model: GPT, data: TrainingData, *, precision: str = "float32", limit: int | None = None, ranks: Ranks | None = None
) -> dict[str, Any]:
    """The figures of a run's validation splits; `limit` counts the predicted tokens of each. See `combined` for a mixture.

    Each rank measures its share, and all get the figures of the whole.
    """
    ranks = ranks or Ranks()
    found = [
        measure_stream(model, d.validation, d.tokenizer, precision=precision, limit=limit, ranks=ranks)
        for d in data.datasets
    ]
    ranks.enter_phase("the sums of an evaluation")
    return combined([added_up(one, ranks) for one in found], data)


def added_up(found: Measurement, ranks: Ranks) -> Measurement:
    """What all ranks measured of a text together, each document's losses aside."""
    nats = ranks.all_gather_numbers(found.nats_by_position).sum(axis=0)
    *tokens, text_bytes = (
        ranks.all_gather_numbers([*found.tokens_by_position, found.text_bytes]).sum(axis=0).astype(np.int64).tolist()
    )
    return Measurement(nats, np.array(tokens), text_bytes, None)


def combined(found: Sequence[Measurement], data: TrainingData) -> dict[str, Any]:
    """The figures of a single text; of a mixture their means by its weights, and `losses` of each text by its name."""
    if len(found) == 1:
        return found[0].figures
    losses = [one.figures["loss"] for one in found]
    bytes_a_token = [one.text_bytes / one.figures["tokens"] for one in found]
    loss, size = (
        math.fsum(w * x for w, x in zip(data.weights, values, strict=True)) for values in (losses, bytes_a_token)
    )
    return {
        "loss": loss,
        "perplexity": _perplexity(loss),
        "bits_per_byte": loss / math.log(2) / size if size else math.nan,
        "tokens": sum(one.figures["tokens"] for one in found),
        "losses": dict(zip(data.names, losses, strict=True)),
    }


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


# Documents with fewer measured tokens than this are not among the worst: a word or two says little.
WORST_TOKENS = 16
WORST_DOCUMENTS = 5
_EXCERPT_TOKENS = 100


def details(found: Measurement, stream: TokenStream, tokenizer: Tokenizer, documents: bool = False) -> dict[str, Any]:
    """What `figures` leaves out, as JSON: `loss_by_position` and `tokens_by_position`, each up to the last place with a token.

    Where documents are known, `document_count` tells how many were measured, and `worst_documents` has the number in the split
    (from 0), tokens, loss, bits a byte and beginning of some; `documents`, if asked for, the same of all but the beginning, as columns.
    """
    losses = found.loss_by_position
    told: dict[str, Any] = {
        "loss_by_position": losses,
        "tokens_by_position": found.tokens_by_position[: len(losses)].tolist(),
    }
    each = found.documents
    if each is None or not len(each.starts):
        return told
    ends = np.append(each.starts[1:], len(stream))
    worst = each.worst(WORST_DOCUMENTS, WORST_TOKENS)
    columns = each.columns(worst)
    columns["text"] = [_excerpt(stream, int(each.starts[number]), int(ends[number]), tokenizer) for number in worst]
    told["document_count"] = int(np.count_nonzero(each.tokens))
    told["worst_documents"] = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if documents:
        told["documents"] = each.columns(np.flatnonzero(each.tokens))
    return told


def _excerpt(stream: TokenStream, start: int, end: int, tokenizer: Tokenizer) -> str:
    """How a document begins, without the marks before it."""
    ids = stream.read(start, min(end - start, _EXCERPT_TOKENS))
    return tokenizer.decode(ids[tokenizer.byte_lengths()[ids] > 0])


def evaluate(
    reference: str | Path,
    *,
    source: str | None = None,
    split: str | None = None,
    column: str | None = None,
    encoding: str | None = None,
    errors: str | None = None,
    skip_bad: bool | None = None,
    documents: bool = False,
    device: str = "auto",
    quantize: str | None = None,
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a model reference on its run's validation split, or on another source with the model's tokenizer.

    split: `validation`, `train` or `all`; left out, `validation` for the text that the model was trained on and for prepared
    datasets, `all` for any other text. `column`, `encoding`, `errors` and `skip_bad` as in `DataConfig`, the run's own unless given.
    `documents` adds the figures of each. Precision is the run's own, float32 where the device lacks that. A model from elsewhere
    has no run: it needs a source, and precision is the device's best. `quantize` measures the model as `writing.quantized` makes it,
    on the CPU. `log` gets lines about text that is prepared first.

    Returns the figures of `evaluate_data`, and the `details` (of a mixture: those of each text, as `texts`). Raises `UserError`.
    """
    if split not in (None, *SPLITS, "all"):
        raise UserError(f"split must be validation, train or all, got {split!r}")
    target = find_device(device_for(quantize, device))
    run, model, tokenizer = read_reference(reference, lambda found: (_run_of(found), *load_source(found, target)))
    if tokenizer is None:
        raise UserError(f"{reference} has no tokenizer, so no text can be evaluated with it")
    if run is None and source is None:
        raise UserError(
            f"{reference} is no run of glassgpt, so it has no validation split of its own; name a text with --data"
        )
    model = model if quantize is None else quantize_model(model, quantize)
    config, own_fingerprint = run or (TrainConfig(steps=1), None)
    changes = {"source": source, "column": column, "encoding": encoding, "errors": errors, "skip_bad": skip_bad}
    settings = config.override(data={key: value for key, value in changes.items() if value is not None}).data
    if source is not None and (config.data.mixture or absolute_source(source) != config.data.source):
        settings = dataclasses.replace(settings, mixture={}, validation="fraction", validation_source=None)
    # The run's own dataset is there already, made with its own tokenizer unless that came with another run's weights or a file.
    is_made = source is None and config.init_from is None and tokenizer_file(settings.tokenizer) is None
    data = open_training_data(settings, None if is_made else tokenizer, log or (lambda line: None))
    is_own = data.fingerprint == own_fingerprint
    if source is None and not is_own:
        raise UserError(
            f"{', '.join(data.names)} has changed since the model was trained on it, so its validation split may hold training text; "
            "name another text with --data"
        )
    if split is None:
        split = "validation" if is_own or isinstance(resolve(settings.source), PreparedDataset) else "all"
    streams = [
        {"validation": dataset.validation, "train": dataset.train, "all": dataset.whole}[split]
        for dataset in data.datasets
    ]
    try:
        precision = find_precision(config.precision if quantize is None else "float32", target)
    except UserError:
        precision = "float32"
    with matmul_precision(precision):
        found = [measure_stream(model, stream, tokenizer, precision=precision) for stream in streams]
    told = [details(one, stream, tokenizer, documents) for one, stream in zip(found, streams, strict=True)]
    return combined(found, data) | (told[0] if len(told) == 1 else {"texts": dict(zip(data.names, told, strict=True))})


def _run_of(source: ModelSource) -> tuple[TrainConfig, str | None] | None:
    """The config and the data's fingerprint of a run's checkpoint, None for a model from elsewhere."""
    return (source.config, source.state.data_fingerprint) if isinstance(source, Checkpoint) else None
