"""Rectified flow: noise and picture on a straight line, the schedule, guidance, step and target.

The timestep t is the share of noise, from 1 (noise) to 0 (picture): x_t = (1-t) * x_0 + t * noise.
The network predicts the velocity dx/dt = noise - x_0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from step1x_edit.model.config import GuidanceRule

# The schedule is bent towards noise the more, the more tokens there are: mu is a straight line
# through (256 tokens, 0.5) and (4096 tokens, 1.15).
_FEW_TOKENS, _FEW_SHIFT = 256, 0.5
_MANY_TOKENS, _MANY_SHIFT = 4096, 1.15

DAMPED_ABOVE = 0.93
DAMPING_POWER = 0.4
"""The official rule against burnt pictures: while t is above 0.93, divide by norm^0.4."""


def schedule(num_steps: int, num_tokens: int) -> Tensor:
    """Return the timesteps (num_steps + 1,) from 1 to 0; `num_tokens` counts the latents only."""
    return shift(torch.linspace(1, 0, num_steps + 1), num_tokens)


def shift(u: Tensor, num_tokens: int) -> Tensor:
    """Bend timesteps u in [0, 1]: t = e^mu / (e^mu + 1/u - 1). Training samples bend likewise."""
    e_mu = math.exp(mu(num_tokens))
    t: Tensor = e_mu / (e_mu + (1 / u - 1))
    return t


def mu(num_tokens: int) -> float:
    """Return the logarithm of the shift for a picture of so many tokens."""
    slope = (_MANY_SHIFT - _FEW_SHIFT) / (_MANY_TOKENS - _FEW_TOKENS)
    return slope * num_tokens + (_FEW_SHIFT - slope * _FEW_TOKENS)


def guide(
    cond: Tensor,
    uncond: Tensor,
    scale: float | Tensor,
    t: float | Tensor,
    rule: GuidanceRule = GuidanceRule.OFFICIAL,
) -> Tensor:
    """Combine the velocities (B, N, C) of prompt and negative prompt.

    `scale` and `t` are numbers, or tensors that broadcast to (B, N, C) to mix samples in a batch.
    """
    direction = cond - uncond
    plain = scale * direction
    damping = is_damped(t, rule)
    if isinstance(damping, Tensor):
        return uncond + torch.where(damping, plain / norm_divisor(direction), plain)
    return uncond + (plain / norm_divisor(direction) if damping else plain)


def is_damped(t: float | Tensor, rule: GuidanceRule) -> bool | Tensor:
    """Whether guidance is damped in a step that begins at t; elementwise for a tensor."""
    match rule:
        case GuidanceRule.OFFICIAL:
            return t > DAMPED_ABOVE
        case GuidanceRule.ALWAYS:
            return True
        case GuidanceRule.NEVER:
            return False


def norm_divisor(direction: Tensor) -> Tensor:
    """Return each token's norm to the power 0.4, at least 1: (B, N, C) to (B, N, 1)."""
    norm: Tensor = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    return norm.clamp(min=1.0).pow(DAMPING_POWER)


def euler_step(x: Tensor, velocity: Tensor, t: float | Tensor, t_next: float | Tensor) -> Tensor:
    """Follow the velocity from t to t_next."""
    return x + (t_next - t) * velocity


def add_noise(clean: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
    """Return x_t on the line from `clean` (t = 0) to `noise` (t = 1)."""
    return (1 - t) * clean + t * noise
