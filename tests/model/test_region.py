"""Steps that run only a part of the tokens, with the keys and values of all others kept."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from step1x_edit.model.blocks import KeysAndValues, Layout
from step1x_edit.model.config import V1_2
from step1x_edit.model.denoising import DenoiseState
from step1x_edit.model.latents import image_position_ids
from step1x_edit.model.pipeline import EditPipeline, Plan
from step1x_edit.model.region import touched_tokens
from step1x_edit.model.request import NetworkRequest
from step1x_edit.model.steps import Curve, Profile
from step1x_edit.model.transformer import PrologueStep, Transformer
from tiny import TINY, a_picture, tiny_pipeline, tiny_pipeline_v1_2

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


# --- edits ----------------------------------------------------------------------------------------

PROFILE = Profile((Curve(4, ((1.0, 1.0),)), Curve(99, ((1.0, 1.0),))), has_regions=True)
MASK = np.zeros((40, 60), np.uint8)
MASK[:8, :12] = 255
TURBO = NetworkRequest(
    a_picture(), "make it night", "a", num_steps=20, size_level=96, seed=7, mode="turbo", mask=MASK
)
ROOM = 10**9
ONE_BY_ONE = Plan(has_joint_branches=False, keepable=ROOM)


def pipeline_with_regions(make: Callable[[], EditPipeline]) -> EditPipeline:
    pipeline = make()
    pipeline.profile = PROFILE
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> EditPipeline:
    return pipeline_with_regions(tiny_pipeline)


@torch.inference_mode()
def states(
    pipeline: EditPipeline, request: NetworkRequest, plan: Plan, start: DenoiseState | None = None
) -> list[DenoiseState]:
    encoded = pipeline.encode(request)
    start = start or pipeline.start(encoded, request.seed)
    return list(pipeline.denoise(encoded, start, request, plan))


@contextlib.contextmanager
def rows_run(pipeline: EditPipeline) -> Iterator[list[int]]:
    """How many image tokens each run of the transformer is given."""
    rows: list[int] = []
    hook = pipeline.transformer.img_in.register_forward_pre_hook(
        lambda _, inputs: rows.append(inputs[0].shape[1])
    )
    try:
        yield rows
    finally:
        hook.remove()


def test_some_steps_of_a_masked_turbo_edit_run_its_region_alone(pipeline: EditPipeline) -> None:
    with rows_run(pipeline) as rows:
        *_, end = states(pipeline, TURBO, Plan(keepable=ROOM))
    region, everything = min(rows), max(rows)

    assert region < everything / 4
    assert rows == [everything, *[everything, region] * 3, everything]
    assert end.evaluations == 2 * len(rows)


@pytest.mark.parametrize(
    ("changes", "keepable"),
    [
        ({"mode": "exact"}, ROOM),
        ({"mode": "fast"}, ROOM),
        ({"mask": None}, ROOM),
        ({"mask": np.ones_like(MASK)}, ROOM),
        ({"mask": np.zeros_like(MASK)}, ROOM),
        ({}, 10_000),
    ],
    ids=["exact", "fast", "no mask", "everything", "nothing", "no room"],
)
def test_other_edits_run_all_rows(
    pipeline: EditPipeline, changes: dict[str, Any], keepable: int
) -> None:
    with rows_run(pipeline) as rows:
        *_, end = states(pipeline, dataclasses.replace(TURBO, **changes), Plan(keepable=keepable))

    assert len(set(rows)) == 1
    plain = dataclasses.replace(TURBO, **{**changes, "mask": None})
    assert torch.equal(end.latents, states(pipeline, plain, Plan())[-1].latents)


def test_a_checkpoint_that_gains_nothing_by_regions_runs_all_rows() -> None:
    pipeline = tiny_pipeline()
    pipeline.profile = dataclasses.replace(PROFILE, has_regions=False)

    with rows_run(pipeline) as rows:
        states(pipeline, TURBO, Plan(keepable=ROOM))

    assert len(set(rows)) == 1


def test_prompts_run_together_or_one_after_the_other(pipeline: EditPipeline) -> None:
    together = states(pipeline, TURBO, Plan(keepable=ROOM))[-1]

    apart = states(pipeline, TURBO, ONE_BY_ONE)[-1]

    torch.testing.assert_close(apart.latents, together.latents, rtol=0, atol=1e-4)
    assert apart.evaluations == together.evaluations


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_pipeline_v1_2])
def test_an_edit_with_regions_is_near_the_same_without(make: Callable[[], EditPipeline]) -> None:
    pipeline = pipeline_with_regions(make)
    exact = states(pipeline, dataclasses.replace(TURBO, mode="exact"), Plan())[-1].latents
    skipping = states(pipeline, TURBO, Plan())[-1].latents
    with rows_run(pipeline) as rows:
        found = states(pipeline, TURBO, Plan(keepable=ROOM))[-1].latents

    assert min(rows) < max(rows)
    assert not torch.equal(found, skipping)
    assert (found - exact).norm() < 0.05 * exact.norm()


def test_an_edit_that_continues_runs_all_rows_before_a_region(pipeline: EditPipeline) -> None:
    before = states(pipeline, TURBO, Plan(keepable=ROOM))
    resumed = next(state for state in before if state.evaluations == 4)  # a region is next

    with rows_run(pipeline) as rows:
        *_, end = states(pipeline, TURBO, Plan(keepable=ROOM), resumed)

    region, everything = min(rows), max(rows)
    assert rows == [everything, *[everything, region] * 2, everything]
    assert end.evaluations == before[-1].evaluations


def size_of(kept: KeysAndValues | None) -> int:
    return 0 if kept is None or kept.k is None or kept.v is None else kept.k.nbytes + kept.v.nbytes


@torch.inference_mode()
def test_what_is_kept_fits_the_room_and_is_gone_after_the_edit(pipeline: EditPipeline) -> None:
    stores: list[weakref.ref[KeysAndValues]] = []
    sizes: list[int] = []
    make = pipeline.transformer.keys_and_values

    def noted() -> list[KeysAndValues]:
        kept = make()
        stores.extend(map(weakref.ref, kept))
        return kept

    pipeline.transformer.keys_and_values = noted  # type: ignore[method-assign]
    try:
        encoded = pipeline.encode(TURBO)
        start = pipeline.start(encoded, 7)
        for _ in pipeline.denoise(encoded, start, TURBO, Plan(keepable=ROOM)):
            sizes.append(sum(size_of(store()) for store in stores))
    finally:
        del pipeline.transformer.keys_and_values

    image = 2 * encoded.rows * encoded.columns
    rows = sum(branch.mask.shape[1] + image for branch in encoded.branches)
    assert set(sizes) == {pipeline.transformer.size_kept(rows)}
    assert stores
    assert all(store() is None for store in stores)
