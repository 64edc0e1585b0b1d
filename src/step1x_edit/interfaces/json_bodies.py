"""JSON bodies, read without blocking the answers to other clients.

Parsing costs time and memory for each member and item, and holds the interpreter while it reads one
long text or number. So commas and brackets are counted while a body arrives, pictures are cut out
and decoded piece by piece, and the short rest is parsed in a thread.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from collections.abc import AsyncIterator
from typing import Final

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from step1x_edit import foreign_json
from step1x_edit.errors import EditCancelledError, InvalidParameterError

MAX_MARKS: Final = 20_000
"""Commas and opening brackets in a body; base64 has none, and the longest prompt a few thousand."""
MAX_TEXT: Final = 2**20
"""Bytes of a body with pictures, without the pictures."""

_MARKS: Final = (b",", b"[", b"{")
_DATA_URL: Final = re.compile(rb'(?<!\\)"data:[^",]{0,100};base64,')
_LONGEST_HEAD: Final = 114  # bytes that _DATA_URL matches at most
_LONGEST_ESCAPE: Final = len(r"\u002b")


async def read_text(request: Request, max_marks: int = MAX_MARKS) -> bytearray:
    """The body as it came; raises InvalidParameterError as soon as it has too many parts."""
    body, marks = bytearray(), 0
    async for piece in _pieces(request):
        marks += sum(map(piece.count, _MARKS))
        _check_marks(marks, max_marks)
        body += piece
    return body


async def read_with_data(request: Request) -> tuple[bytearray, list[bytes | None]]:
    """The body with a number in place of the data of each data URL, and the data by that number.

    The data is None if it is not valid base64. Raises InvalidParameterError as `read_text` does.
    """
    text, data, marks, searched = bytearray(), list[bytes | None](), 0, 0
    inside: _Base64 | None = None
    async for arrived in _pieces(request):
        rest = arrived
        while rest:
            if inside is not None:
                encoded, quote, after = rest.partition(b'"')
                rest = quote + after
                inside.add(encoded)
                if quote:
                    text += b"%d" % len(data)
                    data.append(inside.close())
                    searched, inside = len(text), None
                continue
            start = len(text)
            text += rest
            found = _DATA_URL.search(text, max(searched, start - _LONGEST_HEAD))
            end = len(text) if found is None else found.end()
            rest = bytes(text[end:])
            del text[end:]
            inside = None if found is None else _Base64()
            marks += sum(text.count(mark, start) for mark in _MARKS)
            _check_marks(marks, MAX_MARKS)
            if len(text) > MAX_TEXT:
                raise InvalidParameterError(
                    f"the JSON has more than {MAX_TEXT // 2**20} MiB beside its pictures; send less"
                )
    return text, data


async def parse(text: bytearray) -> dict[str, object]:
    """The members of the object that a body holds."""
    try:
        values = await asyncio.to_thread(foreign_json.parse, text)
    except ValueError:
        raise InvalidParameterError("the body is not valid JSON") from None
    if not isinstance(values, dict):
        raise InvalidParameterError("the body must be a JSON object")
    return values


def given_again(body: bytes | bytearray, receive: Receive) -> Receive:
    """The `receive` of an application for a body that has already been read."""
    given: list[Message] = [{"type": "http.request", "body": bytes(body)}]

    async def again() -> Message:
        return given.pop() if given else await receive()

    return again


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    try:
        async for piece in request.stream():
            yield piece
    except ClientDisconnect:
        raise EditCancelledError from None


def _check_marks(marks: int, most: int) -> None:
    if marks > most:
        raise InvalidParameterError(f"the JSON has more than {most} commas and brackets; send less")


class _Base64:
    """Decodes base64 that arrives in pieces and may have JSON's escapes, such as `\\/`."""

    def __init__(self) -> None:
        self._decoded: io.BytesIO | None = io.BytesIO()
        self._left = b""
        self._is_padded = False

    def add(self, piece: bytes) -> None:
        """Decode the complete part of the text so far."""
        piece = self._left + piece
        escape = piece.rfind(b"\\", max(0, len(piece) - _LONGEST_ESCAPE + 1))
        cut = len(piece) if escape < 0 else escape
        self._left = self._write(piece[:cut]) + piece[cut:]

    def close(self) -> bytes | None:
        """All decoded bytes; None if the text is not valid base64."""
        if self._write(self._left) or self._decoded is None:
            return None
        return self._decoded.getvalue()

    def _write(self, text: bytes) -> bytes:
        """Decode all complete groups of four characters, and return the rest."""
        if self._decoded is None:
            return b""
        try:
            if b"\\" in text:
                text = json.loads(b'"%b"' % text).encode("ascii")
            groups = len(text) - len(text) % 4
            if self._is_padded and text:
                raise ValueError("data after the padding")
            self._decoded.write(base64.b64decode(text[:groups], validate=True))
            self._is_padded = b"=" in text[:groups]
        except ValueError:
            self._decoded = None
            return b""
        return text[groups:]
