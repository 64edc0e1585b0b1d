"""How long edits take, learned from those that have been made; a guess is never told.

An edit takes so much for each step, and so much besides. Both depend on the model, on where it
computes, on the working size and on what a step has to do, so only edits of the same kind are
asked. What a loading model takes is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from step1x_edit.channel import EditJob, Phase, Progress, Residence

_MOST_KINDS: Final = 64


@dataclass(frozen=True)
class Kind:
    """What edits that take equally long have in common, but for the number of their steps."""

    model: str | None
    device: str | None
    size_level: int
    is_guided: bool
    has_previews: bool
    thinking: bool

    @classmethod
    def of(cls, job: EditJob, residence: Residence) -> Kind:
        """The kind of an edit with this model."""
        return cls(
            model=residence.model,
            device=residence.device,
            size_level=job.size_level,
            is_guided=job.guidance_scale > 1,
            has_previews=job.previews > 0,
            thinking=job.thinking,
        )


@dataclass(frozen=True)
class Pace:
    """Seconds of an edit: for each step, and for all the rest."""

    step_s: float
    rest_s: float

    def seconds(self, num_steps: int) -> float:
        """Of an edit with so many steps."""
        return self.rest_s + num_steps * self.step_s


class Stopwatch:
    """Times one edit by what its worker tells; times are those of the engine's clock."""

    def __init__(self) -> None:
        self._begun: float | None = None
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def saw(self, progress: Progress, now: float) -> None:
        """Take note of how far the edit is."""
        if progress.phase is Phase.LOADING:
            self._begun = self._first = self._last = None  # also on the way, when memory ran out
            return
        if self._begun is None:
            self._begun = now
        if progress.phase is Phase.DENOISING:
            self._last = (progress.step, now)
            self._first = self._first or self._last

    def pace(self, job: EditJob, now: float) -> Pace | None:
        """The pace of an edit that has just ended; None if too little of it was seen."""
        if self._begun is None or self._first is None or self._last is None:
            return None
        steps, seconds = (b - a for a, b in zip(self._first, self._last, strict=True))
        if steps < 1:
            return None
        step_s = seconds / steps
        return Pace(step_s, max(0.0, now - self._begun - job.num_steps * step_s))


class Paces:
    """The pace of the last edit of each kind."""

    def __init__(self) -> None:
        self._known: dict[Kind, Pace] = {}

    def learn(self, job: EditJob, residence: Residence, pace: Pace | None) -> None:
        """Remember how long an edit has taken."""
        if pace is None or job.reflection:  # nobody knows beforehand how often it tries again
            return
        kind = Kind.of(job, residence)
        self._known.pop(kind, None)
        self._known[kind] = pace
        if len(self._known) > _MOST_KINDS:
            del self._known[next(iter(self._known))]

    def seconds(self, job: EditJob, residence: Residence) -> float | None:
        """How long such an edit will take; None if there was none of its kind."""
        pace = None if job.reflection else self._known.get(Kind.of(job, residence))
        return None if pace is None else pace.seconds(job.num_steps)
