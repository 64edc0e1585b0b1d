"""The worker's model thinks, judges and tries again: a tiny v1.2, and replies that are written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fakes import canvas
from layouts import narrow_pipeline, write_diffusers
from step1x_edit.channel import EditJob, Painted, Phase, Progress, Start
from step1x_edit.checkpoints.memory_plan import STREAMABLE, HostPlan, with_share
from step1x_edit.checkpoints.read import (
    OpenedCheckpoint,
    open_checkpoint,
    read_checkpoint,
    write_demo,
)
from step1x_edit.engine.engine import Engine
from step1x_edit.engine.worker_process import WorkerProcess
from step1x_edit.errors import EditCancelledError, InvalidParameterError
from step1x_edit.model import reasoning
from step1x_edit.model.config import V1_2, V1_2_PREVIEW
from step1x_edit.model.language_model import Said, Sampling
from step1x_edit.model.pipeline import Edited
from step1x_edit.model.reasoning import GAVE_UP, Prompt
from step1x_edit.model.request import NetworkRequest, Pixels
from step1x_edit.model.steps import Evaluations
from step1x_edit.worker.edits import PipelineWorker
from step1x_edit.worker.opening import STAND_IN
from step1x_edit.worker.process import load_worker
from step1x_edit.worker.reasoning import Say, reasoned_edit
from step1x_edit.worker.residency import Residency
from tiny import a_picture, tiny_pipeline, tiny_pipeline_v1_2

FEW = Sampling(max_new_tokens=2)
JOB = EditJob(
    image=a_picture(),
    prompt='write "no" on it',
    negative_prompt="a scene",
    num_steps=2,
    guidance_scale=6.0,
    size_level=64,
    seed=3,
    reflection_rounds=3,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v1_2")
    write_demo(folder, tiny_pipeline_v1_2())
    return folder


def a_worker(folder: Path, share: float | None = None) -> PipelineWorker:
    """On the CPU, or on a device that keeps this share of the core."""
    opened = partial(open_checkpoint, folder)
    if share is None:
        return PipelineWorker(Residency(opened, None), "cpu", FEW)
    plan = partial(with_share, core_share=share)
    return PipelineWorker(Residency(opened, torch.device("cpu"), plan=plan), STAND_IN, FEW)


def go_on() -> None:
    """A check that never stops anything."""


def done(worker: PipelineWorker, **changes: object) -> tuple[list[Progress], Painted]:
    *told, outcome = worker.edit(dataclasses.replace(JOB, **changes), go_on)  # type: ignore[arg-type]
    assert isinstance(outcome, Painted)
    return [event for event in told if isinstance(event, Progress)], outcome


# --- a model that talks, at random ----------------------------------------------------------------


def test_thinking_writes_the_prompt_that_is_edited_with(folder: Path) -> None:
    worker = a_worker(folder)

    told, thought = done(worker, thinking=True)

    phases = list(dict.fromkeys(event.phase.value for event in told))
    assert phases == ["loading", "thinking", "encoding", "denoising", "decoding"]
    assert thought.rounds is None
    assert thought.reasoning is not None
    rewritten = thought.reasoning["prompt"]
    assert rewritten
    assert rewritten != JOB.prompt
    assert thought.reasoning["rounds"] == [{"prompt": rewritten, "from_round": 0}]
    assert thought.reasoning["best"] == 1
    _, plain = done(worker, prompt=rewritten)
    assert plain.reasoning is None
    assert np.array_equal(thought.image, plain.image)


def test_a_model_that_talks_nonsense_gives_up_and_tries_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reasoning, "MAX_TRIES", 1)

    told, outcome = done(a_worker(folder), reflection=True)

    assert outcome.reasoning is not None
    rounds = outcome.reasoning["rounds"]
    assert outcome.reasoning["prompt"] is None
    assert [each["verdict"] for each in rounds] == [GAVE_UP] * 3
    assert [(each["score"], each["value"]) for each in rounds] == [(None, 0.0)] * 3
    assert [each["edit_score"] for each in rounds] == [[0.0, 0.0]] * 3
    assert outcome.reasoning["best"] == 3
    assert outcome.rounds is not None
    assert outcome.rounds.shape == (3, *outcome.image.shape)
    assert np.array_equal(outcome.rounds[2], outcome.image)
    assert len({each.tobytes() for each in outcome.rounds}) == 3  # each begins with other noise
    assert sum(event.phase is Phase.ENCODING for event in told) == 3
    json.dumps(outcome.reasoning)  # it has to cross the border


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_thoughts_and_picture_are_the_same_whatever_share_is_resident(
    folder: Path, share: float
) -> None:
    _, expected = done(a_worker(folder), thinking=True)

    worker = a_worker(folder, share)
    _, outcome = done(worker, thinking=True)

    assert worker.residence().location == "GPU"
    assert outcome.reasoning == expected.reasoning
    assert np.array_equal(outcome.image, expected.image)


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_a_reply_keeps_the_conditioner_in_memory_in_place_of_the_core(
    folder: Path, device: torch.device | None
) -> None:
    _, expected = done(a_worker(folder), thinking=True)

    def on_disk(component: str) -> frozenset[str]:
        blocks = open_checkpoint(folder).blocks
        found = (block.name for block in blocks if block.component == component)
        return frozenset(filter(STREAMABLE.fullmatch, found))

    plan = HostPlan(on_disk=on_disk("conditioner"), on_disk_in_replies=on_disk("core"))

    def opened() -> OpenedCheckpoint:
        return dataclasses.replace(open_checkpoint(folder), host=plan)

    residency = Residency(opened, device, plan=partial(with_share, core_share=0.0))
    *events, outcome = PipelineWorker(residency, STAND_IN, FEW).edit(
        dataclasses.replace(JOB, thinking=True), go_on
    )

    assert isinstance(outcome, Painted)
    assert outcome.reasoning == expected.reasoning
    assert np.array_equal(outcome.image, expected.image)
    phases = [event.phase for event in events if isinstance(event, Progress)]
    swap = phases.index(Phase.ENCODING) - 1
    assert [phases[0], phases[swap]] == [Phase.LOADING, Phase.LOADING]  # each kept other blocks
    assert Phase.LOADING not in phases[1:swap]
    assert residency.is_ready(None, "edit")
    assert not residency.is_ready(None, "reply")


def test_the_same_seed_gives_the_same_thoughts(folder: Path) -> None:
    worker = a_worker(folder)

    thoughts = [done(worker, thinking=True, seed=seed)[1].reasoning for seed in (1, 1, 2)]

    assert thoughts[0] == thoughts[1]
    assert thoughts[0] != thoughts[2]


def test_a_cancel_is_heard_within_a_thought(folder: Path) -> None:
    worker = a_worker(folder)
    done(worker)  # it is loaded
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise EditCancelledError()

    events = worker.edit(dataclasses.replace(JOB, thinking=True), check)
    assert next(events) == Progress(Phase.THINKING)
    with pytest.raises(EditCancelledError):
        next(events)

    assert calls == 5
    done(worker)


def test_closing_the_iterator_within_a_thought_gives_the_model_back(folder: Path) -> None:
    worker = PipelineWorker(
        Residency(partial(open_checkpoint, folder), torch.device("cpu")), STAND_IN
    )
    events = worker.edit(dataclasses.replace(JOB, thinking=True), go_on)

    heard = next(event for event in events if isinstance(event, Progress) and event.step)
    events.close()

    assert heard == Progress(Phase.THINKING, 8, 128)
    worker.offload()  # would raise while the model is lent
    assert worker.residence().location == "CPU"


def test_memory_that_runs_out_in_a_thought_costs_one_retry(folder: Path) -> None:
    worker = a_worker(folder, 1.0)
    _, expected = done(worker, thinking=True)
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with worker._residency.on_device() as checkpoint:
        head = checkpoint.pipeline.conditioner.vlm.get_submodule("lm_head")
        head.register_forward_pre_hook(fail)

    _, outcome = done(worker, thinking=True)

    assert calls > 2
    assert outcome.reasoning == expected.reasoning


@pytest.mark.parametrize("asked", ["thinking", "reflection"])
def test_a_model_that_cannot_think_says_so_before_it_is_loaded(tmp_path: Path, asked: str) -> None:
    write_demo(tmp_path, tiny_pipeline())
    worker = load_worker(Start(model_path=str(tmp_path), device="cpu"))

    for location in ("Unloaded", "CPU"):
        with pytest.raises(InvalidParameterError) as raised:
            done(worker, **{asked: True})
        assert str(raised.value) == (
            f"Invalid parameter: {asked} needs Step1X-Edit v1.2; the model here is demo"
        )
        assert worker.residence().location == location
        done(worker)


def test_a_prompt_that_is_not_read_to_its_end_is_warned_about(folder: Path) -> None:
    _, outcome = done(a_worker(folder), prompt="make it night " * 100)

    assert outcome.warning is not None
    assert "this checkpoint reads at most 300 tokens" in outcome.warning


# --- replies that are written ---------------------------------------------------------------------

GOOD_SCORE = '{"meets_instruction": "yes", "raw_score": 9, "reason": "fits"}'


def scripted(
    verdicts: Sequence[str], marks: Sequence[int], score: str = GOOD_SCORE
) -> tuple[list[tuple[int, ...]], Say]:
    """Replies by the kind of question; keeps the shapes of the pictures that were shown."""
    asked: list[tuple[int, ...]] = []
    left, rated = list(verdicts), [mark for mark in marks for _ in range(2)]

    def say(images: Sequence[Pixels], prompt: Prompt) -> Generator[Said, None, str]:
        asked.extend(image.shape for image in images)
        for tokens in range(1, 18):
            yield Said(tokens, 128)
        if prompt.is_text_first:
            return score
        if "professional digital artist" in prompt.text:
            return json.dumps({"score": [rated.pop(0), 10], "reasoning": ""})
        if "<#Success>" in prompt.text:
            return left.pop(0)
        return "a red cat"

    return asked, say


def test_later_rounds_change_the_picture_in_the_size_of_the_input(folder: Path) -> None:
    pipeline = read_checkpoint(folder).pipeline
    made: list[NetworkRequest] = []

    def edit(request: NetworkRequest) -> Generator[Progress | Painted, None, None]:
        made.append(request)
        yield Progress(Phase.ENCODING)
        *_, edited = pipeline.edit(request)
        assert isinstance(edited, Edited)
        yield Painted(edited.image, warning=f"of round {len(made)}", evaluations=edited.evaluations)

    verdicts = [
        "<#Think> nearly <#Reflection>make it red",
        "<#Think> worse <#Failed>",
        "<#Think> good <#Success>",
    ]
    asked, say = scripted(verdicts, marks=[5, 8, 6])
    job = dataclasses.replace(JOB, reflection=True)
    config = V1_2.reasoning
    assert config is not None

    *told, outcome = reasoned_edit(job, config, edit, say)

    picture, images = canvas(job), [each.image for each in made if each.image is not None]
    assert [each.draw for each in made] == [0, 1, 2]
    assert [each.prompt for each in made] == [job.prompt, "make it red", job.prompt]
    assert [image.shape for image in images] == [picture.shape] * 3
    assert np.array_equal(images[2], picture)
    assert not np.array_equal(images[1], picture)
    assert set(asked) == {picture.shape}
    assert isinstance(outcome, Painted)
    assert outcome.reasoning is not None
    rounds = outcome.reasoning["rounds"]
    assert [each["from_round"] for each in rounds] == [0, 1, 0]
    assert [each["value"] for each in rounds] == [25.0, 64.0, 36.0]
    assert [each["score"] for each in rounds] == [9.0] * 3
    assert rounds[0]["description"] == "a red cat"
    assert rounds[0]["verdict"] == verdicts[0]
    assert outcome.reasoning["best"] == 2
    assert outcome.warning == "of round 2"
    assert outcome.evaluations == Evaluations(3 * 2 * job.num_steps)
    assert outcome.rounds is not None
    assert np.array_equal(outcome.image, outcome.rounds[1])
    assert outcome.image.shape == (48, 64, 3)
    thoughts = [event for event in told if event != Progress(Phase.ENCODING)]
    assert thoughts[:4] == [
        Progress(Phase.REFLECTING),
        Progress(Phase.REFLECTING, 8, 128),
        Progress(Phase.REFLECTING, 16, 128),
        Progress(Phase.REFLECTING, 8, 128),
    ]


def test_the_preview_rates_nothing_and_takes_its_last_picture(folder: Path) -> None:
    pictures = [np.full((48, 64, 3), 50 * k, np.uint8) for k in range(3)]

    def edit(request: NetworkRequest) -> Generator[Progress | Painted, None, None]:
        yield Painted(pictures[request.draw])

    _, say = scripted(["<#Think> bad <#Failed>"] * 3, marks=[])
    job = dataclasses.replace(JOB, reflection=True)
    config = V1_2_PREVIEW.reasoning
    assert config is not None

    *_, outcome = reasoned_edit(job, config, edit, say)

    assert isinstance(outcome, Painted)
    assert outcome.reasoning is not None
    assert np.array_equal(outcome.image, pictures[2])
    assert outcome.reasoning["best"] == 3
    assert [each["value"] for each in outcome.reasoning["rounds"]] == [None] * 3


def test_a_round_whose_reply_holds_no_score_is_scored_zero_and_judged() -> None:
    def edit(request: NetworkRequest) -> Generator[Progress | Painted, None, None]:
        yield Painted(a_picture())

    verdicts = ["<#Think> bad <#Failed>", "<#Think> good <#Success>"]
    _, say = scripted(verdicts, marks=[5, 8], score='{"reason": "cut short"}')
    job = dataclasses.replace(JOB, reflection=True)
    config = V1_2.reasoning
    assert config is not None

    *_, outcome = reasoned_edit(job, config, edit, say)

    assert isinstance(outcome, Painted)
    assert outcome.reasoning is not None
    rounds = outcome.reasoning["rounds"]
    assert [(each["score"], each["reason"]) for each in rounds] == [(0.0, "cut short")] * 2
    assert [each["verdict"] for each in rounds] == verdicts


@pytest.mark.parametrize("most", [1, 2])
def test_a_job_bounds_the_rounds(most: int) -> None:
    edits: list[NetworkRequest] = []

    def edit(request: NetworkRequest) -> Generator[Progress | Painted, None, None]:
        edits.append(request)
        yield Painted(a_picture())

    _, say = scripted(["<#Think> bad <#Failed>"] * 3, marks=[5, 8, 6])
    job = dataclasses.replace(JOB, reflection=True, reflection_rounds=most)
    config = V1_2.reasoning
    assert config is not None

    *_, outcome = reasoned_edit(job, config, edit, say)

    assert isinstance(outcome, Painted)
    assert outcome.reasoning is not None
    assert len(edits) == len(outcome.reasoning["rounds"]) == most


# --- in a separate process ------------------------------------------------------------------------


async def test_a_published_v1_2_edits_and_thinks_in_the_worker_process(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_diffusers(model, narrow_pipeline(1, 1, V1_2))
    engine = Engine(partial(WorkerProcess, Start(model_path=str(model), device="cpu")))
    small = dataclasses.replace(JOB, num_steps=1)
    try:
        plain = (await engine.submit(small).result()).painted
        thought = (await engine.submit(dataclasses.replace(small, thinking=True)).result()).painted
    finally:
        engine.close()

    assert thought.reasoning is not None
    assert thought.reasoning["prompt"]
    request = NetworkRequest(
        small.image, small.prompt, "a scene", num_steps=1, size_level=64, seed=3
    )
    *_, edited = read_checkpoint(model).pipeline.edit(request)
    assert isinstance(edited, Edited)
    assert np.array_equal(plain.image, edited.image)
