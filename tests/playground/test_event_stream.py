"""The event stream of a run that is being written, its history, and its snapshots over HTTP."""

import errno
import json
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glassgpt.interop.references import load
from glassgpt.interpretability.snapshots import Prompt, take_probe, write_probe
from glassgpt.playground import event_stream, routes
from glassgpt.playground.event_stream import Follower, history
from glassgpt.playground.model_pool import find_entry
from glassgpt.report.runs import read_text
from glassgpt.runs.metrics import MetricsWriter, append_samples
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.utils.errors import UserError
from play_harness import GPT2_LIKE, Client, ServerThread, serving, write_run


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Return a run that has only its config."""
    return write_run(tmp_path / "run", GPT2_LIKE, steps=())


def write_steps(run: RunDirectory, steps: range, loss: float = 2.0) -> list[dict[str, Any]]:
    """Append one training record per step, all different, and return them."""
    records = [{"step": step, "loss": loss + step / 7, "lr": 1e-3, "seconds": time.perf_counter()} for step in steps]
    log = MetricsWriter(run.metrics_path)
    for record in records:
        log.write(record)
    log.close()
    return records


def poll(follower: Follower) -> dict[str, Any]:
    """Return the new events by name. Asserts that each name occurs at most once."""
    events = list(follower.poll())
    assert len(dict(events)) == len(events)
    return dict(events)


def test_appended_records_and_samples_are_sent_once(run: RunDirectory) -> None:
    follower = Follower(run)
    assert list(poll(follower)) == ["status", "snapshots", "checkpoints"]
    assert poll(follower) == {}
    first = write_steps(run, range(1, 4))
    append_samples(run.samples_path, 3, ["a\n\n## Step 9\n    b", ""])
    MetricsWriter(run.metrics_path).write({"step": 3, "val_loss": math.nan})
    new = poll(follower)
    assert new["metrics"] == {"training": first, "evaluations": [{"step": 3, "val_loss": None}]}
    assert new["samples"] == [{"step": 3, "texts": ["a\n\n## Step 9\n    b", ""]}]
    assert poll(follower) == {}
    run.write_status("finished", step=3)
    assert poll(follower)["status"]["state"] == "finished"


def test_a_half_written_line_waits_for_the_next_poll(run: RunDirectory) -> None:
    follower = Follower(run)
    poll(follower)
    line = json.dumps({"step": 1, "loss": 1.5, "text": "é"}, ensure_ascii=False).encode() + b"\n"
    for at in range(len(line)):
        with open(run.metrics_path, "ab") as file:
            file.write(line[at : at + 1])
        new = poll(follower)
        assert new == ({"metrics": {"training": [json.loads(line)], "evaluations": []}} if at == len(line) - 1 else {})


def test_damaged_lines_are_skipped(run: RunDirectory) -> None:
    follower = Follower(run)
    poll(follower)
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
    steps = [record["step"] for record in poll(follower)["metrics"]["training"]]
    assert steps == [2, 3]
    np.testing.assert_array_equal(history(run)["training"]["loss"], [math.nan, 1])


@pytest.mark.parametrize(
    "change", ["cut back", "cut back and extended", "replaced", "replaced by a longer one", "removed", "emptied"]
)
def test_followers_get_a_reset_if_a_run_is_cut_back_or_replaced(run: RunDirectory, change: str) -> None:
    write_steps(run, range(1, 6))
    append_samples(run.samples_path, 2, ["x"])
    append_samples(run.samples_path, 5, ["y"])
    follower = Follower(run, history(run)["cursor"])
    assert "reset" not in poll(follower)
    if change.startswith("cut back"):
        run.cut_back(2)
    elif change == "emptied":
        run.metrics_path.write_bytes(b"")
    else:
        run.metrics_path.unlink()
        run.samples_path.unlink()
    if change != "removed" and change not in ("cut back", "emptied"):
        write_steps(run, range(3, 30 if "longer" in change or "extended" in change else 4), loss=9.0)
    assert poll(follower)["reset"] == {}
    later = write_steps(run, range(30, 32))  # the stream continues after the reset
    assert poll(follower)["metrics"]["training"] == later


def test_a_resume_that_loses_no_records_sends_no_reset(run: RunDirectory) -> None:
    run.cut_back(0)  # every new run starts with this call
    write_steps(run, range(1, 6))
    append_samples(run.samples_path, 5, ["y"])
    follower = Follower(run, history(run)["cursor"])
    run.cut_back(5)  # every resume makes this call: it writes new files with the same content
    new = write_steps(run, range(6, 7))
    assert poll(follower)["metrics"]["training"] == new


def test_a_cursor_continues_where_another_follower_ended(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "MAX_BYTES", 500)  # each poll reads a few records
    write_steps(run, range(1, 4))
    cursor = history(run)["cursor"]
    later = write_steps(run, range(4, 60))
    result: list[Any] = []
    while True:
        follower = Follower(run, cursor)  # a new connection each time
        new = poll(follower)
        assert "reset" not in new
        if "metrics" not in new:
            break
        result += new["metrics"]["training"]
        cursor = follower.cursor
    assert result == later
    for nonsense in ("", "1-2-3", "1-2-3-4-5", "a-b-c-d", "1-2-3-" + "9" * 99, "-1-2-3-4", "٣-1-1-1"):
        with pytest.raises(UserError, match="cursor"):
            Follower(run, nonsense)
    assert poll(Follower(run, "999-1-0-0"))["reset"] == {}


def test_a_line_longer_than_the_limit_does_not_stop_a_follower(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "MAX_BYTES", 100)
    follower = Follower(run)
    poll(follower)
    long = {"step": 1, "loss": 1.0, "text": "x" * 1000}
    run.metrics_path.write_text(json.dumps(long) + "\n", encoding="utf-8")
    assert poll(follower)["metrics"]["training"] == [long]
    later = write_steps(run, range(2, 3))
    assert poll(follower)["metrics"]["training"] == later


def test_a_thinned_history_keeps_the_curve(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "MAX_ROWS", 50)
    records = write_steps(run, range(1, 400))
    with open(run.metrics_path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 400, "loss": 99.0, "grad_norm": None}) + "\n" + '{"step": 401, "loss')
    result = history(run)
    columns = result["training"]
    assert len(columns["step"]) <= 50
    assert (columns["step"][0], columns["step"][-1]) == (1, 400)
    assert max(columns["loss"]) == 99.0
    assert {len(column) for column in columns.values()} == {len(columns["step"])}
    by_step = {record["step"]: record["loss"] for record in records}
    assert all(by_step.get(step, 99.0) == loss for step, loss in zip(columns["step"], columns["loss"], strict=True))
    assert result["config"] == run.config_path.read_text(encoding="utf-8")
    assert "reset" not in poll(Follower(run, result["cursor"]))


def test_the_history_of_a_run_that_is_being_removed_is_not_an_error(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config vanishes after any check that it exists. A file that may not be read is still an error."""
    run.config_path.unlink()
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    assert history(run)["config"] == ""

    def refuse(path: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, "denied", path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match="cannot read"):
        read_text(run.config_path)


