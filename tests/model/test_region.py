"""Steps that run only a part of the tokens, with the keys and values of all others kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from step1x_edit.model.blocks import Layout
from step1x_edit.model.config import V1_2
from step1x_edit.model.latents import image_position_ids
from step1x_edit.model.region import touched_tokens
from step1x_edit.model.transformer import PrologueStep, Transformer
from tiny import TINY

B, L, COPIES = 2, 5, 3
ROWS, COLUMNS = 3, 4
LATENTS = ROWS * COLUMNS
INSIDE = torch.tensor([1, 2, 5, 6])
TEXT_IDS = {
    "v1.1": (TINY.reference_offset, None),
    "v1.2": (V1_2.reference_offset, torch.arange(3.0 * L).view(L, 3)),
}


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    torch.manual_seed(0)
    return Transformer(TINY.transformer).eval()


@pytest.fixture(params=TEXT_IDS)
def layout(request: pytest.FixtureRequest, transformer: Transformer) -> Layout:
    offset, text_ids = TEXT_IDS[request.param]
    rope = transformer.rope(image_position_ids(ROWS, COLUMNS, offset), L, text_ids)
    return Layout(rope, L, COPIES if text_ids is None else 0, num_wanted=LATENTS)


@pytest.fixture(scope="module")
def steps(transformer: Transformer) -> tuple[PrologueStep, PrologueStep]:
    torch.manual_seed(1)
    embeds = torch.randn(B, L, TINY.transformer.connector.in_features)
    with torch.inference_mode():
        prologue = transformer.prologue(embeds, torch.ones(B, L), torch.tensor([0.9, 0.8]))
        return prologue[0], prologue[1]


@pytest.fixture
def img() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(B, 2 * LATENTS, TINY.transformer.in_channels)


Steps = tuple[PrologueStep, PrologueStep]


@torch.inference_mode()
def test_a_region_right_after_a_full_step_has_the_same_velocity(
    transformer: Transformer, layout: Layout, steps: Steps, img: Tensor
) -> None:
    kept = transformer.keys_and_values()
    expected = transformer.core(img, steps[0], layout, kept)
    part = layout.only(INSIDE)

    for _ in range(2):  # the second finds what the first has kept
        found = transformer.core(img[:, INSIDE], steps[0], part, kept)
        torch.testing.assert_close(found, expected[:, INSIDE], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_keeping_changes_no_bit(
    transformer: Transformer, layout: Layout, steps: Steps, img: Tensor
) -> None:
    expected = transformer.core(img, steps[0], layout)

    assert torch.equal(
        transformer.core(img, steps[0], layout, transformer.keys_and_values()), expected
    )


@torch.inference_mode()
def test_a_region_of_all_rows_is_a_full_step(
    transformer: Transformer, layout: Layout, steps: Steps, img: Tensor
) -> None:
    kept = transformer.keys_and_values()
    transformer.core(torch.zeros_like(img), steps[0], layout, kept)

    found = transformer.core(img, steps[1], layout.only(torch.arange(2 * LATENTS)), kept)

    expected = transformer.core(img, steps[1], layout)
    torch.testing.assert_close(found[:, :LATENTS], expected, rtol=0, atol=1e-6)


@torch.inference_mode()
def test_rows_outside_are_seen_as_they_were_in_the_last_full_step(
    transformer: Transformer, layout: Layout, steps: Steps, img: Tensor
) -> None:
    kept, part = transformer.keys_and_values(), layout.only(INSIDE)
    transformer.core(img, steps[0], layout, kept)
    first = transformer.core(img[:, INSIDE], steps[1], part, kept)
    moved = img.clone()
    moved[:, LATENTS:] += 1.0

    transformer.core(moved, steps[0], layout, kept)

    after = transformer.core(img[:, INSIDE], steps[1], part, kept)
    assert (first - after).abs().max() > 1e-3
    exact = transformer.core(moved, steps[1], layout)[:, INSIDE]
    assert (after - exact).norm() < (first - exact).norm()


def test_a_mask_selects_the_tokens_that_it_touches_and_those_beside() -> None:
    mask = np.zeros((60, 80), np.uint8)
    mask[25, 39] = 1  # a token has 10 × 10 pixels

    tokens = touched_tokens(mask, 6, 8)

    assert tokens.tolist() == [8 * row + column for row in (1, 2, 3) for column in (2, 3, 4)]


@pytest.mark.parametrize("size", [(7, 9), (12, 16), (1000, 1333)])
def test_a_mask_of_any_size_covers_the_same_picture(size: tuple[int, int]) -> None:
    mask = np.zeros(size, np.uint8)
    assert len(touched_tokens(mask, 12, 16)) == 0
    mask[-1, -1] = 255  # of a small mask one pixel touches more than one token
    assert set(touched_tokens(mask, 12, 16).tolist()) >= {174, 175, 190, 191}
    mask[:] = 255
    assert touched_tokens(mask, 12, 16).tolist() == list(range(12 * 16))
