"""A hundred kills: `prepare` of four files that SIGKILL ends again and again, against one that ran through.

    python benchmarks/prepare_kills.py --kills 100

By 1, 2 or 3 workers, in the place of an older dataset, plain, with --deduplicate and with the first shard for validation; the
kills come at random moments, at least a quarter of them after the first finished shard and before the end. This is
`tests/prepare_harness.py`, which the test suite runs with 9 kills. Linux and macOS only, since it forks.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

HARNESS = Path(__file__).resolve().parents[1] / "tests" / "prepare_harness.py"


def main() -> int:
    """Run the harness and tell its outcome in a few lines; the exit status is its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, help="of the kinds and delays (default: another one each time, printed)")
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
    print(
        f"{outcome['kills']} kills in {time.perf_counter() - begin:.0f} s: {outcome['within']} between the first shard and the end, ",
        end="",
    )
    print(
        f"{outcome['between_files']} between the files of a shard, {outcome['publishing']} while the dataset took its place"
    )
    print("shards that were finished at each kill:", *outcome["shards"])
    print(
        f"the last worker ended {outcome['slowest_end']:.2f} s after the kill at the latest; {outcome['orphans']} kills left one behind"
    )
    print(f"{outcome['rewritten']} finished shards were written again, {len(outcome['left_behind'])} files left behind")
    differing = outcome["differences"]
    print(
        "the end differs in " + ", ".join(differing)
        if differing
        else "every dataset is that of an undisturbed worker, byte for byte"
    )
    return ended.returncode


if __name__ == "__main__":
    sys.exit(main())
