"""The machine: device and precision, peak arithmetic rate, memory, and what a run records about where it ran."""

import ctypes
import platform
import re
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from glassgpt.utils.errors import UserError

# Dense peak in FLOP/s by precision, from NVIDIA's data sheets (without sparsity). The first name that occurs in the
# device's name as whole words counts, so longer names come first; an L40 is no L4, and an RTX A1000 no A100.
GPU_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    ("B200", {"bfloat16": 2250e12, "float16": 2250e12, "tf32": 1100e12, "float32": 75e12}),
    ("H200", {"bfloat16": 989e12, "float16": 989e12, "tf32": 495e12, "float32": 67e12}),
    ("H100 PCIe", {"bfloat16": 756e12, "float16": 756e12, "tf32": 378e12, "float32": 51e12}),
    ("H100 NVL", {"bfloat16": 835e12, "float16": 835e12, "tf32": 417e12, "float32": 60e12}),
    ("H100", {"bfloat16": 989e12, "float16": 989e12, "tf32": 495e12, "float32": 67e12}),
    ("L40S", {"bfloat16": 362e12, "float16": 362e12, "tf32": 183e12, "float32": 91.6e12}),
    ("A100", {"bfloat16": 312e12, "float16": 312e12, "tf32": 156e12, "float32": 19.5e12}),
    ("A10", {"bfloat16": 125e12, "float16": 125e12, "tf32": 62.5e12, "float32": 31.2e12}),
    ("L4", {"bfloat16": 121e12, "float16": 121e12, "tf32": 60e12, "float32": 30.3e12}),
    ("V100", {"float16": 125e12, "float32": 15.7e12}),
    ("T4", {"float16": 65e12, "float32": 8.1e12}),
    ("RTX 4090", {"bfloat16": 165e12, "float16": 165e12, "tf32": 82.6e12, "float32": 82.6e12}),
    ("RTX 3090", {"bfloat16": 71e12, "float16": 71e12, "tf32": 35.6e12, "float32": 35.6e12}),
)


def _sheet(device_name: str) -> tuple[str, dict[str, float]]:
    """The name in `GPU_PEAKS` that a device's own name has in it, and its peaks; nothing for another device, or for a laptop's."""
    if "Laptop" in device_name:
        return "", {}
    return next(((name, peaks) for name, peaks in GPU_PEAKS if re.search(rf"\b{name}\b", device_name)), ("", {}))


@dataclass(frozen=True)
class Gpu:
    """A GPU by NVIDIA's data sheet."""

    name: str
    """As in `GPU_PEAKS`."""
    memory: float
    """Bytes, the sheet's GB taken as 10^9: what a driver shows is between that and 2^30, error correction taken off."""
    bandwidth: float
    """Bytes/s between the memory and the chip."""
    link: float
    """Bytes/s to another GPU of the host, in one direction: NVLink where there is one, else PCIe x16."""

    def peak(self, precision: str) -> float | None:
        """FLOP/s of matrix products in a precision, None where it has none."""
        return dict(GPU_PEAKS)[self.name].get(precision)

    def is_meant(self, name: str, memory: float) -> bool:
        """Whether a device of this name and memory (bytes) is one of these."""
        return _sheet(name)[0] == self.name and 0.85 < memory / self.memory < 1.2


