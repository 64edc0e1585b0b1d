"""Latents as tokens: packing, token coordinates, noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from step1x_edit.model.config import PATCH_SIZE


def pack(latents: Tensor) -> Tensor:
    """Fold 2x2 patches of latents (B, C, H, W) into tokens (B, H/2 * W/2, 4C).

    Tokens are in reading order; channel c of the patch's pixel (dy, dx) is number 4c + 2dy + dx, as
    in `prepare` of `src/flux/sampling.py`.
    """
    b, c, h, w = latents.shape
    if h % PATCH_SIZE or w % PATCH_SIZE:
        raise ValueError(f"latents of {h} x {w} do not divide into patches of {PATCH_SIZE}")
    patches = latents.view(b, c, h // PATCH_SIZE, PATCH_SIZE, w // PATCH_SIZE, PATCH_SIZE)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * PATCH_SIZE**2)


def unpack(tokens: Tensor, rows: int, cols: int) -> Tensor:
    """Undo `pack`: tokens (B, rows * cols, 4C) to latents (B, C, 2 rows, 2 cols)."""
    b, _, channels = tokens.shape
    patches = tokens.view(b, rows, cols, channels // PATCH_SIZE**2, PATCH_SIZE, PATCH_SIZE)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, -1, rows * PATCH_SIZE, cols * PATCH_SIZE)


def position_ids(rows: int, cols: int, offset: Sequence[float] = (0.0, 0.0, 0.0)) -> Tensor:
    """Coordinates (kind, row, column) of a grid of tokens in reading order: (rows * cols, 3)."""
    grid = torch.zeros(rows, cols, 3)
    grid[..., 1] = torch.arange(rows).unsqueeze(1)
    grid[..., 2] = torch.arange(cols)
    return grid.view(-1, 3) + torch.tensor(offset)


def image_position_ids(rows: int, cols: int, reference_offset: Sequence[float]) -> Tensor:
    """Coordinates (2N, 3) of all image tokens: the latents' grid, then the reference's."""
    return torch.cat([position_ids(rows, cols), position_ids(rows, cols, reference_offset)])


def draw_noise(shape: Sequence[int], seed: int, draw: int = 0) -> Tensor:
    """Draw the start of the denoising on the CPU, so that a seed means the same on every device.

    `draw` counts from 0: several edits with one seed take consecutive noises of its generator.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for _ in range(draw):
        torch.randn(tuple(shape), generator=generator)
    return torch.randn(tuple(shape), generator=generator)