def test_a_thinned_history_has_means_and_times_of_all_steps(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "MAX_ROWS", 50)
    records = write_steps(run, range(1, 401))
    columns = history(run)["training"]
    half = 400 // 50  # each mean covers this many steps before and after its step
    inner = [row for row, step in enumerate(columns["step"]) if half < step <= 400 - half]
    assert len(inner) > 20
    for row in inner:
        step = int(columns["step"][row])
        around = [record["loss"] for record in records[step - 1 - half : step + half]]
        # Both sides sum at most 400 float64 numbers.
        assert columns["loss_mean"][row] == pytest.approx(np.mean(around), rel=1e-9)
        assert columns["time"][row] == pytest.approx(sum(record["seconds"] for record in records[:step]), rel=1e-9)


def test_samples_larger_than_one_read_are_sent_complete(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "MAX_BYTES", 1000)
    append_samples(run.samples_path, 0, ["begin"])
    follower = event_stream.Follower(run)
    texts = ["\n".join(f"line {i} of {step}" for i in range(200)) for step in (1, 2)]
    for step, text in enumerate(texts, start=1):
        append_samples(run.samples_path, step, [text])
    events = [event for _ in range(4) for event in follower.poll()]
    assert [value for name, value in events if name == "samples"] == [
        [{"step": i + 1, "texts": [text]} for i, text in enumerate(texts)]
    ]


