"""A plan against sums by hand, against real updates at a tiny size, and on the command line."""

import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo import register_backend

from glassgpt.cli.main import main
from glassgpt.cli.planning import plan as command
from glassgpt.config.recipes import recipe
from glassgpt.config.schema import DataConfig, TrainConfig
from glassgpt.data.prepare import prepare
from glassgpt.distributed.strategies import Strategy
from glassgpt.interop.hf_models import export_hf
from glassgpt.model.gpt import GPT
from glassgpt.model.summary import ModelSummary
from glassgpt.planning import plan
from glassgpt.planning import throughput as pace
from glassgpt.planning.memory import Memory, bytes_sent_a_step, memory_a_rank
from glassgpt.training.optim import build_optimizers
from glassgpt.utils.device import GPU_PEAKS, GPUS
from glassgpt.utils.errors import UserError
from kill_harness import write_text

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "plan.py"
CPU = torch.device("cpu")
GPT2 = recipe("gpt2", model={"vocab_size": 50257})
SMALL = recipe("shakespeare-cpu", model={"vocab_size": 65, "n_layer": 6}, device="cpu")


def test_a_gpus_time_is_products_and_the_update() -> None:
    """On 8 H100: 524,288 tokens at 40 % of 989 TFLOP/s each, then 40 bytes a parameter at 3.35 TB/s."""
    products = 524288 * ModelSummary(GPT2.model).training_flops_per_token / (8 * 0.4 * 989e12)
    update = 40 * ModelSummary(GPT2.model).parameters / 3.35e12
    whole, sharded = plan.plan(GPT2.override(device="h100"), 8).columns
    assert whole.pace is not None
    assert sharded.pace is not None
    assert whole.pace.seconds == pytest.approx(products + update)
    assert sharded.pace.seconds == pytest.approx(products + update / 8)
    assert whole.tokens_per_second == pytest.approx(524288 / (products + update))
    assert whole.seconds == pytest.approx(19073 * (products + update))


def test_a_slow_network_sets_the_pace() -> None:
    """XL under FSDP on 16 H100, in two hosts: 50 GB/s."""
    config = recipe("gpt2-xl", model={"vocab_size": 50257})
    found = pace.assumed_step_time(config, GPUS["h100"], 16, "fsdp", "bfloat16")
    sent = bytes_sent_a_step(config, 16, "fsdp", "bfloat16") / 50e9
    assert found.blocks + found.head < sent
    assert found.seconds == pytest.approx(sent + found.update)


def test_a_prepared_dataset_brings_its_vocabulary(tmp_path: Path) -> None:
    """Which a text that is only named does not."""
    text = write_text(tmp_path / "text.txt")
    prepared = prepare(DataConfig(source=str(text), tokenizer="characters"), out=tmp_path / "prepared")
    sizes = [
        plan.plan(recipe("shakespeare-cpu", data={"source": str(source)}, device="h100")).parameters
        for source in (text, prepared)
    ]
    assert sizes[0] - sizes[1] == 128 * (100 - len(set(text.read_text(encoding="utf-8"))))


