"""What the server answers, address by address. `guard` has looked at every request before."""

import asyncio
import functools
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from glassgpt.playground import event_stream as follow
from glassgpt.playground import handlers as answers
from glassgpt.playground import schemas as questions
from glassgpt.playground.assets import PLOTLY, Asset, plotly_script
from glassgpt.playground.handlers import Answer
from glassgpt.playground.model_pool import Held, Workshop
from glassgpt.playground.security import (
    Application,
    Door,
    GoneError,
    Guard,
    Receive,
    Refused,
    Scope,
    Send,
    error_body,
    explain,
)
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.utils.errors import UserError
from glassgpt.utils.json_text import json_text

T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]

MOST_FOLLOWERS = 16
LOOK_SECONDS = 0.5
"""Between two looks at a run's files."""
HEARTBEAT_SECONDS = 10.0

ABOUT_MODELS: dict[str, tuple[type[questions.Question], Callable[[Held, Any], Answer]]] = {
    "model": (questions.Question, answers.model_facts),
    "vocabulary": (questions.Question, answers.vocabulary),
    "tokens": (questions.CutQuestion, answers.tokens),
    "merges": (questions.MergesQuestion, answers.merges),
    "head_scores": (questions.Question, answers.scored_heads),
    "map": (questions.TableQuestion, answers.table_map),
    "near": (questions.NearQuestion, answers.near),
    "weight": (questions.PictureQuestion, answers.weight),
    "spectrum": (questions.WeightQuestion, answers.spectrum),
    "gradients": (questions.TextQuestion, answers.gradients),
}
"""Addresses whose answer needs the model alone."""

ABOUT_TEXTS: dict[str, tuple[type[questions.SeenQuestion], Callable[[Held, Any, answers.Capturing], Answer]]] = {
    "attention": (questions.SeenQuestion, answers.attention),
    "predictions": (questions.SeenQuestion, answers.expectations),
    "head": (questions.HeadQuestion, answers.head),
    "vectors": (questions.HeadQuestion, answers.vectors),
    "attribution": (questions.AttributionQuestion, answers.attribution),
    "next": (questions.NextQuestion, answers.next_logits),
}
"""Addresses whose answer is of what the model computes over a text."""


