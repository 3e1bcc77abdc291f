"""`glassgpt play`: invalid arguments, host and port, the token, and interruption of the process."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from glassgpt.cli.main import main
from glassgpt.playground import server
from glassgpt.playground.routes import page_files
from glassgpt.playground.server import bind
from glassgpt.utils.errors import UserError
from play_harness import GPT2_LIKE, Client, post_lines, write_run


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command line that must fail and return its error message."""
    assert main(["play", "--no-browser", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("glassgpt: error: ")
    assert "Traceback" not in captured.err
    return captured.err


def test_invalid_arguments_are_reported_before_the_server_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "runs/" in fails(capsys)
    assert "runs/x does not exist" in fails(capsys, "runs/x")
    run = str(write_run(tmp_path / "runs" / "x", GPT2_LIKE).path)
    assert "1 and best" in fails(capsys, run + "@7")
    assert "--port" in fails(capsys, run, "--port", "0")
    assert "no.such.host.invalid" in fails(capsys, run, "--host", "no.such.host.invalid")
    assert "--host" in fails(capsys, run, "--host", "")
    # Reserved for documentation, so never an address of this machine.
    assert "192.0.2.1" in fails(capsys, run, "--host", "192.0.2.1")
    assert "abacus" in fails(capsys, run, "--device", "abacus")
    assert "'runs/x@'" in fails(capsys, "runs/x@")
    assert "''" in fails(capsys, "")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port {port}" in fails(capsys, run, "--port", str(port))


def test_if_the_default_port_is_in_use_the_next_free_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setattr(server, "PORT", other.getsockname()[1])
        listener, policy = bind(None, None)
        number = listener.getsockname()[1]
        assert server.PORT < number < server.PORT + server.PORTS_TRIED
        assert policy.url == f"http://127.0.0.1:{number}/"
        listener.close()
        monkeypatch.setattr(server, "PORTS_TRIED", 1)
        with pytest.raises(UserError, match="--port"):
            bind(None, None)


@pytest.mark.parametrize("host", ["", "y" * 500, "a\nb", "\ud800", "256.1.1.1"])
def test_a_name_that_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(UserError, match="--host"):
        bind(host, 0)


@pytest.mark.parametrize("host", [None, "127.0.0.1"])
def test_each_server_has_its_own_token(host: str | None) -> None:
    policies = []
    for _ in range(2):
        listener, policy = bind(host, 0)
        assert len(policy.token) >= 32
        listener.close()
        policies.append(policy)
    assert policies[0].token != policies[1].token
    assert policies[0].cookie != policies[1].cookie


def test_the_token_is_not_in_the_command_line_of_the_browser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The browser gets the path of a file that only this user can read, and that is deleted when the server stops."""
    run = write_run(tmp_path / "run", GPT2_LIKE, steps=())
    opened: list[tuple[str, int, str]] = []
    serve = server.PlayServer.run

    def run_server(self: server.PlayServer, sockets: list[socket.socket]) -> None:
        while not opened:
            time.sleep(0.01)
        self.should_exit = True  # the server stops right after it has started
        serve(self, sockets)

    def open_browser(url: str) -> None:
        path = Path(urlsplit(url).path)
        opened.append((url, path.stat().st_mode & 0o777, path.read_text(encoding="utf-8")))

    monkeypatch.setenv("BROWSER", "true")
    monkeypatch.setattr("webbrowser.open", open_browser)
    monkeypatch.setattr(server.PlayServer, "run", run_server)
    assert main(["play", str(run.path), "--device", "cpu"]) == 0
    login_url = re.search(r"http://127\.0\.0\.1:\d+/#token=([\w-]{32,})", capsys.readouterr().out)
    assert login_url
    [(url, mode, page)] = opened
    assert login_url[1] not in url
    assert url.startswith("file://")
    assert (mode, login_url[0] in page) == (0o600, True)
    assert not Path(urlsplit(url).path).exists()


def test_all_files_that_the_page_refers_to_exist() -> None:
    files = page_files()
    for name, path in files.items():
        text = path.read_text(encoding="utf-8")
        for wanted in re.findall(r"""["'](/static/[^"'?#]+)["']""", text):
            assert wanted.removeprefix("/static/") in files, f"{name} refers to {wanted}"


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_process_serves_until_it_is_interrupted(tmp_path: Path, stop: signal.Signals) -> None:
    write_run(tmp_path / "runs" / "x", GPT2_LIKE)
    write_run(tmp_path / "runs" / "begun", GPT2_LIKE, steps=())
    command = [sys.executable, "-m", "glassgpt", "play", "--no-browser", "--device", "cpu"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "BROWSER": "false"},
    )
    try:
        assert process.stdout is not None
        result = re.search(r"http://127\.0\.0\.1:(\d+)/#token=([\w-]+)", process.stdout.readline())
        assert result
        client = Client(int(result[1]), result[2])
        entries = client.get("/api/catalog")[1]["entries"]
        assert sorted(entry["name"] for entry in entries) == ["runs/begun", "runs/x"]
        number = next(entry["id"] for entry in entries if entry["name"] == "runs/x")
        assert client.answer("next", model=number, ids=[1])["logits"].shape == (256,)
        text = socket.create_connection(("127.0.0.1", client.port))
        body = {"model": number, "ids": [1], "max_new_tokens": 1024, "n": 8}
        text.sendall(post_lines("write", body, result[2]))
        assert text.recv(20).startswith(b"HTTP/1.1 200")
        process.send_signal(stop)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == (130 if stop == signal.SIGINT else -signal.SIGTERM)
    assert out == ""
    assert err == ("glassgpt: interrupted\n" if stop == signal.SIGINT else "")
    text.close()
