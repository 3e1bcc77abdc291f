"""Training: what an update computes, what a run records, and what must not affect it."""

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
from unittest.mock import Mock

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
def fast() -> Iterator[None]:
    """Train without flushing to disk, with one thread and without measuring peak memory."""
    with fast_training():
        yield


def run_of(config: TrainConfig, out: Path) -> Path:
    """Train a run quietly and return its path."""
    return train(config, out, progress=Quiet())


def steps_of(run: Path) -> list[dict[str, Any]]:
    """Return the records of updates."""
    return [record for record in records_of(run) if "loss" in record]


def evaluations_of(run: Path) -> list[dict[str, Any]]:
    """Return the records of evaluations."""
    return [record for record in records_of(run) if "val_loss" in record]


def last_weights(run: Path) -> bytes:
    """Return the bytes of the newest checkpoint's weights."""
    return (checkpoint_paths(run / "checkpoints")[-1] / "model.safetensors").read_bytes()


def saved_steps(run: Path) -> list[int]:
    """Return the steps of the checkpoints."""
    return [int(path.name) for path in checkpoint_paths(run / "checkpoints")]


def set_validation_losses(monkeypatch: pytest.MonkeyPatch, losses: Sequence[float]) -> None:
    """Replace the losses that the run's evaluations return."""
    values = iter(losses)

    def evaluate_with_loss(*arguments: Any, **options: Any) -> dict[str, Any]:
        return {**evaluate_data(*arguments, **options), "loss": next(values)}

    monkeypatch.setattr("glassgpt.training.loop.evaluate_data", evaluate_with_loss)


def state_for(config: TrainConfig) -> TrainState:
    """Return the state of a new run with plain SGD: at a rate of 1, the change of the weights is the gradient."""
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


def reference_loss(model: GPT, windows: np.ndarray[Any, Any]) -> Tensor:
    """Return the mean cross-entropy of windows (B, T + 1), by PyTorch."""
    ids = torch.from_numpy(windows)
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def reference_gradient(state: TrainState, step: int) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the gradients of the whole batch, by autograd."""
    model = GPT.create(state.strategy.model.config, state.config.seed)
    loss = reference_loss(model, state.batches[state.config.model.context_length].batch_at(step))
    names, parameters = zip(*model.named_parameters(), strict=True)
    return loss.item(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


# --- one update -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_an_update_has_the_gradient_of_the_whole_batch(text: Path, micro_batch_size: int) -> None:
    state = state_for(tiny_config(text, micro_batch_size=micro_batch_size, optim={"grad_clip": 0.0}))
    loss, gradient = reference_gradient(state, 0)
    before = {name: parameter.detach().clone() for name, parameter in state.strategy.model.named_parameters()}
    record = start_update(state, lr=1.0).read()
    actual_loss, actual_norm = record["loss"], record["grad_norm"]
    assert actual_loss == pytest.approx(loss, rel=1e-6)
    assert actual_norm == pytest.approx(
        math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values())), rel=1e-5
    )
    for name, parameter in state.strategy.model.named_parameters():
        # The gradient is a difference of weights of size 1, so float32 gives it to 6e-8 absolute.
        torch.testing.assert_close(before[name] - parameter.detach(), gradient[name], atol=3e-7, rtol=1e-4)


@pytest.mark.parametrize("micro_batch_size", [3, 100])
def test_an_update_of_shorter_sequences_has_the_same_number_of_tokens(text: Path, micro_batch_size: int) -> None:
    config = tiny_config(text, context_start=4, context_warmup=0.5, micro_batch_size=micro_batch_size)
    state = state_for(config)
    T = config.model.context_length
    assert T == 16
    for step, length in ((0, 4), (2, 4), (3, 8), (4, 8), (5, T)):  # of 10 steps
        state.step = step
        rows = state.rows(state.step)
        assert rows.shape == (config.batch_tokens // length, length + 1)
        assert len({tuple(row) for row in rows.tolist()}) > 1
        with torch.no_grad():
            expected = reference_loss(state.strategy.model, rows).item()
        assert start_update(state, 0.0).read()["loss"] == pytest.approx(expected, rel=1e-6)


def test_the_batch_size_grows_during_its_warmup(text: Path, tmp_path: Path) -> None:
    """Each update has the scheduled number of sequences, which depend only on the step, in as few passes as possible.

    `tokens_seen` counts the tokens actually used.
    """
    config = tiny_config(text, batch_tokens=128, batch_start=32, batch_warmup=0.5, micro_batch_size=3)
    state = state_for(config)
    larger = state_for(config.override(batch_start=128 // 2))
    for step, sequences in ((0, 2), (2, 2), (3, 4), (4, 4), (5, 8)):  # of 10 steps; a sequence has 16 tokens
        state.step = larger.step = step
        rows = state.rows(state.step)
        assert len(rows) == sequences
        assert rows.tolist() == larger.rows(state.step).tolist()[:sequences]
        with torch.no_grad():
            expected = reference_loss(state.strategy.model, rows).item()
        assert start_update(state, 0.0).read()["loss"] == pytest.approx(expected, rel=1e-6)
    run = train(config, tmp_path / "run", progress=Quiet())
    tokens_seen = [32, 64, 96, 160, 224, 352, 480, 608, 736, 864]
    assert [record["tokens_seen"] for record in records_of(run) if "loss" in record] == tokens_seen
    # The schedule of a longer run differs, but the tokens already seen still count.
    resume(run, steps=12, progress=Quiet())
    assert [record["tokens_seen"] for record in records_of(run) if "loss" in record] == [*tokens_seen, 992, 1120]
    assert dict(find_checkpoint(run).facts)["step"] == "12 (1,120 tokens seen)"


def test_the_share_of_peak_flops_accounts_for_shorter_sequences(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention over a quarter of the context takes a quarter of the FLOPs."""
    monkeypatch.setattr("glassgpt.training.setup.peak_flops", lambda device, precision: 1e9)
    config = tiny_config(text, context_start=4, context_warmup=0.5)
    records = [r for r in records_of(train(config, tmp_path / "run", progress=Quiet())) if "loss" in r]
    for record, length in ((records[0], 4), (records[-1], 16)):
        model = find_checkpoint(tmp_path / "run").model_config.with_shorter_context(length)
        flops = record["peak_share"] * 1e9 * record["seconds"] / config.batch_tokens
        assert flops == pytest.approx(ModelSummary(model).training_flops_per_token, rel=1e-6)


