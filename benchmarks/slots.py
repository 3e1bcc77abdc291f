"""Every combination of the model's slots, each checked as in `tests/slot_harness.py`: a small model, float64.

    python benchmarks/slots.py --processes 2            # all of them: hours
    python benchmarks/slots.py --every 50 --offset 7    # the 8th of each 50

Against the papers, against the explicit kernel, gradients by finite differences, nothing from the future, cached as
uncached, saved and loaded, generated. Prints each combination that fails, and the count.
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
    """What is wrong with a combination, None where all holds."""
    torch.set_num_threads(1)
    try:
        with mock.patch("os.fsync", return_value=None):  # no crash is to come, and the disk would take the most time
            check_everything(combined(dict(zip(SLOTS, values, strict=True))))
    except Exception as error:
        return f"{', '.join(values)}: {error}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="check one of so many")
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
