"""The part of a picture that a mask lets change, as tokens of the latents.

A region step runs only the text and these tokens (`blocks.Layout.only`); the keys and values of all
other tokens are those of the last full step (`blocks.KeysAndValues`).
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from step1x_edit.model.request import Mask

LARGEST: Final = 0.75
"""Of the latents: a larger region saves too little for what it leaves out."""


def region_of(mask: Mask, rows: int, columns: int) -> Tensor | None:
    """The tokens (K,) that a region step runs; None if the mask lets none or nearly all change."""
    tokens = touched_tokens(mask, rows, columns)
    return tokens if 0 < len(tokens) <= LARGEST * rows * columns else None


def touched_tokens(mask: Mask, rows: int, columns: int) -> Tensor:
    """Indices (K,) of the tokens, of rows × columns, that the mask touches, and of those beside.

    The mask (H, W) covers the same picture at any size.
    """
    is_inside = torch.from_numpy(mask != 0).to(torch.bfloat16)[None, None]  # (1, 1, H, W)
    touched = F.adaptive_max_pool2d(is_inside, (rows, columns))
    widened = F.max_pool2d(touched, kernel_size=3, stride=1, padding=1)
    return widened.flatten().nonzero().flatten()
