"""AdamW and Muon, their parameters, and the learning rate of each step."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import OptimConfig
from .model import GPT


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


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest half-orthogonal matrices to a batch (N, R, C), about.

    Singular values of at least 0.3 % of the matrix's norm land between 0.68 and 1.21, smaller ones below.

    Five Newton-Schulz steps of a quintic whose coefficients are tuned for a steep slope at zero (Jordan et al., 2024, "Muon").
    float32 on a CPU, where bfloat16 is emulated and costs a hundred times the time; bfloat16 elsewhere.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al., 2024), for matrices.

    The update is scaled by 0.2 sqrt(max(rows, columns)), which gives it the size of an AdamW update, so that one learning
    rate serves both (Liu et al., 2025, "Muon is scalable for LLM training"). Matrices of one shape are handled in one batch.
    A parameter group's `split` gives the rows of the matrices that are fused in each of its parameters, None where it is one.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "split": None})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        # Matrices of one shape go together, whichever group they are of: all groups share their settings but `split`.
        batches: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                nesterov = parameter.grad.lerp(momentum, group["momentum"])
                rows = group["split"] or [len(parameter)]
                for weight, update in zip(parameter.split(rows), nesterov.split(rows), strict=True):
                    batches.setdefault((weight.shape[0], weight.shape[1]), []).append((weight, update))
        lr, weight_decay = self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        for (rows, columns), pairs in batches.items():
            updates = orthogonalize(torch.stack([update for _, update in pairs]))
            scale = 0.2 * math.sqrt(max(rows, columns))
            for (weight, _), update in zip(pairs, updates, strict=True):
                weight.mul_(1 - lr * weight_decay).add_(update, alpha=-lr * scale)


def build_optimizers(model: GPT, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of a model's parameters: AdamW alone, or behind Muon on the matrices of the blocks."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.name == "adamw":
        return [build_adamw(parameters, config)]
    fused = [block.attention.qkv.weight for block in model.blocks]  # type: ignore[union-attr]
    taken = {id(p) for p in fused}
    single = [p for p in model.blocks.parameters() if p.ndim == 2 and id(p) not in taken]
    taken |= {id(p) for p in single}
    groups: list[dict[str, Any]] = [{"params": fused, "split": model.blocks[0].attention.split}, {"params": single}]
    rest = [p for p in parameters if id(p) not in taken]
    return [Muon(groups, config.lr, config.momentum, config.weight_decay), build_adamw(rest, config)]


def build_adamw(parameters: Sequence[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) with weight decay on matrices only: biases and norms are left alone."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused)
