"""A run followed while it is written: appended to, half-written, cut back, replaced, removed; and what is offered of it."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glassgpt.config.model import ModelConfig
from glassgpt.interop.references import load
from glassgpt.interpretability.capture import ActivationCache, capture
from glassgpt.interpretability.snapshots import Prompt, take_probe, write_probe
from glassgpt.model.gpt import GPT
from glassgpt.playground import event_stream as follow
from glassgpt.playground import routes
from glassgpt.playground.catalog import Offers, find_offer, offers_for
from glassgpt.playground.event_stream import Follower, history
from glassgpt.playground.model_pool import Captures, Held, bytes_of
from glassgpt.runs.metrics import MetricsWriter, append_samples
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.utils.errors import UserError
from play_harness import GPT2_LIKE, Client, Served, serving, write_run


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run that has not written anything yet but its config."""
    return write_run(tmp_path / "run", GPT2_LIKE, steps=())


def write_steps(run: RunDirectory, steps: range, loss: float = 2.0) -> list[dict[str, Any]]:
    """Training records as the trainer appends them, with times of their own."""
    records = [{"step": step, "loss": loss + step / 7, "lr": 1e-3, "seconds": time.perf_counter()} for step in steps]
    log = MetricsWriter(run.metrics_path)
    for record in records:
        log.write(record)
    log.close()
    return records


def told(follower: Follower) -> dict[str, Any]:
    """What is new, by name: no name comes twice."""
    events = follower.look()
    assert len(dict(events)) == len(events)
    return dict(events)


def test_what_is_appended_is_told_once(run: RunDirectory) -> None:
    follower = Follower(run)
    assert list(told(follower)) == ["status", "snapshots", "checkpoints"]
    assert told(follower) == {}
    first = write_steps(run, range(1, 4))
    append_samples(run.samples_path, 3, ["a\n\n## Step 9\n    b", ""])
    MetricsWriter(run.metrics_path).write({"step": 3, "val_loss": math.nan})
    new = told(follower)
    assert new["metrics"] == {"training": first, "evaluations": [{"step": 3, "val_loss": None}]}
    assert new["samples"] == [{"step": 3, "texts": ["a\n\n## Step 9\n    b", ""]}]
    assert told(follower) == {}
    run.write_status("finished", step=3)
    assert told(follower)["status"]["state"] == "finished"


def test_a_half_written_line_is_left_for_the_next_look(run: RunDirectory) -> None:
    follower = Follower(run)
    told(follower)
    line = json.dumps({"step": 1, "loss": 1.5, "text": "é"}, ensure_ascii=False).encode() + b"\n"
    for at in range(len(line)):
        with open(run.metrics_path, "ab") as file:
            file.write(line[at : at + 1])
        new = told(follower)
        assert new == ({"metrics": {"training": [json.loads(line)], "evaluations": []}} if at == len(line) - 1 else {})


def test_a_damaged_line_is_left_out(run: RunDirectory) -> None:
    follower = Follower(run)
    told(follower)
    lines = [
        b"\x00\xff\n",
        b"[1]\n",
        b"\n",
        b'{"loss": 1}\n',
        b"[" * 100_000 + b"\n",
        b'{"step": 2, "loss": NaN}\n',
        b'{"step": 3, "loss": 1}\n',
    ]
    run.metrics_path.write_bytes(b"".join(lines))
    steps = [record["step"] for record in told(follower)["metrics"]["training"]]
    assert steps == [2, 3]
    assert history(run)["training"]["loss"] == [None, 1]


@pytest.mark.parametrize(
    "way", ["cut back", "cut back and grown", "replaced", "replaced by a longer one", "removed", "emptied"]
)
def test_a_run_that_goes_back_is_told(run: RunDirectory, way: str) -> None:
    write_steps(run, range(1, 6))
    append_samples(run.samples_path, 2, ["x"])
    append_samples(run.samples_path, 5, ["y"])
    follower = Follower(run, history(run)["cursor"])
    assert "reset" not in told(follower)
    if way.startswith("cut back"):
        run.cut_back(2)
    elif way == "emptied":
        run.metrics_path.write_bytes(b"")
    else:
        run.metrics_path.unlink()
        run.samples_path.unlink()
    if way != "removed" and way not in ("cut back", "emptied"):
        write_steps(run, range(3, 30 if "longer" in way or "grown" in way else 4), loss=9.0)
    assert told(follower)["reset"] == {}
    later = write_steps(run, range(30, 32))  # and it goes on from there
    assert told(follower)["metrics"]["training"] == later


