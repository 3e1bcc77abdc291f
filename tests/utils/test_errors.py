"""Helpers for errors: suggestions for misspelt names and paths, and recognition of out-of-memory errors."""

from pathlib import Path

import pytest
import torch

from glassgpt.utils.errors import did_you_mean, is_out_of_memory, nearby_path


def test_a_near_name_is_suggested() -> None:
    assert did_you_mean("steps", ["step", "seed"]) == "; did you mean 'step'?"
    assert did_you_mean("xyz", ["step", "seed"]) == ""


def test_a_near_path_is_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs", "demo").mkdir(parents=True)
    Path("text.txt").touch()
    expected = {"rnus/dmo": "runs/demo", "runs/dmo": "runs/demo", "demo": "runs/demo", "txet.txt": "text.txt"}
    expected |= {f"{tmp_path}/runs/dem": f"{tmp_path}/runs/demo"}
    assert {name: nearby_path(name) for name in expected} == expected
    assert [nearby_path(name) for name in ("acme/tiny", "runs/other", "text.txt/x", "nothing")] == [None] * 4


def test_memory_errors_of_python_torch_and_the_gpu_are_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert all(map(is_out_of_memory, (caught.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory"))))
    assert not any(map(is_out_of_memory, (RuntimeError("OutOfMemoryError"), ValueError("DefaultCPUAllocator"))))
