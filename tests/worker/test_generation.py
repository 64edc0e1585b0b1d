"""Pictures made from words alone: the way through the model, and what it promises."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from step1x_edit.channel import EditJob, Painted, Phase, Progress, Start
from step1x_edit.checkpoints.read import write_demo
from step1x_edit.engine.engine import Engine
from step1x_edit.engine.worker_process import WorkerProcess
from step1x_edit.errors import InvalidParameterError
from step1x_edit.model.blocks import Layout
from step1x_edit.model.conditioner import Conditioner
from step1x_edit.model.config import DEMO, V1_0, V1_1, V1_2
from step1x_edit.model.flow import guide, schedule
from step1x_edit.model.latents import position_ids
from step1x_edit.model.pipeline import PLANS, Edited, EditPipeline, EditRun, Plan
from step1x_edit.model.request import NetworkRequest
from step1x_edit.worker.opening import STAND_IN
from step1x_edit.worker.process import load_worker
from tiny import tiny_pipeline

REQUEST = NetworkRequest(
    None, "a night scene", None, num_steps=3, guidance_scale=6.0, seed=7, width=64, height=48
)
JOB = EditJob(
    image=None,
    prompt="a night scene",
    negative_prompt=None,
    num_steps=3,
    guidance_scale=6.0,
    size_level=0,
    seed=7,
    width=64,
    height=48,
)


@pytest.fixture(scope="module")
def pipeline() -> EditPipeline:
    return tiny_pipeline()


def made(pipeline: EditPipeline, request: NetworkRequest) -> np.ndarray:
    *_, last = pipeline.edit(request)
    assert isinstance(last, Edited)
    return last.image


def test_a_picture_has_the_size_that_was_asked_for(pipeline: EditPipeline) -> None:
    assert made(pipeline, REQUEST).shape == (48, 64, 3)
    assert made(pipeline, dataclasses.replace(REQUEST, width=16)).shape == (48, 16, 3)


def test_every_choice_changes_the_picture(pipeline: EditPipeline) -> None:
    picture = made(pipeline, REQUEST)

    assert np.array_equal(made(pipeline, REQUEST), picture)
    changes: list[dict[str, Any]] = [
        {"prompt": "a red fox"},
        {"negative_prompt": "night"},
        {"seed": 8},
        {"guidance_scale": 3.0},
        {"num_steps": 4},
    ]
    for change in changes:
        other = made(pipeline, dataclasses.replace(REQUEST, **change))
        assert not np.array_equal(other, picture), change


def test_without_a_negative_prompt_it_is_the_published_one(pipeline: EditPipeline) -> None:
    own = pipeline.config.generation_negative_prompt
    named = made(pipeline, dataclasses.replace(REQUEST, negative_prompt=own))
    none = made(pipeline, dataclasses.replace(REQUEST, negative_prompt=""))

    assert np.array_equal(named, made(pipeline, REQUEST))
    assert not np.array_equal(none, named)


def test_the_network_sees_no_reference_and_the_conditioner_a_black_square(
    pipeline: EditPipeline,
) -> None:
    """Against the same steps taken with the network alone."""
    with torch.inference_mode():
        encoded = pipeline.encode(REQUEST)
        start = pipeline.start(encoded, REQUEST.seed)
        *_, last = pipeline.denoise(encoded, start, REQUEST)

        black = np.zeros((1024, 1024, 3), np.uint8)
        prompts = [REQUEST.prompt, str(pipeline.config.generation_negative_prompt)]
        assert isinstance(pipeline.conditioner, Conditioner)
        seen = pipeline.conditioner.see(black, pipeline.conditioner.config)
        embeds, mask = pipeline.conditioner.encode_many(prompts, seen)
        timesteps = schedule(3, 12)
        prologue = pipeline.transformer.prologue(embeds, mask, timesteps[:-1])
        text_length = embeds.shape[1]
        layout = Layout(pipeline.transformer.rope(position_ids(3, 4), text_length), text_length)
        latents = start.latents
        for k in range(3):
            t, t_next = timesteps[k], timesteps[k + 1]
            velocity = pipeline.transformer.core(latents.expand(2, -1, -1), prologue[k], layout)
            cond, uncond = velocity.chunk(2)
            guided = guide(cond, uncond, 6.0, float(t), pipeline.config.guidance_rule)
            latents = latents + (t_next - t) * guided

    assert torch.allclose(last.latents, latents, atol=1e-5)


@pytest.mark.parametrize("plan", [PLANS[-1], Plan(has_joint_branches=False)])
def test_a_plan_with_less_memory_makes_nearly_the_same(pipeline: EditPipeline, plan: Plan) -> None:
    *_, last = pipeline.advance(EditRun(REQUEST), plan)

    assert isinstance(last, Edited)
    assert np.abs(last.image.astype(int) - made(pipeline, REQUEST)).max() <= 1


def test_a_run_goes_on_from_where_it_failed(pipeline: EditPipeline) -> None:
    run = EditRun(dataclasses.replace(REQUEST, previews=1))
    events = pipeline.advance(run, PLANS[0])
    _, first = next(events), next(events)
    events.close()

    *rest, last = pipeline.advance(run, PLANS[0])

    assert first.preview is not None  # type: ignore[union-attr]
    assert first.preview.shape == (48, 64, 3)  # type: ignore[union-attr]
    assert [event.step for event in rest] == [2, 3, 0]  # type: ignore[union-attr]
    assert isinstance(last, Edited)
    assert np.array_equal(last.image, made(pipeline, REQUEST))


@pytest.mark.parametrize("size", [(60, 48), (64, 0), (-16, 16)])
def test_sizes_of_no_whole_tokens_are_refused(
    pipeline: EditPipeline, size: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        made(pipeline, dataclasses.replace(REQUEST, width=size[0], height=size[1]))


def test_only_v1_1_of_the_published_models_makes_pictures() -> None:
    assert V1_1.can_generate
    assert not V1_0.can_generate
    assert not V1_2.can_generate
    assert not DEMO.can_generate


# --- through the worker ---------------------------------------------------------------------------


def checkpoint(folder: Path, **changes: object) -> str:
    """A folder with the tiny model, whose config has these changes."""
    pipeline = tiny_pipeline()
    pipeline.config = dataclasses.replace(pipeline.config, **changes)  # type: ignore[arg-type]
    write_demo(folder / "checkpoint", pipeline)
    return str(folder / "checkpoint")


async def test_a_worker_process_makes_a_picture(tmp_path: Path, pipeline: EditPipeline) -> None:
    start = Start(model_path=checkpoint(tmp_path), device="cpu")
    engine = Engine(lambda on_end: WorkerProcess(start, on_end))
    try:
        edit = engine.submit(dataclasses.replace(JOB, previews=1))
        seen = [event async for event in edit.events()]
        outcome = (await edit.result()).painted
    finally:
        engine.close()

    assert np.array_equal(outcome.image, made(pipeline, REQUEST))
    assert [event.preview.shape for event in seen if event.preview is not None] == [(48, 64, 3)]


def test_parts_of_the_model_may_be_off_the_device(tmp_path: Path, pipeline: EditPipeline) -> None:
    worker = load_worker(Start(model_path=checkpoint(tmp_path), device=STAND_IN))
    *events, outcome = worker.edit(JOB, lambda: None)

    assert isinstance(outcome, Painted)
    assert np.array_equal(outcome.image, made(pipeline, REQUEST))
    assert Progress(Phase.DENOISING, 3, 3) in events


def test_a_model_that_only_edits_says_so_before_it_is_loaded(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, generation_negative_prompt=None)
    worker = load_worker(Start(model_path=path, device="cpu"))

    with pytest.raises(InvalidParameterError) as refused:
        list(worker.edit(JOB, lambda: None))

    told = "text to image needs Step1X-Edit v1.1; the model here is demo"
    assert str(refused.value) == f"Invalid parameter: {told}"
    assert worker.residence().location == "Unloaded"
