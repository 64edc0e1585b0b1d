"""Work that may outlive the call that asked for it, and the handles by which it is found again.

A `Pursuit` is work in a task of its own, with how far it has come; whoever wants to know listens,
and may stop listening at any time without stopping the work. `Handles` keeps pursuits under ids
that nobody can guess, and forgets those that ended long ago. Nothing here knows what the work is,
and nothing survives the process: that is what stored jobs are for.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, Final, Generic, TypeAlias, TypeVar

from step1x_edit.channel import Progress
from step1x_edit.errors import EditCancelledError, JobNotFoundError, Step1XEditError

log = logging.getLogger(__name__)

T = TypeVar("T")
P = TypeVar("P", bound="Pursuit[Any]")

Work: TypeAlias = Callable[[Callable[[Progress], Awaitable[None]]], Coroutine[Any, Any, T]]
"""Does something, and reports how far it has come to what it is given."""

KEPT: Final = 64
KEPT_S: Final = 3600.0


class Pursuit(Generic[T]):
    """Work that has been started. It goes on until it ends or is cancelled, listened to or not."""

    def __init__(self, work: Work[T]) -> None:
        self.progress: Progress | None = None
        self._listeners: set[asyncio.Queue[Progress | None]] = set()
        # In an empty context: it must not hold on to the request of the call that starts it.
        self._task: asyncio.Task[T] = contextvars.Context().run(
            asyncio.ensure_future, work(self._hear)
        )
        self._task.add_done_callback(self._ended)

    @property
    def is_done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self._task.done()

    async def events(self, wait_s: float | None = None) -> AsyncGenerator[Progress, None]:
        """Yield the last event and those that follow, until the end or for `wait_s` seconds."""
        loop = asyncio.get_running_loop()
        until = None if wait_s is None else loop.time() + wait_s
        heard: asyncio.Queue[Progress | None] = asyncio.Queue()
        if self.progress is not None:
            heard.put_nowait(self.progress)
        if self.is_done:
            heard.put_nowait(None)
        self._listeners.add(heard)
        try:
            while True:
                # Not wait_for: before Python 3.12 it can swallow the cancellation of its caller.
                getting = asyncio.ensure_future(heard.get())
                left = None if until is None else max(0.0, until - loop.time())
                try:
                    await asyncio.wait({getting}, timeout=left)
                finally:
                    getting.cancel()  # does nothing to one that has ended
                if not getting.done() or (event := getting.result()) is None:
                    return
                yield event
        finally:
            self._listeners.discard(heard)

    async def begun(self) -> None:
        """Wait until it has reported for the first time, or has ended."""
        async with contextlib.aclosing(self.events()) as events:
            async for _ in events:
                return

    def result(self) -> T:
        """What came of it, once it has ended; raises what ended it."""
        if self._task.cancelled():
            raise EditCancelledError()
        return self._task.result()

    def cancel(self) -> None:
        """Stop it; does nothing if it has ended."""
        self._task.cancel()

    def on_end(self, callback: Callable[[], None]) -> None:
        """Have something called when it has ended."""
        self._task.add_done_callback(lambda _: callback())

    async def _hear(self, event: Progress) -> None:
        self.progress = event
        for listener in self._listeners:
            listener.put_nowait(event)

    def _ended(self, task: asyncio.Task[T]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, Step1XEditError):
            log.error("failed unexpectedly", exc_info=error)  # perhaps nobody will ask
        for listener in self._listeners:
            listener.put_nowait(None)


class Handles(Generic[P]):
    """Pursuits by id. All that run, and of those that have ended the last few, for a while."""

    def __init__(
        self, kept: int = KEPT, kept_s: float = KEPT_S, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._kept = kept
        self._kept_s = kept_s
        self._now = now
        self._pursuits: dict[str, P] = {}
        self._ended_at: dict[str, float] = {}  # in the order of their ends

    def add(self, pursuit: P) -> str:
        """Keep a pursuit; the id is all that is needed to find, follow and stop it."""
        job_id = f"edit_{secrets.token_urlsafe(16)}"
        self._pursuits[job_id] = pursuit
        pursuit.on_end(lambda: self._note_end(job_id))
        return job_id

    def get(self, job_id: str) -> P:
        """Find a pursuit; raises JobNotFoundError."""
        self._forget_old()
        try:
            return self._pursuits[job_id]
        except KeyError:
            raise JobNotFoundError(
                f"{job_id[:60]!r} is not a job of this server; finished jobs are kept for "
                f"{self._kept_s / 60:.0f} minutes, and none survives a restart"
            ) from None

    async def close(self) -> None:
        """Stop all that runs, and wait until it has stopped."""
        running = [pursuit for pursuit in self._pursuits.values() if not pursuit.is_done]
        for pursuit in running:
            pursuit.cancel()
        for pursuit in running:
            async for _ in pursuit.events():
                pass

    def _note_end(self, job_id: str) -> None:
        self._ended_at[job_id] = self._now()
        self._forget_old()

    def _forget_old(self) -> None:
        too_many = len(self._ended_at) - self._kept
        for index, (job_id, ended_at) in enumerate(list(self._ended_at.items())):
            if index >= too_many and self._now() - ended_at < self._kept_s:
                return
            del self._ended_at[job_id], self._pursuits[job_id]
