"""The unified server on a free port, with a token, for the duration of a test."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import uvicorn
from fastmcp import FastMCP
from starlette.types import ASGIApp

from step1x_edit.interfaces.discovery import announced
from step1x_edit.interfaces.http import connections
from step1x_edit.interfaces.http.guard import Guard
from step1x_edit.interfaces.http.metrics import Metrics
from step1x_edit.interfaces.server import build_routes
from step1x_edit.service.service import EditService
from step1x_edit.settings import Settings

TOKEN = "a-token-of-the-tests"
SECRET = "a-secret-of-the-tests"


class _Server(uvicorn.Server):
    """A server that reports when it is ready; `should_exit` stops it."""

    def __init__(self, app: ASGIApp, settings: Settings, host: str) -> None:
        config = uvicorn.Config(
            app,
            http=connections.protocol(settings),
            timeout_keep_alive=connections.idle_s(settings),
            host=host,
            port=0,
            log_config=None,
            lifespan="on",
            timeout_graceful_shutdown=1,
        )
        super().__init__(config)
        self.ready = threading.Event()

    async def startup(self, sockets: object = None) -> None:
        await super().startup()
        self.ready.set()


@contextlib.contextmanager
def running(
    app: ASGIApp, settings: Settings | None = None, host: str = "127.0.0.1"
) -> Iterator[str]:
    """Serve an app and yield its address."""
    server = _Server(app, settings or Settings(_env_file=None), host)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert server.ready.wait(240)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    finally:
        server.should_exit = True
        thread.join(60)


def guarded(service: EditService, settings: Settings, secret: str = "") -> Guard:
    """Everything that the unified server serves, behind its guard."""
    metrics = Metrics(service)
    return Guard(build_routes(service, settings, metrics, secret), settings, metrics.observe)


@contextlib.contextmanager
def serving(service: EditService, **settings: object) -> Iterator[str]:
    """Serve everything that the unified server serves and yield its address.

    By default with TOKEN, without a rate limit, and in a separate data folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = {"api_key": TOKEN, "data_dir": folder, "rate_limit": 0, **settings}
        chosen = Settings(_env_file=None, **given)  # type: ignore
        with running(guarded(service, chosen, SECRET), chosen, chosen.host) as url:
            yield url


@contextlib.contextmanager
def listening(service: EditService) -> Iterator[str]:
    """The same, but yield the URL of its MCP endpoint."""
    with serving(service) as url:
        yield f"{url}/mcp"


@contextlib.contextmanager
def listening_stranger(mcp: FastMCP) -> Iterator[str]:
    """Serve a foreign MCP server, without a token, and yield its URL."""
    with running(mcp.http_app(path="/mcp")) as url:
        yield f"{url}/mcp"


@contextlib.contextmanager
def announcing(service: EditService, data_dir: Path) -> Iterator[str]:
    """`listening`, announced in `data_dir` for clients to find, although in our own process."""
    with listening(service) as url, announced(data_dir, url, SECRET, TOKEN):
        yield url


@contextlib.contextmanager
def calling(service: EditService, **settings: object) -> Iterator[httpx2.Client]:
    """A client that sends the token to all routes of the unified server."""
    with serving(service, **settings) as url, client_of(url) as client:
        yield client


def client_of(url: str) -> httpx2.Client:
    """A client that sends the token to a server at this address."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return httpx2.Client(base_url=url, headers=headers, timeout=240, trust_env=False)


def until(is_so: Callable[[], bool]) -> None:
    """Wait, with a time limit, for something that happens in another thread."""
    for _ in range(20_000):
        if is_so():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen")