@given(st.sampled_from([1, 2, 8, 32]), st.floats(0.01, 1.0), st.integers(1, 500))
def test_sequence_lengths_double_at_equal_intervals_up_to_the_context_length(
    start: int, warmup: float, steps: int
) -> None:
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


def test_the_recorded_gradient_norm_is_the_one_before_clipping(text: Path) -> None:
    """An earlier implementation recorded the norm after clipping."""
    state = state_for(tiny_config(text, optim={"grad_clip": 0.01}))
    gradient = reference_gradient(state, 0)[1]
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
    assert moved == pytest.approx(0.01, rel=1e-3)  # the update itself was clipped


def test_the_recorded_learning_rate_is_the_one_used(tmp_path: Path, text: Path) -> None:
    """AdamW's first update changes a bias by lr g / (|g| + eps), which is lr if |g| is far above eps."""
    config = tiny_config(text, steps=1, optim={"lr": 3e-3, "warmup_steps": 4})
    run = run_of(config, tmp_path / "run")
    vocab_size = open_dataset(prepare(config.data)).tokenizer.vocab_size
    first = GPT.create(config.override(model={"vocab_size": vocab_size}).model, config.seed)
    last = safetensors.torch.load_file(run / "checkpoints" / "000001" / "model.safetensors")
    moved = max(float((last[name] - p.detach()).abs().max()) for name, p in first.named_parameters() if p.ndim == 1)
    assert steps_of(run)[0]["lr"] == pytest.approx(3e-3 / 5)
    assert moved == pytest.approx(3e-3 / 5, rel=1e-3)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_under_float16_one_non_finite_gradient_skips_all_optimizers(text: Path, bad: float) -> None:
    """Muon and AdamW each update a part of the weights, and half an update would be worse than none."""
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
    with pytest.raises(NonFiniteError):  # at a loss scale of 1, float16 is no longer the cause
        start_update(state, lr=1e-2).read()
    handle.remove()
    state.strategy.model.zero_grad()
    state.scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=8.0)
    start_update(state, lr=1e-2).read()
    assert not any(torch.equal(p, before[name]) for name, p in state.strategy.model.named_parameters() if p.ndim == 2)


