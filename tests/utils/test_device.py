"""Device, precision, peak rates and the recorded environment; GPUs are mocked."""

import json
import os
import platform
import subprocess
import sys
from contextlib import suppress

import pytest
import torch

from glassgpt.utils import device as hardware
from glassgpt.utils.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_the_default_device_is_cuda_then_mps_then_cpu(
    cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert hardware.find_device().type == expected


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cpu:1", "meta", "cuda", "cuda:0", "mps"])
def test_an_unknown_or_unavailable_device_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="device"):
        hardware.find_device(name)


def test_a_gpu_index_beyond_the_device_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert hardware.find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="'cuda:2' is not available"):
        hardware.find_device("cuda:2")


@pytest.mark.parametrize(("bfloat16", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_automatic_precision_is_bfloat16_only_on_gpus_that_support_it(
    bfloat16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bfloat16
    )
    assert hardware.find_precision("auto", CUDA) == expected
    assert hardware.find_precision("native", CUDA) == expected
    assert hardware.find_precision("auto", CPU) == "float32"


@pytest.mark.parametrize(
    ("capability", "expected"), [("avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("avx512_f", "float32")]
)
def test_native_precision_is_bfloat16_on_a_cpu_that_multiplies_it(
    capability: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True, "avx512_fp16": False})
    assert hardware.find_precision("native", CPU) == expected
    assert hardware.find_precision("native", torch.device("mps")) == "float32"


@pytest.mark.parametrize("name", ["tf32", "float16"])
def test_a_precision_that_the_device_does_not_support_is_refused(name: str) -> None:
    assert hardware.find_precision(name, CUDA) == name
    with pytest.raises(UserError, match=f"'{name}'.*float32"):
        hardware.find_precision(name, CPU)


@pytest.mark.parametrize(("precision", "inside"), [("tf32", "high"), ("float32", "highest"), ("bfloat16", "highest")])
def test_matmul_precision_restores_the_setting_after_the_context(precision: str, inside: str) -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        with suppress(ZeroDivisionError), hardware.matmul_precision(precision):
            assert torch.get_float32_matmul_precision() == inside
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float32", torch.float32), ("tf32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_autocast_sets_the_dtype_of_matrix_products(precision: str, dtype: torch.dtype) -> None:
    with hardware.autocast(CPU, precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Tesla V100-SXM2-16GB", None),  # no bfloat16
        # These names contain that of another GPU: no figure is better than a wrong one.
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_flops_of_gpus(name: str, teraflops: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The references are the dense bfloat16 rates in NVIDIA's data sheets, without sparsity."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    expected = teraflops and teraflops * 1e12
    assert hardware.peak_flops(CUDA, "bfloat16") == expected


def test_the_peak_of_a_cpu_counts_two_flops_per_multiply_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mocked clock advances 20 ms per call, so a product of 1024 x 1024 matrices takes 20 ms."""
    ticks = iter(range(1000))
    monkeypatch.setattr("glassgpt.utils.device.time.perf_counter", lambda: 0.02 * next(ticks))
    assert hardware.peak_flops(CPU, "float32") == pytest.approx(2 * 1024**3 / 0.02)
    assert hardware.peak_flops(torch.device("mps"), "float32") is None


@pytest.mark.slow
def test_memory_used_grows_by_the_bytes_of_a_new_tensor() -> None:
    """A tensor of 64 MiB adds 64 MiB, to within 16 MiB for other allocations of the process.

    The test runs in a new process: this one may reuse memory that earlier tests freed, and then would not grow.
    """
    code = """
import torch
from glassgpt.utils.device import memory_used
before = memory_used(torch.device("cpu"))
block = torch.ones(64 * 2**20, dtype=torch.uint8)
print(memory_used(torch.device("cpu")) - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert abs(int(result.stdout) - 64 * 2**20) < 16 * 2**20


def test_the_environment_records_everything_that_affects_bits() -> None:
    environment = hardware.describe_environment(CPU, "float32")
    assert json.loads(json.dumps(environment)) == environment
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert (environment["device"], environment["precision"]) == ("cpu", "float32")
    assert environment["cpu"]
    assert environment["cpu_capability"]


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_memory_is_kept_for_the_next_tensors() -> None:
    # Each round allocates and frees ten tensors of 1.5 MB: 4,000 pages of 4 KiB. If the C library returns them to the
    # kernel, each round has as many page faults.
    code = """
import resource, sys, torch
from glassgpt.utils.device import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        tensors = [torch.zeros(393216) for _ in range(10)]
        del tensors
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / rounds
faults(3)
print(faults(20))
"""
    # Whether freed memory is at the top of the heap is random, so this threshold makes malloc take each tensor from
    # the kernel unless `keep_freed_memory` changes it.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    faults = {}
    for mode in ("default", "keep"):
        result = subprocess.run(
            [sys.executable, "-c", code, mode], capture_output=True, text=True, check=True, env=environment
        )
        faults[mode] = float(result.stdout)
    assert faults["default"] > 1000
    assert faults["keep"] < 100
