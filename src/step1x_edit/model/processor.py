"""What the processor has for products of bfloat16, and attention that uses it.

It knows nothing of what a user chose; without such instructions everything works as well.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES: Final = 256
"""At a time, so that their scores for some thousand keys stay in the processor's cache."""


@cache
def bfloat16_instructions() -> str | None:
    """The instructions for products of bfloat16 that torch may use here, if there are any."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return None
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else None


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q kᵀ / √d) v for q (B, H, Q, d), k and v (B, H, K, d).

    With AVX512_BF16 and without AMX, torch's own kernel does not use the instructions.
    """
    if q.device.type != "cpu" or q.dtype is not torch.bfloat16 or torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v)
    if bfloat16_instructions() != "avx512_bf16":
        return F.scaled_dot_product_attention(q, k, v)
    return by_products(q, k, v)


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
