"""Nothing is forgotten on the host: all that the worker can do, on a device that refuses to mix."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from second_device import SECOND, SecondTensor, second_device
from step1x_edit.channel import EditJob, Painted
from step1x_edit.checkpoints.arena import blocks_of
from step1x_edit.checkpoints.memory_plan import STREAMABLE, HostPlan, everything, with_share
from step1x_edit.checkpoints.read import OpenedCheckpoint, Wanted, open_checkpoint, write_demo
from step1x_edit.model import quantised
from step1x_edit.model.language_model import Sampling
from step1x_edit.schemas.requests import Precision
from step1x_edit.worker.edits import PipelineWorker
from step1x_edit.worker.opening import STAND_IN
from step1x_edit.worker.residency import Residency
from tiny import a_picture, tiny_pipeline, tiny_pipeline_v1_2

FEW = Sampling(max_new_tokens=2)
EDIT = EditJob(
    image=a_picture(),
    prompt="make it night",
    negative_prompt="a scene",
    num_steps=2,
    guidance_scale=6.0,
    size_level=64,
    seed=3,
    previews=1,
)
GENERATION = dataclasses.replace(EDIT, image=None, size_level=0, width=64, height=48, previews=0)
CLOSE = 0.01
LAYER = "single_blocks.1.linear1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    pipeline = tiny_pipeline()
    write_demo(folder / "v1_1", pipeline)
    write_demo(folder / "v1_2", tiny_pipeline_v1_2())
    rows, columns = pipeline.transformer.get_parameter(f"{LAYER}.weight").shape
    name = f"lora_unet_{LAYER.replace('.', '_')}"
    factors = {f"{name}.lora_down.weight": (2, columns), f"{name}.lora_up.weight": (rows, 2)}
    tensors = {key: torch.full(shape, 0.5) for key, shape in factors.items()}
    save_file(tensors, folder / "hand.safetensors")
    return folder


@pytest.fixture
def device() -> Iterator[torch.device]:
    with second_device() as device:
        yield device


def opened(
    folder: Path, model: str = "v1_1", precision: Precision = "auto", is_on_disk: bool = False
) -> OpenedCheckpoint:
    loras = {folder / "hand.safetensors": 0.0}
    found = open_checkpoint(folder / model, Wanted(precision=precision, loras=loras))
    if not is_on_disk:
        return found
    blocks = (block.name for block in blocks_of(found.weights))
    host = HostPlan(on_disk=frozenset(filter(STREAMABLE.fullmatch, blocks)))
    return dataclasses.replace(found, host=host)


def a_worker(
    folder: Path,
    device: torch.device | None,
    share: float | None = None,
    **changes: object,
) -> PipelineWorker:
    """On a device that keeps all, or this share of the core."""
    plan = everything if share is None else partial(with_share, core_share=share)
    model = partial(opened, folder, **changes)  # type: ignore[arg-type]
    label = "cpu" if device is None else STAND_IN
    return PipelineWorker(Residency(model, device, plan=plan), label, FEW)


def made(worker: PipelineWorker, job: EditJob) -> Painted:
    *_, outcome = worker.edit(job, lambda: None)
    assert isinstance(outcome, Painted)
    return outcome


def difference(one: Painted, other: Painted) -> float:
    """Mean over all pixels; attention goes through another kernel on the second device."""
    return float(np.abs(one.image.astype(int) - other.image.astype(int)).mean())


@pytest.mark.parametrize(("share", "is_on_disk"), [(None, False), (0.3, False), (0.3, True)])
def test_an_edit_is_made_where_the_weights_are(
    folder: Path, device: torch.device, share: float | None, is_on_disk: bool
) -> None:
    worker = a_worker(folder, device, share, is_on_disk=is_on_disk)

    outcome = made(worker, EDIT)

    assert worker.residence().location == "GPU"
    worker.offload()
    again = made(worker, EDIT)
    assert np.array_equal(again.image, outcome.image)
    assert difference(outcome, made(a_worker(folder, None), EDIT)) < CLOSE


@pytest.mark.parametrize(("model", "share"), [("v1_1", 0.3), ("v1_2", None)])
def test_what_earlier_edits_have_computed_waits_on_the_host(
    folder: Path, device: torch.device, model: str, share: float | None
) -> None:
    """If everything is on the device, prologues are not kept: it computes one as fast."""
    plain, worker = (a_worker(folder, device, share, model=model) for _ in range(2))
    expected = made(plain, EDIT)
    first = made(worker, EDIT)
    checkpoint = worker._residency.checkpoint
    assert checkpoint is not None
    checkpoint.pipeline.keep(2**24)
    made(worker, EDIT)
    calls: list[str] = []
    for name, module in checkpoint.pipeline.modules.items():
        part = {"transformer": "time_in", "vae": "encoder", "conditioner": "visual"}.get(name)
        if part is not None:
            note = partial(lambda name, *_: calls.append(name), name)
            module.get_submodule(part).register_forward_pre_hook(note)
    worker.offload()

    again = made(worker, EDIT)

    assert set(calls) == (set() if share else {"transformer"})
    assert np.array_equal(again.image, expected.image)
    assert np.array_equal(first.image, expected.image)


# bfloat16 goes through another kernel for attention where a device is not the host.
@pytest.mark.parametrize(("precision", "most"), [("bf16", 1.0), ("int8", 0.01), ("nf4", 0.01)])
def test_codes_are_widened_where_they_are(
    folder: Path,
    device: torch.device,
    precision: Precision,
    most: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantised, "_has_exact_products", lambda: False)  # the host widens as well
    outcome = made(a_worker(folder, device, 0.3, precision=precision), EDIT)

    assert difference(outcome, made(a_worker(folder, None, precision=precision), EDIT)) < most


def test_loras_are_changed_where_the_weights_are(folder: Path, device: torch.device) -> None:
    job = dataclasses.replace(EDIT, loras={"hand": 1.5})
    worker = a_worker(folder, device, 0.3)

    plain, changed = made(worker, EDIT), made(worker, job)

    assert difference(plain, changed) > 10 * CLOSE
    assert difference(changed, made(a_worker(folder, None), job)) < CLOSE
    assert np.array_equal(plain.image, made(worker, EDIT).image)


def test_the_model_thinks_where_its_weights_are(folder: Path, device: torch.device) -> None:
    job = dataclasses.replace(EDIT, prompt='write "no" on it', thinking=True)

    outcome = made(a_worker(folder, device, 0.3, model="v1_2"), job)

    expected = made(a_worker(folder, None, model="v1_2"), job)
    assert outcome.reasoning == expected.reasoning
    assert difference(outcome, expected) < CLOSE


def test_a_picture_from_words_is_made_where_the_weights_are(
    folder: Path, device: torch.device
) -> None:
    outcome = made(a_worker(folder, device, 0.3), GENERATION)

    assert outcome.image.shape == (48, 64, 3)
    assert difference(outcome, made(a_worker(folder, None), GENERATION)) < CLOSE


def test_what_was_forgotten_on_the_host_is_refused(device: torch.device) -> None:
    """Else nothing above would say anything."""
    here, there = torch.ones(2), torch.ones(2, device=SECOND)

    assert isinstance(there, SecondTensor)
    assert (there + there.sum() * 2).tolist() == [5.0, 5.0]
    assert (here.to(SECOND) * there).cpu().tolist() == [1.0, 1.0]
    with pytest.raises(RuntimeError, match="meets tensors of the host"):
        here + there
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
