"""Sampling: distributions and draws equal numbers computed by hand."""

from typing import Any

import pytest
import torch

from glassgpt.config.schema import SamplingConfig
from glassgpt.generation.generate import draw, sampling_distribution
from glassgpt.utils.errors import UserError

# Probabilities 0.4, 0.3, 0.2 and 0.1, in another order.
LOGITS = torch.tensor([[0.2, 0.4, 0.1, 0.3]]).log()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, [2, 4, 1, 3]),
        ({"temperature": 0.5}, [4, 16, 1, 9]),  # a temperature of 0.5 squares probabilities
        ({"temperature": 2.0}, [2**0.5, 4**0.5, 1, 3**0.5]),
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 1e-40}, [0, 1, 0, 0]),
        ({"temperature": 1e-300}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_k": 2}, [0, 4, 0, 3]),
        ({"temperature": 1.0, "top_k": 4}, [2, 4, 1, 3]),
        ({"temperature": 1.0, "top_k": 50}, [2, 4, 1, 3]),  # top_k exceeds the number of tokens
        ({"temperature": 1.0, "top_p": 0.65}, [0, 4, 0, 3]),  # 0.4 + 0.3 is at least 0.65
        ({"temperature": 1.0, "top_p": 0.75}, [2, 4, 0, 3]),
        ({"temperature": 1.0, "top_p": 0.01}, [0, 4, 0, 0]),  # the most likely token always stays
        ({"temperature": 1.0, "top_p": 1e-300}, [0, 4, 0, 0]),
        ({"temperature": 1.0, "top_p": 1.0}, [2, 4, 1, 3]),
        ({"temperature": 1.0, "min_p": 0.45}, [2, 4, 0, 3]),  # at least 0.45 x 0.4 = 0.18
        ({"temperature": 1.0, "min_p": 0.55}, [0, 4, 0, 3]),
        ({"temperature": 1.0, "min_p": 1.0}, [0, 4, 0, 0]),
        # Temperature applies first: 16/30 + 9/30 = 0.83; without it three tokens would stay.
        (
            {"temperature": 0.5, "top_p": 0.8},
            [0, 16, 0, 9],
        ),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.7}, [0, 4, 0, 3]),  # top-k applies first: 4/9 + 3/9 = 0.78
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.9, "min_p": 0.6}, [0, 4, 0, 3]),
    ],
    ids=str,
)
def test_the_sampling_distribution_equals_one_by_hand(settings: dict[str, Any], expected: list[float]) -> None:
    """float32 probabilities agree to 1e-6. A second row, reversed, checks that rows are independent."""
    logits = torch.cat([LOGITS, LOGITS.flip(-1) + 7])
    weights = torch.tensor([expected, expected[::-1]])
    torch.testing.assert_close(
        sampling_distribution(logits, SamplingConfig(**settings)),
        weights / weights.sum(-1, keepdim=True),
        atol=1e-6,
        rtol=0,
    )


def test_top_k_keeps_ties_at_the_threshold() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]])
    kept = sampling_distribution(logits, SamplingConfig(top_k=2)) > 0
    assert kept.tolist() == [[True, False, True, True, False]]


def test_draws_follow_the_distribution() -> None:
    """Of 20,000 draws, each share is within 4 standard deviations, and tokens of probability 0 are never drawn."""
    p = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    drawn = draw(p.expand(20_000, -1), torch.Generator().manual_seed(0))
    shares = drawn.bincount(minlength=6) / 20_000
    assert ((shares - p).abs() <= 4 * (p * (1 - p) / 20_000).sqrt()).all()


@pytest.mark.parametrize("share", [0.0, 1 - 2**-53])
def test_the_smallest_and_largest_random_numbers_never_draw_a_token_of_probability_0(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, share, dtype=torch.float64))
    p = torch.tensor([[0.0, 0.3, 0.7, 0.0], [0.0, 0.0, 1.0, 0.0]])
    assert draw(p, torch.Generator()).tolist() == [2 if share else 1, 2]


def test_non_finite_probabilities_are_an_error() -> None:
    with pytest.raises(UserError, match="not finite"):
        draw(torch.tensor([[0.5, float("nan"), 0.5]]), torch.Generator())
