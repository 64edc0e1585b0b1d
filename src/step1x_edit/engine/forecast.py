"""Whether an edit can end in time, predicted from earlier edits."""

from __future__ import annotations

from typing import Final

from step1x_edit.channel import EditJob, Job, Residence
from step1x_edit.engine.pace import Pace, Paces
from step1x_edit.errors import DeadlineExceededError

_HOPELESS: Final = 1.5
"""An edit is refused if even at the best pace so far it needs this many times what it may take.

A machine can be slower for a while, so a smaller excess is only a reason to warn.
"""

_RETRY_S: Final = 900.0
"""An edit is refused no longer if none like it has run for this time: the machine may be faster."""


class Forecast:
    """Predicts edits with the model of the last edit. Times are of the engine's clock."""

    def __init__(self, edit_timeout_s: float) -> None:
        self._limit_s = edit_timeout_s
        self._paces = Paces()
        self._last_model = Residence()  # of the last edit, also after a release

    def check(self, job: EditJob, now: float) -> None:
        """Raise DeadlineExceededError if such edits have always taken far longer than they may.

        They may be tried again if none has run for a while.
        """
        least_s = self._paces.least_seconds(job, self._last_model, now - _RETRY_S)
        if least_s >= _HOPELESS * self._limit_s:
            raise DeadlineExceededError(self.too_slow(job, least_s))

    def warning(self, job: EditJob) -> str | None:
        """A warning if such an edit is predicted to take longer than it may."""
        seconds = self.seconds(job)
        if seconds is None or seconds <= self._limit_s:
            return None
        return self.too_slow(job, seconds)

    def seconds(self, job: EditJob) -> float | None:
        """How long such an edit would take; None if unknown."""
        return self._paces.seconds(job, self._last_model)

    def began(self, job: EditJob, now: float) -> None:
        """Record that an edit begins."""
        self._paces.began(job, self._last_model, now)

    def learn(self, job: EditJob, residence: Residence, pace: Pace | None, now: float) -> None:
        """Remember how long an edit with this model has taken."""
        self._paces.learn(job, residence, pace, now)
        self._last_model = residence

    def too_slow(self, job: Job, seconds: float) -> str:
        """The sentence for an edit that takes too long."""
        return (
            f"such an edit takes about {seconds:.0f} s here, and EDIT_TIMEOUT is "
            f"{self._limit_s:g} s; use {job.quicker}, or a higher EDIT_TIMEOUT"
        )
