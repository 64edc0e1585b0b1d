"""Pictures side by side, each above its label: those of the demo, and two of the history."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from step1x_edit.pictures.images import Picture
from step1x_edit.pictures.notes import Notes
from step1x_edit.pictures.provenance import EDITED

WIDTH: Final = 480
"""Of one picture of several."""

_COLUMNS: Final = 3
_GAP: Final = 12
_LABEL_HEIGHT: Final = 34
_FONT_SIZE: Final = 20


def draw_comparison(pictures: Mapping[str, Path | BinaryIO], width: int = WIDTH) -> Picture:
    """The pictures in rows, each above its label, all in the shape of the first.

    The sheet is marked as an edit, because at least one of them is.
    """
    images = [Image.open(path).convert("RGB") for path in pictures.values()]
    height = round(width * images[0].height / images[0].width)
    rows = -(-len(images) // _COLUMNS)
    columns = min(len(images), _COLUMNS)
    sheet = Image.new(
        "RGB",
        (_GAP + columns * (width + _GAP), _GAP + rows * (height + _LABEL_HEIGHT + _GAP)),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    for index, (label, image) in enumerate(zip(pictures, images, strict=True)):
        row, column = divmod(index, _COLUMNS)
        left = _GAP + column * (width + _GAP)
        top = _GAP + row * (height + _LABEL_HEIGHT + _GAP)
        sheet.paste(image.resize((width, height), Image.Resampling.LANCZOS), (left, top))
        middle = (left + width // 2, top + height + _LABEL_HEIGHT // 2)
        draw.text(middle, label, fill="black", font=font, anchor="mm")
    return Picture(np.array(sheet), notes=Notes(source_type=EDITED))
