"""The logic of the Slurm script, with stand-ins for Slurm's commands: what it starts, its exit status, requeues."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kill_harness import records_of, tiny_config, write_text
from torchrun_harness import environment

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "guides" / "train.sbatch"

# Each command records its arguments. `srun` runs its command once per node, on this machine; `scancel` signals the
# processes of `srun`.
COMMANDS = {
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
          "$@" &
          echo $! >> "$CALLS/tasks"
        done
        code=0
        for task in $(jobs -p); do wait "$task" || code=$?; done
        exit $code""",
    "scancel": 'kill -TERM $(cat "$CALLS/tasks")',
    "scontrol": '[[ $1 != show ]] || echo "127.0.0.1"',
    "squeue": 'echo "${JOB_STATE:-RUNNING}"',
}

# A stand-in for python and torchrun: it writes the status in $STATE, at once or after SIGTERM, and exits.
STAND_IN = """#!/bin/bash
[[ $1 == - ]] && exec "$REAL_PYTHON" "$@"
{ printf '%q ' "$@"; echo; } >> "$CALLS/torchrun"
launch=$(sed 's/.*--rdzv-id=\\([^ ]*\\).*/\\1/' <<< "$*")
end() { [[ -z $STATE ]] || sed "s/LAUNCH/$launch/" <<< "$STATE" > "$RUN/status.json"; exit "$CODE"; }
trap 'sleep 0.3; end' TERM
echo up >> "$CALLS/up"
[[ -z ${UNTIL_SIGNAL:-} ]] || for ((i = 0; i < 600; i++)); do sleep 0.1; done
end
"""


class Slurm:
    """A job of one node in its own folder, with stand-ins for Slurm's commands."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls, self.run = folder, folder / "calls", folder / "a run"
        self.calls.mkdir()
        self.run.mkdir()
        self.python: Path | str = sys.executable
        commands = folder / "bin"
        commands.mkdir()
        for name, body in COMMANDS.items():
            (commands / name).write_text(f'#!/bin/bash\necho "$*" >> "$CALLS/{name}"\n{body}\n')
            (commands / name).chmod(0o755)
        self.variables = {
            **environment(folder),
            "PATH": f"{commands}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "RUN": str(self.run),
            "REAL_PYTHON": sys.executable,
            "PROCESSES": "1",
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_NODELIST": "node[1-1]",
        }

    def stand_in(self, state: str, code: int = 0, **more: str) -> None:
        """Replace python and torchrun by a script that writes this status.json and exits with this code.

        LAUNCH in the status is replaced by the launch id of the job.
        """
        self.python = self.folder / "bin" / "python"
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)
        self.variables |= {"STATE": state, "CODE": str(code), **more}

    def start(self, *arguments: str, restarts: int = 0) -> "subprocess.Popen[str]":
        """Start or restart the job."""
        variables = {**self.variables, "PYTHON": str(self.python)} | (
            {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        )
        shutil.rmtree(self.calls)
        self.calls.mkdir()
        with open(self.folder / "job.log", "a") as log:
            return subprocess.Popen(
                ["bash", str(SCRIPT), str(self.run), *arguments], env=variables, stdout=log, stderr=log, text=True
            )

    def called(self, name: str) -> list[str]:
        """Return the arguments of each call of a command since the last start."""
        path = self.calls / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def requeued(self) -> bool:
        """Return whether the job has requested to be requeued."""
        calls = [call for call in self.called("scontrol") if not call.startswith("show")]
        assert calls in ([], ["requeue 17"])
        return bool(calls)

    @property
    def log(self) -> str:
        """Return the output of the job."""
        return (self.folder / "job.log").read_text(errors="replace")


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    """Return a job of one node."""
    return Slurm(tmp_path)


def wait_until(condition: Callable[[], bool], job: "subprocess.Popen[str]", limit: float = 90.0) -> None:
    """Wait until the condition is true. Fails if the job ends before or after `limit` seconds."""
    give_up = time.monotonic() + limit
    while not condition():
        assert job.poll() is None, "the job has ended"
        assert time.monotonic() < give_up
        time.sleep(0.01)


@pytest.mark.slow
def test_a_preempted_job_saves_is_requeued_and_finishes(slurm: Slurm) -> None:
    """A real torchrun runs two processes; only Slurm's commands are stand-ins."""
    config = tiny_config(
        write_text(slurm.folder / "text.txt"), steps=100_000, checkpoint_every=0, eval_every=0, eval_tokens=64
    )
    recipe = slurm.folder / "recipe.toml"
    recipe.write_text(config.to_toml())
    slurm.variables |= {"PROCESSES": "2", "SLURM_JOB_ID": str(os.getpid())}  # the port depends on the job id
    shutil.rmtree(slurm.run)
    job = slurm.start(str(recipe), "--seed", "5")
    try:
        wait_until(lambda: (slurm.run / "metrics.jsonl").exists() and len(records_of(slurm.run)) > 3, job)
        job.send_signal(signal.SIGTERM)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=60) == 0, slurm.log
    finally:
        job.kill()
    status = json.loads((slurm.run / "status.json").read_text())
    assert (status["state"], status["processes"], status["launch"]) == ("preempted", 2, f"{os.getpid()}.0")
    assert (slurm.run / "checkpoints" / f"{status['step']:06d}").is_dir()
    assert slurm.called("scontrol")[-1] == f"requeue {os.getpid()}"

    config_path = slurm.run / "config.toml"
    config_path.write_text(config_path.read_text().replace("steps = 100000", f"steps = {status['step'] + 3}"))
    assert slurm.start(str(recipe), "--seed", "5", restarts=1).wait(timeout=90) == 0, slurm.log
    final = json.loads((slurm.run / "status.json").read_text())
    assert (final["state"], final["step"], final["launch"]) == ("finished", status["step"] + 3, f"{os.getpid()}.1")
    assert [r["step"] for r in records_of(slurm.run) if "loss" in r] == list(range(1, final["step"] + 1))
    assert len(slurm.called("scontrol")) == 1


