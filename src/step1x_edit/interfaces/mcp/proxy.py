"""Joining a server that runs on this machine: its tools over our stdio, its one model for all.

The proxy forwards everything, including progress and cancellation. It also resolves paths, because
the client started it: a relative path starts at *our* folder and `~` is *our* home. So paths are
sent as absolute ones, and are returned as the client wrote them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import mcp_types
from fastmcp import FastMCP
from fastmcp.server import create_proxy
from fastmcp.server.dependencies import get_context
from fastmcp.server.middleware import CallNext, Middleware, MiddlewareContext
from fastmcp.tools import ToolResult
from mcp.shared.exceptions import MCPError
from mcp_types import CallToolRequestParams

from step1x_edit.errors import ModelUnavailableError
from step1x_edit.interfaces.discovery import SERVER_NAME, RunningServer, transport_to
from step1x_edit.interfaces.mcp.app import PASSED_ON_HEADER, for_client
from step1x_edit.interfaces.mcp.errors import OneErrorShape
from step1x_edit.interfaces.mcp.prompts import complete
from step1x_edit.interfaces.mcp.results import result_of
from step1x_edit.interfaces.mcp.tools import MAX_WAIT_HEADER
from step1x_edit.schemas.requests import read_list
from step1x_edit.service.files import expanded

log = logging.getLogger(__name__)

PATH_PARAMETERS: Final = (
    "path",
    "image_path",
    "image_paths",
    "output_path",
    "output_dir",
    "mask_path",
)


def build_proxy(server: RunningServer, calls: RunningCalls, max_wait_s: int = 0) -> FastMCP:
    """A server with the same tools that forwards to `server`; `calls` keeps track of its calls.

    `max_wait_s` is how long our client waits, independently of the other server's clients.
    """
    headers = {PASSED_ON_HEADER: "1"}
    if max_wait_s:
        headers[MAX_WAIT_HEADER] = str(max_wait_s)
    proxy = create_proxy(
        transport_to(server, headers),
        name=SERVER_NAME,
        identity="upstream",
        provider_error_strategy="raise",  # a dead server must not look like one without tools
        middleware=[calls, OneErrorShape(_explained), _PathsOfTheClient()],
    )
    proxy.completion(complete)  # the library forwards everything but this
    return proxy


def _explained(error: Exception) -> ModelUnavailableError:
    """The error if the proxy itself fails, which is always a failure to reach the joined server."""
    log.warning("the joined server failed: %r", error)
    cause = error.__cause__
    if isinstance(cause, MCPError) and cause.code == mcp_types.INTERNAL_ERROR:
        return ModelUnavailableError(  # the library does not report the status
            "the joined server answers with an HTTP error; the call may be "
            "too long, or the server too busy"
        )
    return ModelUnavailableError(
        "the joined server does not answer; start it again, or restart this one; "
        "if the call is very long, send less"  # a refused body may appear as a broken connection
    )


class RunningCalls(Middleware):
    """The running calls, so that none of them continues when this process ends."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    async def on_call_tool(
        self,
        context: MiddlewareContext[CallToolRequestParams],
        call_next: CallNext[CallToolRequestParams, ToolResult],
    ) -> ToolResult:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await call_next(context)
        finally:
            self._tasks.discard(task)

    async def stop(self) -> None:
        """Cancel all calls, here and at the other server, and wait until they have ended."""
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _PathsOfTheClient(Middleware):
    """Makes the paths of a call absolute, and restores the client's spelling in its answer."""

    async def on_call_tool(
        self,
        context: MiddlewareContext[CallToolRequestParams],
        call_next: CallNext[CallToolRequestParams, ToolResult],
    ) -> ToolResult:
        written: dict[str, str] = {}
        arguments = with_absolute_paths(context.message.arguments or {}, written)
        message = context.message.model_copy(update={"arguments": arguments})
        result = await call_next(context.copy(message=message))
        if result.structured_content is None:
            return result
        answer = as_written(result.structured_content, written)
        changed = result_of(answer, *result.content[1:], is_error=result.is_error, meta=result.meta)
        return for_client(changed, get_context())


def with_absolute_paths(arguments: Mapping[str, Any], written: dict[str, str]) -> dict[str, Any]:
    """The arguments with absolute paths; `written` receives the original of each."""

    def absolute(path: object) -> object:
        if not isinstance(path, str) or not path:
            return path  # the server will report the error
        full = str(Path.cwd() / expanded(path))
        written.setdefault(full, path)
        return full

    changed = dict(arguments)
    for name in PATH_PARAMETERS & arguments.keys():
        value = read_list(arguments[name]) if name == "image_paths" else arguments[name]
        changed[name] = [absolute(p) for p in value] if isinstance(value, list) else absolute(value)
    return changed


def as_written(answer: Mapping[str, Any], written: Mapping[str, str]) -> dict[str, Any]:
    """The answer, with paths from the call in the client's spelling."""
    spelled = dict(answer)
    if isinstance(error := answer.get("error"), str):
        spelled["error"] = _spelled(error, written)
    if isinstance(items := answer.get("results"), list):
        spelled["results"] = [_item_as_written(item, written) for item in items]
    return spelled


def _item_as_written(item: Mapping[str, Any], written: Mapping[str, str]) -> dict[str, Any]:
    spelled = dict(item)
    spelled["input"] = written.get(item["input"], item["input"])
    spelled["result"] = as_written(item["result"], written)
    return spelled


def _spelled(text: str, written: Mapping[str, str]) -> str:
    for full in sorted(written, key=len, reverse=True):  # /a/bc before /a/b
        text = text.replace(full, written[full])
    return text
