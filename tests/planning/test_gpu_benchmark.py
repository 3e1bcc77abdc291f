"""`benchmarks/gpu.py` as far as it goes without a GPU: parts that fail, limits, peers' scripts, tables."""

import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu  # benchmarks/gpu.py

MACHINE = {"device": "a device", "torch": "2", "cuda": "13", "commit": "abc", "date": "2026-11-22"}


def result_of(rate: float) -> Callable[[float], gpu.Result]:
    return lambda limit: {"tokens_per_second": rate, "lowest": rate, "highest": rate, "peak_share": 0.5, "limit": limit}


def raising(limit: float) -> gpu.Result:
    raise RuntimeError("CUDA out of | memory")


def test_a_part_that_fails_or_has_no_time_is_told_and_the_others_run() -> None:
    parts = [
        gpu.Part("one", 50, 1, result_of(1.0)),
        gpu.Part("two", 50, 1, raising),
        gpu.Part("three", 500, 1, result_of(3.0)),
        gpu.Part("four", 50, 100, result_of(4.0)),
    ]
    told: list[int] = []
    results = gpu.run_parts(parts, 1.0, lambda results: told.append(len(results)))
    assert told == [1, 2, 3, 4]
    assert results[0]["limit"] == 50
    assert 50 < results[2]["limit"] <= 60  # what is left of a minute
    assert "failed" in results[1]["note"]
    assert "left out" in results[3]["note"]
    table = gpu.as_markdown(MACHINE, results)
    assert "| one | 1 | 1 … 1 | 50.0 % |" in table
    assert "CUDA out of \\| memory" in table
    assert len({line.replace("\\|", "").count("|") for line in table.splitlines() if line.startswith("|")}) == 1


def test_the_bar_is_held_against_the_faster_of_the_peers() -> None:
    rates = {"bfloat16, compiled, 64 x 1024": 130.0, "build-nanogpt as it is": 50.0, "build-nanogpt, compiled": 104.0}
    results: list[gpu.Result] = [{"name": name, **result_of(rate)(1.0)} for name, rate in rates.items()]
    assert "1.25 times build-nanogpt's tokens/s (the faster of its two); the bar is 1.3: missed" in gpu.as_markdown(
        MACHINE, results
    )
    assert "bar" not in gpu.as_markdown(MACHINE, results[:1])


def test_without_a_gpu_a_line_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_only_the_named_lines_of_a_script_are_changed() -> None:
    text = "B = 64 # micro batch size\nuse_compile = False\nif x:\n    B = 3\n"
    assert (
        gpu.with_lines(text, {"B": 8, "use_compile": True})
        == "B = 8 # micro batch size\nuse_compile = True\nif x:\n    B = 3\n"
    )
    with pytest.raises(gpu.PartError, match="sets T 0 times"):
        gpu.with_lines(text, {"T": 8})


PEER = """
import os, time
import numpy as np
import tiktoken
from hellaswag import iterate_examples, render_example
B = 64
assert len(np.load("edu_fineweb10B/edufineweb_train_000000.npy")) > 500_000
assert len(list(iterate_examples("val"))) == 1
for step in range(100000):
    print(f"step {step} | loss: 1.0 | tok/sec: {step * 1000 + B:.2f}")
    time.sleep(0.001)
"""


def test_a_peer_tells_its_own_figures_and_is_ended(tmp_path: Path) -> None:
    """The first two updates aside, the next ten: 2,008 to 11,008."""
    source, work = tmp_path / "source", tmp_path / "work"
    source.mkdir()
    work.mkdir()
    (source / "train_gpt2.py").write_text(PEER)
    found = gpu.run_build_nanogpt(source, work, {"B": 8}, 60)
    assert (found["lowest"], found["tokens_per_second"], found["highest"]) == (2008, 6508, 11008)
    assert found["changed"] == "B = 8"
    assert (source / "train_gpt2.py").read_text() == PEER


def test_a_peer_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print('iter 0: time 5ms')\nraise RuntimeError('no memory')")
    with pytest.raises(gpu.PartError, match="RuntimeError: no memory"):
        gpu.lines_of(["train.py"], tmp_path, r"time ([\d.]+)ms", 60)


def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """As the compiler's workers are, which would else keep their memory on the GPU."""
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
    raise AssertionError("it goes on")


def test_every_setting_is_a_config_that_training_takes(tmp_path: Path) -> None:
    """On every size of GPU; and an update is GPT-3's half a million tokens where the micro-batch divides it."""
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


def test_a_setting_is_measured_and_traced(tmp_path: Path) -> None:
    gpu.write_tokens(tmp_path / "tokens", 2**12)
    found = json.loads(
        json.dumps(gpu.measured(gpu.Setting(rows=4, updates=3, trace=True, cpu=True), tmp_path / "tokens"))
    )
    assert found["updates"] == 3
    assert found["lowest"] <= found["tokens_per_second"] <= found["highest"]
    kernels = [row["kernel"] for row in found["trace"]["kernels"]]
    assert "aten::mm" in kernels
    assert "One update (it)" in gpu.as_markdown(MACHINE, [{"name": "it", **found}])
