"""How far the pictures of each mode are from exact ones, and from those of fewer exact steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from bench_demo import psnr
from demo_data import EDITS, Picture
from step1x_edit.model.request import Pixels
from turbo.edits import MODES, Demo, Way

Row = dict[str, Any]
BRANCHES: Final = 2
"""An exact step evaluates prompt and negative prompt."""
PATH: Final = 100
"""Steps of an edit that follows the flow closely."""


WAYS: Final = ("fast", "turbo", "naive")
"""What is compared with exact edits; naive: exact edits with as many evaluations as each mode."""


def pictures(
    demo: Demo, photos: Sequence[str], edits: Sequence[str], steps: int, wanted: Sequence[str]
) -> list[Row]:
    """PSNR against the exact picture of each wanted way.

    The blind check is that of `bench_demo.py`.
    """
    decibels: dict[str, list[tuple[float, str]]] = {}
    hits: dict[str, list[bool]] = {}
    evaluations: dict[str, int] = {}
    for photo in photos:
        original = as_picture(demo.photo(photo))
        classical = {edit: change(original) for edit, change in EDITS.items()}
        for edit in edits:
            exact = demo.kept(photo, edit, Way("exact", steps))[0]
            ways = {"exact": Way("exact", steps)}
            for mode in MODES[1:]:
                if mode not in wanted:
                    continue
                ways[mode] = Way(mode, steps)
                if "naive" not in wanted:
                    continue
                done = demo.kept(photo, edit, ways[mode])[1].evaluations
                ways[f"naive as {mode}"] = Way("exact", math.ceil(done / BRANCHES))
            for name, way in ways.items():
                picture, figures = demo.kept(photo, edit, way)
                near = psnr(as_picture(picture), as_picture(exact))
                decibels.setdefault(name, []).append((near, f"{edit} of {photo}"))
                hits.setdefault(name, []).append(nearest(picture, classical) == edit)
                evaluations[name] = figures.evaluations
    return [
        {
            "way": name,
            "evaluations": evaluations[name],
            "pictures": len(found),
            "mean_db": statistics.fmean(near for near, _ in found),
            "worst_db": min(found)[0],
            "worst": min(found)[1],
            "blind_check": statistics.fmean(hits[name]),
        }
        for name, found in decibels.items()
    ]


def curve(demo: Demo, photo: str, edits: Sequence[str], step_counts: Sequence[int]) -> list[Row]:
    """Quality against time: the distance from a picture of very many exact steps."""
    ways = [Way(mode, steps) for mode in MODES for steps in step_counts]
    of_exact: dict[Way, list[float]] = {way: [] for way in ways}
    decibels: dict[Way, list[float]] = {way: [] for way in ways}
    seconds: dict[Way, list[float]] = {way: [] for way in ways}
    for edit in edits:
        truth = as_picture(demo.kept(photo, edit, Way("exact", PATH))[0])
        usual = demo.kept(photo, edit, Way("exact", 28))[1].loop_s
        for way in ways:
            picture, figures = demo.kept(photo, edit, way)
            decibels[way].append(psnr(as_picture(picture), truth))
            seconds[way].append(figures.loop_s)
            of_exact[way].append(figures.loop_s / usual)
    return [
        {
            "mode": way.mode,
            "steps": way.steps,
            "loop_cpu_s": statistics.median(seconds[way]),
            "of_exact_28": statistics.median(of_exact[way]),
            "mean_db": statistics.fmean(decibels[way]),
            "worst_db": min(decibels[way]),
        }
        for way in ways
    ]


def nearest(picture: Pixels, classical: dict[str, Picture]) -> str:
    """The classical edit that a picture is closest to."""
    found = as_picture(picture)
    return max(classical, key=lambda edit: psnr(found, classical[edit]))


def as_picture(pixels: Pixels) -> Picture:
    return pixels.astype(np.float32) / 255
