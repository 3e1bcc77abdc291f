"""Who may use the server. Everything under /api/ needs the token that `glassgpt play` prints; the page's files do not.

Other accounts of the machine can connect to a port on localhost, hence the token. Every web page that the user has open
can send requests there, too, hence the checks of Host (DNS rebinding), Origin and content type (cross-site requests).
"""

import re
import secrets
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import DEFAULT_EXCLUDED_CONTENT_TYPES, GZipMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
MAX_BODY = 1 << 18  # bytes of a request's body
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
    "style-src 'self' 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class BusyError(HTTPException):
    """Too much is being done already; the page tries again."""

    def __init__(self, message: str) -> None:
        super().__init__(429, f"{message}; try again in a moment", {"retry-after": "1"})


@dataclass(frozen=True)
class AccessPolicy:
    """The token that requests need, and the names under which the server may be reached."""

    token: str
    cookie: str  # The cookie's name. It contains the port, because all ports of a host share their cookies.
    url: str  # of the page, without the token
    hosts: tuple[str, ...] = LOOPBACK_HOSTS  # `("*",)` accepts any name

    def is_token(self, text: str) -> bool:
        """Compare with the token in constant time."""
        return secrets.compare_digest(text.encode(errors="replace"), self.token.encode())


def guarded(app: ASGIApp, policy: AccessPolicy) -> ASGIApp:
    """ASGI middleware in front of /api/: raises `HTTPException` for requests without a token or from another site."""

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        require_same_site(request)
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        tokens = (bearer if scheme.lower() == "bearer" else "", request.cookies.get(policy.cookie, ""))
        if scope["path"] != "/api/login" and not any(map(policy.is_token, tokens)):
            raise HTTPException(401, "the token is missing or wrong: open the address that `glassgpt play` printed")
        await app(scope, receive, send)

    return guard


def require_same_site(request: Request) -> None:
    """Refuse what a page of another site or port may send, and POST without JSON, which a cross-site form can send."""
    headers = request.headers
    host, origin = headers.get("host", ""), headers.get("origin")
    is_own_origin = origin in (None, f"http://{host}", f"https://{host}")
    if not is_own_origin or headers.get("sec-fetch-site") not in (None, "same-origin", "none"):
        raise HTTPException(403, "requests from another site are refused")
    if request.method not in ("GET", "POST"):
        raise HTTPException(405, "use GET or POST", {"allow": "GET, POST"})
    content_type = headers.get("content-type", "").lower().replace('"', "")
    if request.method == "POST" and not re.fullmatch(r"application/json\s*(;\s*(charset=utf-8\s*)?)?", content_type):
        raise HTTPException(415, "the content type must be application/json")
    if request.method == "POST" and "content-encoding" in headers:
        raise HTTPException(415, "the body must not be compressed")


async def read_body(request: Request) -> bytes:
    """The body of a request. Raises `HTTPException` if it has more than `MAX_BODY` bytes, or ends too early."""
    body = bytearray()
    too_large = HTTPException(413, f"the body must be at most {MAX_BODY:,} bytes", {"connection": "close"})
    if int(request.headers.get("content-length", 0)) > MAX_BODY:  # h11 has checked that it is a number
        raise too_large
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                raise too_large
    except ClientDisconnect:
        raise HTTPException(400, "the connection ended within the body") from None
    return bytes(body)


def with_security_headers(app: ASGIApp) -> ASGIApp:
    """ASGI middleware that adds `HEADERS` to responses: the page loads only its own files, and no site embeds it."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                # Files are kept by the browser, which asks each time whether they changed.
                headers.setdefault("cache-control", "no-cache" if "etag" in headers else "no-store")
            await send(message)

        await app(scope, receive, send_with_headers)

    return wrapped


class Compression(GZipMiddleware):
    """gzip for the page's files and for JSON. Packed arrays hardly shrink, and streams must not be delayed."""

    def __init__(self, app: ASGIApp) -> None:
        excluded = (*DEFAULT_EXCLUDED_CONTENT_TYPES, "application/octet-stream", "application/x-ndjson")
        super().__init__(app, minimum_size=4096, compresslevel=3, exclude_content_types=excluded)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        encodings = Headers(scope=scope).get("accept-encoding", "").lower()
        is_refused = re.search(r"gzip\s*;\s*q=0(\.0*)?\s*(,|$)", encodings)  # Starlette takes that for a yes
        await (self.app if is_refused else super().__call__)(scope, receive, send)
