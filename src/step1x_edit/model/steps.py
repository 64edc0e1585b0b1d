"""Which work each step of the denoising loop does, and what was done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Evaluations:
    """How often the transformer ran, once for each prompt of a step, and how often it could have.

    An exact edit skips none.
    """

    done: int
    skipped: int = 0
