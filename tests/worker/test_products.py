"""Copies of layers in 8-bit codes: only for edits that need not be exact, and only if they help."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from step1x_edit.channel import EditJob, Painted, Phase, Progress
from step1x_edit.checkpoints.arena import Check, never_stop
from step1x_edit.checkpoints.memory_plan import with_share
from step1x_edit.checkpoints.read import STEPS_FILE, Wanted, open_checkpoint, write_demo
from step1x_edit.engine import host_memory
from step1x_edit.engine.host_memory import HostMemory
from step1x_edit.errors import EditCancelledError
from step1x_edit.model import quantised
from step1x_edit.worker.arithmetic import FILE
from step1x_edit.worker.edits import PipelineWorker
from step1x_edit.worker.opening import STAND_IN
from step1x_edit.worker.products import Products, measure_gains
from step1x_edit.worker.residency import Residency
from tiny import a_picture, tiny_pipeline

EXACT = EditJob(
    image=a_picture(), prompt="make it night", num_steps=10, size_level=64, seed=3, loras={}
)
FAST = dataclasses.replace(EXACT, mode="fast")
TURBO = dataclasses.replace(EXACT, mode="turbo")
WANTED = Wanted()
LAYER = "single_blocks.1.linear1"
EVEN = {
    "tiny": {"order": 3, "curves": [{"tokens": size, "density": [[1.0, 1.0]]} for size in (4, 64)]}
}
"""A profile of steps for pictures of 4 to 64 tokens."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    pipeline = tiny_pipeline()
    write_demo(folder / "model", pipeline)
    (folder / "model" / STEPS_FILE).write_text(json.dumps(EVEN))
    rows, columns = pipeline.transformer.get_parameter(f"{LAYER}.weight").shape
    name = f"lora_unet_{LAYER.replace('.', '_')}"
    factors = {f"{name}.lora_down.weight": (2, columns), f"{name}.lora_up.weight": (rows, 2)}
    save_file(
        {key: torch.full(shape, 0.5) for key, shape in factors.items()}, folder / "hand.safetensors"
    )
    return folder