class Play:
    """The ASGI application behind the guard: a table of addresses, each of one method."""

    def __init__(self, workshop: Workshop, files: Mapping[str, Asset]) -> None:
        self._workshop = workshop
        self._files = files
        self._version = version("glassgpt")
        self._start = secrets.token_hex(
            8
        )  # numbers of offers are those of one start: another has other runs under them
        self._plotly: asyncio.Future[Asset] | None = None
        self._followers: list[asyncio.Event] = []
        self._endpoints: dict[str, tuple[str, Endpoint]] = {
            "/": ("GET", self._index),
            "/api/offers": ("GET", self._offers),
            "/api/lens": ("POST", self._lens),
            "/api/write": ("POST", self._write),
            "/api/history": ("GET", self._history),
            "/api/snapshot": ("GET", self._snapshot),
            "/api/events": ("GET", self._events),
        }
        for name, (question, answer) in ABOUT_MODELS.items():
            self._endpoints[f"/api/{name}"] = ("POST", functools.partial(self._about_model, question, answer))
        for name, (seen_question, seen_answer) in ABOUT_TEXTS.items():
            self._endpoints[f"/api/{name}"] = ("POST", functools.partial(self._about_text, seen_question, seen_answer))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        path: str = scope["path"]
        method, endpoint = self._endpoints.get(path, ("GET", self._file if path.startswith("/static/") else None))
        if endpoint is None:
            raise Refused(404, "there is nothing at this address")
        if request.method != method and (request.method, method) != ("HEAD", "GET"):
            raise Refused(405, f"this address takes {method}", ((b"allow", method.encode()),))
        if request.headers.get("x-glassgpt-start", self._start) != self._start:
            raise Refused(409, "the server was started anew meanwhile: load the page again")
        response = await endpoint(request)
        await response(scope, receive, send)

    # --- files --------------------------------------------------------------------------------------------------------------

    async def _index(self, request: Request) -> Response:
        return await self._served(request, self._files.get("index.html"))

    async def _file(self, request: Request) -> Response:
        name = request.scope["path"].removeprefix("/static/")
        return await self._served(request, await self._plotly_script() if name == PLOTLY else self._files.get(name))

    async def _plotly_script(self) -> Asset:
        if self._plotly is None:
            self._plotly = asyncio.ensure_future(asyncio.to_thread(plotly_script))
        return await asyncio.shield(self._plotly)

    async def _served(self, request: Request, asset: Asset | None) -> Response:
        if asset is None:
            raise Refused(404, "there is nothing at this address")
        headers = {
            "etag": asset.etag,
            "cache-control": "no-cache",
            "vary": "accept-encoding",
        }  # kept, but asked for each time
        if asset.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        content = asset.content
        if "gzip" in request.headers.get("accept-encoding", ""):
            compressed = await asyncio.to_thread(lambda: asset.compressed)
            if compressed is not None:
                content, headers["content-encoding"] = compressed, "gzip"
        return Response(content, media_type=asset.type, headers=headers)

    # --- models -------------------------------------------------------------------------------------------------------------

    async def _offers(self, request: Request) -> Response:
        _require_no_parameters(request)
        told = await self._workshop.reading.ask(self._workshop.offers.told)
        limits = {
            "tokens": questions.MOST_TOKENS,
            "samples": questions.MOST_SAMPLES,
            "new_tokens": questions.MOST_NEW_TOKENS,
        }
        return _json(
            {
                "version": self._version,
                "start": self._start,
                "device": str(self._workshop.device),
                "offers": told,
                "limits": limits,
            }
        )

    async def _about_model(
        self, kind: type[questions.Question], answer: Callable[[Held, Any], Answer], request: Request
    ) -> Response:
        question, held = await self._asked(kind, request)
        return _answered(await _unless_gone(request, self._workshop.computing.ask(lambda: answer(held, question))))

    async def _about_text(
        self,
        kind: type[questions.SeenQuestion],
        answer: Callable[[Held, Any, answers.Capturing], Answer],
        request: Request,
    ) -> Response:
        question, held = await self._asked(kind, request)
        seen = answers.seen_by(self._workshop.captures, held)
        return _answered(
            await _unless_gone(request, self._workshop.computing.ask(lambda: answer(held, question, seen)))
        )

    async def _lens(self, request: Request) -> Response:
        question, held = await self._asked(questions.LensQuestion, request)
        seen = answers.seen_by(self._workshop.captures, held)
        work = self._workshop.compute_in_turns(lambda: answers.lens(held, question, seen))
        return _answered(await _unless_gone(request, work))

    async def _write(self, request: Request) -> Response:
        question, held = await self._asked(questions.WriteQuestion, request)
        parts = self._workshop.stream(lambda: answers.writing(held, question))
        first = await _unless_gone(request, anext(parts))  # what is refused is refused before a status is sent
        return StreamingResponse(_lines(first, parts), media_type="application/x-ndjson")

    # --- runs ---------------------------------------------------------------------------------------------------------------

    def _run(self, question: questions.RunQuestion) -> RunDirectory:
        offer = self._workshop.offers[question.model]
        if offer.run is None:
            raise UserError(f"{offer.name} is a model and no run: nothing is known of how it learned")
        return offer.run

    async def _history(self, request: Request) -> Response:
        run = self._run(questions.read_parameters(questions.RunQuestion, request.query_params.multi_items()))
        return Response(
            await self._workshop.reading.ask(lambda: json_text(follow.history(run))), media_type="application/json"
        )

    async def _snapshot(self, request: Request) -> Response:
        question = questions.read_parameters(questions.SnapshotQuestion, request.query_params.multi_items())
        run = self._run(question)
        return _answered(await self._workshop.reading.ask(lambda: follow.snapshot(run, question.step)))

    async def _events(self, request: Request) -> Response:
        parameters = request.query_params.multi_items()
        after = [value for name, value in parameters if name == "after"]
        question = questions.read_parameters(
            questions.RunQuestion, [(name, value) for name, value in parameters if name != "after"]
        )
        cursor = request.headers.get("last-event-id") or (after[-1] if after else None)
        run = self._run(question)
        follower = await self._workshop.reading.ask(lambda: follow.Follower(run, cursor))
        return StreamingResponse(self._followed(follower), media_type="text/event-stream")

    async def _followed(self, follower: follow.Follower) -> AsyncIterator[bytes]:
        """A run's events, for as long as the client stays and no more than `MOST_FOLLOWERS` others come: it can come again."""
        ended = asyncio.Event()
        self._followers.append(ended)
        if len(self._followers) > MOST_FOLLOWERS:
            self._followers.pop(0).set()
        quiet = 0.0
        yield b"retry: 2000\n\n"
        try:
            while not ended.is_set():
                events = await asyncio.to_thread(lambda: [_event(name, value) for name, value in follower.look()])
                quiet = 0.0 if events else quiet + LOOK_SECONDS
                if events:
                    yield b"".join(events) + f"id: {follower.cursor}\n\n".encode()
                elif quiet >= HEARTBEAT_SECONDS:
                    quiet = 0.0
                    yield b": still here\n\n"
                with suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), LOOK_SECONDS)
        finally:
            with suppress(ValueError):
                self._followers.remove(ended)

    async def _asked(self, kind: type[questions.Q], request: Request) -> tuple[questions.Q, Held]:
        _require_no_parameters(request)
        question = await asyncio.to_thread(questions.read_question, kind, await request.body())
        held = await _unless_gone(request, self._workshop.held(question.model, getattr(question, "step", None)))
        return question, held


def _event(name: str, value: Any) -> bytes:
    """A server-sent event."""
    return f"event: {name}\ndata: {json_text(value)}\n\n".encode()


async def _lines(first: list[dict[str, Any]], parts: AsyncIterator[list[dict[str, Any]]]) -> AsyncIterator[bytes]:
    """Objects as lines of JSON, of which the last one is an error where there was one."""
    yield b"".join(json_text(item).encode() + b"\n" for item in first)
    try:
        async for part in parts:
            yield b"".join(json_text(item).encode() + b"\n" for item in part)
    except Exception as error:
        explain(error)
        yield error_body(error) + b"\n"


async def _unless_gone(request: Request, answer: Awaitable[T]) -> T:
    """The answer, unless the client goes away meanwhile: then it is cancelled, and `GoneError` raised."""
    await request.body()  # behind it comes nothing but the client's end
    work = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise GoneError
        return work.result()
    finally:
        work.cancel()
        gone.cancel()


def _require_no_parameters(request: Request) -> None:
    if request.scope["query_string"]:
        raise UserError("this address takes no parameters")


def _json(value: Any) -> Response:
    return Response(json_text(value), media_type="application/json")


def _answered(answer: Answer) -> Response:
    return Response(answer, media_type="application/octet-stream") if isinstance(answer, bytes) else _json(answer)


def create_app(workshop: Workshop, files: Mapping[str, Asset], door: Door) -> Application:
    """The whole application, guard included."""
    return Guard(Play(workshop, files), door)
