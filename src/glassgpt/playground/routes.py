"""The ASGI application: which handler answers which address, and how results and errors become responses."""

import asyncio
import functools
import inspect
import os
import re
import sys
import traceback
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable
from contextlib import suppress
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from glassgpt.playground import event_stream, handlers, neurons, schemas
from glassgpt.playground.handlers import Answer
from glassgpt.playground.model_pool import ModelPool
from glassgpt.playground.security import AccessPolicy, Compression, guarded, read_body, with_security_headers
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.utils.errors import NO_THREADS, UserError, is_out_of_memory, is_out_of_threads
from glassgpt.utils.files import json_text

T = TypeVar("T")

MAX_ERROR = 400  # characters of an error's text, which may quote the request
MAX_FOLLOWERS = 16  # event streams at once: one more ends the oldest, whose page reconnects
POLL_SECONDS = 0.5  # between two looks at a run's files

HANDLERS: dict[str, Callable[..., Answer]] = {
    "model": handlers.describe_model, "vocabulary": handlers.vocabulary,
    "tokens": handlers.tokens, "merges": handlers.merges,
    "attention": handlers.attention, "head": handlers.head, "vectors": handlers.vectors, "flow": handlers.flow,
    "predictions": handlers.predict, "lens": handlers.lens, "attribution": handlers.attribution,
    "next": handlers.next_logits, "head_scores": handlers.score_heads,
    "map": handlers.table_map, "near": handlers.neighbours,
    "weight": handlers.weight, "spectrum": handlers.spectrum, "gradients": handlers.gradients,
    "neurons": neurons.neurons, "neuron": neurons.neuron,
}  # fmt: skip
"""POST /api/NAME: the function that answers it."""
STREAMS: dict[str, Callable[..., Generator[dict[str, Any]]]] = {
    "write": handlers.generate_text,
    "neuron_texts": neurons.neuron_texts,
}
"""POST /api/NAME: the generator whose objects are the lines of the answer."""


class PageFiles(StaticFiles):
    """The page's files, listed at the start: a request's path is only looked up there, never in the file system."""

    def __init__(self, files: dict[str, Path]) -> None:
        super().__init__()
        self._files = files

    def lookup_path(self, path: str) -> tuple[str, os.stat_result | None]:
        file = self._files.get("" if path == "." else path)
        return ("", None) if file is None else (str(file), file.stat())


def page_files() -> dict[str, Path]:
    """Everything in `static/` by its path below it (`views/text.js`), and Plotly out of its installed package."""
    root = Path(str(resources.files(__package__) / "static"))
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    return {**files, "plotly.js": Path(str(resources.files("plotly") / "package_data" / "plotly.min.js"))}


async def error_response(request: Request, error: Exception) -> Response:
    """`{"error": message}`. A `UserError` is the client's mistake; the traceback of a bug is printed."""
    headers = None
    if isinstance(error, HTTPException):
        status, message, headers = error.status_code, error.detail, error.headers
    elif isinstance(error, UserError):
        status, message = 400, str(error)
    elif is_out_of_memory(error):
        status, message = 507, "out of memory: use a smaller model or a shorter text, or restart with --device cpu"
    elif is_out_of_threads(error):
        status, message = 503, NO_THREADS
    else:
        traceback.print_exception(error, file=sys.stderr)
        status, message = 500, f"internal error ({type(error).__name__}): see the terminal that runs `glassgpt play`"
    body = json_text({"error": message if len(message) <= MAX_ERROR else message[:MAX_ERROR] + "…"})
    return Response(body, status, headers, media_type="application/json")


