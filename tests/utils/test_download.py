"""Downloads against a real HTTP server on this machine that misbehaves on purpose."""

import email.utils
import hashlib
import socket
import threading
import time
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
    start = (
        int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if heed_range and handler.headers["Range"]
        else 0
    )
    handler.send_response(206 if start else 200)
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    handler.send_header("Content-Length", str(len(content) - start))
    handler.end_headers()
    handler.wfile.write(content[start:upto])
    handler.wfile.flush()


def refuse(handler: Handler, status: int, retry_after: str | None = None) -> None:
    handler.send_response(status)
    if retry_after is not None:
        handler.send_header("Retry-After", retry_after)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def claim(handler: Handler, difference: int) -> None:
    """All of the file that was asked for, under a header that says so many bytes more or less."""
    start = int((handler.headers["Range"] or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
    handler.send_response(206 if start else 200)
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
    handler.send_header("Content-Length", str(len(CONTENT) - start + difference))
    handler.end_headers()
    handler.wfile.write(CONTENT[start:])


def pour(handler: Handler) -> None:
    """Two hundred times the file, without a word on the number of bytes."""
    handler.send_response(200)
    handler.end_headers()
    with suppress(OSError):
        for _ in range(200):
            handler.wfile.write(CONTENT)


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
def test_what_cannot_be_had_is_explained(
    server: Server, tmp_path: Path, answer: Answer, reason: str, requests: int
) -> None:
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


def test_a_stalled_transfer_goes_on_where_it_stalled(server: Server, tmp_path: Path) -> None:
    silence = threading.Event()

    def stall(handler: Handler) -> None:
        send(handler, upto=100_000)
        silence.wait(10)

    server.answers = [stall, send]
    download(server.url, tmp_path / "text", SHA256, timeout=0.2)
    silence.set()
    assert (tmp_path / "text").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-"]


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_a_length_that_promises_too_much_ends_with_the_file(server: Server, tmp_path: Path, size: int | None) -> None:
    server.answers = [partial(claim, difference=1000)]
    download(server.url, tmp_path / "text", SHA256, size=size)
    assert (tmp_path / "text").read_bytes() == CONTENT
    assert server.ranges == [None]


def test_a_length_that_is_too_small_is_found_by_the_known_size(server: Server, tmp_path: Path) -> None:
    server.answers = [partial(claim, difference=-1000), partial(claim, difference=-900), send]
    download(server.url, tmp_path / "text", SHA256, size=len(CONTENT))
    assert (tmp_path / "text").read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={len(CONTENT) - 1000}-", f"bytes={len(CONTENT) - 900}-"]


def test_a_server_that_sends_far_too_much_does_not_fill_the_disk(server: Server, tmp_path: Path) -> None:
    server.answers = [pour]
    with pytest.raises(UserError, match="sends more than the 256000 bytes that were missing"):
        download(server.url, tmp_path / "text", SHA256, size=len(CONTENT), attempts=2)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 4_000_000
    server.answers = [send]
    download(server.url, tmp_path / "text", SHA256, size=len(CONTENT))


def test_bytes_damaged_on_the_way_are_fetched_again(server: Server, tmp_path: Path) -> None:
    server.answers = [partial(send, content=b"!" + CONTENT[1:]), send]
    download(server.url, tmp_path / "text", SHA256, size=len(CONTENT))
    assert (tmp_path / "text").read_bytes() == CONTENT
    assert server.ranges == [None, None]


def test_a_file_that_grows_is_never_given_up(server: Server, tmp_path: Path) -> None:
    server.answers = [partial(send, upto=upto) for upto in range(20_000, 250_000, 20_000)] + [send]
    download(server.url, tmp_path / "text", SHA256, attempts=2)
    assert (tmp_path / "text").read_bytes() == CONTENT


@pytest.mark.parametrize(("attempts", "factor"), [(1, 1), (2, 2), (3, 4)])
def test_pauses_double_with_some_chance_in_them(server: Server, tmp_path: Path, attempts: int, factor: int) -> None:
    pauses = waited(server, tmp_path, [partial(refuse, status=503)] * attempts + [send])
    assert factor < pauses[-1] <= 1.5 * factor
    assert len(set(pauses)) == attempts


@pytest.mark.parametrize(
    ("status", "asked", "least"), [(429, "7", 7.0), (503, "9", 9.0), (429, "soon", 1.0), (429, "-3", 1.0)]
)
def test_a_server_is_left_alone_as_long_as_it_asks_for(
    server: Server, tmp_path: Path, status: int, asked: str, least: float
) -> None:
    (pause,) = waited(server, tmp_path, [partial(refuse, status=status, retry_after=asked), send])
    assert least <= pause <= max(least, 1.5)


def test_it_may_ask_by_a_date(server: Server, tmp_path: Path) -> None:
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    (pause,) = waited(server, tmp_path, [partial(refuse, status=429, retry_after=date), send])
    assert 90 < pause <= 100


def test_who_is_told_to_come_back_tomorrow_is_told_so(server: Server, tmp_path: Path) -> None:
    server.answers = [partial(refuse, status=429, retry_after="86400")]
    with pytest.raises(module.DownloadError, match=r"answers 429 .* and asks to come back in 86400 seconds") as caught:
        download(server.url, tmp_path / "text", SHA256)
    assert caught.value.status == 429
    assert len(server.ranges) == 1


class Watch(threading.Event):
    """A stop that is never set: each pause is over at once, and seen."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.pauses += [timeout] if timeout else []
        return False


def waited(server: Server, folder: Path, answers: list[Answer]) -> list[float]:
    """The pauses of a download with a first one of a second."""
    server.answers, stop = answers, Watch()
    module.download(server.url, folder / "text", SHA256, timeout=5.0, stop=stop)
    return stop.pauses


def test_a_download_ends_when_it_is_told_to(server: Server, tmp_path: Path) -> None:
    stop = threading.Event()

    def answer(handler: Handler) -> None:
        send(handler, upto=100_000)
        while not any(path.stat().st_size for path in tmp_path.glob(".partial-*")):
            time.sleep(0.001)
        stop.set()
        with suppress(OSError):
            handler.wfile.write(CONTENT[100_000:])

    server.answers = [answer, send]
    with pytest.raises(module.DownloadStoppedError):
        download(server.url, tmp_path / "text", SHA256, stop=stop)
    assert visible(tmp_path) == []
    download(server.url, tmp_path / "text", SHA256)
    assert server.ranges[1] is not None  # what came was kept


def test_a_token_stays_with_its_host(server: Server, tmp_path: Path) -> None:
    """Sent again where the same host redirects to, and not to another."""
    tokens = []

    def answer(handler: Handler) -> None:
        tokens.append((handler.path, handler.headers["Authorization"]))
        if handler.path.startswith("/elsewhere"):
            return send(handler)
        handler.send_response(302)
        host = server.url if handler.path == "/text" else f"http://localhost:{server.server_address[1]}/text"
        handler.send_header("Location", host.replace("/text", "/here" if handler.path == "/text" else "/elsewhere"))
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    server.answers = [answer]
    download(server.url, tmp_path / "text", SHA256, headers={"authorization": "Bearer x"})
    assert tokens == [("/text", "Bearer x"), ("/here", "Bearer x"), ("/elsewhere", None)]


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
