"""Connections: their number, and how long each may keep the server waiting.

A server waits for heads, for bodies and for its answers to be read, and a client can make it wait
at no cost. So heads and the reading of answers have deadlines (the guard has those for bodies). If
there are too many connections, a new one replaces the one that has kept us waiting longest.
Connections whose requests are being processed are never closed. The module knows nothing about the
content of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from step1x_edit.settings import Settings

log = logging.getLogger(__name__)

BACKLOG: Final = 128
"""Connections that the kernel keeps until they are accepted."""

_OWN_FILES: Final = 64  # descriptors for other uses: databases, pipes, uploads
_ENOUGH_FILES: Final = 65_536  # descriptors; macOS reports an infinite hard limit but accepts less
_NO_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_HEAD_S: Final = 10.0  # until the head of the next request is complete
_IDLE_S: Final = 5.0  # until the next request begins
_READING_S: Final = 15.0  # for the client to read the number of bytes below
_READING_BYTES: Final = 10 * 1024
_ADDRESSES: Final = 8  # this many addresses together can use all connections
_FULL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\n"
    b"Retry-After: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
)


@dataclass(frozen=True)
class Bounds:
    """The limits: connections in total and from one other machine, and deadlines."""

    connections: int
    per_address: int
    head_s: float
    reading_s: float


def within_file_limit(settings: Settings) -> Settings:
    """The settings with at most as many connections as this process has file descriptors for.

    Raises the soft limit of the process to its hard one first.
    """
    limit = _raised_file_limit()
    most = max(limit - _OWN_FILES, limit // 4)
    if settings.max_connections <= most:
        return settings
    log.warning(
        "MAX_CONNECTIONS is %d here: this process may open %d files (ulimit -n), raise that for %d",
        most,
        limit,
        settings.max_connections,
    )
    return settings.model_copy(update={"max_connections": most})


def _raised_file_limit() -> int:
    if os.name != "posix":
        return _ENOUGH_FILES
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return _ENOUGH_FILES if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        return soft
    return wanted


class LogOnce:
    """Handles errors of the event loop: a lack of file descriptors is logged once a second.

    asyncio reports it for each connection in the backlog that it tries to accept.
    """

    def __init__(self) -> None:
        self._told_at = -1.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log an error of the loop."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in _NO_ROOM:
            loop.default_exception_handler(context)
        elif loop.time() - self._told_at >= 1:
            self._told_at = loop.time()
            log.error("a connection cannot be accepted now: %s", error.strerror)


def protocol(settings: Settings) -> type[asyncio.Protocol]:
    """The protocol class that uvicorn uses for each connection."""
    bounds = Bounds(
        settings.max_connections,
        max(1, settings.max_connections // _ADDRESSES),
        min(_HEAD_S, settings.receive_timeout),
        min(_READING_S, settings.receive_timeout),
    )
    made: Callable[..., _Connection] = partial(_Connection, bounds)
    return cast("type[asyncio.Protocol]", made)  # uvicorn only calls it


def idle_s(settings: Settings) -> int:
    """The keep-alive time-out for uvicorn, in seconds."""
    return int(min(_IDLE_S, settings.receive_timeout))


class _Connection(H11Protocol):
    """A connection that uvicorn serves and that we close after a deadline."""

    def __init__(
        self,
        bounds: Bounds,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._bounds = bounds
        self._waiting_since: float | None = None
        self._head = _Alarm(self.loop, bounds.head_s, self._give_up)
        self._reading = _Alarm(self.loop, bounds.reading_s, self._check_reader)
        self._unread = 0

    # --- called by asyncio and uvicorn ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that every unread byte is reported
        self._look()
        if not self._find_room():
            transport.write(_FULL)
            transport.close()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.transport.get_write_buffer_size()
        self._reading.set()
        self._look()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reading.stop()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._head.stop()
        self._reading.stop()

    # --- deadlines ---

    def _look(self) -> None:
        """Find out whether we wait for the client, and start or stop the deadlines."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        is_unread = self.flow.write_paused
        if is_answering and not self.cycle.more_body and not is_unread:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = self.loop.time()
        if is_answering or is_unread or self.transport.is_closing():
            self._head.stop()
        else:
            self._head.set()

    def _check_reader(self) -> None:
        unread = self.transport.get_write_buffer_size()
        if self._unread - unread < _READING_BYTES:
            self._give_up()
        else:
            self._unread = unread
            self._reading.set()

    def _give_up(self) -> None:
        """End the connection, and discard the data that the kernel still holds for it."""
        at_once = struct.pack("ii", 1, 0)
        end = self.transport.get_extra_info("socket")
        with contextlib.suppress(OSError):  # it may have ended already
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        self.transport.abort()

    def _find_room(self) -> bool:
        """Whether there is room for this connection, if necessary by closing another one."""
        everybody = cast("set[_Connection]", self.connections)
        if not _is_this_machine(self._address):
            neighbours = [one for one in everybody if one._address == self._address]
            if len(neighbours) > self._bounds.per_address and not self._push_out(neighbours):
                return False
        return len(everybody) <= self._bounds.connections or self._push_out(everybody)

    def _push_out(self, some: Iterable[_Connection]) -> bool:
        waits = [
            (one._waiting_since, id(one), one)
            for one in some
            if one is not self and one._waiting_since is not None
        ]
        if not waits:
            return False
        longest = min(waits)[-1]
        self.connections.discard(longest)  # now, and not when its end is reported
        longest._give_up()
        return True

    @property
    def _address(self) -> str:
        return "" if self.client is None else self.client[0]


class _Alarm:
    """An action that runs after a delay unless it is stopped."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, after_s: float, action: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._after_s = after_s
        self._action = action
        self._timer: asyncio.TimerHandle | None = None

    def set(self) -> None:
        """Start the delay; does nothing if it is running."""
        if self._timer is None:
            self._timer = self._loop.call_later(self._after_s, self._ring)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring(self) -> None:
        self._timer = None
        self._action()


def _is_this_machine(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:  # not an address, but a Unix socket
        return True
    inner = found.ipv4_mapped if found.version == 6 else None
    return (inner or found).is_loopback
