"""The process of the unified server: it listens, announces its address, and stops at a signal.

The running edit has a short time to stop. The application is in `server`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Iterator
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from step1x_edit.errors import SettingsError
from step1x_edit.interfaces.discovery import announced, new_secret
from step1x_edit.interfaces.http import connections
from step1x_edit.interfaces.http.guard import MCP_PATH, Guard
from step1x_edit.interfaces.http.metrics import Metrics
from step1x_edit.interfaces.process import watch_signals
from step1x_edit.interfaces.server import build_routes
from step1x_edit.service.job_store import JobStore
from step1x_edit.service.service import EditService
from step1x_edit.service.wiring import build_service
from step1x_edit.settings import Settings
from step1x_edit.waiting import first_of

log = logging.getLogger(__name__)

_GRACE_S: Final = 3.0  # for the running step to end
_STANDBY_S: Final = 1.0  # between two looks whether the other server has ended
_LAST_WORDS_S: Final = 1  # for the answers of the requests that were cancelled


def serve(settings: Settings) -> None:
    """Serve until a signal comes, then end the process.

    Raises SettingsError if stored jobs or the page cannot have their place in DATA_DIR.
    """
    listener = listen(settings.host, settings.port)
    settings = connections.within_file_limit(settings)
    service = build_service(settings)
    try:
        exit_code = asyncio.run(_serve(settings, service, listener))
    except SettingsError:
        service.close()
        raise
    logging.shutdown()
    os._exit(exit_code)  # do not wait for threads that still decode or encode


async def wait_for_turn(settings: Settings) -> None:
    """Wait while another server uses DATA_DIR; its end, also by a kill, ends the wait."""
    has_said = False
    while True:
        try:
            async with JobStore(settings.data_dir):
                return
        except SettingsError as error:
            if not has_said:
                log.info("standing by: %s", error)
            has_said = True
        await asyncio.sleep(_STANDBY_S)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; ends the process with one sentence on failure."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":  # on Windows it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(connections.BACKLOG)
    except OSError as error:
        hint = "choose another HOST"
        if error.errno == errno.EADDRINUSE:
            hint = "another program listens there; stop it, or choose another PORT"
        reason = error.strerror or type(error).__name__
        sys.exit(f"Cannot listen on {host}, port {port} ({reason}): {hint}")
    return listener


async def _serve(settings: Settings, service: EditService, listener: socket.socket) -> int:
    exit_code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    watch_signals(exit_code)
    asyncio.get_running_loop().set_exception_handler(connections.LogOnce())
    metrics = Metrics(service)
    secret = new_secret()
    routes = build_routes(service, settings, metrics, secret)
    server = _Server(Guard(routes, settings, metrics.observe), settings)
    # Not done by uvicorn, which shows a traceback if the start fails.
    async with routes.router.lifespan_context(routes):
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        ready = asyncio.ensure_future(server.ready.wait())
        await first_of(serving, ready)
        if ready.done():
            with _findable(settings, listener, secret):
                await first_of(serving, exit_code)
        ready.cancel()
        server.should_exit = True
        routes.state.closing.set()
        # In a thread, so that the answers to the cancelled requests are still sent.
        await asyncio.to_thread(service.close, _GRACE_S)
        await serving
    return exit_code.result() if exit_code.done() else 1


class _Server(uvicorn.Server):
    """A uvicorn server that reports when it is ready and does not handle signals."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        config = uvicorn.Config(
            app,
            http=connections.protocol(settings),
            timeout_keep_alive=connections.idle_s(settings),
            log_config=None,
            backlog=connections.BACKLOG,
            access_log=False,  # the guard logs requests, with their ids
            lifespan="off",
            ws="none",
            proxy_headers=False,  # a client could set them to impersonate another
            server_header=False,
            timeout_graceful_shutdown=_LAST_WORDS_S,
        )
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def _findable(settings: Settings, listener: socket.socket, secret: str) -> Iterator[None]:
    """Announce the address: in the log, and to programs of this machine that may join."""
    address, port = listener.getsockname()[:2]
    # The address and not a name: another program can use the same port at the other address of
    # `localhost`, and relay our proof.
    local = _local_address(address)
    with contextlib.ExitStack() as stack:
        if local is not None and settings.enable_mcp:
            key = None if settings.api_key is None else settings.api_key.get_secret_value()
            url = _url(local, port) + MCP_PATH
            stack.enter_context(announced(settings.data_dir, url, secret, key))
        log.info("serving at %s", _url(settings.host, port))
        yield


def _local_address(host: str) -> str | None:
    """The loopback address of a server that listens at `host`, if it has one."""
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "::1"
    return host if host in ("127.0.0.1", "::1") else None


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
