"""Head scores of hand-made attention patterns and models."""

import pytest
import torch
from torch import Tensor

from glassgpt.config.model import ModelConfig
from glassgpt.interpretability.capture import capture
from glassgpt.interpretability.head_scores import HEAD_TYPES, head_scores, pattern_scores, repeated_tokens
from glassgpt.model.gpt import GPT
from slot_harness import TINY, random_model


def attending_to(target: list[int]) -> Tensor:
    """Return the pattern (T, T) of a head whose row t attends only to target[t]."""
    return torch.eye(len(target))[target]


def test_scores_of_hand_made_patterns() -> None:
    """Four heads have one type each, one head is half of each of two types, and one has uniform attention."""
    p, T = 5, 10
    heads = [
        attending_to([max(0, t - 1) for t in range(T)]),
        attending_to([max(0, t - p) for t in range(T)]),
        attending_to([max(0, t - p + 1) for t in range(T)]),
        attending_to([0] * T),
    ]
    uniform = torch.ones(T, T).tril()
    heads += [(heads[0] + heads[2]) / 2, uniform / uniform.sum(-1, keepdim=True)]
    scores = pattern_scores(torch.stack(heads), p)
    torch.testing.assert_close(scores[:, :4], torch.eye(4))
    torch.testing.assert_close(scores[:, 4], torch.tensor([0.5, 0.0, 0.5, 0.0]))
    torch.testing.assert_close(scores[:, 5], torch.full((4,), sum(1 / n for n in range(7, 11)) / 4))


def test_repeated_tokens_are_two_equal_halves_of_distinct_tokens() -> None:
    ids, period = repeated_tokens(1000, 1024, seed=0)
    assert (period, ids.shape[1]) == (32, 64)
    for row in ids:
        assert torch.equal(row[:32], row[32:])
        assert len(set(row.tolist())) == 32
    assert torch.equal(ids, repeated_tokens(1000, 1024, seed=0)[0])
    assert not torch.equal(ids, repeated_tokens(1000, 1024, seed=1)[0])
    assert repeated_tokens(3, 1024, seed=0)[0].shape[1] == 6
    assert repeated_tokens(1000, 9, seed=0)[0].shape[1] == 8
    assert repeated_tokens(1000, 1, seed=0)[0].shape[1] == 1


@torch.no_grad()
def hand_made_head(offset: int | None, **changes: object) -> GPT:
    """Return a model with one layer and one head that attends `offset` positions back.

    Keys are one-hot positions, and the query of position t is the one-hot position t - offset.

    If `offset` is None, the head compares tokens: queries and keys are one-hot tokens, so it attends to the earlier
    equal token and to the token itself. The residual stream is [one-hot token | one-hot position].
    """
    V, T = 8, 16
    config = ModelConfig(
        vocab_size=V,
        context_length=T,
        n_layer=1,
        n_head=1,
        n_embd=V + T,
        norm="rmsnorm",
        bias=False,
        **changes,  # type: ignore[arg-type]
    )
    model = GPT.create(config, seed=0)
    for parameter in model.parameters():
        parameter.zero_()
    model.embedding.weight[:, :V] = torch.eye(V)
    model.get_parameter("positions.table.weight")[:, V:] = torch.eye(T)
    for name in ("blocks.0.attention_norm.weight", "blocks.0.feed_forward_norm.weight", "norm.weight"):
        model.get_parameter(name).fill_(1)
    q, k, _ = model.get_parameter("blocks.0.attention.qkv.weight").chunk(3)
    if offset is None:
        q[:V, :V], k[:V, :V] = 30 * torch.eye(V), torch.eye(V)
    else:
        k[V:, V:] = torch.eye(T)
        q[V:, V:] = 30 * torch.diag(torch.ones(T - offset), -offset).T
    return model.eval()


@pytest.mark.parametrize(
    ("offset", "kind", "score"),
    [(1, "previous token", 1.0), (8, "duplicate token", 1.0), (7, "induction", 1.0), (None, "duplicate token", 0.5)],
)
def test_scores_of_hand_made_models(offset: int | None, kind: str, score: float) -> None:
    """Scores agree to 0.01: a softmax over scores up to 30 x 12 / sqrt(24) leaves almost nothing for other tokens."""
    scores = head_scores(hand_made_head(offset))
    expected = [score if name == kind else 0.0 for name in HEAD_TYPES]
    assert scores.flatten().tolist() == pytest.approx(expected, abs=0.01)


def test_tokens_outside_the_window_have_score_0() -> None:
    """With a window of 4, a head that attends 8 positions back scores 0; one that attends 1 position back scores 1."""
    assert head_scores(hand_made_head(8, window=4)).flatten().tolist()[1] == 0
    assert head_scores(hand_made_head(1, window=4)).flatten().tolist()[0] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    "changes", [{}, {"context_length": 1}, {"context_length": 3}, {"vocab_size": 2, "n_kv_head": 2, "window": 2}]
)
def test_scores_are_shares_of_attention_for_any_model(changes: dict[str, int]) -> None:
    """With any vocabulary and context length, each score is from 0 to 1, and the four sum to at most 1."""
    model = random_model(ModelConfig(**(TINY | changes)))
    scores = head_scores(model)
    assert scores.shape == (4, 2, 4)
    assert bool(((scores >= 0) & (scores <= 1)).all())
    if not changes:
        assert bool((scores.sum(dim=0) <= 1 + 1e-12).all())
        assert bool((scores > 0).all())


def test_a_score_is_the_mean_over_the_texts() -> None:
    """Scores equal the mean over separate passes, one per text, within float64's rounding."""
    model = random_model(ModelConfig(**TINY))
    texts, period = repeated_tokens(model.vocab_size, 10, seed=0)
    by_text = []
    for text in texts:
        with torch.no_grad(), capture(model) as cache:
            model(text[None])
        by_text.append(torch.stack([pattern_scores(layer.pattern()[0], period) for layer in cache.layers], dim=1))
    assert not torch.allclose(by_text[0], by_text[1], rtol=0.01)
    torch.testing.assert_close(head_scores(model), sum(by_text) / len(by_text))


def test_dropout_is_disabled_and_the_mode_is_restored() -> None:
    model = random_model(ModelConfig(**TINY, dropout=0.5))
    expected = head_scores(model)
    for training in (True, False):
        model.train(training)
        assert torch.equal(head_scores(model), expected)
        assert model.training == training
        assert model.blocks[0].training == training
