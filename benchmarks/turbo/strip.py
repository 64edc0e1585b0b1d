"""One row of pictures: an edit by each mode, and the naive way in the time of the fastest."""

from __future__ import annotations

import io
import math
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bench_demo import psnr
from step1x_edit.model.request import Pixels
from turbo.edits import Demo, Figures, Way
from turbo.quality import BRANCHES, as_picture

WIDTH: Final = 340
GAP: Final = 8
LABEL: Final = 24
AMPLIFIED: Final = 16
"""Differences that nobody sees are multiplied by this."""
SMALLEST_QUALITY: Final = 85


def strip(demo: Demo, photo: str, edit: str, steps: int) -> tuple[bytes, list[dict[str, object]]]:
    """A JPEG: the pictures, and under each its difference from the exact one, amplified."""
    ways = {
        "exact": Way("exact", steps),
        "good (fast)": Way("fast", steps),
        "fast (turbo)": Way("turbo", steps),
    }
    made = {name: demo.kept(photo, edit, way) for name, way in ways.items()}
    number = math.ceil(made["fast (turbo)"][1].evaluations / BRANCHES)
    made[f"naive: {number} exact steps"] = demo.kept(photo, edit, Way("exact", number))
    exact = made["exact"][0]
    tiles = [tile(name, *each, exact) for name, each in made.items()]
    sheet = Image.new("RGB", (GAP + (WIDTH + GAP) * len(tiles), tiles[0].height), "white")
    for index, each in enumerate(tiles):
        sheet.paste(each, (GAP + index * (WIDTH + GAP), 0))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=SMALLEST_QUALITY, optimize=True)
    rows = [
        {"picture": name, "edit_cpu_s": figures.edit_s, "loop_cpu_s": figures.loop_s}
        | ({} if picture is exact else {"db": psnr(as_picture(picture), as_picture(exact))})
        for name, (picture, figures) in made.items()
    ]
    return buffer.getvalue(), rows


def tile(name: str, picture: Pixels, figures: Figures, exact: Pixels) -> Image.Image:
    height = round(WIDTH * picture.shape[0] / picture.shape[1])
    sheet = Image.new("RGB", (WIDTH, GAP + 2 * height + 2 * LABEL), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)

    def label(words: str, top: int) -> None:
        draw.text((WIDTH // 2, top + LABEL // 2), words, fill="black", font=font, anchor="mm")

    shown = Image.fromarray(picture).resize((WIDTH, height), Image.Resampling.LANCZOS)
    sheet.paste(shown, (0, GAP))
    label(f"{name}, {figures.edit_s:.1f} s", GAP + height)
    if picture is not exact:
        difference = np.abs(picture.astype(int) - exact) * AMPLIFIED
        amplified = Image.fromarray(difference.clip(0, 255).astype(np.uint8))
        sheet.paste(amplified.resize((WIDTH, height)), (0, GAP + height + LABEL))
        near = psnr(as_picture(picture), as_picture(exact))
        label(f"its difference × {AMPLIFIED}: {near:.1f} dB", GAP + 2 * height + LABEL)
    return sheet
