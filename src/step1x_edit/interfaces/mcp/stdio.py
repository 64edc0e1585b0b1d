"""MCP over stdin and stdout: the process around the MCP server, from start to exit code.

Every byte on stdout belongs to the protocol, even if libraries print. The process ends when its
client closes stdin, when a signal arrives, or when its answers are no longer read; a running edit
has a short time to stop. It has a separate engine only if there is no server on this machine to
join.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import io
import logging
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Final, TypeAlias

from fastmcp import FastMCP
from typing_extensions import Buffer

from step1x_edit.errors import SettingsError
from step1x_edit.interfaces.discovery import find_server
from step1x_edit.interfaces.mcp.server import build_mcp
from step1x_edit.interfaces.mcp.stdin import take_stdin
from step1x_edit.interfaces.process import log_to_stderr, settle, watch_signals
from step1x_edit.service.service import EditService
from step1x_edit.service.wiring import build_service
from step1x_edit.settings import Settings, load_settings
from step1x_edit.waiting import first_of

log = logging.getLogger(__name__)

Stop: TypeAlias = Callable[[], Awaitable[None]]

_GRACE_S: Final = 3.0  # for the running step to end; the process must end within 5 s
_LAST_WORDS_S: Final = 0.2  # for the answers of the cancelled calls


# --- stdout ---------------------------------------------------------------------------------------


class _Pipe(io.BufferedWriter):
    """Writes to the client; reports when the client no longer reads."""

    def __init__(self, descriptor: int, broken: Callable[[], object]) -> None:
        super().__init__(io.FileIO(descriptor, "w"))
        self._broken = broken

    def write(self, data: Buffer, /) -> int:
        with self._watched():
            return super().write(data)

    def flush(self) -> None:
        with self._watched():
            super().flush()

    def send(self, line: bytes) -> None:
        """Write a whole line from any thread; does nothing if the client no longer reads."""
        with contextlib.suppress(BrokenPipeError):
            self.write(line)
            self.flush()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self._broken()
            raise


class _Wire(io.TextIOWrapper):
    """The real stdout, as `sys.stdout` while the transport takes its buffer.

    Then `sys.stdout` is restored, and its descriptor 1 leads to stderr: later code cannot reach the
    client through its text layer, buffer or descriptor. In the meantime other threads cannot do so
    through ours either.
    """

    def __init__(self, pipe: _Pipe) -> None:
        super().__init__(pipe, encoding="utf-8")
        self._thread = threading.get_ident()
        self._before = sys.stdout
        sys.stdout = self

    @property
    def buffer(self) -> Any:
        if threading.get_ident() != self._thread:
            return self._before.buffer
        asyncio.get_running_loop().call_soon(setattr, sys, "stdout", self._before)
        return super().buffer

    def fileno(self) -> int:
        return self._before.fileno()

    def close(self) -> None:
        """Do nothing, also when collected: the buffer belongs to the transport."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


# --- starting -------------------------------------------------------------------------------------


def main(wire: int, arguments: Sequence[str] | None = None) -> None:
    """Serve according to the flags, on a duplicate of the real stdout; see `serve`."""
    parser = argparse.ArgumentParser(prog="mcp_server.py", description=__doc__)
    parser.add_argument(
        "--standalone", action="store_true", help="do not join a server that runs on this machine"
    )
    serve(wire, standalone=parser.parse_args(arguments).standalone)


def serve(wire: int, *, standalone: bool) -> None:
    """Serve until the client closes our stdin or a signal comes, then end the process.

    `wire` is a duplicate of the real stdout. Descriptor 1 must lead to stderr before anything else
    is imported, and remains so for native code and children.
    """
    settings = start()
    try:
        asyncio.run(_serve_alone(settings, wire) if standalone else _serve(settings, wire))
    except SettingsError as error:
        sys.exit(str(error))


def start() -> Settings:
    """Read the settings; ends the process with one message if they are wrong."""
    try:
        settings = load_settings()
    except SettingsError as error:
        sys.exit(str(error))
    log_to_stderr(settings)
    return settings


async def _serve(settings: Settings, wire: int) -> None:
    """Join the server that runs on this machine, or start an engine here."""
    server = await find_server(settings.data_dir)
    if server is None:
        await _serve_alone(settings, wire)
        return
    from step1x_edit.interfaces.mcp.proxy import RunningCalls, build_proxy

    log.info("joined the server at %s, process %d", server.url, server.pid)
    calls = RunningCalls()
    await _serve_until_stopped(build_proxy(server, calls, settings.mcp_max_wait), calls.stop, wire)


async def _serve_alone(settings: Settings, wire: int) -> None:
    service = build_service(settings)
    mcp = build_mcp(service, max_wait_s=settings.mcp_max_wait)
    await _serve_until_stopped(mcp, lambda: _close(service), wire)


async def _close(service: EditService) -> None:
    # In a thread, so that the answers of the cancelled calls still reach the client.
    await asyncio.to_thread(service.close, _GRACE_S)


# --- ending ---------------------------------------------------------------------------------------


async def _serve_until_stopped(server: FastMCP, stop: Stop, wire: int) -> None:
    """Serve; at the end, stop running calls and exit without waiting for threads.

    The reader of stdin waits in a thread that nothing can wake, so the process has to be ended.
    """
    gc.freeze()  # imported objects live until the end, so exclude them from garbage collection
    gc.enable()
    loop = asyncio.get_running_loop()
    exit_code: asyncio.Future[int] = loop.create_future()
    watch_signals(exit_code)  # on Windows clients close stdin instead
    pipe = _Pipe(wire, lambda: loop.call_soon_threadsafe(settle, exit_code, 0))
    _Wire(pipe)
    take_stdin(pipe.send)
    serving = asyncio.ensure_future(server.run_async("stdio", show_banner=False))
    await first_of(serving, exit_code)
    stopping: asyncio.Future[None] = asyncio.ensure_future(stop())
    await asyncio.wait({stopping}, timeout=_GRACE_S + _LAST_WORDS_S)
    if exit_code.done():
        await asyncio.wait({serving}, timeout=_LAST_WORDS_S)
    else:
        if (error := serving.exception()) is not None:
            log.error("the connection failed", exc_info=error)
        settle(exit_code, int(error is not None))
    logging.shutdown()
    os._exit(exit_code.result())
