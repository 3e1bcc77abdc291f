"""Find known types of attention heads by what they do with random tokens that are repeated once.

Such a text has no meaning, only positions: `p` different tokens drawn from the whole vocabulary, twice. A row t of the
second half has an earlier occurrence of its token at t - p, so what a head attends to can be named.

Shapes: `B` texts, `L` layers, `H` heads, `T` tokens.
"""

import torch
from torch import Tensor

from glassgpt.generation.inference import evaluation_mode
from glassgpt.interpretability.capture import capture
from glassgpt.model.gpt import GPT
from glassgpt.utils.arguments import check_arguments
from glassgpt.utils.rng import generator_for

HEAD_TYPES = ("previous token", "duplicate token", "induction", "first-token sink")
PERIOD = 32  # tokens before the repetition; a head that attends to all alike scores about 1 / (1.5 * PERIOD)
TEXTS = 4


@check_arguments
def repeated_tokens(vocab_size: int, context_length: int, seed: int) -> tuple[Tensor, int]:
    """Texts (B, 2 p) of p different ids, repeated once, and p: `PERIOD`, or less for a small vocabulary or context."""
    period = max(1, min(PERIOD, context_length // 2, vocab_size))
    generator = generator_for(seed, "head kinds")  # its old name: scores of earlier versions stay comparable
    once = torch.stack([torch.randperm(vocab_size, generator=generator)[:period] for _ in range(TEXTS)])
    return once.repeat(1, 2)[:, :context_length], period


@check_arguments
def pattern_scores(pattern: Tensor, period: int) -> Tensor:
    """Scores (4, ...) of attention patterns (..., T, T) on a text with that period, in the order of `HEAD_TYPES`.

    A score is the mean over the rows t = p + 1 to 2 p - 1 of the weight on one earlier token:

        previous token     w[t, t - 1]
        duplicate token    w[t, t - p]        the first occurrence of the same token
        induction          w[t, t - p + 1]    the token that followed it (Olsson et al., 2022)
        first-token sink   w[t, 0]            where a head rests (Xiao et al., 2023)

    From p = 3 on these are four different tokens, so a head's scores sum to 1 at most. A token outside the window has
    weight 0. With a context of fewer than 4 tokens there are no such rows, and all scores are 0.
    """
    rows = torch.arange(pattern.shape[-1], device=pattern.device)[period + 1 : 2 * period]
    targets = (rows - 1, rows - period, rows - period + 1, torch.zeros_like(rows))
    sums = torch.stack([pattern[..., rows, target].sum(dim=-1) for target in targets])
    return sums / max(1, len(rows))


@check_arguments
@torch.no_grad()
def head_scores(model: GPT, seed: int = 0) -> Tensor:
    """Scores (4, L, H) of each head, 0 to 1 (see `pattern_scores`): the mean over texts drawn from the seed."""
    ids, period = repeated_tokens(model.vocab_size, model.config.context_length, seed)
    with evaluation_mode(model), capture(model) as cache:
        model.hidden(ids.to(model.embedding.weight.device))
    return torch.stack([pattern_scores(layer.pattern(), period).mean(dim=1) for layer in cache.layers], dim=1)
