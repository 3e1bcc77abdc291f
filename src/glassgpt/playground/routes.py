"""The ASGI application: which handler answers which address, and how results and errors become responses."""

import asyncio
import functools
import os
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
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

from glassgpt.playground import event_stream, handlers, schemas
from glassgpt.playground.handlers import Answer
from glassgpt.playground.model_pool import Held, Workshop
from glassgpt.playground.security import AccessPolicy, ApiGuard, Compression, SecurityHeaders, read_body
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.utils.errors import UserError, is_out_of_memory
from glassgpt.utils.json_text import json_text

T = TypeVar("T")

MAX_ERROR = 400
"""Characters of an error's text, which may quote the request."""
MAX_FOLLOWERS = 16
"""Event streams at once: one more ends the oldest, whose page reconnects."""
POLL_SECONDS = 0.5
"""Between two looks at a run's files."""
HEARTBEAT_SECONDS = 10.0

MODEL_HANDLERS: dict[str, tuple[type[schemas.Question], Callable[[Held, Any], Answer]]] = {
    "model": (schemas.Question, handlers.model_facts),
    "vocabulary": (schemas.Question, handlers.vocabulary),
    "tokens": (schemas.CutQuestion, handlers.tokens),
    "merges": (schemas.MergesQuestion, handlers.merges),
    "head_scores": (schemas.Question, handlers.scored_heads),
    "map": (schemas.TableQuestion, handlers.table_map),
    "near": (schemas.NearQuestion, handlers.near),
    "weight": (schemas.PictureQuestion, handlers.weight),
    "spectrum": (schemas.WeightQuestion, handlers.spectrum),
    "gradients": (schemas.TextQuestion, handlers.gradients),
}
"""POST /api/NAME for results that need only the model."""

CAPTURE_HANDLERS: dict[str, tuple[type[schemas.SeenQuestion], Callable[[Held, Any, handlers.Capturing], Answer]]] = {
    "attention": (schemas.SeenQuestion, handlers.attention),
    "predictions": (schemas.SeenQuestion, handlers.expectations),
    "head": (schemas.HeadQuestion, handlers.head),
    "vectors": (schemas.HeadQuestion, handlers.vectors),
    "attribution": (schemas.AttributionQuestion, handlers.attribution),
    "next": (schemas.NextQuestion, handlers.next_logits),
}
"""POST /api/NAME for results that need the activations over a text."""


def create_app(api: "Api", policy: AccessPolicy) -> ASGIApp:
    """The whole application, access control included."""
    files = page_files()
    app = Starlette(
        routes=[
            Route("/", PageFiles({"": files["index.html"]}), methods=["GET"]),
            Mount("/static", PageFiles(files)),
            Mount("/api", routes=api.routes(), middleware=[Middleware(ApiGuard, policy)]),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=list(policy.hosts), www_redirect=False),
            Middleware(Compression),
        ],
        exception_handlers={
            HTTPException: error_response,
            UserError: error_response,
            ClientGoneError: error_response,
            Exception: error_response,
        },
    )
    return SecurityHeaders(app)


# --- files ------------------------------------------------------------------------------------------------------------


class PageFiles(StaticFiles):
    """The page's files, listed at the start: a request's path is a key in this list and never reaches the file system."""

    def __init__(self, files: dict[str, Path]) -> None:
        super().__init__()
        self._files = files

    def lookup_path(self, path: str) -> tuple[str, os.stat_result | None]:
        file = self._files.get("" if path == "." else path)
        return ("", None) if file is None else (str(file), file.stat())

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers["cache-control"] = "no-cache"  # kept by the browser, which asks each time whether it changed
        return response


def page_files() -> dict[str, Path]:
    """Everything in `static/` by its path below it (`views/text.js`), and Plotly out of its installed package."""
    root = Path(str(resources.files(__package__) / "static"))
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    return {**files, "plotly.js": Path(str(resources.files("plotly") / "package_data" / "plotly.min.js"))}


# --- errors -----------------------------------------------------------------------------------------------------------


class ClientGoneError(Exception):
    """The client disconnected before its answer was ready."""


