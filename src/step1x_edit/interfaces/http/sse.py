"""Server-sent events: their text, and streams that survive silence and end at shutdown."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final, TypeVar

T = TypeVar("T")

EVENT_STREAM: Final = "text/event-stream"
KEEP_ALIVE_S: Final = (
    15.0  # many proxies close a connection after a minute of silence, some after half
)


def named(name: str, data: Mapping[str, Any]) -> str:
    """One event with a name, as text."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


async def kept_alive(
    events: AsyncIterator[str], closing: asyncio.Event, keep_alive_s: float
) -> AsyncIterator[str]:
    """The events until they end or `closing` is set, with a comment after each silence."""
    coming = asyncio.ensure_future(next_of(events))
    end = asyncio.ensure_future(closing.wait())
    try:
        while not end.done():
            either: set[asyncio.Future[Any]] = {coming, end}
            await asyncio.wait(either, timeout=keep_alive_s, return_when=asyncio.FIRST_COMPLETED)
            if coming.done():
                event = coming.result()
                if event is None:
                    return
                yield event
                coming = asyncio.ensure_future(next_of(events))
            elif not end.done():
                yield ": still there\n\n"
    finally:
        coming.cancel()
        end.cancel()


async def next_of(events: AsyncIterator[T]) -> T | None:
    """The next event, or None at the end."""
    return await anext(events, None)
