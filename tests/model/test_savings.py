"""What an edit does not do twice: the same result as without each saving, with less work."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from step1x_edit.checkpoints.read import read_checkpoint
from step1x_edit.model.denoising import Branch, Encoded, keep_one_pad
from step1x_edit.model.pipeline import PLANS, Edited, EditPipeline, Plan
from step1x_edit.model.request import NetworkRequest
from step1x_edit.model.rope import RecentTables
from step1x_edit.model.savings import ALL, NONE, Savings
from tiny import a_picture, tiny_pipeline, tiny_pipeline_v1_2

NAMES = tuple(field.name for field in dataclasses.fields(Savings))
ALONE = {name: replace(NONE, **{name: True}) for name in NAMES}
TOGETHER = {**ALONE, "all": ALL}

REQUEST = NetworkRequest(
    a_picture(), "make it night", "a", num_steps=3, guidance_scale=6.0, size_level=64, seed=7
)


@pytest.fixture(scope="module")
def pipeline() -> EditPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def wide() -> EditPipeline:
    """One whose transformer computes in float64, where rounding hides nothing."""
    pipeline = tiny_pipeline()
    pipeline.transformer.double()
    return pipeline


@pytest.fixture(autouse=True)
def all_again(pipeline: EditPipeline, wide: EditPipeline) -> Iterator[None]:
    yield
    pipeline.savings = wide.savings = ALL


def picture(pipeline: EditPipeline, request: NetworkRequest) -> np.ndarray:
    *_, edited = pipeline.edit(request)
    assert isinstance(edited, Edited)
    return edited.image


@torch.inference_mode()
def latents(
    pipeline: EditPipeline, encoded: Encoded, savings: Savings, plan: Plan = PLANS[0]
) -> Tensor:
    """Those at the end, as computed with these savings."""
    pipeline.savings = savings
    *_, end = pipeline.denoise(encoded, pipeline.start(encoded, 7), REQUEST, plan)
    return end.latents


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- the same result ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("plan", PLANS, ids=["joint", "apart"])
def test_a_saving_changes_no_number(wide: EditPipeline, name: str, plan: Plan) -> None:
    encoded = wide.encode(REQUEST)
    expected = latents(wide, encoded, NONE, plan)

    found = latents(wide, encoded, TOGETHER[name], plan)

    assert found.dtype == torch.float64
    assert relative(found, expected) <= 1e-12


@pytest.mark.parametrize("name", TOGETHER)
def test_a_saving_changes_no_number_of_v1_2(name: str) -> None:
    pipeline = tiny_pipeline_v1_2()
    pipeline.transformer.double()
    encoded = pipeline.encode(REQUEST)
    expected = latents(pipeline, encoded, NONE)

    assert relative(latents(pipeline, encoded, TOGETHER[name]), expected) <= 1e-12


@pytest.mark.parametrize("prompt", ["make it night", "“make” it night! " * 9], ids=["short", "cut"])
def test_prompts_read_together_are_as_if_read_alone(pipeline: EditPipeline, prompt: str) -> None:
    request = replace(REQUEST, prompt=prompt)
    together = pipeline.encode(request)
    pipeline.savings = NONE

    alone = pipeline.encode(request)

    assert len(alone.branches) == 2
    for one, other in zip(together.branches, alone.branches, strict=True):
        assert torch.equal(one.mask, other.mask)
        torch.testing.assert_close(one.embeds, other.embeds, atol=1e-5, rtol=0)


def test_an_edit_by_the_demo_is_the_same_picture() -> None:
    pipeline = read_checkpoint().pipeline
    request = NetworkRequest(
        a_picture(300, 200), "change to night scene", num_steps=3, size_level=192
    )
    found = picture(pipeline, request)
    pipeline.savings = NONE

    assert np.abs(found - picture(pipeline, request).astype(int)).max() <= 1


def test_the_same_seed_gives_the_same_bytes_whatever_was_edited_before(
    pipeline: EditPipeline,
) -> None:
    first = picture(pipeline, REQUEST)
    for size_level in (96, 64, 128):
        picture(pipeline, replace(REQUEST, size_level=size_level, prompt="another, longer prompt"))

    assert picture(pipeline, REQUEST).tobytes() == first.tobytes()


# --- less work ------------------------------------------------------------------------------------


class Work:
    """Counts, while it is entered, what the savings are about."""

    def __init__(self, pipeline: EditPipeline) -> None:
        self.pipeline = pipeline
        self.done = dict.fromkeys(NAMES, 0)
        self._stack = ExitStack()

    def __enter__(self) -> dict[str, int]:
        transformer, vlm = self.pipeline.transformer, self.pipeline.conditioner.vlm
        self._count("pad_rows", transformer.double_blocks[0].txt_attn)
        self._count("all_timesteps", transformer.time_in, calls=True)
        self._count("shared_prefix", vlm.language_model.norm)
        self._count("last_block", transformer.final_layer)
        rope = transformer.rope

        def counted(*arguments: Any, **named: Any) -> Tensor:
            self.done["rope_cache"] += 1
            return rope(*arguments, **named)

        transformer.rope = counted  # type: ignore[method-assign]  # to count its calls
        self._stack.callback(delattr, transformer, "rope")
        return self.done

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _count(self, name: str, module: nn.Module, *, calls: bool = False) -> None:
        """Count the rows that a network is given, or how often it is called."""

        def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.done[name] += 1 if calls else inputs[0].shape[:-1].numel()

        self._stack.callback(module.register_forward_pre_hook(count).remove)


def work_of_two_edits(pipeline: EditPipeline, savings: Savings) -> dict[str, int]:
    pipeline.savings = savings
    pipeline.forget_tables()
    with Work(pipeline) as done:
        for prompt in ("make it night", "make it day"):
            picture(pipeline, replace(REQUEST, prompt=prompt))
    return done


@pytest.mark.parametrize("name", NAMES)
def test_a_saving_spares_its_work_and_no_other(pipeline: EditPipeline, name: str) -> None:
    everything = work_of_two_edits(pipeline, NONE)

    done = work_of_two_edits(pipeline, ALONE[name])

    assert min(done.values()) > 0
    assert [each for each in NAMES if done[each] < everything[each]] == [name]


def test_both_prompts_are_read_in_one_pass(pipeline: EditPipeline) -> None:
    calls: Counter[str] = Counter()
    vlm = pipeline.conditioner.vlm
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
        for name, module in (("vision", vlm.visual.patch_embed), ("text", vlm.language_model.norm))
    ]
    try:
        pipeline.encode(REQUEST)
    finally:
        for hook in hooks:
            hook.remove()

    assert calls == {"vision": 1, "text": 1}


# --- padding --------------------------------------------------------------------------------------


def branch(length: int, valid: int, dtype: torch.dtype = torch.float32) -> Branch:
    mask = (torch.arange(length) < valid).to(dtype).unsqueeze(0)
    return Branch(torch.randn(1, length, 4, dtype=dtype) * mask.unsqueeze(-1), mask)


def test_prompts_are_cut_behind_the_first_padding_of_the_longest() -> None:
    kept = keep_one_pad([branch(40, 9), branch(40, 5)])

    assert [one.embeds.shape for one in kept] == [(1, 10, 4)] * 2
    assert [one.mask.sum() for one in kept] == [9, 5]
    assert [one.pad_copies for one in kept] == [30, 30]
    assert all((one.embeds[0, -1] == 0).all() for one in kept)


@pytest.mark.parametrize("valid", [39, 40])
def test_a_prompt_without_padding_to_spare_stays_as_it_is(valid: int) -> None:
    kept = keep_one_pad([branch(40, 9), branch(40, valid)])

    assert [one.embeds.shape[1] for one in kept] == [40, 40]
    assert [one.pad_copies for one in kept] == [0, 0]


def test_prompts_of_v1_2_are_as_long_as_they_are() -> None:
    kept = keep_one_pad([branch(30, 30), branch(20, 20)])

    assert [one.embeds.shape[1] for one in kept] == [30, 20]
    assert [one.pad_copies for one in kept] == [0, 0]


@pytest.mark.parametrize("valid", [352, 353, 354])
def test_rows_are_counted_exactly_in_bfloat16(valid: int) -> None:
    (kept,) = keep_one_pad([branch(640, valid, torch.bfloat16)])

    assert kept.embeds.shape[1] == valid + 1


def test_blocks_are_given_tables_of_the_same_strides_whatever_was_cut(
    pipeline: EditPipeline,
) -> None:
    """Compiled code would be compiled again for others."""
    tables: list[Tensor] = []
    hook = pipeline.transformer.double_blocks[0].register_forward_pre_hook(
        lambda _, inputs: tables.append(inputs[4].rope)
    )
    try:
        for savings in (ALL, NONE):
            pipeline.savings = savings
            picture(pipeline, replace(REQUEST, num_steps=1))
    finally:
        hook.remove()

    cut, whole = tables
    assert cut.shape[-3] < whole.shape[-3]
    assert all(table.stride() == torch.empty(table.shape).stride() for table in tables)


# --- tables ---------------------------------------------------------------------------------------


def test_only_the_latest_tables_are_kept() -> None:
    tables, made = RecentTables(most=2), list[str]()

    def get(key: str) -> Tensor:
        def make() -> Tensor:
            made.append(key)
            return torch.zeros(1)

        return tables.get(key, make)

    first = get("a")
    assert get("b") is not get("a")
    assert get("a") is first
    get("c")  # for which b, not asked for the longest, makes room
    assert get("a") is first
    get("b")
    tables.clear()
    get("a")
    assert made == ["a", "b", "c", "b", "a"]
