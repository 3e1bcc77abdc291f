"""Loss, perplexity and bits per byte of a model on text: every token but the first is predicted once."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
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
from glassgpt.generation import inference
from glassgpt.interop.references import LoadedModel, load_model
from glassgpt.model.finite import nonfinite_error
from glassgpt.model.gpt import GPT
from glassgpt.tokenizers.builtin import Tokenizer, tokenizer_file
from glassgpt.tokenizers.huggingface import FileTokenizer
from glassgpt.utils.arguments import check_arguments
from glassgpt.utils.device import autocast, find_device, find_precision, matmul_precision, require_memory
from glassgpt.utils.errors import UserError
from glassgpt.utils.torch_internals import uncompiled

Losses = npt.NDArray[np.float64]
EVALUATION_TOKENS, GPU_EVALUATION_TOKENS = 4096, 32768  # of one pass: more are slower on a CPU, fewer on a GPU
WORST_DOCUMENTS, EXCERPT_TOKENS = 5, 100
WORST_TOKENS = 16  # shorter documents are not among those with the highest loss: a word or two says little


class DocumentLosses:
    """Losses of each document's text tokens, in nats. `starts` (documents,): the first token of each in the stream."""

    def __init__(self, starts: Ids) -> None:
        self.starts, self.nats = starts, np.zeros(len(starts))
        self.tokens, self.bytes = np.zeros_like(starts), np.zeros_like(starts)

    def add(self, first: int, losses: Losses, sizes: Ids, is_text: npt.NDArray[np.bool_]) -> None:
        """Count losses and bytes (n,) of the text tokens from `first` on."""
        documents = np.searchsorted(self.starts, np.arange(first, first + len(losses)), side="right") - 1
        own = is_text & (documents >= 0)  # tokens before the first start are not counted
        for total, values in ((self.nats, losses), (self.bytes, sizes), (self.tokens, own)):
            np.add.at(total, documents[own], values[own])

    @property
    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Number, tokens, loss and bits per byte (n,) of the documents that have text."""
        numbers = np.flatnonzero(self.bytes)
        nats, tokens = self.nats[numbers], self.tokens[numbers]
        bits = nats / math.log(2) / self.bytes[numbers]
        return {"document": numbers, "tokens": tokens, "loss": nats / tokens, "bits_per_byte": bits}


@dataclass
class Measurement:
    """Losses of a text's predicted tokens in nats, summed in float64."""

    nats_by_position: Losses  # (T,), at each position of the context; the first position has one token before it
    tokens_by_position: Ids  # (T,), predicted tokens at each position
    text_nats: float = 0.0  # of the tokens that have text: all but special tokens such as end of text
    text_bytes: int = 0  # of these tokens
    documents: DocumentLosses | None = None  # if they are asked for and document starts are known
    token_losses: list[Losses] = field(default_factory=list)  # of all tokens in order, by batch, if they are kept

    @property
    def figures(self) -> dict[str, Any]:
        """`loss` in nats per token, `perplexity`, `tokens`, and `bits_per_byte`, which compares tokenizers."""
        tokens = self.tokens_by_position.sum()
        return _figures(float(self.nats_by_position.sum() / tokens), self.text_nats, self.text_bytes, int(tokens))


def _figures(loss: float, text_nats: float, text_bytes: float, tokens: int) -> dict[str, Any]:
    perplexity = math.exp(loss) if loss < 700 else math.inf
    # Special tokens are in neither sum: they have no bytes, and only some tokenizers have them.
    bits_per_byte = text_nats / math.log(2) / text_bytes if text_bytes else math.nan
    return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits_per_byte, "tokens": tokens}


