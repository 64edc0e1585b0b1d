"""Rectified flow: a straight line between noise and picture, its schedule, guidance and step.

The timestep t is the share of noise, from 1 (noise) to 0 (picture): x_t = (1-t) * x_0 + t * noise.
The network predicts the velocity dx/dt = noise - x_0. ("Flow Straight and Fast", arXiv 2209.03003,
with time reversed.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from step1x_edit.model.config import GuidanceRule

# mu is a straight line through (256 tokens, 0.5) and (4096 tokens, 1.15): `get_lin_function` in
# `src/flux/sampling.py`. More tokens shift the schedule further towards noise.
_FEW_TOKENS, _FEW_SHIFT = 256, 0.5
_MANY_TOKENS, _MANY_SHIFT = 4096, 1.15

DAMPED_ABOVE = 0.93
DAMPING_POWER = 0.4
"""The official damping rule: while t is above 0.93, divide by norm^0.4. It is in no paper, but in
`inference.py` of Step1X-Edit (`timesteps_truncate`, `process_diff_norm`)."""


def schedule(num_steps: int, num_tokens: int) -> Tensor:
    """Return the timesteps (num_steps + 1,) from 1 to 0; `num_tokens` counts the latents only."""
    return shift(torch.linspace(1, 0, num_steps + 1), num_tokens)


def shift(u: Tensor, num_tokens: int) -> Tensor:
    """Shift timesteps u in [0, 1]: t = e^mu / (e^mu + 1/u - 1). Training shifts its samples, too.

    `time_shift` in `src/flux/sampling.py`; arXiv 2403.03206, section 5.3.2 ("Resolution-dependent
    shifting of timestep schedules").
    """
    return shift_by(u, math.exp(mu(num_tokens)))


def shift_by(u: Tensor, factor: float) -> Tensor:
    """Shift timesteps u in [0, 1] by e^mu = factor; 1 leaves them as they are."""
    t: Tensor = factor / (factor + (1 / u - 1))
    return t


def between(clean: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
    """Return x_t on the straight line from the picture (t = 0) to the noise (t = 1)."""
    return (1 - t) * clean + t * noise


def velocity_of(clean: Tensor, noise: Tensor) -> Tensor:
    """Return dx/dt along this line: what the network is trained to predict."""
    return noise - clean


def mu(num_tokens: int) -> float:
    """Return the logarithm of the shift for a picture of `num_tokens` tokens."""
    slope = (_MANY_SHIFT - _FEW_SHIFT) / (_MANY_TOKENS - _FEW_TOKENS)
    return slope * num_tokens + (_FEW_SHIFT - slope * _FEW_TOKENS)


def guide(
    cond: Tensor,
    uncond: Tensor,
    scale: float | Tensor,
    t: float | Tensor,
    rule: GuidanceRule = GuidanceRule.OFFICIAL,
) -> Tensor:
    """Combine the velocities (B, N, C): uncond + scale · (cond - uncond) / divisor.

    Classifier-free guidance (arXiv 2207.12598), from the negative prompt towards the prompt. The
    divisor is 1 unless the rule damps this step (`norm_divisor`). `scale` and `t` are numbers, or
    tensors that broadcast to (B, N, C) to mix samples in a batch.
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


def jumps(times: Sequence[float], scale: float, rule: GuidanceRule) -> list[int]:
    """Return the steps in which guidance changes between damped and not: the velocity jumps."""
    if scale == 1.0:
        return []
    damped = [is_damped(t, rule) for t in times]
    return [i for i in range(1, len(times)) if damped[i] != damped[i - 1]]


def norm_divisor(direction: Tensor) -> Tensor:
    """Return each token's norm to the power 0.4, at least 1: (B, N, C) to (B, N, 1)."""
    norm: Tensor = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    return norm.clamp(min=1.0).pow(DAMPING_POWER)


def euler_step(x: Tensor, velocity: Tensor, t: float | Tensor, t_next: float | Tensor) -> Tensor:
    """Follow the velocity from t to t_next."""
    return x + (t_next - t) * velocity


def extrapolate(known: Sequence[tuple[float, Tensor]], t: float) -> Tensor:
    """Continue the straight line through the last two (t_i, v_i) to t; one value stays as it is.

    v(t) = v1 + (t - t1) / (t1 - t0) * (v1 - v0). Euler steps that follow it are a two-step method,
    of second order in the distance of the known values.
    """
    t1, v1 = known[-1]
    if len(known) == 1:
        return v1
    t0, v0 = known[-2]
    return v1 + (t - t1) / (t1 - t0) * (v1 - v0)
