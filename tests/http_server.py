"""Our MCP server over HTTP on a free port, with a token, as long as a test needs it."""

from __future__ import annotations

import contextlib
import hmac
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from fastmcp import FastMCP
from fastmcp.server.auth import AccessToken, TokenVerifier
from starlette.applications import Starlette

from step1x_edit.interfaces.discovery import announced

TOKEN = "a token of the tests"


class _OneToken(TokenVerifier):
    async def verify_token(self, token: str) -> AccessToken | None:
        if not hmac.compare_digest(token.encode(), TOKEN.encode()):
            return None
        return AccessToken(token=token, client_id="test", scopes=[])


class _Server(uvicorn.Server):
    """A server that says when it is ready; it is told to stop by its `should_exit`."""

    def __init__(self, app: Starlette) -> None:
        config = uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1)
        super().__init__(config)
        self.ready = threading.Event()

    async def startup(self, sockets: object = None) -> None:
        await super().startup()
        self.ready.set()


@contextlib.contextmanager
def listening(mcp: FastMCP) -> Iterator[str]:
    """Serve `mcp` and yield its URL."""
    mcp.auth = _OneToken()
    server = _Server(mcp.http_app(path="/mcp", host_origin_protection="auto"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert server.ready.wait(60)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        server.should_exit = True
        thread.join(60)


@contextlib.contextmanager
def announcing(mcp: FastMCP, data_dir: Path) -> Iterator[str]:
    """The same, to be found by whoever looks into `data_dir`, although it is in our own process."""
    with listening(mcp) as url, announced(data_dir, url, TOKEN):
        yield url
