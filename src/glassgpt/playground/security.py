"""Who may ask, and how: the first thing that every request passes.

The page listens on this machine alone, but every web page that its user has open can send requests there. So a request must call the
server by a name of its own (else a foreign name was pointed here: DNS rebinding), must not come from another site's page, and changes
nothing but by POST with JSON, which a foreign page cannot send without being asked first. With `--host`, where others can reach the
server, it needs a token, too.
"""

import asyncio
import ipaddress
import secrets
import sys
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from glassgpt.utils.errors import UserError, is_out_of_memory
from glassgpt.utils.json_text import json_text

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
MOST_HEAD = 16 << 10
"""Bytes of a request's address and headers."""
MOST_BODY = 1 << 18
"""Bytes of a request's body."""
BODY_SECONDS = 10.0
"""In which it must be here."""
MOST_TOLD = 400
"""Characters of an error's text: it may quote what was sent."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
]


class Refused(Exception):  # noqa: N818  it is no defect
    """A request that is not answered: the status and a line that says why."""

    def __init__(self, status: int, reason: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        super().__init__(reason)
        self.status = status
        self.headers = headers


class Busy(Refused):
    """Too much is being done already."""

    def __init__(self, reason: str) -> None:
        super().__init__(429, reason, ((b"retry-after", b"1"),))


class GoneError(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Door:
    """Who is let in."""

    names: frozenset[str] = LOOPBACK_NAMES
    """What a request may call this machine, in lower case and without a port: through a tunnel it is another one."""
    any_address: bool = False
    """Any IP address, too: a foreign name cannot be mistaken for one."""
    token: str | None = None
    cookie: str = "glassgpt"
    """Name of the cookie that keeps the token: cookies are shared by all ports of a machine."""

    def knows(self, host: str) -> bool:
        """Whether a Host header calls this machine by a name of its own."""
        try:
            parts = urlsplit(f"//{host}")
            name, _ = parts.hostname or "", parts.port
        except ValueError:
            return False
        if parts.netloc != host or parts.username is not None:
            return False
        if self.any_address:
            try:
                ipaddress.ip_address(name)
                return True
            except ValueError:
                pass
        return name in self.names

    def admits(self, given: str) -> bool:
        """Whether a token is the right one, in a time that tells nothing of it."""
        return self.token is not None and secrets.compare_digest(given.encode(errors="replace"), self.token.encode())


class Guard:
    """ASGI middleware: refuses what may not come in, reads the body within bounds, adds the headers, and answers errors as JSON."""

    def __init__(self, app: Application, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return  # a WebSocket's handshake fails
        begun = False

        async def guarded_send(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message = {**message, "headers": _with_headers(list(message.get("headers", [])))}
            await send(message)

        try:
            if (welcome := self._check(scope)) is not None:
                return await _respond(guarded_send, *welcome)
            await self._app(scope, await _with_body(scope, receive), guarded_send)
        except GoneError:
            pass
        except Exception as error:
            status, headers = explain(error)
            if (
                begun
            ):  # too late for another status: the connection ends in the middle, so that nobody takes it for whole
                raise _Cut from None
            await _respond(guarded_send, status, headers, error_body(error))

    def _check(self, scope: Scope) -> "tuple[int, list[tuple[bytes, bytes]], bytes] | None":
        """Raise `Refused` for a request that may not come in. A response, where the token is to become a cookie."""
        if scope["http_version"] not in ("1.0", "1.1"):
            raise Refused(400, "this server speaks HTTP/1.1")
        address = len(scope["raw_path"]) + len(scope["query_string"])
        if address + sum(len(name) + len(value) for name, value in scope["headers"]) > MOST_HEAD:
            raise Refused(431, f"address and headers must be at most {MOST_HEAD:,} bytes")
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        host = _single(headers, b"host")
        if host is None or not self._door.knows(host):
            raise Refused(403, "this server is not called by that name: open the address that `glassgpt play` printed")
        _check_origin(scope, headers, host)
        _check_form(scope, headers)
        return self._check_token(scope, headers)

    def _check_token(
        self, scope: Scope, headers: dict[bytes, list[bytes]]
    ) -> "tuple[int, list[tuple[bytes, bytes]], bytes] | None":
        door = self._door
        if door.token is None:
            return None
        if scope["path"] == "/" and scope["method"] == "GET":
            given = dict(parse_qsl(scope["query_string"].decode("latin-1"))).get("token")
            if given is not None and door.admits(given):
                # Lax, so that a link clicked in a mail or a notebook works: what comes from elsewhere can do no more than open the page.
                cookie = f"{door.cookie}={door.token}; Path=/; HttpOnly; SameSite=Lax"
                return 303, [(b"location", b"/"), (b"set-cookie", cookie.encode())], b""
        cookies = [
            part.strip().partition("=")
            for value in headers.get(b"cookie", [])
            for part in value.decode("latin-1").split(";")
        ]
        if not any(name == door.cookie and door.admits(value) for name, _, value in cookies):
            raise Refused(403, "the token is missing: open the address that `glassgpt play` printed, with its ?token=…")
        return None


class _Cut(Exception):  # noqa: N818
    """Ends a response that has begun; what happened has been told already."""


def _single(headers: dict[bytes, list[bytes]], name: bytes) -> str | None:
    values = headers.get(name, [])
    if len(values) > 1:
        raise Refused(400, f"there is more than one header {name.decode()}")
    return values[0].decode("latin-1").lower() if values else None


def _check_origin(scope: Scope, headers: dict[bytes, list[bytes]], host: str) -> None:
    """Another site's page is refused, and so is one of another port here; a link from there to the page itself is not."""
    origin, site = _single(headers, b"origin"), _single(headers, b"sec-fetch-site")
    if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
        raise Refused(403, "requests of another site's page are not answered")
    if site in (None, "same-origin", "none"):
        return
    opens_page = scope["method"] == "GET" and scope["path"] == "/" and _single(headers, b"sec-fetch-mode") == "navigate"
    if not opens_page or _single(headers, b"sec-fetch-dest") not in (None, "document"):
        raise Refused(403, "requests of another site's page are not answered")


