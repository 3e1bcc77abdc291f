"""How much the prediction of a repetition depends on each attention head of a model of recipe `induction`."""

import torch
from torch import Tensor

from glassgpt.interpretability.interventions import Edit, effects
from glassgpt.model.gpt import GPT
from glassgpt.utils.rng import generator_for

TEXTS, PERIOD = 64, 16


def random_texts(vocab_size: int) -> Tensor:
    """Texts (B, 2 p) of p random letters, repeated once. Id 0 is the line break between documents."""
    generator = generator_for(0, "induction")
    return torch.randint(1, vocab_size, (TEXTS, PERIOD), generator=generator).repeat(1, 2)


def repeat_probability(logits: Tensor, ids: Tensor) -> float:
    """Mean probability that logits (B, 2 p, V) give to the tokens of the second half, except its first."""
    p = logits[:, PERIOD:-1].softmax(dim=-1)
    return p.gather(-1, ids[:, PERIOD + 1 :, None]).mean().item()


def ablate_each_head(model: GPT) -> tuple[float, Tensor]:
    """The mean probability of the repeated tokens, and (L, H) what it falls to when one head's output is zero."""
    ids, shape = random_texts(model.vocab_size), (model.config.n_layer, model.config.n_head)
    before, after = 0.0, torch.empty(shape)
    for layer, head in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        logits = effects(model, ids, [Edit("head", layer=layer, head=head)])
        before = repeat_probability(logits.before, ids)
        after[layer, head] = repeat_probability(logits.after, ids)
    return before, after
