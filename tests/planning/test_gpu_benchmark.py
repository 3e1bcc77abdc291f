"""`benchmarks/gpu.py` without a GPU: parts that fail or exceed their time limit, and settings that training accepts."""

import json
import os
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu  # benchmarks/gpu.py

MACHINE = {"device": "a device", "torch": "2", "cuda": "13", "commit": "abc", "date": "2026-11-22"}


def part_with_rate(rate: float) -> Callable[[float], gpu.Result]:
    """Return a part of the benchmark that reports this many tokens/s."""
    return lambda limit: {"tokens_per_second": rate, "lowest": rate, "highest": rate, "peak_share": 0.5, "limit": limit}


def failing_part(limit: float) -> gpu.Result:
    raise RuntimeError("CUDA out of | memory")


def test_other_parts_still_run_after_one_fails_or_is_skipped() -> None:
    parts = [
        gpu.Part("one", 50, 1, part_with_rate(1.0)),
        gpu.Part("two", 50, 1, failing_part),
        gpu.Part("three", 500, 1, part_with_rate(3.0)),
        gpu.Part("four", 50, 100, part_with_rate(4.0)),
    ]
    counts: list[int] = []
    results = gpu.run_parts(parts, 1.0, lambda results: counts.append(len(results)))
    assert counts == [1, 2, 3, 4]
    assert results[0]["limit"] == 50
    assert 50 < results[2]["limit"] <= 60  # the rest of one minute
    assert "failed" in results[1]["note"]
    assert "left out" in results[3]["note"]


@pytest.mark.slow
def test_a_command_that_exceeds_its_limit_is_killed_with_its_child_processes(tmp_path: Path) -> None:
    """Otherwise the compiler's workers would keep their GPU memory."""
    script = "import subprocess; p = subprocess.Popen(['sleep', '60']); open('pid', 'w').write(str(p.pid)); p.wait()"
    with pytest.raises(gpu.PartError, match="ended after"):
        gpu.output_of([sys.executable, "-c", script], 2, cwd=tmp_path)
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.02)
    os.kill(pid, 9)
    raise AssertionError("the child process is still running")


def test_every_setting_is_a_valid_config_for_every_gpu_size(tmp_path: Path) -> None:
    """An update has GPT-3's 2**19 tokens if the micro-batch divides them, as all sizes here do."""
    for memory in (6.0, 15.0, 24.0, 40.0, 80.0, 141.0):
        options = Namespace(cpu=False, build_nanogpt=tmp_path, nanogpt=tmp_path)
        parts = gpu.param_groups(options, tmp_path, memory)
        assert len({part.name for part in parts}) == len(parts)
        for name in ("tests", "build-nanogpt as it is", "nanoGPT, compiled", "generation"):
            assert name in [part.name for part in parts]
    for rows, length in ((64, 1024), (4, 1024), (16, 2048), (8, 4096), (1, 4096)):
        config = gpu.Setting(rows=rows, model={"context_length": length}).config(tmp_path)
        assert config.batch_tokens == 2**19
        assert config.micro_steps(1) == 2**19 // (rows * length)


@pytest.mark.slow
def test_a_setting_is_measured_and_traced(tmp_path: Path) -> None:
    gpu.write_tokens(tmp_path / "tokens", 2**12)
    result = json.loads(
        json.dumps(gpu.measured(gpu.Setting(rows=4, updates=3, trace=True, cpu=True), tmp_path / "tokens"))
    )
    assert result["updates"] == 3
    assert result["lowest"] <= result["tokens_per_second"] <= result["highest"]
    kernels = [row["kernel"] for row in result["trace"]["kernels"]]
    assert "aten::mm" in kernels
    assert "One update (it)" in gpu.as_markdown(MACHINE, [{"name": "it", **result}])


@pytest.mark.slow
def test_the_tests_that_need_a_gpu_are_found(tmp_path: Path) -> None:
    """Without a GPU all of them are skipped; a wrong path would be an error of pytest."""
    result = gpu.run_tests(tmp_path, 120)
    assert re.search(r"[0-9]+ (passed|skipped)", result["tests"])
    assert result["failed"] == []
    assert result["output"] == ""
