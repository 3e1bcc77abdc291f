"""Starts several ranks within a second: a process that has already imported torch forks them.

As a program, this file reads one request per line from standard input, and prints one line of results when the ranks
have ended. A request names one of the functions under "Tasks". `Harness` is the caller's side.
"""

import builtins
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

# Caller's side


@dataclass(frozen=True)
class RankResult:
    """A rank's exit status, its task's return value, its standard error, and the seconds until it ended."""

    status: int
    value: Any
    errors: str
    seconds: float


class Harness:
    """Starts this file as a program, and sends it requests."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, size: int, task: str, *, environment: Mapping[str, str] | None = None, **arguments: Any) -> None:
        """Start a task on `size` ranks; 0 is one process without torchrun's variables. `results` waits for them."""
        request = {"size": size, "task": task, "arguments": arguments, "environment": dict(environment or {})}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request, default=str) + "\n")
        self._process.stdin.flush()

    def results(self) -> list[RankResult]:
        """Wait until the ranks have ended, and return their results in the order of ranks."""
        assert self._process.stdout is not None
        return [RankResult(**each) for each in json.loads(self._process.stdout.readline())]

    def run(self, size: int, task: str, *, environment: Mapping[str, str] | None = None, **arguments: Any) -> list[Any]:
        """Run a task, check that every rank exits with 0, and return each rank's return value."""
        self.start(size, task, environment=environment, **arguments)
        ended = self.results()
        assert all(each.status == 0 for each in ended), "\n".join(each.errors for each in ended)
        return [each.value for each in ended]

    def close(self) -> None:
        """End the program."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


# Tasks


def train(config: dict[str, Any], out: str, *, overwrite: bool = False) -> None:
    """Train a run."""
    from glassgpt.config.schema import TrainConfig
    from glassgpt.training.run import train

    train(TrainConfig.from_dict(config), out, overwrite=overwrite)


def resume(run: str, *, steps: int | None = None, strategy: str | None = None) -> None:
    """Resume a run."""
    from glassgpt.training.run import resume

    changes: dict[str, Any] = {} if strategy is None else {"strategy": strategy}
    resume(run, steps=steps, **changes)


def train_twice(config: dict[str, Any], outs: list[str]) -> None:
    """Train two runs in one process, as a script under torchrun may do."""
    for out in outs:
        train(config, out)


def first_weights(config: dict[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of each full parameter before the first update, gathered from the ranks."""
    import hashlib

    from glassgpt.config.schema import TrainConfig
    from glassgpt.distributed.group import process_group
    from glassgpt.training.progress import SilentProgress
    from glassgpt.training.setup import setup_training

    with process_group() as ranks:
        state = setup_training(TrainConfig.from_dict(config), ranks, SilentProgress())
        whole = {name: state.strategy.full_tensor(p.detach()) for name, p in state.strategy.model.named_parameters()}
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in whole.items()}


def evaluate(config: dict[str, Any], limit: int | None, items: str, count: int) -> dict[str, Any]:
    """Return validation loss and HellaSwag scores of an untrained model, evaluated by all ranks together."""
    from glassgpt.config.schema import TrainConfig
    from glassgpt.distributed.group import process_group
    from glassgpt.evaluation.hellaswag import score_hellaswag, summarize
    from glassgpt.evaluation.hellaswag_items import read_items, subset
    from glassgpt.evaluation.perplexity import evaluate_data
    from glassgpt.training.progress import SilentProgress
    from glassgpt.training.setup import setup_training

    with process_group() as ranks:
        state = setup_training(TrainConfig.from_dict(config), ranks, SilentProgress())
        model = state.strategy.full_model()
        loss = evaluate_data(model, state.data, limit=limit, ranks=ranks)
        chosen = subset(read_items(Path(items)), count)
        scores = summarize(score_hellaswag(model, state.data.tokenizer, chosen, ranks=ranks))
    return {"loss": loss, "hellaswag": scores}


def train_with_faults(faults: dict[str, dict[str, Any]], config: dict[str, Any], out: str) -> None:
    """Train a run with injected faults: names and options of functions under "Faults"."""
    for name, options in faults.items():
        FAULTS[name](**options)
    train(config, out)


