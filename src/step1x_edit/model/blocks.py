"""The layers of the transformer: those of FLUX.1 (`src/flux/modules/layers.py`).

Shapes: B pictures, L text tokens, N image tokens, D hidden size, H heads. A block takes its
modulation as an input: it depends only on timestep and prompt, so that the transformer computes
those of all steps before the first one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step1x_edit.model.processor import Linear, softmax_attention
from step1x_edit.model.rope import apply_rope
from step1x_edit.model.team import Cut

EPS: Final = 1e-6
TIMESTEP_CHANNELS: Final = 256
TIMESTEP_SCALE: Final = 1000.0
"""The embedding was made for diffusion models that count 1000 timesteps."""
MAX_PERIOD: Final = 10_000
"""Of the sinusoids of the embedding, as in "Attention Is All You Need" (arXiv 1706.03762)."""

ALL_ROWS: Final = slice(None)


class Layout(NamedTuple):
    """The rows of a sequence: L of text, then N of the image."""

    rope: Tensor  # (1 or B, 1, L+N, D/2H, 2), the rotations of each row
    text_length: int  # L
    pad_copies: int = 0
    """How many rows of padding are left out behind the last row of the text, which equals them."""
    num_wanted: int | None = None
    """How many leading rows of the image have a velocity that is used; None: all."""
    places: Tensor | None = None  # (copies+L+N,)
    """Where the keys of these rows are among those of a whole sequence; None: they are all."""
    cut: Cut | None = None
    """How the rows are cut among processes; then `rope` and `num_wanted` are those of this one."""

    @property
    def wanted(self) -> slice:
        """The rows of the image whose velocity is used."""
        start = self.text_length if self.cut is None else self.cut.text_rows
        return slice(start, None if self.num_wanted is None else start + self.num_wanted)

    def only(self, rows: Tensor) -> Layout:
        """The text and these rows (K,) of the image, as a part of this sequence."""
        image = self.text_length + rows
        text = torch.arange(self.text_length + self.pad_copies, device=rows.device)
        return Layout(
            rope=self.rope.index_select(-3, torch.cat([text[: self.text_length], image])),
            text_length=self.text_length,
            pad_copies=self.pad_copies,
            places=torch.cat([text, self.pad_copies + image]),
        )


@dataclass
class KeysAndValues:
    """Those of a whole sequence in one block, each row's from the last time that it ran."""

    k: Tensor | None = None  # (B, H, copies+L+N, D/H), rotated
    v: Tensor | None = None

    def refresh(self, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Keep k and v of the rows that run, and return those of all rows."""
        if layout.places is None or self.k is None or self.v is None:
            self.k, self.v = k, v.contiguous()  # a copy: the block writes where v was
        else:
            self.k.index_copy_(2, layout.places, k)
            self.v.index_copy_(2, layout.places, v)
        return self.k, self.v


class Modulation(NamedTuple):
    """What timestep and prompt do to a layer f: x + gate * f((1 + scale) * LN(x) + shift).

    This is the adaLN block of "Scalable Diffusion Models with Transformers" (arXiv 2212.09748).
    """

    shift: Tensor  # (..., 1, D)
    scale: Tensor  # (..., 1, D)
    gate: Tensor  # (..., 1, D)


class DoubleStreamBlock(nn.Module):
    """Text and image have separate weights and meet in one attention.

    This is MM-DiT of "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis"
    (arXiv 2403.03206), "Text-to-Image Architecture".
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int) -> None:
        super().__init__()
        self.img_mod = Modulator(hidden_size, 6)
        self.img_attn = StreamAttention(hidden_size, num_heads)
        self.img_mlp = mlp(hidden_size, mlp_size)
        self.txt_mod = Modulator(hidden_size, 6)
        self.txt_attn = StreamAttention(hidden_size, num_heads)
        self.txt_mlp = mlp(hidden_size, mlp_size)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        img_mod: Tensor,
        txt_mod: Tensor,
        layout: Layout,
        kept: KeysAndValues | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Map img (B, N, D) and txt (B, L, D), given modulations (B, 6D); see `attention`."""
        img_mod1, img_mod2 = modulations(img_mod, 2)
        txt_mod1, txt_mod2 = modulations(txt_mod, 2)

        q, k, v = self._qkv(img, txt, img_mod1, txt_mod1)  # 3 × (B, H, L+N, D/H)
        attended = attention(q, k, v, layout, kept=kept)  # (B, L+N, D)
        txt_attended, img_attended = attended[:, : txt.shape[1]], attended[:, txt.shape[1] :]

        img = torch.addcmul(img, img_mod1.gate, self.img_attn.proj(img_attended))
        img_hidden = self.img_mlp(modulate(img, img_mod2.shift, img_mod2.scale))
        img = torch.addcmul(img, img_mod2.gate, img_hidden)
        txt = torch.addcmul(txt, txt_mod1.gate, self.txt_attn.proj(txt_attended))
        txt_hidden = self.txt_mlp(modulate(txt, txt_mod2.shift, txt_mod2.scale))
        txt = torch.addcmul(txt, txt_mod2.gate, txt_hidden)
        return img, txt

    def _qkv(
        self, img: Tensor, txt: Tensor, img_mod: Modulation, txt_mod: Modulation
    ) -> Sequence[Tensor]:
        """q, k and v of both streams together; those of each are freed before attention."""
        img_qkv = self.img_attn(modulate(img, img_mod.shift, img_mod.scale))  # 3 × (B, H, N, D/H)
        txt_qkv = self.txt_attn(modulate(txt, txt_mod.shift, txt_mod.scale))  # 3 × (B, H, L, D/H)
        return [torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv, strict=True)]

    def modulations(self, activated_vec: Tensor) -> tuple[Tensor, Tensor]:
        """Return the modulations of image and text stream, (..., 6D) each."""
        return self.img_mod(activated_vec), self.txt_mod(activated_vec)


class SingleStreamBlock(nn.Module):
    """Text and image in one sequence, attention and MLP in parallel between two matrices.

    The parallel form is that of "Scaling Vision Transformers to 22 Billion Parameters" (arXiv
    2302.05442), "Parallel layers".
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv_size = 3 * hidden_size
        self.linear1 = Linear(hidden_size, 3 * hidden_size + mlp_size)
        self.linear2 = Linear(hidden_size + mlp_size, hidden_size)
        self.norm = QKNorm(hidden_size // num_heads)
        self.modulation = Modulator(hidden_size, 3)

    def forward(
        self,
        x: Tensor,
        mod: Tensor,
        layout: Layout,
        rows: slice = ALL_ROWS,
        kept: KeysAndValues | None = None,
    ) -> Tensor:
        """Map x (B, L+N, D), given its modulation (B, 3D), to these of its rows."""
        (modulation,) = modulations(mod, 1)
        projected = self.linear1(modulate(x, modulation.shift, modulation.scale))
        qkv, hidden = projected[..., : self.qkv_size], projected[..., self.qkv_size :]
        q, k, v = split_heads(qkv, self.num_heads)  # 3 × (B, H, L+N, D/H)
        q, k = self.norm(q, k)
        attended = attention(q, k, v, layout, rows, kept)  # (B, rows, D)
        if torch.is_grad_enabled():
            activated = F.gelu(hidden[:, rows], approximate="tanh")  # (B, rows, mlp_size)
            joined = torch.cat([attended, activated], dim=-1)
        else:  # v is used and lies beside the hidden part: it gives its place to what is attended
            joined = projected[:, rows, self.qkv_size - attended.shape[-1] :]
            joined[..., : attended.shape[-1]] = attended
            gelu_(joined[..., attended.shape[-1] :])
        x = x[:, rows]
        # In two dimensions, because with three torch copies what is not contiguous.
        out: Tensor = self.linear2(joined.flatten(0, 1)).view_as(x)
        return torch.addcmul(x, modulation.gate, out)


class FinalLayer(nn.Module):
    """The last norm and the projection to token channels."""

    def __init__(self, hidden_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_channels)
        # The checkpoint numbers the Linear 1: the SiLU before it is place 0.
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, mod: Tensor) -> Tensor:
        """Map x (B, N, D), given its modulation (B, 2D), to (B, N, Cout)."""
        shift, scale = chunks(mod, 2)
        velocity: Tensor = self.linear(modulate(x, shift, scale))
        return velocity

    def modulation(self, activated_vec: Tensor) -> Tensor:
        """Return shift and scale, (..., 2D), for a vector that has been through the SiLU."""
        modulation: Tensor = self.adaLN_modulation[1](activated_vec)
        return modulation


