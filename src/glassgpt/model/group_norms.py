"""Norms of a model's weights and gradients, by its parts."""

from collections.abc import Callable

import torch
from torch import Tensor

from glassgpt.model.gpt import GPT
from glassgpt.model.param_groups import param_groups


@torch.no_grad()
def group_weight_norms(model: GPT) -> dict[str, float]:
    """The Euclidean norm of each part's weights, of a model that is whole on this rank; rows that pad the vocabulary included."""
    return {part: torch.nn.utils.get_total_norm(parameters).item() for part, parameters in param_groups(model).items()}


@torch.no_grad()
def group_gradient_norms(model: GPT, whole: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The Euclidean norm () of each part's gradient, still on the device.

    `whole` makes one of what the ranks have in parts (see `Strategy.whole`), so every rank has to call this.
    """
    norms = {}
    for part, parameters in param_groups(model).items():
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms[part] = whole(torch.nn.utils.get_total_norm(gradients))
    return norms
