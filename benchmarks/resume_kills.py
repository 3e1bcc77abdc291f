"""A hundred kills: a run that is killed by SIGKILL again and again and resumed each time, against an uninterrupted run.

    python benchmarks/resume_kills.py --kills 100

The kills come at random moments, at least a quarter of them inside a save; the end is compared bit for bit. This is
`tests/kill_harness.py`, which the test suite runs with 20 kills. Linux and macOS only, since it forks.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

HARNESS = Path(__file__).resolve().parents[1] / "tests" / "kill_harness.py"


def main() -> int:
    """Run the harness and print its outcome in two lines; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, help="seed of the moments and delays (default: random; it is printed)")
    arguments = parser.parse_args()
    command = [sys.executable, str(HARNESS), "--kills", str(arguments.kills)]
    if arguments.seed is not None:
        command += ["--seed", str(arguments.seed)]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as harness:
        assert harness.stdout is not None
        last = ""
        for line in harness.stdout:
            last = line
            if not line.startswith("{"):
                print(line, end="", flush=True)
    if not last.startswith("{"):
        return harness.returncode or 1
    outcome = json.loads(last)
    seconds = time.perf_counter() - begin
    print(f"{outcome['kills']} kills, {outcome['in_save']} inside a save, in {seconds:.0f} s; resumed at steps")
    print(*outcome["steps"])
    differing = ", ".join(outcome["differences"] + outcome["left_behind"])
    same = "weights, optimizer, metrics and samples are the same, bit for bit"
    print(f"the end differs in {differing}" if differing else same)
    return harness.returncode


if __name__ == "__main__":
    sys.exit(main())
