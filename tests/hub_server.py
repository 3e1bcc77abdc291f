"""A local stand-in for the Hugging Face Hub: its routes for datasets and models, with faults that a test can request.

As on the Hub, large files are redirected to another host (`localhost`), which responds with 400 if it gets a token.
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
    """The files of a dataset or model by branch. Files in `small` are stored in git, without a SHA-256."""

    branches: dict[str, dict[str, bytes]]
    small: set[str] = field(default_factory=lambda: {"README.md"})
    token: str | None = None
    page: int = 1000

    def commit(self, branch: str) -> str:
        """Return the commit of a branch: a hash of its files."""
        return hashlib.sha1(repr(sorted(self.branches[branch].items())).encode()).hexdigest()

    def resolve(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return commit and files of a revision (a branch or a commit), or None if there is no such revision."""
        commits = {branch: self.commit(branch) for branch in self.branches}
        return next(
            ((commits[branch], self.branches[branch]) for branch in commits if revision in (branch, commits[branch])),
            None,
        )


@dataclass(frozen=True)
class Request:
    """A received request: its method, its path without the query, and two of its headers."""

    method: str
    path: str
    range: str | None
    authorization: str | None


Fault = Callable[["Handler", bytes, int], None]


class Handler(BaseHTTPRequestHandler):
    """Responds as the Hub does, unless the server has a fault for the last part of the path."""

    server: "HubServer"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.server.requests.append(Request(self.command, path, self.headers["Range"], self.headers["Authorization"]))
        if path.startswith("/cdn/"):
            return self.cdn(path.removeprefix("/cdn/"), url.query)
        if path.startswith("/api/"):
            return self.api(path.split("/", 3)[3], parse_qs(url.query))
        owner, name, _, revision, file = path.removeprefix("/datasets").split("/", 5)[1:]
        repository = self.server.repositories.get(f"{owner}/{name}")
        if repository is None:
            return self.refuse(401, {"X-Error-Code": "RepoNotFound"})
        resolved = repository.resolve(revision)
        if resolved is None or file not in resolved[1]:
            return self.refuse(404, {"X-Error-Code": "EntryNotFound"})
        commit, content = resolved[0], resolved[1][file]
        is_small = file in repository.small
        if repository.token and not is_small and self.headers["Authorization"] != f"Bearer {repository.token}":
            return self.refuse(401, {"X-Error-Code": "GatedRepo"})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_sha1(content) if is_small else "0" * 40}"'}
        if is_small:
            return self.send(content, file, headers)
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        location = f"http://localhost:{self.server.server_address[1]}/cdn/{file}?{owner}/{name}@{revision}"
        self.refuse(302, {**headers, **linked, "Location": location})

    def do_HEAD(self) -> None:
        self.do_GET()

    def cdn(self, file: str, query: str) -> None:
        if self.headers["Authorization"]:
            return self.refuse(400)
        name, _, revision = query.partition("@")
        resolved = self.server.repositories[name].resolve(revision)
        assert resolved is not None
        self.send(resolved[1][file], file, {})

    def api(self, path: str, query: dict[str, list[str]]) -> None:
        parts = path.split("/")
        repository = self.server.repositories.get("/".join(parts[:2]))
        if self.fault("api"):
            return
        if repository is None:
            return self.refuse(401, {"X-Error-Code": "RepoNotFound"})
        resolved = repository.resolve("/".join(parts[3:]) or "main" if parts[2:3] != ["tree"] else parts[3])
        if resolved is None:
            return self.refuse(404, {"X-Error-Code": "RevisionNotFound"})
        commit, files = resolved
        if parts[2:3] != ["tree"]:
            siblings = [{"rfilename": name} for name in files]
            return self.json({"id": "/".join(parts[:2]), "sha": commit, "siblings": siblings})
        folder = "/".join(parts[4:])
        below = [name for name in files if not folder or name.startswith(f"{folder}/")]
        if folder and not below:
            return self.refuse(404, {"X-Error-Code": "EntryNotFound"})
        recursive = query["recursive"][0]
        if recursive.lower() != "true":
            below = [name for name in below if "/" not in name.removeprefix(f"{folder}/" if folder else "")]
        begin = int(query.get("cursor", ["0"])[0])
        here = f"{self.server.url}{urlsplit(self.path).path}"
        more = f'<{here}?recursive={recursive}&cursor={begin + repository.page}>; rel="next"'
        page = below[begin : begin + repository.page]
        entries = [entry(name, files[name], name in repository.small) for name in page]
        self.json(entries, {"Link": more} if begin + repository.page < len(below) else {})

    def json(self, content: object, headers: dict[str, str] | None = None) -> None:
        self.respond(200, json.dumps(content).encode(), headers or {})

    def fault(self, name: str, content: bytes = b"", start: int = 0) -> bool:
        """Respond with the next fault; return False if there is none."""
        faults = self.server.faults.get(name)
        if not faults:
            return False
        faults.pop(0)(self, content, start)
        return True

    def send(self, content: bytes, name: str, headers: dict[str, str]) -> None:
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if start >= len(content) > 0:
            return self.refuse(416)
        if self.command == "HEAD" or not self.fault(name, content, start):
            self.part(content, start, headers=headers)

    def part(
        self,
        content: bytes,
        start: int,
        length: int | None = None,
        sent: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Send the content from `start` on, or the bytes `sent` instead. `length` is the Content-Length header."""
        self.send_response(206 if start else 200)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start:] if sent is None else sent)
            self.wfile.flush()

    def refuse(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.respond(status, b"", headers or {})

    def respond(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(name: str, content: bytes, small: bool) -> dict[str, object]:
    """Return a file's entry in the Hub's listing. A large file's `oid` is that of git's pointer, not of the content."""
    if small:
        return {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}
    large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return {"type": "file", "path": name, "size": len(content), "oid": "0" * 40, "lfs": large}


# --------------------------------------------------------------------------------------------------------------- faults


def refuse(status: int, **headers: str) -> Fault:
    """Respond with a status and headers (`retry_after="1"`)."""
    return lambda handler, content, start: handler.refuse(
        status, {name.replace("_", "-"): value for name, value in headers.items()}
    )


def truncate(count: int) -> Fault:
    """Close the connection after `count` bytes."""
    return lambda handler, content, start: handler.part(content, start, sent=content[start : start + count])


def claim(difference: int) -> Fault:
    """Send all bytes, with a Content-Length that is wrong by `difference`."""
    return lambda handler, content, start: handler.part(content, start, len(content) - start + difference)


def too_much(handler: Handler, content: bytes, start: int) -> None:
    """Send 1,000 bytes more than the file has, with a matching Content-Length."""
    handler.part(content, start, len(content) - start + 1000, content[start:] + bytes(1000))


def flip(handler: Handler, content: bytes, start: int) -> None:
    """Send the right number of bytes, with one bit of the first byte flipped."""
    handler.part(content, start, sent=bytes([content[start] ^ 1]) + content[start + 1 :])


def stall(count: int) -> Fault:
    """Send `count` bytes, then nothing until the server is shut down."""

    def respond(handler: Handler, content: bytes, start: int) -> None:
        handler.part(content, start, sent=content[start : start + count])
        handler.server.stalled.set()
        handler.server.ending.wait(30)

    return respond


def silence(handler: Handler, content: bytes, start: int) -> None:
    """Send nothing until the server is shut down."""
    handler.server.ending.wait(30)


# --------------------------------------------------------------------------------------------------------------- server


class HubServer(ThreadingHTTPServer):
    """A server of repositories by id. `faults` are by file name (or `api`), one per request; `requests` records all."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, Repository]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.faults: dict[str, list[Fault]] = {}
        self.requests: list[Request] = []
        self.stalled, self.ending = threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def requests_to(self, part: str) -> list[Request]:
        """Return the requests whose path contains `part`."""
        return [request for request in self.requests if part in request.path]


@contextmanager
def hub(repositories: dict[str, Repository]) -> Iterator[HubServer]:
    """Run a server in a thread of this process."""
    with HubServer(repositories) as server:
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        try:
            yield server
        finally:
            server.ending.set()
            server.shutdown()
            thread.join()
