"""Downloads from a local HTTP server that fails on purpose."""

import hashlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from glassgpt.utils import download as module
from glassgpt.utils.errors import UserError

CONTENT = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
Response = Callable[["Handler"], None]
download = partial(module.download, what="the plays", manual="put it there by hand")


class Handler(BaseHTTPRequestHandler):
    """Responds with the next response from the server's list; the last one is repeated."""

    server: "Server"

    def do_GET(self) -> None:
        self.server.requests += 1
        responses = self.server.responses
        (responses.pop(0) if len(responses) > 1 else responses[0])(self)

    def log_message(self, *arguments: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.responses: list[Response] = [send]
        self.requests = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/text"


def send(handler: Handler, content: bytes = CONTENT, length: int | None = None) -> None:
    """Send the content with a Content-Length header of `length`."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content) if length is None else length))
    handler.end_headers()
    with suppress(OSError):
        handler.wfile.write(content)


def refuse(handler: Handler, status: int) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "_PAUSE", 0.01)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def names_without_locks(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_file_is_downloaded_once(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "new" / "text"
    for _ in range(2):
        assert download(server.url, path, SHA256) == path
        assert path.read_bytes() == CONTENT
    assert server.requests == 1
    assert names_without_locks(path.parent) == ["text"]


def test_transient_errors_are_retried(server: Server, tmp_path: Path) -> None:
    cut_off = partial(send, content=CONTENT[:100_000], length=len(CONTENT))
    server.responses = [partial(refuse, status=503), cut_off, partial(refuse, status=429), send]
    download(server.url, tmp_path / "text", SHA256)
    assert (tmp_path / "text").read_bytes() == CONTENT
    assert server.requests == 4


def test_a_damaged_file_is_replaced(server: Server, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(CONTENT[:-1])
    download(server.url, tmp_path / "text", SHA256)
    assert (tmp_path / "text").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("response", "expected_text", "requests"),
    [
        (partial(refuse, status=404), "404", 1),
        (partial(refuse, status=500), "500", 4),
        (partial(send, content=b"<html>Log in</html>"), "sha256", 1),
        (partial(send, content=CONTENT * 5), "sha256", 1),
    ],
)
def test_a_failed_download_leaves_no_file(
    server: Server, tmp_path: Path, response: Response, expected_text: str, requests: int
) -> None:
    server.responses = [response]
    with pytest.raises(UserError, match=expected_text) as caught:
        download(server.url, tmp_path / "text", SHA256)
    assert all(part in str(caught.value) for part in ("the plays", server.url))
    assert str(caught.value).endswith("put it there by hand")
    assert server.requests == requests
    assert names_without_locks(tmp_path) == []


def test_reading_stops_at_the_largest_accepted_size(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LARGEST", 1000)
    with pytest.raises(UserError, match=hashlib.sha256(CONTENT[:1000]).hexdigest()):
        download(server.url, tmp_path / "text", SHA256)


def test_without_network_the_error_lists_the_manual_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE", 0.01)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        with pytest.raises(UserError, match="refused") as caught:
            download(f"http://127.0.0.1:{unused.getsockname()[1]}/text", tmp_path / "text", SHA256)
    assert str(caught.value).endswith("put it there by hand")


def test_a_silent_server_times_out(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TIMEOUT", 2.0)  # long enough for the second answer on a busy machine
    silence = threading.Event()

    def stall(handler: Handler) -> None:
        silence.wait(60)

    server.responses = [stall, send]
    download(server.url, tmp_path / "text", SHA256)
    silence.set()
    assert server.requests == 2


def test_a_proxy_from_the_environment_is_used(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    download("http://texts.invalid/text", tmp_path / "text", SHA256)
    assert (tmp_path / "text").read_bytes() == CONTENT


def test_concurrent_downloads_of_a_file_fetch_it_once(server: Server, tmp_path: Path) -> None:
    threads = [threading.Thread(target=download, args=(server.url, tmp_path / "text", SHA256)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "text").read_bytes() == CONTENT
    assert server.requests == 1
