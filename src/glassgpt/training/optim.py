"""AdamW and Muon, their parameters, and the learning rate of each step."""

import itertools
import math
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from glassgpt.config.schema import OptimConfig
from glassgpt.distributed.strategies import Strategy


def lr_at(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of update `step` (from 0) of `steps`: linear warmup, then the schedule's decay.

    Warmup reaches the peak at update `warmup_steps`; the decay reaches `min_lr_ratio` of the peak at the last update.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining)


class OutlierWatch:
    """Finds a loss or gradient norm far above the 128 before it, as llm.c does; a `threshold` of 0 disables it."""

    STEPS = 128

    def __init__(self, threshold: float, recent: Sequence[list[float]] = ()) -> None:
        self.threshold = threshold
        self.recent = list(recent)  # losses and norms of the last updates, oldest first; checkpoints keep them

    def is_outlier(self, loss: float, norm: float) -> bool:
        """Whether one of the two is more than `threshold` standard deviations above its mean. Adds them to `recent`."""
        if not self.threshold:
            return False
        found = False
        if len(self.recent) == self.STEPS:
            for value, before in zip((loss, norm), zip(*self.recent, strict=True), strict=True):
                found |= value - statistics.fmean(before) > self.threshold * statistics.pstdev(before) > 0
        self.recent = [*self.recent, [loss, norm]][-self.STEPS :]
        return found


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Approximate the nearest half-orthogonal matrices to a batch (N, R, C).

    Five Newton-Schulz steps of a quintic with a steep slope at zero (Jordan et al., 2024, "Muon"), computed in `dtype`.
    Singular values of at least 0.3 % of the matrix's norm land between 0.68 and 1.21, smaller ones below.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


ELEMENTS_AT_ONCE = 2**26  # of the matrices that Muon handles together: 256 MiB in float32


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al., 2024), for matrices.

    The update is scaled by 0.2 sqrt(max(rows, columns)) to the size of an AdamW update, so that one learning rate
    serves both (Liu et al., 2025, "Muon is scalable for LLM training"). Each rank computes a part of the matrices of a
    shape. A parameter group's `split` gives the rows of the matrices fused in each of its parameters (None: one
    matrix). As with PyTorch's fused AdamW, nothing changes if the tensor `found_inf` is 1.
    """

    def __init__(
        self, groups: list[dict[str, Any]], config: OptimConfig, strategy: Strategy, dtype: torch.dtype = torch.float32
    ) -> None:
        settings = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
        super().__init__(groups, {**settings, "split": None})
        self._strategy = strategy
        self._orthogonalize = partial(orthogonalize, dtype=dtype)
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        members = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        while members:
            # Sharded matrices are gathered, so only as many at once as fit into little memory.
            sizes = itertools.accumulate(parameter.numel() for parameter, _ in members)
            count = max(1, sum(size <= ELEMENTS_AT_ONCE for size in sizes))
            self._update(members[:count])
            members = members[count:]

    def _update(self, members: Sequence[tuple[Tensor, dict[str, Any]]]) -> None:
        directions = [self._strategy.full_tensor(self._direction(parameter, group)) for parameter, group in members]
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for (_, group), direction in zip(members, directions, strict=True):
            for matrix in torch.split(direction, group["split"] or [len(direction)]):
                by_shape.setdefault(matrix.shape, []).append(matrix)
        for shape, matrices in by_shape.items():
            orthogonal = self._strategy.distributed_map(self._orthogonalize, torch.stack(matrices))
            for matrix, update in zip(matrices, orthogonal, strict=True):
                torch.mul(update, 0.2 * math.sqrt(max(shape)), out=matrix)
        for (parameter, group), direction in zip(members, directions, strict=True):
            update = self._strategy.shard_like(direction, parameter)
            # In place, unless all of it may have to be left out.
            new = parameter if self.found_inf is None else parameter.clone()
            new.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
            if self.found_inf is not None:
                torch.where(self.found_inf.bool(), parameter, new, out=parameter)

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """The gradient with Nesterov's momentum, which is updated."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        grad = parameter.grad
        if self.found_inf is not None:
            grad = torch.where(self.found_inf.bool(), state["momentum"], grad)  # which then stays what it is
        momentum = state["momentum"].lerp_(grad, 1 - group["momentum"])
        return grad.lerp(momentum, group["momentum"])


def build_optimizers(
    strategy: Strategy, config: OptimConfig, precision: str = "float32"
) -> list[torch.optim.Optimizer]:
    """The optimizers of a model: AdamW alone, or Muon for the matrices of the blocks and AdamW for the rest.

    Muon orthogonalises in bfloat16 if that is the run's precision, otherwise in float32, on every device.
    """
    model = strategy.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.name == "adamw":
        return [build_adamw(parameters, config)]
    fused = [block.attention.qkv.weight for block in model.blocks]  # type: ignore[union-attr]
    taken = {id(p) for p in fused}
    single = [p for p in model.blocks.parameters() if p.ndim == 2 and id(p) not in taken]
    taken |= {id(p) for p in single}
    groups: list[dict[str, Any]] = [{"params": fused, "split": model.blocks[0].attention.split}, {"params": single}]
    rest = [p for p in parameters if id(p) not in taken]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    return [Muon(groups, config, strategy, dtype), build_adamw(rest, config)]


def build_adamw(parameters: Sequence[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) with weight decay on matrices only: biases and norms are left alone."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused)
