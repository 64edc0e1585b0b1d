"""Which steps run the transformer, and what the others do instead."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from step1x_edit.checkpoints.read import open_checkpoint
from step1x_edit.model.flow import DAMPED_ABOVE, extrapolate, schedule
from step1x_edit.model.pipeline import PLANS, Edited, EditPipeline, EditRun, Plan, Step
from step1x_edit.model.request import Mode, NetworkRequest
from step1x_edit.model.steps import (
    PUBLISHED,
    Action,
    Curve,
    Evaluations,
    Profile,
    StepPolicy,
    choose_steps,
    num_evaluated,
)
from tiny import EVEN, a_picture, final_picture, tiny_pipeline, tiny_pipeline_v1_2

TURBO = NetworkRequest(
    a_picture(), "make it night", num_steps=10, size_level=64, seed=7, mode="turbo"
)


@pytest.fixture(scope="module")
def pipeline() -> EditPipeline:
    pipeline = tiny_pipeline()
    pipeline.profile = EVEN
    return pipeline


def chosen(mode: Mode, num_steps: int, profile: Profile, tokens: int = 16) -> tuple[int, ...]:
    times = schedule(num_steps, tokens).tolist()
    return choose_steps(mode, times, tokens, profile).evaluated


@pytest.mark.parametrize("profile", [EVEN, PUBLISHED])
@pytest.mark.parametrize("mode", ["fast", "turbo"])
def test_a_mode_evaluates_its_share_of_any_number_of_steps(mode: Mode, profile: Profile) -> None:
    for num_steps in range(10, 51):
        evaluated = chosen(mode, num_steps, profile)

        assert len(evaluated) == num_evaluated(mode, num_steps)
        assert {0, num_steps - 1} <= set(evaluated)


def test_no_line_leads_over_the_step_in_which_the_rule_of_guidance_changes(
    pipeline: EditPipeline,
) -> None:
    request = dataclasses.replace(TURBO, mode="fast")
    with torch.inference_mode():
        encoded = pipeline.encode(request)
        states = list(pipeline.denoise(encoded, pipeline.start(encoded, 7), request))

    times = schedule(10, 12).tolist()
    jump = next(i for i, t in enumerate(times) if t <= DAMPED_ABOVE)
    assert states[jump - 1].known
    assert [t for t, _ in states[jump].known] == [times[jump]]


def test_an_exact_edit_evaluates_every_step_of_any_size() -> None:
    policy = choose_steps("exact", schedule(28, 9999).tolist(), 9999, None)

    assert policy == StepPolicy((Action.FULL,) * 28)


def test_steps_are_evaluated_most_where_the_velocity_changes_most() -> None:
    early = Profile((Curve(16, ((1.0, 9.0), (0.6, 9.0), (0.5, 1.0), (0.0, 1.0))),))
    late = Profile((Curve(16, ((1.0, 1.0), (0.5, 1.0), (0.4, 9.0), (0.0, 9.0))),))

    assert np.mean(chosen("turbo", 28, early)) < np.mean(chosen("turbo", 28, late)) - 4


def test_a_profile_survives_its_file() -> None:
    assert Profile.from_json(json.loads(json.dumps(EVEN.to_json()))) == EVEN


@pytest.mark.parametrize("data", [{}, {"curves": [{"tokens": 4}]}])
def test_a_profile_that_is_not_complete_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a profile"):
        Profile.from_json(data)


@pytest.mark.parametrize(
    "density",
    [[], [[0.1, 1], [0.9, 1]], [[0.5, 1], [0.5, 2]], [["nan", 1]], [[0.9, "inf"]], [[0.9, -1]]],
)
def test_a_density_that_is_none_is_refused(density: list[object]) -> None:
    with pytest.raises(ValueError, match="falling t"):
        Profile.from_json({"curves": [{"tokens": 4, "density": density}]})


def test_between_two_sizes_the_density_is_in_between() -> None:
    small, large = ((1.0, 1.0), (0.0, 9.0)), ((1.0, 9.0), (0.0, 1.0))
    profile = Profile((Curve(10, small), Curve(30, large)))

    assert profile.masses(20, [1.0, 0.5, 0.0]) == pytest.approx([2.5, 2.5])
    assert profile.masses(10, [1.0, 0.5, 0.0]) == pytest.approx([1.5, 3.5])


@pytest.mark.parametrize("tokens", [3, 65])
def test_a_size_that_was_not_measured_is_refused(tokens: int) -> None:
    with pytest.raises(ValueError, match="4 to 64"):
        chosen("turbo", 28, EVEN, tokens)


@pytest.mark.parametrize("side", [512, 768, 1024])
@pytest.mark.parametrize("shape", [(1, 1), (16, 9), (3, 1), (1, 10)])
def test_the_demo_was_measured_for_every_size_that_can_be_asked_for(
    side: int, shape: tuple[int, int]
) -> None:
    pipeline = open_checkpoint().checkpoint.pipeline
    image = np.zeros((shape[1] * 100, shape[0] * 100, 3), np.uint8)

    pipeline.check_mode(dataclasses.replace(TURBO, image=image, size_level=side))


def test_a_checkpoint_that_was_not_measured_makes_exact_edits_only() -> None:
    pipeline = tiny_pipeline()

    with pytest.raises(ValueError, match="mode turbo"):
        final_picture(pipeline, TURBO)
    final_picture(pipeline, dataclasses.replace(TURBO, mode="exact", num_steps=2))


def test_a_straight_line_is_continued() -> None:
    def line(t: float) -> torch.Tensor:
        return torch.tensor([3.0, -1.0]) + t * torch.tensor([2.0, 4.0])

    known = [(t, line(t)) for t in (0.9, 0.7, 0.4)]

    torch.testing.assert_close(extrapolate(known, 0.1), line(0.1))
    assert torch.equal(extrapolate(known[:1], 0.1), line(0.9))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
@pytest.mark.parametrize("mode", ["exact", "fast", "turbo"])
def test_the_transformer_runs_as_often_as_the_edit_reports(
    pipeline: EditPipeline, mode: Mode, guidance_scale: float, plan: Plan
) -> None:
    request = dataclasses.replace(TURBO, mode=mode, guidance_scale=guidance_scale)
    rows: list[int] = []
    hook = pipeline.transformer.img_in.register_forward_pre_hook(
        lambda _, inputs: rows.append(inputs[0].shape[0])
    )
    try:
        *_, edited = pipeline.advance(EditRun(request), plan)
    finally:
        hook.remove()

    prompts = 1 if guidance_scale == 1.0 else 2
    expected = {"exact": 10, "fast": 5, "turbo": 4}[mode] * prompts
    assert isinstance(edited, Edited)
    assert edited.evaluations == Evaluations(expected, 10 * prompts - expected)
    assert sum(rows) == expected


@pytest.mark.parametrize("mode", ["fast", "turbo"])
def test_the_loop_continues_from_any_state_with_the_same_bits(
    pipeline: EditPipeline, mode: Mode
) -> None:
    request = dataclasses.replace(TURBO, mode=mode)
    with torch.inference_mode():
        encoded = pipeline.encode(request)
        states = list(pipeline.denoise(encoded, pipeline.start(encoded, 7), request))
        for state in states[:-1]:
            *_, end = pipeline.denoise(encoded, state, request)
            assert torch.equal(end.latents, states[-1].latents)
            assert end.evaluations == states[-1].evaluations


def test_a_skipped_step_is_reported_with_its_preview(pipeline: EditPipeline) -> None:
    shown = dataclasses.replace(TURBO, previews=3)

    steps = [event for event in pipeline.edit(shown) if isinstance(event, Step)]

    done = [event for event in steps if event.phase == "denoising"]
    assert [event.step for event in done] == list(range(1, 11))
    assert {event.step for event in done if event.preview is not None} == set(shown.preview_steps)
    skipped = set(range(10)) - set(chosen("turbo", 10, EVEN, 12))
    assert {step - 1 for step in shown.preview_steps} & skipped


def test_v1_2_and_pictures_from_words_can_skip_steps(pipeline: EditPipeline) -> None:
    v1_2 = tiny_pipeline_v1_2()
    v1_2.profile = EVEN
    words = dataclasses.replace(TURBO, image=None, width=64, height=48)

    for maker, request in ((v1_2, TURBO), (pipeline, words)):
        exact = final_picture(maker, dataclasses.replace(request, mode="exact"))
        turbo = final_picture(maker, request)
        assert turbo.shape == exact.shape
        assert turbo.tobytes() != exact.tobytes()
