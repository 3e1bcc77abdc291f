"""The page's server: the socket it listens on, its start and its end."""

import asyncio
import errno
import os
import secrets
import socket
from pathlib import Path

import torch
import uvicorn

from glassgpt.playground.model_pool import Catalog, ModelPool
from glassgpt.playground.routes import Api
from glassgpt.playground.security import LOOPBACK_HOSTS, AccessPolicy
from glassgpt.utils.browser import open_in_browser
from glassgpt.utils.errors import UserError

PORT = 7860
PORTS_TRIED = 20
MAX_HEADERS = 16 << 10  # bytes of a request's address and headers
MAX_CONNECTIONS = 256  # beyond it, requests are answered with 503


def bind(host: str | None, port: int | None) -> tuple[socket.socket, AccessPolicy]:
    """Listen on `host`, by default on this machine only. Raises `UserError` if it is not an address of this machine."""
    name = "127.0.0.1" if host is None else host
    try:
        family, _, _, _, (ip, *_) = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:  # UnicodeError: too long for a name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host!r} is not a name or address of this machine ({reason})") from None
    listener = _listen(family, ip, port)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # without it, answers wait 40 ms for an ACK
    number: int = listener.getsockname()[1]
    # Not `localhost`: that may resolve to ::1 first, where another program may listen.
    shown = socket.gethostname() if name in ("0.0.0.0", "::") else name
    hosts = LOOPBACK_HOSTS if host is None else ("*",)  # others may know this machine by any name or address
    url = f"http://{f'[{shown}]' if ':' in shown else shown}:{number}/"
    return listener, AccessPolicy(secrets.token_urlsafe(32), f"glassgpt-{number}", url, hosts)


def _listen(family: socket.AddressFamily, ip: str | int, port: int | None) -> socket.socket:
    """A socket that listens on a port, by default the first free one from `PORT` on. Raises `UserError` if taken."""
    for number in range(PORT, PORT + PORTS_TRIED) if port is None else [port]:
        try:
            return socket.create_server((ip, number), family=family, backlog=256)
        except OSError as error:
            if port is not None or error.errno != errno.EADDRINUSE:
                reason = os.strerror(error.errno or 0).lower()
                raise UserError(f"cannot listen on {ip}, port {number}: {reason}") from None
    raise UserError(f"ports {PORT} to {PORT + PORTS_TRIED - 1} are all taken: choose another with --port N")


class PlayServer(uvicorn.Server):
    """uvicorn's server, but it loads the first model and does not wait for open event streams when it ends."""

    def __init__(self, pool: ModelPool, policy: AccessPolicy) -> None:
        self.api = Api(pool, policy)
        self.login_file: Path | None = None  # removed when the server ends
        self._pool = pool
        config = uvicorn.Config(
            self.api.app(), http="h11", ws="none", loop="asyncio", lifespan="off", proxy_headers=False,
            log_config=None, log_level="critical",  # not clients' mistakes; `error_response` prints bugs' tracebacks
            limit_concurrency=MAX_CONNECTIONS, h11_max_incomplete_event_size=MAX_HEADERS,
            server_header=False, timeout_graceful_shutdown=2,
        )  # fmt: skip
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # The page will ask for the first model, and show the error if it fails.
        self._preload = asyncio.ensure_future(self._pool.get(0, None))
        self._preload.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.login_file is not None:
            self.login_file.unlink(missing_ok=True)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await super().shutdown(sockets)
        # Finish the current computation and drop the waiting ones.
        await asyncio.to_thread(self._pool.executor.shutdown, wait=True, cancel_futures=True)


def play(references: list[str], *, device: torch.device, host: str | None, port: int | None, browser: bool) -> None:
    """Serve the page over models and runs, or over every run in ./runs, until interrupted. Raises `UserError`."""
    pool = ModelPool(Catalog(references), device)
    listener, policy = bind(host, port)
    server = PlayServer(pool, policy)
    login_url = f"{policy.url}#token={policy.token}"  # servers get no fragment, so the token reaches no log
    print(f"glassgpt: {login_url} (Ctrl-C ends it)", flush=True)  # it listens: requests wait until it runs
    server.login_file = open_in_browser(login_url) if browser else None
    server.run(sockets=[listener])
