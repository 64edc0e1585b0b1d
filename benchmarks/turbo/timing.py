"""How long the loop takes in each mode, and how soon a second edit of a picture begins."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Final
from unittest.mock import patch

from bench_precision import psnr
from gpu.networks import quarter
from step1x_edit.model.pipeline import EditPipeline
from step1x_edit.model.request import NetworkRequest
from step1x_edit.model.transformer import Transformer
from step1x_edit.settings import Settings
from turbo.edits import MODES, Demo, Figures, Way, timed

EDIT: Final = ("coffee", "night")


def median_ratio(times: Sequence[float], others: Iterable[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def loops(demo: Demo, steps: int, turns: int) -> list[dict[str, Any]]:
    """The modes in turns; the picture of each is the same every time."""
    taken: dict[Way, list[Figures]] = {Way(mode, steps): [] for mode in MODES}
    for _ in range(turns):
        for way, figures in taken.items():
            figures.append(timed(demo.pipeline, demo.request(*EDIT, way))[1])
    exact = [each.loop_s for each in taken[Way("exact", steps)]]
    return [
        {
            "way": str(way),
            "evaluations": figures[0].evaluations,
            "loop_cpu_s": statistics.median(each.loop_s for each in figures),
            "of_exact": median_ratio([each.loop_s for each in figures], exact),
        }
        for way, figures in taken.items()
    ]


def regions(demo: Demo, steps: int, turns: int) -> list[dict[str, Any]]:
    """Turbo with a mask of 25 % against exact: time, and the distance of the pictures inside it.

    With region steps, whether or not the demo's own figures say that they pay.
    """
    mask = quarter(*demo.photo(EDIT[0]).shape[:2])
    profile = demo.pipeline.profile
    assert profile is not None
    demo.pipeline.profile = replace(profile, has_regions=True)
    exact, turbo = (demo.request(*EDIT, Way(mode, steps), mask) for mode in ("exact", "turbo"))
    times: list[float] = []
    of_exact: list[float] = []
    for _ in range(turns):
        expected, usual = timed(demo.pipeline, exact)
        found, figures = timed(demo.pipeline, turbo)
        times.append(figures.loop_s)
        of_exact.append(figures.loop_s / usual.loop_s)
    demo.pipeline.profile = profile
    return [
        {
            "edited": float((mask > 0).mean()),
            "evaluations": figures.evaluations,
            "loop_cpu_s": statistics.median(times),
            "of_exact": statistics.median(of_exact),
            "inside_db": psnr(found[mask > 0], expected[mask > 0]),
            "pays": profile.has_regions,
        }
    ]


# --- the same picture again -----------------------------------------------------------------------


def again(demo: Demo, turns: int) -> list[dict[str, Any]]:
    """CPU seconds from the request until the transformer begins the first step.

    The first edit of a picture, then others of it, one after the other, as people do it.
    """
    others: dict[str, dict[str, Any]] = {
        "first edit": {},
        "another seed": {"seed": 1},
        "another prompt": {"prompt": "make it black and white"},
        "turbo": {"mode": "turbo"},
    }
    taken: dict[str, list[float]] = {name: [] for name in others}
    for turn in range(turns):
        demo.pipeline.keep(Settings.model_fields["edit_cache_mb"].default * 2**20)
        request = replace(demo.request(*EDIT, Way("exact", 28)), seed=turn)
        for name, changes in others.items():
            taken[name].append(until_first_step(demo.pipeline, replace(request, **changes)))
    return [
        {
            "edit": name,
            "cpu_s": statistics.median(times),
            "of_first": median_ratio(times, taken["first edit"]),
        }
        for name, times in taken.items()
    ]


class FirstStep(Exception):  # noqa: N818  the measurement ends here, as intended
    """The transformer was called."""


def until_first_step(pipeline: EditPipeline, request: NetworkRequest) -> float:
    started = time.process_time()
    try:
        with patch.object(Transformer, "core", side_effect=FirstStep):
            for _ in pipeline.edit(request):
                pass
    except FirstStep:
        return time.process_time() - started
    raise AssertionError("the edit ran no step")
