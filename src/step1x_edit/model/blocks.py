"""The layers of the transformer.

Shapes: B pictures, L text tokens, N image tokens, D hidden size, H heads. Blocks take their
modulation ready made, because it depends on timestep and prompt only and is computed for all
steps at once before the first one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step1x_edit.model.rope import apply_rope

EPS = 1e-6
TIMESTEP_CHANNELS = 256


def timestep_embedding(t: Tensor) -> Tensor:
    """Embed timesteps t (...,) in [0, 1] as [cos, sin] of 1000t times 128 frequencies: (..., 256).

    Always float32: in bf16 neighbouring timesteps would become one.
    """
    half = TIMESTEP_CHANNELS // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10_000) * steps / half)
    angles = (1000.0 * t).float().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def widen(x: Tensor) -> Tensor:
    """Return x in float32, or as it is in float64: what shorter numbers are too coarse for."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_norm(x: Tensor) -> Tensor:
    """Normalise over channels, without weights: the modulation supplies them."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return (1 + scale) * LN(x) + shift."""
    return torch.addcmul(shift, 1 + scale, layer_norm(x))


def chunks(modulation: Tensor, number: int) -> tuple[Tensor, ...]:
    """Cut a modulation (..., number * D) into parts (..., 1, D) that broadcast over tokens."""
    return modulation.unsqueeze(-2).chunk(number, dim=-1)


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut a fused projection (B, N, 3D) into q, k, v of (B, H, N, D/H)."""
    b, n, _ = qkv.shape
    q, k, v = qkv.view(b, n, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return q, k, v


def merge_heads(x: Tensor) -> Tensor:
    """Undo the cut into heads: (B, H, N, D/H) to (B, N, D)."""
    return x.transpose(1, 2).flatten(2)


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear: lifts the timestep embedding or the pooled text to the hidden size."""

    def __init__(self, in_features: int, hidden_size: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_features, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.in_layer(x.to(self.in_layer.weight.dtype))
        embedded: Tensor = self.out_layer(F.silu(hidden))
        return embedded


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the channels of a head. Returns float32 or wider."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = widen(x)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * widen(self.scale)


class QKNorm(nn.Module):
    """Normalises queries and keys, each with a scale of its own. Returns float32 or wider."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


class Pads(NamedTuple):
    """Rows of the text that are left out, because they all equal one that stays."""

    row: int
    """The one that stays."""
    copies: int
    """How many more there would be, right behind it."""


NO_PADS = Pads(0, 0)
ALL_ROWS = slice(None)


def with_pads(x: Tensor, pads: Pads) -> Tensor:
    """Put the copies back into x (B, H, N, D/H): (B, H, N + copies, D/H)."""
    if not pads.copies:
        return x
    end = pads.row + 1
    copies = x[:, :, pads.row : end].expand(-1, -1, pads.copies, -1)
    return torch.cat([x[:, :, :end], copies, x[:, :, end:]], dim=2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: Tensor,
    rows: slice = ALL_ROWS,
    pads: Pads = NO_PADS,
) -> Tensor:
    """Attend over all tokens after rotating float32 q and k: (B, H, N, D/H) to (B, rows, D).

    Rows that were left out have a say as keys, as often as there would be of them.
    """
    q = apply_rope(q, rope)[:, :, rows].to(v.dtype)
    k = apply_rope(k, rope).to(v.dtype)
    k, v = with_pads(k, pads), with_pads(v, pads)
    return merge_heads(F.scaled_dot_product_attention(q, k, v))


class Modulation(nn.Module):
    """One matrix product gives all shifts, scales and gates of a stream."""

    def __init__(self, hidden_size: int, num_chunks: int) -> None:
        super().__init__()
        self.lin = nn.Linear(hidden_size, num_chunks * hidden_size)

    def forward(self, activated_vec: Tensor) -> Tensor:
        modulation: Tensor = self.lin(activated_vec)
        return modulation


class StreamAttention(nn.Module):
    """The part of joint attention that belongs to one stream: projections and norms."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.norm = QKNorm(hidden_size // num_heads)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalised q, k and plain v, each (B, H, N, D/H)."""
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        q, k = self.norm(q, k)
        return q, k, v


def mlp(hidden_size: int, mlp_size: int) -> nn.Sequential:
    """Build the feed-forward part of a stream."""
    return nn.Sequential(
        nn.Linear(hidden_size, mlp_size),
        nn.GELU(approximate="tanh"),
        nn.Linear(mlp_size, hidden_size),
    )


class DoubleStreamBlock(nn.Module):
    """Text and image keep weights of their own and meet in one attention."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int) -> None:
        super().__init__()
        self.img_mod = Modulation(hidden_size, 6)
        self.img_attn = StreamAttention(hidden_size, num_heads)
        self.img_mlp = mlp(hidden_size, mlp_size)
        self.txt_mod = Modulation(hidden_size, 6)
        self.txt_attn = StreamAttention(hidden_size, num_heads)
        self.txt_mlp = mlp(hidden_size, mlp_size)

    def modulations(self, activated_vec: Tensor) -> tuple[Tensor, Tensor]:
        """Return the modulations of image and text stream, (..., 6D) each."""
        return self.img_mod(activated_vec), self.txt_mod(activated_vec)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        img_mod: Tensor,
        txt_mod: Tensor,
        rope: Tensor,
        pads: Pads = NO_PADS,
    ) -> tuple[Tensor, Tensor]:
        """Map img (B, N, D) and txt (B, L, D), given modulations (B, 6D)."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = chunks(img_mod, 6)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = chunks(txt_mod, 6)

        img_qkv = self.img_attn(modulate(img, img_shift1, img_scale1))
        txt_qkv = self.txt_attn(modulate(txt, txt_shift1, txt_scale1))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv, strict=True))
        attended = attention(q, k, v, rope, pads=pads)  # (B, L+N, D), text first
        txt_attended, img_attended = attended[:, : txt.shape[1]], attended[:, txt.shape[1] :]

        img = img + img_gate1 * self.img_attn.proj(img_attended)
        img = img + img_gate2 * self.img_mlp(modulate(img, img_shift2, img_scale2))
        txt = txt + txt_gate1 * self.txt_attn.proj(txt_attended)
        txt = txt + txt_gate2 * self.txt_mlp(modulate(txt, txt_shift2, txt_scale2))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Text and image in one sequence; attention and MLP side by side in one pair of matrices."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv_size = 3 * hidden_size
        self.linear1 = nn.Linear(hidden_size, 3 * hidden_size + mlp_size)
        self.linear2 = nn.Linear(hidden_size + mlp_size, hidden_size)
        self.norm = QKNorm(hidden_size // num_heads)
        self.modulation = Modulation(hidden_size, 3)

    def forward(
        self,
        x: Tensor,
        mod: Tensor,
        rope: Tensor,
        rows: slice = ALL_ROWS,
        pads: Pads = NO_PADS,
    ) -> Tensor:
        """Map x (B, L+N, D), given its modulation (B, 3D), to those of its rows that are wanted."""
        shift, scale, gate = chunks(mod, 3)
        projected = self.linear1(modulate(x, shift, scale))
        qkv, hidden = projected[..., : self.qkv_size], projected[..., self.qkv_size :]
        q, k, v = split_heads(qkv, self.num_heads)
        q, k = self.norm(q, k)
        attended = attention(q, k, v, rope, rows, pads)
        activated = F.gelu(hidden[:, rows], approximate="tanh")
        out: Tensor = self.linear2(torch.cat([attended, activated], dim=-1))
        return x[:, rows] + gate * out


class FinalLayer(nn.Module):
    """The last norm and the projection to token channels."""

    def __init__(self, hidden_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_channels)
        # The checkpoint numbers the Linear 1: the SiLU before it is place 0.
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def modulation(self, activated_vec: Tensor) -> Tensor:
        """Return shift and scale, (..., 2D), for a vector that has been through the SiLU."""
        modulation: Tensor = self.adaLN_modulation[1](activated_vec)
        return modulation

    def forward(self, x: Tensor, mod: Tensor) -> Tensor:
        """Map x (B, N, D), given its modulation (B, 2D)."""
        shift, scale = chunks(mod, 2)
        velocity: Tensor = self.linear(modulate(x, shift, scale))
        return velocity
