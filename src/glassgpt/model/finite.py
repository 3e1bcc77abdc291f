"""The check that logits are numbers, wherever they become text, probabilities or figures, and its error."""

import torch
from torch import Tensor, nn

from glassgpt.utils.errors import UserError


def require_finite(logits: Tensor, model: nn.Module) -> None:
    """Raise `UserError` unless each row of logits (..., V) has a finite largest one; others may be -inf.

    The error names the weights that are not finite. One pass over the logits, which is cheap beside computing them.
    """
    if logits.numel() and not logits.amax(dim=-1).isfinite().all():
        raise nonfinite_error(model)


@torch.no_grad()
def nonfinite_error(model: nn.Module) -> UserError:
    """The error for a model whose logits or losses are not finite, with the parameters at fault."""
    counts = {name: int((~parameter.isfinite()).sum()) for name, parameter in model.named_parameters()}
    wrong = {name: count for name, count in counts.items() if count}
    if not wrong:
        return UserError("the model's outputs are not finite (NaN or infinite): its weights are too large")
    name, count = next(iter(wrong.items()))
    total = model.get_parameter(name).numel()
    listed = f"{name} has {count:,} of {total:,} values that are NaN or infinite"
    more = f", and {len(wrong) - 1} more tensors have some" if len(wrong) > 1 else ""
    return UserError(f"the model's outputs are not finite: {listed}{more}; use another checkpoint")
