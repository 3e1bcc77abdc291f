"""Lesson 16: its functions against PyTorch and the library, on a model with random weights, without training."""

import pytest
import torch
import torch.nn.functional as F

from glassgpt.config.model import ModelConfig
from glassgpt.learn.catalog import find_lesson
from glassgpt.model.gpt import GPT
from glassgpt.model.loss import IGNORED
from glassgpt.tokenizers.builtin import BytesTokenizer
from lesson_harness import load

LESSON = load(find_lesson("16").path)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> GPT:
    """The lesson's base model, replaced by one of bytes with random weights."""
    config = ModelConfig(vocab_size=256, context_length=64, n_layer=1, n_head=2, n_embd=16, tied_head=False)
    base = GPT.create(config, seed=0)
    monkeypatch.setattr(LESSON, "trained_model", lambda: (base, BytesTokenizer()))
    return base


@pytest.mark.parametrize("answers_only", [True, False])
def test_masked_loss_is_that_of_torch_and_of_the_library(model: GPT, answers_only: bool) -> None:
    wider = LESSON.with_special_tokens(model)
    inputs, targets = LESSON.chats(["cat", "table", "window"], answers_only)
    with torch.no_grad():
        logits, library = wider(inputs), wider(inputs, targets)
    ours = LESSON.masked_loss(logits, targets)
    torch.testing.assert_close(ours, library)
    torch.testing.assert_close(ours, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED))


def test_new_ids_do_not_change_the_other_logits(model: GPT) -> None:
    ids = torch.arange(256).view(4, 64)
    with torch.no_grad():
        before, after = model(ids), LESSON.with_special_tokens(model)(ids)
    assert after.shape == (4, 64, 259)
    assert torch.equal(after[..., :256], before)


def test_only_the_answer_and_the_end_count(model: GPT) -> None:
    inputs, targets = LESSON.chats(["cat", "table"], answers_only=True)
    user, assistant, end = 256, 257, 258
    for row, goal, word in zip(inputs.tolist(), targets.tolist(), ["cat", "table"], strict=True):
        place = row.index(assistant)
        assert bytes(row[1:place]) == f"Last letter of {word}?".encode()
        assert [t for t in goal if t != IGNORED] == [ord(word[-1]), end]
        assert goal[place : place + 2] == [ord(word[-1]), end]
    _, everything = LESSON.chats(["cat", "table"], answers_only=False)
    assert user not in everything
    assert (everything != IGNORED).sum(dim=1).tolist() == [
        len(f"Last letter of {word}?") + 3 for word in ("cat", "table")
    ]


def test_continuing_stops_after_the_end(model: GPT) -> None:
    wider = LESSON.with_special_tokens(model)
    with torch.no_grad():
        wider.head.weight[258] = 1e3 * wider.hidden(torch.tensor([[65]]))[0, -1]
    assert LESSON.written(wider, [65]) == "<|end|>"
    assert len(LESSON.written(model, [65], 5)) <= 5
