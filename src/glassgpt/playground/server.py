"""The page's server: where it listens, for how long a client may keep it waiting, and how it ends."""

import asyncio
import errno
import os
import secrets
import socket
import sys
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from glassgpt.playground.assets import page_files
from glassgpt.playground.catalog import Offers, offers_for
from glassgpt.playground.model_pool import Workshop
from glassgpt.playground.routes import create_app
from glassgpt.playground.security import LOOPBACK_NAMES, MOST_HEAD, Application, Door
from glassgpt.utils.errors import UserError, is_out_of_memory

PORT = 7860
PORTS_TRIED = 20
MOST_CONNECTIONS = 128
"""Beyond it the one that has kept the server waiting longest is closed, so that a flood closes itself."""
HEAD_SECONDS = 10.0
"""For a request's first lines to be here, from the connection's beginning or the answer before."""
STALL_SECONDS = 20.0
"""In which a client must take something of what is sent."""
LOOK_SECONDS = 2.0


class Connection(H11Protocol):
    """A connection that ends when its client keeps it waiting. (uvicorn itself waits for ever: for a first request, for a slow reader.)"""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._idle_since: float | None = self.loop.time()
        self._moved_at, self._unsent = self.loop.time(), 0
        self._look = self.loop.call_later(LOOK_SECONDS, self._check)
        there = [one for one in self.connections if isinstance(one, Connection) and not one.transport.is_closing()]
        if len(there) > MOST_CONNECTIONS:
            min(there, key=lambda one: one.waits_since).transport.abort()

    @property
    def waits_since(self) -> float:
        """Since when it is the client's turn; the end of time where it is the server's."""
        if self._idle_since is not None:
            return self._idle_since
        return self._moved_at if self.transport.get_write_buffer_size() else float("inf")

    def connection_lost(self, exc: Exception | None) -> None:
        self._look.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._idle_since = None

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def _check(self) -> None:
        now, unsent = self.loop.time(), self.transport.get_write_buffer_size()
        if unsent == 0 or unsent < self._unsent:
            self._moved_at = now
        self._unsent = unsent
        late = self._idle_since is not None and not unsent and now - self._idle_since > HEAD_SECONDS
        if late or now - self._moved_at > STALL_SECONDS:
            self.transport.abort()
        else:
            self._look = self.loop.call_later(LOOK_SECONDS, self._check)


class PlayServer(uvicorn.Server):
    """uvicorn's server, which loads the first model once it listens, and ends at once."""

    def __init__(self, config: uvicorn.Config, workshop: Workshop, listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._workshop = workshop
        self._listening = listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, tell so, and begin to load the first offer."""
        await super().startup(sockets)
        self._listening()
        self._first = asyncio.create_task(self._load_first())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams, then the rest."""
        self._first.cancel()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await super().shutdown(sockets)
        await asyncio.to_thread(self._workshop.close)

    async def _load_first(self) -> None:
        if not len(self._workshop.offers) or (
            self._workshop.offers[0].run and not self._workshop.offers[0].checkpoints()
        ):
            return
        try:
            await self._workshop.held(0, None)
        except Exception as error:
            if not isinstance(error, UserError) and not is_out_of_memory(error):
                raise
            print(f"glassgpt: warning: {error}", file=sys.stderr)


@dataclass(frozen=True)
class Address:
    """Where the server listens, and who is let in."""

    listener: socket.socket
    door: Door
    url: str


def bind(host: str | None, port: int | None) -> Address:
    """Listen on this machine alone, or on `host`: then with a token. Without a port, on the first free one from `PORT` on.

    Raises `UserError` where that cannot be done.
    """
    listener = _listen(host or "127.0.0.1", port)
    number: int = listener.getsockname()[1]
    # The address and not `localhost`: that may be ::1 first, where another program may listen.
    shown = "127.0.0.1" if host is None else socket.gethostname() if host in ("0.0.0.0", "::") else host
    url = f"http://{f'[{shown}]' if ':' in shown else shown}:{number}/"
    if host is None:
        return Address(listener, Door(), url)
    names = LOOPBACK_NAMES | {name.lower() for name in (host, socket.gethostname(), socket.getfqdn())}
    token = secrets.token_urlsafe(32)
    return Address(
        listener, Door(names, any_address=True, token=token, cookie=f"glassgpt-{number}"), f"{url}?token={token}"
    )


def _listen(host: str, port: int | None) -> socket.socket:
    ports = range(PORT, PORT + PORTS_TRIED) if port is None else [port]
    try:
        family, _, _, _, (address, *_) = socket.getaddrinfo(
            host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UserError(f"--host {host} is no name or address of this machine ({error.strerror})") from None
    for number in ports:
        # With its protocol named, or asyncio leaves Nagle's algorithm on, and each answer waits 40 ms for an acknowledgement.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, number))
            listener.listen(256)
            return listener
        except OSError as error:
            listener.close()
            reason = error
            if not _is_taken(error):
                break
    if port is None and _is_taken(reason):
        raise UserError(f"the ports {PORT} to {PORT + PORTS_TRIED - 1} are all taken: give --port N")
    raise UserError(f"cannot listen on {host}, port {number}: {(reason.strerror or str(reason)).lower()}")


def _is_taken(error: OSError) -> bool:
    return error.errno == errno.EADDRINUSE


def serve(offers: Offers, device: torch.device, address: Address, listening: Callable[[], None]) -> None:
    """Serve the page until the process is interrupted. `listening` is called once it can be opened."""
    workshop = Workshop(offers, device)
    server_for(create_app(workshop, page_files(), address.door), workshop, listening).run(sockets=[address.listener])


def server_for(app: Application, workshop: Workshop, listening: Callable[[], None]) -> PlayServer:
    """A server with the bounds of this module."""
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        loop="asyncio",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level="critical",  # what a client does wrong is no news; the guard tells of defects
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=MOST_HEAD,
        timeout_graceful_shutdown=2,
    )
    return PlayServer(config, workshop, listening)


def has_screen() -> bool:
    """Whether a browser can open a window: without one, Python would open one that runs in this terminal."""
    return not sys.platform.startswith("linux") or any(
        name in os.environ for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    )


def play(
    references: list[str],
    *,
    device: torch.device,
    host: str | None,
    port: int | None,
    browser: bool,
    say: Callable[[str], Any],
) -> None:
    """Open the page over models and runs, or over every run in ./runs, and serve it until interrupted. Raises `UserError`."""
    offers = offers_for(references)
    address = bind(host, port)

    def listening() -> None:
        say(f"glassgpt: {address.url} (Ctrl-C ends it)")
        if (
            browser and address.door.token is None and has_screen()
        ):  # a token in the browser's command line could be read by others
            asyncio.get_running_loop().run_in_executor(None, webbrowser.open, address.url)

    serve(offers, device, address, listening)
