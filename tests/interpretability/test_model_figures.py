"""Figures of a model show the numbers of the functions they draw."""

import math
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from figure_harness import merged_strengths, parts, texts, tooltip_values, tooltips
from glassgpt.config.model import ModelConfig
from glassgpt.interpretability.capture import ActivationCache, attention_overview, capture
from glassgpt.interpretability.figures import attribution, head, head_scores, heads, lens
from glassgpt.interpretability.head_scores import HEAD_TYPES
from glassgpt.interpretability.logit_lens import logit_attribution, logit_lens
from glassgpt.model.gpt import GPT
from glassgpt.tokenizers.builtin import BytesTokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.formatting import escape_token
from play_harness import WINDOWED
from slot_harness import random_model

TEXT = " the cat\n"
TOKENS = list(TEXT)


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model(ModelConfig.from_dict({**WINDOWED, "vocab_size": BytesTokenizer().vocab_size})).float()


@pytest.fixture(scope="module")
def cache(model: GPT) -> ActivationCache:
    ids = torch.as_tensor(BytesTokenizer().encode(TEXT))[None].long()
    with torch.no_grad(), capture(model) as cache:
        model(ids)
    return cache


def test_all_heads_are_drawn(cache: ActivationCache) -> None:
    patterns, entropies, _ = attention_overview(cache)
    figure = heads(cache)
    pictures = [group for group in parts(figure, "g") if len(group) and group[0].tag.endswith("title")]
    drawn = np.array([merged_strengths(picture, (len(TEXT), len(TEXT))) for picture in pictures])
    np.testing.assert_allclose(drawn, patterns.flatten(0, 1), atol=0.53 / 12)
    bits = [float(tip.split()[-2]) for tip in tooltips(figure)]
    np.testing.assert_allclose(bits, entropies.flatten(), atol=0.006)


def test_a_head_shows_its_weights_and_hatches_what_it_cannot_see(cache: ActivationCache) -> None:
    figure = head(cache, 1, 2, TOKENS)
    expected = cache.layers[1].pattern(2)[0].masked_fill(~cache.layers[1].mask, -math.inf)
    np.testing.assert_allclose(tooltip_values(figure), expected.flatten(), atol=0.006)
    assert texts(figure).count("␣") == 4  # two spaces, as rows and as columns


def test_the_lens_shows_tokens_and_probabilities(model: GPT, cache: ActivationCache) -> None:
    values = logit_lens(model, cache, start=2, stop=6)
    shown = texts(lens(values, TOKENS[2:6], BytesTokenizer()))
    cells = [
        text
        for ids, p in zip(values.top_ids[..., 0].T.tolist(), values.top_p[..., 0].T.tolist(), strict=True)
        for i, q in zip(ids, p, strict=True)
        for text in (escape_token(bytes([i])), f"{q:.2f}")
    ]
    start = shown.index(TOKENS[5], shown.index("L2")) + 1
    assert shown[start : start + len(cells)] == cells


def test_bars_of_an_attribution_sum_to_the_logit(model: GPT, cache: ActivationCache) -> None:
    for against in (None, 100):
        result = logit_attribution(model, cache, 5, token=99, against=against)
        for count in (3, 12, 1000):
            figure = attribution(result, count)
            assert len(parts(figure, "rect")) == min(count + 1, len(result.parts))
            total = result.logit - (result.against_logit or 0)
            assert sum(tooltip_values(figure)) == pytest.approx(total, abs=1e-3)
    assert result._repr_html_() == str(attribution(result))


def test_head_scores_are_drawn_by_type() -> None:
    scores = torch.rand(4, 3, 2)
    figure = head_scores(scores)
    values = [
        value for svg in parts(figure, "svg") for value in tooltip_values(ElementTree.tostring(svg, encoding="unicode"))
    ]
    np.testing.assert_allclose(values, scores.flatten(), atol=0.006)
    assert [text for text in texts(figure) if text in HEAD_TYPES] == list(HEAD_TYPES)


def test_a_cache_shows_itself(model: GPT, cache: ActivationCache) -> None:
    assert str(heads(cache)) in cache._repr_html_()
    assert f"tokens {len(TEXT)}" in cache._repr_html_()
    with capture(model) as empty:
        pass
    assert "<svg" not in empty._repr_html_()


def test_wrong_tokens_and_places_are_refused(model: GPT, cache: ActivationCache) -> None:
    with pytest.raises(UserError, match="2 tokens and 9 keys"):
        head(cache, 0, 0, ["a", "b"])
    with pytest.raises(UserError, match="layer 3"):
        head(cache, 3, 0, TOKENS)
    with pytest.raises(UserError, match="head 4"):
        head(cache, 0, 4, TOKENS)
    with pytest.raises(UserError, match="1 tokens and 9 positions"):
        lens(logit_lens(model, cache), ["a"], BytesTokenizer())
