"""Server-sent events: their text, and streams that survive silence and end at shutdown."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from step1x_edit.waiting import heartbeats, until

EVENT_STREAM: Final = "text/event-stream"
KEEP_ALIVE_S: Final = 15.0  # many proxies close a silent connection after 60 s, some after 30 s
STILL_THERE: Final = ": still there\n\n"


def named(name: str, data: Mapping[str, Any]) -> str:
    """One event with a name, as text."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


async def kept_alive(
    events: AsyncIterator[str], closing: asyncio.Event, keep_alive_s: float
) -> AsyncIterator[str]:
    """The events up to their end or until `closing`, and a comment after each silence."""
    async for event in heartbeats(until(closing.wait(), events), keep_alive_s):
        yield STILL_THERE if event is None else event
