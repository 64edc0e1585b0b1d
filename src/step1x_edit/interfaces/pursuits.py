"""Work in a separate task, with its events for any number of listeners.

A listener may join late and may leave at any time; neither stops the work. The module knows nothing
about the work. A pursuit ends with the process; stored jobs survive it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeAlias, TypeVar

from step1x_edit.errors import EditCancelledError
from step1x_edit.waiting import first_of

E = TypeVar("E")
T = TypeVar("T")

Notify: TypeAlias = Callable[[E], Awaitable[None]]
"""Reports an event of the work."""
Work: TypeAlias = Callable[[Notify[E]], Coroutine[Any, Any, T]]


class Pursuit(Generic[E, T]):
    """Work that has started. It continues until it ends or is cancelled, listened to or not."""

    def __init__(self, work: Work[E, T]) -> None:
        self._past: list[E] = []
        self._news = asyncio.Event()
        self._task: asyncio.Task[T] = asyncio.ensure_future(work(self._notify))
        # If nobody asks for the result, asyncio must not warn about its error.
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._task.add_done_callback(lambda _: self._wake())

    @property
    def is_done(self) -> bool:
        """Whether the work has ended, by success, error or cancellation."""
        return self._task.done()

    @property
    def last_event(self) -> E | None:
        """The last event so far."""
        return self._past[-1] if self._past else None

    def events(self) -> AsyncGenerator[E, None]:
        """Yield all events, from the first to the end of the work."""
        return self._events_from(0)

    def latest_events(self) -> AsyncGenerator[E, None]:
        """Yield the last event so far and those that follow, to the end of the work."""
        return self._events_from(max(0, len(self._past) - 1))

    async def begun(self) -> None:
        """Wait for the first event; raises what has ended the work before it."""
        async with contextlib.aclosing(self.events()) as events:
            async for _ in events:
                return
        await self.result()

    async def result(self) -> T:
        """Wait for the result; raises the error that ended the work."""
        await first_of(self._task)  # a caller that stops waiting does not cancel the work
        if self._task.cancelled():
            raise EditCancelledError
        return self._task.result()

    def cancel(self) -> None:
        """Cancel the work; does nothing if it has ended."""
        self._task.cancel()

    def on_end(self, callback: Callable[[asyncio.Task[T]], None]) -> None:
        """Call back at the end of the work, with its task."""
        self._task.add_done_callback(callback)

    async def _events_from(self, position: int) -> AsyncGenerator[E, None]:
        while True:
            news = self._news
            while position < len(self._past):
                position += 1
                yield self._past[position - 1]
            if self._task.done():
                return
            await news.wait()  # returns at once if something happened during a yield

    async def _notify(self, event: E) -> None:
        self._past.append(event)
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
