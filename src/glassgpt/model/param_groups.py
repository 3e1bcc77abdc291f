"""The parts of a model by which norms of weights and gradients are told: the one place that names them."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the report needs the names, and none of what takes seconds to import
    from torch import Tensor, nn

    from glassgpt.model.gpt import GPT

PARAM_GROUPS = {
    "embedding": "token embedding",
    "positions": "position embedding",
    "attention": "attention",
    "feed_forward": "feed-forward",
    "norms": "normalisations",
    "head": "output head",
}
"""Each part's key in a record, and its name for people. A tied head is the token embedding."""


def param_groups(model: "GPT") -> dict[str, "list[nn.Parameter]"]:
    """The model's parameters by part, each of them in one; a part that has none is left out."""
    blocks = list(model.blocks)
    modules: dict[str, list[nn.Module]] = {
        "embedding": [model.embedding],
        "positions": [model.positions],
        "attention": [block.attention for block in blocks],  # type: ignore[misc]
        "feed_forward": [block.feed_forward for block in blocks],  # type: ignore[misc]
        "norms": [model.embedding_norm, *_norms(blocks), model.norm],
        "head": [] if model.head is model.embedding else [model.head],
    }
    found = {
        part: [parameter for module in of_part for parameter in module.parameters()]
        for part, of_part in modules.items()
    }
    return {part: parameters for part, parameters in found.items() if parameters}


def _norms(blocks: "Iterable[nn.Module]") -> "list[nn.Module]":
    return [norm for block in blocks for norm in (block.attention_norm, block.feed_forward_norm)]  # type: ignore[misc]


def group_weight_norms(model: "GPT") -> dict[str, float]:
    """The Euclidean norm of each group's weights; the rows that pad the vocabulary count too. The model must not be sharded."""
    from torch.nn.utils import get_total_norm

    groups = param_groups(model)
    return {name: get_total_norm([p.detach() for p in group]).item() for name, group in groups.items()}


def group_gradient_norms(model: "GPT", full_tensor: "Callable[[Tensor], Tensor]") -> "dict[str, Tensor]":
    """The Euclidean norm () of each group's gradient, still on the device.

    `full_tensor` gathers what is sharded (see `Strategy.full_tensor`), so every rank must call this.
    """
    from torch.nn.utils import get_total_norm

    norms = {}
    for name, group in param_groups(model).items():
        gradients = [parameter.grad for parameter in group if parameter.grad is not None]
        norms[name] = full_tensor(get_total_norm(gradients))
    return norms
