"""Ranks killed by SIGKILL under `torchrun --max-restarts`, on 2 and on 3 processes, against undisturbed runs.

    python benchmarks/rank_kills.py --kills 20

The kills come between two steps, inside saves and inside evaluations; torchrun restarts the ranks, and they continue
the run. The end is compared bit for bit, and no saved step may be repeated. This is `tests/torchrun_harness.py`,
which the test suite runs with 3 kills. Linux only: it recognises a rank by its environment in /proc.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HARNESS = Path(__file__).resolve().parents[1] / "tests" / "torchrun_harness.py"


def main() -> int:
    """Run the harness for each number of ranks; the exit status says whether nothing differed and nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="for each number of ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp")
    arguments = parser.parse_args()
    worst = 0
    for ranks in arguments.ranks:
        command = [sys.executable, str(HARNESS), "--ranks", str(ranks), "--kills", str(arguments.kills)]
        command += ["--strategy", arguments.strategy]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        last = result.stdout.splitlines()[-1] if result.stdout else ""
        worst = max(worst, result.returncode)
        if not last.startswith("{"):
            print(f"{ranks} ranks: the harness failed, see above")
            continue
        outcome = json.loads(last)
        kills, hits = (", ".join(f"{kind} {n}" for kind, n in outcome[key].items()) for key in ("kills", "hits"))
        print(
            f"{ranks} ranks, {outcome['strategy']}, seed {outcome['seed']}: kills by aim: {kills}; hits: {hits};",
            end="",
        )
        print(f" in {outcome['seconds']:.0f} s; {len(outcome['steps_lost'])} saved steps lost; ", end="")
        differing = outcome["differences"] + outcome["left_behind"]
        print(f"differs in {', '.join(differing)}" if differing else "the end is the same, bit for bit", flush=True)
    return worst


if __name__ == "__main__":
    sys.exit(main())