# --- attention ------------------------------------------------------------------------------------


class StreamAttention(nn.Module):
    """The part of joint attention that belongs to one stream: projections and norms."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.norm = QKNorm(hidden_size // num_heads)
        self.proj = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalised q, k and plain v, each (B, H, N, D/H)."""
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        q, k = self.norm(q, k)
        return q, k, v


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    rows: slice = ALL_ROWS,
    kept: KeysAndValues | None = None,
) -> Tensor:
    """Return softmax(q kᵀ / √(D/H)) v after rotating q and k: (B, H, L+N, D/H) to (B, rows, D).

    q and k come in float32 and are rotated so. There is no mask: the model was trained with its
    padding as keys, so that rows of padding that are left out are put back here. Rows that do not
    run in this step have their `kept` keys and values. If the rows are cut among processes, each
    has all of them for some of the heads.
    """
    first = rows if layout.cut is None else ALL_ROWS
    q = apply_rope(q, layout.rope)[:, :, first].to(v.dtype)
    k = apply_rope(k, layout.rope).to(v.dtype)
    if layout.cut is not None:
        q, k, v = layout.cut.to_heads(torch.stack([q, k, v]))
    k, v = with_pads(k, layout), with_pads(v, layout)
    if kept is not None:
        k, v = kept.refresh(k, v, layout)
    attended = softmax_attention(q, k, v)
    if layout.cut is not None:
        attended = layout.cut.to_rows(attended)[:, :, rows]
    return merge_heads(attended)


