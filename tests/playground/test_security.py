"""Safe: who may ask, thousands of malformed requests, and clients that are slow, malicious or gone."""

import http.client
import json
import random
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glassgpt.playground import model_pool as workshop
from glassgpt.playground import security as guard
from glassgpt.playground import server
from glassgpt.playground.security import MOST_BODY, Door
from play_harness import FILES, GPT2_LIKE, INDEX, Client, Served, serving, write_run

JSON = {"content-type": "application/json"}
IDS = json.dumps({"model": 0, "ids": [1, 2, 3]}).encode()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("guarded") / "run", GPT2_LIKE).path


@pytest.fixture(scope="module")
def served(run: Path) -> Iterator[Served]:
    with serving(run) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> Client:
    return served.client


@pytest.fixture
def quick(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A server that waits for a client for half a second."""
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(server, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(server, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.5)
    with serving(run) as served:
        yield served


def until(condition: Any, seconds: float = 10.0) -> None:
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# who may ask


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:7860", "localhost:65535"])
def test_the_servers_own_names_are_known(client: Client, host: str) -> None:
    assert client.request("GET", "/", headers={"host": host})[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example:80",
        "",
        "localhost:x",
        "10.0.0.1",
        "a@localhost",
        "localhost/",
        "[::1",
        "0",
    ],
)
def test_foreign_names_are_refused(client: Client, host: str) -> None:
    assert client.request("GET", "/", headers={"host": host})[0] == 403
    assert client.request("POST", "/api/attention", IDS, {**JSON, "host": host})[0] == 403


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
def test_only_the_page_itself_asks(client: Client, headers: dict[str, str], status: int) -> None:
    assert client.request("POST", "/api/next", IDS, {**JSON, **headers})[0] == status


def test_a_link_may_lead_to_the_page_and_to_nothing_else(client: Client) -> None:
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert client.request("GET", "/", headers=link)[0] == 200
    assert client.request("GET", "/", headers={**link, "sec-fetch-dest": "iframe"})[0] == 403
    assert client.request("GET", "/api/offers", headers=link)[0] == 403
    assert client.request("GET", "/static/views/text.js", headers={**link, "sec-fetch-mode": "no-cors"})[0] == 403


@pytest.mark.parametrize("path", ["/", "/static/views/text.js", "/api/offers", "/nothing"])
def test_every_answer_is_held_by_its_headers(client: Client, path: str) -> None:
    _, headers, _ = client.request("GET", path)
    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-opener-policy"] == headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["cache-control"] in ("no-store", "no-cache")
    assert "server" not in headers


def test_with_a_host_the_token_is_needed(run: Path) -> None:
    with serving(run, token=True) as served:
        client, token = served.client, served.door.token
        assert token is not None
        assert f"?token={token}" in served.url
        for path in (
            "/",
            "/api/offers",
            "/static/views/text.js",
            "/?token=",
            f"/?token={token}x",
            f"/api/offers?token={token}",
            "/?token=%ff",
        ):
            assert client.request("GET", path)[0] == 403, path
        status, headers, _ = client.request("GET", f"/?token={token}")
        assert (status, headers["location"]) == (303, "/")
        cookie, *attributes = headers["set-cookie"].split("; ")
        assert {"HttpOnly", "SameSite=Lax"} <= set(attributes)
        for path in ("/", "/api/offers"):
            assert client.request("GET", path, headers={"cookie": f"other=1; {cookie}"})[0] == 200
            assert client.request("GET", path, headers={"cookie": cookie[:-1]})[0] == 403
        assert client.request("POST", "/api/next", IDS, {**JSON, "cookie": cookie})[0] == 200
        assert client.request("POST", "/api/next", IDS, JSON)[0] == 403
        assert client.request("GET", "/", headers={"cookie": cookie, "host": "10.1.2.3:80"})[0] == 200
        assert client.request("GET", "/", headers={"cookie": cookie, "host": "evil.example"})[0] == 403


def test_a_token_is_compared_whatever_it_is() -> None:
    assert Door(token="secret").admits("secret")
    assert not any(Door(token="secret").admits(given) for given in ("", "secre", "secret\udcff", "é", "SECRET"))
    assert not Door().admits("")


# files


def test_files_are_served_from_memory(client: Client) -> None:
    status, headers, body = client.request("GET", "/")
    assert (status, body, headers["content-type"]) == (200, INDEX.content, "text/html; charset=utf-8")
    assert client.request("GET", "/", headers={"if-none-match": headers["etag"]})[::2] == (304, b"")
    assert client.request("HEAD", "/static/views/text.js")[::2] == (200, b"")
    assert client.request("GET", "/static/views/text.js?v=1")[2] == FILES["views/text.js"].content
    import gzip

    status, headers, body = client.request("GET", "/", headers={"accept-encoding": "gzip, br"})
    assert (headers["content-encoding"], gzip.decompress(body)) == ("gzip", INDEX.content)


def test_plotly_comes_from_its_package(client: Client) -> None:
    import gzip

    from plotly.offline import get_plotlyjs

    status, headers, body = client.request("GET", "/static/plotly.js", headers={"accept-encoding": "gzip"})
    assert status == 200
    assert gzip.decompress(body).decode() == get_plotlyjs()
    assert client.request("GET", "/static/plotly.js", headers={"if-none-match": headers["etag"]})[0] == 304


# thousands of malformed requests

ADDRESSES: dict[str, dict[str, Any]] = {
    "attention": {"ids": [1, 2]},
    "head": {"ids": [1, 2], "layer": 0, "head": 0},
    "lens": {"ids": [1], "start": 0, "stop": 1, "k": 2, "watch": [3]},
    "attribution": {"ids": [1], "position": 0, "token": 3, "against": 4},
    "next": {
        "ids": [1],
        "position": 0,
        "edits": [{"kind": "head", "layer": 0, "head": 0, "by": "zero"}],
        "source": [4],
    },
    "write": {
        "ids": [1],
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.1,
        "n": 1,
        "seed": 3,
        "max_new_tokens": 1,
    },
    "tokens": {"text": "abc"},
    "merges": {"text": "abc"},
    "near": {"table": "embedding", "id": 3, "k": 2},
    "weight": {"name": "norm.weight", "size": 4},
    "model": {"step": 1},
    "gradients": {"ids": [1, 2]},
}
STRANGE: list[Any] = [
    None, True, [], {}, "", "x", "\ud800", "../../bait", "/etc/passwd", -1, 10**18, 2**63, 10**400, 0.5, 1e308, [[]], [None],
    {"a": 1}, "\x00", [10**30], [-1], ["1"], list(range(3000)), "é" * 30_000,
]  # fmt: skip


def damaged_body(draw: random.Random) -> bytes:
    """What is no JSON object in UTF-8."""
    whole = json.dumps({"model": 0, **draw.choice(list(ADDRESSES.values()))}).encode()
    at = draw.randrange(1, len(whole))
    ways = [
        b"", b"null", b"[]", b'"x"', b"3", b"\xff" + whole, whole[:at], whole + b"}", b"[" * 100_000, b'{"model":' * 5000, b'{"model":NaN}',
        b'{"model":1e999}', b'{"model":' + b"9" * 5000 + b"}", whole.decode().encode("utf-16"), whole[:at] + b"\xc3\x28" + whole[at:],
        b"\x00" * 40, b'{"model":Infinity,"ids":[1]}',
    ]  # fmt: skip
    return draw.choice(ways)


def strange_question(draw: random.Random) -> tuple[str, bytes]:
    """An address and a question to it in which something is wrong, or at least strange."""
    path = draw.choice(list(ADDRESSES))
    question: dict[str, Any] = {"model": 0, **ADDRESSES[path]}
    for _ in range(draw.choice([1, 1, 2])):
        way, name = draw.randrange(3), draw.choice(list(question))
        if way == 0:
            question[name] = draw.choice(STRANGE)
        elif way == 1:
            question.pop(name)
        else:
            question[draw.choice(["path", "file", "__class__", "ids ", "\ud800", "", "model\x00"])] = draw.choice(
                STRANGE
            )
    return f"/api/{path}", json.dumps(question).encode()


def strange_address(draw: random.Random, bait: Path) -> str:
    """An address that leads to nothing."""
    climb = draw.choice(
        ["../", "..%2f", "%2e%2e/", "..\\", "....//", "%252e%252e/", "/", "//", ".%00./", "%c0%ae%c0%ae/"]
    ) * draw.randrange(1, 9)
    goal = draw.choice(
        [
            str(bait),
            bait.name,
            "etc/passwd",
            "config.toml",
            "app.py",
            "index.html%00",
            "é".encode().hex(),
            "%f0%9f%92%a3",
            "a" * 3000,
        ]
    )
    prefix = draw.choice(["/", "/static/", "/api/", "/static/views/", "/api/snapshot/", "/favicon.ico/"])
    return prefix + climb + goal.replace("é", "%C3%A9") + draw.choice(["", "?a=1", "#x", "?", "?model=0"])


PARAMETERS = [
    "", "model=", "model=x", "model=-1", "model=1", "model=0&model=0", "model=0&path=../x", "model=0&step=1", "step=1", "model=%00",
    "model=0&step=../../bait", "model=0&step=99999999999999999999", "model=٣", "model=0&after=1", "&&&", "model=0;step=1",
    "model=0&step=1e3",
]  # fmt: skip


@pytest.fixture
def opened() -> Iterator[set[str]]:
    """The paths that this process opens or lists meanwhile. An audit hook stays for ever, so this one is told when to stop."""
    seen: set[str] = set()
    watching = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in (
            "open",
            "os.listdir",
            "os.scandir",
            "os.chdir",
            "subprocess.Popen",
            "os.remove",
            "os.rename",
            "os.mkdir",
        ):
            seen.add(f"{arguments[0]}")

    sys.addaudithook(hook)
    yield seen
    watching = False


def test_thousands_of_malformed_requests_are_refused(
    served: Served, run: Path, tmp_path: Path, opened: set[str], capfd: pytest.CaptureFixture[str]
) -> None:
    bait = tmp_path / "bait"
    bait.write_text("SECRET")
    draw = random.Random(7)
    requests: list[tuple[str, str, bytes | None, dict[str, str], bool]] = []
    for _ in range(700):
        requests.append(("POST", f"/api/{draw.choice(list(ADDRESSES))}", damaged_body(draw), JSON, True))
        requests.append(("POST", *strange_question(draw), JSON, False))
        requests.append(("GET", strange_address(draw, bait), None, {}, True))
        method = draw.choice(["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO", "POST", "get", "PROPFIND"])
        requests.append(
            (method, draw.choice(["/", "/api/offers", "/static/views/text.js", "/nothing"]), None, {}, True)
        )
    for parameters in PARAMETERS * 5:
        path = draw.choice(["history", "snapshot", "events"])
        if (path, parameters) not in (("history", "model=0"), ("events", "model=0")):
            requests.append(("GET", f"/api/{path}?{parameters}".encode().decode("latin-1"), None, {}, True))
    draw.shuffle(requests)
    connection = http.client.HTTPConnection("127.0.0.1", served.client.port, timeout=20)
    opened.clear()
    for method, path, body, headers, malformed in requests:
        connection.putrequest(method, "/", skip_accept_encoding=True)
        connection._buffer[0] = f"{method} {path} HTTP/1.1".encode("latin-1")  # type: ignore[attr-defined]  # as it is, whatever it is
        for name, value in {**headers, "content-length": str(len(body or b""))}.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        content = response.read()
        told = f"{method} {path[:200]} {(body or b'')[:200]!r}: {response.status} {content[:200]!r}"
        assert response.status < 500, told
        assert 400 <= response.status < 500 or not malformed, told
        assert b"SECRET" not in content, told
    foreign = {
        path
        for path in opened
        if not path.startswith((str(run), sys.prefix, sys.base_prefix, "/proc", str(Path(guard.__file__).parents[1])))
    }
    assert not foreign
    assert "Traceback" not in capfd.readouterr().err
    assert served.client.answer("next", model=0, ids=[1])["logits"].shape == (256,)


def test_lines_that_are_no_http_are_refused(client: Client) -> None:
    draw = random.Random(3)
    good = (
        b"POST /api/next HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
        % (len(IDS), IDS)
    )
    fixed = [
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\norigin: http://localhost\r\norigin: http://evil.example\r\n\r\n",
        b"GET / HTTP/9.9\r\nhost: localhost\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"CONNECT evil.example:443 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\n\r\nhello",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 40_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"POST /api/next HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: -1\r\n\r\n",
        b"POST /api/next HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 99999999999\r\n\r\n",
        b"POST /api/next HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\norigin: http://evil.example\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"\x00" * 100 + b"\r\n\r\n",
    ]
    mangled = [
        good[:at] + draw.randbytes(draw.randrange(1, 4)) + good[at + draw.randrange(3) :]
        for at in (draw.randrange(60) for _ in range(150))
    ]
    for lines in fixed:
        assert 400 <= sent(client, lines) < 500, lines[:80]
    for lines in mangled:
        status = sent(client, lines)
        assert status is None or status < 500, lines
    assert client.request("GET", "/")[0] == 200


def sent(client: Client, lines: bytes) -> Any:
    """The status of the answer to raw bytes, None where the connection just ends."""
    with socket.create_connection(("127.0.0.1", client.port), timeout=15) as connection:
        connection.sendall(lines)
        connection.shutdown(socket.SHUT_WR)
        try:
            first = connection.recv(100)
        except ConnectionResetError:
            return None
    return int(first.split()[1]) if first else None


# bounds


def test_a_long_list_stops_nobody(client: Client) -> None:
    """Each item was once checked before the list's length: for 20 seconds nobody else had an answer."""
    edits = b",".join([b"{}"] * (MOST_BODY // 3 - 100))
    begin = time.perf_counter()
    status, _, answer = client.request("POST", "/api/next", b'{"model":0,"ids":[1],"edits":[' + edits + b"]}", JSON)
    assert (status, b"are the most" in answer) == (400, True)
    assert time.perf_counter() - begin < 2  # 0.02 s on an idle machine


def test_a_body_is_bounded(client: Client) -> None:
    assert client.request("POST", "/api/next", b" " * (MOST_BODY - len(IDS)) + IDS, JSON)[0] == 200
    assert client.request("POST", "/api/next", IDS, {**JSON, "content-length": str(MOST_BODY + 1)})[0] == 413

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * (1 << 16)

    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=20)
    try:
        connection.request("POST", "/api/next", chunks(), JSON, encode_chunked=True)
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):  # the server does not read on
        pass
    finally:
        connection.close()


def test_a_defect_is_told_and_shown(
    served: Served, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError("broken inside")

    monkeypatch.setattr(served.workshop.offers, "told", fail)
    status, told = served.client.get("/api/offers")
    assert (status, list(told)) == (500, ["error"])
    assert "broken inside" not in told["error"]
    assert "RuntimeError: broken inside" in capfd.readouterr().err


# clients that are slow, malicious or gone


def connected(client: Client, lines: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", client.port), timeout=15)
    connection.sendall(lines)
    return connection


def ends(connection: socket.socket) -> bool:
    """Whether the server has ended it."""
    connection.settimeout(10)
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    finally:
        connection.close()
    return True


def post(question: dict[str, Any], path: str = "write") -> bytes:
    body = json.dumps(question).encode()
    head = f"POST /api/{path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def test_who_sends_too_slowly_is_cut_off(quick: Served) -> None:
    client = quick.client
    silent, half = connected(client), connected(client, b"GET / HTTP/1.1\r\nhos")
    body = connected(client, post({"model": 0, "ids": [1]})[:-5])
    again = connected(client, b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\nGET / HT")
    begin = time.monotonic()
    while time.monotonic() < begin + 1.0:
        try:
            half.sendall(b"t")  # a byte now and then does not help
        except OSError:
            break
        time.sleep(0.05)
    assert client.request("GET", "/")[0] == 200
    assert body.recv(100).startswith(b"HTTP/1.1 408")
    assert all(ends(connection) for connection in (silent, half, body, again))


def test_who_never_reads_is_cut_off_and_stops_nobody(quick: Served) -> None:
    client = quick.client
    lens = post({"model": 0, "ids": [1] * 24, "start": 0, "stop": 24, "k": 50}, "lens")
    stuck = [connected(client) for _ in range(4)]
    for connection in stuck:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        try:
            for _ in range(400):
                connection.send(lens)
        except BlockingIOError:
            pass
    for _ in range(10):
        assert client.request("POST", "/api/next", IDS, JSON, timeout=5)[0] == 200
    until(lambda: not quick.server.server_state.connections)
    for connection in stuck:
        connection.close()


def test_a_flood_of_connections_closes_itself(served: Served) -> None:
    client = served.client
    flood = [connected(client) for _ in range(server.MOST_CONNECTIONS + 60)]
    for _ in range(5):
        assert client.request("POST", "/api/next", IDS, JSON, timeout=5)[0] == 200
    until(lambda: len(served.server.server_state.connections) <= server.MOST_CONNECTIONS)
    for connection in flood:
        connection.close()


LONG = {"model": 0, "ids": [1], "max_new_tokens": 1024}


def test_a_text_ends_when_nobody_reads_it(served: Served) -> None:
    connection = connected(served.client, post({**LONG, "n": 8}))
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert served.workshop._streams == 1
    connection.close()
    until(lambda: served.workshop._streams == 0, seconds=2)
    until(lambda: served.workshop.computing.waiting == 0, seconds=2)


def test_a_long_text_lets_others_have_their_turn(served: Served) -> None:
    connections = [connected(served.client, post({**LONG, "n": 8})) for _ in range(workshop.MOST_STREAMS)]
    for connection in connections:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    for _ in range(3):
        begin = time.monotonic()
        served.client.answer("next", model=0, ids=[5])
        assert time.monotonic() - begin < 2  # four turns of 0.03 s on an idle machine
    status, told = served.client.ask("write", **LONG)
    assert (status, "too many texts" in told["error"]) == (429, True)
    for connection in connections:
        connection.close()
    until(lambda: served.workshop._streams == 0)
    assert served.client.ask("write", **{**LONG, "max_new_tokens": 3})[0] == 200


def test_waiting_questions_are_bounded_and_forgotten_with_their_clients(served: Served) -> None:
    import threading

    gate, begun = threading.Event(), []
    served.workshop.computing.submit(gate.wait)
    asked = [connected(served.client, post({"model": 0, "ids": [i + 1]}, "next")) for i in range(workshop.MOST_WAITING)]
    try:
        until(lambda: served.workshop.computing.waiting == workshop.MOST_WAITING)
        status, headers, _ = served.client.request("POST", "/api/next", IDS, JSON)
        assert (status, headers["retry-after"]) == (429, "1")
        for connection in asked[1:]:
            connection.close()
        until(lambda: served.workshop.computing.waiting == 1)
        served.workshop.computing.submit(lambda: begun.append(1))
    finally:
        gate.set()
    assert asked[0].recv(100).startswith(b"HTTP/1.1 200")
    asked[0].close()
    until(lambda: begun == [1])


def test_many_ask_at_once_and_each_gets_its_own_answer(served: Served) -> None:
    from concurrent.futures import ThreadPoolExecutor

    expected = [served.client.answer("next", model=0, ids=[i])["logits"].tolist() for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda i: served.client.answer("next", model=0, ids=[i % 8])["logits"].tolist(), range(64))
        )
    assert found == expected * 8