@torch.no_grad()
def measure_stream(
    model: GPT,
    stream: TokenStream,
    tokenizer: Tokenizer,
    *,
    precision: str = "float32",
    limit: int | None = None,
    context_length: int | None = None,
    keep_tokens: bool = False,
    by_document: bool = False,
    ranks: Ranks | None = None,
) -> Measurement:
    """Measure the losses of a token stream in windows of `context_length` that do not overlap, the remainder included.

    limit: stop after this many predicted tokens. by_document: also sum the losses of each document. Each rank measures
    its share of the windows, which may be empty. Raises `UserError` for fewer than two tokens.
    """
    context_length, ranks = context_length or model.config.context_length, ranks or Ranks()
    context_length = max(1, min(context_length, len(stream)))
    device = model.embedding.weight.device
    batch_size = max(1, (EVALUATION_TOKENS if device.type == "cpu" else GPU_EVALUATION_TOKENS) // context_length)
    # Without marks between documents, only the index shows where a tokenizer of a file may have put a space.
    is_unmarked = isinstance(tokenizer, FileTokenizer) and not tokenizer.document_marks
    starts = stream.document_starts() if by_document or is_unmarked else None
    measured = Measurement(np.zeros(context_length), np.zeros(context_length, dtype=np.int64))
    if by_document and starts is not None and len(starts):
        measured.documents = DocumentLosses(starts)
    with inference.evaluation_mode(model):
        batches = stream.evaluation_batches(context_length, batch_size, limit, ranks.rank, ranks.size)
        for first, inputs, targets in batches:
            ranks.heartbeat()
            if ranks.stop_signal():  # `evaluate_data` then ends the evaluation on all ranks
                break
            is_full = inputs.shape == (batch_size, context_length)
            ids, next_ids = (torch.from_numpy(array).to(device) for array in (inputs, targets))
            with autocast(device, precision), nullcontext() if is_full else uncompiled(model):
                nats = model(ids, next_ids, reduction="none").cpu().double().numpy()  # MPS has no float64
            measured.nats_by_position[: targets.shape[1]] += nats.sum(axis=0)
            measured.tokens_by_position[: targets.shape[1]] += targets.shape[0]
            losses, before = nats.ravel(), inputs.flatten()
            if is_unmarked and starts is not None:
                begin, end = np.searchsorted(starts, (first, first + len(losses)))
                before[starts[begin:end] - first] = -1
            sizes = tokenizer.text_bytes(targets.ravel(), before)
            is_text = tokenizer.is_text[targets.ravel()]
            measured.text_nats += float(losses[is_text].sum())
            measured.text_bytes += int(sizes.sum())
            if keep_tokens:
                measured.token_losses.append(losses)
            if measured.documents is not None:
                measured.documents.add(first, losses, sizes, is_text)
    return measured


def evaluate_data(
    model: GPT, data: TrainingData, *, precision: str = "float32", limit: int | None = None, ranks: Ranks | None = None
) -> dict[str, Any]:
    """The figures of a run's validation splits (see `combine`), on all ranks. `limit`: predicted tokens per split.

    Raises `StoppedError` if a rank has a `stop_signal`.
    """
    ranks = ranks or Ranks()
    shares = [
        measure_stream(model, each.validation, each.tokenizer, precision=precision, limit=limit, ranks=ranks)
        for each in data.datasets
    ]
    ranks.enter_phase("the sums of an evaluation")
    ranks.stop_if_asked()
    totals = []
    for share in shares:
        nats = ranks.all_gather_numbers([*share.nats_by_position, share.text_nats]).sum(axis=0)
        counts = ranks.all_gather_numbers([*share.tokens_by_position, share.text_bytes]).sum(axis=0).astype(np.int64)
        totals.append(Measurement(nats[:-1], counts[:-1], float(nats[-1]), int(counts[-1])))
    return combine(totals, data)


def combine(measured: Sequence[Measurement], data: TrainingData) -> dict[str, Any]:
    """The figures of a single text; for a mixture, means by its weights, and `losses` of each text by name."""
    each_figures = [each.figures for each in measured]
    if len(measured) == 1:
        return each_figures[0]

    def mean(values: Sequence[float]) -> float:
        return math.fsum(weight * value for weight, value in zip(data.weights, values, strict=True))

    losses, tokens = ([each[name] for each in each_figures] for name in ("loss", "tokens"))
    text_nats = mean([each.text_nats / count for each, count in zip(measured, tokens, strict=True)])
    text_bytes = mean([each.text_bytes / count for each, count in zip(measured, tokens, strict=True)])
    figures = _figures(mean(losses), text_nats, text_bytes, sum(tokens))
    return figures | {"losses": dict(zip(data.names, losses, strict=True))}


def details(
    measured: Measurement, stream: TokenStream, tokenizer: Tokenizer, documents: bool = False
) -> dict[str, Any]:
    """What `figures` leaves out: `loss_by_position`, `tokens_by_position`; if kept, `token_ids` and `token_losses`.

    If documents are known, also `document_count` and `worst_documents`, those with the highest loss. documents: also
    the figures of all `documents`, as columns.
    """
    reached, each = measured.tokens_by_position > 0, measured.documents
    nats, tokens = measured.nats_by_position[reached], measured.tokens_by_position[reached]
    result: dict[str, Any] = {"loss_by_position": (nats / tokens).tolist(), "tokens_by_position": tokens.tolist()}
    if measured.token_losses:
        token_losses = np.concatenate(measured.token_losses)
        result["token_ids"] = stream.read(1, len(token_losses)).tolist()
        result["token_losses"] = token_losses.tolist()
    if each is None:
        return result
    columns, ends = each.columns, np.append(each.starts[1:], len(stream))
    eligible = np.flatnonzero(columns["tokens"] >= WORST_TOKENS)
    worst = eligible[np.argsort(-columns["loss"][eligible], kind="stable")[:WORST_DOCUMENTS]]
    rows = [{name: column[row].item() for name, column in columns.items()} for row in worst]
    for row in rows:
        start, end = int(each.starts[row["document"]]), int(ends[row["document"]])
        ids = stream.read(start, min(end - start, EXCERPT_TOKENS))
        row["text"] = tokenizer.decode(ids[tokenizer.is_text[ids]])  # without special tokens
    result |= {"document_count": len(columns["document"]), "worst_documents": rows}
    return result | ({"documents": {name: c.tolist() for name, c in columns.items()}} if documents else {})


@check_arguments
def evaluate(
    reference: str | Path | LoadedModel,
    *,
    source: str | None = None,
    split: str | None = None,
    column: str | None = None,
    encoding: str | None = None,
    errors: str | None = None,
    skip_bad: bool | None = None,
    delimiter: str | None = None,
    split_on: str | None = None,
    context_length: int | None = None,
    documents: bool = False,
    tokens: bool = False,
    device: str | torch.device = "auto",
    quantize: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Evaluate a model on its run's validation split, or on another source with the model's tokenizer.

    split: `validation`, `train` or `all`; default: `validation` for the run's own text and for prepared datasets,
    otherwise `all`. The arguments from `column` to `split_on`: as in `DataConfig`, by default the run's.
    context_length: use shorter windows. `documents` and `tokens` add the figures of each. quantize: `int8` measures
    `glassgpt.quantize(model)`. A model without a run needs a source. `log`: called while text is prepared and verified.

    Returns the `figures` of a `Measurement`, what was measured (model, step, data, split, context length, precision,
    quantization, versions), and `details` (for a mixture, those of each text in `texts`). Raises `UserError`.
    """
    if split not in (None, *SPLITS, "all"):
        raise UserError(f"split must be validation, train or all, got {split!r}")
    target = find_device(inference.device_for(quantize, device))
    loaded = reference if isinstance(reference, LoadedModel) else load_model(reference, target)
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise UserError(f"{loaded.reference} has no tokenizer, so it cannot be evaluated on text")
    model = loaded.model if quantize is None else inference.quantize(loaded.model, quantize)
    if context_length is not None and not 1 <= context_length <= (model.limit or context_length):
        raise UserError(f"context_length must be from 1 to {model.limit}, got {context_length}")
    changes = {"source": source, "column": column, "encoding": encoding, "errors": errors, "skip_bad": skip_bad}
    data, default_split = _open_data(loaded, changes | {"delimiter": delimiter, "split_on": split_on}, log)
    split = split or default_split
    streams = [{"validation": d.validation, "train": d.train, "all": d.whole}[split] for d in data.datasets]
    precision = _precision_of(loaded, quantize)
    _require_memory(model, streams, context_length, precision)
    options: dict[str, Any] = {"context_length": context_length, "keep_tokens": tokens, "by_document": True}
    with matmul_precision(precision):
        measured = [measure_stream(model, each, tokenizer, precision=precision, **options) for each in streams]
    each = [details(m, stream, tokenizer, documents) for m, stream in zip(measured, streams, strict=True)]
    return {
        **_finite(combine(measured, data), loaded.model),
        **loaded.provenance,
        "data": ", ".join(data.names),
        "data_fingerprint": data.fingerprint,
        "split": split,
        "context_length": context_length or model.config.context_length,
        "precision": precision,
        "quantization": quantize,
        **(each[0] if len(each) == 1 else {"texts": dict(zip(data.names, each, strict=True))}),
    }


def _precision_of(loaded: LoadedModel, quantize: str | None) -> str:
    """The precision of the model's run, or float32 if it is quantized or its device lacks that."""
    wanted = "auto" if loaded.config is None else loaded.config.precision
    with suppress(UserError):
        return find_precision("float32" if quantize else wanted, loaded.model.embedding.weight.device)
    return "float32"


def _require_memory(model: GPT, streams: Sequence[TokenStream], context_length: int | None, precision: str) -> None:
    """Raise `UserError` if a window of the context length certainly does not fit into free memory."""
    length = min(context_length or model.config.context_length, max(map(len, streams)))
    each_token = inference.forward_bytes(model, 1, 2 if precision in ("bfloat16", "float16") else 4)
    where, fewer = model.embedding.weight.device, "a context length"
    require_memory(where, f"a context of {length:,} tokens", length, each_token, fewer, "use a smaller model")


def _finite(figures: dict[str, Any], model: GPT) -> dict[str, Any]:
    """The figures. Raises `UserError` if the loss is not finite."""
    if not math.isfinite(figures["loss"]):
        raise nonfinite_error(model)
    return figures


def _open_data(loaded: LoadedModel, changes: dict[str, Any], log: Callable[[str], None]) -> tuple[TrainingData, str]:
    """The data to evaluate on, and its default split."""
    config, source = loaded.config or TrainConfig(steps=1), changes.get("source")
    if loaded.config is None and source is None:
        raise UserError(f"{loaded.reference} has no run, so no validation split; choose a text with --data")
    settings = config.override(data={name: value for name, value in changes.items() if value is not None}).data
    if source is not None and (config.data.mixture or absolute_source(source) != config.data.source):
        settings = dataclasses.replace(settings, mixture={}, validation="fraction", validation_source=None)
    # The run's own dataset exists already, made with its own tokenizer unless that came with another run's weights,
    # from a file, or from a mixture.
    from_data = config.init_from is None and tokenizer_file(settings.tokenizer) is None and not settings.mixture
    own = loaded.state.data_fingerprint if loaded.state is not None and source is None else None
    tokenizer = None if source is None and from_data else loaded.tokenizer
    data = open_training_data(settings, tokenizer, log, fingerprint=own)
    is_own = loaded.state is not None and data.fingerprint == loaded.state.data_fingerprint
    if source is None and not is_own:
        message = "has changed since the model was trained on it, so its validation split may hold training text"
        raise UserError(f"{', '.join(data.names)} {message}; choose another text with --data")
    is_prepared = source is not None and isinstance(resolve(source), PreparedDataset)
    return data, "validation" if is_own or is_prepared else "all"
