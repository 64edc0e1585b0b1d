"""Rotary position encoding over several axes, as in FLUX.

A head's channels are dealt out to the axes in order (kind, row, column); within an axis, channel
pair j turns by the angle `position * theta^(-2j/n)`. Pairs are adjacent channels, so a rotation is
a product of complex numbers, which is also the fastest form of it on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rope_table(ids: Tensor, axes_dim: Sequence[int], theta: float) -> Tensor:
    """Turn position ids (..., N, axes) into unit complex numbers (..., N, D/2), complex64.

    Angles are computed in float64: at theta 10000 and positions of thousands, float32 would not do.
    """
    angles = [
        ids[..., axis, None].double() * _frequencies(dim, theta, ids.device)
        for axis, dim in enumerate(axes_dim)
    ]
    angle = torch.cat(angles, dim=-1)  # (..., N, D/2)
    return torch.complex(angle.cos().float(), angle.sin().float())


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate x (B, H, N, D) by a table that broadcasts to (B, H, N, D/2). Returns float32."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rope).flatten(-2)


def _frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
    return 1.0 / theta**exponent  # (dim/2,)