def status(state: str, launch: str = "LAUNCH") -> str:
    """Return the content of a status.json."""
    return json.dumps({"state": state, "step": 5, "launch": launch})


def test_the_script_starts_torchrun_with_the_job_and_the_arguments(slurm: Slurm) -> None:
    slurm.stand_in(status("finished"))
    assert slurm.start("gpt2", "--data.source", "my books/*.txt").wait() == 0
    words = shlex.split(slurm.called("torchrun")[0])
    assert words[-8:] == ["-m", "glassgpt", "train", "gpt2", "--data.source", "my books/*.txt", "--out", str(slurm.run)]
    expected = "--nnodes=1 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:20017 --rdzv-id=17.0"
    assert set(words) >= {*expected.split(), "--max-restarts=3", "--shutdown-timeout=150"}
    (slurm.run / "config.toml").touch()
    assert slurm.start("gpt2", restarts=2).wait() == 0
    words = shlex.split(slurm.called("torchrun")[0])
    assert words[-5:] == ["-m", "glassgpt", "train", "--resume", str(slurm.run)]
    assert "--rdzv-id=17.2" in words


@pytest.mark.parametrize(
    ("state", "code", "signalled", "exit_status", "requeued"),
    [
        (status("finished"), 0, False, 0, False),
        (status("finished"), 1, True, 0, False),  # it was signalled after the last step
        (status("preempted"), 1, True, 0, True),
        (status("preempted"), 0, False, 0, True),  # a rank was signalled, not torchrun
        (status("preempted"), 1, False, 0, True),  # Slurm itself signalled the steps
        (status("running"), 1, True, 0, True),  # it was killed before it had saved
        ("", 1, True, 0, True),  # it was signalled during data preparation
        (status("running"), 9, False, 9, False),
        (status("failed"), 1, False, 1, False),
        (status("failed"), 0, False, 1, False),
        (status("failed"), 1, True, 1, False),
        (status("interrupted"), 1, False, 1, False),
        ("", 2, False, 2, False),
        ("", 0, False, 0, False),  # the run was already finished
        ("{", 1, False, 1, False),
        (status("preempted", "17.-1"), 1, False, 1, False),  # the status of an earlier start
        (status("failed", "16.0"), 1, True, 0, True),
    ],
)
def test_exit_status_and_requeue(
    slurm: Slurm, state: str, code: int, signalled: bool, exit_status: int, requeued: bool
) -> None:
    slurm.stand_in(state, code, UNTIL_SIGNAL="yes" if signalled else "")
    job = slurm.start("gpt2")
    if signalled:
        wait_until(lambda: bool(slurm.called("up")), job)
        job.send_signal(signal.SIGTERM)
    assert (job.wait(timeout=30), slurm.requeued) == (exit_status, requeued), slurm.log
    assert slurm.called("scancel") == (["--signal=TERM 17"] if signalled else [])


def test_a_status_of_an_earlier_start_of_the_same_job_does_not_count(slurm: Slurm) -> None:
    (slurm.run / "status.json").write_text(status("preempted", "17.0"))
    slurm.stand_in("", 3)
    assert slurm.start(restarts=1).wait() == 3
    assert not slurm.requeued


def test_the_number_of_requeues_is_limited(slurm: Slurm) -> None:
    slurm.stand_in(status("preempted"), 1)
    slurm.variables["MAX_REQUEUES"] = "2"
    assert slurm.start(restarts=1).wait() == 0
    assert slurm.requeued
    assert slurm.start(restarts=2).wait() == 1
    assert not slurm.requeued
    assert "requeued 2 times already" in slurm.log


def test_a_job_ended_by_scancel_is_not_requeued(slurm: Slurm) -> None:
    slurm.stand_in(status("preempted"), 1)
    slurm.variables["JOB_STATE"] = "COMPLETING"
    assert slurm.start().wait() == 1
    assert not slurm.requeued


def test_without_arguments_it_prints_its_usage(slurm: Slurm) -> None:
    result = subprocess.run(["bash", str(SCRIPT)], env=slurm.variables, capture_output=True, text=True)
    assert (result.returncode, slurm.called("srun")) == (2, [])
    assert "usage: sbatch train.sbatch RUN" in result.stderr
