"""The catalog of runs and models, loaded models, and the cache of captures."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from glassgpt.config.model import ModelConfig
from glassgpt.interpretability.capture import ActivationCache, capture
from glassgpt.model.gpt import GPT
from glassgpt.playground.model_pool import CaptureCache, Catalog, LoadedModel, find_entry, size_in_bytes
from glassgpt.utils.errors import UserError
from kill_harness import edit_state
from play_harness import GPT2_LIKE, serving, write_run


def test_all_runs_of_a_folder_are_listed_and_new_ones_appended(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="runs"):
        Catalog([], tmp_path / "runs")
    for age, name in enumerate(("old", "new")):
        run = write_run(tmp_path / "runs" / name, GPT2_LIKE, steps=(1,) if name == "new" else ())
        os.utime(run.config_path, (1000 + age, 1000 + age))
    (tmp_path / "runs" / "no run").mkdir()
    catalog = Catalog([], tmp_path / "runs")
    assert [(offer["id"], Path(offer["name"]).name, offer["steps"]) for offer in catalog.describe()] == [
        (0, "new", [1]),
        (1, "old", []),
    ]
    write_run(tmp_path / "runs" / "newest", GPT2_LIKE, steps=())
    shutil.rmtree(tmp_path / "runs" / "old")
    assert [(offer["id"], Path(offer["name"]).name) for offer in catalog.describe()] == [(0, "new"), (2, "newest")]
    with pytest.raises(UserError, match="got 3"):
        catalog[3]


def test_references_are_checked_without_loading(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", GPT2_LIKE, steps=(2, 5)).path
    assert find_entry(f"{run}@5").describe(0)["steps"] == [5]
    assert find_entry(f"{run}@best").describe(0)["steps"] == [2]
    assert find_entry(str(run / "checkpoints" / "000005")).run is None
    assert find_entry("gpt2").run is None  # a model of the Hugging Face Hub; it is not downloaded yet
    for wrong, reason in (
        (f"{run}@3", "it has 2, 5 and best"),
        (f"{run}@x", "it has 2, 5 and best"),
        (f"{run}x", "runx"),
        (f"{run}@", "run@"),
        ("", "''"),
    ):
        with pytest.raises(UserError, match=reason):
            Catalog([wrong])
    empty = write_run(tmp_path / "empty", GPT2_LIKE, steps=())
    assert find_entry(str(empty.path)).describe(0)["steps"] == []
    with pytest.raises(UserError, match="checkpoint"):
        find_entry(f"{empty.path}@best")
    (tmp_path / "notes.txt").write_text("no model")
    for nothing in (tmp_path, tmp_path / "notes.txt", tmp_path / "no"):
        with pytest.raises(UserError, match=nothing.name):
            find_entry(str(nothing))


def test_pruned_and_replaced_checkpoints(tmp_path: Path) -> None:
    """A loaded model works after its checkpoint is deleted. A checkpoint that replaces another is loaded again."""
    run = write_run(tmp_path / "run", GPT2_LIKE, steps=(1, 2))
    with serving(run.path) as served:
        first = served.client.answer("next", model=0, step=1, ids=[3])["logits"]
        shutil.rmtree(run.checkpoints / "000001")
        assert served.client.answer("next", model=0, step=1, ids=[3])["logits"].tolist() == first.tolist()
        newest = served.client.answer("next", model=0, ids=[3])["logits"]
        other = write_run(tmp_path / "other", GPT2_LIKE, steps=(9,))
        shutil.rmtree(run.checkpoints / "000002")
        edit_state(shutil.copytree(other.checkpoints / "000009", run.checkpoints / "000002"), step=2)
        replaced = served.client.answer("next", model=0, ids=[3])["logits"]
        assert np.abs(replaced - newest).max() > 1e-3
        (run.checkpoints / "000002" / "model.safetensors").write_bytes(b"damaged")
        os.utime(run.checkpoints / "000002", (1, 1))
        status, answer = served.client.ask("next", model=0, ids=[3])
        assert (status, "is damaged" in answer["error"]) == (400, True)
        shutil.rmtree(run.checkpoints)
        status, answer = served.client.ask("next", model=0, ids=[3])
        assert (status, "no checkpoint" in answer["error"]) == (400, True)


def test_only_a_few_models_stay_in_memory(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", GPT2_LIKE, steps=(1, 2, 3, 4, 5))
    with serving(run.path) as served:
        for step in (1, 2, 3, 4, 5, 4):
            served.client.answer("next", model=0, step=step, ids=[3])
        assert [step for _, step, _ in served.pool._models] == [3, 5, 4]


def test_captures_are_kept_within_a_limit_and_dropped_with_their_model() -> None:
    model = GPT.create(ModelConfig(vocab_size=20, n_layer=2, n_head=2, n_embd=16, context_length=8), seed=0)
    computed: list[int] = []

    def compute() -> ActivationCache:
        computed.append(1)
        with torch.no_grad(), capture(model) as activations:
            model.hidden(torch.zeros(1, 8, dtype=torch.int64))
        return activations

    captures = CaptureCache(max_bytes=size_in_bytes(compute()) * 5 // 2)
    models = [LoadedModel("model", None, model, None, 0.0, captures) for _ in range(2)]
    for key in (1, 2, 1, 3, 1, 2):  # the limit allows two captures
        captures.get(models[0], key, compute)
    assert len(computed) == 1 + 4  # one for the size, then 1, 2 and 3, and 2 again after it was dropped
    captures.get(models[1], 1, compute)
    models.pop(0)
    captures.get(models[0], 1, compute)
    assert [key[0]() for key in captures._kept] == models
