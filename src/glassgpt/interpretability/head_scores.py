"""Known kinds of attention heads, found by what they do with random tokens that come twice.

Such a text has no meaning to tell heads by, only who stands where: `p` different tokens drawn from all of the vocabulary, and the
same again. A row t of the second half has a first occurrence of its token at t - p, so that what a head looks at can be named.

Shapes: `B` texts, `L` layers, `H` heads, `T` tokens.
"""

import torch
from torch import Tensor

from glassgpt.interpretability.capture import capture
from glassgpt.model.gpt import GPT
from glassgpt.utils.rng import generator_for

KINDS = ("previous token", "duplicate token", "induction", "first-token sink")
# Different tokens in a text, each of which comes twice. A head that looks at all alike scores about 1 / (1.5 * PERIOD) on each kind.
PERIOD = 32
TEXTS = 4


def repeated_tokens(vocab_size: int, context_length: int, seed: int) -> tuple[Tensor, int]:
    """Texts (B, 2 p) of p different ids that come twice, and p: `PERIOD`, or what vocabulary and context leave room for."""
    period = max(1, min(PERIOD, context_length // 2, vocab_size))
    generator = generator_for(seed, "head kinds")
    once = torch.stack([torch.randperm(vocab_size, generator=generator)[:period] for _ in range(TEXTS)])
    return once.repeat(1, 2)[:, :context_length], period


def kinds_of(weights: Tensor, period: int) -> Tensor:
    """Scores (4, ...) of attention weights (..., T, T) on a text with that period, in the order of `KINDS`.

    A score is the mean over the rows t = p + 1 to 2 p - 1 of the weight on one earlier token:

        previous token     w[t, t - 1]
        duplicate token    w[t, t - p]        the first occurrence of the same token
        induction          w[t, t - p + 1]    the token that followed it (Olsson et al., 2022)
        first-token sink   w[t, 0]            where a head rests that has nothing to say (Xiao et al., 2023)

    In these rows the four are four different tokens (from p = 3 on), so that a head's scores sum to 1 at most. What a window hides has
    weight 0; where there are no such rows, as with a context of fewer than 4 tokens, all scores are 0.
    """
    rows = torch.arange(weights.shape[-1], device=weights.device)[period + 1 : 2 * period]
    targets = (rows - 1, rows - period, rows - period + 1, torch.zeros_like(rows))
    sums = torch.stack([weights[..., rows, target].sum(dim=-1) for target in targets])
    return sums / max(1, len(rows))


@torch.no_grad()
def head_kinds(model: GPT, seed: int = 0) -> Tensor:
    """Scores (4, L, H) of each head in the order of `KINDS`, 0 to 1: the mean over a few texts made from the seed; see `kinds_of`.

    Without dropout, in whatever mode the model is: it is left in that.
    """
    ids, period = repeated_tokens(model.vocab_size, model.config.context_length, seed)
    was_training = model.training
    model.eval()  # dropout would blur what is looked for
    try:
        with capture(model) as seen:
            model.hidden(ids.to(model.embedding.weight.device))
    finally:
        model.train(was_training)
    return torch.stack([kinds_of(layer.weights(), period).mean(dim=1) for layer in seen.layers], dim=1)
