"""JSON bodies, read so that none of them keeps the server from its other callers.

Parsing takes time and memory for each member and item, not for each byte: a picture in base64 is
one text, and 60 MB of empty lists are 20 million objects. So the members are counted while a body
arrives, which costs next to nothing, and it is parsed in a thread. The guard limits the length.
"""

from __future__ import annotations

import asyncio
import json
from typing import Final

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from step1x_edit.errors import EditCancelledError, InvalidParameterError

MAX_MARKS: Final = 20_000
"""Commas and opening brackets in a body; base64 has none, and the longest prompt a few thousand."""

_MARKS: Final = (b",", b"[", b"{")


async def read_text(request: Request, max_marks: int = MAX_MARKS) -> bytearray:
    """The body as it came; raises InvalidParameterError as soon as it has too many parts."""
    body, marks = bytearray(), 0
    try:
        async for piece in request.stream():
            marks += sum(map(piece.count, _MARKS))
            if marks > max_marks:
                raise InvalidParameterError(
                    f"the JSON has more than {max_marks} commas and brackets; send less"
                )
            body += piece
    except ClientDisconnect:
        raise EditCancelledError from None
    return body


async def parse(text: bytearray) -> dict[str, object]:
    """The members of the object that a body holds; the text is one of `read_text`."""
    try:
        values = await asyncio.to_thread(json.loads, text)
    except (ValueError, RecursionError):
        raise InvalidParameterError("the body is no JSON that can be read") from None
    if not isinstance(values, dict):
        raise InvalidParameterError("the body must be a JSON object")
    return values


def given_again(body: bytes | bytearray, receive: Receive) -> Receive:
    """What an application receives whose body has been read before it."""
    given: list[Message] = [{"type": "http.request", "body": bytes(body)}]

    async def again() -> Message:
        return given.pop() if given else await receive()

    return again
