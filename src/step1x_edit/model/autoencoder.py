"""The autoencoder of FLUX.1 (`src/flux/modules/autoencoder.py`), shared by all versions.

The architecture is that of "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv
2112.10752). Its tensors have the names of the diffusers layout; `checkpoints.keymap` maps the
official ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step1x_edit.model.config import AutoencoderConfig

EPSILON = 1e-6
OVERLAP = 4
"""Neighbouring tiles share 1/4 of their side, and blend into each other over it."""


class Autoencoder(nn.Module):
    """Pixels, about -1 to 1, to latents and back; both without the scale and shift of the model."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.tile: int | None = None
        """Side in pixels of the tiles in which larger pictures are processed; None: as a whole."""
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.encoder.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.encoder.conv_in.weight.dtype

    def encode(self, pixels: Tensor) -> Tensor:
        """The mean of the latents (B, C, H / scale, W / scale) of pixels (B, 3, H, W)."""
        moments: Tensor
        if self.tile is None:
            moments = self.encoder(pixels)
        else:
            moments = _in_tiles(self.encoder, pixels, self.tile, 1 / self.config.scale)
        return moments[:, : self.config.latent_channels]

    def decode(self, z: Tensor) -> Tensor:
        """The pixels (B, 3, scale · h, scale · w) of latents (B, C, h, w)."""
        if self.tile is None:
            pixels: Tensor = self.decoder(z)
            return pixels
        return _in_tiles(self.decoder, z, self.tile // self.config.scale, self.config.scale)


class Encoder(nn.Module):
    """Pixels to the moments of the latents."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(before, after, config.layers_per_block, groups, sampler)
            for before, after, sampler in _levels(widths, "downsamplers")
        )
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map pixels (B, 3, H, W) to (B, 2 · C, H / scale, W / scale): mean and log variance."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        moments: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))
        return moments


class Decoder(nn.Module):
    """Latents to pixels."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            Level(before, after, config.layers_per_block + 1, groups, sampler)
            for before, after, sampler in _levels(widths, "upsamplers")
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Map latents (B, C, h, w) to pixels (B, 3, scale · h, scale · w)."""
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        pixels: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return pixels


class MidBlock(nn.Module):
    """The innermost blocks, with attention between all positions."""

    def __init__(self, channels: int, groups: int, has_attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)] if has_attention else [])

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) to the same shape."""
        for part in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = part(x)
        return x


class Level(nn.Module):
    """Residual blocks, then a down- or upsampler if the sides change."""

    def __init__(
        self, in_channels: int, out_channels: int, num_layers: int, groups: int, sampler: str
    ) -> None:
        """`sampler` is downsamplers, upsamplers, or empty if the sides stay."""
        super().__init__()
        widths = [in_channels, *[out_channels] * num_layers]
        self.resnets = nn.ModuleList(
            ResnetBlock(before, after, groups) for before, after in itertools.pairwise(widths)
        )
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()
        if sampler == "downsamplers":
            self.downsamplers.append(Downsampler(out_channels))
        if sampler == "upsamplers":
            self.upsamplers.append(Upsampler(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C_in, H, W) to (B, C_out, H', W')."""
        for part in itertools.chain(self.resnets, self.downsamplers, self.upsamplers):
            x = part(x)
        return x


class ResnetBlock(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, EPSILON)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, EPSILON)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        is_wider = in_channels != out_channels
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if is_wider else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C_in, H, W) to (B, C_out, H, W)."""
        hidden: Tensor = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        shortcut: Tensor = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return shortcut + hidden


class Attention(nn.Module):
    """Attention among all positions of a picture, with one head."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPSILON)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) to the same shape."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H·W, C)
        q, k, v = (to(tokens).unsqueeze(1) for to in (self.to_q, self.to_k, self.to_v))
        attended: Tensor = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + attended.transpose(1, 2).reshape(x.shape)


class Downsampler(nn.Module):
    """Halves the sides; pads on the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) to (B, C, H / 2, W / 2)."""
        halved: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return halved


class Upsampler(nn.Module):
    """Doubles the sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) to (B, C, 2 · H, 2 · W)."""
        doubled: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return doubled


def _levels(widths: tuple[int, ...], sampler: str) -> Iterator[tuple[int, int, str]]:
    """Channels before and after each level, and its sampler; the last level has none."""
    before = widths[0]
    for index, after in enumerate(widths):
        yield before, after, sampler if index < len(widths) - 1 else ""
        before = after


def _in_tiles(network: Callable[[Tensor], Tensor], x: Tensor, side: int, scale: float) -> Tensor:
    """Apply a network that multiplies the sides by `scale` to x, in square tiles."""
    height, width = x.shape[-2:]
    if max(height, width) <= side:
        return network(x)
    tiles = {
        (top, left): network(x[..., top : top + side, left : left + side])
        for top in _starts(height, side)
        for left in _starts(width, side)
    }
    overlap = round(side * scale) // OVERLAP
    like = next(iter(tiles.values()))
    made = like.new_zeros((*like.shape[:2], round(height * scale), round(width * scale)))
    total = like.new_zeros(made.shape[2:])
    for (top, left), tile in tiles.items():
        rows = _fading(tile, -2, overlap if top else 0, overlap if top + side < height else 0)
        columns = _fading(tile, -1, overlap if left else 0, overlap if left + side < width else 0)
        weight = rows[:, None] * columns
        y, x_left = round(top * scale), round(left * scale)
        place = (..., slice(y, y + len(rows)), slice(x_left, x_left + len(columns)))
        made[place] += weight * tile
        total[place] += weight
    return made / total


def _starts(length: int, side: int) -> list[int]:
    """The offsets of the tiles along a side: the last one ends with the picture."""
    last = max(0, length - side)
    return [*range(0, last, side - side // OVERLAP), last]


def _fading(tile: Tensor, axis: int, before: int, after: int) -> Tensor:
    """Weights along an axis that rise over `before` positions and fall over the last `after`."""
    weights = tile.new_ones(tile.shape[axis])
    weights[:before] *= _ramp(before, tile)
    weights[len(weights) - after :] *= _ramp(after, tile).flip(0)
    return weights


def _ramp(count: int, like: Tensor) -> Tensor:
    return torch.arange(1, count + 1, dtype=like.dtype, device=like.device) / (count + 1)
