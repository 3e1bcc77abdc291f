"""Lesson 15: its functions against the library, on a model with random weights, without training."""

import pytest
import torch

from glassgpt.config.recipes import recipe
from glassgpt.interpretability.capture import ActivationCache, capture
from glassgpt.interpretability.head_scores import HEAD_TYPES, pattern_scores
from glassgpt.interpretability.logit_lens import logit_attribution, logit_lens
from glassgpt.learn.catalog import find_lesson
from glassgpt.model.gpt import GPT
from lesson_harness import load

LESSON = load(find_lesson("15").path)


@pytest.fixture(scope="module")
def captured() -> tuple[GPT, ActivationCache]:
    model = GPT.create(recipe("induction", model={"vocab_size": 27}).model, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # the recipe starts with outputs of zero
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        with capture(model) as cache:
            model(LESSON.repeated_strings(3))
    return model, cache


def test_strings_repeat_different_letters() -> None:
    for once, again in LESSON.repeated_strings().unflatten(1, (2, LESSON.PERIOD)).tolist():
        assert once == again
        assert len(set(once)) == len(once)
        assert set(once) <= set(range(1, 27))


def test_repeat_probability_of_a_sure_model_is_one_from_the_second_letter_on() -> None:
    ids = LESSON.repeated_strings(5)
    logits = 100 * torch.nn.functional.one_hot(ids.roll(-1, dims=1), 27).float()
    logits[:, : LESSON.PERIOD] = 0
    assert LESSON.repeat_probability(logits, ids) == pytest.approx(1.0)


def test_streams_are_read_as_by_the_logit_lens(captured: tuple[GPT, ActivationCache]) -> None:
    model, cache = captured
    lens = logit_lens(model, cache, k=27)
    for depth, x in enumerate(cache.residual_stream):
        p = LESSON.read_stream(model, x[0])
        assert torch.allclose(p.gather(1, lens.top_ids[depth]), lens.top_p[depth], atol=1e-5)


@pytest.mark.parametrize("position", [0, 7, 31])
def test_contributions_are_those_of_the_library(captured: tuple[GPT, ActivationCache], position: int) -> None:
    model, cache = captured
    expected = logit_attribution(model, cache, position, 5)
    terms = LESSON.contributions(model, cache, position, 5)
    assert terms == pytest.approx([part.value for part in expected.parts], abs=1e-5)
    assert sum(terms) == pytest.approx(expected.logit, abs=1e-4)


def test_weights_are_the_scores_of_the_library(captured: tuple[GPT, ActivationCache]) -> None:
    pattern = captured[1].layers[1].pattern(head=0)
    scores = pattern_scores(pattern, LESSON.PERIOD).mean(dim=1)
    for name, distance in (("previous token", 1), ("induction", LESSON.PERIOD - 1)):
        expected = scores[HEAD_TYPES.index(name)].item()
        assert LESSON.weight_back(pattern, distance) == pytest.approx(expected, abs=1e-6)


def test_patterns_are_those_of_the_library(captured: tuple[GPT, ActivationCache]) -> None:
    layer = captured[1].layers[1]
    assert torch.allclose(LESSON.pattern_of(layer.rot_q, layer.rot_k), layer.pattern(head=0), atol=1e-5)
