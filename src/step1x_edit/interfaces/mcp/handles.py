"""Edits that may outlive the call that started them, by handles.

`Handles` keeps pursuits under ids that nobody can guess, and forgets those that ended long ago.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Generic, TypeVar

from step1x_edit.errors import JobNotFoundError, Step1XEditError
from step1x_edit.interfaces.pursuits import Pursuit

log = logging.getLogger(__name__)

P = TypeVar("P", bound=Pursuit[Any, Any])

KEPT: Final = 64
KEPT_S: Final = 3600.0


class Handles(Generic[P]):
    """Pursuits by id. All running ones, and the last few that have ended, for a limited time."""

    def __init__(
        self, kept: int = KEPT, kept_s: float = KEPT_S, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._kept = kept
        self._kept_s = kept_s
        self._now = now
        self._pursuits: dict[str, P] = {}
        self._ended_at: dict[str, float] = {}  # in the order of their ends

    def add(self, pursuit: P) -> str:
        """Keep a pursuit; the id is sufficient to find, follow and stop it."""
        job_id = f"edit_{secrets.token_urlsafe(16)}"
        self._pursuits[job_id] = pursuit
        pursuit.on_end(partial(self._note_end, job_id))
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
        """Stop all running pursuits, and wait until they have stopped."""
        running = [pursuit for pursuit in self._pursuits.values() if not pursuit.is_done]
        for pursuit in running:
            pursuit.cancel()
        for pursuit in running:
            async for _ in pursuit.events():
                pass

    def _note_end(self, job_id: str, task: asyncio.Task[Any]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, Step1XEditError):
            log.error("failed unexpectedly", exc_info=error)  # its result may never be requested
        self._ended_at[job_id] = self._now()
        self._forget_old()

    def _forget_old(self) -> None:
        too_many = len(self._ended_at) - self._kept
        for index, (job_id, ended_at) in enumerate(list(self._ended_at.items())):
            if index >= too_many and self._now() - ended_at < self._kept_s:
                return
            del self._ended_at[job_id], self._pursuits[job_id]
