"""The connector: hidden states of the conditioner become text tokens and one global vector.

The timestep enters through the gates only. So tensors that do not depend on it keep a leading
axis of 1 where the others have T, and broadcasting spares the work: projections and attention of
the first block run once, however many timesteps there are.
"""

from __future__ import annotations

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


class RefinerMLP(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.silu(self.fc1(x)))
        return out


class RefinerBlock(nn.Module):
    """Self-attention and MLP over the text, behind gates; no rotary encoding, no q/k norm."""

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


class TokenRefiner(nn.Module):
    """Holds the blocks under the checkpoint's name for them."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            RefinerBlock(config.hidden_size, config.num_heads) for _ in range(config.depth)
        )

    def forward(self, x: Tensor, condition: Tensor, allowed: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, condition, allowed)
        return x


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


class Connector(nn.Module):
    """Refines the text for given timesteps and pools it into the global vector."""

    def __init__(self, config: ConnectorConfig, vec_dim: int) -> None:
        super().__init__()
        self.S = TextRefiner(config)
        self.global_proj_out = nn.Linear(config.in_features, vec_dim)
        self.scale_factor = (
            nn.Parameter(torch.full((1,), -0.91)) if config.has_scale_factor else None
        )

    def forward(self, x: Tensor, mask: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (B, L, C), mask (B, L), timesteps (T, B) to text (T, B, L, D) and vector (B, V).

        Masked rows of the text are part of the result: the transformer attends to them.
        """
        pooled = masked_mean(x, mask)  # (B, C)
        scaled = pooled if self.scale_factor is None else pooled * (1 + self.scale_factor)
        text: Tensor = self.S(x, pooled, mask, timesteps)
        vector: Tensor = self.global_proj_out(scaled)
        return text, vector


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean (B, C) of the rows of x (B, L, C) where mask (B, L) is 1; float32 inside."""
    wide = widen(x)
    weight = mask.unsqueeze(-1).to(wide.dtype)
    return ((wide * weight).sum(dim=1) / weight.sum(dim=1)).to(x.dtype)


def attention_mask(mask: Tensor) -> Tensor:
    """Return who may attend to whom: (B, L) to bool (B, 1, L, L).

    Valid rows see each other. Column 0 is open to every row, so that a padded row has something
    to see: exactly token 0.
    """
    valid = mask.bool()
    allowed = valid.unsqueeze(1) & valid.unsqueeze(2)  # (B, query, key)
    allowed[..., 0] = True
    return allowed.unsqueeze(1)
