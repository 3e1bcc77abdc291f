"""Sliding-window attention compared to full causal attention on this machine, forward and backward: time and memory.

    python benchmarks/windows.py --window 256

The shape is GPT-2 small's attention (12 heads of 64, batch 1, float32). Each round measures all lengths and both
kernels alternately (medians). Memory is the peak of a fresh process beyond what it held before. Bars: from
4,096 to 16,384 tokens at most 4.6 times the time, and faster than full attention from 1,024 tokens on. Keep the machine
idle meanwhile.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from glassgpt.model.attention import SDPAKernel, Span, WindowKernel
from glassgpt.utils.device import keep_freed_memory

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LONGEST_FULL = 8192  # beyond it a full pass takes half a minute


def forward_and_backward(kernel: SDPAKernel, length: int) -> float:
    """Seconds of one forward and backward pass."""
    q, k, v = (torch.randn(1, 12, length, 64, requires_grad=True) for _ in range(3))
    upstream = torch.randn(1, 12, length, 64)
    began = time.perf_counter()
    kernel(q, k, v).backward(upstream)
    return time.perf_counter() - began


def peak_mebibytes(span: Span, length: int) -> float:
    """Peak memory of a fresh process that makes one pass, beyond what torch itself takes."""
    command = [
        sys.executable,
        __file__,
        "--memory",
        str(length),
        "--window",
        str(span.window or 0),
        "--globals",
        str(span.n_global),
    ]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_memory(span: Span, length: int) -> None:
    """In the process that `peak_mebibytes` starts."""
    kernel = (SDPAKernel if span.window is None else WindowKernel)(span, 0.0)
    forward_and_backward(kernel, 64)
    before = peak_kibibytes()
    forward_and_backward(kernel, length)
    print((peak_kibibytes() - before) / 1024)


def peak_kibibytes() -> int:
    """Peak resident memory of this process (Linux). Not `ru_maxrss`: a process inherits that from its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--globals", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    span = Span(options.window or None, options.globals)
    if options.memory:
        measure_memory(span, options.memory)
        return 0
    keep_freed_memory()  # as `glassgpt train` does
    kernels = {"window": WindowKernel(span, 0.0), "full": SDPAKernel(Span(), 0.0)}
    cells = [(name, length) for length in LENGTHS for name in kernels if name == "window" or length <= LONGEST_FULL]
    seconds: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
    for name, length in cells * (1 + options.rounds):
        seconds[name, length].append(forward_and_backward(kernels[name], length))
    median = {cell: statistics.median(times[1:]) for cell, times in seconds.items()}  # the first round warms up
    print(
        f"window {options.window}, global tokens {options.globals}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    print(f"{'tokens':>8}{'window, ms':>14}{'full, ms':>12}{'ratio':>8}{'window, MiB':>14}{'full, MiB':>12}")
    for length in LENGTHS:
        window, full = median["window", length], median.get(("full", length))
        row = f"{length:>8,}{window * 1e3:>14.1f}" + (f"{full * 1e3:>12.1f}{window / full:>8.2f}" if full else " " * 20)
        print(row + f"{peak_mebibytes(span, length):>14.0f}{peak_mebibytes(Span(), length):>12.0f}", flush=True)
    growth = median["window", 16384] / median["window", 4096]
    sooner = all(
        median["window", length] < median["full", length] for length in LENGTHS if 1024 <= length <= LONGEST_FULL
    )
    print(
        f"from 4,096 to 16,384 tokens: {growth:.2f} times the time (at most 4.6); "
        f"faster than full: {'yes' if sooner else 'no'}"
    )
    return int(growth > 4.6 or not sooner)


if __name__ == "__main__":
    sys.exit(main())