def _check_form(scope: Scope, headers: dict[bytes, list[bytes]]) -> None:
    """POST comes with JSON, and other methods without a body."""
    length, coded = _single(headers, b"content-length"), b"transfer-encoding" in headers
    if scope["method"] != "POST":
        if coded or (length is not None and length.strip() != "0"):
            raise Refused(400, f"{scope['method']} takes no body")
        return
    kind, _, parameter = (_single(headers, b"content-type") or "").partition(";")
    if kind.strip() != "application/json" or parameter.strip().replace('"', "") not in ("", "charset=utf-8"):
        raise Refused(415, "the content type must be application/json")
    if b"content-encoding" in headers:
        raise Refused(415, "the body must not be compressed")
    if length is not None and (not length.isdecimal() or len(length) > 9 or int(length) > MOST_BODY):
        raise Refused(413, f"the body must be at most {MOST_BODY:,} bytes")


async def _with_body(scope: Scope, receive: Receive) -> Receive:
    """The body is read here, within its bounds of size and time; then comes what the server says, which is that the client is gone."""
    body = b""
    if scope["method"] == "POST":
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _read_body(receive)
        except TimeoutError:
            raise Refused(408, "the body did not come in time", ((b"connection", b"close"),)) from None
    given = False

    async def receive_after() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        while (message := await receive())["type"] == "http.request":  # of a GET, which has none
            pass
        return message

    return receive_after


async def _read_body(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise GoneError
        body += message.get("body", b"")
        if len(body) > MOST_BODY:
            raise Refused(413, f"the body must be at most {MOST_BODY:,} bytes", ((b"connection", b"close"),))
        if not message.get("more_body", False):
            return bytes(body)


def explain(error: Exception) -> tuple[int, list[tuple[bytes, bytes]]]:
    """The status and headers for an exception: a user's mistake is told, a defect goes to standard error with its traceback."""
    if isinstance(error, Refused):
        return error.status, list(error.headers)
    if isinstance(error, UserError):
        return 400, []
    if is_out_of_memory(error):
        return 507, []
    traceback.print_exception(error, file=sys.stderr)
    return 500, []


def error_body(error: Exception) -> bytes:
    """What the page is told of an exception."""
    if isinstance(error, Refused | UserError):
        text = str(error)
    elif is_out_of_memory(error):
        text = "not enough memory for this: take a smaller model or a shorter text, or start `glassgpt play` with --device cpu"
    else:
        text = f"a defect of glassgpt ({type(error).__name__}): see its terminal"
    return json_text({"error": text if len(text) <= MOST_TOLD else text[:MOST_TOLD] + "…"}).encode()


def _with_headers(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    given = {name.lower() for name, _ in headers}
    return [*headers, *HEADERS, *([] if b"cache-control" in given else [(b"cache-control", b"no-store")])]


async def _respond(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})