def test_a_resumed_run_that_loses_nothing_is_no_reset(run: RunDirectory) -> None:
    run.cut_back(0)  # as each run begins
    write_steps(run, range(1, 6))
    append_samples(run.samples_path, 5, ["y"])
    follower = Follower(run, history(run)["cursor"])
    run.cut_back(5)  # as each resume does: the files are new ones, with the same content
    new = write_steps(run, range(6, 7))
    assert told(follower)["metrics"]["training"] == new


def test_a_cursor_goes_on_where_another_was(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "MOST_BYTES", 500)  # a few records a look
    write_steps(run, range(1, 4))
    cursor = history(run)["cursor"]
    later = write_steps(run, range(4, 60))
    found: list[Any] = []
    while True:
        follower = Follower(run, cursor)  # a new connection each time
        new = told(follower)
        assert "reset" not in new
        if "metrics" not in new:
            break
        found += new["metrics"]["training"]
        cursor = follower.cursor
    assert found == later
    for nonsense in ("", "1-2-3", "1-2-3-4-5", "a-b-c-d", "1-2-3-" + "9" * 99, "-1-2-3-4", "٣-1-1-1"):
        with pytest.raises(UserError, match="no place in a run's files"):
            Follower(run, nonsense)
    assert told(Follower(run, "999-1-0-0"))["reset"] == {}


def test_a_history_is_thinned_to_what_draws_the_same_curve(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "MOST_ROWS", 50)
    records = write_steps(run, range(1, 400))
    with open(run.metrics_path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 400, "loss": 99.0, "grad_norm": None}) + "\n" + '{"step": 401, "loss')
    found = history(run)
    columns = found["training"]
    assert len(columns["step"]) <= 50
    assert (columns["step"][0], columns["step"][-1]) == (1, 400)
    assert max(columns["loss"]) == 99.0
    assert {len(column) for column in columns.values()} == {len(columns["step"])}
    by_step = {record["step"]: record["loss"] for record in records}
    assert all(by_step.get(step, 99.0) == loss for step, loss in zip(columns["step"], columns["loss"], strict=True))
    assert found["config"] == run.config_path.read_text(encoding="utf-8")
    assert "reset" not in told(Follower(run, found["cursor"]))


def test_a_thinned_history_has_means_and_times_of_all_steps(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "MOST_ROWS", 50)
    records = write_steps(run, range(1, 401))
    columns = history(run)["training"]
    half = 400 // 50  # a report's
    inner = [row for row, step in enumerate(columns["step"]) if half < step <= 400 - half]
    assert len(inner) > 20
    for row in inner:
        step = int(columns["step"][row])
        around = [record["loss"] for record in records[step - 1 - half : step + half]]
        assert columns["loss_mean"][row] == pytest.approx(
            np.mean(around), rel=1e-9
        )  # sums of at most 400 float64 numbers
        assert columns["time"][row] == pytest.approx(sum(record["seconds"] for record in records[:step]), rel=1e-9)


