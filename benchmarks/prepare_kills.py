"""A hundred kills: `prepare` of four files that SIGKILL ends again and again, against one that ran through.

    python benchmarks/prepare_kills.py --kills 100

With 1, 2 or 3 workers, in place of an older dataset, plain, with --deduplicate, and with the first shard for
validation. The kills come at random moments, at least a quarter of them between the first finished shard and the end.
This is `tests/prepare_harness.py`, which the test suite runs with 9 kills. Linux and macOS only, since it forks.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

HARNESS = Path(__file__).resolve().parents[1] / "tests" / "prepare_harness.py"


def main() -> int:
    """Run the harness, print its outcome in a few lines, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, help="seed of the workers and delays (default: random; it is printed)")
    arguments = parser.parse_args()
    seed = [] if arguments.seed is None else ["--seed", str(arguments.seed)]
    begin = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, str(HARNESS), "--kills", str(arguments.kills), *seed], stdout=subprocess.PIPE, text=True
    )
    first, _, last = ended.stdout.strip().partition("\n")
    print(first)
    if not last.startswith("{"):
        return ended.returncode or 1
    outcome = json.loads(last)
    seconds, differences = time.perf_counter() - begin, outcome["differences"]
    for line in (
        f"{outcome['kills']} kills in {seconds:.0f} s: {outcome['within']} between the first shard and the end, "
        f"{outcome['between_files']} between the files of a shard, {outcome['publishing']} while moving it into place",
        f"finished shards at each kill: {' '.join(map(str, outcome['shards']))}",
        f"the last worker ended {outcome['slowest_end']:.2f} s after the kill; {outcome['orphans']} kills left one",
        f"{outcome['rewritten']} finished shards were written again, {len(outcome['left_behind'])} files left over",
        f"differences: {', '.join(differences) or 'none, byte for byte'}",
    ):
        print(line)
    return ended.returncode


if __name__ == "__main__":
    sys.exit(main())
