"""How long edits take, learned from earlier edits; guesses are never reported.

The time of an edit is a time per step in which the network runs, plus a rest. Both depend on the
model, on its device, on the working size and on the work of a step, so only edits of the same kind
are compared. An exact edit tells the time of a fast one, and the reverse, until there was one of
the same kind: a step that need not be exact may multiply 8-bit codes. Loading the model is not
counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from step1x_edit.channel import EditJob, Phase, Progress, Residence
from step1x_edit.model.steps import Evaluations, num_evaluated

_MOST_KINDS: Final = 64


@dataclass(frozen=True)
class Kind:
    """What determines the time of an edit, except in how many steps the network runs."""

    model: str | None
    device: str | None
    size_level: int
    width: int
    height: int
    is_guided: bool
    thinking: bool
    reflection: bool
    is_exact: bool
    is_regional: bool

    @classmethod
    def of(cls, job: EditJob, residence: Residence) -> Kind:
        """The kind of an edit with this model."""
        return cls(
            model=residence.model,
            device=residence.device,
            size_level=job.size_level,
            width=job.width,
            height=job.height,
            is_guided=job.guidance_scale > 1,
            thinking=job.thinking,
            reflection=job.reflection,
            is_exact=job.mode == "exact",
            is_regional=job.mode == "turbo" and job.mask is not None,
        )


@dataclass(frozen=True)
class Pace:
    """Seconds of an edit, or of each round of a reflection: per evaluated step, and the rest."""

    step_s: float
    rest_s: float

    def seconds(self, job: EditJob) -> float:
        """The time of one round of such an edit."""
        return self.rest_s + num_evaluated(job.mode, job.num_steps) * self.step_s


class Stopwatch:
    """Times one edit by its worker's progress; times are those of the engine's clock."""

    def __init__(self) -> None:
        self._begun: float | None = None
        self._forget()

    def _forget(self) -> None:
        self._last: tuple[int, float] | None = None
        self._rounds = self._steps = 0
        self._steps_s = 0.0

    def saw(self, progress: Progress, now: float) -> None:
        """Record the progress of the edit."""
        if progress.phase is Phase.LOADING:
            self._begun = None  # also during an edit, if memory ran out
            self._forget()
            return
        if self._begun is None:
            self._begun = now
        if progress.phase is not Phase.DENOISING:
            return
        if self._last is None or progress.step <= self._last[0]:
            self._rounds += 1
        else:
            self._steps += progress.step - self._last[0]
            self._steps_s += now - self._last[1]
        self._last = (progress.step, now)

    def pace(self, job: EditJob, runs: Evaluations | None, now: float) -> Pace | None:
        """The pace of an edit that has just ended; None if it had too few steps."""
        if self._begun is None or self._steps < 1:
            return None
        evaluated = job.num_steps
        if runs is not None:
            evaluated = round(evaluated * runs.done / (runs.done + runs.skipped))
        # The first step of a round, which is evaluated, is not timed.
        share = (evaluated - 1) / (job.num_steps - 1)
        step_s = self._steps_s / (share * self._steps)
        round_s = (now - self._begun) / self._rounds
        return Pace(step_s, max(0.0, round_s - evaluated * step_s))


@dataclass
class _Known:
    """What is known of a kind of edit."""

    last: Pace
    best: Pace
    tried: float
    """When the last such edit began, or ended with a picture."""


class Paces:
    """The pace of the last edit of each kind, and the best. Times are of the engine's clock."""

    def __init__(self) -> None:
        self._known: dict[Kind, _Known] = {}

    def began(self, job: EditJob, residence: Residence, now: float) -> None:
        """Record that an edit begins."""
        if known := self._find(job, residence):
            known.tried = now

    def learn(self, job: EditJob, residence: Residence, pace: Pace | None, now: float) -> None:
        """Remember how long an edit has taken."""
        if pace is None:
            return
        kind = Kind.of(job, residence)
        known = self._known.pop(kind, None)
        best = pace if known is None else known.best
        best = Pace(min(pace.step_s, best.step_s), min(pace.rest_s, best.rest_s))
        self._known[kind] = _Known(pace, best, now)
        if len(self._known) > _MOST_KINDS:
            del self._known[next(iter(self._known))]

    def seconds(self, job: EditJob, residence: Residence) -> float | None:
        """The time of such an edit; None if there was none of its kind.

        The number of rounds of a reflection is not known in advance: this is the time of all.
        """
        known = self._find(job, residence)
        if known is None:
            return None
        return known.last.seconds(job) * (job.reflection_rounds if job.reflection else 1)

    def least_seconds(self, job: EditJob, residence: Residence, since: float) -> float:
        """The time that such an edit needs at the best pace so far; 0 if none was tried since then.

        That of one round: a reflection may end after it.
        """
        known = self._find(job, residence)
        return 0.0 if known is None or known.tried < since else known.best.seconds(job)

    def _find(self, job: EditJob, residence: Residence) -> _Known | None:
        """What is known of an edit's kind, or else of the same work with other products."""
        kind = Kind.of(job, residence)
        return self._known.get(kind) or self._known.get(replace(kind, is_exact=not kind.is_exact))
