"""Training: what an update computes, what a run records, and what must not move it."""

import itertools
import json
import math
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from glassgpt.config.model import ModelConfig
from glassgpt.config.schema import TrainConfig
from glassgpt.data.batches import Batches
from glassgpt.data.dataset import open_dataset
from glassgpt.data.prepare import prepare
from glassgpt.data.training_data import TrainingData
from glassgpt.distributed.group import Ranks
from glassgpt.distributed.strategies import Strategy
from glassgpt.evaluation.perplexity import evaluate_data
from glassgpt.interop.references import find_checkpoint
from glassgpt.model.gpt import GPT
from glassgpt.model.summary import ModelSummary
from glassgpt.runs.checkpoint import checkpoint_paths
from glassgpt.training import loop
from glassgpt.training import step as update_step
from glassgpt.training.interrupts import Interrupts
from glassgpt.training.optim import OutlierWatch, build_optimizers, lr_at
from glassgpt.training.run import resume, train
from glassgpt.training.setup import TrainState, judge_on_device, setup_training
from glassgpt.training.step import NonFiniteError, Update, start_update
from glassgpt.utils.errors import UserError
from kill_harness import (
    Quiet,
    differences,
    fast_training,
    records_of,
    records_without_measurements,
    tiny_config,
    write_text,
)


@pytest.fixture(autouse=True)
def light() -> Iterator[None]:
    """Nothing here needs the disk's flushes, several threads or the true peak."""
    with fast_training():
        yield


def run_of(config: TrainConfig, out: Path) -> Path:
    return train(config, out, progress=Quiet())


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [record for record in records_of(run) if "loss" in record]


def evaluations_of(run: Path) -> list[dict[str, Any]]:
    return [record for record in records_of(run) if "val_loss" in record]


def last_weights(run: Path) -> bytes:
    return (checkpoint_paths(run / "checkpoints")[-1] / "model.safetensors").read_bytes()


def saved_steps(run: Path) -> list[int]:
    return [int(path.name) for path in checkpoint_paths(run / "checkpoints")]


def tell(monkeypatch: pytest.MonkeyPatch, losses: Sequence[float]) -> None:
    """Have the run's evaluations find these losses."""
    turn = iter(losses)

    def reported(*arguments: Any, **options: Any) -> dict[str, Any]:
        return {**evaluate_data(*arguments, **options), "loss": next(turn)}

    monkeypatch.setattr("glassgpt.training.loop.evaluate_data", reported)


def state_for(config: TrainConfig) -> TrainState:
    """What a run begins with, but with plain gradient descent: after a step at rate 1 the weights tell the gradient."""
    dataset = open_dataset(prepare(config.data))
    config = config.override(model={"vocab_size": dataset.tokenizer.vocab_size})
    model = GPT.create(config.model, config.seed)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(model.parameters(), lr=1.0)]
    batches = Batches([dataset.train], config.model.context_length, config.batch_size, config.seed, config.data.order)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    strategy, outliers = Strategy(model), OutlierWatch(0.0)
    data = TrainingData((dataset,), (1.0,))
    by_length = {config.model.context_length: batches}
    device = torch.device("cpu")
    return TrainState(config, data, by_length, 10, device, "float32", strategy, optimizers, scaler, outliers)


