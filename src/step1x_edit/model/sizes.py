"""The size at which a picture is edited; without torch, so that the parent process can use it."""

from __future__ import annotations

import math


def fit_size(width: int, height: int, size_level: int, multiple: int) -> tuple[int, int]:
    """Return the size (width, height) at which a picture is edited.

    About `size_level`² pixels in the picture's aspect ratio, both sides multiples of `multiple`
    (`input_process_image` in `inference.py` of Step1X-Edit). Raises ValueError for a picture so
    narrow that a side would be 0.
    """
    ratio = width / height
    if width > height:
        fitted_width = math.ceil(math.sqrt(size_level * size_level * ratio))
        fitted_height = math.ceil(fitted_width / ratio)
    else:
        fitted_height = math.ceil(math.sqrt(size_level * size_level / ratio))
        fitted_width = math.ceil(fitted_height * ratio)
    fitted_width -= fitted_width % multiple
    fitted_height -= fitted_height % multiple
    if not fitted_width or not fitted_height:
        raise ValueError(f"a picture of {width} x {height} is too narrow for size {size_level}")
    return fitted_width, fitted_height
