"""Rotary position encoding over several axes: `src/flux/math.py` of FLUX.1.

After RoFormer (arXiv 2104.09864): within an axis of n channels, pair j of adjacent channels at
position p turns by the angle p · theta^(-2j/n). The channels of a head are divided between the axes
in the order kind, row, column.

Tables are real: cosine and sine of each pair, side by side.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Final

import torch
from torch import Tensor

MOST_TABLES: Final = 4
"""A table for 1024 × 1024 pixels takes 4.5 MB."""


def rope_table(ids: Tensor, axes_dim: Sequence[int], theta: float) -> Tensor:
    """Turn position ids (..., N, axes) into cosines and sines (..., N, D/2, 2), float32.

    Angles are computed in float64: float32 is too coarse for positions in the thousands.
    """
    angles = [
        ids[..., axis, None].double() * _frequencies(dim, theta, ids.device)
        for axis, dim in enumerate(axes_dim)
    ]
    angle = torch.cat(angles, dim=-1)  # (..., N, D/2)
    return torch.stack([angle.cos().float(), angle.sin().float()], dim=-1)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate float32 or float64 x (B, H, N, D) by a table that broadcasts to (B, H, N, D/2, 2)."""
    pairs = x.view(*x.shape[:-1], -1, 2)
    # The compiler fuses sums and products, but cannot compile complex numbers. Without it, one
    # complex product is several times as fast.
    if torch.compiler.is_compiling():
        return rotate_pairs(pairs, rope).flatten(-2)
    turned = torch.view_as_complex(pairs) * torch.view_as_complex(rope)
    return torch.view_as_real(turned).flatten(-2)


def rotate_pairs(pairs: Tensor, rope: Tensor) -> Tensor:
    """Turn points (..., 2) in the plane by cosines and sines (..., 2)."""
    x, y = pairs.unbind(-1)
    cos, sin = rope.unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)


class RecentTables:
    """Keeps the most recently used tables, on the device that uses them."""

    def __init__(self, most: int = MOST_TABLES) -> None:
        self._most = most
        self._tables: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return the table of this key; make it if it is not there."""
        if key not in self._tables:
            self._tables[key] = make()
        self._tables.move_to_end(key)
        if len(self._tables) > self._most:
            self._tables.popitem(last=False)
        return self._tables[key]

    def clear(self) -> None:
        """Forget all tables."""
        self._tables.clear()


def _frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
    return 1.0 / theta**exponent  # (dim/2,)
