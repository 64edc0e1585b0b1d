"""A plot of quality against time as SVG, legible on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 48, 56
COLOURS: Final = {
    "exact": ("#1f5fa8", "#7db4f0"),
    "fast": ("#b35300", "#f0a860"),
    "turbo": ("#1e7a3c", "#6fd08c"),
}
"""Of each mode, on a light and on a dark page."""
SHAPES: Final = {
    "exact": '<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>',
    "fast": '<path d="M{x:.1f} {y:.1f}m-5 -5h10v10h-10z"/>',
    "turbo": '<path d="M{x:.1f} {y:.1f}m0 -7l6 11h-12z"/>',
}
"""Modes differ by shape as well as colour."""

BELOW: Final = '<text x="{x:.1f}" y="{y:.1f}" dx="8" dy="16">{steps}</text>'
ABOVE: Final = '<text x="{x:.1f}" y="{y:.1f}" dx="-8" dy="-7" text-anchor="end">{steps}</text>'
LABELS: Final = {"exact": BELOW, "fast": BELOW, "turbo": ABOVE}


def draw(rows: Sequence[dict[str, Any]], title: str) -> str:
    """Points of `curve`: time of the loop to the right, PSNR upwards, joined by mode."""
    right: float = max(row["of_exact_28"] for row in rows) * 1.05
    low: int = math.floor(min(row["mean_db"] for row in rows) / 5) * 5
    high: int = math.ceil(max(row["mean_db"] for row in rows) / 5) * 5

    def place(row: dict[str, Any]) -> tuple[float, float]:
        return x_of(row["of_exact_28"]), y_of(row["mean_db"])

    def x_of(share: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * share / right

    def y_of(decibels: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (decibels - low) / (high - low)

    def parts() -> Iterator[str]:
        floor = HEIGHT - BOTTOM
        for decibels in range(low, high + 1, 5):
            y = y_of(decibels)
            yield f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
            yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{decibels}</text>'
        for quarter in range(math.floor(right * 4) + 1):
            x, share = x_of(quarter / 4), quarter / 4
            yield f'<path class="grid" d="M{x:.1f} {TOP}V{floor}"/>'
            yield f'<text x="{x:.1f}" y="{floor + 20}" text-anchor="middle">{share:g}</text>'
        yield f'<text x="{LEFT}" y="{HEIGHT - 12}">{X_AXIS}</text>'
        yield f'<text x="{LEFT}" y="{TOP - 28}" class="title">{title}</text>'
        for index, mode in enumerate(COLOURS):
            points = [row for row in rows if row["mode"] == mode]
            line = " ".join("{:.1f},{:.1f}".format(*place(row)) for row in points)
            yield f'<g class="{mode}"><polyline points="{line}"/>'
            for row in points:
                x, y = place(row)
                yield SHAPES[mode].format(x=x, y=y)
                yield LABELS[mode].format(x=x, y=y, steps=row["steps"])
            x, y = WIDTH - RIGHT - 90, HEIGHT - BOTTOM - 60 + 20 * index
            yield SHAPES[mode].format(x=x, y=y)
            yield f'<text x="{x + 14}" y="{y + 4}">{mode}</text></g>'

    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
            f"<title>{title}</title>",
            f"<style>{style()}</style>",
            f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>',
            *parts(),
            "</svg>\n",
        ]
    )


X_AXIS: Final = "time of the loop, of 28 exact steps; numbers are steps"


def style() -> str:
    """Colours for a light page, and others if the reader prefers dark ones."""

    def colours(dark: int) -> str:
        page, ink, grid = (("#fff", "#333", "#ddd"), ("#161b22", "#ccc", "#333b45"))[dark]
        modes = "".join(
            f".{mode}{{fill:{both[dark]}}}.{mode} polyline{{stroke:{both[dark]}}}"
            for mode, both in COLOURS.items()
        )
        return f".page{{fill:{page}}}text{{fill:{ink}}}.grid{{stroke:{grid}}}{modes}"

    return (
        "text{font:13px system-ui,sans-serif}.title{font-weight:600;font-size:15px}"
        "polyline{fill:none;stroke-width:2}"
        f"{colours(0)}@media(prefers-color-scheme:dark){{{colours(1)}}}"
    )
