"""Who may use the server, malformed requests, limits, and clients that disconnect."""

import gzip
import http.client
import json
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import glassgpt
from glassgpt.playground import model_pool, server
from glassgpt.playground.routes import CAPTURE_HANDLERS, MODEL_HANDLERS, page_files
from glassgpt.playground.security import MAX_BODY, AccessPolicy, accepts_gzip
from play_harness import GPT2_LIKE, TOKEN, Client, Served, serving, write_run

JSON = {"content-type": "application/json"}
IDS = json.dumps({"model": 0, "ids": [1, 2, 3]}).encode()
AUTHORIZATION = b"authorization: Bearer %s\r\n" % TOKEN.encode()
GET_ADDRESSES = ["offers", "history?model=0", "snapshot?model=0&step=1", "events?model=0"]


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


def until(condition: Any, seconds: float = 20.0) -> None:
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# --- the token --------------------------------------------------------------------------------------------------------


def test_no_api_answers_without_the_token(client: Client) -> None:
    stranger = Client(client.port, token=None)
    names = [*MODEL_HANDLERS, *CAPTURE_HANDLERS, "lens", "write", "nothing"]
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
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(attributes)
    assert cookie.startswith(f"glassgpt-{client.port}=")  # cookies are shared by all ports of a host
    assert stranger.request("GET", "/api/login")[0] == 401
    assert stranger.request("GET", "/api/login", headers={"cookie": f"other=1; {cookie}"})[0] == 204
    assert stranger.request("POST", "/api/next", IDS, {**JSON, "cookie": cookie})[0] == 200


def test_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr("secrets.compare_digest", lambda a, b: compared.append((a, b)))
    AccessPolicy("secret", "cookie").is_token("secre\udcff")
    assert compared == [(b"secre?", b"secret")]


# --- hosts and other sites --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:7860", "localhost:65535"])
def test_loopback_names_are_accepted(client: Client, host: str) -> None:
    assert client.request("GET", "/", headers={"host": host})[0] == 200


FOREIGN_HOSTS = """evil.example localhost.evil.example 127.0.0.1.evil.example:80 localhost:x 10.0.0.1 a@localhost localhost/ [::1 0
""".split()


@pytest.mark.parametrize("host", ["", *FOREIGN_HOSTS])
def test_dns_rebinding_is_refused(client: Client, host: str) -> None:
    assert client.request("GET", "/", headers={"host": host})[0] == 400
    assert client.request("POST", "/api/attention", IDS, {**JSON, "host": host})[0] == 400


def test_any_host_name_is_accepted_with_host(run: Path) -> None:
    """With --host, people may reach the machine by names that it does not know; the token refuses the rest."""
    address = server.bind("127.0.0.1", 0)
    address.listener.close()
    assert address.policy.hosts == ("*",)


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
        assert client.request("GET", "/api/offers", headers=headers)[0] == 403
        assert client.request("POST", "/api/login", b"{}", {**JSON, **headers})[0] == 403


@pytest.mark.parametrize(
    "path", ["/", "/static/views/text.js", "/api/offers", "/nothing", "/api/nothing", "/static/nothing"]
)
def test_every_response_has_the_security_headers(client: Client, path: str) -> None:
    for host in ("localhost", "evil.example"):
        _, headers, _ = client.request("GET", path, headers={"host": host})
        policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
        assert (
            policy["default-src"]
            == policy["base-uri"]
            == policy["form-action"]
            == policy["frame-ancestors"]
            == "'none'"
        )
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
    assert not accepts_gzip("br, x-gzip")


def test_plotly_comes_from_its_package(client: Client) -> None:
    from plotly.offline import get_plotlyjs

    status, headers, body = client.request("GET", "/static/plotly.js", headers={"accept-encoding": "gzip"})
    assert status == 200
    assert gzip.decompress(body).decode() == get_plotlyjs()
    assert client.request("GET", "/static/plotly.js", headers={"if-none-match": headers["etag"]})[0] == 304


# --- thousands of malformed requests ----------------------------------------------------------------------------------

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
        for name, value in {**served.client.headers, **headers, "content-length": str(len(body or b""))}.items():
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
        if not path.startswith((str(run), sys.prefix, sys.base_prefix, "/proc", str(Path(glassgpt.__file__).parent)))
    }
    assert not foreign
    assert "Traceback" not in capfd.readouterr().err
    assert served.client.answer("next", model=0, ids=[1])["logits"].shape == (256,)