def test_dropout_differs_in_each_micro_batch_and_step(text: Path) -> None:
    """The weights do not change and there is only one window, so equal losses would mean equal dropout masks."""
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
def test_losses_in_bfloat16_agree_within_its_digits(tmp_path: Path, text: Path, precision: str) -> None:
    run = run_of(tiny_config(text, precision=precision, steps=3), tmp_path / "run")
    reference = run_of(tiny_config(text, steps=3), tmp_path / "reference")
    for record, expected in zip(steps_of(run), steps_of(reference), strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=2**-8)
    assert (last_weights(run) == last_weights(reference)) == (precision == "float32")


def test_an_outlier_update_is_skipped_and_recorded(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ninth loss is thirty times too large. The earlier losses are also known after a resume."""
    forward, calls = GPT.forward, {"training": 0}

    def forward_with_spike(model: GPT, *arguments: Any, **options: Any) -> Tensor:
        loss = forward(model, *arguments, **options)
        calls["training"] += model.training
        # Calls 17 and 18 are the two micro-batches of step 9.
        return loss * 30 if model.training and calls["training"] in (17, 18) else loss

    monkeypatch.setattr(OutlierWatch, "STEPS", 6)
    monkeypatch.setattr(GPT, "forward", forward_with_spike)
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


# --- updates checked on the device, as on a GPU -----------------------------------------------------------------------


def check_updates_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make runs on the CPU check their updates on the device and read them later, like runs on a GPU."""
    setup = setup_training

    def setup_and_judge_on_device(*arguments: Any, **options: Any) -> TrainState:
        state = setup(*arguments, **options)
        judge_on_device(state)
        return state

    monkeypatch.setattr("glassgpt.training.run.setup_training", setup_and_judge_on_device)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("every", [(4, 3), (0, 100), (1, 1)])
def test_a_run_whose_updates_are_checked_on_the_device_is_the_same(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, every: tuple[int, int]
) -> None:
    config = tiny_config(text, eval_every=every[0], checkpoint_every=every[1], optim={"name": optimizer})
    expected = run_of(config, tmp_path / "expected")
    check_updates_on_device(monkeypatch)
    assert differences(run_of(config, tmp_path / "run"), expected) == []


def test_the_next_update_starts_before_the_previous_one_is_read(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All updates are read before an evaluation and before a save."""
    events: list[str] = []
    begin, read, evaluate = update_step.start_update, Update.read, loop.evaluate

    def recorded_start(state: TrainState, lr: float) -> Update:
        events.append(f"begin {state.step + 1}")
        return begin(state, lr)

    def recorded_read(update: Update) -> dict[str, Any]:
        events.append(f"read {update.step}")
        return read(update)

    def recorded_evaluate(state: TrainState, recorder: Any, *norms: Any) -> tuple[float, bool]:
        events.append("evaluate")
        return evaluate(state, recorder, *norms)

    monkeypatch.setattr(update_step, "start_update", recorded_start)
    monkeypatch.setattr(Update, "read", recorded_read)
    monkeypatch.setattr(loop, "evaluate", recorded_evaluate)
    check_updates_on_device(monkeypatch)
    run_of(tiny_config(text, steps=5, eval_every=3, checkpoint_every=0), tmp_path / "run")
    first, second = "begin 1, begin 2, read 1, begin 3, read 2, read 3", "begin 4, begin 5, read 4, read 5"
    assert events == ["evaluate", *first.split(", "), "evaluate", *second.split(", "), "evaluate"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_on_the_device_a_non_finite_batch_does_not_change_the_weights(text: Path, what: str, optimizer: str) -> None:
    """Neither do later finite batches, until the update is read and raises its error."""
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
    model.forward = lambda *args: forward(*args) * (math.nan if what == "loss" else _one_with_nan_gradient(model))  # type: ignore[method-assign]
    bad = start_update(state, lr=1e-2)
    model.forward = forward  # type: ignore[method-assign]
    start_update(state, lr=1e-2)
    with pytest.raises(NonFiniteError, match="step 2: the loss is"):
        bad.read()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    after = [value for optimizer in state.optimizers for state in optimizer.state.values() for value in state.values()]
    assert all(torch.equal(one, other) for one, other in zip(moments, after, strict=True))


@pytest.mark.parametrize("step", [7, 10])
def test_on_the_device_a_non_finite_batch_stops_the_run_at_its_step(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    config = tiny_config(text, checkpoint_every=3, eval_every=0)
    expected = run_of(config, tmp_path / "expected")
    forward, bad = GPT.forward, {"calls": 0, "on": True}

    def forward_with_nan(model: GPT, *arguments: Any, **options: Any) -> Tensor:
        loss = forward(model, *arguments, **options)
        bad["calls"] += model.training
        return loss * math.nan if bad["on"] and model.training and bad["calls"] == 2 * step else loss

    monkeypatch.setattr(GPT, "forward", forward_with_nan)
    check_updates_on_device(monkeypatch)
    with pytest.raises(UserError, match=f"step {step}: the loss is nan.*nonfinite-{step:06d}.json"):
        run_of(config, tmp_path / "run")
    assert [record["step"] for record in records_of(tmp_path / "run") if "val_loss" not in record] == list(
        range(1, step + 1)
    )
    assert json.loads((tmp_path / "run" / f"nonfinite-{step:06d}.json").read_text())["step"] == step
    assert json.loads((tmp_path / "run" / "status.json").read_text())["step"] == step - 1
    bad["on"] = False
    resume(tmp_path / "run", progress=Quiet())
    assert differences(tmp_path / "run", expected) == []


# --- compilation ------------------------------------------------------------------------------------------------------


def test_a_run_is_compiled_once_for_training_and_once_for_evaluation(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has one whole graph, for batches of any size at the end of an evaluation and for repeated evaluations.

    An evaluation has batches of 10, 10 and 4 windows, and one window of 15 tokens.
    """
    monkeypatch.setattr("glassgpt.evaluation.perplexity.EVALUATION_TOKENS", 160)
    inputs: list[list[torch.Size]] = []

    def backend(graph: torch.fx.GraphModule, graph_inputs: list[Any]) -> Any:
        inputs.append([x.shape for x in graph_inputs if isinstance(x, Tensor) and x.dtype == torch.int64])
        assert all(isinstance(x, Tensor) for x in graph_inputs), "no size may be a variable of the graph"
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
    uncompiled = run_of(config.override(compile="off"), tmp_path / "expected")
    assert [e["val_loss"] for e in evaluations_of(run)] == pytest.approx(
        [e["val_loss"] for e in evaluations_of(uncompiled)], rel=1e-5
    )


# --- records ----------------------------------------------------------------------------------------------------------


def test_the_record_of_a_step(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit of `seconds` is checked by a step that sleeps for 0.05 s."""
    update = update_step.start_update

    def slow_start(state: TrainState, lr: float) -> Update:
        time.sleep(0.05)
        return update(state, lr)

    monkeypatch.setattr(update_step, "start_update", slow_start)
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


def test_the_first_loss_is_that_of_a_uniform_guess_and_the_last_is_lower(tmp_path: Path, text: Path) -> None:
    run = run_of(tiny_config(text, steps=80, checkpoint_every=0, eval_every=0), tmp_path / "run")
    first, last = evaluations_of(run)
    vocabulary = len(set(text.read_text()))
    assert first["val_loss"] == pytest.approx(math.log(vocabulary), abs=0.05)
    counts = np.unique(list(text.read_text()), return_counts=True)[1] / 4000
    assert last["val_loss"] < -float((counts * np.log(counts)).sum())  # lower than the entropy of single characters


@pytest.mark.parametrize(
    ("every", "evaluated", "saved"),
    [((3, 4), [0, 3, 6, 7], {4, 7}), ((0, 0), [0, 7], {7}), ((100, 100), [0, 7], {7}), ((7, 7), [0, 7], {7})],
)
def test_the_last_step_is_evaluated_sampled_and_saved(
    tmp_path: Path, text: Path, every: tuple[int, int], evaluated: list[int], saved: set[int]
) -> None:
    """An earlier implementation neither evaluated nor saved its last step."""
    config = tiny_config(text, steps=7, eval_every=every[0], checkpoint_every=every[1], keep_checkpoints=9)
    run = run_of(config, tmp_path / "run")
    assert [record["step"] for record in evaluations_of(run)] == evaluated
    headings = [line for line in (run / "samples.md").read_text().splitlines() if line.startswith("## ")]
    assert headings == [f"## Step {step:06d}" for step in evaluated]
    # This run's validation loss decreases, so every evaluation is the best so far.
    best = {step for step in evaluated if step}
    assert set(saved_steps(run)) == saved | best


def test_the_newest_and_the_best_checkpoints_are_kept(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_validation_losses(monkeypatch, [9.0, 5.0, 3.0, 4.0, 6.0, 7.0])
    config = tiny_config(text, steps=10, eval_every=2, checkpoint_every=2, keep_checkpoints=2)
    assert saved_steps(run_of(config, tmp_path / "run")) == [4, 8, 10]


def test_a_validation_loss_of_nan_is_never_the_best(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_validation_losses(monkeypatch, [9.0, math.nan, 3.0, 4.0])
    run = run_of(tiny_config(text, steps=6, eval_every=2, checkpoint_every=0, keep_checkpoints=1), tmp_path / "run")
    assert saved_steps(run) == [4, 6]
    assert [record["val_loss"] for record in evaluations_of(run)] == [9.0, None, 3.0, 4.0]


def test_epochs_are_converted_to_steps(tmp_path: Path, text: Path) -> None:
    """3,600 training characters are (3600 - 16) // 16 = 224 windows, four per step, so half an epoch is 28 steps."""
    run = run_of(tiny_config(text, epochs=0.5, sample={"count": 0}, eval_every=0, checkpoint_every=0), tmp_path / "run")
    assert len(steps_of(run)) == 28


def test_a_progress_object_receives_every_record(tmp_path: Path, text: Path) -> None:
    class Listener(Quiet):
        def __init__(self) -> None:
            super().__init__()
            self.records: list[dict[str, Any]] = []
            self.ends: list[tuple[int, int] | Path] = []

        def started(self, run: Path, config: TrainConfig, summary: str, first_step: int, last_step: int) -> None:
            self.ends.append((first_step, last_step))

        def step(self, record: Any) -> None:
            self.records.append(dict(record))

        evaluated = step

        def finished(self, run: Path) -> None:
            self.ends.append(run)

    listener = Listener()
    run = train(tiny_config(text), tmp_path / "run", progress=listener)
    assert listener.records == records_of(run)
    assert listener.ends == [(0, 10), run]


# --- training and validation data -------------------------------------------------------------------------------------


def test_validation_is_the_last_tenth_of_the_text(tmp_path: Path, text: Path) -> None:
    """An earlier implementation validated on training data. The reference takes the last 400 characters of the text."""
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


def test_training_and_validation_texts_do_not_affect_each_other(tmp_path: Path) -> None:
    texts = {name: write_text(tmp_path / name, 4000, seed=index).read_text() for index, name in enumerate("abc")}
    for name in ("ab", "ac", "cb"):
        (tmp_path / name).write_text(texts[name[0]][:3600] + texts[name[1]][3600:])
    runs = {name: run_of(tiny_config(tmp_path / name), tmp_path / f"run-{name}") for name in ("ab", "ac", "cb")}
    assert last_weights(runs["ab"]) == last_weights(runs["ac"])  # different validation text, same training text
    assert last_weights(runs["ab"]) != last_weights(runs["cb"])
    first = {name: evaluations_of(run)[0]["val_loss"] for name, run in runs.items()}
    assert first["ab"] == first["cb"] != first["ac"]  # different training text, same validation text


# --- reproducibility --------------------------------------------------------------------------------------------------


def test_two_runs_with_one_seed_have_the_same_bits_and_another_seed_differs(tmp_path: Path, text: Path) -> None:
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
def test_monitoring_a_run_does_not_change_it(tmp_path: Path, text: Path, change: dict[str, Any]) -> None:
    """For example, samples must not use the random generator of dropout."""
    config = tiny_config(text, model={"dropout": 0.2})
    expected, changed = run_of(config, tmp_path / "expected"), run_of(config.override(**change), tmp_path / "changed")
    assert last_weights(changed) == last_weights(expected)
    assert [r for r in records_without_measurements(changed) if "loss" in r] == [
        r for r in records_without_measurements(expected) if "loss" in r
    ]


def test_the_callers_random_state_does_not_affect_a_run(tmp_path: Path, text: Path) -> None:
    config = tiny_config(text, model={"dropout": 0.2})
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        runs.append(run_of(config, tmp_path / str(seed)))
    assert differences(*runs) == []


def test_micro_batches_change_losses_only_by_rounding(tmp_path: Path, text: Path) -> None:
    losses = []
    for size in (1, 2, 4):
        run = run_of(tiny_config(text, micro_batch_size=size, eval_every=0, checkpoint_every=0), tmp_path / str(size))
        losses.append([record["loss"] for record in steps_of(run)])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-6)


def test_uneven_micro_batches_change_only_rounding_and_dropout_masks(tmp_path: Path, text: Path) -> None:
    """Five sequences in one micro-batch, as 3 + 2 and as 2 + 2 + 1. Equal divisions have equal dropout masks."""

    def losses(dropout: float, size: int, name: str) -> list[float]:
        changes = {"batch_tokens": 80, "micro_batch_size": size, "eval_every": 0, "checkpoint_every": 0, "steps": 4}
        config = tiny_config(text, model={"dropout": dropout}, **changes)
        return [record["loss"] for record in steps_of(run_of(config, tmp_path / f"{name}-{dropout}-{size}"))]

    without_dropout, with_dropout = ([losses(dropout, size, "run") for size in (5, 3, 2)] for dropout in (0.0, 0.3))
    for other in without_dropout[1:]:
        assert other == pytest.approx(without_dropout[0], rel=1e-6)
    for other in with_dropout[1:]:
        assert other != pytest.approx(with_dropout[0], rel=1e-4)
    assert losses(0.3, 4, "same cut") == with_dropout[1]  # at most four is also 3 + 2


def test_training_restores_the_callers_random_state_and_threads(tmp_path: Path, text: Path) -> None:
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
        assert "second Ctrl-C" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert interrupts.signal == signal.SIGINT


def test_training_warns_if_an_update_takes_minutes_on_a_cpu(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 10 kFLOP/s, an update of 64 tokens takes minutes; at 1 GFLOP/s it does not."""
    for peak, expected in ((1e9, 0), (1e4, 1)):
        monkeypatch.setattr("glassgpt.training.setup.peak_flops", lambda device, precision, peak=peak: peak)
        progress = Quiet()
        setup_training(tiny_config(text), Ranks(), progress)
        assert len([message for message in progress.messages if "--batch-tokens" in message]) == expected


def test_the_next_batch_is_read_ahead(text: Path) -> None:
    state = state_for(tiny_config(text))
    for state.step in (0, 1, 2, 5, 6):  # the jump is one after a failed step
        assert torch.equal(state.local_rows(), torch.from_numpy(state.rows(state.step)))
        ahead = state.read_ahead
        assert ahead is not None
        assert ahead[0] == state.step + 1
        assert torch.equal(ahead[1].result(), torch.from_numpy(state.rows(state.step + 1)))


def test_training_without_threads_writes_the_same_files(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of an account or a container may refuse them at any time."""
    config = tiny_config(text, steps=6, eval_every=3, checkpoint_every=2)
    expected = run_of(config, tmp_path / "expected")
    monkeypatch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
    assert differences(run_of(config, tmp_path / "run"), expected) == []


def test_training_works_outside_the_main_thread(tmp_path: Path, text: Path) -> None:
    """Python allows signal handlers only in the main thread, but a notebook may train in another one."""
    done = []
    worker = threading.Thread(target=lambda: done.append(run_of(tiny_config(text), tmp_path / "thread")))
    worker.start()
    worker.join()
    assert done
    assert differences(done[0], run_of(tiny_config(text), tmp_path / "main")) == []


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_non_finite_loss_stops_the_run_and_its_batch_is_saved(tmp_path: Path, text: Path) -> None:
    config = tiny_config(
        text, steps=50, checkpoint_every=2, optim={"lr": 1e15, "warmup_steps": 0}, model={"logit_softcap": None}
    )
    # Each learning rate and each update is finite; the loss becomes infinite or NaN within a few steps.
    with pytest.raises(UserError, match=r"step \d+: the loss is (nan|inf).*lower --optim\.lr") as error:
        run_of(config, tmp_path / "run")
    (path,) = (tmp_path / "run").glob("nonfinite-*.json")
    assert path.name in str(error.value)
    record = json.loads(path.read_text())
    step = record["step"]
    assert f"step {step}:" in str(error.value)
    assert path.name == f"nonfinite-{step:06d}.json"
    batches = Batches([open_dataset(prepare(config.data)).train], 16, 4, config.seed)
    assert record["ids"] == batches.batch_at(step - 1).tolist()
    last = records_of(tmp_path / "run")[-1]
    assert (last["step"], last["loss"]) == (step, None)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_batch_keeps_the_weights_and_the_last_good_checkpoint(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The seventh batch fails once. The checkpoint of step 6 stays, and a resumed run equals one that never failed."""
    forward, bad = GPT.forward, {"calls": 0, "on": True}

    def forward_with_nan(model: GPT, ids: Tensor, targets: Tensor | None = None, *rest: Any, **options: Any) -> Tensor:
        loss = forward(model, ids, targets, *rest, **options)
        bad["calls"] += model.training
        if not (bad["on"] and model.training and bad["calls"] == 14):  # the second micro-batch of the seventh step
            return loss
        return loss * (math.nan if what == "loss" else _one_with_nan_gradient(model))

    monkeypatch.setattr(GPT, "forward", forward_with_nan)
    config = tiny_config(text, checkpoint_every=3, eval_every=0)
    with pytest.raises(UserError, match="step 7: the loss is"):
        run_of(config, tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [3, 6]
    assert (tmp_path / "run" / "nonfinite-000007.json").is_file()
    bad["on"] = False
    resume(tmp_path / "run", progress=Quiet())
    assert differences(tmp_path / "run", run_of(config, tmp_path / "expected")) == []


def _one_with_nan_gradient(model: GPT) -> Tensor:
    """Return 1 with a gradient of NaN, because the slope of the square root at 0 is infinite."""
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
def test_a_run_that_cannot_start_is_refused_before_anything_is_written(
    tmp_path: Path, text: Path, change: dict[str, Any], message: str
) -> None:
    config = tiny_config(text).override(**change)
    out = tmp_path / "runs" / "new"
    with pytest.raises(UserError, match=message):
        run_of(config, out)
    assert not out.parent.exists()
    # With --overwrite, the previous run stays complete.
    previous = run_of(tiny_config(text, steps=2), out)
    before = {path: path.read_bytes() for path in previous.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        train(config, out, overwrite=True, progress=Quiet())
    assert {path: path.read_bytes() for path in previous.rglob("*") if path.is_file()} == before


def test_the_error_for_an_indivisible_batch_names_the_nearest_divisible_ones(text: Path) -> None:
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


def test_a_removed_run_stops_and_writes_nothing_into_its_replacement(tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"

    class Removing(Quiet):
        def step(self, record: Any) -> None:
            if record["step"] == 3:
                shutil.rmtree(run)
                run.mkdir()
                (run / "config.toml").write_text("another run's")

    with pytest.raises(UserError, match="removed"):
        train(tiny_config(text, checkpoint_every=0, eval_every=0), run, progress=Removing())
    assert [path.name for path in run.iterdir()] == ["config.toml"]


def test_a_compiled_run_has_the_same_parameter_names_and_losses(tmp_path: Path, text: Path) -> None:
    """Checkpoints of an earlier implementation had the prefix of the compiled wrapper in every name."""
    config = tiny_config(text, steps=3)
    uncompiled, compiled = (
        run_of(config.override(compile=switch, compile_backend="eager"), tmp_path / switch) for switch in ("off", "on")
    )
    names = [
        set(safetensors.torch.load_file(run / "checkpoints" / "000003" / "model.safetensors"))
        for run in (uncompiled, compiled)
    ]
    assert names[0] == names[1] == {name for name, _ in state_for(config).strategy.model.named_parameters()}
    losses = [[record["loss"] for record in steps_of(run)] for run in (uncompiled, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP on this system")
def test_repeated_sighup_signals_save_and_are_ignored_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with Interrupts(repeats_mean_quit=True, announces=False) as interrupts:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGHUP)
        assert interrupts.signal == signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # like under nohup
        with Interrupts(repeats_mean_quit=True, announces=False) as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
        assert interrupts.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)
