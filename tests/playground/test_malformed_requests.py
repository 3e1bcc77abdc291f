"""Thousands of malformed requests get a 4xx status, never 5xx, and no path in them reaches the file system."""

import contextlib
import http.client
import json
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import glassgpt
from play_harness import AUTHORIZATION, GPT2_LIKE, IDS, JSON, Client, ServerThread, serving, write_run

ADDRESSES: dict[str, dict[str, Any]] = {
    "attention": {"ids": [1, 2]},
    "head": {"ids": [1, 2], "layer": 0, "head": 0},
    "neurons": {"ids": [1, 2], "layer": 0, "position": 1},
    "neuron": {"ids": [1, 2], "layer": 0, "position": 1, "neuron": 3, "k": 2},
    "neuron_texts": {"ids": [1, 2], "layer": 0, "neuron": 3},
    "lens": {"ids": [1], "start": 0, "stop": 1, "k": 2, "watch": [3]},
    "attribution": {"ids": [1], "position": 0, "token": 3, "against": 4},
    "next": {"ids": [1], "edits": [{"kind": "head", "layer": 0, "head": 0, "by": "zero"}], "source": [4]},
    "write": {"ids": [1], "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "seed": 3, "max_new_tokens": 1},
    "tokens": {"text": "abc"},
    "merges": {"text": "abc"},
    "near": {"table": "embedding", "id": 3, "k": 2},
    "weight": {"name": "norm.weight", "size": 4},
    "model": {"step": 1},
    "gradients": {"ids": [1, 2]},
}
STRANGE: list[Any] = [
    None, True, [], {}, "", "x", "\ud800", "../../bait", "/etc/passwd", -1, 10**18, 2**63, 10**400, 0.5, 1e308, [[]],
    [None], {"a": 1}, "\x00", [10**30], [-1], ["1"], list(range(3000)), "é" * 30_000,
]  # fmt: skip


def damaged_body(draw: random.Random) -> bytes:
    """Return a request body that is not a JSON object in UTF-8."""
    body = json.dumps({"model": 0, **draw.choice(list(ADDRESSES.values()))}).encode()
    at = draw.randrange(1, len(body))
    damaged = [
        b"", b"null", b"[]", b'"x"', b"3", b"\x00" * 40, b"[" * 100_000, b'{"model":' * 5000,
        b'{"model":NaN}', b'{"model":1e999}', b'{"model":Infinity,"ids":[1]}', b'{"model":' + b"9" * 5000 + b"}",
        body[:at], body + b"}", b"\xff" + body, body[:at] + b"\xc3\x28" + body[at:],
        body.decode().encode("utf-16"),
    ]  # fmt: skip
    return draw.choice(damaged)


def strange_request(draw: random.Random) -> tuple[str, bytes]:
    """Return an address and a body with one or two missing, unknown or unusual values."""
    path = draw.choice(list(ADDRESSES))
    body: dict[str, Any] = {"model": 0, **ADDRESSES[path]}
    for _ in range(draw.choice([1, 1, 2])):
        change, name = draw.randrange(3), draw.choice(list(body))
        if change == 0:
            body[name] = draw.choice(STRANGE)
        elif change == 1:
            body.pop(name)
        else:
            body[draw.choice(["path", "file", "__class__", "ids ", "\ud800", "", "model\x00"])] = draw.choice(STRANGE)
    return f"/api/{path}", json.dumps(body).encode()


def strange_address(draw: random.Random, bait: Path) -> str:
    """Return an address that does not exist; many try to leave the served folder or to reach the file `bait`."""
    climbs = ["../", "..%2f", "%2e%2e/", "..\\", "....//", "%252e%252e/", "/", "//", ".%00./", "%c0%ae%c0%ae/"]
    climb = draw.choice(climbs) * draw.randrange(1, 9)
    names = ["etc/passwd", "config.toml", "app.py", "index.html%00", "c3a9", "%f0%9f%92%a3", "a" * 3000]
    goal = draw.choice([str(bait), bait.name, *names])
    prefix = draw.choice(["/", "/static/", "/api/", "/static/views/", "/api/snapshot/", "/favicon.ico/"])
    return prefix + climb + goal + draw.choice(["", "?a=1", "#x", "?", "?model=0"])


PARAMETERS = [
    "", "model=", "model=x", "model=-1", "model=1", "model=0&model=0", "model=0&path=../x", "model=0&step=1", "step=1",
    "model=%00", "model=0&step=../../bait", "model=0&step=99999999999999999999", "model=٣", "model=0&after=1", "&&&",
    "model=0;step=1", "model=0&step=1e3",
]  # fmt: skip
WATCHED = "open os.listdir os.scandir os.chdir subprocess.Popen os.remove os.rename os.mkdir".split()
"""Audit events of Python that open, list or change files, or start a process."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("malformed") / "run", GPT2_LIKE).path


@pytest.fixture(scope="module")
def served(run: Path) -> Iterator[ServerThread]:
    with serving(run) as served:
        yield served


@pytest.fixture
def opened() -> Iterator[set[str]]:
    """Return the paths that this process opens or lists. An audit hook cannot be removed, so a flag disables it."""
    seen: set[str] = set()
    watching = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in WATCHED:
            seen.add(f"{arguments[0]}")

    sys.addaudithook(hook)
    yield seen
    watching = False


@pytest.mark.parametrize("rounds", [50, pytest.param(700, marks=pytest.mark.slow)])
def test_malformed_requests_are_refused(
    rounds: int, served: ServerThread, run: Path, tmp_path: Path, opened: set[str], capfd: pytest.CaptureFixture[str]
) -> None:
    bait = tmp_path / "bait"
    bait.write_text("SECRET")
    draw = random.Random(7)
    requests: list[tuple[str, str, bytes | None, dict[str, str], bool]] = []
    for _ in range(rounds):
        requests.append(("POST", f"/api/{draw.choice(list(ADDRESSES))}", damaged_body(draw), JSON, True))
        requests.append(("POST", *strange_request(draw), JSON, False))
        requests.append(("GET", strange_address(draw, bait), None, {}, True))
        method = draw.choice(["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO", "POST", "get", "PROPFIND"])
        address = draw.choice(["/", "/api/catalog", "/static/views/text.js", "/nothing"])
        requests.append((method, address, None, {}, True))
    for parameters in PARAMETERS * 5:
        path = draw.choice(["history", "snapshot", "events"])
        if (path, parameters) not in (("history", "model=0"), ("events", "model=0")):
            requests.append(("GET", f"/api/{path}?{parameters}".encode().decode("latin-1"), None, {}, True))
    draw.shuffle(requests)
    connection = http.client.HTTPConnection("127.0.0.1", served.client.port, timeout=20)
    opened.clear()
    for method, path, body, headers, malformed in requests:
        connection.putrequest(method, "/", skip_accept_encoding=True)
        # `putrequest` would refuse invalid characters.
        vars(connection)["_buffer"][0] = f"{method} {path} HTTP/1.1".encode("latin-1")
        for name, value in {**served.client.headers, **headers, "content-length": str(len(body or b""))}.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        content = response.read()
        shown = f"{method} {path[:200]} {(body or b'')[:200]!r}: {response.status} {content[:200]!r}"
        assert response.status < 500, shown
        assert 400 <= response.status < 500 or not malformed, shown
        assert b"SECRET" not in content, shown
    # The memory that is free is read from /proc and from the control groups.
    system = ("/proc", "/sys/fs/cgroup")
    allowed = (str(run), sys.prefix, sys.base_prefix, *system, str(Path(glassgpt.__file__).parent))
    unexpected = {path for path in opened if not path.startswith(allowed)}
    assert not unexpected
    assert "Traceback" not in capfd.readouterr().err
    assert served.client.answer("next", model=0, ids=[1])["logits"].shape == (256,)


def test_lines_that_are_not_http_are_refused(served: ServerThread, capfd: pytest.CaptureFixture[str]) -> None:
    client = served.client
    draw = random.Random(3)
    host = b"host: localhost\r\n"
    post = b"POST /api/next HTTP/1.1\r\ncontent-type: application/json\r\n" + host + AUTHORIZATION
    good = b"%scontent-length: %d\r\n\r\n%s" % (post, len(IDS), IDS)
    api = b"GET /api/catalog HTTP/1.1\r\n" + host + AUTHORIZATION
    fixed = [
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + host + host + b"\r\n",
        api + b"origin: http://evil.example\r\norigin: http://localhost\r\n\r\n",
        api + b"upgrade: websocket\r\nconnection: upgrade\r\norigin: http://evil.example\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\n" + host + b"\r\n",
        b"CONNECT evil.example:443 HTTP/1.1\r\n" + host + b"\r\n",
        post + b"content-length: -1\r\n\r\n",
        post + b"content-length: 99999999999\r\n\r\n",
        post + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
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
    long = [b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 600_000, b"GET /" + b"a" * 600_000]
    for lines in mangled + long:
        status = sent(client, lines)
        assert status is None or status < 500, lines
    assert sent(client, good[:-1]) in (None, 400)  # it ends within the body
    assert client.request("GET", "/")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def sent(client: Client, lines: bytes) -> Any:
    """Send raw bytes and return the status of the answer, or None if the server closes the connection without one."""
    with socket.create_connection(("127.0.0.1", client.port), timeout=15) as connection:
        try:
            connection.sendall(lines)
            with contextlib.suppress(OSError):  # the server has closed it already
                connection.shutdown(socket.SHUT_WR)
            first = connection.recv(100)
        except (BrokenPipeError, ConnectionResetError):
            return None
    return int(first.split()[1]) if first else None