def each_rank_its_own(calls: list[tuple[str, dict[str, Any]]]) -> None:
    """Run another task on each rank: names and arguments in the order of ranks."""
    name, arguments = calls[_rank()]
    TASKS[name](**arguments)


def times_in_main_process_first(places: list[tuple[str, int]]) -> dict[str, float]:
    """Return when this rank enters and leaves the block of `main_process_first`, and when it continues after it.

    `places` has host and local rank of each rank. Rank 0 stays in the block until the last rank has entered its own.
    """
    from glassgpt.distributed.group import process_group

    host, local_rank = places[_rank()]
    os.environ["LOCAL_RANK"] = str(local_rank)
    times = {}
    with mock.patch("socket.gethostname", return_value=host), process_group() as ranks:
        with ranks.main_process_first("a test"):
            times["entered"] = time.monotonic()
            assert ranks._store is not None
            if ranks.rank == ranks.size - 1:
                ranks._store.set("last rank", "entered")
            while ranks.rank == 0 and not ranks._store.check(["last rank"]):
                time.sleep(0.01)
            time.sleep(0.0 if ranks.rank else 0.5)
            times["left"] = time.monotonic()
        times["continued"] = time.monotonic()
    return times


def compiled_operators(config: dict[str, Any], out: str) -> int:
    """Train a compiled run; return the number of calls of operators and modules in the checkpointed inner graphs."""
    import torch
    from torch._dynamo import register_backend

    counts = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        inner = [
            module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)
        ]  # checkpointed parts are graph modules inside the graph
        counts.append(sum(node.op.startswith("call_") for module in inner for node in module.graph.nodes))
        return graph.forward

    register_backend(counting, name="counting")
    train({**config, "compile": "on", "compile_backend": "counting"}, out)
    return sum(counts)


def compiled_frames(config: dict[str, Any], out: str) -> dict[str, int]:
    """Train a compiled run and return the number of graphs. Hitting the recompile limit is an error."""
    import torch

    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        train({**config, "compile": "on", "compile_backend": "eager"}, out)
    return {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


TASKS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        train,
        resume,
        train_twice,
        first_weights,
        evaluate,
        train_with_faults,
        each_rank_its_own,
        times_in_main_process_first,
        compiled_operators,
        compiled_frames,
    )
}

# Faults


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _before_step(step: int, action: Callable[[], object]) -> None:
    """Make this rank call `action` once, before the update of this step."""
    from glassgpt.training import step as training

    update, pending = training.start_update, [action]

    def start_update(state: Any, lr: float) -> Any:
        if state.step + 1 == step and pending:
            pending.pop()()
        return update(state, lr)

    mock.patch("glassgpt.training.step.start_update", start_update).start()


def raising(rank: int, step: int, kind: str = "KeyError", message: str = "a thing that nobody expected") -> None:
    """One rank raises an exception before this step."""

    def fail() -> None:
        raise getattr(builtins, kind)(message)

    if _rank() == rank:
        _before_step(step, fail)


def stuck(rank: int, step: int) -> None:
    """One rank sleeps before this step, so it never reaches the next collective."""
    if _rank() == rank:
        _before_step(step, lambda: time.sleep(1000))


def stopped(rank: int, step: int) -> None:
    """One process gets SIGSTOP before this step, which stops all of its threads."""
    if _rank() == rank:
        _before_step(step, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def killed(rank: int, step: int) -> None:
    """One process gets SIGKILL before this step."""
    if _rank() == rank:
        _before_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))


def killed_at_the_end(rank: int) -> None:
    """One process gets SIGKILL after training, when the ranks close their process group."""
    if _rank() == rank:
        kill = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
        mock.patch("glassgpt.distributed.group.Ranks.finish", side_effect=kill).start()


def preempted(rank: int, step: int, again: float = 0.0) -> None:
    """One process gets SIGTERM twice, `again` seconds apart, as from a scheduler and then from torchrun."""

    def signal_twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        repeat = threading.Timer(again, os.kill, [os.getpid(), signal.SIGTERM])
        repeat.daemon = True
        repeat.start()

    if _rank() == rank:
        _before_step(step, signal_twice)


