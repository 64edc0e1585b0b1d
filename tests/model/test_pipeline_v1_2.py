"""The pipeline of v1.2: prompts that differ in length, letters to draw, a picture never rounded."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from step1x_edit.model.conditioner_v1_2 import ConditionerV12
from step1x_edit.model.config import GuidanceRule, ReferenceResize
from step1x_edit.model.flow import guide, schedule
from step1x_edit.model.latents import image_position_ids, pack
from step1x_edit.model.pipeline import PLANS, Edited, EditPipeline, EditRun, Plan
from step1x_edit.model.request import NetworkRequest
from step1x_edit.model.transformer import QuotedText
from tiny import a_picture, tiny_pipeline_v1_2

REQUEST = NetworkRequest(
    a_picture(),
    'write "no" on it',
    negative_prompt="a scene",
    num_steps=3,
    guidance_scale=6.0,
    size_level=64,
    seed=7,
)


@pytest.fixture(scope="module")
def pipeline() -> EditPipeline:
    return tiny_pipeline_v1_2()


def picture(pipeline: EditPipeline, request: NetworkRequest, plan: Plan = PLANS[0]) -> np.ndarray:
    *_, edited = pipeline.advance(EditRun(request), plan)
    assert isinstance(edited, Edited)
    return edited.image


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
def test_the_loop_agrees_with_one_written_from_the_training_forward(
    pipeline: EditPipeline, guidance_scale: float
) -> None:
    request = dataclasses.replace(REQUEST, guidance_scale=guidance_scale)
    config, conditioner = pipeline.config, pipeline.conditioner
    assert isinstance(conditioner, ConditionerV12)
    with torch.inference_mode():
        encoded = pipeline.encode(request)
        start = pipeline.start(encoded, request.seed)
        *_, end = pipeline.denoise(encoded, start, request)

        ids = image_position_ids(encoded.rows, encoded.columns, (1.0, 0.0, 0.0))
        number = encoded.rows * encoded.columns
        assert request.image is not None
        assert request.negative_prompt is not None
        resized = Image.fromarray(request.image).resize((64, 48), Image.Resampling.LANCZOS)
        seen = conditioner.see(np.asarray(resized), conditioner.config)
        prompts = (request.prompt, request.negative_prompt)
        encodings = [conditioner.encode(prompt, seen) for prompt in prompts]

        def velocity(branch: int) -> torch.Tensor:
            embeds, token_embeds, text_mask, position_ids = encodings[branch]
            predicted = pipeline.transformer(
                torch.cat([latents, encoded.reference], dim=1),
                ids,
                embeds[None],
                torch.ones(1, len(embeds)),
                t.view(1),
                txt_ids=position_ids,
                quoted=QuotedText(token_embeds[None], text_mask[None]),
            )
            return predicted[:, :number]

        latents = start.latents
        for t, t_next in itertools.pairwise(schedule(request.num_steps, number)):
            v = velocity(0)
            if guidance_scale != 1.0:
                v = guide(v, velocity(1), guidance_scale, float(t), GuidanceRule.ALWAYS)
            latents = latents + (t_next - t) * v

    assert config.guidance_rule is GuidanceRule.ALWAYS
    assert len(encodings[0].prompt_embeds) != len(encodings[1].prompt_embeds)
    torch.testing.assert_close(end.latents, latents, atol=2e-5, rtol=0)


def test_the_autoencoder_sees_the_picture_resampled_without_rounding(
    pipeline: EditPipeline,
) -> None:
    with torch.inference_mode():
        encoded = pipeline.encode(REQUEST)
        pixels = torch.from_numpy(REQUEST.image).permute(2, 0, 1)[None].float() / 127.5 - 1
        resized = F.interpolate(pixels, (48, 64), mode="bilinear", antialias=True)
        z = pipeline.vae.encode(resized)
        lanczos = dataclasses.replace(pipeline.config, reference_resize=ReferenceResize.LANCZOS)
        other = tiny_pipeline_v1_2()
        other.config = lanczos
        of_v1 = other.encode(REQUEST)

    expected = pack((z - pipeline.config.latent_shift) * pipeline.config.latent_scale)
    torch.testing.assert_close(encoded.reference, expected)
    assert not torch.allclose(of_v1.reference, expected, atol=1e-3)


def test_only_letters_between_quotes_are_to_be_drawn(pipeline: EditPipeline) -> None:
    other = tiny_pipeline_v1_2()
    other.transformer.text_token_mapping.weight.mul_(3)
    plain = dataclasses.replace(REQUEST, prompt="write no on it")

    assert np.array_equal(picture(pipeline, plain), picture(other, plain))
    assert not np.array_equal(picture(pipeline, REQUEST), picture(other, REQUEST))


@pytest.mark.parametrize("plan", PLANS)
def test_the_prompts_run_one_after_the_other_whatever_the_plan(
    pipeline: EditPipeline, plan: Plan
) -> None:
    batches: list[int] = []
    hook = pipeline.transformer.img_in.register_forward_pre_hook(
        lambda _, inputs: batches.append(inputs[0].shape[0])
    )
    try:
        image = picture(pipeline, REQUEST, plan)
    finally:
        hook.remove()

    assert batches == [1] * 6
    assert np.array_equal(image, picture(pipeline, REQUEST))


def test_another_draw_of_the_same_seed_is_another_noise(pipeline: EditPipeline) -> None:
    with torch.inference_mode():
        encoded = pipeline.encode(REQUEST)
    generator = torch.Generator().manual_seed(7)
    drawn = [pack(torch.randn((1, 16, 6, 8), generator=generator)) for _ in range(3)]

    for draw, noise in enumerate(drawn):
        assert torch.equal(pipeline.start(encoded, 7, draw).latents, noise)
    second = dataclasses.replace(REQUEST, draw=1)
    assert not np.array_equal(picture(pipeline, second), picture(pipeline, REQUEST))
