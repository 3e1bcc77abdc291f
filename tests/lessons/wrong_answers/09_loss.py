"""Wrong answers to the exercises of lesson 9, each with a different mistake."""

import math

import torch.nn.functional as F
from torch import Tensor


def _mean(values: list[float], counts: list[int]) -> float:
    return sum(value * n for value, n in zip(values, counts, strict=True)) / sum(counts)


def _gradient(logits: Tensor, targets: Tensor, share: float, rest: float | None = None) -> Tensor:
    V = logits.shape[1]
    q = (1 - share) * F.one_hot(targets, V) + (share / V if rest is None else rest)
    return (logits.softmax(dim=1) - q) / len(logits)


def _others_only(logits: Tensor, targets: Tensor, share: float) -> Tensor:
    V = logits.shape[1]
    onehot = F.one_hot(targets, V)
    q = (1 - share) * onehot + share / (V - 1) * (1 - onehot)
    return (logits.softmax(dim=1) - q) / len(logits)


WRONG = {
    "text_bits_per_byte": [
        lambda loss, n_tokens, text: loss * n_tokens / math.log(2) / len(text),
        lambda loss, n_tokens, text: loss * n_tokens / len(text.encode()),
        lambda loss, n_tokens, text: loss * n_tokens * math.log(2) / len(text.encode()),
        lambda loss, n_tokens, text: loss / math.log(2),
        lambda loss, n_tokens, text: loss / math.log(2) / len(text.encode()),
        lambda loss, n_tokens, text: loss * n_tokens / math.log(2),
    ],
    "perplexity_of_batches": [
        lambda losses, counts: _mean(losses, counts),
        lambda losses, counts: math.exp(sum(losses) / len(losses)),
        lambda losses, counts: _mean([math.exp(loss) for loss in losses], counts),
        lambda losses, counts: sum(map(math.exp, losses)) / len(losses),
        lambda losses, counts: 2 ** _mean(losses, counts),
    ],
    "smoothed_gradient": [
        lambda logits, targets, share: _gradient(logits, targets, share) * len(logits),
        lambda logits, targets, share: -_gradient(logits, targets, share),
        lambda logits, targets, share: _gradient(logits, targets, 0.0),
        lambda logits, targets, share: _gradient(logits, targets, share, rest=0.0),
        _others_only,
        lambda logits, targets, share: (logits - F.one_hot(targets, 5) * (1 - share) - share / 5) / len(logits),
    ],
}
