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

from step1x_edit.model.blocks import widen
from step1x_edit.model.config import AutoencoderConfig

EPSILON = 1e-6
STRIP = 2**18
"""Numbers in a strip of a norm: 1 MiB of them."""
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
        self.conv_norm_out = NormSiLU(groups, widths[-1], EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map pixels (B, 3, H, W) to (B, 2 · C, H / scale, W / scale): mean and log variance."""
        x = laid_out(self.conv_in(x))
        for level in self.down_blocks:
            x = level(x)
        moments: Tensor = self.conv_out(self.conv_norm_out(self.mid_block(x)))
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
        self.conv_norm_out = NormSiLU(groups, widths[-1], EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Map latents (B, C, h, w) to pixels (B, 3, scale · h, scale · w)."""
        x = self.mid_block(laid_out(self.conv_in(z)))
        for level in self.up_blocks:
            x = level(x)
        pixels: Tensor = self.conv_out(self.conv_norm_out(x))
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
        self.norm1 = NormSiLU(groups, in_channels, EPSILON)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = NormSiLU(groups, out_channels, EPSILON)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        is_wider = in_channels != out_channels
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if is_wider else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C_in, H, W) to (B, C_out, H, W)."""
        hidden: Tensor = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        hidden += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return hidden


class NormSiLU(nn.GroupNorm):
    """Group norm, then SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) to the same shape."""
        if torch.is_grad_enabled() or x.is_contiguous():
            return F.silu(super().forward(x))
        return self._in_strips(x)

    def _in_strips(self, x: Tensor) -> Tensor:
        """The same for x in channels-last layout, in strips that stay in the processor's cache.

        Torch's own norm adds up all numbers of a group one by one in this layout: at 1024 x 1024 it
        is off by 0.003, which costs bfloat16 4 dB.
        """
        rows = x.permute(0, 2, 3, 1)  # (B, H, W, C), as in memory
        height, width = rows.shape[1:3]
        strip_height = max(1, STRIP // (width * self.num_channels))
        strips = torch.split(rows, strip_height, dim=1)
        # Numbers far from 0 that hardly differ lose their digits when they are squared.
        origin = widen(strips[0]).mean((1, 2), keepdim=True)  # (B, 1, 1, C)
        sums = torch.zeros(2, len(x), self.num_channels, dtype=torch.float64)
        for strip in strips:
            apart = strip - origin  # as wide as the origin
            sums += torch.stack([apart.sum((1, 2)), apart.square_().sum((1, 2))])
        wide_group = self.num_channels // self.num_groups
        groups = (len(x), self.num_groups, wide_group)
        means, squares = (sums / (height * width)).view(2, *groups)
        variances = squares - means.square()  # of each channel
        means += origin.view(groups)
        mean = means.mean(2)  # (B, groups)
        variance = (variances + (means - mean.unsqueeze(2)).square()).mean(2)
        factor = torch.rsqrt(variance + self.eps)
        factor, mean = (each.repeat_interleave(wide_group, 1) for each in (factor, mean))
        scale = factor * self.weight  # (B, C)
        shift = self.bias - mean * scale
        scale, shift = (each.to(origin.dtype)[:, None, None] for each in (scale, shift))
        normed = torch.empty_like(rows)
        for strip, target in zip(strips, torch.split(normed, strip_height, dim=1), strict=True):
            target.copy_(F.silu(torch.addcmul(shift, widen(strip), scale), inplace=True))
        return normed.permute(0, 3, 1, 2)


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
        # Torch's norm is exact in this layout only: see `NormSiLU`.
        tokens = self.group_norm(x.contiguous()).flatten(2).transpose(1, 2)  # (B, H·W, C)
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


def laid_out(x: Tensor) -> Tensor:
    """Lay out x (B, C, H, W) channels-last on a CPU: convolutions take half the time, and the
    layers that follow keep the layout. Training keeps its own: the norm in strips has no gradient.
    """
    if x.device.type == "cpu" and not torch.is_grad_enabled():
        return x.contiguous(memory_format=torch.channels_last)
    return x


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