def plain_loss(model: GPT, windows: np.ndarray[Any, Any]) -> Tensor:
    """Mean cross-entropy of windows (B, T + 1), by the library."""
    ids = torch.from_numpy(windows)
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def plain_gradient(state: TrainState, step: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of the whole batch at once, as autograd gives them."""
    model = GPT.create(state.strategy.model.config, state.config.seed)
    loss = plain_loss(model, state.batches[state.config.model.context_length].batch_at(step))
    names, parameters = zip(*model.named_parameters(), strict=True)
    return loss.item(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


# ----------------------------------------------------------------------------------------------------------- one update


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_an_update_has_the_whole_batchs_gradient(text: Path, micro_batch_size: int) -> None:
    state = state_for(tiny_config(text, micro_batch_size=micro_batch_size, optim={"grad_clip": 0.0}))
    loss, gradient = plain_gradient(state, 0)
    before = {name: parameter.detach().clone() for name, parameter in state.strategy.model.named_parameters()}
    found = start_update(state, lr=1.0).read()
    found_loss, found_norm = found["loss"], found["grad_norm"]
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert found_norm == pytest.approx(
        math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values())), rel=1e-5
    )
    for name, parameter in state.strategy.model.named_parameters():
        # Subtracted from weights of size 1, a gradient is known to float32's 6e-8 absolute.
        torch.testing.assert_close(before[name] - parameter.detach(), gradient[name], atol=3e-7, rtol=1e-4)


@pytest.mark.parametrize("micro_batch_size", [3, 100])
def test_an_update_has_as_many_tokens_in_shorter_sequences(text: Path, micro_batch_size: int) -> None:
    config = tiny_config(text, context_start=4, context_warmup=0.5, micro_batch_size=micro_batch_size)
    state = state_for(config)
    T = config.model.context_length
    assert T == 16
    for step, length in ((0, 4), (2, 4), (3, 8), (4, 8), (5, T)):  # of 10
        state.step = step
        rows = state.rows(state.step)
        assert rows.shape == (config.batch_tokens // length, length + 1)
        assert len({tuple(row) for row in rows.tolist()}) > 1
        with torch.no_grad():
            expected = plain_loss(state.strategy.model, rows).item()
        assert start_update(state, 0.0).read()["loss"] == pytest.approx(expected, rel=1e-6)


def test_updates_begin_small_and_grow(text: Path, tmp_path: Path) -> None:
    """As many tokens as asked for, in as few passes as they need, drawn by the step alone; the record counts what was
    seen."""
    config = tiny_config(text, batch_tokens=128, batch_start=32, batch_warmup=0.5, micro_batch_size=3)
    state = state_for(config)
    whole = state_for(config.override(batch_start=128 // 2))
    for step, sequences in ((0, 2), (2, 2), (3, 4), (4, 4), (5, 8)):  # of 10, and of 16 tokens
        state.step = whole.step = step
        rows = state.rows(state.step)
        assert len(rows) == sequences
        assert rows.tolist() == whole.rows(state.step).tolist()[:sequences]
        with torch.no_grad():
            expected = plain_loss(state.strategy.model, rows).item()
        assert start_update(state, 0.0).read()["loss"] == pytest.approx(expected, rel=1e-6)
    run = train(config, tmp_path / "run", progress=Quiet())
    seen = [32, 64, 96, 160, 224, 352, 480, 608, 736, 864]
    assert [record["tokens_seen"] for record in records_of(run) if "loss" in record] == seen
    # A longer run's schedule is another one, but what was seen was seen.
    resume(run, steps=12, progress=Quiet())
    assert [record["tokens_seen"] for record in records_of(run) if "loss" in record] == [*seen, 992, 1120]
    assert dict(find_checkpoint(run).facts)["step"] == "12 (1,120 tokens seen)"


def test_the_share_of_the_peak_is_of_sequences_as_long_as_they_are(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention over a quarter of the context is a quarter of the work."""
    monkeypatch.setattr("glassgpt.training.setup.peak_flops", lambda device, precision: 1e9)
    config = tiny_config(text, context_start=4, context_warmup=0.5)
    records = [r for r in records_of(train(config, tmp_path / "run", progress=Quiet())) if "loss" in r]
    for record, length in ((records[0], 4), (records[-1], 16)):
        model = find_checkpoint(tmp_path / "run").model_config.with_shorter_context(length)
        flops = record["peak_share"] * 1e9 * record["seconds"] / config.batch_tokens
        assert flops == pytest.approx(ModelSummary(model).training_flops_per_token, rel=1e-6)


@given(st.sampled_from([1, 2, 8, 32]), st.floats(0.01, 1.0), st.integers(1, 500))
def test_sequences_double_at_even_distances_until_they_are_whole(start: int, warmup: float, steps: int) -> None:
    config = TrainConfig(
        steps=steps, model=ModelConfig(context_length=64), context_start=start, context_warmup=warmup, batch_tokens=64
    )
    lengths = [config.sequence_length(step / steps) for step in range(steps)]
    assert lengths[0] == start
    assert all(math.log2(after / before) >= 0 for before, after in itertools.pairwise(lengths))
    assert {length for step, length in enumerate(lengths) if step / steps >= warmup} <= {64}
    each = warmup * steps / math.log2(64 / start)
    counts = Counter(length for length in lengths if length < 64)
    assert all(abs(count - each) <= 1 for count in counts.values())


def test_the_gradient_norm_is_that_before_clipping(text: Path) -> None:
    """Seed D recorded what clipping had left."""
    state = state_for(tiny_config(text, optim={"grad_clip": 0.01}))
    gradient = plain_gradient(state, 0)[1]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))
    before = {name: parameter.detach().clone() for name, parameter in state.strategy.model.named_parameters()}
    assert start_update(state, lr=1.0).read()["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert norm > 0.1
    moved = math.sqrt(
        sum(
            float((before[name] - p.detach()).double().square().sum())
            for name, p in state.strategy.model.named_parameters()
        )
    )
    assert moved == pytest.approx(0.01, rel=1e-3)  # and the update was clipped


def test_the_rate_that_is_recorded_is_the_one_used(tmp_path: Path, text: Path) -> None:
    """AdamW's first update moves a bias by lr g / (|g| + eps): by the rate itself where g is far above eps."""
    config = tiny_config(text, steps=1, optim={"lr": 3e-3, "warmup_steps": 4})
    run = run_of(config, tmp_path / "run")
    vocab_size = open_dataset(prepare(config.data)).tokenizer.vocab_size
    first = GPT.create(config.override(model={"vocab_size": vocab_size}).model, config.seed)
    last = safetensors.torch.load_file(run / "checkpoints" / "000001" / "model.safetensors")
    moved = max(float((last[name] - p.detach()).abs().max()) for name, p in first.named_parameters() if p.ndim == 1)
    assert steps_of(run)[0]["lr"] == pytest.approx(3e-3 / 5)
    assert moved == pytest.approx(3e-3 / 5, rel=1e-3)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_under_float16_one_infinite_gradient_holds_back_all_optimizers(text: Path, bad: float) -> None:
    """Muon and AdamW each hold a part of the weights: half an update would be worse than none."""
    state = state_for(tiny_config(text, model={"n_layer": 1}))
    state.optimizers = build_optimizers(state.strategy, state.config.override(optim={"name": "muon"}).optim)
    state.scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=8.0)
    before = {name: parameter.detach().clone() for name, parameter in state.strategy.model.named_parameters()}
    weight = state.strategy.model.get_parameter("blocks.0.attention.out.weight")
    handle = weight.register_hook(lambda grad: torch.full_like(grad, bad))  # type: ignore[no-untyped-call]
    for halvings in (1, 2, 3):
        update = start_update(state, lr=1e-2).read()
        loss, norm = update["loss"], update["grad_norm"]
        assert math.isfinite(loss)
        assert not math.isfinite(norm)
        assert state.scaler.get_scale() == 8.0 / 2**halvings
        assert all(torch.equal(parameter, before[name]) for name, parameter in state.strategy.model.named_parameters())
    with pytest.raises(NonFiniteError):  # at scale 1 it is not a matter of float16 any more
        start_update(state, lr=1e-2).read()
    handle.remove()
    state.strategy.model.zero_grad()
    state.scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=8.0)
    start_update(state, lr=1e-2).read()
    assert not any(torch.equal(p, before[name]) for name, p in state.strategy.model.named_parameters() if p.ndim == 2)


