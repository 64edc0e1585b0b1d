"""Which part of a picture the network edits: a crop around a mask, on a canvas that may grow.

`full` edits the part that a mask lets change, with some of its surroundings, at a higher resolution
than it would have in the whole picture. `outpaint` adds an area to the canvas and lets it change.
In both cases the mask decides which pixels of the result are new.

This module knows nothing about files, requests and the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt
from typing import Final, TypeAlias

import numpy as np
from PIL import Image, ImageFilter

from step1x_edit.errors import InvalidParameterError
from step1x_edit.pictures import images
from step1x_edit.pictures.images import Picture, Pixels
from step1x_edit.settings import Limits

Box: TypeAlias = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels; right and bottom are the first beyond it."""

CONTEXT: Final = 0.5  # of the longer side of what may change, on each side of it
MIN_CONTEXT: Final = 32  # pixels
MAX_RATIO: Final = 2  # of a crop's sides; a longer part gets more context across
MAX_SCALE: Final = 4  # of a crop: the network sees more context rather than larger pixels

_BLUR: Final = 1 / 32  # of the longer side of the picture


@dataclass(frozen=True)
class Margins:
    """The pixels that a canvas grows by."""

    top: int
    right: int
    bottom: int
    left: int

    @property
    def around(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Before and after, along the rows and along the columns."""
        return (self.top, self.bottom), (self.left, self.right)


def margins_of(outpaint: str, width: int, height: int) -> Margins:
    """The pixels that `outpaint` adds to a picture of this size.

    As in CSS, a size that is left out is that of the opposite side, or else that of the top.
    Percentages are of the height at the top and bottom, and of the width at the sides.
    """
    sizes = outpaint.split()
    top, right, bottom, left = {
        0: ["0"] * 4,
        1: sizes * 4,
        2: sizes * 2,
        3: [*sizes, *sizes[1:2]],
        4: sizes,
    }[len(sizes)]
    return Margins(
        _pixels(top, height), _pixels(right, width), _pixels(bottom, height), _pixels(left, width)
    )


def _pixels(size: str, side: int) -> int:
    return round(float(size[:-1]) / 100 * side) if size.endswith("%") else int(size)


def grown_size(outpaint: str, width: int, height: int) -> tuple[int, int]:
    """The width and height of a picture of this size after `outpaint`."""
    margins = margins_of(outpaint, width, height)
    return width + margins.left + margins.right, height + margins.top + margins.bottom


# --- growing the canvas --------------------------------------------------------------------------


@dataclass(frozen=True)
class Canvas:
    """A picture that has grown, and what may change of it."""

    picture: Picture
    """The new area continues the picture: reflections that become blurred, opaque."""
    mask: Pixels
    before: Picture
    """The picture with nothing around it: the new area is transparent."""


def grown(picture: Picture, mask: Pixels | None, outpaint: str, limits: Limits) -> Canvas:
    """The canvas of an outpainted picture; `mask` is what else may change.

    Raises an ImageError if the canvas is larger than a picture may be, before it is made.
    """
    size = picture.width, picture.height
    margins, enlarged = margins_of(outpaint, *size), grown_size(outpaint, *size)
    if enlarged == size:
        raise InvalidParameterError(
            f"outpaint {outpaint} adds no pixel to a picture of {size[0]}×{size[1]}",
            param="outpaint",
        )
    images.check_size(*enlarged, limits)
    may_change = np.zeros(picture.pixels.shape[:2], np.uint8) if mask is None else mask
    alpha = np.full_like(may_change, 255) if picture.alpha is None else picture.alpha
    opaque = None if picture.alpha is None else np.pad(alpha, margins.around, constant_values=255)
    canvas = replace(picture, pixels=_continued(picture.pixels, margins), alpha=opaque)
    return Canvas(
        canvas,
        mask=np.pad(may_change, margins.around, constant_values=255),
        before=replace(
            picture,
            pixels=np.pad(picture.pixels, (*margins.around, (0, 0)), constant_values=255),
            alpha=np.pad(alpha, margins.around),
        ),
    )


def _continued(pixels: Pixels, margins: Margins) -> Pixels:
    """The picture and, around it, its reflection: colours to begin from, without content.

    The reflection is sharp where it touches the picture, so that no edge is seen there, and becomes
    blurred within the radius of the blur.
    """
    reflected = Image.fromarray(np.pad(pixels, (*margins.around, (0, 0)), "symmetric"))
    radius = max(2, round(_BLUR * max(pixels.shape)))
    blurred = reflected.filter(ImageFilter.BoxBlur(radius))
    rows, columns = (
        _away(side, around, radius)
        for side, around in zip(pixels.shape[:2], margins.around, strict=True)
    )
    return np.array(
        Image.composite(blurred, reflected, Image.fromarray(np.maximum.outer(rows, columns)))
    )


def _away(side: int, around: tuple[int, int], radius: int) -> Pixels:
    """For each row or column, how far it is from the picture: 0 in it, 255 at the radius."""
    distance = np.pad(np.zeros(side), around, "linear_ramp", end_values=around)
    away: Pixels = (distance * 255 / radius).clip(0, 255).astype(np.uint8)
    return away


# --- a crop around what may change ---------------------------------------------------------------


def box_around(mask: Pixels, size_level: int) -> Box:
    """The crop that the network edits at this size level, so that it covers the mask."""
    height, width = mask.shape
    found = Image.fromarray(mask).getbbox()
    assert found is not None  # a mask that selects nothing is refused
    left, top, right, bottom = found
    context = max(CONTEXT * max(right - left, bottom - top), MIN_CONTEXT)
    across, down = right - left + 2 * context, bottom - top + 2 * context
    across, down = max(across, down / MAX_RATIO), max(down, across / MAX_RATIO)
    more = max(1.0, scale_of(across * down, size_level) / MAX_SCALE)
    left, right = _around(left, right, round(across * more), width)
    top, bottom = _around(top, bottom, round(down * more), height)
    return left, top, right, bottom


def _around(first: int, last: int, length: int, most: int) -> tuple[int, int]:
    """An interval of this length around the middle of another, moved to between 0 and `most`."""
    length = min(length, most)
    begin = min(max((first + last - length) // 2, 0), most - length)
    return begin, begin + length


def scale_of(pixels: float, size_level: int) -> float:
    """How many pixels of the network, along one side, a pixel of a picture this large becomes."""
    return size_level / sqrt(pixels)


def cropped(picture: Picture, box: Box) -> Picture:
    """A part of a picture."""
    left, top, right, bottom = box
    part = np.s_[top:bottom, left:right]
    alpha = None if picture.alpha is None else picture.alpha[part]
    return replace(picture, pixels=np.ascontiguousarray(picture.pixels[part]), alpha=alpha)


def pasted(edited: Pixels, source: Picture, box: Box) -> Picture:
    """The source with the edited pixels, of any size, in place of the part that the box names."""
    left, top, right, bottom = box
    pixels = source.pixels.copy()
    pixels[top:bottom, left:right] = images.restore(edited, cropped(source, box)).pixels
    return replace(source, pixels=pixels)


def preview(part: Pixels, source: Picture, box: Box) -> Pixels:
    """The whole picture in sRGB, in about its size, with a preview of the edited part."""
    scale = min(1.0, sqrt(part.size / source.pixels.size))
    width, height = max(round(scale * source.width), 1), max(round(scale * source.height), 1)
    whole = Image.fromarray(source.in_srgb).resize((width, height), reducing_gap=2)
    left, top, right, bottom = (round(scale * side) for side in box)
    small = Image.fromarray(part).resize((max(right - left, 1), max(bottom - top, 1)))
    whole.paste(small, (left, top))
    return np.array(whole)
