"""The machine: device and precision, peak arithmetic rate, memory, and what a run records about its environment."""

import ctypes
import itertools
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from glassgpt.utils.errors import UserError
from glassgpt.utils.formatting import format_bytes
from glassgpt.utils.gpu_specs import find_gpu
from glassgpt.utils.openmp import numeric_variables


def find_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name; `auto` is CUDA, MPS or the CPU. Raises `UserError` if it is not available."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}; use auto, cpu, cuda, cuda:1 or mps") from None
    available = {
        "cpu": device.index in (None, 0),
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise UserError(f"device {name!r} is not available here or in this build of torch; use auto to choose one")
    return device


def find_precision(name: str, device: torch.device) -> str:
    """The precision that a name means on a device. Raises `UserError` if the device lacks it."""
    if name == "native" or (name == "auto" and device.type == "cuda"):
        return "bfloat16" if _has_bfloat16(device) else "float32"
    if name == "auto":
        return "float32"  # on a CPU bfloat16 does not speed up every model: its attention is slow on short texts
    if name == "tf32" and device.type != "cuda":
        raise UserError(f"precision 'tf32' needs a CUDA device, and this run uses {device.type}; use float32")
    if name == "float16" and device.type == "cpu":
        raise UserError("precision 'float16' trains on GPUs only; on the CPU use float32 or bfloat16")
    return name


def _has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16, without emulation."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def require_kernel(attention: str, device: torch.device) -> None:
    """Raise `UserError` if the kernel `model.attention` cannot train on a device."""
    if attention == "flex" and device.type != "cuda":
        raise UserError(f"model.attention = 'flex' trains on CUDA only: on {device.type} it has no gradients; use sdpa")


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Allow TF32 products inside for `tf32`, otherwise forbid them; restores the setting of the process."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 or float16; nothing for float32 and tf32."""
    if precision in ("bfloat16", "float16"):
        return torch.autocast(device.type, dtype=getattr(torch, precision))
    return nullcontext()


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished, for timing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of matrix products: a GPU's by its data sheet, a CPU's measured (0.3 s), otherwise None."""
    if device.type == "cuda":
        gpu = find_gpu(torch.cuda.get_device_name(device))
        return None if gpu is None else gpu.peaks.get(precision)
    return measure_peak_flops(precision, device) if device.type == "cpu" else None


def measure_peak_flops(precision: str, device: torch.device) -> float:
    """Best FLOP/s of a square matrix product within 0.3 s. No data sheet has a CPU's clock under load."""
    n = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = torch.ones(n, n, dtype=dtype, device=device), torch.ones(n, n, dtype=dtype, device=device)
    return 2.0 * n**3 / fastest_call(lambda: torch.mm(a, b), device, 0.3)


def fastest_call(function: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Call a function for some seconds, after a warm-up; returns the seconds of the fastest call."""
    function()
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < seconds:
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def memory_used(device: torch.device) -> int:
    """Bytes: peak memory allocated on a GPU since the start, or the process's resident memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def available_memory(device: torch.device, *, swap: bool = False) -> int | None:
    """Bytes that this process could still take: on a GPU, or in RAM within the limits of its control groups.

    Memory that this process's GPU allocator reserves counts as free, and so do cached files. `swap` adds free swap
    space. None if unknown (MPS, whose memory grows as the system allows).
    """
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserved
    if device.type != "cpu":
        return None
    free = min([psutil.virtual_memory().available, *_free_in_groups()])
    return max(0, int(free)) + (psutil.swap_memory().free if swap else 0)


def require_memory(device: torch.device, what: str, count: int, each: int, setting: str, otherwise: str) -> None:
    """Raise `UserError` if `count` times `each` bytes certainly do not fit; it names the largest `setting` that does.

    On a CPU, free swap counts as free. `otherwise`: what to do if not even 1 fits.
    """
    free = available_memory(device, swap=True)
    if free is None or count * each <= 1.05 * free:
        return
    fitting, owner = int(0.9 * free / each), "this machine" if device.type == "cpu" else "the GPU"
    remedy = f"use {setting} of at most {fitting:,}" if fitting else otherwise
    raise UserError(f"{what} needs {format_bytes(count * each)} and {owner} has {format_bytes(free)} free; {remedy}")


# Files of a control group by version: its limit, its usage, and the lines of memory.stat that can be reclaimed.
_GROUP_FILES = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)


def _free_in_groups() -> Iterator[int]:
    """Free bytes of this process's control group and of each group around it, by cgroups(7); nothing without limits."""
    listing, root = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        # In a container the path may be the host's and not exist: the root then is the container's own group.
        group = top / path.lstrip("/")
        folders = [folder for folder in (group, *group.parents) if folder.is_relative_to(top)]
        for folder, (limit, usage, reclaimable) in itertools.product(folders, _GROUP_FILES):
            with suppress(OSError, ValueError):  # the other version, or "max"
                most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
                yield most - used + sum(int(stat.get(name, 0)) for name in reclaimable)


def keep_freed_memory() -> None:
    """Keep the memory that tensors free for the next ones. Does nothing with a C library other than glibc.

    glibc returns the top of its heap to the kernel again and again: a training step of `shakespeare-cpu` then takes a
    thousand page faults. Without them, on two cores, a step took 4 % and an evaluation 20 % less time.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: the most that glibc allows; larger blocks come from the kernel
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def cpu_name() -> str:
    """The processor's name as the system reports it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.*)", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The system's name of the processor or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name() if device.type == "cpu" else device.type


def describe_environment(device: torch.device, precision: str) -> dict[str, Any]:
    """Versions, device and threads: besides config and data, everything that the bits of a run depend on."""
    return {
        "glassgpt": version("glassgpt"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": sys.platform,
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "variables": numeric_variables(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": precision,
    }
