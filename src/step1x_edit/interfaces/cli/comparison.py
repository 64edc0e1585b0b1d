"""The side-by-side picture of the demo: one input, several results, the prompt under each."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw, ImageFont

_COLUMNS: Final = 3
_WIDTH: Final = 480  # of one picture
_GAP: Final = 12
_LABEL_HEIGHT: Final = 34
_FONT_SIZE: Final = 20


def draw_comparison(pictures: Mapping[str, Path]) -> bytes:
    """A JPEG of the pictures in rows, each above its label, all in the shape of the first."""
    images = [Image.open(path).convert("RGB") for path in pictures.values()]
    height = round(_WIDTH * images[0].height / images[0].width)
    rows = -(-len(images) // _COLUMNS)
    columns = min(len(images), _COLUMNS)
    sheet = Image.new(
        "RGB",
        (_GAP + columns * (_WIDTH + _GAP), _GAP + rows * (height + _LABEL_HEIGHT + _GAP)),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    for index, (label, image) in enumerate(zip(pictures, images, strict=True)):
        row, column = divmod(index, _COLUMNS)
        left = _GAP + column * (_WIDTH + _GAP)
        top = _GAP + row * (height + _LABEL_HEIGHT + _GAP)
        sheet.paste(image.resize((_WIDTH, height), Image.Resampling.LANCZOS), (left, top))
        middle = (left + _WIDTH // 2, top + height + _LABEL_HEIGHT // 2)
        draw.text(middle, label, fill="black", font=font, anchor="mm")
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()