def test_dropout_is_different_in_each_micro_batch_and_step(text: Path) -> None:
    """With one window only and an untouched model, equal losses would mean equal masks."""
    config = tiny_config(text, model={"dropout": 0.5}, micro_batch_size=1, batch_tokens=16)
    state = state_for(config)
    losses = set()
    for step in range(6):
        state.step = step
        windows = Batches([state.data.datasets[0].train], 16, 1, seed=0, order="sequential").batch_at(0)
        state.batches[16].batch_at = lambda step, rows, windows=windows: windows  # type: ignore[assignment, misc]
        losses.add(start_update(state, lr=0.0).read()["loss"])
    assert len(losses) == 6


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_precision_changes_the_loss_as_little_as_its_digits_say(tmp_path: Path, text: Path, precision: str) -> None:
    run = run_of(tiny_config(text, precision=precision, steps=3), tmp_path / "run")
    reference = run_of(tiny_config(text, steps=3), tmp_path / "reference")
    for record, expected in zip(steps_of(run), steps_of(reference), strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=2**-8)
    assert (last_weights(run) == last_weights(reference)) == (precision == "float32")


def test_an_update_that_is_an_outlier_is_left_out_and_said(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ninth loss is thirty times what it should be. What was before is remembered over a resume."""
    forward, calls = GPT.forward, {"training": 0}

    def spiking(model: GPT, *arguments: Any, **options: Any) -> Tensor:
        loss = forward(model, *arguments, **options)
        calls["training"] += model.training
        return (
            loss * 30 if model.training and calls["training"] in (17, 18) else loss
        )  # the two micro-batches of step 9

    monkeypatch.setattr(OutlierWatch, "STEPS", 6)
    monkeypatch.setattr(GPT, "forward", spiking)
    config = tiny_config(text, checkpoint_every=1, keep_checkpoints=20, eval_every=0, optim={"skip_outliers": 5.0})
    run = run_of(config, tmp_path / "run")
    assert [record["step"] for record in steps_of(run) if record.get("skipped")] == [9]
    before, after = ((run / "checkpoints" / f"{step:06d}" / "model.safetensors").read_bytes() for step in (8, 9))
    assert before == after
    assert last_weights(run) != after
    calls["training"] = 0
    part = run_of(config.override(steps=7, optim={"schedule": "constant"}), tmp_path / "part")
    resume(part, steps=10, progress=Quiet())
    assert [record["step"] for record in steps_of(part) if record.get("skipped")] == [9]


# ------------------------------------------------------------------------- without waiting for the device (as on a GPU)


def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a run on the CPU judge its updates as one on a GPU does."""
    put_together = setup_training

    def instead(*arguments: Any, **options: Any) -> TrainState:
        state = put_together(*arguments, **options)
        judge_on_device(state)
        return state

    monkeypatch.setattr("glassgpt.training.run.setup_training", instead)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("every", [(4, 3), (0, 100), (1, 1)])
def test_a_run_that_is_judged_on_the_device_is_the_same(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, every: tuple[int, int]
) -> None:
    config = tiny_config(text, eval_every=every[0], checkpoint_every=every[1], optim={"name": optimizer})
    plain = run_of(config, tmp_path / "plain")
    on_device(monkeypatch)
    assert differences(run_of(config, tmp_path / "run"), plain) == []


def test_the_next_update_begins_before_the_numbers_are_waited_for(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But before an evaluation and before a save all of them are known."""
    reported: list[str] = []
    begin, read, evaluate = update_step.start_update, Update.read, loop.evaluate

    def beginning(state: TrainState, lr: float) -> Update:
        reported.append(f"begin {state.step + 1}")
        return begin(state, lr)

    def reading(update: Update) -> dict[str, Any]:
        reported.append(f"read {update.step}")
        return read(update)

    def evaluating(state: TrainState, recorder: Any, *norms: Any) -> tuple[float, bool]:
        reported.append("evaluate")
        return evaluate(state, recorder, *norms)

    monkeypatch.setattr(update_step, "start_update", beginning)
    monkeypatch.setattr(Update, "read", reading)
    monkeypatch.setattr(loop, "evaluate", evaluating)
    on_device(monkeypatch)
    run_of(tiny_config(text, steps=5, eval_every=3, checkpoint_every=0), tmp_path / "run")
    first, second = "begin 1, begin 2, read 1, begin 3, read 2, read 3", "begin 4, begin 5, read 4, read 5"
    assert reported == ["evaluate", *first.split(", "), "evaluate", *second.split(", "), "evaluate"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_on_the_device_too_a_bad_batch_leaves_the_weights(text: Path, what: str, optimizer: str) -> None:
    """Nor do the good ones after it, until the numbers are read."""
    state = state_for(tiny_config(text, model={"n_layer": 1}))
    state.optimizers = build_optimizers(state.strategy, state.config.override(optim={"name": optimizer}).optim)
    judge_on_device(state)
    model = state.strategy.model
    for state.step in range(2):
        start_update(state, lr=1e-2).read()
    assert state.found_inf is not None
    assert state.found_inf.item() == 0
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    moments = [
        value.clone()
        for optimizer in state.optimizers
        for state in optimizer.state.values()
        for value in state.values()
    ]
    forward = model.forward
    model.forward = lambda *given: forward(*given) * (math.nan if what == "loss" else _one_without_gradient(model))  # type: ignore[method-assign]
    bad = start_update(state, lr=1e-2)
    model.forward = forward  # type: ignore[method-assign]
    start_update(state, lr=1e-2)
    with pytest.raises(NonFiniteError, match="step 2: the loss is"):
        bad.read()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    after = [value for optimizer in state.optimizers for state in optimizer.state.values() for value in state.values()]
    assert all(torch.equal(one, other) for one, other in zip(moments, after, strict=True))


@pytest.mark.parametrize("step", [7, 10])
def test_on_the_device_too_a_bad_batch_stops_the_run_as_it_does_else(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    config = tiny_config(text, checkpoint_every=3, eval_every=0)
    fine = run_of(config, tmp_path / "fine")
    forward, bad = GPT.forward, {"calls": 0, "on": True}

    def poisoned(model: GPT, *arguments: Any, **options: Any) -> Tensor:
        loss = forward(model, *arguments, **options)
        bad["calls"] += model.training
        return loss * math.nan if bad["on"] and model.training and bad["calls"] == 2 * step else loss

    monkeypatch.setattr(GPT, "forward", poisoned)
    on_device(monkeypatch)
    with pytest.raises(UserError, match=f"step {step}: the loss is nan.*nonfinite-{step:06d}.json"):
        run_of(config, tmp_path / "run")
    assert [record["step"] for record in records_of(tmp_path / "run") if "val_loss" not in record] == list(
        range(1, step + 1)
    )
    assert json.loads((tmp_path / "run" / f"nonfinite-{step:06d}.json").read_text())["step"] == step
    assert json.loads((tmp_path / "run" / "status.json").read_text())["step"] == step - 1
    bad["on"] = False
    resume(tmp_path / "run", progress=Quiet())
    assert differences(tmp_path / "run", fine) == []


# ------------------------------------------------------------------------------------------------------------- compiled


def test_a_run_is_compiled_once_for_training_and_once_for_evaluation(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whole graphs, whatever batches an evaluation ends with (10 windows, 10, 4, and one of 15 tokens), however
    often it comes."""
    monkeypatch.setattr("glassgpt.evaluation.perplexity.EVALUATION_TOKENS", 160)
    inputs: list[list[torch.Size]] = []

    def backend(graph: torch.fx.GraphModule, given: list[Any]) -> Any:
        inputs.append([x.shape for x in given if isinstance(x, Tensor) and x.dtype == torch.int64])
        assert all(isinstance(x, Tensor) for x in given), "a size is a variable"
        return graph.forward

    compile_by: Callable[[Strategy, Any], None] = Strategy.compile
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    monkeypatch.setattr(Strategy, "compile", lambda strategy, name: compile_by(strategy, backend))
    config = tiny_config(
        text, steps=6, eval_every=2, checkpoint_every=2, sample={"count": 1}, compile="on", model={"dropout": 0.1}
    )
    run = run_of(config, tmp_path / "run")
    assert [shapes[0] for shapes in inputs] == [(10, 16), (2, 16)]
    assert not counters["graph_break"]
    plain = run_of(config.override(compile="off"), tmp_path / "plain")
    assert [e["val_loss"] for e in evaluations_of(run)] == pytest.approx(
        [e["val_loss"] for e in evaluations_of(plain)], rel=1e-5
    )


# ----------------------------------------------------------------------------------------------------- what is recorded


def test_a_steps_record(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed E labelled seconds milliseconds: here a step that sleeps 50 ms must take 0.05 and a little."""
    update = update_step.start_update

    def slow(state: TrainState, lr: float) -> Update:
        time.sleep(0.05)
        return update(state, lr)

    monkeypatch.setattr(update_step, "start_update", slow)
    config = tiny_config(text, steps=6)
    begin = time.perf_counter()
    run = run_of(config, tmp_path / "run")
    wall = time.perf_counter() - begin
    flops = ModelSummary(TrainConfig.from_toml((run / "config.toml").read_text()).model).training_flops_per_token * 64
    records = steps_of(run)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for record in records:
        names = "step loss lr grad_norm seconds tokens_per_second tokens_seen peak_share memory_bytes"
        assert list(record) == names.split()
        assert record["lr"] == lr_at(record["step"] - 1, 6, config.optim)
        assert record["seconds"] >= 0.05
        assert record["tokens_per_second"] == pytest.approx(64 / record["seconds"])
        assert record["tokens_seen"] == 64 * record["step"]
        assert record["peak_share"] == pytest.approx(flops / record["seconds"] / 1e9)  # `fast_training` sets 1e9
        assert 10**7 < record["memory_bytes"] < 10**11
        assert record["grad_norm"] > 0
    assert sum(record["seconds"] for record in records) < wall


def test_the_first_loss_is_that_of_guessing_and_then_it_falls(tmp_path: Path, text: Path) -> None:
    run = run_of(tiny_config(text, steps=80, checkpoint_every=0, eval_every=0), tmp_path / "run")
    first, last = evaluations_of(run)
    vocabulary = len(set(text.read_text()))
    assert first["val_loss"] == pytest.approx(math.log(vocabulary), abs=0.05)
    counts = np.unique(list(text.read_text()), return_counts=True)[1] / 4000
    assert last["val_loss"] < -float((counts * np.log(counts)).sum())  # better than by the letters' frequencies alone


@pytest.mark.parametrize(
    ("every", "evaluated", "saved"),
    [((3, 4), [0, 3, 6, 7], {4, 7}), ((0, 0), [0, 7], {7}), ((100, 100), [0, 7], {7}), ((7, 7), [0, 7], {7})],
)
def test_the_last_step_is_evaluated_sampled_and_saved(
    tmp_path: Path, text: Path, every: tuple[int, int], evaluated: list[int], saved: set[int]
) -> None:
    """Seed A left its last step neither evaluated nor saved."""
    config = tiny_config(text, steps=7, eval_every=every[0], checkpoint_every=every[1], keep_checkpoints=9)
    run = run_of(config, tmp_path / "run")
    assert [record["step"] for record in evaluations_of(run)] == evaluated
    headings = [line for line in (run / "samples.md").read_text().splitlines() if line.startswith("## ")]
    assert headings == [f"## Step {step:06d}" for step in evaluated]
    best = {step for step in evaluated if step}  # the loss of such a run falls, so each evaluation is a new best
    assert set(saved_steps(run)) == saved | best


def test_the_newest_checkpoints_and_the_best_are_kept(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(monkeypatch, [9.0, 5.0, 3.0, 4.0, 6.0, 7.0])
    config = tiny_config(text, steps=10, eval_every=2, checkpoint_every=2, keep_checkpoints=2)
    assert saved_steps(run_of(config, tmp_path / "run")) == [4, 8, 10]


def test_a_validation_loss_that_is_no_number_is_never_the_best(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(monkeypatch, [9.0, math.nan, 3.0, 4.0])
    run = run_of(tiny_config(text, steps=6, eval_every=2, checkpoint_every=0, keep_checkpoints=1), tmp_path / "run")
    assert saved_steps(run) == [4, 6]
    assert [record["val_loss"] for record in evaluations_of(run)] == [9.0, None, 3.0, 4.0]


def test_epochs_become_steps(tmp_path: Path, text: Path) -> None:
    """3,600 training characters are (3600 - 16) // 16 = 224 windows, four a step: half an epoch is 28 steps."""
    run = run_of(tiny_config(text, epochs=0.5, sample={"count": 0}, eval_every=0, checkpoint_every=0), tmp_path / "run")
    assert len(steps_of(run)) == 28


def test_whoever_listens_hears_what_is_written(tmp_path: Path, text: Path) -> None:
    class Listener(Quiet):
        def __init__(self) -> None:
            super().__init__()
            self.heard: list[dict[str, Any]] = []
            self.ends: list[tuple[int, int] | Path] = []

        def started(self, run: Path, config: TrainConfig, summary: str, first_step: int, last_step: int) -> None:
            self.ends.append((first_step, last_step))

        def step(self, record: Any) -> None:
            self.heard.append(dict(record))

        evaluated = step

        def finished(self, run: Path) -> None:
            self.ends.append(run)

    listener = Listener()
    run = train(tiny_config(text), tmp_path / "run", progress=listener)
    assert listener.heard == records_of(run)
    assert listener.ends == [(0, 10), run]


# ----------------------------------------------------------------------------------------------------- which data count


def test_validation_is_the_last_tenth_of_the_text(tmp_path: Path, text: Path) -> None:
    """Seed E validated on what it had trained on. The reference here knows nothing of splits: it takes the last 400
    characters."""
    config = tiny_config(text, steps=1)
    record = evaluations_of(run_of(config, tmp_path / "run"))[0]
    dataset = open_dataset(prepare(config.data))
    model = GPT.create(config.override(model={"vocab_size": dataset.tokenizer.vocab_size}).model, config.seed).eval()
    characters = sorted(set(text.read_text()))
    ids = torch.tensor([characters.index(character) for character in text.read_text()[3600:]])
    losses = []
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 16):
            window = ids[start : start + 17]
            losses += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="none").double().tolist()
    assert record["val_tokens"] == len(losses) == 399
    assert record["val_loss"] == pytest.approx(math.fsum(losses) / 399, rel=1e-6)


def test_neither_split_leaks_into_the_other(tmp_path: Path) -> None:
    texts = {name: write_text(tmp_path / name, 4000, seed=index).read_text() for index, name in enumerate("abc")}
    for name in ("ab", "ac", "cb"):
        (tmp_path / name).write_text(texts[name[0]][:3600] + texts[name[1]][3600:])
    runs = {name: run_of(tiny_config(tmp_path / name), tmp_path / f"run-{name}") for name in ("ab", "ac", "cb")}
    assert last_weights(runs["ab"]) == last_weights(runs["ac"])  # other validation text, same training
    assert last_weights(runs["ab"]) != last_weights(runs["cb"])
    first = {name: evaluations_of(run)[0]["val_loss"] for name, run in runs.items()}
    assert first["ab"] == first["cb"] != first["ac"]  # other training text, same validation


# ------------------------------------------------------------------------------------------------------ reproducibility


def test_a_run_repeats_itself_bit_for_bit_and_another_seed_does_not(tmp_path: Path, text: Path) -> None:
    config = tiny_config(text, model={"dropout": 0.2})
    one, two = (run_of(config, tmp_path / name) for name in ("one", "two"))
    assert differences(one, two) == []
    assert last_weights(run_of(config.override(seed=1), tmp_path / "other")) != last_weights(one)


@pytest.mark.parametrize(
    "change",
    [
        {"sample": {"count": 0}},
        {"sample": {"count": 3, "temperature": 1.0, "max_new_tokens": 20}},
        {"eval_every": 1},
        {"eval_every": 0},
        {"eval_tokens": 20},
        {"checkpoint_every": 1, "keep_checkpoints": 1},
        {"probe": {"tokens": 0}},
        {"probe": {"every": 1}},
        {"name": "another"},
    ],
    ids=str,
)
def test_watching_a_run_does_not_move_it(tmp_path: Path, text: Path, change: dict[str, Any]) -> None:
    """Samples once drew from the generator that dropout draws from."""
    config = tiny_config(text, model={"dropout": 0.2})
    plain, watched = run_of(config, tmp_path / "plain"), run_of(config.override(**change), tmp_path / "watched")
    assert last_weights(watched) == last_weights(plain)
    assert [r for r in records_without_measurements(watched) if "loss" in r] == [
        r for r in records_without_measurements(plain) if "loss" in r
    ]


def test_the_callers_generator_does_not_move_a_run(tmp_path: Path, text: Path) -> None:
    config = tiny_config(text, model={"dropout": 0.2})
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        runs.append(run_of(config, tmp_path / str(seed)))
    assert differences(*runs) == []


def test_micro_batches_change_the_losses_by_rounding_only(tmp_path: Path, text: Path) -> None:
    losses = []
    for size in (1, 2, 4):
        run = run_of(tiny_config(text, micro_batch_size=size, eval_every=0, checkpoint_every=0), tmp_path / str(size))
        losses.append([record["loss"] for record in steps_of(run)])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-6)


