"""glassgpt on a CUDA GPU: tests, tokens/s and share of the peak, memory, kernels, generation; and its peers.

    python benchmarks/gpu.py --out gpu-results --build-nanogpt ~/build-nanogpt --nanogpt ~/nanoGPT

Ends within `--minutes` (8): the parts run one after the other, the most informative first, each in its own process
with its own limit; the output lists parts that were left out. `--parts` selects parts. Compilation takes most of the
time: a whole model of 12 layers is compiled in few parts, FlexAttention is compared on 4 layers, and PyTorch keeps
compiled code (in TORCHINDUCTOR_CACHE_DIR), so a second call has more time to measure. If a part fails, its error is
in the table.

The text is random tokens, which train as fast as any. Peers are your own checkouts; a copy of each runs, with the
changed lines named in the table. Writes `gpu.json` and `gpu.md` into `--out` after each part. Without CUDA it prints
a line and exits with 2.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glassgpt.config.model import ModelConfig
from glassgpt.config.recipes import recipe
from glassgpt.config.schema import TrainConfig
from glassgpt.distributed.group import Ranks
from glassgpt.generation.generate import generate
from glassgpt.model.gpt import GPT
from glassgpt.model.summary import ModelSummary
from glassgpt.tokenizers.builtin import CharacterTokenizer
from glassgpt.training.progress import SilentProgress
from glassgpt.training.setup import TrainState, setup_training
from glassgpt.training.step import Update, start_update
from glassgpt.utils.device import describe_environment, matmul_precision, peak_flops

ROOT = Path(__file__).resolve().parents[1]
GPT2_IDS = 50257
# The bar: this many times build-nanogpt's tokens/s.
BAR = 1.3
WARM_UP = 2
"""Updates before those that are measured: the first compiles."""
Result = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One measurement: runs in its own process for at most `limit` seconds, if at least `need` seconds are left."""

    name: str
    limit: float
    need: float
    run: Callable[[float], Result]
    """Given the seconds it may take; raises what went wrong."""


class PartError(Exception):
    """A part failed."""


# ------------------------------------------------------------ the parts


