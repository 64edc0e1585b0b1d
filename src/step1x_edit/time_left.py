"""Estimates the remaining time of a phase from the observed steps.

The estimate is made when a step ends. Until the next one it counts down: repeated reports of the
same step are heartbeats and do not change it. The module knows nothing about the work.
"""

from __future__ import annotations

from collections.abc import Callable

Now = Callable[[], float]


class TimeLeft:
    """Estimates the remaining time of a phase from its pace so far."""

    def __init__(self, now: Now) -> None:
        self._now = now
        self._phase: object = None
        self._first: tuple[float, float] | None = None
        self._last = 0.0
        self._end: float | None = None

    def saw(self, phase: object, done: float, total: float | None) -> None:
        """Record the progress of the work; a repeated report changes nothing."""
        now = self._now()
        if total is None or phase != self._phase or self._first is None or done < self._last:
            self._phase, self._end, self._last = phase, None, done
            self._first = None if total is None else (done, now)
        elif done > self._last:
            first, begun = self._first
            self._end = now + (total - done) * (now - begun) / (done - first)
            self._last = done

    @property
    def seconds(self) -> float | None:
        """Seconds until the end of the phase, at least 1; None if nothing is known."""
        return None if self._end is None else max(1.0, self._end - self._now())
