"""Server-sent events: how one is written, and how a stream lives through silence and shutdown."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final, TypeVar

T = TypeVar("T")

EVENT_STREAM: Final = "text/event-stream"
KEEP_ALIVE_S: Final = 15.0  # many proxies close what is silent for a minute, some for half of it


def named(name: str, data: Mapping[str, Any]) -> str:
    """One event with a name, as text."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


async def kept_alive(
    events: AsyncIterator[str], closing: asyncio.Event, keep_alive_s: float
) -> AsyncIterator[str]:
    """The events up to their end or until `closing`, and a comment whenever there was none."""
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
    """The next event, or None if none comes any more."""
    return await anext(events, None)