def with_pads(x: Tensor, layout: Layout) -> Tensor:
    """Put the copies of the last text row back into x: (B, H, L+N, D/H) to (…, copies+L+N, …)."""
    if not layout.pad_copies:
        return x
    end = layout.text_length
    copies = x[:, :, end - 1 : end].expand(-1, -1, layout.pad_copies, -1)
    return torch.cat([x[:, :, :end], copies, x[:, :, end:]], dim=2)


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut a fused projection (B, N, 3D) into q, k, v of (B, H, N, D/H)."""
    b, n, _ = qkv.shape
    q, k, v = qkv.view(b, n, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return q, k, v


def merge_heads(x: Tensor) -> Tensor:
    """Undo the cut into heads: (B, H, N, D/H) to (B, N, D)."""
    return x.transpose(1, 2).flatten(2)


# --- norms and modulation -------------------------------------------------------------------------


class QKNorm(nn.Module):
    """Normalises queries and keys, each with its own scale. Returns float32 or wider.

    "QK Normalization" of arXiv 2302.05442, with RMSNorm instead of LayerNorm.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the channels of a head. Returns float32 or wider."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(widen(x), x.shape[-1:], widen(self.scale), EPS)


class Modulator(nn.Module):
    """One matrix product gives all shifts, scales and gates of a stream."""

    def __init__(self, hidden_size: int, num_chunks: int) -> None:
        super().__init__()
        self.lin = nn.Linear(hidden_size, num_chunks * hidden_size)

    def forward(self, activated_vec: Tensor) -> Tensor:
        modulation: Tensor = self.lin(activated_vec)
        return modulation


def modulations(fused: Tensor, number: int) -> list[Modulation]:
    """Cut a modulator's output (..., 3 · number · D) into triples: attention first, then MLP."""
    parts = chunks(fused, 3 * number)
    return [Modulation(*parts[3 * index : 3 * index + 3]) for index in range(number)]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return (1 + scale) * LN(x) + shift."""
    return torch.addcmul(shift, 1 + scale, layer_norm(x))


def layer_norm(x: Tensor) -> Tensor:
    """Normalise over channels, without weights: the modulation supplies them."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def chunks(modulation: Tensor, number: int) -> tuple[Tensor, ...]:
    """Cut a modulation (..., number * D) into parts (..., 1, D) that broadcast over tokens."""
    return modulation.unsqueeze(-2).chunk(number, dim=-1)


# --- embeddings -----------------------------------------------------------------------------------


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


def mlp(hidden_size: int, mlp_size: int) -> nn.Sequential:
    """Build the feed-forward part of a stream."""
    return nn.Sequential(
        Linear(hidden_size, mlp_size),
        GELU(),
        Linear(mlp_size, hidden_size),
    )


class GELU(nn.Module):
    """GELU by tanh."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh") if torch.is_grad_enabled() else gelu_(x)


def gelu_(x: Tensor) -> Tensor:
    """GELU by tanh, in place."""
    activated: Tensor = torch.ops.aten.gelu_(x, approximate="tanh")
    return activated


def timestep_embedding(t: Tensor) -> Tensor:
    """Embed timesteps t (...,) in [0, 1]: cos(1000 t ω_i), then sin, of 128 frequencies ω_i.

    ω_i = 10000^(-i/128); returns (..., 256), always in float32: in bf16 neighbouring timesteps
    would become equal.
    """
    half = TIMESTEP_CHANNELS // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(MAX_PERIOD) * steps / half)
    angles = (TIMESTEP_SCALE * t).float().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def widen(x: Tensor) -> Tensor:
    """Return x in float32, or as it is in float64; narrower types are too coarse for sums."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