def param_groups(options: argparse.Namespace, work: Path, memory: float) -> list[Part]:
    """All parts, in their order. `memory` is the GPU's, in GiB; it decides the micro-batches."""
    rows = fitting_rows(memory)
    measure = measurer(work, options.cpu)
    long = {"n_layer": 4, "vocab_multiple": 128}
    parts = [
        Part("tests", 150, 30, lambda limit: run_tests(work, limit)),
        Part(f"bfloat16, compiled, {rows} x 1024", 130, 50, measure(rows=rows, trace=True)),
        Part("generation", 60, 20, lambda limit: child(work, {"generation": True, "cpu": options.cpu}, limit)),
    ]
    if options.build_nanogpt:
        build_nanogpt = partial(run_build_nanogpt, options.build_nanogpt, work)
        parts.append(Part("build-nanogpt as it is", 80, 25, partial(build_nanogpt, {"B": rows})))
        parts.append(Part("build-nanogpt, compiled", 110, 50, partial(build_nanogpt, {"B": rows, "use_compile": True})))
    for length in (2048, 4096):
        model = {**long, "context_length": length}
        several = max(1, rows * 1024 // length // 2)
        windows = {**model, "attention": "flex", "window": 512}
        parts += [
            Part(
                f"4 layers, full attention, {several} x {length}", 70, 30, measure(rows=several, model=model, updates=6)
            ),
            Part(
                f"4 layers, windows of 512 (flex), {several} x {length}",
                90,
                30,
                measure(rows=several, model=windows, updates=6),
            ),
        ]
    fewer = max(1, rows // 2)
    parts.append(Part(f"bfloat16, not compiled, {fewer} x 1024", 60, 25, measure(rows=fewer, compile="off", updates=6)))
    if options.nanogpt:
        parts.append(Part("nanoGPT, compiled", 120, 55, partial(run_nanogpt, options.nanogpt, work, fewer)))
    least = max(1, fewer // 2)
    plain = measure(rows=least, precision="float32", compile="off", updates=3)
    parts += [
        Part(f"bfloat16, compiled, {fewer} x 1024", 110, 50, measure(rows=fewer)),
        Part(f"TF32, compiled, {fewer} x 1024", 120, 60, measure(rows=fewer, precision="tf32", updates=6)),
        Part(f"float32, not compiled, {least} x 1024", 90, 45, plain),
    ]
    return parts


def fitting_rows(memory: float) -> int:
    """Sequences of 1,024 tokens in a micro-batch of the 124M model that fit into this many GiB: build-nanogpt's 64 on
    80 GB.
    """
    return next((rows for least, rows in ((70, 64), (35, 32), (20, 16), (14, 8)) if memory >= least), 4)


@dataclass(frozen=True)
class Setting:
    """A model and how it is trained, to be measured."""

    rows: int
    precision: str = "bfloat16"
    compile: str = "on"
    updates: int = 10
    trace: bool = False
    model: Mapping[str, Any] = field(default_factory=dict)
    cpu: bool = False
    """A tiny model on the CPU instead: to try this script, not to measure."""

    def config(self, tokens: Path) -> TrainConfig:
        """The config; an update has at most half a million tokens, as in GPT-3, in whole micro-batches."""
        length = self.model.get("context_length", 1024)
        micro = self.rows * length
        device, precision = ("cpu", "float32") if self.cpu else ("cuda", self.precision)
        config = recipe(
            "gpt2",
            data={"source": str(tokens), "validation": "fraction"},
            model=dict(self.model),
            batch_tokens=max(1, 2**19 // micro) * micro,
            micro_batch_size=self.rows,
            steps=1000,
            hellaswag_every=0,
            sample={"count": 0},
        )
        config = config.override(device=device, precision=precision, compile=self.compile)
        tiny = {"n_layer": 1, "n_head": 1, "n_embd": 8, "context_length": 32, "attention": "sdpa", "window": None}
        return config.override(model=tiny, batch_tokens=128, micro_batch_size=2, compile="off") if self.cpu else config


def measurer(work: Path, cpu: bool) -> Callable[..., Callable[[float], Result]]:
    """`measure(rows=64, ...)`: returns the function that measures this `Setting` in a process of its own."""

    def measure(**settings: Any) -> Callable[[float], Result]:
        return lambda limit: child(work, {"setting": dataclasses.asdict(Setting(**settings, cpu=cpu))}, limit)

    return measure


# ------------------------------------------------------------ in a part's own process


def measured(setting: Setting, tokens: Path) -> Result:
    """Tokens/s of updates as `glassgpt train` does them, with their spread; share of the peak, peak memory, seconds
    to start.
    """
    began = time.perf_counter()
    state = setup_training(setting.config(tokens), Ranks(), SilentProgress())
    config, device = state.config, state.device
    with matmul_precision(state.precision):
        seconds_of_updates(state, WARM_UP)
        start = time.perf_counter() - began
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = seconds_of_updates(state, setting.updates)
        found = figures(
            [config.batch_tokens / each for each in seconds],
            ModelSummary(config.model),
            peak_flops(device, state.precision),
        )
        found |= {"start_seconds": start, "batch_tokens": config.batch_tokens}
        if device.type == "cuda":
            found["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        if setting.trace:
            found["trace"] = traced(state)
    return found


def seconds_of_updates(state: TrainState, count: int) -> list[float]:
    """Seconds from the numbers of one update to those of the next, the loop of `train` without its records."""
    begun: deque[Update] = deque()
    seconds, began = [], time.perf_counter()
    for index in range(count):
        begun.append(start_update(state, 1e-4))
        state.step += 1
        while len(begun) > (0 if index + 1 == count or state.found_inf is None else 1):
            begun.popleft().read()
            now = time.perf_counter()
            seconds.append(now - began)
            began = now
    return seconds


def figures(rates: Sequence[float], summary: ModelSummary, peak: float | None) -> Result:
    """Median tokens/s, lowest and highest; the median as a share of the peak, None if the peak is unknown."""
    median = statistics.median(rates)
    share = median * summary.training_flops_per_token / peak if peak else None
    return {
        "tokens_per_second": median,
        "lowest": min(rates),
        "highest": max(rates),
        "peak_share": share,
        "updates": len(rates),
    }


def traced(state: TrainState) -> Result:
    """One update by kernel: milliseconds of each, the longest first, and how long the GPU was idle."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    is_cuda = state.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_cuda) as profiler:
        seconds_of_updates(state, 1)
        began = time.perf_counter()
        if is_cuda:
            torch.cuda.synchronize()
        seconds_of_updates(state, 1)
        if is_cuda:
            torch.cuda.synchronize()
        wall = time.perf_counter() - began
    # Only the GPU's kernels: the calls on the host include their time, which would count twice.
    kind = DeviceType.CUDA if is_cuda else DeviceType.CPU
    rows = []
    for event in profiler.key_averages():
        if event.device_type == kind:
            microseconds = event.self_device_time_total if is_cuda else event.self_cpu_time_total
            rows.append({"kernel": event.key, "calls": event.count / 2, "milliseconds": microseconds / 2e3})
    rows.sort(key=lambda row: -row["milliseconds"])
    return {
        "wall_milliseconds": wall * 1e3,
        "busy_milliseconds": sum(row["milliseconds"] for row in rows),
        "kernels": rows[:20],
    }


def generated(cpu: bool) -> Result:
    """Tokens/s of the 124M model with random weights, by precision, batch and length. The prompt's single token is not
    counted.
    """
    device = torch.device("cpu" if cpu else "cuda")
    config = recipe("gpt2", model={"vocab_size": GPT2_IDS}).model
    if cpu:
        config = dataclasses.replace(config, vocab_size=99, n_layer=1, n_head=1, n_embd=8)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        model = GPT.create(config, 0, device).to(dtype)
        for samples, length in ((1, 64), (1, 256), (8, 64), (8, 256)):
            for _ in range(2):  # the first warms up
                began = time.perf_counter()
                count = sum(1 for _ in generate(model, None, [0], max_new_tokens=length, n=samples))
                seconds = time.perf_counter() - began
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "batch": samples,
                    "tokens": length,
                    "tokens_per_second": count / seconds,
                }
            )
    return {"generation": rows}


# ------------------------------------------------------------ peers


def run_build_nanogpt(source: Path, work: Path, lines: Mapping[str, Any], limit: float) -> Result:
    """Run build-nanogpt's own train_gpt2.py, with other values of these variables; returns its own tokens/s.

    Its imports `tiktoken` and `hellaswag` serve samples and an evaluation before the first update and need a network.
    Empty modules replace them.
    """
    copy = Path(tempfile.mkdtemp(prefix="build-nanogpt-", dir=work))
    text = with_lines((source / "train_gpt2.py").read_text(encoding="utf-8"), lines)
    (copy / "train_gpt2.py").write_text(text, encoding="utf-8")
    (copy / "tiktoken.py").write_text(TIKTOKEN, encoding="utf-8")
    (copy / "hellaswag.py").write_text(HELLASWAG, encoding="utf-8")
    shards = copy / "edu_fineweb10B"
    shards.mkdir()
    for split, count in (("val", 2**21), ("train", 2**24)):
        np.save(shards / f"edufineweb_{split}_000000.npy", random_tokens(count))
    rates = lines_of(["train_gpt2.py"], copy, r"tok/sec: ([\d.]+)", limit)
    return peer_figures(rates) | {"changed": ", ".join(f"{name} = {value}" for name, value in lines.items())}


TIKTOKEN = """class _Encoding:
    def encode(self, text): return [0] * 8
    def decode(self, ids): return ""
def get_encoding(name): return _Encoding()
"""
HELLASWAG = """import torch
def iterate_examples(split): yield {}
def render_example(example): return None, torch.zeros(4, 16, dtype=torch.long), torch.ones(4, 16, dtype=torch.long), 0
"""


def with_lines(text: str, values: Mapping[str, Any]) -> str:
    """A script with these values of its variables. Raises `PartError` if the script does not assign one of them exactly
    once.
    """
    for name, value in values.items():
        text, count = re.subn(rf"^{name} *= *[^#\n]*?(?= *#|$)", f"{name} = {value}", text, flags=re.MULTILINE)
        if count != 1:
            raise PartError(
                f"the script sets {name} {count} times, not once: it is another version than this benchmark knows"
            )
    return text


def run_nanogpt(source: Path, work: Path, rows: int, limit: float) -> Result:
    """Run nanoGPT's own train.py on random tokens, changed only by its options."""
    copy = Path(tempfile.mkdtemp(prefix="nanogpt-", dir=work)) / "nanoGPT"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns(".git"))
    data = copy / "data" / "random"
    data.mkdir()
    for split, count in (("val", 2**20), ("train", 2**24)):
        random_tokens(count).tofile(data / f"{split}.bin")
    steps = max(1, 2**19 // (rows * 1024))
    options = {
        "dataset": "random",
        "eval_interval": 10**6,
        "eval_iters": 1,
        "log_interval": 1,
        "batch_size": rows,
        "block_size": 1024,
    }
    options |= {"gradient_accumulation_steps": steps, "bias": True, "compile": True, "out_dir": "out"}
    printed = lines_of(
        ["train.py", *(f"--{name}={value}" for name, value in options.items())],
        copy,
        r"iter \d+: .*time ([\d.]+)ms",
        limit,
    )
    found = peer_figures([rows * 1024 * steps / (milliseconds / 1e3) for milliseconds in printed])
    return found | {"changed": f"batch_size = {rows}, gradient_accumulation_steps = {steps}, bias = True"}


def peer_figures(rates: Sequence[float]) -> Result:
    """Figures of a peer's 124M model in bfloat16, with the same count of FLOPs as ours."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = peak_flops(device, "bfloat16") if device.type == "cuda" else None
    return figures(rates, ModelSummary(ModelConfig(vocab_size=GPT2_IDS, vocab_multiple=128)), peak)


PEER_UPDATES = 10


def lines_of(arguments: Sequence[str], folder: Path, pattern: str, limit: float) -> list[float]:
    """The numbers that a script prints, except those of its first `WARM_UP` updates. The script is stopped after
    `PEER_UPDATES` more.

    If the time is over, three numbers are enough. Otherwise raises `PartError` with the last line of its output.
    """
    give_up = time.monotonic() + limit
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": ""}
    command = [sys.executable, *arguments]
    printed: deque[str] = deque(maxlen=30)
    found: list[float] = []
    with own_process(command, cwd=folder, env=environment) as process:
        coming: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pass_on, args=(process, coming), daemon=True).start()
        while len(found) < WARM_UP + PEER_UPDATES:
            try:
                line = coming.get(timeout=max(0.0, give_up - time.monotonic()))
            except queue.Empty:
                printed.append(f"(ended after {limit:.0f} s)")
                break
            if line is None:
                break
            printed.append(line)
            found += [float(number) for number in re.findall(pattern, line)]
    if len(found) < WARM_UP + 3:
        raise PartError(last_line("\n".join(printed)))
    return found[WARM_UP:]


def _pass_on(process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


# ------------------------------------------------------------ processes


@contextlib.contextmanager
def own_process(command: Sequence[str], **options: Any) -> Iterator["subprocess.Popen[str]"]:
    """A process whose output is one stream of text. It ends with the context, with all its children (the compiler's
    workers).
    """
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, **pipes, start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own group, since it started a session
        process.wait()


def output_of(command: Sequence[str], limit: float, **options: Any) -> tuple[int, str]:
    """Exit code and output. Raises `PartError` if it takes longer than the limit."""
    with own_process(command, **options) as process:
        try:
            text, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            raise PartError(f"ended after {limit:.0f} s, its limit or what was left of the time") from None
    return process.returncode, text


def child(work: Path, job: Mapping[str, Any], limit: float) -> Result:
    """Run a job of this script in its own process, so that memory is free and a failure stays there."""
    result = work / "result.json"
    result.unlink(missing_ok=True)
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--job",
        json.dumps({**job, "tokens": str(work / "tokens")}),
    ]
    code, text = output_of([*command, "--result", str(result)], limit)
    if code or not result.is_file():
        raise PartError(last_line(text))
    found: Result = json.loads(result.read_text(encoding="utf-8"))
    return found


def run_job(job: Mapping[str, Any]) -> Result:
    """Runs in that process."""
    if "generation" in job:
        return generated(job["cpu"])
    return measured(Setting(**job["setting"]), Path(job["tokens"]))


def run_tests(work: Path, limit: float) -> Result:
    """`pytest -m cuda`: its last line, and the tests that failed."""
    # Without the suite's own options: two workers would measure each other's memory, and the plugin for them may be
    # missing.
    command = [sys.executable, "-m", "pytest", "-o", "addopts=-ra --strict-markers", "-m", "cuda", "-q", "--tb=short"]
    code, text = output_of([*command, f"--basetemp={work / 'pytest'}", "tests/training/test_cuda.py"], limit, cwd=ROOT)
    failed = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {
        "tests": last_line(text),
        "failed": failed,
        "output": text[-20000:] if code else "",
        "note": "; ".join(failed),
    }


def last_line(text: str) -> str:
    """The last line that is not empty; of a Python traceback, this is the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def random_tokens(count: int) -> "np.ndarray[Any, np.dtype[np.uint16]]":
    """This many random ids of GPT-2's vocabulary."""
    return np.random.default_rng(0).integers(0, GPT2_IDS, count, dtype=np.uint16)


def write_tokens(folder: Path, count: int) -> None:
    """A dataset of random tokens. Its tokenizer has as many characters as GPT-2 has ids: GPT-2's own may need a
    download.
    """
    folder.mkdir()
    (folder / "tokenizer.json").write_text(
        CharacterTokenizer("".join(map(chr, range(0x10000, 0x10000 + GPT2_IDS)))).to_json()
    )
    for split, length in (("val", 2**17), ("train", count)):
        random_tokens(length).tofile(folder / f"{split}.bin")


# ------------------------------------------------------------ all together


def run_parts(parts: Sequence[Part], minutes: float, report: Callable[[list[Result]], None]) -> list[Result]:
    """Run parts one after the other while time is left; `report` receives all results so far after each."""
    end = time.monotonic() + 60 * minutes
    results: list[Result] = []
    for part in parts:
        left = end - time.monotonic()
        began = time.monotonic()
        result: Result = {"name": part.name}
        if left < part.need:
            result["note"] = (
                f"left out: {left:.0f} s were left, and it takes {part.need:.0f} at least (--parts {part.name!r})"
            )
        else:
            print(f"{part.name} …", file=sys.stderr, flush=True)
            try:
                result |= part.run(min(part.limit, left))
            except Exception as error:
                result["note"] = f"failed: {error if isinstance(error, PartError) else repr(error)}"
        result["seconds"] = time.monotonic() - began
        results.append(result)
        report(results)
    return results


def as_markdown(machine: Mapping[str, Any], results: Sequence[Result]) -> str:
    """The tables."""
    lines = [
        f"{machine['device']}, torch {machine['torch']}, CUDA {machine['cuda']}, "
        f"glassgpt {machine['commit']}, {machine['date']}.",
        "",
    ]
    for result in results:
        if "tests" in result:
            lines += [f"Tests on the device: {result['tests']}", *(f"- {line}" for line in result["failed"]), ""]
    lines += [
        "| what | tokens/s | from … to | share of peak | peak memory, GiB | until measured, s | |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_row(result) for result in results if "tests" not in result and "generation" not in result]
    for result in results:
        if "generation" in result:
            lines += ["", "| writing, 124M | batch | tokens | tokens/s |", "|---|---|---|---|"]
            lines += [
                f"| {r['dtype']} | {r['batch']} | {r['tokens']} | {r['tokens_per_second']:,.0f} |"
                for r in result["generation"]
            ]
        if "trace" in result:
            lines += _kernels(result["name"], result["trace"])
    return "\n".join([*lines, *_bar(results)]) + "\n"


def _bar(results: Sequence[Result]) -> Iterator[str]:
    """The fastest of glassgpt's rows of 1,024 tokens against build-nanogpt's fastest, if both were measured."""
    rates = {result["name"]: result["tokens_per_second"] for result in results if "tokens_per_second" in result}
    theirs = [rate for name, rate in rates.items() if name.startswith("build-nanogpt")]
    ours = [rate for name, rate in rates.items() if name.startswith("bfloat16, compiled") and name.endswith("x 1024")]
    if ours and theirs:
        ratio = max(ours) / max(theirs)
        verdict = "met" if ratio >= BAR else "missed"
        yield f"\n{ratio:.2f} times build-nanogpt's tokens/s (the faster of its two); the bar is {BAR}: {verdict}"


def _row(result: Result) -> str:
    if "tokens_per_second" not in result:
        return f"| {result['name']} | | | | | | {_cell(result.get('note', ''))} |"
    share = "" if result["peak_share"] is None else f"{100 * result['peak_share']:.1f} %"
    memory, start = (f"{result[key]:.1f}" if key in result else "" for key in ("peak_gib", "start_seconds"))
    spread = f"{result['lowest']:,.0f} … {result['highest']:,.0f}"
    cells = [
        result["name"],
        f"{result['tokens_per_second']:,.0f}",
        spread,
        share,
        memory,
        start,
        _cell(result.get("changed", "")),
    ]
    return f"| {' | '.join(cells)} |"


def _kernels(name: str, trace: Result) -> list[str]:
    wall, busy = trace["wall_milliseconds"], trace["busy_milliseconds"]
    lines = [
        "",
        f"One update ({name}): {wall:.1f} ms, kernels {busy:.1f} ms.",
        "",
        "| kernel | calls | ms | share |",
        "|---|---|---|---|",
    ]
    rows = ((_cell(row["kernel"])[:100], row["calls"], row["milliseconds"]) for row in trace["kernels"])
    return lines + [f"| `{kernel}` | {calls:.0f} | {ms:.2f} | {100 * ms / busy:.1f} % |" for kernel, calls, ms in rows]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def machine_facts() -> Result:
    """Device, versions and the date."""
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if is_cuda else "cpu")
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        commit = found.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "of no commit"
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30 if is_cuda else 0.0
    facts = describe_environment(device, "bfloat16")
    return {
        **facts,
        "cuda": torch.version.cuda,
        "memory_gib": memory,
        "commit": commit,
        "date": date.today().isoformat(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for gpu.json and gpu.md")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument(
        "--parts", action="append", metavar="TEXT", help="only parts whose name has this in it; may be given again"
    )
    parser.add_argument("--build-nanogpt", type=Path, help="your copy of build-nanogpt")
    parser.add_argument("--nanogpt", type=Path, help="your copy of nanoGPT")
    parser.add_argument("--cpu", action="store_true", help="tiny models on the CPU: to try this script")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.job is not None:
        options.result.write_text(json.dumps(run_job(options.job)), encoding="utf-8")
        return 0
    if not torch.cuda.is_available() and not options.cpu:
        print("no CUDA device is there: nothing is measured (--cpu tries the script on tiny models)")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    machine = machine_facts()

    def write(results: list[Result]) -> None:
        (options.out / "gpu.json").write_text(
            json.dumps({"machine": machine, "parts": results}, indent=1) + "\n", encoding="utf-8"
        )
        (options.out / "gpu.md").write_text(as_markdown(machine, results), encoding="utf-8")

    with tempfile.TemporaryDirectory(prefix="glassgpt-gpu-") as name:
        work = Path(name)
        write_tokens(work / "tokens", 2**18 if options.cpu else 2**25)
        chosen = [
            p
            for p in param_groups(options, work, machine["memory_gib"])
            if any(text in p.name for text in options.parts or [""])
        ]
        results = run_parts(chosen, options.minutes, write)
    print((options.out / "gpu.md").read_text(encoding="utf-8"))
    return int(any(result.get("note", "").startswith("failed") or result.get("failed") for result in results))


if __name__ == "__main__":
    sys.exit(main())
