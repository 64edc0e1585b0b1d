"""Runs stored jobs: takes them from the store in order and passes them to an operation.

The operation is passed in, so the runner knows nothing about pictures, models or protocols.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final, TypeAlias, TypeVar

from step1x_edit.channel import Progress
from step1x_edit.errors import (
    EditCancelledError,
    InternalError,
    NoSpaceError,
    ServerBusyError,
    ShuttingDownError,
    Step1XEditError,
)
from step1x_edit.service.editor import Reporter
from step1x_edit.service.job_store import Job, JobInput, JobStore
from step1x_edit.waiting import first_of

log = logging.getLogger(__name__)

T = TypeVar("T")

TIDY_INTERVAL_S: Final = 3600.0
_RETRY_S: Final = 5.0  # for a full disk to get free space

Operation: TypeAlias = Callable[
    [JobInput, Mapping[str, object], Reporter],
    Awaitable[tuple[bytes, Mapping[str, object]]],
]
"""The work: takes the input, the request and a function to report progress to; returns the result
and the answer. It can be cancelled, and raises a Step1XEditError if it fails."""


class JobRunner:
    """Runs the jobs of a store in order, `lanes` at a time, while it is entered.

    On exit the running jobs are stopped and queued again. An operation that raises
    ShuttingDownError has the same effect: the job itself has not failed.
    """

    def __init__(
        self,
        store: JobStore,
        operation: Operation,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        lanes: int = 1,
    ) -> None:
        self._store = store
        self._operation = operation
        self._lanes = lanes
        self._pause = pause
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> JobRunner:
        work = [self._work() for _ in range(self._lanes)]
        self._tasks = [asyncio.create_task(each) for each in (*work, self._keep_tidy())]
        return self

    async def __aexit__(self, *_: object) -> None:
        await _stop(*self._tasks)
        with contextlib.suppress(NoSpaceError, InternalError):  # the next start ends the job
            await self._store.put_back()

    async def _work(self) -> None:
        with contextlib.suppress(ShuttingDownError):
            while True:
                job = await self._insist(self._store.start_next)
                log.info("job %s started", job.id)
                await self._run(job)

    async def _keep_tidy(self) -> None:
        with contextlib.suppress(ShuttingDownError):
            while True:
                await self._pause(TIDY_INTERVAL_S)
                await self._insist(self._store.tidy)

    async def _run(self, job: Job) -> None:
        """Run the job until it ends or is cancelled."""
        attempt = asyncio.create_task(self._attempt(job))
        end = asyncio.create_task(self._insist(partial(self._store.wait, job.id)))
        try:
            await first_of(attempt, end)
        finally:
            await _stop(attempt, end)
        if attempt.cancelled():  # no effect if the caller cancelled the job
            await self._insist(partial(self._store.end, job.id, EditCancelledError()))
        else:
            attempt.result()

    async def _attempt(self, job: Job) -> None:
        try:
            result, answer = await self._operate(job)
            await self._store.succeed(job.id, result, answer)
        except ShuttingDownError:
            raise
        except Step1XEditError as error:
            log.info("job %s: %s", job.id, error)
            await self._insist(partial(self._store.end, job.id, error))
        except Exception:  # a failing job must not stop the others
            log.exception("job %s", job.id)
            unknown = InternalError(f"job {job.id} failed, see the log")
            await self._insist(partial(self._store.end, job.id, unknown))

    async def _operate(self, job: Job) -> tuple[bytes, Mapping[str, object]]:
        async def report(progress: Progress) -> None:
            with contextlib.suppress(NoSpaceError, InternalError):  # not a reason to stop the job
                await self._store.note(job.id, progress)

        given = await self._store.read_input(job.id)
        while True:
            try:
                return await self._operation(given, job.request, report)
            except ServerBusyError as error:  # others fill the queue; this job was accepted
                await self._pause(error.retry_after_s or _RETRY_S)

    async def _insist(self, step: Callable[[], Awaitable[T]]) -> T:
        """Take a step that must not be skipped; retry it while the disk refuses it."""
        while True:
            try:
                return await step()
            except (NoSpaceError, InternalError) as error:
                log.warning("%s; trying again in %g s", error, _RETRY_S)
                await self._pause(_RETRY_S)


async def _stop(*tasks: asyncio.Task[T]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
