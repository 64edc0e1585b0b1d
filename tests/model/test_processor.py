"""What a step computes on processors with and without instructions for bfloat16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from step1x_edit.model import processor
from step1x_edit.model.processor import OUTPUTS, QUERIES, Linear, by_products


def test_attention_by_products_computes_what_torch_does() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, QUERIES + 7, 16, generator=generator).bfloat16()
    k, v = torch.randn(2, 2, 3, 300, 16, generator=generator).bfloat16()
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())

    attended = by_products(q, k, v)

    torch.testing.assert_close(attended.double(), exact, atol=0.01, rtol=0.02)


def test_without_instructions_for_bfloat16_products_are_of_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processor, "bfloat16_instructions", lambda: None)
    torch.manual_seed(0)
    linear = Linear(64, OUTPUTS + 8).bfloat16()
    x = torch.randn(2, 3, 64).bfloat16()
    wide = F.linear(x.float(), linear.weight.float(), linear.bias.float())

    with torch.inference_mode():
        out = linear(x)

    assert torch.equal(out, wide.bfloat16())
