"""The line of a running edit: its phase, and an estimate of the time left."""

from __future__ import annotations

import time

from step1x_edit.channel import GIGA, Phase, Progress
from step1x_edit.interfaces.page.lines import bar_line, caution
from step1x_edit.interfaces.page.texts import text
from step1x_edit.time_left import Now, TimeLeft


class ProgressLine:
    """Describes the progress of one edit."""

    def __init__(self, language: str, prefix: str = "", now: Now = time.monotonic) -> None:
        self._language = language
        self._prefix = prefix
        self._now = now
        self._begun: float | None = None
        self._left = TimeLeft(now)
        self.is_known = True
        """Whether the model was trained for this kind of edit."""

    @property
    def seconds(self) -> float:
        """Seconds since the edit left the queue."""
        return 0.0 if self._begun is None else self._now() - self._begun

    def show(self, progress: Progress) -> str:
        """The line for this progress, as HTML."""
        if self._begun is None and progress.phase is not Phase.QUEUED:
            self._begun = self._now()
        self.is_known = self.is_known and progress.is_known
        cautions = [] if self.is_known else ["unknown_edit"]
        cautions += [] if progress.warning is None else ["slow_edit"]
        words, share = words_of(progress, self._language), 0.0
        done, total = progress.work
        self._left.saw(progress.phase, done, total if progress.is_counted else None)
        if progress.is_counted:
            share = done / total
            left = self._left.seconds
            if left is not None and left > 1:  # otherwise overdue by an unknown time
                words += " · " + text("left", self._language, seconds=round(left))
        elif progress.phase in (Phase.DECODING, Phase.REFLECTING, Phase.SAVING):
            share = 1.0
        notices = (caution(text(key, self._language)) for key in cautions)
        return bar_line(self._prefix + words, share) + "".join(notices)


def words_of(progress: Progress, language: str) -> str:
    """The phase of an edit, and what is done of it."""
    step, total = progress.step, progress.total
    if progress.phase is Phase.LOADING and step < total:
        read, size = f"{step / GIGA:.1f}", f"{total / GIGA:.1f}"
        return text("phase.reading", language, read=read, size=size)
    return text(f"phase.{progress.phase.value}", language, step=step, total=total)
