"""Activation checkpointing (Chen et al., 2016): recompute parts of each block in the backward pass to save memory.

`full` keeps the input of a block only, for one more forward pass: a third more arithmetic. `selective` also keeps the
results of matrix products and of attention, and recomputes what is between them: norms, activations and residual sums.
"""

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from glassgpt.utils.torch_internals import CHECKPOINTED_OPERATORS


def checkpoint_activations(block: nn.Module, kind: str) -> None:
    """Let a block recompute its activations, in place: `none`, `selective` or `full`. Results do not change."""
    if kind == "none":
        return
    keep_products = partial(create_selective_checkpoint_contexts, CHECKPOINTED_OPERATORS)
    contexts: dict[str, Any] = {"context_fn": keep_products} if kind == "selective" else {}
    inner = block.forward

    def forward(*arguments: Any) -> Any:
        return checkpoint(inner, *arguments, use_reentrant=False, **contexts)

    # On the instance: hooks on the block, such as FSDP's, stay outside the recomputation, and no parameter changes its
    # name. A function rather than a `partial`: inside FSDP's hooks it is the frame that torch.compile starts from.
    block.forward = forward
