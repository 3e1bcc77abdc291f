"""Parameter groups: every parameter is in one, and a run records the norms of its weights and gradients by group."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from glassgpt.config.schema import TrainConfig
from glassgpt.data.training_data import open_training_data
from glassgpt.distributed.group import Ranks
from glassgpt.model.gpt import GPT
from glassgpt.model.param_groups import PARAM_GROUPS, param_groups
from glassgpt.runs.checkpoint import checkpoint_paths
from glassgpt.training.progress import SilentProgress
from glassgpt.training.run import train
from glassgpt.training.setup import setup_training
from glassgpt.training.step import start_update
from kill_harness import Quiet, fast_training, records_of, tiny_config
from slot_harness import SLOTS, combined

# Groups by the names of saved weights, independent of the package's modules.
GROUP_OF_NAME = {
    "embedding": "embedding",
    "positions": "positions",
    "attention": "attention",
    "feed_forward": "feed_forward",
    "head": "head",
}


def group_of(name: str) -> str:
    """Return the group of a saved weight, by its name."""
    words = name.split(".")
    word = words[2] if words[0] == "blocks" else words[0]
    return GROUP_OF_NAME.get(word, "norms")


@pytest.mark.parametrize(("slot", "value"), [(slot, value) for slot, values in SLOTS.items() for value in values])
def test_every_parameter_is_in_one_group(slot: str, value: str) -> None:
    model = GPT.empty(combined({slot: value}))
    groups = param_groups(model)
    assert sorted(id(p) for in_group in groups.values() for p in in_group) == sorted(id(p) for p in model.parameters())
    assert groups.keys() <= PARAM_GROUPS.keys()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)]: group for group, in_group in groups.items() for p in in_group} == {
        name: group_of(name) for name in names.values()
    }


@pytest.mark.parametrize("changes", [{}, {"model": {"tied_head": False, "position": "rope", "qk_norm": True}}], ids=str)
def test_a_run_records_the_norms_of_its_weights_and_of_the_gradient_before_clipping(
    tmp_path: Path, text: Path, changes: dict[str, Any]
) -> None:
    """Expected weight norms are float64 sums over the saved weights; gradient norms sum to the record's gradient norm.

    A float32 sum of 16,000 squares is exact to 1e-5.
    """
    config = tiny_config(text, optim={"grad_clip": 1e-3}, **changes)
    with fast_training():
        run = train(config, tmp_path / "run", progress=Quiet())
    records = records_of(run)
    evaluations = {record["step"]: record for record in records if "val_loss" in record}
    updates = {record["step"]: record for record in records if "loss" in record}
    assert list(evaluations) == [0, 5, 10]
    assert "grad_norms" not in evaluations[0]
    for path in checkpoint_paths(run / "checkpoints"):
        squares: dict[str, float] = defaultdict(float)
        for name, weight in safetensors.torch.load_file(path / "model.safetensors").items():
            squares[group_of(name)] += float(weight.double().square().sum())
        record = evaluations[int(path.name)]
        assert record["weight_norms"] == pytest.approx(
            {group: math.sqrt(square) for group, square in squares.items()}, rel=1e-5
        )
        assert record["grad_norms"].keys() == record["weight_norms"].keys()
        norm = math.sqrt(sum(norm**2 for norm in record["grad_norms"].values()))
        assert norm == pytest.approx(updates[record["step"]]["grad_norm"], rel=1e-5)
        assert norm > 0.01  # ten times the clipped norm


def test_the_gradient_norm_of_the_embedding_equals_autograds(tmp_path: Path, text: Path) -> None:
    """The first update uses the initial weights. The tolerance of 1e-5 allows for another order of micro-batches."""
    config = tiny_config(text, steps=1)
    with fast_training():
        run = train(config, tmp_path / "run", progress=Quiet())
    (*_, last) = records_of(run)
    config = TrainConfig.from_toml((run / "config.toml").read_text())
    data = open_training_data(config.data, None, print)
    model = GPT.create(config.model, config.seed)
    rows = torch.from_numpy(data.batches(16, config.batch_size, config.seed, config.data.order).batch_at(0))
    loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    (gradient,) = torch.autograd.grad(loss, [model.embedding.weight])
    assert last["grad_norms"]["embedding"] == pytest.approx(float(gradient.double().norm()), rel=1e-5)


def test_group_norms_exclude_the_loss_scale_and_are_computed_only_at_evaluations(text: Path) -> None:
    """The scale is a power of two, so the norms have the same bits."""
    norms = []
    for enabled in (False, True):
        state = setup_training(tiny_config(text, eval_every=2), Ranks(), SilentProgress())
        state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=enabled)
        assert start_update(state, 1e-3).group_norms == {}
        state.step += 1
        norms.append({group: norm.item() for group, norm in start_update(state, 1e-3).group_norms.items()})
    assert norms[0] == norms[1]
    assert norms[0]["embedding"] > 0