def test_sections_of_samples_larger_than_one_reading_arrive_whole(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once one was cut where a reading ended, or never came where it was longer than that."""
    monkeypatch.setattr(follow, "MOST_BYTES", 1000)
    append_samples(run.samples_path, 0, ["begin"])
    follower = follow.Follower(run)
    texts = ["\n".join(f"line {i} of {step}" for i in range(200)) for step in (1, 2)]
    for step, text in enumerate(texts, start=1):
        append_samples(run.samples_path, step, [text])
    events = [event for _ in range(4) for event in follower.look()]
    assert [value for name, value in events if name == "samples"] == [
        [{"step": i + 1, "texts": [text]} for i, text in enumerate(texts)]
    ]


def test_a_process_that_nobody_has_buried_is_not_running(run: RunDirectory) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        run.write_status("running", host=socket.gethostname(), pid=child.pid)
        assert run.state == "running"
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and still a zombie
        assert run.state == "stopped"


def test_an_empty_run_has_a_history(run: RunDirectory) -> None:
    found = history(run)
    assert (found["status"], found["environment"], found["evaluations"], found["samples"]) == (
        {"state": None},
        {},
        [],
        [],
    )
    assert found["training"]["loss"] == []


def test_a_snapshot_is_packed_as_it_was_taken(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", GPT2_LIKE)
    model, _ = load(run.path)
    taken = take_probe(model, [Prompt([1, 2, 3], ["a", "b", "c"]), Prompt([4], ["d"])], ["text"], 1)
    write_probe(run.probe_path(1), taken)
    with serving(run.path) as served:
        status, found = served.client.get("/api/snapshot?model=0&step=1")
        assert status == 200
        assert served.client.get("/api/history?model=0")[1]["snapshots"] == [1]
        status, refused = served.client.get("/api/snapshot?model=0&step=2")
        assert (status, "there are those of 1" in refused["error"]) == (400, True)
    assert [prompt["ids"] for prompt in found["prompts"]] == [[1, 2, 3], [4]]
    for number, prompt in enumerate(taken.prompts):
        for name in ("attention", "lens_ids", "lens_p", "next_rank", "surprisal"):
            tensor: torch.Tensor = getattr(prompt, name)
            np.testing.assert_array_equal(found[f"{name}.{number}"], tensor.numpy())
    np.testing.assert_array_equal(found["head_scores"], taken.head_scores.numpy())


# the state of a run


def test_a_run_whose_process_is_gone_has_stopped(run: RunDirectory) -> None:
    assert run.state is None
    run.write_status("running", host=socket.gethostname(), pid=os.getpid())
    assert run.state == "running"
    os.utime(run.status_path, (1, 1))  # written before this process was: another one's, of the same number
    assert run.state == "stopped"
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    run.write_status("running", host=socket.gethostname(), pid=child.pid)
    assert run.state == "stopped"
    run.write_status("running", host="elsewhere", pid=child.pid)
    assert run.state == "running"
    run.write_status("finished", host=socket.gethostname(), pid=child.pid)
    assert run.state == "finished"
    for pid in (-1, 0, 10**30, "x", None, True):
        run.write_status("running", host=socket.gethostname(), pid=pid)
        assert run.state in ("running", "stopped")
    for text in ("", "[]", '{"state": 3}', "\x00"):
        run.status_path.write_text(text)
        assert run.state is None


def test_looking_takes_no_lock(run: RunDirectory) -> None:
    run.write_status("running", host=socket.gethostname(), pid=os.getpid())
    looking = threading.Event()

    def look() -> None:
        while not looking.is_set():
            history(run)
            find_offer(str(run.path)).told(0)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(20):
            with run.locked():
                pass
    finally:
        looking.set()
        thread.join()


# what is offered


def test_every_run_of_a_folder_is_offered_and_new_ones_come_last(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run in"):
        offers_for([], tmp_path / "runs")
    for age, name in enumerate(("old", "new")):
        run = write_run(tmp_path / "runs" / name, GPT2_LIKE, steps=(1,) if name == "new" else ())
        os.utime(run.config_path, (1000 + age, 1000 + age))
    (tmp_path / "runs" / "no run").mkdir()
    offers = offers_for([], tmp_path / "runs")
    assert [(offer["id"], Path(offer["name"]).name, offer["steps"]) for offer in offers.told()] == [
        (0, "new", [1]),
        (1, "old", []),
    ]
    write_run(tmp_path / "runs" / "newest", GPT2_LIKE, steps=())
    shutil.rmtree(tmp_path / "runs" / "old")
    assert [(offer["id"], Path(offer["name"]).name) for offer in offers.told()] == [(0, "new"), (2, "newest")]
    with pytest.raises(UserError, match="there is no offer 3"):
        offers[3]


def test_references_are_found_before_anything_is_opened(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", GPT2_LIKE, steps=(2, 5)).path
    assert find_offer(f"{run}@5").told(0)["steps"] == [5]
    assert find_offer(f"{run}@best").told(0)["steps"] == [2]
    assert find_offer(str(run / "checkpoints" / "000005")).run is None
    assert find_offer("gpt2").run is None  # of the hub: not downloaded yet
    for wrong, reason in (
        (f"{run}@3", "it has 2, 5 and best"),
        (f"{run}@x", "it has 2, 5 and best"),
        (f"{run}x", "there is no run"),
    ):
        with pytest.raises(UserError, match=reason):
            Offers([wrong], None)
    empty = write_run(tmp_path / "empty", GPT2_LIKE, steps=())
    assert find_offer(str(empty.path)).told(0)["steps"] == []
    with pytest.raises(UserError, match="no checkpoint yet"):
        find_offer(f"{empty.path}@best")
    (tmp_path / "notes.txt").write_text("no model")
    for nothing, told in (
        (tmp_path, "neither a run nor a checkpoint"),
        (tmp_path / "notes.txt", "is no model"),
        (tmp_path / "no", "no run"),
    ):
        with pytest.raises(UserError, match=told):
            find_offer(str(nothing))


# over HTTP, while a run is written


@pytest.fixture
def served(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(routes, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(routes, "HEARTBEAT_SECONDS", 0.2)
    with serving(run.path) as served:
        yield served


class Events:
    """A stream of server-sent events, read as a browser does."""

    def __init__(self, client: Client, address: str = "/api/events?model=0", last: str | None = None) -> None:
        self._socket = socket.create_connection(("127.0.0.1", client.port), timeout=10)
        more = f"authorization: {client.headers['authorization']}\r\n"
        more += "" if last is None else f"last-event-id: {last}\r\n"
        self._socket.sendall(f"GET {address} HTTP/1.0\r\nhost: localhost\r\n{more}\r\n".encode())
        self._file = self._socket.makefile("rb")
        self.status = int(self._file.readline().split()[1])
        while self._file.readline().strip():
            pass
        self.last: str | None = None

    def next(self) -> tuple[str, Any]:
        """The next event. Raises `EOFError` at the end."""
        name, data = "", ""
        while line := self._file.readline().decode():
            key, _, value = line.rstrip("\n").partition(": ")
            if key == "event":
                name = value
            elif key == "data":
                data = value
            elif key == "id":
                self.last = value
            elif line == "\n" and data:
                return name, json.loads(data)
        raise EOFError

    def wait_for_comment(self) -> None:
        """Read on until the server says that it is still there, which it does where there is no event to tell."""
        while not (line := self._file.readline().decode()).startswith(":"):
            if line.startswith("id: "):
                self.last = line[4:-1]

    def until(self, wanted: str) -> Any:
        """The value of the next event of that name."""
        while True:
            name, value = self.next()
            if name == wanted:
                return value

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def test_events_come_as_the_run_writes(served: Served, run: RunDirectory) -> None:
    client = served.client
    write_steps(run, range(1, 3))
    cursor = client.get("/api/history?model=0")[1]["cursor"]
    between = write_steps(run, range(3, 5))
    events = Events(client, f"/api/events?model=0&after={cursor}")
    assert events.next() == ("status", {"state": None})
    assert events.until("metrics")["training"] == between
    assert events.until("checkpoints") == []
    write_run(run.path, GPT2_LIKE, steps=(4,))
    assert events.until("checkpoints") == [4]
    append_samples(run.samples_path, 4, ["é"])
    assert events.until("samples") == [{"step": 4, "texts": ["é"]}]
    write_steps(run, range(5, 6))
    events.until("metrics")
    events.wait_for_comment()
    last = events.last
    events.close()
    missed = write_steps(run, range(6, 8))
    again = Events(client, f"/api/events?model=0&after={cursor}", last=last)  # as a browser reconnects
    assert again.until("metrics")["training"] == missed
    run.cut_back(5)
    assert again.until("reset") == {}
    again.close()
    assert client.answer("model", model=0)["step"] == 4


def test_followers_are_bounded_and_forgotten(served: Served) -> None:
    followers = served.server.api.followers
    streams = [Events(served.client) for _ in range(routes.MAX_FOLLOWERS)]
    for stream in streams:
        assert stream.next()[0] == "status"
    newest = Events(served.client)
    assert newest.next()[0] == "status"
    with pytest.raises(EOFError):  # the oldest has made room
        streams[0].until("no such event")
    assert len(followers) == routes.MAX_FOLLOWERS
    for stream in (*streams, newest):
        stream.close()
    end = time.monotonic() + 10
    while followers:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_model_has_no_history(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", GPT2_LIKE)
    with serving(run.checkpoints / "000001") as served:
        for address in ("history?model=0", "events?model=0", "snapshot?model=0&step=1"):
            status, refused = served.client.get(f"/api/{address}")
            assert (status, "not a run" in refused["error"]) == (400, True)


def test_a_checkpoint_that_is_pruned_or_replaced(tmp_path: Path) -> None:
    """What is held can still be asked about; what comes in its place is another model."""
    run = write_run(tmp_path / "run", GPT2_LIKE, steps=(1, 2))
    with serving(run.path) as served:
        first = served.client.answer("next", model=0, step=1, ids=[3])["logits"]
        shutil.rmtree(run.checkpoints / "000001")
        assert served.client.answer("next", model=0, step=1, ids=[3])["logits"].tolist() == first.tolist()
        newest = served.client.answer("next", model=0, ids=[3])["logits"]
        other = write_run(tmp_path / "other", GPT2_LIKE, steps=(9,))
        shutil.rmtree(run.checkpoints / "000002")
        shutil.copytree(other.checkpoints / "000009", run.checkpoints / "000002")
        replaced = served.client.answer("next", model=0, ids=[3])["logits"]
        assert np.abs(replaced - newest).max() > 1e-3
        (run.checkpoints / "000002" / "model.safetensors").write_bytes(b"damaged")
        os.utime(run.checkpoints / "000002", (1, 1))
        status, told = served.client.ask("next", model=0, ids=[3])
        assert (status, "is damaged" in told["error"]) == (400, True)
        shutil.rmtree(run.checkpoints)
        status, told = served.client.ask("next", model=0, ids=[3])
        assert (status, "no checkpoint" in told["error"]) == (400, True)


def test_only_a_few_models_are_held(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", GPT2_LIKE, steps=(1, 2, 3, 4, 5))
    with serving(run.path) as served:
        for step in (1, 2, 3, 4, 5, 4):
            served.client.answer("next", model=0, step=step, ids=[3])
        assert [step for _, step in served.pool._held] == [3, 5, 4]


def test_captures_are_kept_within_a_bound_and_go_with_their_model(tmp_path: Path) -> None:
    model = GPT.create(ModelConfig(vocab_size=20, n_layer=2, n_head=2, n_embd=16, context_length=8), seed=0)
    helds = [Held("model", None, model, None, 0.0) for _ in range(2)]
    made: list[int] = []

    def seen(length: int) -> ActivationCache:
        made.append(length)
        with capture(model) as found:
            model.hidden(torch.zeros(1, length, dtype=torch.int64))
        return found

    with torch.no_grad():
        captures = Captures(most_bytes=bytes_of(seen(8)) * 5 // 2)
        for question in (1, 2, 1, 3, 1, 2):  # there is room for two of 8 tokens
            captures.get(helds[0], question, lambda: seen(8))
        assert len(made) == 1 + 4  # 1, 2 and 3, and 2 once more
        captures.get(helds[1], 1, lambda: seen(8))
        helds.pop(0)
        captures.get(helds[0], 1, lambda: seen(8))
    assert [key[0]() for key in captures._kept] == helds
