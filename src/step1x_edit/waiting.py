"""Waiting for one of several things, and signs of life during a long wait."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


async def first_of(*tasks: asyncio.Future[Any], timeout_s: float | None = None) -> bool:
    """Wait until one of the tasks is done; False after the timeout. Cancels none of them."""
    # Not wait_for: before Python 3.12 it can swallow the cancellation of its caller.
    done, _ = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    return bool(done)


def drop(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks whose outcome is not needed, so that asyncio does not warn of their errors."""
    for task in tasks:
        task.cancel()  # does nothing if it is done
        task.add_done_callback(_note_error)


def _note_error(task: asyncio.Future[Any]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None:
        log.debug("an error after the end of its call", exc_info=error)


async def unless(end: Awaitable[object], work: Awaitable[T], error: Exception) -> T:
    """Wait for the work. If `end` comes first, cancel the work and raise the error."""
    working, ending = asyncio.ensure_future(work), asyncio.ensure_future(end)
    try:
        await first_of(working, ending)
        if not working.done():
            raise error
        return working.result()
    finally:
        drop(working, ending)


async def until(end: Awaitable[object], events: AsyncIterator[T]) -> AsyncGenerator[T, None]:
    """Yield the events that come before `end`."""
    ending = asyncio.ensure_future(end)
    try:
        while not ending.done():
            coming = asyncio.ensure_future(_next_of(events))
            try:
                await first_of(coming, ending)
                event = coming.result() if coming.done() else None
            finally:
                drop(coming)
            if event is None:
                return
            yield event
    finally:
        drop(ending)


async def heartbeats(events: AsyncIterator[T], every_s: float) -> AsyncGenerator[T | None, None]:
    """Yield the events, and None after each `every_s` without one."""
    while True:
        coming = asyncio.ensure_future(_next_of(events))
        try:
            while not await first_of(coming, timeout_s=every_s):
                yield None
            event = coming.result()
        finally:
            drop(coming)
        if event is None:
            return
        yield event


async def with_heartbeats(
    work: Awaitable[T], beat: Callable[[], Awaitable[object]], every_s: float
) -> T:
    """Wait for the work, and call `beat` after each `every_s` until it is done."""
    task = asyncio.ensure_future(work)
    try:
        while not await first_of(task, timeout_s=every_s):
            await beat()
        return task.result()
    finally:
        drop(task)


async def _next_of(events: AsyncIterator[T]) -> T | None:
    """The next event; None after the last."""
    return await anext(events, None)
