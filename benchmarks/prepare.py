"""Parquet files to token shards: `glassgpt prepare` against build-nanogpt's `fineweb.py`, as whole processes.

    python benchmarks/prepare.py --peer build-nanogpt/fineweb.py --data 'books/*.parquet'
    python benchmarks/prepare.py --documents short --against ../older/src

The peer's file is unchanged except for two things: its text comes from the same local files (a stand-in for its
`datasets` library yields their rows), and it uses a process for each core instead of half as many. Both write shards of
100 million tokens with GPT-2's vocabulary, and their ids are compared. `--repeat` uses the files several times, so that
start-up time matters little. The peer's tiktoken downloads GPT-2's vocabulary, or finds it in TIKTOKEN_CACHE_DIR.
Bars: 60 MB of text per second on 2 cores, and 4 times the peer. The machine must be idle.

`--documents short` prepares generated documents of about 130 bytes instead, each of three formats with each of three
tokenizers, and with `--against` alternates with another version of glassgpt. The bar is 40 MB per second.
"""

import argparse
import glob
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from glassgpt.config.schema import ReadingConfig
from glassgpt.data.dataset import open_dataset
from glassgpt.data.sources import LocalFiles, read_source

STAND_IN = """
import os
from pathlib import Path
import pyarrow.parquet

cores = os.cpu_count()
os.cpu_count = lambda: 2 * cores

def load_dataset(path, name, split):
    for file in sorted(Path(os.environ["BENCHMARK_FILES"]).glob("*.parquet")):
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024, columns=["text"]):
            for text in batch.column(0).to_pylist():
                yield {"text": text}
"""


def timed(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    """Seconds of a whole process."""
    began = time.perf_counter()
    finished = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{finished.stderr}")
    return time.perf_counter() - began


def run_peer(peer: Path, files: Path, work: Path) -> tuple[float, np.ndarray]:
    """Seconds, and all ids in order."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    shutil.copy(peer, work / "fineweb.py")
    (work / "datasets.py").write_text(STAND_IN)
    seconds = timed([sys.executable, "fineweb.py"], work, {"BENCHMARK_FILES": str(files)})
    shards = sorted((work / "edu_fineweb10B").glob("*.npy"), key=lambda path: path.stem[-6:])
    return seconds, np.concatenate([np.load(path) for path in shards])


def run_glassgpt(files: Path, work: Path) -> tuple[float, np.ndarray]:
    """Seconds, and all ids in order."""
    shutil.rmtree(work, ignore_errors=True)
    options = ["--tokenizer=gpt2", "--validation=first_shard", f"--out={work}"]
    seconds = timed([sys.executable, "-m", "glassgpt", "prepare", str(files), *options], files, {})
    dataset = open_dataset(work)
    return seconds, np.concatenate([*dataset.validation.parts, *dataset.train.parts])


def write_short_documents(folder: Path, count: int) -> None:
    """Write the same documents of 14 to 23 words, whose frequencies follow Zipf's law, in each format."""
    import pyarrow
    from pyarrow import parquet

    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("etaoinshrdlu"), size=draw.integers(2, 11))) for _ in range(30_000)]
    frequencies = 1 / np.arange(1, len(words) + 1)
    lengths = draw.integers(14, 24, size=count)
    chosen = map(words.__getitem__, draw.choice(len(words), size=lengths.sum(), p=frequencies / frequencies.sum()))
    texts = [" ".join(itertools.islice(chosen, length)) for length in lengths.tolist()]
    for name, lines in (("jsonl", [json.dumps({"text": text}) for text in texts]), ("csv", ["text", *texts])):
        (folder / f"short.{name}").write_text("\n".join(lines) + "\n")
    parquet.write_table(pyarrow.table({"text": texts}), folder / "short.parquet")


def time_short_documents(folder: Path, options: argparse.Namespace) -> int:
    """Print the speeds (median of the rounds) of this version and the other; return whether one misses the bar."""
    write_short_documents(folder, options.count)
    slowest = float("inf")
    for path, tokenizer in itertools.product(sorted(folder.glob("short.*")), ("bytes", "characters", "gpt2")):
        rates: dict[str, list[float]] = {"": [], **({str(options.against): []} if options.against else {})}
        for _, source in itertools.product(range(options.rounds), rates):
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            command = [
                sys.executable,
                "-m",
                "glassgpt",
                "prepare",
                str(path),
                f"--tokenizer={tokenizer}",
                f"--out={out}",
            ]
            seconds = timed(command, folder, {"PYTHONPATH": source} if source else {})
            splits = open_dataset(out).manifest["splits"].values()
            rates[source].append(sum(split["bytes"] for split in splits) / 1e6 / seconds)
        medians = {source or "this version": statistics.median(rate) for source, rate in rates.items()}
        slowest = min(slowest, medians["this version"])
        shown = ", ".join(f"{source} {rate:.1f} MB/s" for source, rate in medians.items())
        print(f"{path.suffix[1:]} {tokenizer}: {shown}", flush=True)
    return int(slowest < 40)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", choices=("given", "short"), default="given")
    parser.add_argument("--against", type=Path, help="with short documents: src folder of another version")
    parser.add_argument("--count", type=int, default=2_000_000, help="of short documents")
    parser.add_argument("--peer", type=Path, help="build-nanogpt's fineweb.py")
    parser.add_argument("--data", help="pattern of parquet files with a column text")
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.documents == "given" and not (options.peer and options.data):
        parser.error("--peer and --data are required")
    with tempfile.TemporaryDirectory() as name:
        if options.documents == "short":
            return time_short_documents(Path(name), options)
        files = Path(name, "files")
        files.mkdir()
        for number in range(options.repeat):
            for path in sorted(glob.glob(options.data)):
                shutil.copy(path, files / f"{number}-{Path(path).name}")
        megabytes = sum(len(part.text.encode()) for _, part in read_source(LocalFiles(files), ReadingConfig())) / 1e6
        print(f"{megabytes:,.0f} MB of text, {os.cpu_count()} cores")
        ratios, speeds = [], []
        for number in range(options.rounds):
            peer, theirs = run_peer(options.peer, files, Path(name, "peer"))
            own, ours = run_glassgpt(files, Path(name, "own"))
            ratios.append(peer / own)
            speeds.append(megabytes / own)
            same = np.array_equal(theirs, ours)
            rates = f"peer {peer:.1f} s ({megabytes / peer:.1f} MB/s), glassgpt {own:.1f} s ({speeds[-1]:.1f} MB/s)"
            print(f"round {number + 1}: {rates}, {'the same ids' if same else 'OTHER IDS'}", flush=True)
            if not same:
                return 1
    ratio, speed = statistics.median(ratios), statistics.median(speeds)
    print(f"median: {speed:.1f} MB of text per second (at least 60), {ratio:.1f} times the peer (at least 4)")
    return int(speed < 60 or ratio < 4)


if __name__ == "__main__":
    sys.exit(main())
