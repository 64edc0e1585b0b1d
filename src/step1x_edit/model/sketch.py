"""Previews without the autoencoder's decoder: one linear layer, fitted to it for each edit.

An edit encodes its picture before the first step, so that pairs of latents and pixels exist. Least
squares over them give the linear layer that best maps latents to pixels, for any autoencoder and at
almost no cost: the decoder takes as long as several steps of a small network. A chart of coloured
noise is added, because a grey picture alone does not determine how red looks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK: Final = 8
"""Side of the block of pixels for one latent pixel."""

CHART_MEAN, CHART_DEVIATION = 128, 76
"""Mean and standard deviation of the chart's 8-bit values."""

CHART_SIDE: Final = 256
"""In pixels; enough for latents at an eighth of the size, with 145 unknowns."""

RIDGE: Final = 1e-3
"""Ridge, as a share of the mean square, against overfitting to few pairs."""


@dataclass(frozen=True)
class Pairs:
    """The sums over pairs of latents and pixels that least squares needs; they can be added up."""

    squares: Tensor  # (F, F), XᵀX with F = 9 C + 1: the latents around a place, and 1
    products: Tensor  # (F, 3·b²), XᵀY with Y the pixels of its block, b × b

    @classmethod
    def of(cls, latents: Tensor, pixels: Tensor) -> Pairs:
        """The pairs of one picture: latents (1, C, h, w) and pixels (1, 3, H, W), 0 to 255."""
        height, width = latents.shape[2:]
        block = min(BLOCK, pixels.shape[2] // height)
        scaled = pixels.to(latents.device).float() / 127.5 - 1
        small = F.interpolate(scaled, (block * height, block * width), mode="area")
        y = F.pixel_unshuffle(small, block)[0].flatten(1)  # (3·b², h·w)
        x = F.unfold(_framed(latents), 3)[0]  # (9 C, h·w)
        x = torch.cat([x, torch.ones_like(x[:1])])
        return cls((x @ x.T).cpu(), (x @ y.T).cpu())

    def __add__(self, other: Pairs) -> Pairs:
        return Pairs(self.squares + other.squares, self.products + other.products)

    def fit(self) -> Sketch:
        """Return the layer with the least squared error, with a small ridge."""
        squares = self.squares.double()
        ridge = RIDGE * squares.diagonal().mean() * torch.eye(len(squares), dtype=squares.dtype)
        solution = torch.linalg.solve(squares + ridge, self.products.double()).float()
        weight, bias = solution[:-1].T, solution[-1]
        return Sketch(weight.reshape(len(weight), -1, 3, 3), bias)


@dataclass(frozen=True)
class Sketch:
    """A linear layer from latents to a slightly blurred picture."""

    weight: Tensor  # (3·b², C, 3, 3)
    bias: Tensor  # (3·b²)

    def __call__(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Pixels (1, 3, height, width), about -1 to 1, of latents (1, C, h, w)."""
        weight, bias = self.weight.to(latents.device), self.bias.to(latents.device)
        blocks = F.conv2d(_framed(latents.float()), weight, bias)
        pixels = F.pixel_shuffle(blocks, round((len(bias) / 3) ** 0.5))
        if pixels.shape[2:] == (height, width):
            return pixels
        return F.interpolate(pixels, (height, width), mode="bilinear")


@cache
def chart() -> Tensor:
    """Coloured noise at all scales, like that of photographs: (1, 3, H, W), 0 to 255."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(1, 3, CHART_SIDE, CHART_SIDE)
    side = 1
    while side <= CHART_SIDE:
        noise = torch.randn(1, 3, side, side, generator=generator)
        total += F.interpolate(noise, (CHART_SIDE, CHART_SIDE), mode="bilinear") / side**0.5
        side *= 2
    return (CHART_MEAN + CHART_DEVIATION * total / total.std()).clamp(0, 255)


def _framed(latents: Tensor) -> Tensor:
    """Pad latents by one, repeating their border."""
    return F.pad(latents, (1, 1, 1, 1), mode="replicate")
