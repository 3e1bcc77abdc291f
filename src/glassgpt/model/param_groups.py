"""Parameter groups, by which norms of weights and gradients are reported."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the report needs the names only, and torch takes a second to import
    from torch import Tensor, nn

PARAM_GROUPS = {
    "embedding": "token embedding",
    "positions": "position embedding",
    "attention": "attention",
    "feed_forward": "feed-forward",
    "norms": "normalisations",
    "head": "output head",
}
"""The key of each group in a record, and its name for people. A tied head is the token embedding."""


def param_groups(model: "nn.Module") -> dict[str, "list[nn.Parameter]"]:
    """The parameters of a `GPT` by group, each of them once; groups without parameters are left out."""
    groups: dict[str, list[nn.Parameter]] = {key: [] for key in PARAM_GROUPS}
    for name, parameter in model.named_parameters():
        first, _, *inner = name.split(".")  # "blocks.0.attention.qkv.weight", "positions.table.weight", "norm.weight"
        module = inner[0] if first == "blocks" else first
        groups["norms" if module.endswith("norm") else module].append(parameter)
    return {key: group for key, group in groups.items() if group}


def norms_by_group(model: "nn.Module", gradients: bool = False) -> "dict[str, Tensor]":
    """The Euclidean norm () of each group's weights or gradients, padding rows included; a DTensor if sharded."""
    from torch.nn.utils import get_total_norm

    norms = {}
    for key, group in param_groups(model).items():
        tensors = [p.grad if gradients else p.detach() for p in group]
        norms[key] = get_total_norm([tensor for tensor in tensors if tensor is not None])
    return norms
