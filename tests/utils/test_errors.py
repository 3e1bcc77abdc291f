"""Helpers for errors: suggestions for misspelt names and paths, and recognition of out-of-memory errors."""

import pickle
from pathlib import Path

import pytest
import torch

from glassgpt.utils.errors import UserError, did_you_mean, is_out_of_memory, nearby_path, shown


def test_a_near_name_is_suggested() -> None:
    assert did_you_mean("steps", ["step", "seed"]) == "; did you mean 'step'?"
    assert did_you_mean("xyz", ["step", "seed"]) == did_you_mean("step", ["step", "seed"]) == ""


def test_a_near_path_is_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs", "demo").mkdir(parents=True)
    Path("text.txt").touch()
    expected = {"rnus/dmo": "runs/demo", "runs/dmo": "runs/demo", "demo": "runs/demo", "txet.txt": "text.txt"}
    expected |= {f"{tmp_path}/runs/dem": f"{tmp_path}/runs/demo"}
    assert {name: nearby_path(name) for name in expected} == expected
    Path("one.txt").touch()
    Path("dangling").symlink_to("nowhere")
    wrong = ("dangling", "acme/tiny", "runs/other", "text.txt/x", "nothing", "nofile.txt", "two.txt", "x" * 300, "\0")
    assert [name for name in wrong if nearby_path(name) is not None] == []


def test_an_error_has_no_control_characters_and_no_long_line() -> None:
    error = UserError(f"first {'x' * 100_000} last\n\x1b[31mred\x07\r\u202e\udcff")
    first, second = str(error).split("\n")
    assert first.startswith("first x")
    assert first.endswith("x last")
    assert len(first) < 1000
    assert second == r"\x1b[31mred\x07\r\u202e\udcff"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    ("value", "text"),
    [("it's", '"it\'s"'), (10**6, "1000000"), (int("9" * 50), "999…999 (50 digits)"), ([1, "a"], "[1, 'a']")],
)
def test_a_quoted_value_is_short(value: object, text: str) -> None:
    assert shown(value) == text
    assert all(len(shown(long)) < 350 for long in ("x" * 10**6, [value] * 10**5, 16**6000, {"a": "y" * 10**5}))


def test_memory_errors_of_python_torch_and_the_gpu_are_recognised() -> None:
    errors: list[BaseException] = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")]
    for size in (1 << 55, 1 << 62):
        with pytest.raises(RuntimeError) as caught:
            torch.empty(size)
        errors.append(caught.value)
    texts = ["std::bad_alloc", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"]
    texts += ["MPS backend out of memory", "unable to mmap 8 bytes from file <x>: Cannot allocate memory (12)"]
    assert all(map(is_out_of_memory, (*errors, *map(RuntimeError, texts))))
    others = ("OutOfMemoryError", "CUDA error: an illegal memory access was encountered", "size mismatch for x")
    assert not any(map(is_out_of_memory, (*map(RuntimeError, others), ValueError("DefaultCPUAllocator"))))
