"""A client whose answers are plain dictionaries: `result["status"]`, `result["output_path"]`.

It starts our server or any other MCP server, or connects to one that listens. A failed call does
not raise: a tool that fails or does not exist, and a server that cannot be started or has ended,
all answer `{"status": "error", "error": "…"}`, so that callers check one place.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TextIO

from fastmcp import Client
from fastmcp.client.progress import ProgressHandler
from fastmcp.client.transports import ClientTransport, StdioTransport, StreamableHttpTransport
from mcp.shared.exceptions import MCPError
from mcp_types import CONNECTION_CLOSED, INVALID_PARAMS, CallToolResult, TextContent
from typing_extensions import Self

from step1x_edit import foreign_json
from step1x_edit.errors import (
    InternalError,
    InvalidParameterError,
    ModelUnavailableError,
    Step1XEditError,
)
from step1x_edit.schemas.answers import ErrorAnswer
from step1x_edit.settings import inherited_environment

OWN_SERVER: Final = ("-m", "step1x_edit.interfaces.cli", "mcp")
_LAST_WORDS_S: Final = 5.0  # for calls that still run when the client is closed
_START_TIMEOUT_S: Final = 60.0  # our server answers within 2 s; this limits the wait for any other


class MCPClient:
    """A connection to an MCP server, opened at the first call.

    `target` is the path of a server in Python, which is started, or the URL of a running one, to
    which `token` is sent. Without a target our own server is started with this interpreter. A
    started server inherits the environment, settings such as GPU_IDLE_TIMEOUT included. It may be
    used from several threads and event loops, which share the one server; a forked child connects
    again. Use it as a context manager, or close it at the end; if neither is done, the server ends
    with this process.
    """

    def __init__(self, target: str | Path | None = None, token: str | None = None) -> None:
        self._target = target
        self._token = token
        self._connection: _Connection | None = None
        self._lock = threading.Lock()
        self._process = os.getpid()

    async def call_tool(
        self,
        name: str,
        arguments: Mapping[str, Any] | None = None,
        on_progress: ProgressHandler | None = None,
    ) -> dict[str, Any]:
        """Call a tool and return its answer; cancelling the call cancels the work.

        `on_progress(progress, total, message)` receives the progress.
        """
        handler = None if on_progress is None else _on_this_loop(on_progress)
        self._after_fork()
        with self._lock:
            if self._connection is None:
                self._connection = _Connection(self._target, self._token)
            answer = self._connection.start_call(name, dict(arguments or {}), handler)
        return await asyncio.wrap_future(answer)

    async def close(self) -> None:
        """End the connection and the server, if one was started; a later call connects again."""
        self._after_fork()
        with self._lock:
            connection, self._connection = self._connection, None
            end = None if connection is None else connection.start_end()
        if end is not None:
            await asyncio.wrap_future(end)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _after_fork(self) -> None:
        """In a forked child, leave the connection to the parent, which has its thread."""
        if self._process != os.getpid():
            self._process, self._connection, self._lock = os.getpid(), None, threading.Lock()


class _Connection:
    """One client on an event loop in a separate thread, for callers on any other."""

    def __init__(self, target: str | Path | None, token: str | None) -> None:
        self._target = target
        self._token = token
        self._client: Client[Any] | None = None
        self._connecting = asyncio.Lock()
        self._loop = asyncio.new_event_loop()
        # A daemon: a client that was not closed must not prevent the process from ending.
        threading.Thread(target=self._live, name="MCP client", daemon=True).start()

    def start_call(
        self, name: str, arguments: dict[str, Any], on_progress: ProgressHandler | None
    ) -> Future[dict[str, Any]]:
        """Start a call; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(
            self._call(name, arguments, on_progress), self._loop
        )

    def start_end(self) -> Future[None]:
        """Start to close the connection and the thread; no call may be started after this."""
        return asyncio.run_coroutine_threadsafe(self._end(), self._loop)

    def _live(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    async def _call(
        self, name: str, arguments: dict[str, Any], on_progress: ProgressHandler | None
    ) -> dict[str, Any]:
        client = None
        try:
            client = await self._connected()
            result = await client.call_tool_mcp(name, arguments, progress_handler=on_progress)
        except Step1XEditError as error:
            return _error(error)
        except MCPError as error:
            if client is None or error.code == CONNECTION_CLOSED:
                return _error(await self._lost(client, error))
            kind = InvalidParameterError if error.code == INVALID_PARAMS else InternalError
            return _error(kind(str(error)))
        except Exception as error:  # noqa: BLE001 - the outermost handler of this interface
            return _error(await self._lost(client, error))
        return _answer(result)

    async def _end(self) -> None:
        try:
            await self._close()
            calls = asyncio.all_tasks() - {asyncio.current_task()}
            if calls:  # they fail because the connection has ended
                await asyncio.wait(calls, timeout=_LAST_WORDS_S)
        finally:
            self._loop.call_soon(self._loop.stop)

    async def _close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()  # type: ignore[no-untyped-call]

    async def _connected(self) -> Client[Any]:
        async with self._connecting:  # concurrent calls share one server
            if self._client is None or not self._client.is_connected():
                client = Client(
                    _transport(self._target, self._token), init_timeout=_START_TIMEOUT_S
                )
                await client.__aenter__()  # type: ignore[no-untyped-call]
                self._client = client
        return self._client

    async def _lost(self, client: Client[Any] | None, error: Exception) -> Step1XEditError:
        """Drop a broken connection, so that the next call opens a new one."""
        if client is not None and client is self._client:  # or another call has dropped it
            with contextlib.suppress(Exception):
                await self._close()
        where = "the server" if self._target is None else self._target
        return ModelUnavailableError(f"{where} does not answer ({_reason(error)})")


def _on_this_loop(on_progress: ProgressHandler) -> ProgressHandler:
    """The handler for another thread, run on the loop of its caller."""
    loop = asyncio.get_running_loop()

    async def handle(progress: float, total: float | None, message: str | None) -> None:
        async def call() -> None:
            await on_progress(progress, total, message)

        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call(), loop))

    return handle


def _transport(target: str | Path | None, token: str | None) -> ClientTransport:
    if isinstance(target, str) and target.startswith(("http://", "https://")):
        return StreamableHttpTransport(target, auth=token)
    command = list(OWN_SERVER)
    if target is not None:
        if not Path(target).is_file():
            raise ModelUnavailableError(
                f"there is no server at {target}; give the path of a Python file or an http:// URL"
            )
        command = [str(target)]
    return StdioTransport(
        sys.executable, command, env=inherited_environment(), keep_alive=False, log_file=_stderr()
    )


def _stderr() -> TextIO:
    """A stderr that a child can write to; in notebooks stderr is not a file."""
    try:
        sys.stderr.fileno()
    except (AttributeError, io.UnsupportedOperation):
        return sys.__stderr__ or sys.stderr
    return sys.stderr


def _answer(result: CallToolResult) -> dict[str, Any]:
    if result.structured_content is not None:
        return dict(result.structured_content)
    text = " ".join(block.text for block in result.content if isinstance(block, TextContent))
    if result.is_error:
        return _error(ModelUnavailableError(text))
    with contextlib.suppress(ValueError):
        if isinstance(answer := foreign_json.parse(text), dict):
            return answer
    content = result.model_dump(mode="json", by_alias=True, exclude_none=True)["content"]
    return {"status": "success", "content": content}


def _error(error: Step1XEditError) -> dict[str, Any]:
    return ErrorAnswer.of(error).to_dict()


def _reason(error: BaseException) -> str:
    """The message of the last exception in the chain that has one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