@pytest.fixture(autouse=True)
def _multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies 8-bit integers, and enough memory, whatever this one has."""
    monkeypatch.setattr(quantised, "_cpu_multiplies_int8", lambda: True)
    monkeypatch.setattr(host_memory, "measure", lambda: HostMemory(10**11, 10**11))


class Model:
    """A worker with a measurement that finds this gain, and the pictures that it makes."""

    def __init__(self, folder: Path, data_dir: Path, gain: float, wanted: Wanted = WANTED) -> None:
        self.measured: list[str] = []
        lora = {folder / "hand.safetensors": 1.0}
        opened = open_checkpoint(folder / "model", dataclasses.replace(wanted, loras=lora))
        self.residency = Residency(lambda: opened, None)

        def measure(layers: Mapping[str, nn.Linear], kind: str, _: Check) -> dict[str, float]:
            self.measured.append(kind)
            return dict.fromkeys(layers, gain)

        self.worker = PipelineWorker(self.residency, "cpu", products=Products(data_dir, measure))

    def picture(self, job: EditJob) -> bytes:
        *_, last = self.worker.edit(job, lambda: None)
        assert isinstance(last, Painted)
        return last.image.tobytes()

    @property
    def has_codes(self) -> bool:
        """Whether the last edit multiplied codes, as its metadata say."""
        return "int8 products" in (self.worker.residence().arithmetic or "")


def test_only_edits_that_need_not_be_exact_multiply_codes(folder: Path, tmp_path: Path) -> None:
    model, usual = Model(folder, tmp_path, gain=2.0), Model(folder, tmp_path / "usual", gain=1.1)
    exact, fast = usual.picture(EXACT), usual.picture(FAST)
    assert not usual.has_codes

    found = [(model.picture(job), model.has_codes) for job in (EXACT, FAST, EXACT, FAST, TURBO)]

    rounded = found[1][0]
    assert rounded not in (exact, fast)
    assert found[:4] == [(exact, False), (rounded, True), (exact, False), (rounded, True)]
    assert found[4][1]


def test_what_was_measured_first_stays(folder: Path, tmp_path: Path) -> None:
    first, second = Model(folder, tmp_path, gain=2.0), Model(folder, tmp_path, gain=1.0)

    assert first.picture(FAST) == second.picture(FAST)
    assert (first.measured, second.measured) == (["int8"], [])
    assert len(json.loads((tmp_path / FILE).read_text())) == 1


def test_other_loras_and_a_move_make_the_copies_again(folder: Path, tmp_path: Path) -> None:
    with_lora = dataclasses.replace(FAST, loras={"hand": 1.0})
    expected = [Model(folder, tmp_path, gain=2.0).picture(job) for job in (FAST, with_lora)]
    assert expected[0] != expected[1]
    model = Model(folder, tmp_path, gain=2.0)

    assert [model.picture(job) for job in (FAST, with_lora, FAST)] == [*expected, expected[0]]
    model.residency.release()
    assert model.picture(with_lora) == expected[1]


@pytest.mark.parametrize("free", [0, None])
def test_without_memory_for_them_there_are_no_copies(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int | None
) -> None:
    expected = Model(folder, tmp_path / "usual", gain=1.0).picture(FAST)
    memory = None if free is None else HostMemory(free, 10**11)
    monkeypatch.setattr(host_memory, "measure", lambda: memory)
    model = Model(folder, tmp_path, gain=2.0)

    assert model.picture(FAST) == expected
    assert not model.has_codes


def test_copies_leave_first_when_memory_runs_out(folder: Path, tmp_path: Path) -> None:
    model = Model(folder, tmp_path, gain=2.0)
    model.picture(FAST)
    checkpoint = model.residency.checkpoint
    assert checkpoint is not None
    calls: list[bool] = []

    def run_out(*_: object) -> None:
        calls.append(checkpoint.pipeline.coded is not None)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    checkpoint.pipeline.vae.encoder.register_forward_pre_hook(run_out)

    assert model.picture(FAST) == Model(folder, tmp_path / "usual", gain=1.0).picture(FAST)
    assert calls == [True, False]
    assert not model.has_codes
    model.picture(FAST)
    assert calls == [True, False, False]


def test_a_model_that_is_streamed_or_kept_in_codes_gets_no_copies(
    folder: Path, tmp_path: Path
) -> None:
    coded = Model(folder, tmp_path, 2.0, Wanted(precision="int8"))
    streamed = Model(folder, tmp_path, 2.0)
    opened = open_checkpoint(folder / "model")
    place, plan = torch.device("cpu"), lambda blocks: with_share(blocks, 0.5)
    streamed.residency = Residency(lambda: opened, place, plan=plan)
    products = streamed.worker._products
    streamed.worker = PipelineWorker(streamed.residency, STAND_IN, products=products)

    for model in (coded, streamed):
        model.picture(dataclasses.replace(FAST, loras=None))
        assert not model.has_codes
        assert model.measured == []


def test_measuring_compares_each_layer() -> None:
    layers = {"8x16": nn.Linear(8, 16), "16x8": nn.Linear(16, 8)}

    assert measure_gains(layers, "int8", never_stop).keys() == layers.keys()


def test_a_cancel_stops_the_measurement(folder: Path, tmp_path: Path) -> None:
    model = Model(folder, tmp_path, gain=2.0)
    model.picture(EXACT)
    model.worker = PipelineWorker(model.residency, "cpu", products=Products(tmp_path))

    def stop() -> None:
        raise EditCancelledError

    edit = model.worker.edit(FAST, stop)
    assert next(edit) == Progress(Phase.LOADING)
    with pytest.raises(EditCancelledError):
        next(edit)
    assert not (tmp_path / FILE).exists()
