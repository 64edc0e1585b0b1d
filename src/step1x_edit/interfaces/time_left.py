"""How long the rest of a phase takes, by the steps that were seen.

The estimate is made when a step ends. Until the next one it counts down: reports of the same step,
which are signs of life, do not change it. The module knows nothing about what the work is.
"""

from __future__ import annotations

from collections.abc import Callable

Now = Callable[[], float]


class TimeLeft:
    """How long the rest of a phase takes, by the pace of what was done of it."""

    def __init__(self, now: Now) -> None:
        self._now = now
        self._phase: object = None
        self._first: tuple[float, float] | None = None
        self._last = 0.0
        self._end: float | None = None

    def saw(self, phase: object, done: float, total: float | None) -> None:
        """Take note of how far the work is; a report that comes again changes nothing."""
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
