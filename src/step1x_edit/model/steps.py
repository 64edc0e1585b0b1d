"""Which work each step of the denoising loop does, and what was done; without torch.

An exact edit runs the transformer in every step, for both prompts. Its velocity bends little along
t, except in places that depend on the checkpoint. So a `Profile`, which was measured for the
checkpoint, says how densely it must be evaluated along t, and the steps between are extrapolated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final

from step1x_edit.model.request import Mode

SHARES: Final[Mapping[Mode, float]] = {"exact": 1.0, "fast": 0.5, "turbo": 0.38}
"""The share of the steps in which the transformer runs."""

FEWEST: Final = 4
"""No edit evaluates fewer: the first, the last, that in which guidance changes, and one more."""


class Action(Enum):
    """How a step gets its velocity."""

    FULL = "full"
    """The transformer runs, for each prompt."""
    REGION = "region"
    """It runs the text and the tokens that a mask lets change; the others are extrapolated."""
    REUSE = "reuse"
    """Nothing runs: the velocity is extrapolated."""


@dataclass(frozen=True)
class StepPolicy:
    """What each step of a schedule does."""

    actions: tuple[Action, ...]
    jumps: frozenset[int] = frozenset()
    """The steps in which guidance begins to follow another rule, and extrapolation begins again."""

    @property
    def evaluated(self) -> tuple[int, ...]:
        """The steps in which the transformer runs."""
        return tuple(
            index for index, action in enumerate(self.actions) if action is not Action.REUSE
        )

    def with_regions(self) -> StepPolicy:
        """Run a region in every other evaluated step after the first two and the jumps.

        The last step is run in full.
        """
        begin = max([self.evaluated[1], *self.jumps])
        regions = [index for index in self.evaluated if index > begin][:-1:2]
        actions = (
            Action.REGION if index in regions else action
            for index, action in enumerate(self.actions)
        )
        return replace(self, actions=tuple(actions))


@dataclass(frozen=True)
class Evaluations:
    """How often the transformer ran, once for each prompt of a step, and how often it could have.

    An exact edit skips none.
    """

    done: int
    skipped: int = 0


@dataclass(frozen=True)
class Curve:
    """How densely a velocity must be evaluated along t in pictures of one size."""

    tokens: int
    density: tuple[tuple[float, float], ...]
    """Pairs of t, falling, and weight; between them it is linear."""

    @property
    def is_sound(self) -> bool:
        """Whether t falls from point to point, and the weights are numbers from 0."""
        falls = all(t > t_next for (t, _), (t_next, _) in itertools.pairwise(self.density))
        weighs = all(math.isfinite(t) and 0 <= w < math.inf for t, w in self.density)
        return bool(self.density) and falls and weighs

    def mass(self, t: float, t_next: float) -> float:
        """The integral of the density over a step."""
        return (t - t_next) * (self._at(t) + self._at(t_next)) / 2

    def _at(self, t: float) -> float:
        if t >= self.density[0][0]:
            return self.density[0][1]
        for (high, above), (low, below) in itertools.pairwise(self.density):
            if t >= low:
                return below + (above - below) * (t - low) / (high - low)
        return self.density[-1][1]


@dataclass(frozen=True)
class Profile:
    """What `scripts/calibrate_steps.py` measured of a checkpoint, or others published of it."""

    curves: tuple[Curve, ...]
    """By size, the smallest first."""
    caveat: str | None = None
    """What its user should know; None if it was measured."""
    has_regions: bool = False
    """Whether to run the region of a mask alone in some steps: if it comes nearer to an exact edit
    than skipping as much work."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Profile:
        """Build a profile from plain data. Raises ValueError if it does not fit."""
        try:
            curves = [
                Curve(int(each["tokens"]), tuple((float(t), float(w)) for t, w in each["density"]))
                for each in data["curves"]
            ]
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"not a profile of steps: {error!r}") from error
        if not curves or not all(curve.is_sound for curve in curves):
            raise ValueError("a profile needs curves of falling t with weights from 0")
        has_regions = bool(data.get("has_regions", False))
        by_size = sorted(curves, key=lambda curve: curve.tokens)
        return cls(tuple(by_size), has_regions=has_regions)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data, rounded; `from_json` turns it back."""
        curves = [
            {
                "tokens": curve.tokens,
                "density": [(round(t, 3), round(weight, 2)) for t, weight in curve.density],
            }
            for curve in self.curves
        ]
        return {"has_regions": self.has_regions, "curves": curves}

    def masses(self, tokens: int, times: Sequence[float]) -> list[float]:
        """How much of the density each step of a schedule has, by interpolation between sizes.

        Raises ValueError for a size that was not measured; published figures serve all sizes.
        """
        if self.caveat is not None:
            return [self.curves[0].mass(*step) for step in itertools.pairwise(times)]
        below = [curve for curve in self.curves if curve.tokens <= tokens]
        above = [curve for curve in self.curves if curve.tokens >= tokens]
        if not below or not above:
            sizes = f"{self.curves[0].tokens} to {self.curves[-1].tokens}"
            raise ValueError(
                f"this edit has {tokens} tokens, and the steps of this checkpoint were measured "
                f"for {sizes}; use mode exact or another size"
            )
        small, large = below[-1], above[0]
        part = (tokens - small.tokens) / max(1, large.tokens - small.tokens)
        return [
            (1 - part) * small.mass(t, t_next) + part * large.mass(t, t_next)
            for t, t_next in itertools.pairwise(times)
        ]


def choose_steps(
    mode: Mode,
    times: Sequence[float],
    tokens: int,
    profile: Profile | None,
    jumps: Iterable[int] = (),
) -> StepPolicy:
    """What each step of the schedule `times` (num_steps + 1, falling) does; jumps are evaluated.

    Raises ValueError for a mode other than exact if nothing was measured for such an edit.
    """
    num_steps = len(times) - 1
    if mode == "exact":
        return StepPolicy((Action.FULL,) * num_steps)
    if profile is None:
        raise ValueError(
            f"mode {mode} needs steps that were measured for this checkpoint; "
            "run scripts/calibrate_steps.py, or use mode exact"
        )
    masses, number = profile.masses(tokens, times), num_evaluated(mode, num_steps)
    evaluated = spread(masses, number, {0, *jumps, num_steps - 1})
    actions = (Action.FULL if i in evaluated else Action.REUSE for i in range(num_steps))
    return StepPolicy(tuple(actions), frozenset(jumps))


def num_evaluated(mode: Mode, num_steps: int) -> int:
    """In how many of its steps an edit runs the transformer."""
    return min(num_steps, max(FEWEST, round(SHARES[mode] * num_steps)))


def spread(masses: Sequence[float], number: int, always: Set[int]) -> Set[int]:
    """Choose `number` steps, those of `always` among them, at equal distances in mass."""
    low, high = 0.0, sum(masses)
    for _ in range(50):
        limit = (low + high) / 2
        if len(_within(limit, masses, always)) > number:
            low = limit
        else:
            high = limit
    return _within(high, masses, always)


def _within(limit: float, masses: Sequence[float], always: Set[int]) -> Set[int]:
    """The steps of `always`, and each before which more mass than this would be skipped."""
    chosen, since = set(always), 0.0
    for index, mass in enumerate(masses):
        since = mass if index in chosen else since + mass
        if since > limit:
            chosen.add(index)
            since = mass
    return chosen


# --- published, not measured by us ----------------------------------------------------------------

# RegionE, arXiv 2510.25590: `gamma` in `src/Step1X-Edit/inplace.py` of Peyton-Chen/RegionE, fitted
# to v1.1 at 1024 with 28 steps.
_GAMMA: Final = (
    *(0.9746, 0.9593, 1.0036, 1.0084, 1.0106, 1.0114, 1.0138, 1.0163, 1.0152),
    *(1.0163, 1.0197, 1.0186, 1.0219, 1.0218, 1.0223, 1.0266, 1.0272, 1.0305),
    *(1.0311, 1.0362, 1.0385, 1.0423, 1.0500, 1.0536, 1.0671, 1.0866, 1.1015),
)
_TOKENS: Final = 4096
_E_MU: Final = math.exp(1.15)  # `flow.shift` at 4096 tokens


def _published() -> Profile:
    """From step i - 1 to i the velocity scales by s_i = gamma_i * (1 + t_i - t_(i-1)).

    RegionE skips steps while the product of s_i is near 1, so the density is |1 - s_i|.
    """
    times = [_E_MU / (_E_MU + 1 / u - 1) for u in (1 - i / 28 for i in range(28))]
    density = [
        (t_next, abs(1 - gamma * (1 + t_next - t)) / (t - t_next))
        for gamma, (t, t_next) in zip(_GAMMA, itertools.pairwise(times), strict=True)
    ]
    caveat = (
        "steps are skipped by figures that were published for 28 steps at 1024 (RegionE, arXiv "
        "2510.25590), not measured by us; scripts/calibrate_steps.py measures this checkpoint"
    )
    return Profile((Curve(_TOKENS, tuple(density)),), caveat, has_regions=True)


PUBLISHED: Final = _published()
"""For v1.0 to v1.2, until `scripts/calibrate_steps.py` has measured the checkpoint."""
