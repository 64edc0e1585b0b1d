"""Edits of a picture that was edited before: less work, and not one bit of difference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from extent import by_extent
from step1x_edit.checkpoints.read import read_checkpoint
from step1x_edit.model.kept import Kept, size_of
from step1x_edit.model.pipeline import PLANS, EditPipeline, Step
from step1x_edit.model.request import NetworkRequest
from tiny import a_picture, final_picture, tiny_pipeline, tiny_pipeline_v1_2

MUCH = 2**24
FIRST = NetworkRequest(
    a_picture(), "make it night", "a", num_steps=3, guidance_scale=6.0, size_level=64, seed=7
)
WORDS = replace(FIRST, image=None, width=64, height=48)
EVERYTHING = {"latents": 1, "vision": 1, "words": 1, "prologue": 1}
MODELS: dict[str, Callable[[], EditPipeline]] = {
    "v1.1": tiny_pipeline,
    "v1.2": tiny_pipeline_v1_2,
}


@contextmanager
def work(pipeline: EditPipeline) -> Iterator[Counter[str]]:
    """Count what is computed before the first step."""
    vlm, done = pipeline.conditioner.vlm, Counter[str]()
    parts = {
        "latents": pipeline.vae.encoder,
        "vision": vlm.visual.patch_embed,
        "words": vlm.language_model.norm,
        "prologue": pipeline.transformer.time_in,
    }
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: done.update([name]))
        for name, module in parts.items()
    ]
    try:
        yield done
    finally:
        for hook in hooks:
            hook.remove()


def keeping(model: str, most: int = MUCH) -> EditPipeline:
    pipeline = MODELS[model]()
    pipeline.keep(most)
    return pipeline


def previews(pipeline: EditPipeline, request: NetworkRequest) -> list[bytes]:
    events = [event for event in pipeline.edit(request) if isinstance(event, Step)]
    return [event.preview.tobytes() for event in events if event.preview is not None]


def one_pixel_changed(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    changed = image.copy()
    changed[20, 30, 1] ^= 1
    return changed


SPARED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "a retry": ({}, {"latents", "vision", "words", "prologue"}),
    "another seed": ({"seed": 8}, {"latents", "vision", "words", "prologue"}),
    "another draw": ({"draw": 1}, {"latents", "vision", "words", "prologue"}),
    "more steps": ({"num_steps": 4}, {"latents", "vision", "words"}),
    "another prompt": ({"prompt": "make it day"}, {"latents", "vision"}),
    "another size": ({"size_level": 96}, set()),
    "another pixel": ({"image": one_pixel_changed(a_picture())}, set()),
    "another shape": ({"image": a_picture().reshape(60, 40, 3)}, set()),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", SPARED)
def test_a_later_edit_does_what_has_changed_and_gives_the_same_bytes(model: str, name: str) -> None:
    changes, spared = SPARED[name]
    second = replace(FIRST, **changes)
    pipeline = keeping(model)
    final_picture(pipeline, FIRST)

    with work(pipeline) as done:
        image = final_picture(pipeline, second)

    assert EVERYTHING.keys() - done.keys() == spared
    assert image.tobytes() == final_picture(MODELS[model](), second).tobytes()


def test_pictures_take_turns_and_each_gets_its_own_result() -> None:
    """Also if there is only room for some of what one needs."""
    requests = [
        replace(FIRST, image=image, prompt=prompt)
        for image in (a_picture(), one_pixel_changed(a_picture()), 255 - a_picture())
        for prompt in ("make it night", "make it day")
    ] * 2
    requests = [replace(request, num_steps=1) for request in requests]
    plain = tiny_pipeline()
    expected = [final_picture(plain, request).tobytes() for request in requests[:6]] * 2
    assert len(set(expected)) == 6

    for most in by_extent((MUCH, 20_000), (MUCH, 200_000, 20_000)):
        pipeline = keeping("v1.1", most)
        assert [final_picture(pipeline, each).tobytes() for each in requests] == expected


def test_an_edit_by_the_demo_is_the_same_bytes() -> None:
    plain, pipeline = read_checkpoint().pipeline, read_checkpoint().pipeline
    pipeline.keep(MUCH)
    request = replace(FIRST, image=a_picture(300, 200), size_level=128, num_steps=1)

    for prompt in ("change to night scene", "mosaic", "change to night scene"):
        asked = replace(request, prompt=prompt)
        assert final_picture(pipeline, asked).tobytes() == final_picture(plain, asked).tobytes()


def test_a_prompt_of_v1_2_is_read_once_whatever_else_is_asked() -> None:
    """Those of v1.1 are read together: alone, the last bits of their states would differ."""
    pipeline = keeping("v1.2")
    with work(pipeline) as first:
        final_picture(pipeline, FIRST)

    with work(pipeline) as second:
        final_picture(pipeline, replace(FIRST, prompt="make it day"))

    assert (first["words"], first["prologue"]) == (2, 2)
    assert (second["words"], second["prologue"]) == (1, 1)


def test_words_alone_are_read_once() -> None:
    pipeline = keeping("v1.1")
    first = final_picture(pipeline, WORDS)

    with work(pipeline) as done:
        again = final_picture(pipeline, WORDS)
        final_picture(pipeline, replace(WORDS, seed=8, width=48))

    assert again.tobytes() == first.tobytes() == final_picture(tiny_pipeline(), WORDS).tobytes()
    assert done == {"prologue": 1}  # there are fewer tokens, so the schedule is another one


def test_previews_are_prepared_once() -> None:
    shown = replace(FIRST, num_steps=6, previews=2)
    pipeline, plain = keeping("v1.1"), tiny_pipeline()
    final_picture(pipeline, replace(FIRST, num_steps=1))  # without, so it leaves only latents

    expected = previews(plain, shown)
    found = [previews(pipeline, shown) for _ in range(2)]

    assert len(expected) == 2
    assert found == [expected, expected]


@torch.inference_mode()
def test_latents_from_tiles_are_not_taken_for_those_of_the_whole_picture() -> None:
    wide = replace(FIRST, image=a_picture(700, 200), size_level=450)
    pipeline, plain = keeping("v1.1"), tiny_pipeline()
    assert not torch.equal(*(plain.encode(wide, plan).reference for plan in PLANS))

    for plan in (*PLANS, *PLANS):
        assert torch.equal(
            pipeline.encode(wide, plan).reference, plain.encode(wide, plan).reference
        )


def test_what_is_forgotten_is_computed_again() -> None:
    pipeline = keeping("v1.1")
    assert not pipeline.forget()
    final_picture(pipeline, FIRST)

    assert pipeline.forget()
    assert not pipeline.forget()

    with work(pipeline) as done:
        final_picture(pipeline, FIRST)
    assert done == EVERYTHING


def test_nothing_is_kept_unless_a_pipeline_is_told_to() -> None:
    pipeline = tiny_pipeline()
    final_picture(pipeline, FIRST)

    with work(pipeline) as done:
        final_picture(pipeline, FIRST)

    assert done == EVERYTHING
    assert not pipeline.forget()


# --- bytes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A value with tensors in it."""

    tensors: tuple[Tensor, list[Tensor | None]]
    name: str = ""


def test_the_least_recently_used_goes_first() -> None:
    kept, made = Kept(most=32), list[str]()

    def get(key: str, size: int = 16) -> None:
        def make() -> Tensor:
            made.append(key)
            return torch.zeros(size, dtype=torch.uint8)

        kept.get(key, make)

    for key in "abacba":
        get(key)
    get("large", 33)  # more than all room: nothing makes room for it
    get("a")
    get("large", 33)
    get("tiny", 1)
    get("b")

    assert "".join(made[:4]) == "abcb"
    assert made[4:] == ["a", "large", "large", "tiny", "b"]


def test_memory_is_counted_once_and_as_a_whole() -> None:
    whole = torch.zeros(100, dtype=torch.float32)
    value = Pair((whole[:10], [whole[50:], None, torch.zeros(3, dtype=torch.uint8)]))

    assert size_of(value) == 400 + 3
