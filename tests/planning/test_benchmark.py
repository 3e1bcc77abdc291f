"""`glassgpt bench` at a tiny size: its figures and their limits."""

import json
from pathlib import Path

import pytest
import torch

from glassgpt.cli.main import main
from glassgpt.config.recipes import recipe
from glassgpt.model.summary import ModelSummary
from glassgpt.planning import benchmark as bench
from glassgpt.planning import throughput

CPU = torch.device("cpu")
TINY = recipe("shakespeare-cpu", model={"vocab_size": 65, "n_layer": 1}, device="cpu")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure for a fraction of a second, and use fixed values for the peak FLOP/s and the training configs."""
    monkeypatch.setattr(bench, "_REPEAT_SECONDS", 0.05)
    monkeypatch.setattr(throughput, "_TOTAL_SECONDS", 0.0)
    monkeypatch.setattr(bench, "measure_peak_flops", lambda precision, device: 1e12)
    monkeypatch.setattr(bench, "training_configs", lambda device: [TINY])


def test_each_figure_is_shown_with_its_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of generation is the mean of the memory bandwidths measured before and after it."""
    rates = iter([(1e9, 5e9), (1e9, 4e9), (1e9, 2e9)])
    monkeypatch.setattr(bench, "_bandwidths", lambda device: next(rates))
    assert main(["bench", "--device", "cpu", "--json", str(tmp_path / "bench.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert figures.pop("glassgpt")
    assert len(lines) == len(figures) == 1 + 2 + 2 + 1 + 1
    training = figures["training, shakespeare-cpu, float32"]
    assert training["limit"] == pytest.approx(1e12 / ModelSummary(TINY.model).training_flops_per_token)
    assert 0 < training["value"] < training["limit"]
    generation = figures["generation, gpt2, float32, batch 1"]
    assert figures["memory, reading"]["value"] == 5
    assert generation["limit"] == pytest.approx(3e9 / (4 * ModelSummary(TINY.model).parameters))


def test_benchmarks_that_do_not_fit_in_memory_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "available_memory", lambda device: 10**6)
    assert [figure.unit for figure in bench.measure(CPU)] == ["TFLOP/s", "TFLOP/s", "GB/s", "GB/s"]


def test_bandwidth_counts_the_bytes_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum reads 154,533,888 bytes and a copy reads and writes them, each in 1 s."""
    monkeypatch.setattr(bench, "fastest_call", lambda function, device, seconds: 1.0)
    assert bench._bandwidths(CPU) == (2 * 4 * 50304 * 768, 4 * 50304 * 768)
