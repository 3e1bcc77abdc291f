"""Access to the server, its limits, and clients that disconnect."""

import gzip
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from glassgpt.playground import model_pool, server
from glassgpt.playground.routes import HANDLERS, page_files
from glassgpt.playground.security import MAX_BODY, AccessPolicy
from play_harness import GPT2_LIKE, IDS, JSON, TOKEN, Client, ServerThread, post_lines, serving, write_run

GET_ADDRESSES = ["catalog", "history?model=0", "snapshot?model=0&step=1", "events?model=0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("guarded") / "run", GPT2_LIKE).path


@pytest.fixture(scope="module")
def served(run: Path) -> Iterator[ServerThread]:
    with serving(run) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: ServerThread) -> Client:
    return served.client


def until(condition: Any, seconds: float = 20.0) -> None:
    """Wait until the condition is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# --- the token --------------------------------------------------------------------------------------------------------


def test_every_endpoint_refuses_requests_without_the_token(client: Client, capfd: pytest.CaptureFixture[str]) -> None:
    stranger = Client(client.port, token=None)
    names = [*HANDLERS, "write", "nothing"]
    requests = [("GET", address) for address in GET_ADDRESSES] + [("POST", name) for name in names]
    for method, address in requests:
        for headers in (
            {},
            {"authorization": f"Bearer {TOKEN}x"},
            {"authorization": f"Basic {TOKEN}"},
            {"cookie": f"glassgpt-{client.port}={TOKEN[:-1]}"},
            {"cookie": f"other={TOKEN}"},
        ):
            status, _, body = stranger.request(method, f"/api/{address}", IDS, {**JSON, **headers})
            assert (status, list(json.loads(body))) == (401, ["error"]), address
        assert stranger.request(method, f"/api/{address.partition('?')[0]}?token={TOKEN}", IDS, JSON)[0] == 401
    assert stranger.request("GET", "/")[0] == 200  # the page asks for the token; its files hold no secrets
    assert stranger.request("GET", "/static/main.js")[0] == 200
    assert TOKEN.encode() not in stranger.request("GET", "/")[2]
    assert TOKEN not in "".join(capfd.readouterr())  # no request is logged


def test_a_login_exchanges_the_token_for_a_cookie(client: Client) -> None:
    stranger = Client(client.port, token=None)

    def login(**body: Any) -> tuple[int, Any]:
        return stranger.request("POST", "/api/login", json.dumps(body).encode(), JSON)[:2]

    for wrong in ("", "x", TOKEN[:-1], TOKEN + " ", TOKEN.upper(), "é", "\udcff"):
        status, headers = login(token=wrong)
        assert status == 401
        assert "set-cookie" not in headers
    assert login(token=3)[0] == login()[0] == 400
    status, headers = login(token=TOKEN)
    cookie, *attributes = headers["set-cookie"].split("; ")
    assert status == 204
    assert {"httponly", "samesite=strict", "path=/"} <= {attribute.lower() for attribute in attributes}
    assert cookie.startswith(f"glassgpt-{client.port}=")  # cookies are shared by all ports of a host
    assert stranger.request("GET", "/api/catalog", headers={"cookie": f"other=1; {cookie}"})[0] == 200
    assert stranger.request("POST", "/api/next", IDS, {**JSON, "cookie": cookie})[0] == 200


def test_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr("secrets.compare_digest", lambda a, b: compared.append((a, b)))
    AccessPolicy("secret", "cookie", "http://localhost/").is_token("secre\udcff")
    assert compared == [(b"secre?", b"secret")]


# --- hosts and other sites --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:7860", "localhost:65535"])
def test_loopback_names_are_accepted(client: Client, host: str) -> None:
    assert client.request("GET", "/", headers={"host": host})[0] == 200


FOREIGN_HOSTS = """evil.example localhost.evil.example 127.0.0.1.evil.example:80 localhost:x 10.0.0.1 a@localhost
localhost/ [::1 0""".split()


@pytest.mark.parametrize("host", ["", *FOREIGN_HOSTS])
def test_dns_rebinding_is_refused(client: Client, host: str) -> None:
    assert client.request("GET", "/", headers={"host": host})[0] == 400
    assert client.request("POST", "/api/attention", IDS, {**JSON, "host": host})[0] == 400


def test_any_host_name_is_accepted_with_host(run: Path) -> None:
    """With --host, the server cannot know all of its names, so it accepts any Host; only the token protects it."""
    listener, policy = server.bind("127.0.0.1", 0)
    listener.close()
    assert policy.hosts == ("*",)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://localhost:7", "host": "localhost:7"}, 200),
        ({"origin": "http://localhost:8", "host": "localhost:7"}, 403),
        ({"origin": "http://localhost"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({"content-type": "application/json; charset=utf-16"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-encoding": "gzip"}, 415),
    ],
)
def test_cross_site_requests_are_refused(client: Client, headers: dict[str, str], status: int) -> None:
    assert client.request("POST", "/api/next", IDS, {**JSON, **headers})[0] == status
    if status == 403:
        assert client.request("GET", "/api/catalog", headers=headers)[0] == 403
        assert client.request("POST", "/api/login", b"{}", {**JSON, **headers})[0] == 403


@pytest.mark.parametrize(
    "path", ["/", "/static/views/text.js", "/api/catalog", "/nothing", "/api/nothing", "/static/nothing"]
)
def test_every_response_has_the_security_headers(client: Client, path: str) -> None:
    for host in ("localhost", "evil.example"):
        _, headers, _ = client.request("GET", path, headers={"host": host})
        policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
        assert {policy[name] for name in ("default-src", "base-uri", "form-action", "frame-ancestors")} == {"'none'"}
        assert policy["script-src"] == policy["connect-src"] == "'self'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-opener-policy"] == headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cache-control"] in ("no-store", "no-cache")
        assert "server" not in headers


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_are_revalidated_and_compressed(client: Client) -> None:
    files = page_files()
    status, headers, body = client.request("GET", "/")
    assert (status, body, headers["content-type"]) == (
        200,
        files["index.html"].read_bytes(),
        "text/html; charset=utf-8",
    )
    assert client.request("GET", "/", headers={"if-none-match": headers["etag"]})[::2] == (304, b"")
    assert client.request("HEAD", "/static/views/text.js")[::2] == (200, b"")
    assert client.request("GET", "/static/views/text.js?v=1")[2] == files["views/text.js"].read_bytes()
    for accepted in ("gzip, br", "deflate, gzip;q=0.5"):
        status, headers, body = client.request("GET", "/static/main.js", headers={"accept-encoding": accepted})
        assert (headers["content-encoding"], gzip.decompress(body)) == ("gzip", files["main.js"].read_bytes())
    for refused in ("gzip;q=0", "identity", "gzip; q=0.000, br"):
        status, headers, body = client.request("GET", "/static/main.js", headers={"accept-encoding": refused})
        assert ("content-encoding" in headers, body) == (False, files["main.js"].read_bytes())


def test_plotly_is_served_from_its_package(client: Client) -> None:
    from plotly.offline import get_plotlyjs

    status, headers, body = client.request("GET", "/static/plotly.js", headers={"accept-encoding": "gzip"})
    assert status == 200
    assert gzip.decompress(body).decode() == get_plotlyjs()
    assert client.request("GET", "/static/plotly.js", headers={"if-none-match": headers["etag"]})[0] == 304


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_long_list_is_refused_before_its_items_are_checked(client: Client) -> None:
    """Checking each item would block all other requests for 20 seconds."""
    edits = b",".join([b"{}"] * (MAX_BODY // 3 - 100))
    status, _, answer = client.request("POST", "/api/next", b'{"model":0,"ids":[1],"edits":[' + edits + b"]}", JSON)
    assert (status, b"length of edits must" in answer) == (400, True)


def test_larger_request_bodies_are_refused(client: Client) -> None:
    assert client.request("POST", "/api/next", b" " * (MAX_BODY - len(IDS)) + IDS, JSON)[0] == 200
    assert client.request("POST", "/api/next", IDS, {**JSON, "content-length": str(MAX_BODY + 1)})[0] == 413

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * (1 << 16)

    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=20)
    try:
        connection.request("POST", "/api/next", chunks(), {**JSON, **client.headers}, encode_chunked=True)
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):  # the server stopped reading and closed the connection
        pass
    finally:
        connection.close()


def test_a_bug_answers_500_and_prints_its_traceback(
    served: ServerThread, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError("broken inside")

    monkeypatch.setattr(served.pool.catalog, "describe", fail)
    status, answer = served.client.get("/api/catalog")
    assert (status, list(answer)) == (500, ["error"])
    assert "broken inside" not in answer["error"]
    assert "RuntimeError: broken inside" in capfd.readouterr().err


def test_too_many_connections_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 8)
    with serving(run) as served:
        idle = [connected(served.client) for _ in range(8)]
        until(lambda: len(served.server.server_state.connections) == 8)
        assert served.client.request("GET", "/")[0] == 503
        for connection in idle:
            connection.close()
        until(lambda: served.client.request("GET", "/")[0] == 200)


# --- clients that disconnect ------------------------------------------------------------------------------------------


def connected(client: Client, lines: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", client.port), timeout=15)
    connection.sendall(lines)
    return connection


LONG = {"model": 0, "ids": [1], "max_new_tokens": 1024}


def test_generation_stops_when_the_client_disconnects(served: ServerThread) -> None:
    connection = connected(served.client, post_lines("write", {**LONG, "n": 8}))
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert served.pool.streams == 1
    connection.close()
    until(lambda: served.pool.streams == 0)
    until(lambda: served.pool.waiting == 0)


def test_requests_are_answered_while_long_texts_are_generated(served: ServerThread) -> None:
    connections = [
        connected(served.client, post_lines("write", {**LONG, "n": 8})) for _ in range(model_pool.MAX_STREAMS)
    ]
    for connection in connections:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    for _ in range(3):
        served.client.answer("next", model=0, ids=[5])
    assert served.pool.streams == len(connections)  # all texts are still being generated
    status, answer = served.client.ask("write", **LONG)
    assert (status, "too many texts" in answer["error"]) == (429, True)
    for connection in connections:
        connection.close()
    until(lambda: served.pool.streams == 0)
    assert served.client.ask("write", **{**LONG, "max_new_tokens": 3})[0] == 200


def test_waiting_requests_are_limited_and_dropped_if_their_clients_disconnect(served: ServerThread) -> None:
    gate, begun = threading.Event(), []
    served.pool.executor.submit(gate.wait)
    limit = model_pool.MAX_WAITING
    requests = [connected(served.client, post_lines("next", {"model": 0, "ids": [i + 1]})) for i in range(limit)]
    try:
        until(lambda: served.pool.waiting == limit)
        status, headers, _ = served.client.request("POST", "/api/next", IDS, JSON)
        assert (status, headers["retry-after"]) == (429, "1")
        for connection in requests[1:]:
            connection.close()
        until(lambda: served.pool.waiting == 1)
        served.pool.executor.submit(lambda: begun.append(1))
    finally:
        gate.set()
    assert requests[0].recv(100).startswith(b"HTTP/1.1 200")
    requests[0].close()
    until(lambda: begun == [1])


def test_concurrent_requests_each_get_their_own_answer(served: ServerThread) -> None:
    expected = [served.client.answer("next", model=0, ids=[i])["logits"].tolist() for i in range(8)]
    with ThreadPoolExecutor(8) as executor:
        answers = executor.map(
            lambda i: served.client.answer("next", model=0, ids=[i % 8])["logits"].tolist(), range(64)
        )
    assert list(answers) == expected * 8
