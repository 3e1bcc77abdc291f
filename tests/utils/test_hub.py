"""Hub ids against a small server on this machine that speaks the hub's file routes, in processes of their own.

`HF_ENDPOINT` and `HF_HOME` are read when the hub's library is imported.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import glassgpt as g
from glassgpt.config.model import ModelConfig
from glassgpt.interop.hf_models import export_hf
from glassgpt.tokenizers.builtin import CharacterTokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.hub import find_hub_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """One repository, `acme/tiny`, out of a folder."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        assert isinstance(self.server, Server)
        self.server.requests.append(self.path)
        files = {path.name: path for path in self.server.folder.iterdir()}
        path = self.path.partition("?")[0]
        if path == "/api/models/acme/tiny/revision/main":
            siblings = [{"rfilename": name} for name in files]
            return self.send({}, json.dumps({"id": "acme/tiny", "sha": COMMIT, "siblings": siblings}).encode(), body)
        if path.startswith("/api/models/acme/tiny/tree/"):
            entries = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                for name, file in files.items()
            ]
            return self.send({}, json.dumps(entries).encode(), body)
        repository, _, name = path.partition(f"/resolve/{COMMIT}/")
        if repository == "/acme/tiny" and name in files:
            if body:
                self.server.downloaded.append(name)
            content = files[name].read_bytes()
            return self.send(
                {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, content, body
            )
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, headers: dict[str, str], content: bytes, body: bool) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Hub)
        self.folder = folder
        self.downloaded: list[str] = []
        self.requests: list[str] = []


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A model in a folder and on the server, with files beside it that are nothing to glassgpt."""
    config = ModelConfig(vocab_size=3, context_length=8, n_layer=1, n_head=1, n_embd=4)
    export_hf(g.GPT.create(config, 0), CharacterTokenizer("abc"), tmp_path / "tiny")
    (tmp_path / "tiny" / "tf_model.h5").write_bytes(b"for another program")
    (tmp_path / "tiny" / "consolidated.safetensors").write_bytes(b"the same weights again")
    server = Server(tmp_path / "tiny")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def glassgpt(
    home: Path, endpoint: str, *arguments: str, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "glassgpt", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
    )


def test_a_model_of_the_hub_is_downloaded_once(server: Server, tmp_path: Path) -> None:
    """Only what is needed; the second time, and without the server, it comes from the cache."""
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    first = glassgpt(tmp_path / "home", endpoint, "generate", "acme/tiny", "--prompt", "abc", "--max-new-tokens", "20")
    assert first.returncode == 0, first.stderr
    assert "downloading acme/tiny from the Hugging Face Hub" in first.stderr
    assert set(first.stdout.strip()) <= set("abc")
    assert sorted(server.downloaded) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    server.shutdown()
    server.server_close()
    again = glassgpt(tmp_path / "home", endpoint, "generate", "acme/tiny", "--prompt", "abc", "--max-new-tokens", "20")
    assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr


def test_what_the_hub_does_not_have_is_said(server: Server, tmp_path: Path) -> None:
    for endpoint, reason in (
        (f"http://127.0.0.1:{server.server_address[1]}", "no such model"),
        ("http://127.0.0.1:9", "cannot be reached"),
    ):
        result = glassgpt(tmp_path / "home", endpoint, "info", "acme/huge")
        assert result.returncode == 2
        assert "acme/huge" in result.stderr
        assert reason in result.stderr
        assert "Traceback" not in result.stderr
        assert result.stderr.count("\n") <= 3


def test_a_path_is_never_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("runs", "demo").mkdir(parents=True)
    for name in ("gpt2", "gpt2-xl", "openai-community/gpt2", "a.b/c_d-1.0"):
        assert find_hub_id(name) == find_hub_id(f"hf:{name}") == name
    assert find_hub_id("hf:models/tiny") == "models/tiny"
    with pytest.raises(UserError, match="hf:a/b/c"):
        find_hub_id("hf:a/b/c")
    for name in (
        "demo",
        "runs/demo",
        "runs/dmo",
        "rnus/dmo",
        "model/tiny.safetensors",
        "models/tiny",
        "./a/b",
        "/a/b",
        "~/a",
        "a/b/c",
        "a/",
        "",
        "a/b@best",
        "größe/b",
        "../b",
    ):
        assert find_hub_id(name) is None, name


def test_a_typo_is_answered_with_the_path_that_exists(server: Server, tmp_path: Path) -> None:
    """And nothing is asked of the hub."""
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "data" / "books").mkdir(parents=True)
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    for arguments, nearby in ((["info", "rnus/dmo"], "runs/demo"), (["prepare", "dat/books"], "data/books")):
        result = glassgpt(tmp_path / "home", endpoint, *arguments, folder=tmp_path)
        assert result.returncode == 2
        assert f"did you mean {nearby}?" in result.stderr
    assert server.requests == []
