"""What the weights themselves show: embedding maps and neighbours, thumbnails, spectra and norms.

Shapes: `N` rows and `C` columns of a table or matrix, `T` tokens.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from glassgpt.interpretability.capture import at_least_float32, require_index
from glassgpt.model.gpt import GPT, LearnedPositions
from glassgpt.model.loss import CHUNK_ELEMENTS
from glassgpt.utils.arguments import check_arguments
from glassgpt.utils.device import require_kernel
from glassgpt.utils.errors import UserError, did_you_mean
from glassgpt.utils.torch_internals import uncompiled


@check_arguments
def tables(model: GPT) -> dict[str, Tensor]:
    """`embedding`, `head` unless tied, and `positions` if learned: tables (N, C) without the vocabulary's padding."""
    result = {"embedding": model.embedding.weight.detach()[: model.vocab_size]}
    if model.head is not model.embedding:
        result["head"] = model.head.weight.detach()[: model.vocab_size]
    if isinstance(model.positions, LearnedPositions):
        result["positions"] = model.positions.table.weight.detach()
    return result


@check_arguments
def weight_of(model: GPT, name: str) -> Tensor:
    """A parameter by its name, without the vocabulary's padding. Raises `UserError` if there is none."""
    parameters = dict(model.named_parameters())
    if name not in parameters:
        raise UserError(f"the model has no parameter {name!r}{did_you_mean(name, parameters)}")
    weight = parameters[name].detach()
    return weight[: model.vocab_size] if name in ("embedding.weight", "head.weight") else weight


@check_arguments
@torch.no_grad()
def nearest(table: Tensor, row: int, k: int = 12) -> tuple[Tensor, Tensor]:
    """The k rows of a table (N, C) nearest to one of its rows, without that row: their numbers (k,) and cosines (k,).

    The nearest is first. A zero row has cosine 0 to all. Raises `UserError` if there is no such row.
    """
    require_index("row", row, len(table))
    table = at_least_float32(table)
    lengths = torch.linalg.vector_norm(table, dim=-1)
    cosines = table @ table[row] / (lengths * lengths[row]).clamp(min=torch.finfo(table.dtype).tiny)
    cosines[row] = -torch.inf
    top = cosines.topk(min(k, len(table) - 1))
    return top.indices, top.values


@check_arguments
@torch.no_grad()
def principal_components(table: Tensor, n: int = 3) -> tuple[Tensor, Tensor]:
    """The first n principal components (Pearson, 1901) of a table (N, C).

    Returns the rows along them (N, n) and their shares of the variance (n,), the largest first; computed in float64. A
    component's largest loading is positive, so that maps of two checkpoints do not flip. Components beyond C are 0.
    """
    table = table.cpu() if table.device.type == "mps" else table  # MPS has no float64
    mean = table.mean(dim=0, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(_gram(table, mean))  # ascending
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)[:, :n]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    points = torch.cat([(rows - mean) @ vectors for rows in _float64_chunks(table)])
    total = values.sum()
    shares = values[:n] / total if total > 0 else torch.zeros_like(values[:n])
    missing = n - len(shares)
    return F.pad(points, (0, missing)), F.pad(shares, (0, missing))


@check_arguments
@torch.no_grad()
def singular_values(weight: Tensor) -> Tensor:
    """Singular values of a matrix (N, C), descending, float64 (min(N, C),).

    They are the roots of the eigenvalues of W^T W (or W W^T, if smaller), in float64: several times as fast as an SVD,
    and accurate to about 1e-8 of the largest value. Raises `UserError` if the weights are not a matrix.
    """
    if weight.dim() != 2:
        raise UserError(f"only a matrix has singular values, and these weights have the shape {tuple(weight.shape)}")
    weight = weight.cpu() if weight.device.type == "mps" else weight
    squares: Tensor = torch.linalg.eigvalsh(_gram(weight if weight.shape[0] >= weight.shape[1] else weight.T))
    return squares.flip(0).clamp(min=0).sqrt()


def _gram(table: Tensor, mean: Tensor | float = 0.0) -> Tensor:
    """(table - mean)^T (table - mean), (C, C) in float64, without a float64 copy of the table (N, C)."""
    total = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64, device=table.device)
    for rows in _float64_chunks(table):
        centred = rows - mean
        total.addmm_(centred.T, centred)
    return total


def _float64_chunks(table: Tensor) -> Iterator[Tensor]:
    rows = max(1, CHUNK_ELEMENTS // 2 // table.shape[1])
    return (table[start : start + rows].double() for start in range(0, len(table), rows))


@check_arguments
@torch.no_grad()
def statistics(weight: Tensor) -> dict[str, float]:
    """Frobenius `norm`, `mean`, population `std` and `largest` absolute value of weights of any shape."""
    flat = at_least_float32(weight).flatten()
    std, largest = flat.std(correction=0), flat.abs().amax()
    return {"norm": _norm(flat), "mean": float(flat.mean()), "std": float(std), "largest": float(largest)}


@check_arguments
@torch.no_grad()
def thumbnail(weight: Tensor, size: int = 256) -> Tensor:
    """A matrix (N, C) reduced to at most size x size by the means of cells, float32; a vector counts as one row."""
    matrix = weight.reshape(-1, weight.shape[-1]).float()
    return F.adaptive_avg_pool2d(matrix[None], (min(size, matrix.shape[0]), min(size, matrix.shape[1])))[0]


@check_arguments
def gradient_norms(model: GPT, ids: Tensor) -> tuple[float, dict[str, tuple[float, float]]]:
    """The mean loss of texts ids (B, T) in nats; by parameter name, the norms of the parameter and of its gradient.

    Raises `UserError` for a text of one token, a kernel without gradients on this device, and an inference model.
    """
    if ids.shape[1] < 2:
        raise UserError("a text of one token has no loss; give two tokens or more")
    require_kernel(model.config.attention, ids.device)
    parameters = dict(model.named_parameters())
    with torch.inference_mode(False), torch.enable_grad(), uncompiled(model):
        ids = ids.clone()  # autograd cannot save a tensor made in inference mode
        loss = model(ids[:, :-1], ids[:, 1:])
        if not loss.requires_grad:
            raise UserError("a model prepared for inference has no gradients; use the original model")
        gradients = torch.autograd.grad(loss, list(parameters.values()))
    pairs = zip(parameters.items(), gradients, strict=True)
    return float(loss.detach()), {name: (_norm(weight), _norm(gradient)) for (name, weight), gradient in pairs}


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.detach().float()))