def test_without_dropout_uneven_cuts_change_rounding_only_and_with_it_the_masks(tmp_path: Path, text: Path) -> None:
    """Five sequences in one piece, as 3 + 2 and as 2 + 2 + 1. Masks depend on the cut, and equal cuts have equal
    masks."""

    def losses(dropout: float, size: int, name: str) -> list[float]:
        changes = {"batch_tokens": 80, "micro_batch_size": size, "eval_every": 0, "checkpoint_every": 0, "steps": 4}
        config = tiny_config(text, model={"dropout": dropout}, **changes)
        return [record["loss"] for record in steps_of(run_of(config, tmp_path / f"{name}-{dropout}-{size}"))]

    plain, dropped = ([losses(dropout, size, "run") for size in (5, 3, 2)] for dropout in (0.0, 0.3))
    for other in plain[1:]:
        assert other == pytest.approx(plain[0], rel=1e-6)
    for other in dropped[1:]:
        assert other != pytest.approx(dropped[0], rel=1e-4)
    assert losses(0.3, 4, "same cut") == dropped[1]  # four at most is 3 + 2, too


def test_training_leaves_the_callers_random_state_and_threads(tmp_path: Path, text: Path) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    before = (
        torch.get_rng_state(),
        np.random.get_state(legacy=False)["state"]["key"].tolist(),
        torch.get_num_threads(),
    )
    precision = torch.get_float32_matmul_precision()
    run_of(tiny_config(text, model={"dropout": 0.2}, steps=3), tmp_path / "run")
    assert torch.equal(before[0], torch.get_rng_state())
    assert (np.random.get_state(legacy=False)["state"]["key"].tolist(), torch.get_num_threads()) == before[1:]
    assert torch.get_float32_matmul_precision() == precision


