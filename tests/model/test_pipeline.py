"""The pipeline: its stages, its steps and what a seed promises."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from step1x_edit.model.flow import guide, schedule
from step1x_edit.model.latents import image_position_ids, unpack
from step1x_edit.model.pipeline import (
    PLANS,
    VAE_TILE,
    Edited,
    EditPipeline,
    EditRun,
    Plan,
    Step,
)
from step1x_edit.model.request import NetworkRequest
from tiny import a_picture, tiny_pipeline

REQUEST = NetworkRequest(
    a_picture(), "make it night", num_steps=3, guidance_scale=6.0, size_level=64, seed=7
)
SHOWN = dataclasses.replace(REQUEST, num_steps=6, previews=2)  # after the steps 2 and 4


@pytest.fixture(scope="module")
def pipeline() -> EditPipeline:
    return tiny_pipeline()


def picture(pipeline: EditPipeline, request: NetworkRequest) -> np.ndarray:
    *_, edited = pipeline.edit(request)
    assert isinstance(edited, Edited)
    return edited.image


def test_an_edit_reports_each_step_and_ends_with_the_picture(pipeline: EditPipeline) -> None:
    *progress, edited = pipeline.edit(REQUEST)

    assert progress == [
        Step("encoding", 0, 1),
        Step("denoising", 1, 3),
        Step("denoising", 2, 3),
        Step("denoising", 3, 3),
        Step("decoding", 0, 1),
    ]
    assert isinstance(edited, Edited)
    assert edited.image.dtype == np.uint8
    assert edited.image.shape == (48, 64, 3)  # 60 × 40 at about 64² pixels, in multiples of 16
    assert edited.label is None


def test_a_preview_is_the_picture_on_the_straight_line_ahead(pipeline: EditPipeline) -> None:
    _, *steps, _, _ = pipeline.edit(SHOWN)

    with torch.inference_mode():
        encoded = pipeline.encode(SHOWN)
        assert encoded.sketch is not None
        start = pipeline.start(encoded, SHOWN.seed)
        states = [start, *pipeline.denoise(encoded, start, SHOWN)]
        t = schedule(SHOWN.num_steps, encoded.rows * encoded.columns)
        for k in (1, 3):
            event = steps[k]
            assert isinstance(event, Step)
            assert event.preview is not None
            here, there = states[k].latents, states[k + 1].latents
            ahead = there - t[k + 1] * (there - here) / (t[k + 1] - t[k])
            latents = unpack(ahead, encoded.rows, encoded.columns)
            expected = (encoded.sketch(latents, 48, 64)[0].clamp(-1, 1) + 1) * 127.5
            assert np.abs(event.preview - expected.permute(1, 2, 0).numpy()).max() <= 1
    assert isinstance(steps[-1], Step)
    assert steps[-1].preview is None


def test_previews_do_not_change_the_picture(pipeline: EditPipeline) -> None:
    plain = dataclasses.replace(SHOWN, previews=0)

    assert picture(pipeline, SHOWN).tobytes() == picture(pipeline, plain).tobytes()


def test_no_preview_runs_the_decoder(pipeline: EditPipeline) -> None:
    with counted(pipeline.vae.decoder) as decoded, counted(pipeline.vae.encoder) as encoded:
        for _ in range(2):
            previews = [
                event.preview is not None
                for event in pipeline.edit(SHOWN)
                if isinstance(event, Step) and event.phase == "denoising"
            ]

    assert previews == [False, True, False, True, False, False]
    assert len(decoded) == 2
    assert 2 <= len(encoded) <= 3  # and the chart, if no edit had previews before


def test_an_edit_without_previews_prepares_none(pipeline: EditPipeline) -> None:
    assert pipeline.encode(REQUEST).sketch is None


@pytest.mark.parametrize("second", PLANS)
def test_a_preview_that_fails_is_made_again_and_no_step_with_it(
    pipeline: EditPipeline, second: Plan
) -> None:
    shown = dataclasses.replace(REQUEST, num_steps=4, previews=1)
    _, _, expected, *_ = pipeline.edit(shown)
    assert isinstance(expected, Step)
    assert expected.preview is not None
    with torch.inference_mode():
        encoded = pipeline.encode(shown)
    assert encoded.sketch is not None
    # Weights that fit no latents, as if memory ran out between the step and its preview.
    unfit = dataclasses.replace(encoded.sketch, weight=torch.zeros(192, 1, 3, 3))
    run = EditRun(shown, dataclasses.replace(encoded, sketch=unfit))
    with pytest.raises(RuntimeError, match="channels"):
        advance(pipeline, run, PLANS[0])
    run.encoded = encoded

    progress, image = advance(pipeline, run, second)

    assert progress == [
        Step("denoising", 2, 4),
        Step("denoising", 3, 4),
        Step("denoising", 4, 4),
        Step("decoding", 0, 1),
    ]
    assert progress[0].preview is not None
    assert np.abs(progress[0].preview - expected.preview.astype(int)).max() <= 1
    assert np.abs(image - picture(pipeline, shown).astype(int)).max() <= 1


def test_closing_the_generator_stops_the_work(pipeline: EditPipeline) -> None:
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    hook = pipeline.transformer.img_in.register_forward_hook(count)
    try:
        events = pipeline.edit(REQUEST)
        while next(events) != Step("denoising", 1, 3):
            pass
        events.close()
    finally:
        hook.remove()

    assert steps == 1


def test_the_callers_own_code_does_not_run_in_inference_mode(pipeline: EditPipeline) -> None:
    for _ in pipeline.edit(REQUEST):
        assert not torch.is_inference_mode_enabled()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(pipeline: EditPipeline) -> None:
    first = picture(pipeline, REQUEST)

    assert picture(pipeline, REQUEST).tobytes() == first.tobytes()
    assert picture(pipeline, dataclasses.replace(REQUEST, seed=8)).tobytes() != first.tobytes()


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_both_prompts_matter_under_guidance(pipeline: EditPipeline, field: str) -> None:
    change: dict[str, Any] = {field: "a scene"}
    other = dataclasses.replace(REQUEST, **change)

    assert picture(pipeline, other).tobytes() != picture(pipeline, REQUEST).tobytes()


def test_without_guidance_the_negative_prompt_does_not_matter(pipeline: EditPipeline) -> None:
    plain = dataclasses.replace(REQUEST, guidance_scale=1.0)
    other = dataclasses.replace(plain, negative_prompt="a scene")

    assert picture(pipeline, plain).tobytes() == picture(pipeline, other).tobytes()


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
def test_the_loop_agrees_with_one_written_from_the_training_forward(
    pipeline: EditPipeline, guidance_scale: float
) -> None:
    request = dataclasses.replace(REQUEST, guidance_scale=guidance_scale)
    config = pipeline.config
    with torch.inference_mode():
        encoded = pipeline.encode(request)
        start = pipeline.start(encoded, request.seed)
        *_, end = pipeline.denoise(encoded, start, request)

        ids = image_position_ids(encoded.rows, encoded.columns, config.reference_offset)
        number = encoded.rows * encoded.columns
        times = schedule(request.num_steps, number)

        def velocity(branch: int) -> torch.Tensor:
            predicted = pipeline.transformer(
                torch.cat([latents, encoded.reference], dim=1),
                ids,
                encoded.branches[branch].embeds,
                encoded.branches[branch].mask,
                t.view(1),
            )
            return predicted[:, :number]

        latents = start.latents
        for t, t_next in itertools.pairwise(times):
            v = velocity(0)
            if guidance_scale != 1.0:
                v = guide(v, velocity(1), guidance_scale, float(t), config.guidance_rule)
            latents = latents + (t_next - t) * v

    assert encoded.reference.abs().max() > 0
    torch.testing.assert_close(end.latents, latents, atol=2e-5, rtol=0)


def test_the_loop_goes_on_from_any_step(pipeline: EditPipeline) -> None:
    with torch.inference_mode():
        encoded = pipeline.encode(REQUEST)
        first, _, last = pipeline.denoise(encoded, pipeline.start(encoded, 7), REQUEST)
        *_, resumed = pipeline.denoise(encoded, first, REQUEST)

    assert resumed.step == 3
    assert torch.equal(resumed.latents, last.latents)


class BrokenError(Exception):
    """What a network that fails raises."""


@contextmanager
def broken(module: torch.nn.Module, after: int) -> Iterator[None]:
    """Let a network fail once, after this many calls."""
    calls = itertools.count()

    def fail(*_: object) -> None:
        if next(calls) == after:
            raise BrokenError

    hook = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def counted(module: torch.nn.Module) -> Iterator[list[object]]:
    """The calls of a network."""
    calls: list[object] = []
    hook = module.register_forward_pre_hook(lambda *call: calls.append(call))
    try:
        yield calls
    finally:
        hook.remove()


def advance(pipeline: EditPipeline, run: EditRun, plan: Plan) -> tuple[list[Step], np.ndarray]:
    *progress, edited = pipeline.advance(run, plan)
    assert isinstance(edited, Edited)
    steps = [event for event in progress if isinstance(event, Step)]
    assert steps == progress
    return steps, edited.image


@pytest.mark.parametrize("edit", [REQUEST, dataclasses.replace(REQUEST, guidance_scale=1.0)])
def test_every_plan_gives_the_same_picture(pipeline: EditPipeline, edit: NetworkRequest) -> None:
    runs = [EditRun(edit) for _ in PLANS]

    pictures = [
        advance(pipeline, run, plan)[1].astype(int) for run, plan in zip(runs, PLANS, strict=True)
    ]

    for run, image in zip(runs, pictures, strict=True):
        assert run.state is not None
        assert runs[0].state is not None
        torch.testing.assert_close(run.state.latents, runs[0].state.latents, atol=1e-5, rtol=0)
        assert np.abs(image - pictures[0]).max() <= 1


@pytest.mark.parametrize("second", PLANS)
@pytest.mark.parametrize(
    ("part", "after", "steps_done"),
    [
        ("vae.encoder", 0, 0),
        ("transformer.img_in", 0, 0),
        ("transformer.img_in", 1, 1),
        ("transformer.img_in", 2, 2),
        ("vae.decoder", 0, 3),
    ],
)
def test_an_edit_goes_on_after_a_failure_under_any_plan(
    pipeline: EditPipeline, part: str, after: int, steps_done: int, second: Plan
) -> None:
    expected = picture(pipeline, REQUEST).astype(int)
    name, _, rest = part.partition(".")
    run = EditRun(REQUEST)
    with broken(getattr(pipeline, name).get_submodule(rest), after), pytest.raises(BrokenError):
        advance(pipeline, run, PLANS[0])

    progress, image = advance(pipeline, run, second)

    encoding = [Step("encoding", 0, 1)] if part == "vae.encoder" else []
    steps = [Step("denoising", step, 3) for step in range(steps_done + 1, 4)]
    assert progress == [*encoding, *steps, Step("decoding", 0, 1)]
    assert np.abs(image - expected).max() <= (0 if second is PLANS[0] else 1)


def test_the_cheap_plan_runs_the_branches_one_after_the_other(pipeline: EditPipeline) -> None:
    batches: list[int] = []
    hook = pipeline.transformer.img_in.register_forward_pre_hook(
        lambda _, inputs: batches.append(inputs[0].shape[0])
    )
    try:
        advance(pipeline, EditRun(REQUEST), PLANS[0])
        advance(pipeline, EditRun(REQUEST), PLANS[-1])
    finally:
        hook.remove()

    assert batches == [2] * 3 + [1] * 6


def test_the_cheap_plan_shows_the_autoencoder_tiles_and_leaves_it_as_it_was(
    pipeline: EditPipeline,
) -> None:
    vae = pipeline.vae
    assert vae.tile is None
    sides: list[int] = []
    hook = vae.encoder.register_forward_pre_hook(lambda _, inputs: sides.extend(inputs[0].shape))
    wide = dataclasses.replace(REQUEST, image=a_picture(700, 200), num_steps=1, size_level=450)
    try:
        _, image = advance(pipeline, EditRun(wide), PLANS[-1])
        with broken(vae.decoder, 1), pytest.raises(BrokenError):
            advance(pipeline, EditRun(wide), PLANS[-1])
    finally:
        hook.remove()

    assert image.shape[1] > VAE_TILE
    assert max(sides) == VAE_TILE
    assert vae.tile is None


def test_the_loop_can_compute_in_bfloat16() -> None:
    pipeline = tiny_pipeline()
    exact = picture(pipeline, REQUEST).astype(int)

    pipeline.transformer.bfloat16()

    assert np.abs(picture(pipeline, REQUEST) - exact).mean() < 8


def test_numbers_that_are_not_finite_are_an_error() -> None:
    pipeline = tiny_pipeline()
    pipeline.transformer.img_in.bias[0] = torch.nan

    with pytest.raises(FloatingPointError):
        picture(pipeline, REQUEST)


def test_pixels_that_are_not_finite_are_an_error() -> None:
    pipeline = tiny_pipeline()
    bias = pipeline.vae.decoder.conv_out.bias
    assert bias is not None
    bias[0] = torch.nan

    with pytest.raises(FloatingPointError):
        picture(pipeline, REQUEST)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"image": a_picture(900, 2)}, "too narrow"), ({"num_steps": 0}, "num_steps")],
)
def test_a_request_that_cannot_be_met_is_refused(
    pipeline: EditPipeline, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        picture(pipeline, dataclasses.replace(REQUEST, **changes))


def test_a_recogniser_names_the_edit() -> None:
    pipeline = tiny_pipeline(labels=("night", "unknown"))
    assert pipeline.recogniser is not None
    pipeline.recogniser.weight.zero_()
    pipeline.recogniser.bias.copy_(torch.tensor([0.0, 1.0]))

    *_, edited = pipeline.edit(REQUEST)

    assert isinstance(edited, Edited)
    assert edited.label == "unknown"
    assert pipeline.recognise("make it night", a_picture()) == "unknown"


def test_only_a_checkpoint_with_a_recogniser_recognises(pipeline: EditPipeline) -> None:
    assert pipeline.recognise("make it night", a_picture()) is None


def test_the_transformer_sees_the_picture(pipeline: EditPipeline) -> None:
    other = dataclasses.replace(REQUEST, image=255 - a_picture())

    assert picture(pipeline, other).tobytes() != picture(pipeline, REQUEST).tobytes()
