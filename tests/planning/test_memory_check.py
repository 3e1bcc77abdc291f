"""Whether a run fits: bounds, the micro-batch that does, and refusals before the first step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glassgpt.config.recipes import recipe
from glassgpt.config.schema import TrainConfig
from glassgpt.distributed.group import Ranks
from glassgpt.model.gpt import GPT
from glassgpt.planning import memory_check as room
from glassgpt.planning.memory import memory_a_rank
from glassgpt.planning.memory_check import at_most, check_memory, largest_micro_batch
from glassgpt.training.run import train
from glassgpt.utils.errors import UserError
from kill_harness import Quiet, tiny_config, write_text

CPU = torch.device("cpu")
GPT2 = recipe("gpt2", model={"vocab_size": 50257}, batch_tokens=16 * 1024, device="cpu")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": {"attention": "explicit"}},
        {"model": {"dropout": 0.1}},
        {"model": {"window": 256, "window_globals": 4}},
        {"model": {"activation": "swiglu", "norm": "rmsnorm", "position": "rope", "qk_norm": True, "bias": False}},
        {"model": {"n_layer": 1, "n_embd": 96, "n_inner": 5000}},
        {"optim": {"name": "muon"}, "micro_batch_size": 1},
        {"activation_checkpointing": "selective"},
    ],
    ids=str,
)
def test_the_bound_is_above_the_need(changes: dict[str, Any], precision: str) -> None:
    """Else a run that does not fit would be let through unseen."""
    config = GPT2.override(batch_tokens=4 * 1024).override(**changes)
    for processes, strategy in ((1, "ddp"), (2, "fsdp")):
        assert at_most(config, processes) > memory_a_rank(config, processes, strategy, precision).total


@given(st.integers(1, 200), st.floats(0, 300), st.floats(0, 30))
def test_the_largest_micro_batch_is_that_of_a_search(share: int, free: float, gradients: float) -> None:
    """Of all even divisions, with a need that grows with the micro-batch, and by the gradients where there are several."""
    config = GPT2.override(batch_tokens=share * 1024)

    def need(changed: TrainConfig) -> float:
        return changed.micro_batch_size + (gradients if changed.micro_batch_size < share else 0)

    sizes = {-(-share // steps) for steps in range(1, share + 1)}
    expected = max((size for size in sizes if need(config.override(micro_batch_size=size)) <= free), default=None)
    assert largest_micro_batch(config, 1, need, free) == expected


def has(bytes_free: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available_memory", lambda device, swap=False: int(bytes_free))


def test_a_run_is_refused_with_the_micro_batch_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 GB: the state of GPT-2 is 2.0, and with one sequence an update needs 3.0."""
    has(5e9, monkeypatch)
    with pytest.raises(
        UserError, match=r"needs 11\.64 GB, and this machine has 5\.00 GB free; --micro-batch-size (\d+) fits"
    ) as error:
        check_memory(GPT2, Ranks(), CPU, "float32")
    size = int(str(error.value).split("--micro-batch-size ")[1].split()[0])
    check_memory(GPT2.override(micro_batch_size=size), Ranks(), CPU, "float32")
    assert memory_a_rank(GPT2.override(micro_batch_size=size), 1, "ddp", "float32").total < 5e9
    assert memory_a_rank(GPT2.override(micro_batch_size=2 * size), 1, "ddp", "float32").total > 0.9 * 5e9


def test_what_fits_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    need = memory_a_rank(GPT2, 1, "ddp", "float32").total
    has(need, monkeypatch)
    check_memory(GPT2, Ranks(), CPU, "float32")
    model = GPT(GPT2.model)  # whose weights are there already, and so no longer free
    has(need - 4 * sum(p.numel() for p in model.parameters()), monkeypatch)
    check_memory(GPT2, Ranks(), CPU, "float32", model)
    has(0.94 * need, monkeypatch)
    with pytest.raises(UserError, match="does not fit"):
        check_memory(GPT2, Ranks(), CPU, "float32")


@pytest.mark.parametrize(
    ("kind", "way"), [("none", "--activation-checkpointing full, or a smaller"), ("full", "Take a smaller model")]
)
def test_where_nothing_fits_that_is_said(kind: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    has(1e9, monkeypatch)
    with pytest.raises(UserError, match=rf"no micro-batch does: .* alone are 1\.99 GB\. .*{way}"):
        check_memory(GPT2.override(activation_checkpointing=kind), Ranks(), CPU, "float32")


def test_a_compiled_run_is_refused_only_for_what_no_compiler_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    need = memory_a_rank(GPT2, 1, "ddp", "float32").total
    has(0.9 * need, monkeypatch)
    check_memory(GPT2.override(compile="on"), Ranks(), CPU, "float32")
    has(0.2 * need, monkeypatch)
    with pytest.raises(UserError, match="does not fit"):
        check_memory(GPT2.override(compile="on"), Ranks(), CPU, "float32")


def test_a_small_model_pays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    has(8e9, monkeypatch)
    monkeypatch.setattr(room, "memory_a_rank", None)
    check_memory(recipe("shakespeare-cpu", model={"vocab_size": 65}), Ranks(), CPU, "float32")


def test_a_machine_that_does_not_tell_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available_memory", lambda device, swap=False: None)
    check_memory(GPT2, Ranks(), torch.device("mps"), "float32")


def test_training_says_so_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has(50_000, monkeypatch)
    config = tiny_config(write_text(tmp_path / "text.txt"))
    with pytest.raises(UserError, match="this run does not fit: an update needs"):
        train(config, tmp_path / "run", progress=Quiet())
    assert not (tmp_path / "run").exists()
