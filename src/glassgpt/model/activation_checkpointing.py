"""Activation checkpointing (Chen et al., 2016): keep less of a block for the backward pass, and compute it again there.

`full` keeps a block's input only, and costs another forward pass: a third more arithmetic. `selective` keeps the results of matrix
products and of attention too, and computes again what lies between them: norms, activations, the residual sums.
"""

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from glassgpt.utils.torch_internals import CHECKPOINTED_OPERATORS


def checkpoint_activations(block: nn.Module, kind: str) -> None:
    """Have a block recompute, in place: `none`, `selective` or `full`. Gradients stay what they were; dropout is drawn as before."""
    if kind == "none":
        return
    contexts: dict[str, Any] = {}
    if kind == "selective":
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    inner = block.forward

    def forward(*arguments: Any) -> Any:
        return checkpoint(inner, *arguments, use_reentrant=False, **contexts)

    # An instance's own `forward`: hooks around the block, those of FSDP above all, stay outside of it, and no name changes. A function
    # and no `partial`: within FSDP's hooks it is the frame that torch.compile begins with.
    block.forward = forward


def _policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in CHECKPOINTED_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE
