"""Downloads against a real HTTP server on this machine that misbehaves on purpose."""

import hashlib
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from glassgpt.data import download as module
from glassgpt.errors import UserError

CONTENT = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
Answer = Callable[["Handler"], None]

download = partial(module.download, pause=0.01, timeout=5.0)


class Handler(BaseHTTPRequestHandler):
    """Takes its next answer from the server's list, and records the Range that was asked for."""

    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.ranges.append(self.headers["Range"])
        answers = self.server.answers
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)

    def log_message(self, *arguments: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[Answer] = [send]
        self.ranges: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/text"


def send(handler: Handler, content: bytes = CONTENT, upto: int | None = None, heed_range: bool = True) -> None:
    """The file, or its first bytes under a header that promises all of them."""
    start = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-")) if heed_range and handler.headers["Range"] else 0
    handler.send_response(206 if start else 200)
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    handler.send_header("Content-Length", str(len(content) - start))
    handler.end_headers()
    handler.wfile.write(content[start:upto])
    handler.wfile.flush()


def refuse(handler: Handler, status: int) -> None:
    handler.send_error(status)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_file_is_downloaded_once(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "new" / "text"
    for _ in range(2):
        assert download(server.url, path, SHA256) == path
        assert path.read_bytes() == CONTENT
    assert server.ranges == [None]
    assert visible(path.parent) == ["text"]


def test_a_broken_transfer_goes_on_where_it_ended(server: Server, tmp_path: Path) -> None:
    server.answers = [partial(send, upto=100_000), partial(refuse, status=503), partial(send, upto=200_000), send]
    download(server.url, tmp_path / "text", SHA256)
    assert (tmp_path / "text").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-", "bytes=100000-", "bytes=200000-"]


def test_a_later_call_goes_on_too(server: Server, tmp_path: Path) -> None:
    server.answers = [partial(send, upto=100_000), send]
    with pytest.raises(UserError, match="broke after 100000 of 256000 bytes"):
        download(server.url, tmp_path / "text", SHA256, attempts=1)
    assert visible(tmp_path) == []
    download(server.url, tmp_path / "text", SHA256)
    assert server.ranges == [None, "bytes=100000-"]


def test_a_server_may_ignore_the_range(server: Server, tmp_path: Path) -> None:
    server.answers = [partial(send, upto=100_000), partial(send, heed_range=False)]
    download(server.url, tmp_path / "text", SHA256)
    assert (tmp_path / "text").read_bytes() == CONTENT


@pytest.mark.parametrize("old", [b"the start of another version", CONTENT + b"and more"])
def test_a_partial_file_of_another_version_is_given_up(server: Server, tmp_path: Path, old: bytes) -> None:
    def answer(handler: Handler) -> None:
        begin = int((handler.headers["Range"] or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        refuse(handler, 416) if begin >= len(CONTENT) else send(handler)

    server.answers = [answer]
    (tmp_path / ".partial-text").write_bytes(old)
    download(server.url, tmp_path / "text", SHA256)
    assert (tmp_path / "text").read_bytes() == CONTENT
    assert server.ranges == [f"bytes={len(old)}-", None]


def test_a_damaged_file_is_replaced(server: Server, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(CONTENT[:-1])
    download(server.url, tmp_path / "text", SHA256)
    assert (tmp_path / "text").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("answer", "reason", "requests"),
    [
        (partial(refuse, status=404), "the server answers 404", 1),
        (partial(refuse, status=500), "the server answers 500", 4),
        (partial(send, content=b"<html>Log in</html>"), "what came is another file", 1),
    ],
)
def test_what_cannot_be_had_is_explained(server: Server, tmp_path: Path, answer: Answer, reason: str, requests: int) -> None:
    server.answers = [answer]
    with pytest.raises(UserError, match=f"cannot download the plays from {server.url}: {reason}") as caught:
        download(server.url, tmp_path / "text", SHA256, what="the plays", manual="put it there by hand")
    assert str(caught.value).endswith("put it there by hand")
    assert len(server.ranges) == requests
    assert visible(tmp_path) == []


def test_without_network_the_manual_steps_are_told(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        with pytest.raises(UserError, match="Connection refused") as caught:
            download(f"http://127.0.0.1:{unused.getsockname()[1]}/text", tmp_path / "text", SHA256)
    assert f"put it at {tmp_path / 'text'}" in str(caught.value)


def test_a_silent_server_times_out(server: Server, tmp_path: Path) -> None:
    silence = threading.Event()

    def stall(handler: Handler) -> None:
        silence.wait(10)

    server.answers = [stall]
    with pytest.raises(UserError, match="timed out"):
        module.download(server.url, tmp_path / "text", SHA256, attempts=2, pause=0.01, timeout=0.1)
    silence.set()


def test_a_proxy_from_the_environment_is_used(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    download("http://texts.invalid/text", tmp_path / "text", SHA256)
    assert (tmp_path / "text").read_bytes() == CONTENT


def test_two_downloads_at_once_fetch_once(server: Server, tmp_path: Path) -> None:
    threads = [threading.Thread(target=download, args=(server.url, tmp_path / "text", SHA256)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "text").read_bytes() == CONTENT
    assert len(server.ranges) == 1
