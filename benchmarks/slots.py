"""Every combination of the model's slots, each checked as in `tests/slot_harness.py`: a small model, float64.

    python benchmarks/slots.py --processes 2            # all of them: hours
    python benchmarks/slots.py --every 50 --offset 7    # the 8th of every 50

Checks: papers, the explicit kernel, gradients by finite differences, causality, cached = uncached, save and
load, generation. Prints each combination that fails, and the count.
"""

import argparse
import itertools
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from slot_harness import SLOTS, check_everything, combined


def problem(values: tuple[str, ...]) -> str | None:
    """What is wrong with a combination; None if all checks pass."""
    torch.set_num_threads(1)
    try:
        # No crash is expected here, and syncing the disk would take most of the time.
        with mock.patch("os.fsync", return_value=None):
            check_everything(combined(dict(zip(SLOTS, values, strict=True))))
    except Exception as error:
        return f"{', '.join(values)}: {error}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="check one in this many")
    parser.add_argument("--offset", type=int, default=0)
    options = parser.parse_args()
    product = list(itertools.product(*SLOTS.values()))
    chosen = product[options.offset :: options.every]
    failed, began = 0, time.monotonic()
    with ProcessPoolExecutor(options.processes) as pool:
        for number, found in enumerate(pool.map(problem, chosen, chunksize=32), start=1):
            if found is not None:
                failed += 1
                print(found, flush=True)
            if number % 1000 == 0:
                print(f"{number:,} of {len(chosen):,}, {failed} failed, {time.monotonic() - began:,.0f} s", flush=True)
    print(
        f"{len(chosen):,} of {len(product):,} combinations checked, {failed} failed, {time.monotonic() - began:,.0f} s"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
