"""Plans equal sums by hand and measured updates of a tiny model; the output of `glassgpt plan`."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glassgpt.cli.main import main
from glassgpt.cli.train import Plan
from glassgpt.config.recipes import recipe
from glassgpt.config.schema import DataConfig
from glassgpt.data.prepare import prepare
from glassgpt.interop.hf_models import export_hf
from glassgpt.model.gpt import GPT
from glassgpt.model.summary import ModelSummary
from glassgpt.planning import plan, throughput
from glassgpt.planning.memory import Memory, bytes_sent_per_update, memory_per_rank
from glassgpt.utils.errors import UserError
from glassgpt.utils.formatting import format_duration
from glassgpt.utils.gpu_specs import GPUS
from kill_harness import write_text

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "plan.py"
CPU = torch.device("cpu")
GPT2 = recipe("gpt2", model={"vocab_size": 50257})
SMALL = recipe("shakespeare-cpu", model={"vocab_size": 65, "n_layer": 6}, device="cpu")


def test_step_time_on_gpus_is_matrix_products_plus_the_update() -> None:
    """8 H100 compute 524,288 tokens at 40 % of 989 TFLOP/s each, then update 40 bytes per parameter at 3.35 TB/s."""
    products = 524288 * ModelSummary(GPT2.model).training_flops_per_token / (8 * 0.4 * 989e12)
    update = 40 * ModelSummary(GPT2.model).parameters / 3.35e12
    estimate = plan.plan(GPT2.override(device="h100"), 8)
    assert estimate.columns[0].step_time == pytest.approx(products + update)
    assert estimate.columns[1].step_time == pytest.approx(products + update / 8)
    assert f"{524288 / (products + update):,.0f}" in str(estimate)
    assert format_duration(19073 * (products + update)) in str(estimate)


def test_a_slow_network_determines_the_step_time() -> None:
    """GPT-2 XL is trained with FSDP on 16 H100 in two hosts, whose network has 50 GB/s."""
    config = recipe("gpt2-xl", model={"vocab_size": 50257})
    seconds = throughput.estimated_step_time(config, GPUS["h100"], 16, "fsdp", "bfloat16")
    sent = bytes_sent_per_update(config, 16, "fsdp", "bfloat16") / 50e9
    assert seconds == pytest.approx(sent + 40 * ModelSummary(config.model).parameters / 16 / 3.35e12)


def test_a_plan_takes_the_vocabulary_size_from_a_prepared_dataset(tmp_path: Path) -> None:
    """Otherwise it assumes a typical size, here 100 characters."""
    text = write_text(tmp_path / "text.txt")
    prepared = prepare(DataConfig(source=str(text), tokenizer="characters"), out=tmp_path / "prepared")
    sizes = [
        plan.plan(recipe("shakespeare-cpu", data={"source": str(source)}, device="h100")).config.model.vocab_size
        for source in (text, prepared)
    ]
    assert sizes == [100, len(set(text.read_text(encoding="utf-8")))]


def test_the_largest_micro_batch_fits_and_the_next_larger_one_does_not() -> None:
    estimate = plan.plan(GPT2.override(device="rtx4090"))
    (column,) = estimate.columns
    assert column.largest is not None
    sizes = sorted({-(-512 // steps) for steps in range(1, 513)})
    larger = sizes[sizes.index(column.largest) + 1]
    need, above = (
        memory_per_rank(GPT2.override(micro_batch_size=n), 1, "ddp", "bfloat16").total for n in (column.largest, larger)
    )
    assert need <= estimate.available < above


def test_no_step_time_is_shown_if_no_micro_batch_fits() -> None:
    estimate = plan.plan(recipe("gpt2-xl", model={"vocab_size": 50257}, device="t4"))
    (column,) = estimate.columns
    assert (column.largest, column.step_time) == (None, None)
    assert "does not fit" in str(estimate)


def test_a_step_takes_the_time_of_its_passes_plus_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight sequences take four passes of two, with 1 s per pass and 0.02 s per update."""
    monkeypatch.setattr(throughput, "_TOTAL_SECONDS", 0.0)
    build_step = throughput._build_step

    def build(*arguments: Any) -> Callable[[int], tuple[float, float]]:
        measure = build_step(*arguments)
        return lambda count: (1.0, 0.02) if min(measure(count)) > 0 else (0.0, 0.0)

    monkeypatch.setattr(throughput, "_build_step", build)
    config = SMALL.override(model={"n_embd": 16, "context_length": 8}, batch_tokens=64, micro_batch_size=2)
    assert throughput.measured_step_time(config, CPU, "float32") == pytest.approx(4.02)