def test_the_largest_micro_batch_fits_and_no_larger_one() -> None:
    found = plan.plan(GPT2.override(device="rtx4090"))
    (column,) = found.columns
    assert column.largest is not None
    sizes = sorted({-(-512 // steps) for steps in range(1, 513)})
    larger = sizes[sizes.index(column.largest) + 1]
    need, above = (
        memory_a_rank(GPT2.override(micro_batch_size=n), 1, "ddp", "bfloat16").total for n in (column.largest, larger)
    )
    assert need <= found.room < above


def test_where_nothing_fits_no_time_is_told() -> None:
    found = plan.plan(recipe("gpt2-xl", model={"vocab_size": 50257}, device="t4"))
    (column,) = found.columns
    assert (column.largest, column.pace, column.seconds) == (None, None, None)
    assert "does not fit" in str(found)


def test_parts_add_up_to_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four micro-steps of 2 sequences, all timed at 2; of six blocks four: 1 and 0.1 s a pass, updates of 0.02 and 0.003 s."""
    monkeypatch.setattr(pace, "_IN_ALL", 0.0)
    seconds = itertools.cycle([1, 0.02, 0.1, 0.003])
    monkeypatch.setattr(pace._Parts, "_seconds", lambda self, function: (function(), next(seconds))[1])
    config = SMALL.override(model={"n_embd": 16, "context_length": 8}, batch_tokens=64, micro_batch_size=2)
    found = pace.measured_step_time(config, CPU, "float32")
    expected = pace.StepTime(blocks=4 * 6 / 4 * 1, head=4 * 0.1, update=6 / 4 * 0.02 + 0.003)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(expected))


def seconds_of_updates(config: TrainConfig, count: int) -> float:
    """The median of real updates, by the time on the processor."""
    strategy = Strategy(GPT.create(config.model, 0))
    optimizers, times = build_optimizers(strategy, config.optim), []
    ids = torch.randint(0, 65, (config.batch_size, config.model.context_length))
    for _ in range(count + 2):
        begin = time.process_time()
        strategy.forward(ids, ids).backward()
        torch.nn.utils.clip_grad_norm_(strategy.model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        strategy.zero_grad()
        times.append(time.process_time() - begin)
    return statistics.median(times[2:])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_takes_about_as_long_as_its_timed_parts_say(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a factor of 1.8, on one thread and by its time on the processor, since other tests run beside this one."""
    monkeypatch.setattr(pace, "_IN_ALL", 0.3)
    config = SMALL.override(optim={"name": optimizer})
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        foretold = pace.measured_step_time(config, CPU, "float32", time.process_time).seconds
        assert 1 / 1.8 < foretold / seconds_of_updates(config, 10) < 1.8
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="the largest resident memory is read from /proc")
def test_a_runs_memory_is_about_what_is_foretold(tmp_path: Path) -> None:
    """Of a fresh process that trains: within a quarter (docs/performance.md has three sizes, measured within 4 %)."""
    write_text(tmp_path / "text.txt", 60_000)
    foretold, real = (benchmark_child(what, tmp_path) for what in ("predict", "train"))
    assert 0.8 < foretold["memory"] / (real["memory"] - foretold["libraries"]) < 1.25


def benchmark_child(what: str, folder: Path) -> dict[str, float]:
    """The figures of one process of benchmarks/plan.py."""
    command = [sys.executable, str(BENCHMARK), "--child", what, "shakespeare-cpu", str(folder)]
    environment = {**os.environ, "GLASSGPT_CACHE": str(folder)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def test_parts_are_compiled_where_training_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks, which share a graph, and the model without them, each whole and once; by a backend that runs them as they are."""
    monkeypatch.setattr(pace, "_IN_ALL", 0.0)
    graphs: list[torch.fx.GraphModule] = []

    def collecting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    register_backend(collecting, name="collecting")
    changes = {"batch_tokens": 64, "micro_batch_size": 1, "compile": "on", "compile_backend": "collecting"}
    config = SMALL.override(model={"n_embd": 16, "context_length": 8}, **changes)
    assert pace.measured_step_time(config, CPU, "float32").seconds > 0
    assert len(graphs) == 2


def test_a_plan_of_this_machine_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "measured_step_time", lambda config, device, precision: pace.StepTime(1.0, 0.5, 0.5))
    assert main(["plan", "shakespeare-cpu", "--device", "cpu", "--steps", "100"]) == 0
    said = capsys.readouterr().out
    lines = {line[:22].strip(): line[22:] for line in said.splitlines()}
    assert (lines["a step"], lines["tokens/s"], lines["100 steps"]) == ("2 s", "384", "3:20")
    assert "libraries" in lines
    assert "100 different characters" in said


def test_parts_of_memory_are_shown_with_their_sum(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gpt2", "--device", "h100", "--gpus", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    parts = [
        line.split()[-4::2] for line in lines if line.startswith("  ") and line.endswith("B") and "room" not in line
    ]
    whole = next(line for line in lines if line.startswith("memory a rank")).split()[-4::2]
    scale = {"GB": 1.0, "MB": 1e-3}
    units = [
        line.split()[-3::2] for line in lines if line.startswith("  ") and line.endswith("B") and "room" not in line
    ]
    for index, total in enumerate(whole):
        found = sum(float(part[index]) * scale[unit[index]] for part, unit in zip(parts, units, strict=True))
        assert found == pytest.approx(float(total), abs=0.05)
    assert len(parts) == len(dataclasses.fields(Memory))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gpt2", "--device", "h10"], "no device 'h10'; did you mean 'h100'?"),
        (["gpt2", "--device", "h100", "--gpus", "7"], "7 processes cannot share"),
        (["gpt2", "--device", "h100", "--gpus", "0"], "--gpus must be at least 1"),
        (["gpt2", "--device", "cpu", "--gpus", "2"], "--gpus 2 is for a GPU by its name"),
        (["gpt2", "--device", "cpu", "--model.attention", "flex"], "model.attention = 'flex' trains on CUDA only"),
        (["gpt2", "--device", "t4", "--precision", "bfloat16"], "the T4 has no bfloat16"),
        (
            ["gpt2", "--device", "h100", "--strategy", "fsdp", "--cpu-offload"],
            "plan does not know what --cpu-offload leaves",
        ),
        (["gpt2", "--resume", "runs/x"], "plan is for a new run"),
        (["gpt-2"], "no recipe 'gpt-2'; did you mean 'gpt2'"),
    ],
)
def test_a_mistake_is_told(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_command_line_of_a_training_can_be_tried(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = [
        "--data",
        "my.txt",
        "--column",
        "text",
        "--out",
        str(tmp_path / "run"),
        "--overwrite",
        "--model.n-layer",
        "6",
    ]
    assert main(["plan", "shakespeare-cpu", *options, "--device", "h100"]) == 0
    assert f"{ModelSummary(SMALL.override(model={'vocab_size': 100}).model).parameters:,}" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_run_is_no_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(GPT2.to_toml(), encoding="utf-8")
    assert main(["plan", str(tmp_path)]) == 2
    assert f"what it was trained by is {tmp_path / 'config.toml'}" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "config.toml"), "--device", "h100"]) == 0


def test_a_run_that_goes_on_has_the_shape_of_the_model_before(tmp_path: Path) -> None:
    shape = GPT2.model.with_shorter_context(64)
    export_hf(GPT.create(dataclasses.replace(shape, n_layer=1, n_embd=48, vocab_size=128), 0), None, tmp_path / "model")
    found = plan.plan(recipe("finetune-shakespeare", init_from=str(tmp_path / "model"), device="h100"))
    assert found.parameters == ModelSummary(dataclasses.replace(shape, n_layer=1, n_embd=48, vocab_size=128)).parameters
    assert "bound by starting their kernels" in str(found)
    with pytest.raises(UserError, match="nothing does not exist"):
        plan.plan(recipe("finetune-shakespeare", init_from=str(tmp_path / "nothing"), device="h100"))


def test_help_names_every_gpu() -> None:
    assert all(f" {name}," in f"{command.__doc__} ".replace("\n   ", "").replace(".", ",") for name in GPUS)
    assert {gpu.name for gpu in GPUS.values()} == {name for name, _ in GPU_PEAKS}


def test_an_unknown_length_is_asked_for() -> None:
    config = GPT2.override(epochs=1.0, device="h100", batch_tokens=8192)
    assert "give --steps N" in str(plan.plan(config))
    with pytest.raises(UserError, match="cannot share"):
        plan.plan(config, 3)