def test_a_first_ctrl_c_is_acknowledged_and_a_second_one_quits(capfd: pytest.CaptureFixture[str]) -> None:
    with Interrupts(repeats_mean_quit=True, announces=True) as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert "Ctrl-C again" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert interrupts.signal == signal.SIGINT


def test_updates_that_take_minutes_on_a_cpu_are_announced(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 10 kFLOP/s an update of this model's 64 tokens takes minutes; at 1 GFLOP/s it does not."""
    for peak, expected in ((1e9, 0), (1e4, 1)):
        monkeypatch.setattr("glassgpt.training.setup.peak_flops", lambda device, precision, peak=peak: peak)
        progress = Quiet()
        setup_training(tiny_config(text), Ranks(), progress)
        assert len([message for message in progress.messages if "--batch-tokens" in message]) == expected


def test_batches_are_read_ahead_and_in_order(text: Path) -> None:
    state = state_for(tiny_config(text))
    for state.step in (0, 1, 2, 5, 6):  # a jump, as after a failed step
        assert torch.equal(state.local_rows(), torch.from_numpy(state.rows(state.step)))
        ahead = state.read_ahead
        assert ahead is not None
        assert ahead[0] == state.step + 1
        assert torch.equal(ahead[1].result(), torch.from_numpy(state.rows(state.step + 1)))


def test_training_works_outside_the_main_thread(tmp_path: Path, text: Path) -> None:
    """Python allows signal handlers in the main thread only, and a notebook may train in another."""
    done = []
    worker = threading.Thread(target=lambda: done.append(run_of(tiny_config(text), tmp_path / "thread")))
    worker.start()
    worker.join()
    assert done
    assert differences(done[0], run_of(tiny_config(text), tmp_path / "main")) == []


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_loss_that_is_no_number_stops_the_run_with_its_batch_on_record(tmp_path: Path, text: Path) -> None:
    config = tiny_config(
        text, steps=50, checkpoint_every=2, optim={"lr": 1e20, "warmup_steps": 0}, model={"logit_softcap": None}
    )
    # Each rate is finite and each update too; the loss becomes infinite or not a number within a few steps.
    with pytest.raises(UserError, match=r"step \d+: the loss is (nan|inf).*lower --optim\.lr") as caught:
        run_of(config, tmp_path / "run")
    (path,) = (tmp_path / "run").glob("nonfinite-*.json")
    assert path.name in str(caught.value)
    record = json.loads(path.read_text())
    step = record["step"]
    assert f"step {step}:" in str(caught.value)
    assert path.name == f"nonfinite-{step:06d}.json"
    batches = Batches([open_dataset(prepare(config.data)).train], 16, 4, config.seed)
    assert record["ids"] == batches.batch_at(step - 1).tolist()
    last = records_of(tmp_path / "run")[-1]
    assert (last["step"], last["loss"]) == (step, None)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_bad_batch_leaves_weights_and_the_last_good_checkpoint(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The seventh batch is poisoned once; the checkpoint of step 6 stays, and a resumed run is the one that never
    failed."""
    forward, bad = GPT.forward, {"calls": 0, "on": True}

    def poisoned(model: GPT, ids: Tensor, targets: Tensor | None = None, *rest: Any, **options: Any) -> Tensor:
        loss = forward(model, ids, targets, *rest, **options)
        bad["calls"] += model.training
        if not (bad["on"] and model.training and bad["calls"] == 14):  # the second micro-batch of the seventh step
            return loss
        return loss * (math.nan if what == "loss" else _one_without_gradient(model))

    monkeypatch.setattr(GPT, "forward", poisoned)
    config = tiny_config(text, checkpoint_every=3, eval_every=0)
    with pytest.raises(UserError, match="step 7: the loss is"):
        run_of(config, tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [3, 6]
    assert (tmp_path / "run" / "nonfinite-000007.json").is_file()
    bad["on"] = False
    resume(tmp_path / "run", progress=Quiet())
    assert differences(tmp_path / "run", run_of(config, tmp_path / "fine")) == []


def _one_without_gradient(model: GPT) -> Tensor:
    """1, but its gradient is NaN: the square root's slope at 0 is infinite."""
    weight = model.get_parameter("norm.weight")
    return 1 + (weight - weight.detach()).abs().sum().sqrt()


REFUSED = [
    ({"model": {"context_length": 8000}, "batch_tokens": 16000}, "8,001"),
    ({"sample": {"prompt": "Ω"}}, "'Ω'"),
    ({"probe": {"prompts": ["the", "Щ"]}}, r"probe\.prompts, 'Щ'"),
    ({"model": {"vocab_size": 5}}, "model.vocab_size = 5"),
    ({"data": {"source": "no/such/file.txt"}}, "no/such/file"),
    ({"data": {"validation_fraction": 0.0002}}, "validation"),
    ({"init_from": "no/such/run"}, "no/such/run does not exist"),
    ({"device": "cuda:99"}, "'cuda:99'"),
    ({"precision": "float16"}, "float32 or bfloat16"),
    ({"model": {"attention": "flex"}, "device": "cpu"}, "flex.*CUDA"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_start_is_refused_before_anything_is_written(
    tmp_path: Path, text: Path, change: dict[str, Any], message: str
) -> None:
    config = tiny_config(text).override(**change)
    out = tmp_path / "runs" / "new"
    with pytest.raises(UserError, match=message):
        run_of(config, out)
    assert not out.parent.exists()
    # And with --overwrite, the former run is still there, whole.
    former = run_of(tiny_config(text, steps=2), out)
    before = {path: path.read_bytes() for path in former.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        train(config, out, overwrite=True, progress=Quiet())
    assert {path: path.read_bytes() for path in former.rglob("*") if path.is_file()} == before


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_does(text: Path) -> None:
    with pytest.raises(UserError, match=r"batch_tokens .* 16; nearest: 96 or 112, got 100"):
        tiny_config(text, batch_tokens=100)


def test_an_existing_run_is_refused_and_overwritten_on_request(tmp_path: Path, text: Path) -> None:
    config = tiny_config(text, steps=4, checkpoint_every=1, keep_checkpoints=9)
    run = run_of(config, tmp_path / "run")
    before = last_weights(run)
    with pytest.raises(UserError, match="already a run"):
        run_of(config, run)
    assert last_weights(run) == before
    shorter = config.override(steps=3, seed=7)
    train(shorter, run, overwrite=True, progress=Quiet())
    assert saved_steps(run) == [1, 2, 3]
    assert differences(run, run_of(shorter, tmp_path / "fresh")) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_files_and_a_file_are_refused(tmp_path: Path, text: Path, overwrite: bool) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    for out, message in ((tmp_path / "thesis", "thesis"), (text, "is a file"), (text / "run", "text.txt/run")):
        with pytest.raises(UserError, match=message):
            train(tiny_config(text), out, overwrite=overwrite, progress=Quiet())
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_a_run_that_is_removed_ends_and_writes_nothing_into_another_ones_place(tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"

    class Removing(Quiet):
        def step(self, record: Any) -> None:
            if record["step"] == 3:
                shutil.rmtree(run)
                run.mkdir()
                (run / "config.toml").write_text("another run's")

    with pytest.raises(UserError, match=r"run was removed"):
        train(tiny_config(text, checkpoint_every=0, eval_every=0), run, progress=Removing())
    assert [path.name for path in run.iterdir()] == ["config.toml"]


def test_compiled_in_place_a_run_keeps_its_names_and_its_numbers(tmp_path: Path, text: Path) -> None:
    """Seed B's checkpoints carried the prefix of the compiled wrapper."""
    config = tiny_config(text, steps=3)
    plain, compiled = (
        run_of(config.override(compile=switch, compile_backend="eager"), tmp_path / switch) for switch in ("off", "on")
    )
    names = [
        set(safetensors.torch.load_file(run / "checkpoints" / "000003" / "model.safetensors"))
        for run in (plain, compiled)
    ]
    assert names[0] == names[1] == {name for name, _ in state_for(config).strategy.model.named_parameters()}
    losses = [[record["loss"] for record in steps_of(run)] for run in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP on this system")
def test_a_lost_connection_is_a_reason_to_save_however_often_it_is_told() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with Interrupts(repeats_mean_quit=True, announces=False) as interrupts:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGHUP)
        assert interrupts.signal == signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
        with Interrupts(repeats_mean_quit=True, announces=False) as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
        assert interrupts.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)