def test_lines_that_are_no_http_are_refused(client: Client) -> None:
    draw = random.Random(3)
    good = (
        b"POST /api/next HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%s\r\n%s"
        % (len(IDS), AUTHORIZATION, IDS)
    )
    fixed = [
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\n\r\n",
        b"GET /api/offers HTTP/1.1\r\nhost: localhost\r\norigin: http://evil.example\r\norigin: http://localhost\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"CONNECT evil.example:443 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 40_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"POST /api/next HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: -1\r\n\r\n",
        b"POST /api/next HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 99999999999\r\n\r\n",
        b"POST /api/next HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /api/offers HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\norigin: http://evil.example\r\n\r\n",
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


# --- limits ------------------------------------------------------------------------------------------------------------


def test_a_long_list_is_refused_before_its_items_are_checked(client: Client) -> None:
    """Checking each item would keep everybody else waiting for 20 seconds."""
    edits = b",".join([b"{}"] * (MAX_BODY // 3 - 100))
    status, _, answer = client.request("POST", "/api/next", b'{"model":0,"ids":[1],"edits":[' + edits + b"]}", JSON)
    assert (status, b"edits has" in answer) == (400, True)


def test_bodies_are_bounded(client: Client) -> None:
    assert client.request("POST", "/api/next", b" " * (MAX_BODY - len(IDS)) + IDS, JSON)[0] == 200
    assert client.request("POST", "/api/next", IDS, {**JSON, "content-length": str(MAX_BODY + 1)})[0] == 413

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * (1 << 16)

    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=20)
    try:
        connection.request("POST", "/api/next", chunks(), {**JSON, **client.headers}, encode_chunked=True)
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):  # the server has stopped reading
        pass
    finally:
        connection.close()


def test_a_bug_answers_500_and_prints_its_traceback(
    served: Served, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError("broken inside")

    monkeypatch.setattr(served.pool.offers, "told", fail)
    status, answer = served.client.get("/api/offers")
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


def post(body: dict[str, Any], path: str = "write") -> bytes:
    text = json.dumps(body).encode()
    head = f"POST /api/{path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n"
    return head.encode() + AUTHORIZATION + b"\r\n" + text


LONG = {"model": 0, "ids": [1], "max_new_tokens": 1024}


def test_a_text_ends_when_nobody_reads_it(served: Served) -> None:
    connection = connected(served.client, post({**LONG, "n": 8}))
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert served.pool._streams == 1
    connection.close()
    until(lambda: served.pool._streams == 0)
    until(lambda: served.pool.computing.waiting == 0)


def test_long_texts_let_others_have_their_turn(served: Served) -> None:
    connections = [connected(served.client, post({**LONG, "n": 8})) for _ in range(model_pool.MOST_STREAMS)]
    for connection in connections:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    for _ in range(3):
        served.client.answer("next", model=0, ids=[5])
    assert served.pool._streams == len(connections)  # the texts have not ended: the answers came in between
    status, answer = served.client.ask("write", **LONG)
    assert (status, "too many texts" in answer["error"]) == (429, True)
    for connection in connections:
        connection.close()
    until(lambda: served.pool._streams == 0)
    assert served.client.ask("write", **{**LONG, "max_new_tokens": 3})[0] == 200


def test_waiting_requests_are_bounded_and_forgotten_with_their_clients(served: Served) -> None:
    gate, begun = threading.Event(), []
    served.pool.computing.submit(gate.wait)
    limit = model_pool.MOST_WAITING
    requests = [connected(served.client, post({"model": 0, "ids": [i + 1]}, "next")) for i in range(limit)]
    try:
        until(lambda: served.pool.computing.waiting == limit)
        status, headers, _ = served.client.request("POST", "/api/next", IDS, JSON)
        assert (status, headers["retry-after"]) == (429, "1")
        for connection in requests[1:]:
            connection.close()
        until(lambda: served.pool.computing.waiting == 1)
        served.pool.computing.submit(lambda: begun.append(1))
    finally:
        gate.set()
    assert requests[0].recv(100).startswith(b"HTTP/1.1 200")
    requests[0].close()
    until(lambda: begun == [1])


def test_concurrent_requests_each_get_their_own_answer(served: Served) -> None:
    expected = [served.client.answer("next", model=0, ids=[i])["logits"].tolist() for i in range(8)]
    with ThreadPoolExecutor(8) as executor:
        answers = executor.map(
            lambda i: served.client.answer("next", model=0, ids=[i % 8])["logits"].tolist(), range(64)
        )
    assert list(answers) == expected * 8