def test_the_time_of_a_large_micro_batch_is_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 1 s per sequence, two sequences fit in the limit of 2.5 s; the time of four is twice theirs."""
    monkeypatch.setattr(throughput, "_TOTAL_SECONDS", 0.0)
    counts: list[int] = []

    def measure(count: int) -> tuple[float, float]:
        counts.append(count)
        return 1.0 * count, 0.5

    monkeypatch.setattr(throughput, "_build_step", lambda *arguments: measure)
    config = SMALL.override(model={"n_embd": 16, "context_length": 8}, batch_tokens=32, micro_batch_size=4)
    assert throughput.measured_step_time(config, CPU, "float32") == 4.5
    assert set(counts) == {1, 2}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the largest resident memory is read from /proc")
def test_the_memory_of_a_run_is_near_the_estimate(tmp_path: Path) -> None:
    """A fresh process trains; its peak memory is within a quarter of the estimate.

    benchmarks/plan.py measures three sizes and requires 10 %.
    """
    write_text(tmp_path / "text.txt", 60_000)
    estimate, real = (benchmark_child(what, tmp_path) for what in ("predict", "train"))
    assert 0.8 < estimate["memory"] / (real["memory"] - estimate["libraries"]) < 1.25


def benchmark_child(what: str, folder: Path) -> dict[str, float]:
    """Run one process of benchmarks/plan.py and return its figures."""
    command = [sys.executable, str(BENCHMARK), "shakespeare-cpu", "--child", what, "--folder", str(folder)]
    environment = {**os.environ, "GLASSGPT_CACHE": str(folder)}
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120)
    figures: dict[str, float] = json.loads(result.stdout)
    return figures


def test_the_output_of_a_plan_for_this_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "measured_step_time", lambda config, device, precision: 2.0)
    assert main(["plan", "shakespeare-cpu", "--device", "cpu", "--steps", "100"]) == 0
    output = capsys.readouterr().out
    lines = {line[:22].strip(): line[22:] for line in output.splitlines()}
    assert (lines["time per step"], lines["tokens/s"], lines["100 steps"]) == ("2 s", "384", "3:20")
    assert "libraries" in lines
    assert "100 different characters" in output
    assert "available" in lines


def test_the_memory_components_in_the_output_add_up_to_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gpt2", "--device", "h100", "--gpus", "8"]) == 0
    units = {"GB": 1.0, "MB": 1e-3, "bytes": 1e-9}
    table = {
        line[:21]: [float(size) * units[unit] for size, unit in re.findall(r"([\d.]+) (GB|MB|bytes)", line[21:])]
        for line in capsys.readouterr().out.splitlines()
    }
    names = [name for name in table if re.match(r"  \w", name) and name.strip() != "available"]
    assert len(names) == len(dataclasses.fields(Memory)) - 1  # only a CPU has the heap component
    total = next(sizes for name, sizes in table.items() if name.startswith("memory per rank"))
    assert [sum(sizes) for sizes in zip(*(table[name] for name in names), strict=True)] == pytest.approx(
        total, abs=0.05
    )


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["gpt2", "--device", "h10"], ["'h10'", "'h100'"]),
        (["gpt2", "--device", "h100", "--gpus", "7"], ["7 processes"]),
        (["gpt2", "--device", "h100", "--gpus", "0"], ["--gpus", "got 0"]),
        (["gpt2", "--device", "cpu", "--gpus", "2"], ["--gpus 2", "h100"]),
        (["gpt2", "--device", "cpu", "--model.attention", "flex"], ["model.attention = 'flex'"]),
        (["gpt2", "--device", "t4", "--precision", "bfloat16"], ["T4", "bfloat16"]),
        (["gpt2", "--device", "h100", "--strategy", "fsdp", "--cpu-offload"], ["--cpu-offload"]),
        (["gpt2", "--resume", "runs/x"], ["--resume"]),
        (["gpt-2"], ["'gpt-2'", "'gpt2'"]),
    ],
)
def test_errors_name_the_wrong_value(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts), message


def test_plan_accepts_the_options_of_train(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = "--data my.txt --column text --overwrite --model.n-layer 6 --device h100 --out".split()
    assert main(["plan", "shakespeare-cpu", *options, str(tmp_path / "run")]) == 0
    assert f"{ModelSummary(SMALL.override(model={'vocab_size': 100}).model).parameters:,}" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_run_directory_is_refused_but_its_config_file_is_accepted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text(GPT2.to_toml(), encoding="utf-8")
    assert main(["plan", str(tmp_path)]) == 2
    assert str(tmp_path / "config.toml") in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "config.toml"), "--device", "h100"]) == 0


def test_a_plan_for_finetuning_has_the_shape_of_the_initial_model(tmp_path: Path) -> None:
    shape = GPT2.model.with_shorter_context(64)
    export_hf(GPT.create(dataclasses.replace(shape, n_layer=1, n_embd=48, vocab_size=128), 0), None, tmp_path / "model")
    estimate = plan.plan(recipe("finetune-shakespeare", init_from=str(tmp_path / "model"), device="h100"))
    parameters = ModelSummary(dataclasses.replace(shape, n_layer=1, n_embd=48, vocab_size=128)).parameters
    assert f"parameters            {parameters:,}\n" in str(estimate)
    assert "limited by starting kernels" in str(estimate)
    with pytest.raises(UserError, match="nothing"):
        plan.plan(recipe("finetune-shakespeare", init_from=str(tmp_path / "nothing"), device="h100"))


def test_help_names_every_gpu() -> None:
    assert all(f" {name}," in f"{Plan.__doc__} ".replace("\n   ", "").replace(".", ",") for name in GPUS)


def test_a_plan_in_epochs_of_unknown_length_asks_for_steps() -> None:
    config = GPT2.override(epochs=1.0, device="h100", batch_tokens=8192)
    assert "give --steps N" in str(plan.plan(config))
    with pytest.raises(UserError, match="3 processes"):
        plan.plan(config, 3)
