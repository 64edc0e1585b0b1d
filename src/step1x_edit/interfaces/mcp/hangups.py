"""Clients over HTTP that hang up: their call is cancelled.

The newest revision of MCP requires this, and the framework does it. In older revisions a call
belongs to a session and would continue, although its answer cannot be delivered: we store no events
for later. So the application signals to its calls that their connection has ended.
"""

from __future__ import annotations

import asyncio
from typing import Final

from fastmcp.server.dependencies import get_http_request
from fastmcp.server.middleware import CallNext, Middleware, MiddlewareContext
from fastmcp.tools import ToolResult
from mcp_types import CallToolRequestParams
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from step1x_edit.errors import EditCancelledError
from step1x_edit.waiting import unless

_KEY: Final = "step1x_edit.hung_up"


class NoteHangUps:
    """An application that signals to each request when its client has hung up."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hung_up, is_answered = asyncio.Event(), False

        async def answer(message: Message) -> None:
            nonlocal is_answered
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                is_answered = True

        try:
            await self._app({**scope, _KEY: hung_up}, receive, answer)
        finally:
            if not is_answered:
                hung_up.set()


class EndWithConnection(Middleware):
    """Cancels a call when its client has hung up; does nothing if there is no HTTP."""

    async def on_call_tool(
        self,
        context: MiddlewareContext[CallToolRequestParams],
        call_next: CallNext[CallToolRequestParams, ToolResult],
    ) -> ToolResult:
        hung_up = _hang_up_of_this_call()
        if hung_up is None:
            return await call_next(context)
        return await unless(hung_up.wait(), call_next(context), EditCancelledError())


def _hang_up_of_this_call() -> asyncio.Event | None:
    try:
        hung_up = get_http_request().scope.get(_KEY)
    except RuntimeError:  # there is no HTTP
        return None
    return hung_up if isinstance(hung_up, asyncio.Event) else None