async def error_response(request: Request, error: Exception) -> Response:
    """`{"error": message}`. A `UserError` is the client's mistake; the traceback of a bug goes to standard error."""
    status, headers = 400, None
    if isinstance(error, HTTPException):
        status, headers = error.status_code, error.headers
    elif is_out_of_memory(error):
        status = 507
    elif not isinstance(error, UserError | ClientGoneError):
        status = 500
        traceback.print_exception(error, file=sys.stderr)
    return Response(error_body(error), status, headers, media_type="application/json")


def error_body(error: Exception) -> str:
    """The JSON that describes an exception to the page."""
    if isinstance(error, UserError | HTTPException):
        message = error.detail if isinstance(error, HTTPException) else str(error)
    elif is_out_of_memory(error):
        message = "out of memory: use a smaller model or a shorter text, or restart `glassgpt play` with --device cpu"
    else:
        message = f"internal error ({type(error).__name__}): see the terminal that runs `glassgpt play`"
    return json_text({"error": message if len(message) <= MAX_ERROR else message[:MAX_ERROR] + "…"})


# --- the API ----------------------------------------------------------------------------------------------------------


class Api:
    """The endpoints under /api/."""

    def __init__(self, pool: Workshop, policy: AccessPolicy) -> None:
        self._pool = pool
        self._policy = policy
        self.followers: list[asyncio.Event] = []

    def routes(self) -> list[Route]:
        """All of them."""
        get = {"/offers": self._offers, "/history": self._history, "/snapshot": self._snapshot, "/events": self._events}
        post: dict[str, Any] = {"/lens": self._lens, "/write": self._write, "/login": self._login}
        for name, (schema, handler) in MODEL_HANDLERS.items():
            post[f"/{name}"] = functools.partial(self._about_model, schema, handler)
        for name, (capture_schema, capture_handler) in CAPTURE_HANDLERS.items():
            post[f"/{name}"] = functools.partial(self._about_text, capture_schema, capture_handler)
        return [
            *(Route(path, endpoint, methods=["GET"]) for path, endpoint in get.items()),
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in post.items()),
            Route("/login", self._session, methods=["GET"]),
        ]

    # access

    async def _login(self, request: Request) -> Response:
        """Exchange the token for a cookie, which scripts cannot read."""
        body = schemas.read_question(schemas.LoginRequest, await read_body(request))
        if not self._policy.is_token(body.token):
            raise HTTPException(401, "the token is wrong: open the address that `glassgpt play` printed")
        return Response(status_code=204, headers={"set-cookie": self._policy.set_cookie()})

    async def _session(self, request: Request) -> Response:
        """204 if the request has the token, otherwise 401."""
        return Response(status_code=204 if self._policy.admits(request) else 401)

    # models

    async def _offers(self, request: Request) -> Response:
        if request.query_params:
            raise UserError("this address takes no parameters")
        offers = await self._pool.reading.ask(self._pool.offers.told)
        limits = {
            "tokens": schemas.MOST_TOKENS,
            "samples": schemas.MOST_SAMPLES,
            "new_tokens": schemas.MOST_NEW_TOKENS,
        }
        device = str(self._pool.device)
        return _response({"version": version("glassgpt"), "device": device, "offers": offers, "limits": limits})

    async def _about_model(
        self, schema: type[schemas.Question], handler: Callable[[Held, Any], Answer], request: Request
    ) -> Response:
        body, model = await self._read(schema, request)
        return _response(await unless_gone(request, self._pool.computing.ask(lambda: handler(model, body))))

    async def _about_text(
        self,
        schema: type[schemas.SeenQuestion],
        handler: Callable[[Held, Any, handlers.Capturing], Answer],
        request: Request,
    ) -> Response:
        body, model = await self._read(schema, request)
        captured = handlers.seen_by(self._pool.captures, model)
        return _response(await unless_gone(request, self._pool.computing.ask(lambda: handler(model, body, captured))))

    async def _lens(self, request: Request) -> Response:
        body, model = await self._read(schemas.LensQuestion, request)
        captured = handlers.seen_by(self._pool.captures, model)
        work = self._pool.compute_in_turns(lambda: handlers.lens(model, body, captured))
        return _response(await unless_gone(request, work))

    async def _write(self, request: Request) -> Response:
        body, model = await self._read(schemas.WriteQuestion, request)
        parts = self._pool.stream(lambda: handlers.writing(model, body))
        first = await unless_gone(
            request, anext(parts)
        )  # before the status is sent: it raises the errors of the request
        return StreamingResponse(_json_lines(first, parts), media_type="application/x-ndjson")

    async def _read(self, schema: type[schemas.Q], request: Request) -> tuple[schemas.Q, Held]:
        """The request's body and the model that it names."""
        if request.query_params:
            raise UserError("this address takes no parameters")
        body = await asyncio.to_thread(schemas.read_question, schema, await read_body(request))
        model = await unless_gone(request, self._pool.held(body.model, getattr(body, "step", None)))
        return body, model

    # runs

    def _run(self, query: schemas.RunQuestion) -> RunDirectory:
        offer = self._pool.offers[query.model]
        if offer.run is None:
            raise UserError(f"{offer.name} is not a run: it has no history")
        return offer.run

    async def _history(self, request: Request) -> Response:
        run = self._run(schemas.read_parameters(schemas.RunQuestion, request.query_params.multi_items()))
        return await self._pool.reading.ask(lambda: _response(event_stream.history(run)))

    async def _snapshot(self, request: Request) -> Response:
        query = schemas.read_parameters(schemas.SnapshotQuestion, request.query_params.multi_items())
        run = self._run(query)
        return await self._pool.reading.ask(lambda: _response(event_stream.snapshot(run, query.step)))

    async def _events(self, request: Request) -> Response:
        parameters = request.query_params.multi_items()
        after = [value for name, value in parameters if name == "after"]
        query = schemas.read_parameters(schemas.RunQuestion, [pair for pair in parameters if pair[0] != "after"])
        cursor = request.headers.get("last-event-id") or (after[-1] if after else None)
        run = self._run(query)
        follower = await self._pool.reading.ask(lambda: event_stream.Follower(run, cursor))
        return StreamingResponse(self._follow(follower), media_type="text/event-stream")

    async def _follow(self, follower: event_stream.Follower) -> AsyncIterator[str]:
        """A run's events until the client leaves or `MAX_FOLLOWERS` newer ones came."""
        ended = asyncio.Event()
        self.followers.append(ended)
        if len(self.followers) > MAX_FOLLOWERS:
            self.followers.pop(0).set()
        quiet = 0.0
        yield "retry: 2000\n\n"
        try:
            while not ended.is_set():
                events = await asyncio.to_thread(lambda: _server_sent_events(follower.look()))
                quiet = 0.0 if events else quiet + POLL_SECONDS
                if events:
                    yield f"{events}id: {follower.cursor}\n\n"
                elif quiet >= HEARTBEAT_SECONDS:
                    quiet = 0.0
                    yield ": heartbeat\n\n"
                with suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), POLL_SECONDS)
        finally:
            with suppress(ValueError):
                self.followers.remove(ended)


