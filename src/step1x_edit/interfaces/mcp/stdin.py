"""Reads the client's messages from stdin: one JSON-RPC message per line.

The MCP library drops a line that it cannot parse, and the client waits forever. So each line is
checked here first. A line that is not a message is answered with an error at once and logged; the
library receives only messages. This module knows nothing about tools.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, Final

import mcp_types
from mcp_types import JSONRPCNotification, jsonrpc_message_adapter
from pydantic_core import from_json

log = logging.getLogger(__name__)

MAX_LINE_BYTES: Final = 16 * 1024 * 1024  # holds the largest batch that the schemas allow
_PIECE_BYTES: Final = 64 * 1024

Send = Callable[[bytes], object]
"""Sends a line to the client."""


class ProtocolError(Exception):
    """A line is not a message; `request_id` is the id of the request if it can be read."""

    def __init__(self, code: int, sentence: str, request_id: str | int | None = None) -> None:
        super().__init__(sentence)
        self._code = code
        self._request_id = request_id

    def answer(self) -> bytes:
        """The answer as a line."""
        error = {"code": self._code, "message": str(self)}
        message = {"jsonrpc": "2.0", "id": self._request_id, "error": error}
        return json.dumps(message).encode() + b"\n"


def check_message(line: bytes) -> None:
    """Raise ProtocolError if a line is not a message of JSON-RPC."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise ProtocolError(mcp_types.PARSE_ERROR, "Parse error: the line is not UTF-8") from None
    try:
        message = jsonrpc_message_adapter.validate_json(text, by_name=False)
    except ValueError:
        raise _error_of(text) from None
    if isinstance(message, JSONRPCNotification) and "id" in from_json(text):
        raise ProtocolError(
            mcp_types.INVALID_REQUEST, "Invalid request: id must be a text or a whole number"
        )


def _error_of(text: str) -> ProtocolError:
    """Why a text is not a message."""
    try:
        message = json.loads(text)
        text_again = json.dumps(message, ensure_ascii=False)
    except (ValueError, RecursionError):
        return ProtocolError(mcp_types.PARSE_ERROR, "Parse error: the line is not JSON")
    request_id = _request_id(message)
    if not _is_unicode(text_again):
        code = mcp_types.PARSE_ERROR if request_id is None else mcp_types.INVALID_PARAMS
        beginning = "Parse error" if request_id is None else "Invalid params"
        return ProtocolError(
            code,
            f"{beginning}: a text holds half of a surrogate pair, as of an emoji that was cut in "
            "two; send whole characters",
            request_id,
        )
    if request_id is None:
        return ProtocolError(
            mcp_types.INVALID_REQUEST, "Invalid request: the line is not a request of JSON-RPC 2.0"
        )
    if message.get("jsonrpc") != "2.0":
        return ProtocolError(
            mcp_types.INVALID_REQUEST, 'Invalid request: jsonrpc must be "2.0"', request_id
        )
    return ProtocolError(
        mcp_types.INVALID_PARAMS,
        "Invalid params: params must be an object that is not nested too deeply",
        request_id,
    )


def _request_id(message: Any) -> str | int | None:
    """The id of a request; None for a response, whose id is one of ours."""
    if not isinstance(message, dict) or not isinstance(message.get("method"), str):
        return None
    found = message.get("id")
    if isinstance(found, str) and _is_unicode(found):
        return found
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Messages(io.BufferedIOBase):
    """The lines of a descriptor that are messages; the others are answered by `send`."""

    name = "<stdin>"

    def __init__(self, descriptor: int, send: Send, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._source = os.fdopen(descriptor, "rb")
        self._send = send
        self._max_line_bytes = max_line_bytes
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """Whether something can be read."""
        return True

    def read1(self, size: int = -1, /) -> bytes:
        """The next part of a line, at most `size` bytes; nothing at the end."""
        if not self._rest:
            self._rest = memoryview(self._next())
        end = len(self._rest) if size < 0 else size
        part, self._rest = self._rest[:end], self._rest[end:]
        return bytes(part)

    def _next(self) -> bytes:
        while line := self._source.readline(self._max_line_bytes + 1):
            try:
                if len(line) > self._max_line_bytes:
                    raise self._too_long(line)
                if not line.isspace():
                    check_message(line)
                    # Between the parts of a message it is whitespace; the library would end the
                    # line there.
                    return line.replace(b"\r", b" ")
            except ProtocolError as error:
                log.warning("a line from the client was refused: %s", error)
                self._send(error.answer())
        return b""

    def _too_long(self, line: bytes) -> ProtocolError:
        """Read the rest of a line, without keeping it."""
        while line and not line.endswith(b"\n"):
            line = self._source.readline(_PIECE_BYTES)
        return ProtocolError(
            mcp_types.INVALID_REQUEST,
            f"Invalid request: the line is longer than {self._max_line_bytes} bytes",
        )


class _Source(io.TextIOWrapper):
    """The real stdin, as `sys.stdin` while the transport takes its buffer."""

    def __init__(self, messages: Messages) -> None:
        super().__init__(messages, encoding="utf-8")
        self._before = sys.stdin
        sys.stdin = self

    @property
    def buffer(self) -> Any:
        asyncio.get_running_loop().call_soon(setattr, sys, "stdin", self._before)
        return super().buffer

    def close(self) -> None:
        """Do nothing, also when collected: the buffer belongs to the transport."""


def take_stdin(send: Send) -> None:
    """Make only the transport that starts next read from stdin, and only messages."""
    descriptor = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    _Source(Messages(descriptor, send))
