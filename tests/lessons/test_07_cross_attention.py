"""Lesson 7: its functions against PyTorch, and its language, without training."""

import torch

from glassgpt.learn.catalog import find_lesson
from glassgpt.model.loss import IGNORED
from lesson_harness import load

LESSON = load(find_lesson("7").path)


def test_alignment_leads_from_each_word_to_its_source() -> None:
    for source, target, places in LESSON.corpus(200):
        assert sorted(places) == list(range(len(source)))
        assert [source[place][::-1] for place in places] == target


def test_one_head_of_pytorch_gives_the_same() -> None:
    model = LESSON.new_translator(0)
    x, memory = torch.randn(2, 1, 5, 32, generator=torch.Generator().manual_seed(0))
    ours, weights = LESSON.attend(model, "cross", x, memory[:, :4], torch.tensor(True))
    reference = torch.nn.MultiheadAttention(32, 1, bias=False, batch_first=True)
    reference.in_proj_weight.data = torch.cat([model[f"cross_{role}"].weight for role in "qkv"])
    reference.out_proj.weight.data = model["cross_o"].weight
    keys = LESSON.norm(memory[:, :4])
    expected, expected_weights = reference(LESSON.norm(x), keys, keys)
    assert torch.allclose(ours, expected, atol=1e-5)
    assert torch.allclose(weights, expected_weights, atol=1e-5)


def test_translators_see_neither_padding_nor_later_target_words() -> None:
    model = LESSON.new_translator(1)
    source, target, _ = LESSON.ids_of(LESSON.corpus(20))
    for mix in (False, True):
        logits, _ = LESSON.translator(model, source, target, mix)
        padded = torch.nn.functional.pad(source, (0, 2))
        assert torch.allclose(LESSON.translator(model, padded, target, mix)[0], logits, atol=1e-5)
        changed = target.clone()
        changed[:, 3:] = LESSON.IDS["sraeh"]
        assert torch.allclose(LESSON.translator(model, source, changed, mix)[0][:, :3], logits[:, :3], atol=1e-5)


def test_only_target_words_are_predicted_in_one_text() -> None:
    pairs = LESSON.corpus(20)
    ids, goals = LESSON.one_text(pairs)
    for row, goal, (source, target, _) in zip(ids, goals, pairs, strict=True):
        assert [LESSON.WORDS[i] for i in goal if i != IGNORED] == [*target, "<end>"]
        assert LESSON.WORDS[row[(goal != IGNORED).int().argmax()]] == "<start>"
        assert [LESSON.WORDS[i] for i in row[: len(source)]] == source
