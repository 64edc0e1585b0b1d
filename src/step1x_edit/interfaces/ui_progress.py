"""The line of a running edit: what is being done, and about how long it still takes."""

from __future__ import annotations

import time
from collections.abc import Callable

from step1x_edit.channel import Phase, Progress
from step1x_edit.interfaces.ui_lines import alert, bar_line
from step1x_edit.interfaces.ui_texts import text


class ProgressLine:
    """Puts the progress of one edit into words.

    The time left is estimated when a step ends, from the steps so far. Until the next one it counts
    down: the same progress is reported again in between, as a sign of life.
    """

    def __init__(
        self, language: str, prefix: str = "", now: Callable[[], float] = time.monotonic
    ) -> None:
        self._language = language
        self._prefix = prefix
        self._now = now
        self._begun: float | None = None
        self._first: tuple[int, float] | None = None
        self._step = 0
        self._ends: float | None = None
        self.is_known = True
        """Whether the model has learned such an edit."""

    @property
    def seconds(self) -> float:
        """How long the edit takes so far, without its wait in the queue."""
        return 0.0 if self._begun is None else self._now() - self._begun

    def show(self, progress: Progress) -> str:
        """The line for this progress, as HTML."""
        if self._begun is None and progress.phase is not Phase.QUEUED:
            self._begun = self._now()
        self.is_known = self.is_known and progress.is_known
        words, share = self._words(progress), 0.0
        match progress.phase:
            case Phase.LOADING | Phase.ENCODING:  # of the next round, or after memory ran out
                self._first = self._ends = None
                self._step = 0
            case Phase.DENOISING:
                share = progress.step / progress.total
                left = self._left(progress)
                if left is not None:
                    words += " · " + text("left", self._language, seconds=left)
            case Phase.DECODING | Phase.REFLECTING | Phase.SAVING:
                share = 1.0
        line = bar_line(self._prefix + words, share)
        return line if self.is_known else line + alert(text("unknown_edit", self._language))

    def _words(self, progress: Progress) -> str:
        key = f"phase.{progress.phase.value}"
        return text(key, self._language, step=progress.step, total=progress.total)

    def _left(self, progress: Progress) -> int | None:
        """Whole seconds until the last step ends, if that can be estimated."""
        now = self._now()
        if progress.step > self._step:
            self._step = progress.step
            if self._first is None:
                self._first = (progress.step, now)
            else:
                steps, seconds = progress.step - self._first[0], now - self._first[1]
                self._ends = now + seconds / steps * (progress.total - progress.step)
        if self._ends is None or self._ends - now < 1:  # late, by an unknown time
            return None
        return round(self._ends - now)
