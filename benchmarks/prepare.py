"""Parquet files to token shards: `glassgpt prepare` against build-nanogpt's `fineweb.py`, as whole processes.

    python benchmarks/prepare.py --peer build-nanogpt/fineweb.py --data 'books/*.parquet'

The peer's file is unchanged except for two things: its text comes from the same local files (a stand-in for its
`datasets` library yields their rows), and it uses a process for each core instead of half as many. Both write shards of
100 million tokens with GPT-2's vocabulary, and their ids are compared. `--repeat` uses the files several times, so that
start-up time matters little. The peer's tiktoken downloads GPT-2's vocabulary, or finds it in TIKTOKEN_CACHE_DIR.
Bars: 60 MB of text per second on 2 cores, and 4 times the peer. The machine must be idle.
"""

import argparse
import glob
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="build-nanogpt's fineweb.py")
    parser.add_argument("--data", required=True, help="pattern of parquet files with a column text")
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
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
