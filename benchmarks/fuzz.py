"""Ten thousand damaged or odd inputs: settings, command lines, and files of runs, datasets, models and texts.

    python benchmarks/fuzz.py                                   # 10,000 cases, about half an hour on 2 cores
    python benchmarks/fuzz.py --kind "run files" --cases 500    # only these
    python benchmarks/fuzz.py --kind "run files" --number 17    # one case of them, with its output

A case fails if it ends with a traceback, takes over 20 seconds or 4 GB, gives a wrong result without a word, or is
refused with anything but a short error. The exit status is 1 if one does. See `tests/fuzz_harness.py`. Linux only.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a case runs beside others, and its bits must not depend on them
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import fuzz_harness


def work(options: argparse.Namespace) -> int:
    """Run every `step`-th case, and print each outcome as a line of JSON."""
    kinds = [options.kind] if options.kind else list(fuzz_harness.KINDS)
    fuzz_harness.import_all()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        files = fuzz_harness.make_files(Path(folder, "files"))
        for number in range(options.first, options.cases, options.step):
            outcome = fuzz_harness.run_number(number, options.seed, files, Path(folder, "work"), kinds)
            case = outcome.case
            fields = {"number": number, "kind": case.kind, "fault": outcome.fault, "refused": outcome.refused}
            fields |= {"seconds": outcome.seconds, "peak": outcome.peak_bytes, "damage": case.damage}
            fields |= {"arguments": list(case.arguments), "output": outcome.output[-1500:] if outcome.fault else ""}
            print(json.dumps(fields), flush=True)
    return 0


def run_all(options: argparse.Namespace) -> int:
    """Run the cases in several processes, print each fault, and a table at the end."""
    command = [sys.executable, __file__, "--cases", str(options.cases), "--seed", str(options.seed)]
    command += ["--kind", options.kind] if options.kind else []
    step = options.processes
    workers = [
        subprocess.Popen([*command, "--first", str(first), "--step", str(step)], stdout=subprocess.PIPE, text=True)
        for first in range(step)
    ]
    rows: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    began, done = time.monotonic(), 0
    streams = [worker.stdout for worker in workers if worker.stdout is not None]
    while streams:
        for stream in list(streams):
            line = stream.readline()
            if not line:
                streams.remove(stream)
                continue
            row, done = json.loads(line), done + 1
            rows[row["kind"]].append(row)
            if row["fault"]:
                output = row["output"].strip().replace("\n", "\n    ")
                print(f"\n{row['number']} {row['kind']}: {row['fault']}\n    {row['damage']}\n    {output}", flush=True)
            if done % 500 == 0:
                print(f"{done:,} of {options.cases:,} cases, {time.monotonic() - began:,.0f} s", flush=True)
    print("\n" + table(rows))
    failed = any(worker.wait() for worker in workers) or done < options.cases
    return int(failed or any(row["fault"] for each in rows.values() for row in each))


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """The outcomes by kind, as Markdown."""
    head = "| kind | cases | done | refused | faults | slowest, s | most memory, GB |"
    lines = [head, "| --- " * 7 + "|"]
    for kind, each in [*rows.items(), ("all", [row for part in rows.values() for row in part])]:
        if not each:
            continue
        faults = collections.Counter(row["fault"] for row in each if row["fault"])
        shown = ", ".join(f"{count} {fault}" for fault, count in faults.most_common()) or "0"
        refused = sum(row["refused"] and not row["fault"] for row in each)
        done = len(each) - refused - faults.total()
        slowest, peak = max(row["seconds"] for row in each), max(row["peak"] for row in each) / 1e9
        lines.append(f"| {kind} | {len(each):,} | {done:,} | {refused:,} | {shown} | {slowest:.1f} | {peak:.2f} |")
    return "\n".join(lines)


def show(options: argparse.Namespace) -> int:
    """Run one case and print all about it."""
    kinds = [options.kind] if options.kind else list(fuzz_harness.KINDS)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        files = fuzz_harness.make_files(Path(folder, "files"))
        outcome = fuzz_harness.run_number(options.number, options.seed, files, Path(folder, "work"), kinds)
    print(f"{outcome.case.kind}: {outcome.case.damage}\n{list(outcome.case.arguments)}\n{outcome.output}")
    print(f"{outcome.fault or 'no fault'}, {outcome.seconds:.1f} s, {outcome.peak_bytes / 1e9:.2f} GB")
    return int(outcome.fault is not None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kind", choices=list(fuzz_harness.KINDS), help="only cases of this kind")
    parser.add_argument("--number", type=int, help="run this one case and show its output")
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)  # of a worker: its first case, and the distance
    parser.add_argument("--step", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.number is not None:
        return show(options)
    return run_all(options) if options.first is None else work(options)


if __name__ == "__main__":
    sys.exit(main())
