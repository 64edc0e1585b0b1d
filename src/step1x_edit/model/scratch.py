"""Memory that a thread uses again for the same purpose.

Allocators give large pieces back at once, and the system provides new ones page by page, which
takes longer than what is computed in them.
"""

from __future__ import annotations

import math
import threading
from typing import Final

import torch
from torch import Tensor

LARGEST: Final = 16 * 1024**2
"""Bytes of the largest piece that a thread keeps."""


class _Kept(threading.local):
    """The pieces of this thread, by purpose."""

    def __init__(self) -> None:
        self.pieces: dict[str, Tensor] = {}


_kept: Final = _Kept()


def scratch(purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor with any content, until this thread wants another one for this purpose."""
    size = dtype.itemsize * math.prod(shape)
    piece = _kept.pieces.get(purpose)
    if piece is None or piece.nbytes < size:
        piece = torch.empty(size, dtype=torch.uint8)
        if size <= LARGEST:
            _kept.pieces[purpose] = piece
    return piece[:size].view(dtype).view(shape)
