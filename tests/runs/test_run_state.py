"""`RunDirectory.state` is running, finished, or stopped if the process has died."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from glassgpt.runs.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def test_the_state_follows_the_status_file_and_the_process(run: RunDirectory) -> None:
    assert run.state is None
    run.write_status("running", host=socket.gethostname(), pid=os.getpid())
    assert run.state == "running"
    os.utime(run.status_path, (1, 1))  # older than this process, so from another process with the same id
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


def test_a_zombie_process_is_not_running(run: RunDirectory) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        run.write_status("running", host=socket.gethostname(), pid=child.pid)
        assert run.state == "running"
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and still a zombie
        assert run.state == "stopped"