def slow_save(step: int, seconds: float, number: int | None = None) -> None:
    """The save of this step takes `seconds`, and the process gets signal `number` in the middle of it."""
    from glassgpt.runs.checkpoint import save_checkpoint as save

    def slow(directory: Path, snapshot: Any, config: Any, tokenizer: Any, state: Any, about_run: Any) -> Path:
        if state.step == step:
            time.sleep(seconds / 2)
            if number is not None:
                os.kill(os.getpid(), number)
            time.sleep(seconds / 2)
        return save(directory, snapshot, config, tokenizer, state, about_run)

    mock.patch("glassgpt.training.recorder.save_checkpoint", slow).start()


def stuck_in_forward(rank: int, step: int) -> None:
    """One rank hangs in a forward pass, while the others wait for its gradients."""
    from glassgpt.model.gpt import GPT

    forward, state = GPT.forward, {"on": False}

    def slow(model: GPT, *arguments: Any, **options: Any) -> Any:
        if state["on"]:
            time.sleep(1000)
        return forward(model, *arguments, **options)

    mock.patch.object(GPT, "forward", slow).start()
    if _rank() == rank:
        _before_step(step, lambda: state.update(on=True))


def stuck_in_evaluation(rank: int) -> None:
    """One rank hangs in its share of an evaluation."""
    from glassgpt.evaluation.perplexity import measure_stream as measure

    def slow(*arguments: Any, **options: Any) -> Any:
        if _rank() == rank:
            time.sleep(1000)
        return measure(*arguments, **options)

    mock.patch("glassgpt.evaluation.perplexity.measure_stream", slow).start()


def non_finite_loss_or_gradient(rank: int, step: int, what: str) -> None:
    """One micro-batch of one rank has a NaN loss (`what` is "loss"), or a finite loss with an infinite gradient."""
    import torch

    from glassgpt.model.gpt import GPT

    forward, state = GPT.forward, {"on": False}

    def bad(model: GPT, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = forward(model, *arguments, **options)
        if not (state["on"] and model.training):
            return loss
        state["on"] = False
        if what == "loss":
            return loss * torch.nan
        weight = next(model.parameters())
        return loss + (weight.flatten()[0] - weight.flatten()[0].detach()).abs().sqrt()  # 0, with an infinite gradient

    mock.patch.object(GPT, "forward", bad).start()
    if _rank() == rank:
        _before_step(step, lambda: state.update(on=True))


def other_code(rank: int) -> None:
    """One rank runs another version of the package's code."""
    if _rank() == rank:
        mock.patch("glassgpt.training.run._hash_of_code", return_value="another").start()


def other_data(rank: int, source: str) -> None:
    """One rank reads another text under the same name."""
    from glassgpt.data.training_data import open_training_data as opened

    def other(data: Any, *rest: Any, **named: Any) -> Any:
        import dataclasses

        return opened(dataclasses.replace(data, source=source), *rest, **named)

    if _rank() == rank:
        mock.patch("glassgpt.training.setup.open_training_data", other).start()


def missing_data(rank: int) -> None:
    """One rank raises an error about a missing shard when it opens the data."""
    from glassgpt.utils.errors import UserError

    if _rank() == rank:
        gone = UserError(
            "the dataset /data is damaged: train_000001.bin is missing; remove the directory and prepare it again"
        )
        mock.patch("glassgpt.training.setup.open_training_data", side_effect=gone).start()


def full_disk(save: int) -> None:
    """The disk becomes full in the middle of save number `save`, counted from 1."""
    import errno

    from glassgpt.runs import checkpoint

    write, calls = checkpoint.write_tensors, []

    def failing(path: Path, *rest: Any) -> None:
        calls.append(path)
        if len(calls) == 2 * save:  # each save writes the weights first, then the optimizer's state
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *rest)

    mock.patch("glassgpt.runs.checkpoint.write_tensors", failing).start()


_WAYS_TO_HANG = (stuck, stuck_in_forward, stuck_in_evaluation, stopped)
_WAYS_TO_FAIL = (
    raising,
    killed,
    killed_at_the_end,
    non_finite_loss_or_gradient,
    other_code,
    other_data,
    missing_data,
    full_disk,
)


