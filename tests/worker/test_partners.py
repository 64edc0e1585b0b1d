"""One edit in several processes, with real ones: its bytes, its memory, and how it fails."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from step1x_edit.channel import EditJob, Memory, Phase, Start
from step1x_edit.checkpoints.read import Wanted, read_checkpoint, write_demo
from step1x_edit.engine.engine import Edit, EditResult, Engine
from step1x_edit.engine.worker_process import WorkerProcess
from step1x_edit.errors import (
    EditCancelledError,
    ModelUnavailableError,
    OutOfMemoryError,
    WorkerLostError,
)
from step1x_edit.model.pipeline import Edited, EditRun, Plan
from step1x_edit.model.request import Pixels
from step1x_edit.worker.opening import STAND_IN, open_chosen
from step1x_edit.worker.survey import survey
from tiny import a_picture, tiny_pipeline

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="several processes need Linux")

JOB = EditJob(
    image=a_picture(),
    prompt="make it night",
    negative_prompt="a scene",
    num_steps=3,
    guidance_scale=6.0,
    size_level=64,
    seed=3,
)
PATIENCE_S = 60
LONG = replace(JOB, num_steps=5000)


class Group(Engine):
    """An engine whose edits run in several processes."""

    def __init__(self, folder: Path, number: int) -> None:
        self.worker: WorkerProcess | None = None
        self.folder = folder
        self.model = Start(
            model_path=str(folder / "model"),
            data_dir=str(folder),
            device=STAND_IN,
            loras={str(folder / "hand.safetensors"): 0.0},
            gpus_per_edit=number,
        )
        super().__init__(self._begun)

    def _begun(self, on_end: Callable[[], None]) -> WorkerProcess:
        self.worker = WorkerProcess(self.model, on_end, "group_worker")
        return self.worker

    @property
    def partners(self) -> list[int]:
        """The ids of the processes that the worker has started."""
        assert self.worker is not None
        task = Path(f"/proc/{self.worker.pid}/task/{self.worker.pid}/children")
        return [pid for pid in map(int, task.read_text().split()) if "group_worker" in command(pid)]

    def edit(self, job: EditJob) -> EditResult:
        async def run() -> EditResult:
            return await self.submit(job).result()

        return asyncio.run(run())

    def interrupted(self, act: Callable[[Edit], None]) -> BaseException:
        """What ends a long edit in whose steps this is done."""

        async def run() -> BaseException:
            edit = self.submit(LONG)
            async for event in edit.events():
                if event.phase is Phase.DENOISING:
                    act(edit)
                    break
            (error,) = await asyncio.gather(edit.result(), return_exceptions=True)
            assert isinstance(error, BaseException)
            return error

        return asyncio.run(run())


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def wait_until_gone(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        is_gone, _, _ = select.select([os.pidfd_open(pid)], [], [], PATIENCE_S)
        assert is_gone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("group")
    pipeline = tiny_pipeline()
    write_demo(folder / "model", pipeline)
    layer = pipeline.transformer.single_blocks[1].linear1.weight
    tensors = {
        "lora_unet_single_blocks_1_linear1.lora_down.weight": torch.full((2, layer.shape[1]), 0.5),
        "lora_unet_single_blocks_1_linear1.lora_up.weight": torch.full((layer.shape[0], 2), 0.5),
    }
    save_file(tensors, folder / "hand.safetensors")
    return folder


@pytest.fixture(scope="module")
def group(folder: Path) -> Iterator[Group]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]))
        group = Group(folder, 2)
        yield group
        group.close()


def alone(folder: Path, job: EditJob, hand: float = 0.0) -> Pixels:
    """The picture that one process makes, which runs the prompts one after the other."""
    wanted = Wanted(loras={folder / "hand.safetensors": hand})
    pipeline = read_checkpoint(folder / "model", wanted).pipeline
    *_, last = pipeline.advance(EditRun(job), Plan(has_joint_branches=False))
    assert isinstance(last, Edited)
    return last.image


def test_an_edit_has_the_bytes_of_one_process_with_and_without_loras(group: Group) -> None:
    with_hand = replace(JOB, loras={"hand": 0.5})

    first, second, third = group.edit(JOB), group.edit(with_hand), group.edit(JOB)

    assert np.array_equal(first.painted.image, alone(group.folder, JOB))
    assert np.array_equal(second.painted.image, alone(group.folder, JOB, hand=0.5))
    assert np.array_equal(third.painted.image, first.painted.image)
    assert (first.residence.numerics or "").startswith(f"2×{STAND_IN}/")


def test_an_edit_without_guidance_needs_no_partner(group: Group) -> None:
    job = replace(JOB, guidance_scale=1.0)

    assert np.array_equal(group.edit(job).painted.image, alone(group.folder, job))


def test_the_model_leaves_all_devices_and_comes_back(group: Group) -> None:
    picture = group.edit(JOB).painted.image
    (held,) = group.status().residence.others
    (left,) = group.offload().result(60).residence.others

    assert held.allocated_gb > 0
    assert left == Memory()
    assert np.array_equal(group.edit(JOB).painted.image, picture)


def test_a_cancelled_edit_leaves_the_processes_in_step(group: Group) -> None:
    picture, worker = group.edit(JOB).painted.image, group.worker

    assert isinstance(group.interrupted(Edit.cancel), EditCancelledError)

    assert np.array_equal(group.edit(JOB).painted.image, picture)
    assert group.worker is worker


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_without_memory_lets_the_edit_continue(group: Group, rank: int) -> None:
    picture, worker = group.edit(JOB).painted.image, group.worker
    (group.folder / f"full-{rank}").touch()

    assert np.array_equal(group.edit(JOB).painted.image, picture)

    assert not (group.folder / f"full-{rank}").exists()
    assert group.worker is worker


def test_a_partner_that_dies_ends_the_edit_and_all_processes_start_again(group: Group) -> None:
    picture, lost = group.edit(JOB).painted.image, group.worker
    assert lost is not None

    error = group.interrupted(lambda _: os.kill(group.partners[0], signal.SIGKILL))

    assert isinstance(error, WorkerLostError)
    assert str(error) == (
        "Worker process lost: it was ended by SIGKILL, perhaps because memory ran out (process 2 "
        "of 2); try again"
    )
    assert np.array_equal(group.edit(JOB).painted.image, picture)
    assert group.worker is not lost


def test_no_partner_outlives_the_worker(group: Group) -> None:
    group.edit(JOB)
    (partner,) = group.partners
    assert group.worker is not None

    os.kill(group.worker.pid, signal.SIGKILL)

    wait_until_gone(partner)


def test_the_heads_of_the_model_must_be_divisible(folder: Path) -> None:
    with pytest.raises(ModelUnavailableError, match=r"among 3 GPUs, .* 2 heads"):
        open_chosen(Start(model_path=str(folder / "model"), device="cpu", gpus_per_edit=3))


def test_more_gpus_than_there_are_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)

    seen = survey(Start(model_path=str(folder / "model"), gpus_per_edit=4))

    assert (seen.device, seen.device_error) == (
        "auto",
        "GPUS_PER_EDIT is 4 and torch finds 3 here: set a lower GPUS_PER_EDIT, or make more GPUs "
        "visible",
    )


def test_four_processes_divide_heads_and_end_if_one_has_no_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]))
    group, expected = Group(folder, 4), alone(folder, JOB)
    try:
        assert np.array_equal(group.edit(JOB).painted.image, expected)
        partners = group.partners
        (folder / "full-3").touch()
        with pytest.raises(OutOfMemoryError):
            group.edit(JOB)
        for pid in partners:
            wait_until_gone(pid)
        assert np.array_equal(group.edit(JOB).painted.image, expected)
    finally:
        group.close()
