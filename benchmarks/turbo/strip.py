"""One row of pictures: an edit by each mode, and the naive way in the time of the fastest."""

from __future__ import annotations

import io
import math
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bench_demo import psnr
from step1x_edit.model.request import Pixels
from turbo.edits import Demo, Way
from turbo.quality import BRANCHES, as_picture

WIDTH: Final = 340
GAP: Final = 8
LABEL: Final = 24
AMPLIFIED: Final = 32
"""Differences that nobody sees are multiplied by this."""
QUALITY: Final = 85


def strip(demo: Demo, photo: str, edit: str, steps: int) -> tuple[bytes, list[dict[str, object]]]:
    """A JPEG: the pictures, and under each its difference from the exact one, amplified.

    Under the exact one is the photograph.
    """
    ways = {
        "exact": Way("exact", steps),
        "good (fast)": Way("fast", steps),
        "fast (turbo)": Way("turbo", steps),
    }
    made = {name: demo.kept(photo, edit, way) for name, way in ways.items()}
    number = math.ceil(made["fast (turbo)"][1].evaluations / BRANCHES)
    made[f"naive: {number} exact steps"] = demo.kept(photo, edit, Way("exact", number))
    exact = made["exact"][0]
    tiles = []
    for name, (picture, figures) in made.items():
        below, words = demo.photo(photo), "the photograph"
        if picture is not exact:
            below = (np.abs(picture.astype(int) - exact) * AMPLIFIED).clip(0, 255).astype(np.uint8)
            decibels = psnr(as_picture(picture), as_picture(exact))
            words = f"{AMPLIFIED} times its difference, {decibels:.1f} dB"
        tiles.append(tile((picture, f"{name}, {figures.edit_s:.1f} s"), (below, words)))
    sheet = Image.new("RGB", (GAP + (WIDTH + GAP) * len(tiles), tiles[0].height), "white")
    for index, each in enumerate(tiles):
        sheet.paste(each, (GAP + index * (WIDTH + GAP), 0))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    rows: list[dict[str, object]] = [
        {
            "picture": name,
            "edit_cpu_s": figures.edit_s,
            "loop_cpu_s": figures.loop_s,
            "db": None if picture is exact else psnr(as_picture(picture), as_picture(exact)),
        }
        for name, (picture, figures) in made.items()
    ]
    return buffer.getvalue(), rows


def tile(*labelled: tuple[Pixels, str]) -> Image.Image:
    """Pictures, one above the other, each above its words."""
    height = round(WIDTH * labelled[0][0].shape[0] / labelled[0][0].shape[1])
    sheet = Image.new("RGB", (WIDTH, len(labelled) * (height + LABEL)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for index, (picture, words) in enumerate(labelled):
        top = index * (height + LABEL)
        shown = Image.fromarray(picture).resize((WIDTH, height), Image.Resampling.LANCZOS)
        sheet.paste(shown, (0, top))
        middle = (WIDTH // 2, top + height + LABEL // 2)
        draw.text(middle, words, fill="black", font=font, anchor="mm")
    return sheet