def judging_on_device() -> None:
    """Check updates on the device, as on GPUs, although the device is a CPU."""
    from glassgpt.training import run, setup

    def setup_training(*arguments: Any, **options: Any) -> Any:
        state = setup.setup_training(*arguments, **options)
        setup.judge_on_device(state)
        return state

    mock.patch.object(run, "setup_training", setup_training).start()


FAULTS: dict[str, Callable[..., None]] = {
    f.__name__: f for f in (*_WAYS_TO_HANG, *_WAYS_TO_FAIL, preempted, slow_save, judging_on_device)
}

# Program


def _fork(rank: int, request: Mapping[str, Any], variables: Mapping[str, str], folder: Path) -> int:
    """Fork a rank that runs the task; return its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ.update({**variables, **request["environment"]})
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(2, 1)
        # Flushing matters only if the machine crashes, and measuring the CPU's peak takes 0.3 s.
        mock.patch("os.fsync", return_value=None).start()
        mock.patch("glassgpt.training.setup.peak_flops", return_value=1e9).start()
        for module in ("watchdog", "group"):  # check the other ranks more often, so that tests take less time
            mock.patch(f"glassgpt.distributed.{module}.PERIOD", 0.3).start()
        mock.patch("glassgpt.distributed.watchdog.FIRST_UPDATE_FACTOR", 1).start()
        value = TASKS[request["task"]](**request["arguments"])
        (folder / f"{rank}.json").write_text(json.dumps(value))
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException as error:
        from glassgpt.utils.errors import UserError

        print(f"glassgpt: error: {error}", file=sys.stderr) if isinstance(error, UserError) else traceback.print_exc()
        status = 2 if isinstance(error, UserError) else 1
    finally:
        sys.stderr.flush()
        os._exit(status)


def _serve(
    request: Mapping[str, Any], folder: Path, shared: Mapping[str, str], limit: float = 60.0
) -> list[dict[str, Any]]:
    """Fork the ranks, wait until all have ended (after `limit` seconds they are killed), and return their results."""
    size = request["size"]
    begin = time.monotonic()
    children = {}
    for rank in range(max(1, size)):
        variables = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)} if size else {}
        children[_fork(rank, request, variables, folder)] = rank
    ended: dict[int, dict[str, Any]] = {}
    while children:
        child, status = next(
            (ended_child for each in children if (ended_child := os.waitpid(each, os.WNOHANG))[0]), (0, 0)
        )
        if child:
            rank = children.pop(child)
            value = folder / f"{rank}.json"
            ended[rank] = {
                "status": os.waitstatus_to_exitcode(status),
                "value": json.loads(value.read_text()) if value.exists() else None,
                "errors": (folder / f"{rank}.err").read_text(errors="replace"),
                "seconds": time.monotonic() - begin,
            }
            continue
        if time.monotonic() - begin > limit or (request["task"] == "train_with_faults" and _only_stopped(children)):
            for each in children:
                os.kill(each, signal.SIGKILL)
        time.sleep(0.002)
    return [ended[rank] for rank in sorted(ended)]


def _only_stopped(children: Mapping[int, int]) -> bool:
    """Return whether all remaining processes are stopped, so that they will never end."""
    states = [Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] for child in children]
    return all(state == "T" for state in states)


@contextmanager
def _store() -> Iterator[dict[str, str]]:
    """Run a process with the group's TCP store, as torchrun does; yield the environment variables that locate it."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    reading, writing = os.pipe()
    child = os.fork()  # a separate process, because forking a process with the store's threads is not safe
    if child == 0:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, str(store.port).encode())
        signal.pause()
        os._exit(0)
    port = os.read(reading, 10).decode()
    os.close(reading)
    os.close(writing)
    try:
        agent_store = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": uuid.uuid4().hex}
        yield {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **agent_store}
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def main() -> None:
    """Serve requests until standard input is closed."""
    import torch
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.distributed.tensor

    import glassgpt.training.run  # noqa: F401

    torch.set_num_threads(1)  # a thread pool does not survive a fork
    for line in sys.stdin:
        with tempfile.TemporaryDirectory(prefix="glassgpt-ranks-") as folder, _store() as shared:
            print(json.dumps(_serve(json.loads(line), Path(folder), shared)), flush=True)


if __name__ == "__main__":
    main()