def test_the_history_of_a_run_without_records_is_empty(run: RunDirectory) -> None:
    result = history(run)
    assert (result["status"], result["environment"], result["evaluations"], result["samples"]) == (
        {"state": None},
        {},
        [],
        [],
    )
    assert result["training"]["loss"] == []


def test_a_snapshot_arrives_unchanged(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", GPT2_LIKE)
    model, _ = load(run.path)
    taken = take_probe(model, [Prompt([1, 2, 3], ["a", "b", "c"]), Prompt([4], ["d"])], ["text"], 1)
    write_probe(run.probe_path(1), taken)
    with serving(run.path) as served:
        status, result = served.client.get("/api/snapshot?model=0&step=1")
        assert status == 200
        assert served.client.get("/api/history?model=0")[1]["snapshots"] == [1]
        status, refused = served.client.get("/api/snapshot?model=0&step=2")
        assert (status, "it has 1" in refused["error"]) == (400, True)
    assert [prompt["ids"] for prompt in result["prompts"]] == [[1, 2, 3], [4]]
    assert {*result} == {*taken.tensors, "step", "prompts", "head_types", "samples"}
    for name, tensor in taken.tensors.items():
        np.testing.assert_array_equal(result[name], tensor.numpy())


def test_reading_a_run_takes_no_lock(run: RunDirectory) -> None:
    run.write_status("running", host=socket.gethostname(), pid=os.getpid())
    stopped = threading.Event()

    def read_repeatedly() -> None:
        while not stopped.is_set():
            history(run)
            find_entry(str(run.path)).describe(0)

    thread = threading.Thread(target=read_repeatedly)
    thread.start()
    try:
        for _ in range(20):
            with run.locked():
                pass
    finally:
        stopped.set()
        thread.join()


# --- over HTTP, while the run is being written ---------------------------------------------------------------------


@pytest.fixture
def served(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerThread]:
    monkeypatch.setattr(routes, "POLL_SECONDS", 0.02)
    with serving(run.path) as served:
        yield served


class Events:
    """A stream of server-sent events, parsed like in a browser."""

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
        """Return the next event. Raises `EOFError` at the end."""
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
        """Read until the server's heartbeat, which it sends if there are no events."""
        while not (line := self._file.readline().decode()).startswith(":"):
            if line.startswith("id: "):
                self.last = line[4:-1]

    def until(self, wanted: str) -> Any:
        """Return the value of the next event with this name."""
        while True:
            name, value = self.next()
            if name == wanted:
                return value

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def test_events_arrive_while_the_run_is_being_written(served: ServerThread, run: RunDirectory) -> None:
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


def test_the_oldest_of_too_many_streams_is_closed_and_closed_streams_are_removed(served: ServerThread) -> None:
    followers = served.server.api.followers
    streams = [Events(served.client) for _ in range(routes.MAX_FOLLOWERS)]
    for stream in streams:
        assert stream.next()[0] == "status"
    newest = Events(served.client)
    assert newest.next()[0] == "status"
    with pytest.raises(EOFError):  # the server closed the oldest stream
        streams[0].until("no such event")
    assert len(followers) == routes.MAX_FOLLOWERS
    for stream in (*streams, newest):
        stream.close()
    end = time.monotonic() + 10
    while followers:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_head_requests_start_no_stream(served: ServerThread) -> None:
    assert served.client.request("HEAD", "/api/events?model=0")[0] == 405
    assert not served.server.api.followers


def test_history_and_events_of_a_single_checkpoint_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", GPT2_LIKE)
    with serving(run.checkpoints / "000001") as served:
        for address in ("history?model=0", "events?model=0", "snapshot?model=0&step=1"):
            status, refused = served.client.get(f"/api/{address}")
            assert (status, "not a run" in refused["error"]) == (400, True)
