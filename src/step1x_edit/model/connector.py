"""The connector: hidden states of the conditioner become text tokens and one global vector.

It is `Qwen2Connector` in `modules/connector_edit.py` of Step1X-Edit, whose trunk is the token
refiner of HunyuanVideo (`hyvideo/modules/token_refiner.py`).

The timestep enters through the gates only. Tensors that do not depend on it therefore keep a
leading axis of 1 instead of T, and broadcasting saves work: projections and attention of the first
block run once for all timesteps.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step1x_edit.model.blocks import (
    EPS,
    TIMESTEP_CHANNELS,
    chunks,
    merge_heads,
    split_heads,
    timestep_embedding,
    widen,
)
from step1x_edit.model.config import ConnectorConfig

MLP_RATIO: Final = 4
"""Width of a refiner block's MLP, as a multiple of its hidden size."""
SCALE_FACTOR: Final = -0.91
"""Where training started the scale factor of v1.0."""


class Connector(nn.Module):
    """Refines the text for given timesteps and pools it into the global vector."""

    def __init__(self, config: ConnectorConfig, vec_dim: int) -> None:
        super().__init__()
        self.S = TextRefiner(config)
        self.global_proj_out = nn.Linear(config.in_features, vec_dim)
        self.scale_factor = (
            nn.Parameter(torch.full((1,), SCALE_FACTOR)) if config.has_scale_factor else None
        )

    def forward(self, x: Tensor, mask: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (B, L, C), mask (B, L), timesteps (T, B) to text (T, B, L, D) and vector (B, V).

        Masked rows of the text are part of the result: the transformer attends to them.
        """
        pooled = masked_mean(x, mask)  # (B, C)
        scaled = pooled if self.scale_factor is None else pooled * (1 + self.scale_factor)
        text: Tensor = self.S(x, pooled, mask, timesteps)  # (T, B, L, D)
        vector: Tensor = self.global_proj_out(scaled)  # (B, V)
        return text, vector


class TextRefiner(nn.Module):
    """The trunk of the connector; `S` in the checkpoint."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(config.in_features, config.hidden_size)
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.c_embedder = TextProjection(config.in_features, config.hidden_size)
        self.individual_token_refiner = TokenRefiner(config)

    def forward(self, x: Tensor, pooled: Tensor, mask: Tensor, timesteps: Tensor) -> Tensor:
        condition = self.t_embedder(timesteps) + self.c_embedder(pooled)  # (T, B, D)
        tokens: Tensor = self.individual_token_refiner(
            self.input_embedder(x).unsqueeze(0), condition, attention_mask(mask)
        )
        return tokens


class TokenRefiner(nn.Module):
    """Holds the blocks under the name that they have in the checkpoint."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            RefinerBlock(config.hidden_size, config.num_heads) for _ in range(config.depth)
        )

    def forward(self, x: Tensor, condition: Tensor, allowed: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, condition, allowed)
        return x


class RefinerBlock(nn.Module):
    """x += gate * attention(LN(x)), then x += gate * MLP(LN(x)); without rope and q/k norm."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(hidden_size, eps=EPS)
        self.self_attn_qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.self_attn_proj = nn.Linear(hidden_size, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size, eps=EPS)
        self.mlp = RefinerMLP(hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor, allowed: Tensor) -> Tensor:
        """Map x (1 or T, B, L, D), given condition (T, B, D), to (T, B, L, D)."""
        gates: Tensor = self.adaLN_modulation(condition)
        attn_gate, mlp_gate = chunks(gates, 2)  # (T, B, 1, D) each
        attended: Tensor = self.self_attn_proj(self._attend(x, allowed))
        x = x + attn_gate * attended
        refined: Tensor = self.mlp(self.norm2(x))
        return x + mlp_gate * refined

    def _attend(self, x: Tensor, allowed: Tensor) -> Tensor:
        qkv: Tensor = self.self_attn_qkv(self.norm1(x))  # (T, B, L, 3D)
        q, k, v = split_heads(qkv.flatten(0, 1), self.num_heads)
        mask = allowed.repeat(x.shape[0], 1, 1, 1)  # (T*B, 1, L, L)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return merge_heads(attended).view_as(x)


class RefinerMLP(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, MLP_RATIO * hidden_size)
        self.fc2 = nn.Linear(MLP_RATIO * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.silu(self.fc1(x)))
        return out


class TimestepEmbedder(nn.Module):
    """The timestep as a vector of the connector's width."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIMESTEP_CHANNELS, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, t: Tensor) -> Tensor:
        embedded: Tensor = self.mlp(timestep_embedding(t).to(self.dtype))
        return embedded

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.mlp.parameters()).dtype


class TextProjection(nn.Module):
    """The pooled text as a vector of the connector's width."""

    def __init__(self, in_features: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, pooled: Tensor) -> Tensor:
        projected: Tensor = self.linear_2(F.silu(self.linear_1(pooled)))
        return projected


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean (B, C) of the rows of x (B, L, C) where mask (B, L) is 1; float32 inside."""
    wide = widen(x)
    weight = mask.unsqueeze(-1).to(wide.dtype)
    return ((wide * weight).sum(dim=1) / weight.sum(dim=1)).to(x.dtype)


def attention_mask(mask: Tensor) -> Tensor:
    """Return which query may attend to which key: (B, L) to bool (B, 1, query, key).

    Valid rows attend to each other. Key 0 is open to every query: a padded row attends to exactly
    token 0, so that its softmax is not empty.
    """
    valid = mask.bool()
    allowed = valid.unsqueeze(1) & valid.unsqueeze(2)  # (B, query, key)
    allowed[..., 0] = True
    return allowed.unsqueeze(1)
