"""How long an edit may take, and how long its worker may be silent before it counts as hanging."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from step1x_edit.channel import Phase, Progress

STEPS: Final = (Phase.DENOISING, Phase.UPSCALING)
"""The phases whose steps take about the same time each."""
_STEPS_OF_SILENCE: Final = 10  # a step that takes this many usual ones hangs
_UNKNOWN_S: Final = 120.0  # patience for importing libraries and for the first step


@dataclass(frozen=True)
class TimeLimits:
    """Seconds that one edit may take, and that loading the model for it may take."""

    edit_s: float
    load_s: float


class Watch:
    """The time that an edit may take, and the silence that its worker may keep.

    Loading has a separate limit, and each of the two counts only while the worker does that.
    """

    def __init__(
        self,
        now: float,
        limits: TimeLimits,
        min_patience_s: float,
        *,
        has_previews: bool,
        is_loading: bool,
    ) -> None:
        """`is_loading` says whether the worker begins by loading the model."""
        self._has_previews = has_previews
        self.is_loading = is_loading
        self._since = now  # it loads, or edits
        self._left_s = {True: limits.load_s, False: limits.edit_s}  # by `is_loading`
        self._min_patience_s = min_patience_s
        self._last_sign = now
        self._stopped_at: float | None = None
        self._phase = Phase.LOADING
        self._usual_step_s: float | None = None

    @property
    def deadline(self) -> float:
        """When the edit has taken too long, or its loading has."""
        return self._since + self._left_s[self.is_loading]

    @property
    def limit(self) -> float:
        """When to stop waiting for the next report."""
        if self._stopped_at is not None:
            return self._hangs_from
        return min(self.deadline, self._hangs_from)

    def saw(self, progress: Progress, now: float) -> None:
        """Record a report."""
        is_longest = progress.preview is not None or not self._has_previews
        if is_longest and self._phase is progress.phase and progress.phase in STEPS:
            self._usual_step_s = max(self._usual_step_s or 0.0, now - self._last_sign)
        is_loading = progress.phase is Phase.LOADING
        if is_loading is not self.is_loading:
            self._left_s[self.is_loading] -= now - self._since
            self.is_loading, self._since = is_loading, now
        self._phase, self._last_sign = progress.phase, now

    def stopped(self, now: float) -> None:
        """Expect the edit to end from now on."""
        if self._stopped_at is None:
            self._stopped_at = now

    def hangs(self, now: float) -> bool:
        """Whether the worker has been silent for longer than its work takes."""
        return now >= self._hangs_from

    def silence(self, now: float) -> float:
        """Seconds since the last report."""
        return now - self._last_sign

    @property
    def _hangs_from(self) -> float:
        if self._stopped_at is not None:
            return self._stopped_at + self._patience_s
        if self._phase in STEPS and self._usual_step_s is not None:
            return self._last_sign + self._patience_s
        return math.inf  # the time of loading, encoding and decoding is not known

    @property
    def _patience_s(self) -> float:
        """The longest silence; generous until a step has been timed."""
        if self._usual_step_s is None:
            return max(self._min_patience_s, _UNKNOWN_S)
        return max(self._min_patience_s, _STEPS_OF_SILENCE * self._usual_step_s)
