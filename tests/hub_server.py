"""A small server on this machine that speaks the hub's routes for datasets, and misbehaves where it is told to.

Large files are, as on the hub, redirected to another host (`localhost`), which answers 400 to whoever brings it a token.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repository:
    """The files of a dataset by revision: a branch, or the commit it stands for. `small`: in git, without sha256."""

    branches: dict[str, dict[str, bytes]]
    small: set[str] = field(default_factory=lambda: {"README.md"})
    token: str | None = None
    page: int = 1000
    host: str = "127.0.0.1"
    """Where its listing goes on after a page."""

    def commit(self, branch: str) -> str:
        """What a branch stands for: a hash of its files."""
        return hashlib.sha1(repr(sorted(self.branches[branch].items())).encode()).hexdigest()

    def files(self, revision: str) -> dict[str, bytes] | None:
        """The files at a revision, None where there is none."""
        return next(
            (files for branch, files in self.branches.items() if revision in (branch, self.commit(branch))), None
        )


@dataclass(frozen=True)
class Request:
    """A request that came: the path without the query, and what matters of its headers."""

    method: str
    path: str
    range: str | None
    authorization: str | None


Fault = Callable[["Handler", bytes, int], None]


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does, but for the faults that stand in the server's list for the last part of the path."""

    server: "HubServer"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.server.requests.append(Request(self.command, path, self.headers["Range"], self.headers["Authorization"]))
        if path.startswith("/cdn/"):
            return self.cdn(path.removeprefix("/cdn/"))
        if path.startswith("/api/datasets/"):
            return self.api(path.removeprefix("/api/datasets/"), parse_qs(url.query))
        owner, name, _, revision, file = path.removeprefix("/datasets/").split("/", 4)
        repository = self.server.repositories[f"{owner}/{name}"]
        files = repository.files(revision)
        if files is None or file not in files:
            return self.refuse(404, {"X-Error-Code": "EntryNotFound"})
        if (
            repository.token
            and file not in repository.small
            and self.headers["Authorization"] != f"Bearer {repository.token}"
        ):
            return self.refuse(401, {"X-Error-Code": "GatedRepo"})
        if file in repository.small:
            return self.send(files[file], file)
        self.refuse(
            302, {"Location": f"http://localhost:{self.server.server_address[1]}/cdn/{file}?{owner}/{name}@{revision}"}
        )

    def do_HEAD(self) -> None:
        self.do_GET()

    def cdn(self, file: str) -> None:
        if self.headers["Authorization"]:
            return self.refuse(400)
        repository, _, revision = urlsplit(self.path).query.partition("@")
        files = self.server.repositories[repository].files(revision)
        assert files is not None
        self.send(files[file], file)

    def api(self, path: str, query: dict[str, list[str]]) -> None:
        parts = path.split("/")
        repository = self.server.repositories.get("/".join(parts[:2]))
        if self.fault("api"):
            return
        if repository is None:
            return self.refuse(401, {"X-Error-Code": "RepoNotFound"})
        if parts[2:3] != ["tree"]:
            branch = "/".join(parts[3:]) or "main"
            if repository.files(branch) is None:
                return self.refuse(404, {"X-Error-Code": "RevisionNotFound"})
            commit = next(
                repository.commit(each) for each in repository.branches if branch in (each, repository.commit(each))
            )
            return self.json({"id": "/".join(parts[:2]), "sha": commit})
        files = repository.files(parts[3])
        assert files is not None
        folder = "/".join(parts[4:])
        below = [name for name in files if not folder or name.startswith(f"{folder}/")]
        if folder and not below:
            return self.refuse(404, {"X-Error-Code": "EntryNotFound"})
        if query["recursive"] != ["true"]:
            below = [name for name in below if "/" not in name.removeprefix(f"{folder}/" if folder else "")]
        begin = int(query.get("cursor", ["0"])[0])
        here = f"http://{repository.host}:{self.server.server_address[1]}{urlsplit(self.path).path}"
        more = f'<{here}?recursive={query["recursive"][0]}&cursor={begin + repository.page}>; rel="next"'
        entries = [
            entry(name, files[name], name in repository.small) for name in below[begin : begin + repository.page]
        ]
        self.json(entries, {"Link": more} if begin + repository.page < len(below) else {})

    def json(self, content: object, headers: dict[str, str] | None = None) -> None:
        self.answer(200, json.dumps(content).encode(), headers or {})

    def fault(self, name: str, content: bytes = b"", start: int = 0) -> bool:
        """Misbehave, where that is asked for."""
        faults = self.server.faults.get(name)
        if not faults:
            return False
        faults.pop(0)(self, content, start)
        return True

    def send(self, content: bytes, name: str) -> None:
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if start >= len(content) > 0:
            return self.refuse(416)
        if not self.fault(name, content, start):
            self.part(content, start)

    def part(self, content: bytes, start: int, length: int | None = None, sent: bytes | None = None) -> None:
        """The content from `start` on: under a header that says `length`, or `sent` in its place."""
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start:] if sent is None else sent)
            self.wfile.flush()

    def refuse(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.answer(status, b"", headers or {})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def entry(name: str, content: bytes, small: bool) -> dict[str, object]:
    """A file as the hub lists it. Of a large one git keeps a pointer, whose sha1 is nothing to the content."""
    if small:
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}
    large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return {"type": "file", "path": name, "size": len(content), "oid": "0" * 40, "lfs": large}


# --------------------------------------------------------------------------------------------------------------- faults


def refuse(status: int, **headers: str) -> Fault:
    """Another answer: `retry_after="1"` is a header."""
    return lambda handler, content, start: handler.refuse(
        status, {name.replace("_", "-"): value for name, value in headers.items()}
    )


def truncate(count: int) -> Fault:
    """Close the connection after so many bytes."""
    return lambda handler, content, start: handler.part(content, start, sent=content[start : start + count])


def claim(difference: int) -> Fault:
    """Send it all under a Content-Length that says so many bytes more, or less."""
    return lambda handler, content, start: handler.part(content, start, len(content) - start + difference)


def too_much(handler: Handler, content: bytes, start: int) -> None:
    """More than there is, under a header that says so."""
    handler.part(content, start, len(content) - start + 1000, content[start:] + bytes(1000))


def flip(handler: Handler, content: bytes, start: int) -> None:
    """One wrong byte among the right number of them."""
    handler.part(content, start, sent=bytes([content[start] ^ 1]) + content[start + 1 :])


def stall(count: int) -> Fault:
    """Send so many bytes, and then nothing until the server is shut down."""

    def answer(handler: Handler, content: bytes, start: int) -> None:
        handler.part(content, start, sent=content[start : start + count])
        handler.server.stalled.set()
        handler.server.ending.wait(30)

    return answer


def silence(handler: Handler, content: bytes, start: int) -> None:
    """No answer at all, until the server is shut down."""
    handler.server.ending.wait(30)


# --------------------------------------------------------------------------------------------------------------- server


class HubServer(ThreadingHTTPServer):
    """Repositories by id; faults by a file's name (or `api`), the first for the first request; and what was asked for."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, Repository]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.faults: dict[str, list[Fault]] = {}
        self.requests: list[Request] = []
        self.stalled, self.ending = threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def asked(self, part: str) -> list[Request]:
        """The requests with this in their path."""
        return [request for request in self.requests if part in request.path]


@contextmanager
def hub(repositories: dict[str, Repository]) -> Iterator[HubServer]:
    """A server in a thread of this process, shut down at the end."""
    with HubServer(repositories) as server:
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        try:
            yield server
        finally:
            server.ending.set()
            server.shutdown()
            thread.join()
