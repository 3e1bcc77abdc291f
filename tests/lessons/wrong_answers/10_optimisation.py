"""Wrong answers to the exercises of lesson 10, each with a different mistake."""

import math

from torch import Tensor


def _length(gradients: list[Tensor]) -> float:
    return math.sqrt(sum(g.square().sum().item() for g in gradients))


def _mean_over_nonempty(gradients: Tensor, mask: Tensor) -> Tensor:
    return gradients.sum(dim=0) / mask.any(dim=1).sum()


WRONG = {
    "clip_gradients": [
        lambda gradients, limit: [g * min(1.0, limit / max(g.norm().item(), 1e-12)) for g in gradients],
        lambda gradients, limit: [g.clamp(-limit, limit) for g in gradients],
        lambda gradients, limit: [g * limit / _length(gradients) for g in gradients],
        lambda gradients, limit: [g * min(1.0, limit / sum(h.norm().item() for h in gradients)) for g in gradients],
        lambda gradients, limit: [g * min(1.0, limit / _length(gradients) ** 2) for g in gradients],
        lambda gradients, limit: [g / max(1.0, _length(gradients)) for g in gradients],
    ],
    "combined_gradient": [
        lambda gradients, mask: gradients.mean(dim=0),
        _mean_over_nonempty,
        lambda gradients, mask: mask.sum(dim=1).float() @ gradients,
        lambda gradients, mask: mask.sum(dim=1).float() @ gradients / mask.numel(),
        lambda gradients, mask: gradients.sum(dim=0),
    ],
    "uncorrected_move": [
        lambda t, beta1, beta2: 1.0,
        lambda t, beta1, beta2: (1 - beta1**t) / (1 - beta2**t),
        lambda t, beta1, beta2: (1 - beta1) / math.sqrt(1 - beta2),
        lambda t, beta1, beta2: beta1**t / math.sqrt(beta2**t),
        lambda t, beta1, beta2: math.sqrt(1 - beta2**t) / (1 - beta1**t),
    ],
}
