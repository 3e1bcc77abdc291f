"""What the weights themselves show: maps and neighbours of embeddings, pictures, spectra and norms.

Shapes: `N` rows and `C` columns of a table or matrix, `T` tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glassgpt.interpretability.capture import require_index
from glassgpt.model.gpt import GPT, LearnedPositions
from glassgpt.model.loss import CHUNK_ELEMENTS
from glassgpt.utils.device import require_kernel
from glassgpt.utils.errors import UserError, did_you_mean
from glassgpt.utils.torch_internals import uncompiled


def tables(model: GPT) -> dict[str, Tensor]:
    """The tables whose rows are vectors of the residual stream: `embedding`, `head` unless it is tied, learned `positions`.

    Each (N, C), without the rows that pad the vocabulary.
    """
    found = {"embedding": model.embedding.weight.detach()[: model.vocab_size]}
    if model.head is not model.embedding:
        found["head"] = model.head.weight.detach()[: model.vocab_size]
    if isinstance(model.positions, LearnedPositions):
        found["positions"] = model.positions.table.weight.detach()
    return found


def weight_of(model: GPT, name: str) -> Tensor:
    """A parameter by its name, as `model.named_parameters` has it, without the rows that pad the vocabulary. Raises `UserError`."""
    parameters = dict(model.named_parameters())
    if name not in parameters:
        raise UserError(f"there are no weights {name!r} in this model{did_you_mean(name, parameters)}")
    weight = parameters[name].detach()
    return weight[: model.vocab_size] if name in ("embedding.weight", "head.weight") else weight


@dataclass(frozen=True)
class Neighbours:
    """The rows that point the most alike, the nearest first."""

    ids: Tensor
    """Row numbers (k,)."""
    cosines: Tensor
    """Of the angle to each (k,)."""


@torch.no_grad()
def nearest(table: Tensor, row: int, k: int = 12) -> Neighbours:
    """The k rows of a table (N, C) nearest to one of its own by cosine, itself left out. A row of zeros has cosine 0 to all."""
    require_index("row", row, len(table))
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    lengths = torch.linalg.vector_norm(table, dim=-1)
    cosines = table @ table[row] / (lengths * lengths[row]).clamp(min=torch.finfo(table.dtype).tiny)
    cosines[row] = -torch.inf
    top = cosines.topk(min(k, len(table) - 1))
    return Neighbours(top.indices, top.values)


@dataclass(frozen=True)
class Components:
    """Where the rows of a table lie along its principal components, those of the largest variance first."""

    points: Tensor
    """(N, n)."""
    explained: Tensor
    """Share of all variance that each has (n,)."""


@torch.no_grad()
def principal_components(table: Tensor, n: int = 3) -> Components:
    """The first n principal components (Pearson, 1901) of a table (N, C), by its covariance in float64.

    A component has no sign of its own: here its largest loading is positive, so that the map of a checkpoint does not flip over.
    Components that a narrow table does not have are 0.
    """
    table = _where_float64_is(table)
    mean = table.mean(dim=0, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(_gram(table, mean))  # ascending
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)[:, :n]
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    vectors = vectors * largest.sign()
    points = torch.cat([(rows - mean) @ vectors for rows in _in_float64(table)])
    total = values.sum()
    shares = values[:n] / total if total > 0 else torch.zeros_like(values[:n])
    missing = n - len(shares)
    return Components(F.pad(points, (0, missing)), F.pad(shares, (0, missing)))


@torch.no_grad()
def singular_values(weight: Tensor) -> Tensor:
    """Singular values of a matrix (N, C), descending, float64 (min(N, C),).

    By way of the smaller of its two products with itself, in float64: several times as fast as a decomposition, and exact to about
    1e-8 of the largest, which float32's own rounding does not reach. Raises `UserError` for weights that are no matrix.
    """
    if weight.dim() != 2:
        raise UserError(f"a spectrum is that of a matrix, and these weights have the shape {tuple(weight.shape)}")
    weight = _where_float64_is(weight)
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    squares = torch.linalg.eigvalsh(_gram(tall, tall.new_zeros(tall.shape[1], dtype=torch.float64)))
    values: Tensor = squares.flip(0).clamp(min=0).sqrt()
    return values


def _gram(table: Tensor, mean: Tensor) -> Tensor:
    """(table - mean)^T (table - mean) for a table (N, C), (C, C) in float64, without a whole copy of the table in it."""
    total = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64, device=table.device)
    for rows in _in_float64(table):
        centred = rows - mean
        total.addmm_(centred.T, centred)
    return total


def _where_float64_is(x: Tensor) -> Tensor:
    return x.cpu() if x.device.type == "mps" else x


def _in_float64(table: Tensor) -> Iterator[Tensor]:
    """The rows of a table, some at a time."""
    for rows in table.split(max(1, CHUNK_ELEMENTS // 2 // table.shape[1])):  # type: ignore[no-untyped-call]
        yield rows.double()


@dataclass(frozen=True)
class Statistics:
    """A parameter in four numbers."""

    norm: float
    """Frobenius norm: the root of the sum of squares."""
    mean: float
    std: float
    """Standard deviation (of all elements: divided by their number)."""
    largest: float
    """The largest absolute value."""


@torch.no_grad()
def statistics(weight: Tensor) -> Statistics:
    """Norm, mean, standard deviation and largest element of weights of any shape."""
    flat = weight.flatten().to(torch.promote_types(weight.dtype, torch.float32))
    return Statistics(
        float(torch.linalg.vector_norm(flat)),
        float(flat.mean()),
        float(flat.std(correction=0)),
        float(flat.abs().amax()),
    )


@torch.no_grad()
def thumbnail(weight: Tensor, size: int = 256) -> Tensor:
    """A matrix (N, C) shrunk to at most size x size by the means of its cells, float32; a vector is a matrix of one row.

    Where a side is no multiple of size, neighbouring cells share the rows or columns that lie between them.
    """
    matrix = weight.reshape(-1, weight.shape[-1]).float()
    return F.adaptive_avg_pool2d(matrix[None], (min(size, matrix.shape[0]), min(size, matrix.shape[1])))[0]


@dataclass(frozen=True)
class ParameterNorms:
    """How large a parameter is, and how hard a text pulls at it."""

    name: str
    weight_norm: float
    gradient_norm: float


@dataclass(frozen=True)
class Gradients:
    """The loss of a text, and its gradient's norm by each parameter."""

    loss: float
    """Mean over the text's tokens, in nats."""
    parts: list[ParameterNorms]


def gradient_norms(model: GPT, ids: Tensor) -> Gradients:
    """Norms of each parameter and of its gradient for the loss of texts ids (B, T). What the parameters have in `.grad` is left alone.

    Raises `UserError` for a text of one token, which has no loss, and where the model's kernel has no gradients on its device.
    """
    if ids.shape[1] < 2:
        raise UserError("a text of one token has no loss, and so no gradients: give two tokens or more")
    require_kernel(model.config.attention, ids.device)
    parameters = dict(model.named_parameters())
    with torch.inference_mode(False), torch.enable_grad(), uncompiled(model):
        ids = ids.clone()  # one that was made in inference mode cannot be kept for a backward pass
        loss = model(ids[:, :-1], ids[:, 1:])
        if not loss.requires_grad:
            raise UserError("a model prepared for inference has no gradients; use the original model")
        gradients = torch.autograd.grad(loss, list(parameters.values()))
    norms = [
        ParameterNorms(name, _norm(weight), _norm(g))
        for (name, weight), g in zip(parameters.items(), gradients, strict=True)
    ]
    return Gradients(float(loss.detach()), norms)


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.detach().float()))