class Api:
    """The endpoints under /api/."""

    def __init__(self, pool: ModelPool, policy: AccessPolicy) -> None:
        self._pool = pool
        self._policy = policy
        self.followers = deque[event_stream.Follower](maxlen=MAX_FOLLOWERS)

    def app(self) -> ASGIApp:
        """The whole application, access control included."""
        get = {"catalog": self._catalog, "history": self._history, "snapshot": self._snapshot, "events": self._events}
        post = {"login": self._login}
        post |= {name: functools.partial(self._compute, handler) for name, handler in HANDLERS.items()}
        post |= {name: functools.partial(self._stream, handler) for name, handler in STREAMS.items()}
        methods, files = (("GET", get), ("POST", post)), page_files()
        api = [Route(f"/{name}", rows[name], methods=[method]) for method, rows in methods for name in rows]
        routes = [
            Route("/", PageFiles({"": files["index.html"]}), methods=["GET"]),
            Mount("/static", PageFiles(files)),
            Mount("/api", routes=api, middleware=[Middleware(guarded, self._policy)]),
        ]
        hosts = Middleware(TrustedHostMiddleware, allowed_hosts=list(self._policy.hosts), www_redirect=False)
        errors = dict.fromkeys((HTTPException, UserError, Exception), error_response)
        app = Starlette(routes=routes, middleware=[hosts, Middleware(Compression)], exception_handlers=errors)
        return with_security_headers(app)

    async def _login(self, request: Request) -> Response:
        """Exchange the token for a cookie, which scripts cannot read."""
        body = schemas.parse_body(schemas.LoginRequest, await read_body(request))
        if not self._policy.is_token(body.token):
            raise HTTPException(401, "the token is wrong: open the address that `glassgpt play` printed")
        response = Response(status_code=204)
        response.set_cookie(self._policy.cookie, self._policy.token, httponly=True, samesite="strict")
        return response

    async def _catalog(self, request: Request) -> Response:
        entries = await asyncio.to_thread(self._pool.catalog.describe)
        limits = {"tokens": schemas.MAX_TOKENS, "samples": schemas.MAX_SAMPLES, "new_tokens": schemas.MAX_NEW_TOKENS}
        device = str(self._pool.device)
        return _response({"version": version("glassgpt"), "device": device, "entries": entries, "limits": limits})

    async def _compute(self, handler: Callable[..., Answer], request: Request) -> Response:
        arguments = await self._arguments(handler, request)
        return _response(await unless_gone(request, self._pool.compute(lambda: handler(**arguments))))

    async def _stream(self, handler: Callable[..., Generator[dict[str, Any]]], request: Request) -> Response:
        parts = self._pool.stream(handler(**await self._arguments(handler, request)))
        first = await unless_gone(request, anext(parts))  # raises the request's errors before the status is sent
        return StreamingResponse(_json_lines(request, first, parts), media_type="application/x-ndjson")

    async def _arguments(self, handler: Callable[..., Any], request: Request) -> dict[str, Any]:
        """A handler's arguments: the fields of the request's body, and the model that it names."""
        body = await asyncio.to_thread(schemas.parse_body, schemas.schema_of(handler), await read_body(request))
        loaded = await unless_gone(request, self._pool.get(body.model, body.step))
        values = {"loaded": loaded, "request": body, **vars(body)}
        return {name: values[name] for name in inspect.signature(handler).parameters}

    def _run(self, request: Request, *names: str, optional: str = "") -> RunDirectory:
        """The run whose number is the parameter `model`. Raises `UserError` unless the others are there as numbers."""
        wanted = ["model", *names]
        parameters = [pair for pair in request.query_params.multi_items() if pair[0] != optional]
        are_numbers = all(re.fullmatch("[0-9]{1,18}", text) for _, text in parameters)
        if sorted(name for name, _ in parameters) != sorted(wanted) or not are_numbers:
            raise UserError(f"this address takes whole numbers as parameters: {', '.join(wanted)}")
        entry = self._pool.catalog[int(request.query_params["model"])]
        if entry.run is None:
            raise UserError(f"{entry.reference} is not a run: it has no history")
        return entry.run

    async def _history(self, request: Request) -> Response:
        run = self._run(request)
        return await asyncio.to_thread(lambda: _response(event_stream.history(run)))

    async def _snapshot(self, request: Request) -> Response:
        run = self._run(request, "step")
        return _response(await asyncio.to_thread(event_stream.snapshot, run, int(request.query_params["step"])))

    async def _events(self, request: Request) -> Response:
        run = self._run(request, optional="after")
        cursor = request.headers.get("last-event-id") or request.query_params.get("after")
        follower = await asyncio.to_thread(event_stream.Follower, run, cursor)
        return StreamingResponse(self._follow(follower), media_type="text/event-stream")

    async def _follow(self, follower: event_stream.Follower) -> AsyncIterator[str]:
        """A run's events until the client leaves or `MAX_FOLLOWERS` newer ones came."""
        self.followers.append(follower)
        yield "retry: 2000\n\n"
        try:
            while follower in self.followers:
                events = await asyncio.to_thread(lambda: _server_sent_events(follower.poll()))
                yield f"{events}id: {follower.cursor}\n\n" if events else ": heartbeat\n\n"
                await asyncio.sleep(POLL_SECONDS)
        finally:
            with suppress(ValueError):
                self.followers.remove(follower)


def _server_sent_events(events: Iterable[tuple[str, Any]]) -> str:
    return "".join(f"event: {name}\ndata: {json_text(value)}\n\n" for name, value in events)


async def _json_lines(request: Request, part: list[T], parts: AsyncIterator[list[T]]) -> AsyncIterator[bytes]:
    """Objects as lines of JSON. The last line describes an error, if one occurs: the status has already been sent."""
    try:
        while part:
            yield "".join(f"{json_text(item)}\n" for item in part).encode()
            part = await anext(parts, [])
    except Exception as error:
        yield bytes((await error_response(request, error)).body) + b"\n"


async def unless_gone(request: Request, result: Awaitable[T]) -> T:
    """The result. If the client disconnects first, cancel the work and raise `HTTPException`."""
    work = asyncio.ensure_future(result)
    disconnect = asyncio.ensure_future(request.receive())  # the body has been read: nothing else comes
    try:
        await asyncio.wait({work, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise HTTPException(400, "the client disconnected")
        return work.result()
    finally:
        work.cancel()
        disconnect.cancel()


def _response(value: Answer) -> Response:
    if isinstance(value, bytes):
        return Response(value, media_type="application/octet-stream")
    return Response(json_text(value), media_type="application/json")