def _server_sent_events(events: list[event_stream.Event]) -> str:
    return "".join(f"event: {name}\ndata: {json_text(value)}\n\n" for name, value in events)


async def _json_lines(first: list[dict[str, Any]], parts: AsyncIterator[list[dict[str, Any]]]) -> AsyncIterator[str]:
    """Objects as lines of JSON. If an error occurs, the last line describes it: the status has been sent long before."""
    yield "".join(f"{json_text(item)}\n" for item in first)
    try:
        async for part in parts:
            yield "".join(f"{json_text(item)}\n" for item in part)
    except Exception as error:
        if not isinstance(error, UserError | HTTPException) and not is_out_of_memory(error):
            traceback.print_exception(error, file=sys.stderr)
        yield f"{error_body(error)}\n"


async def unless_gone(request: Request, result: Awaitable[T]) -> T:
    """The result, unless the client disconnects first: then cancel the work and raise `ClientGoneError`. The body has been read."""
    work = asyncio.ensure_future(result)
    disconnect = asyncio.ensure_future(request.receive())  # after the body comes nothing else
    try:
        await asyncio.wait({work, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGoneError
        return work.result()
    finally:
        work.cancel()
        disconnect.cancel()


def _response(value: Answer) -> Response:
    if isinstance(value, bytes):
        return Response(value, media_type="application/octet-stream")
    return Response(json_text(value), media_type="application/json")
