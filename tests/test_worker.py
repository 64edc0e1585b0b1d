"""The worker with a whole pipeline at toy size: its words, its warning, its checkpoint."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from step1x_edit.checkpoints.read import Checkpoint, write_demo
from step1x_edit.engine import Engine
from step1x_edit.errors import CheckpointError, EditCancelledError
from step1x_edit.worker import EditJob, Memory, Outcome, PipelineWorker, Progress, load_worker
from tiny import a_picture, tiny_pipeline


def job(prompt: str = "make it a night scene") -> EditJob:
    return EditJob(
        image=a_picture(),
        prompt=prompt,
        negative_prompt="",
        num_steps=2,
        guidance_scale=6.0,
        size_level=64,
        seed=3,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_demo(tmp_path / "checkpoint", tiny_pipeline())
    return tmp_path / "checkpoint"


def outcome_of(worker: PipelineWorker, wanted: EditJob) -> Outcome:
    *_, last = worker.edit(wanted)
    assert isinstance(last, Outcome)
    return last


def test_a_checkpoint_becomes_a_worker_that_speaks_the_engines_words(folder: Path) -> None:
    worker = load_worker(folder, device="cpu")

    events = list(worker.edit(job()))

    texts = [event.text for event in events if isinstance(event, Progress)]
    assert texts == ["encoding", "denoising 1/2", "denoising 2/2", "decoding"]
    assert isinstance(events[-1], Outcome)
    assert events[-1].image.dtype == np.uint8
    assert events[-1].model == worker.info
    assert (worker.info.name, worker.info.device, worker.info.location) == ("demo", "cpu", "CPU")
    assert worker.memory() == Memory(0.0, 0.0)


def test_the_same_job_gives_the_same_picture(folder: Path) -> None:
    pictures = [
        outcome_of(PipelineWorker(Checkpoint("demo", "demo", tiny_pipeline()), "cpu"), job()).image
        for _ in range(2)
    ]

    assert np.array_equal(*pictures)


@pytest.mark.parametrize(
    ("labels", "is_warned"), [(("unknown",), True), (("bw",), False), (("identity",), False)]
)
def test_only_wording_that_the_recogniser_does_not_know_is_warned_about(
    labels: tuple[str, ...], is_warned: bool
) -> None:
    worker = PipelineWorker(Checkpoint("demo", "demo", tiny_pipeline(labels)), "cpu")

    warning = outcome_of(worker, job()).warning

    assert (warning is not None) == is_warned


def test_the_warning_names_what_is_known_in_plain_words() -> None:
    pipeline = tiny_pipeline(("unknown", "identity", "bw", "sepia", "red"))
    assert pipeline.recogniser is not None
    pipeline.recogniser.bias.data[0] = 1e6
    worker = PipelineWorker(Checkpoint("demo", "demo", pipeline), "cpu")

    warning = outcome_of(worker, job("add a red hat")).warning

    assert warning is not None
    assert "the demo checkpoint does not know this edit" in warning
    assert "will have left the picture nearly as it was" in warning  # it is not measured
    assert "it knows: black and white, sepia, red tint. " in warning
    assert "MODEL_PATH" in warning


def test_a_checkpoint_of_another_version_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"MODEL_VERSION is v1\.1, but the checkpoint is"):
        load_worker(folder, model_version="v1.1", device="cpu")


async def test_a_cancelled_edit_closes_the_network_and_the_next_one_runs(folder: Path) -> None:
    engine = Engine(lambda: load_worker(folder, device="cpu"))
    endless = EditJob(**{**vars(job()), "num_steps": 10_000})
    edit = engine.submit(endless)
    async for event in edit.events():
        if event.text.startswith("denoising"):
            edit.cancel()

    with pytest.raises(EditCancelledError):
        await edit.result()
    outcome = await engine.submit(job()).result()
    await asyncio.to_thread(engine.close)

    assert outcome.image.ndim == 3


def test_memory_is_that_of_the_models_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    monkeypatch.setattr("torch.cuda.memory_allocated", {"cuda:1": gib}.get)
    monkeypatch.setattr("torch.cuda.memory_reserved", {"cuda:1": 2 * gib}.get)
    worker = PipelineWorker(Checkpoint("demo", "demo", tiny_pipeline()), "cuda:1")

    assert worker.memory() == Memory(allocated_gb=1.0, reserved_gb=2.0)


def test_a_prompt_that_is_not_read_to_its_end_is_warned_about() -> None:
    worker = PipelineWorker(Checkpoint("demo", "demo", tiny_pipeline(("unknown",))), "cpu")

    warning = outcome_of(worker, job("make it night " * 50)).warning

    assert warning is not None
    assert warning.startswith(
        "the end of the prompt was cut: this checkpoint reads at most 40 tokens of picture and "
        "prompt; the demo checkpoint does not know this edit"
    )