# What `glassgpt plan --device` knows. H100 and A100 are the SXM boards.
GPUS: dict[str, Gpu] = {
    "b200": Gpu("B200", 180e9, 8000e9, 900e9),
    "h200": Gpu("H200", 141e9, 4800e9, 450e9),
    "h100": Gpu("H100", 80e9, 3350e9, 450e9),
    "h100-nvl": Gpu("H100 NVL", 94e9, 3938e9, 300e9),
    "h100-pcie": Gpu("H100 PCIe", 80e9, 2000e9, 64e9),
    "a100-80": Gpu("A100", 80e9, 2039e9, 300e9),
    "a100-40": Gpu("A100", 40e9, 1555e9, 300e9),
    "l40s": Gpu("L40S", 48e9, 864e9, 32e9),
    "a10": Gpu("A10", 24e9, 600e9, 32e9),
    "l4": Gpu("L4", 24e9, 300e9, 32e9),
    "v100-32": Gpu("V100", 32e9, 900e9, 150e9),
    "v100-16": Gpu("V100", 16e9, 900e9, 150e9),
    "t4": Gpu("T4", 16e9, 300e9, 16e9),
    "rtx4090": Gpu("RTX 4090", 24e9, 1008e9, 32e9),
    "rtx3090": Gpu("RTX 3090", 24e9, 936e9, 32e9),
}
# Parameters of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def find_device(name: str = "auto") -> torch.device:
    """The device of that name; `auto` is CUDA, else MPS, else the CPU. Raises `UserError` if it is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is unknown; use auto, cpu, cuda, cuda:1 or mps") from None
    there = {
        "cpu": device.index in (None, 0),
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(device.type, False):
        raise UserError(
            f"device {name!r} is not available in this build of torch on this machine; leave it out to use what is there"
        )
    return device


def find_precision(name: str, device: torch.device) -> str:
    """The precision that `auto` or `native` stands for on a device, or the named one. Raises `UserError` where the device lacks it."""
    if name == "native" or (name == "auto" and device.type == "cuda"):
        return "bfloat16" if _multiplies_bfloat16(device) else "float32"
    if name == "auto":
        return "float32"  # on a CPU bfloat16 is no gain for each model: PyTorch's attention is slow in it on short text
    if name == "tf32" and device.type != "cuda":
        raise UserError(f"precision 'tf32' needs a CUDA device, and this run uses {device.type}; use float32")
    if name == "float16" and device.type == "cpu":
        raise UserError("precision 'float16' trains on GPUs only; on the CPU use float32 or bfloat16")
    return name


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether there are instructions for it, and it is not emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def require_kernel(attention: str, device: torch.device) -> None:
    """Raise `UserError` where the kernel `model.attention` cannot train on a device."""
    if attention == "flex" and device.type != "cuda":
        raise UserError(
            f"model.attention = 'flex' trains on CUDA only (on a {device.type} it has no gradients); leave it out"
        )


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Allow TF32 products inside, for `tf32` only, and put the process's setting back afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 or float16, or nothing for float32 and tf32."""
    if precision in ("bfloat16", "float16"):
        return torch.autocast(device.type, dtype=getattr(torch, precision))
    return nullcontext()


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of matrix products: from the data sheet for a GPU, measured here (0.3 s) for a CPU, else None."""
    if device.type == "cuda":
        return _sheet(torch.cuda.get_device_name(device))[1].get(precision)
    return measure_peak_flops(precision, device) if device.type == "cpu" else None


def measure_peak_flops(precision: str, device: torch.device) -> float:
    """Best FLOP/s of a square matrix product within 0.3 s, since a CPU's clock under load is on no data sheet."""
    n = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = torch.ones(n, n, dtype=dtype, device=device), torch.ones(n, n, dtype=dtype, device=device)
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < 0.3:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * n**3 / best


def memory_used(device: torch.device) -> int:
    """Peak memory allocated on a GPU since the start, or the process's resident memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def available_memory(device: torch.device, *, swap: bool = False) -> int | None:
    """Bytes that this process could still take: what a GPU has free, or the machine within its control groups' limits.

    What this process's own allocator holds in reserve on the GPU counts as free, and so do pages of files, which give way. `swap`
    counts what is free there too. None where nothing tells (MPS, whose memory grows at the system's leave).
    """
    if device.type == "cuda":
        return (
            int(torch.cuda.mem_get_info(device)[0])
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    if device.type != "cpu":
        return None
    own = min([psutil.virtual_memory().available, *_left_in_groups(CGROUPS)])
    return max(0, int(own)) + (psutil.swap_memory().free if swap else 0)


CGROUPS = Path("/sys/fs/cgroup")
# Files of a control group by version: its limit, what it uses, and the lines of memory.stat that give way.
_GROUP_FILES = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)


def _left_in_groups(root: Path) -> Iterator[int]:
    """Bytes left in this process's control group and in each that it is in, by cgroups(7); nothing where none has a limit."""
    listing = Path("/proc/self/cgroup")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        # In a container the path may be the host's, which is not there: the root then is the container's own group.
        place = top / path.lstrip("/")
        for folder in (place, *place.parents):
            if folder.is_relative_to(top):
                yield from _left_in_group(folder)


def _left_in_group(folder: Path) -> Iterator[int]:
    for limit, usage, files in _GROUP_FILES:
        try:
            most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # not of this version, or "max"
            continue
        yield most - used + sum(int(stat.get(name, 0)) for name in files)


def keep_freed_memory() -> None:
    """Let this process keep the memory that its tensors free, for the next ones; for a process that only computes.

    glibc hands the top of its heap back to the kernel again and again: at the size of `shakespeare-cpu` a training step
    then takes a thousand page faults for memory that the last one had. Without them a step took 4 % and an evaluation
    20 % less time on two cores. Does nothing under another C library.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(
            M_MMAP_THRESHOLD, 32 * 2**20
        )  # the most that glibc allows; larger blocks always come from the kernel
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """What the system calls the processor or GPU."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else cpu_name()
        if device.type == "cpu"
        else device.type
    )


def describe_environment(device: torch.device, precision: str) -> dict[str, Any]:
    """Versions, device and threads: besides config and data, all that the bits of a run depend on."""
    return {
        "glassgpt": version("glassgpt"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": sys.platform,
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": precision,
    }
