"""Attention by products against torch's own, in more numbers than one part of the queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from step1x_edit.model.processor import QUERIES, by_products


def test_attention_by_products_computes_what_torch_does() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, QUERIES + 7, 16, generator=generator).bfloat16()
    k, v = torch.randn(2, 2, 3, 300, 16, generator=generator).bfloat16()
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())

    attended = by_products(q, k, v)

    torch.testing.assert_close(attended.double(), exact, atol=0.01, rtol=0.02)
