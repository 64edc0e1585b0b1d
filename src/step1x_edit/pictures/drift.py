"""Drift: how much an edit has changed what it should have left alone.

With a mask that is everything outside of it. Without one nobody knows where the edit was meant to
be. Most edits are local, so the half of the picture that has changed least stands for the rest. An
edit of the whole picture, such as "make it night", changes that half too.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from step1x_edit.model.request import Pixels

SIDE: Final = 16
"""Pixels along a square. The least changed pixels would be those that noise has moved back."""


def drift(before: Pixels, after: Pixels, may_change: Pixels | None = None) -> float | None:
    """The mean absolute difference of the rest of two pictures, in levels of 0 to 255.

    `may_change` is a mask (H, W), 0 where nothing may change. None if the pictures differ in size,
    or if everything may change.
    """
    if before.shape != after.shape:
        return None
    if may_change is None:
        squares = _squares(before, after)
        return float(np.sort(squares)[: -(-len(squares) // 2)].mean())
    total, number = 0, 0
    for rows in _bands(before):
        kept = may_change[rows] == 0
        total += int(_difference(before[rows][kept], after[rows][kept]).sum(dtype=np.int64))
        number += int(kept.sum()) * before.shape[-1]
    return total / number if number else None


def _squares(before: Pixels, after: Pixels) -> npt.NDArray[np.float64]:
    """The mean difference of each square; those at the right and lower edge may be smaller."""
    lefts = np.arange(0, before.shape[1], SIDE)
    widths = np.diff(lefts, append=before.shape[1])
    means = []
    for rows in _bands(before):
        columns = _difference(before[rows], after[rows]).mean(axis=(0, 2))
        means.append(np.add.reduceat(columns, lefts) / widths)
    return np.concatenate(means)


def _bands(pixels: Pixels) -> list[slice]:
    """The rows of squares: a difference of the whole picture would need several times its size."""
    return [slice(top, top + SIDE) for top in range(0, len(pixels), SIDE)]


def _difference(before: Pixels, after: Pixels) -> npt.NDArray[np.int16]:
    difference: npt.NDArray[np.int16] = np.abs(before.astype(np.int16) - after)
    return difference
