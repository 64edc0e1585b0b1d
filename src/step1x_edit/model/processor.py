"""What the processor has for products of bfloat16, and how a step of an edit uses it.

Weights of published models are bfloat16 on every processor. Without instructions for it, torch's
products of bfloat16 take four times as long as those of float32 (AVX2), so they are widened.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUERIES: Final = 256
"""At a time, so that their scores for some thousand keys stay in the processor's cache."""
OUTPUTS: Final = 1024
"""Rows of a matrix that are widened at a time."""


@cache
def bfloat16_instructions() -> str | None:
    """The instructions for products of bfloat16 that torch may use here, if there are any."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return None
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else None


class Linear(nn.Linear):
    """A linear layer that multiplies bfloat16 as float32 where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out)."""
        if not _is_narrow(x) or bfloat16_instructions():
            return super().forward(x)
        wide, out = x.float(), x.new_empty(*x.shape[:-1], self.out_features)
        for start in range(0, self.out_features, OUTPUTS):
            part = slice(start, start + OUTPUTS)
            bias = None if self.bias is None else self.bias[part].float()
            out[..., part] = F.linear(wide, self.weight[part].float(), bias)
        return out


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q kᵀ / √d) v for q (B, H, Q, d), k and v (B, H, K, d).

    With AVX512_BF16 and without AMX, torch's own kernel does not use the instructions.
    """
    if _is_narrow(q) and bfloat16_instructions() == "avx512_bf16":
        return by_products(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as products of bfloat16 with a softmax between, head by head."""
    batch, heads, length, size = q.shape
    attended = q.new_empty(batch, length, heads, size)  # the layout of the merged heads
    q = q * size**-0.5
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h].T, v[b, h]
            parts = torch.split(q[b, h], QUERIES)
            for part, target in zip(parts, torch.split(attended[b, :, h], QUERIES), strict=True):
                target.copy_(torch.softmax(part @ keys, dim=-1) @ values)
    return attended.transpose(1, 2)


def _is_narrow(x: Tensor) -> bool:
    """Whether an edit on a CPU computes with bfloat16, and not in a compiled network."""
    if torch.compiler.is_compiling():
        return False
    is_on_cpu = x.device.type == "cpu" and x.dtype is torch.bfloat16
    return is_on_cpu and not torch.is_grad_enabled()
