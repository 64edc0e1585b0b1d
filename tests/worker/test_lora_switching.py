"""LoRAs that change from edit to edit: the bytes of a fresh start, and nothing is loaded again."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from step1x_edit.channel import EditJob, Painted, Progress, Start
from step1x_edit.checkpoints.arena import Block
from step1x_edit.checkpoints.memory_plan import MemoryPlan, everything, with_share
from step1x_edit.checkpoints.read import (
    OpenedCheckpoint,
    Wanted,
    open_checkpoint,
    read_checkpoint,
    write_demo,
)
from step1x_edit.engine.engine import Engine
from step1x_edit.engine.worker_process import WorkerProcess
from step1x_edit.errors import CheckpointError, InvalidParameterError
from step1x_edit.model.pipeline import EditPipeline
from step1x_edit.model.request import NetworkRequest
from step1x_edit.model.transformer import Transformer
from step1x_edit.worker.edits import PipelineWorker
from step1x_edit.worker.opening import STAND_IN
from step1x_edit.worker.process import load_worker
from step1x_edit.worker.residency import Residency
from tiny import TINY, a_picture, final_picture, tiny_pipeline

SHAPES = {n: tuple(t.shape) for n, t in Transformer(TINY.transformer).state_dict().items()}
DEVICE = torch.device("cpu")  # a second copy in host memory stands in for it

Strengths = dict[str, float]
SETS: list[Strengths | None] = [
    {"hand": 1.0},
    {"hand": 1.0, "look": 0.5},
    {"look": 0.5},
    {},
    {"look": -1.0, "hand": 0.25},
    None,
]
"""One after the other; two of them leave blocks as they were, and two need no copy."""


def write_lora(path: Path, modules: Sequence[str], seed: int) -> Path:
    """A LoRA that is strong enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for module in modules:
        rows, columns = SHAPES[f"{module}.weight"]
        key = "lora_unet_" + module.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = torch.randn(2, columns, generator=generator)
        tensors[f"{key}.lora_up.weight"] = torch.randn(rows, 2, generator=generator)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint and two LoRAs, which both change one of its blocks."""
    folder = tmp_path_factory.mktemp("loras")
    write_demo(folder / "model", tiny_pipeline())
    of_hand = ["single_blocks.1.linear1", "double_blocks.0.img_attn.qkv"]
    of_look = ["single_blocks.1.linear2", "final_layer.linear"]
    write_lora(folder / "hand.safetensors", of_hand, 1)
    look = write_lora(folder / "look.safetensors", of_look, 2)
    save_file(load_file(look) | relative_to_the_base(), look)
    return folder


def relative_to_the_base() -> dict[str, Tensor]:
    """A magnitude, which makes a DoRA of a LoRA, and changes of a bias and of a norm."""
    key = "lora_unet_single_blocks_1"
    return {
        f"{key}_linear2.dora_scale": torch.full((SHAPES["single_blocks.1.linear2.bias"][0],), 2.0),
        f"{key}_linear2.diff_b": torch.ones(SHAPES["single_blocks.1.linear2.bias"]),
        f"{key}_norm_query_norm.diff": torch.ones(SHAPES["single_blocks.1.norm.query_norm.scale"]),
    }


def files(folder: Path, strengths: Strengths | None = None) -> dict[Path, float]:
    """The two files at their usual strengths, or at these and no others."""
    usual = {"hand": 0.0, "look": 0.75} if strengths is None else strengths
    return {folder / f"{name}.safetensors": strength for name, strength in usual.items()}


def opened(folder: Path) -> OpenedCheckpoint:
    return open_checkpoint(folder / "model", Wanted(loras=files(folder)))


def picture(pipeline: EditPipeline) -> bytes:
    request = NetworkRequest(a_picture(), "night", num_steps=2, size_level=64)
    return final_picture(pipeline, request).tobytes()


def edited(residency: Residency) -> bytes:
    with residency.on_device() as checkpoint:
        return picture(checkpoint.pipeline)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[bytes]:
    """The pictures of models that were started with each of the sets."""
    return [
        picture(read_checkpoint(folder / "model", Wanted(loras=files(folder, strengths))).pipeline)
        for strengths in SETS
    ]


def tensors(residency: Residency) -> list[Tensor]:
    assert residency.checkpoint is not None
    return list(residency.checkpoint.pipeline.transformer.parameters())


def share(core_share: float) -> Callable[[Sequence[Block]], MemoryPlan]:
    return partial(with_share, core_share=core_share)


@pytest.mark.parametrize(
    ("device", "plan"),
    [
        pytest.param(None, everything, id="in host memory"),
        pytest.param(DEVICE, everything, id="on the device"),
        *(pytest.param(DEVICE, share(part), id=f"streaming, {part}") for part in (0.0, 0.3, 1.0)),
    ],
)
def test_each_set_gives_the_picture_of_a_fresh_start(
    folder: Path,
    expected: list[bytes],
    device: torch.device | None,
    plan: Callable[[Sequence[Block]], MemoryPlan],
) -> None:
    residency = Residency(partial(opened, folder), device, plan=plan)
    residency.onload()
    before, home = [id(tensor) for tensor in tensors(residency)], residency.location

    assert len(set(expected)) == len(SETS)
    for strengths, wanted in [*zip(SETS, expected, strict=True)] * 2:
        residency.use_loras(strengths)
        assert residency.location == home
        assert edited(residency) == wanted, strengths
    assert [id(tensor) for tensor in tensors(residency)] == before


def test_matrices_that_are_kept_as_codes_are_those_of_a_fresh_start(folder: Path) -> None:
    def residency(strengths: Strengths | None) -> Residency:
        opened = open_checkpoint(
            folder / "model", Wanted(loras=files(folder, strengths), precision="int8")
        )
        return Residency(lambda: opened, DEVICE, plan=share(0.3))

    switching = residency(None)
    for strengths in ({"hand": 1.0, "look": 0.5}, {"look": 0.5}, {}):
        fresh = residency(strengths)
        fresh.onload()
        switching.use_loras(strengths)
        switching.onload()
        assert edited(switching) == edited(fresh)


def test_a_model_that_is_away_comes_back_with_what_was_asked_for_meanwhile(
    folder: Path, expected: list[bytes]
) -> None:
    residency = Residency(partial(opened, folder), DEVICE)
    residency.use_loras(SETS[0])  # before there is a model
    residency.onload()
    assert edited(residency) == expected[0]
    residency.offload()
    residency.use_loras(SETS[1])
    assert residency.location == "CPU"
    residency.onload()
    assert edited(residency) == expected[1]
    residency.release()
    assert residency.loras == {}
    residency.onload()
    assert edited(residency) == expected[1]


def test_only_blocks_that_differ_are_made_anew_and_memory_of_copies_is_used_again(
    folder: Path,
) -> None:
    residency = Residency(partial(opened, folder), None)
    residency.use_loras({"hand": 1.0})
    residency.load()
    assert residency.checkpoint is not None
    network = residency.checkpoint.pipeline.transformer
    parts = (
        network.double_blocks[0].img_attn.qkv,  # of hand
        network.single_blocks[1].linear1,  # of both
        network.final_layer.linear,  # of look
        network.single_blocks[0].linear1,  # of none
    )

    def places() -> list[int]:
        return [part.weight.data_ptr() for part in parts]

    base_of_look, of_none = places()[2:]
    only_hand = places()
    residency.use_loras({"hand": 1.0, "look": 1.0})
    both = places()
    residency.use_loras({"look": 1.0})
    only_look = places()

    assert both[:2] == only_hand[:2]
    assert both[2] != base_of_look
    assert only_look[1:3] == both[1:3]
    assert only_look[0] != both[0]  # the arena's own
    assert {only_hand[3], both[3], only_look[3]} == {of_none}


@pytest.mark.parametrize("part", [None, 0.3])
def test_a_change_that_is_stopped_anywhere_leaves_what_was_before(
    folder: Path, expected: list[bytes], part: float | None
) -> None:
    plan = everything if part is None else share(part)
    residency = Residency(partial(opened, folder), DEVICE, plan=plan)
    residency.use_loras(SETS[0])
    residency.onload()
    for moment in itertools.count():
        calls = itertools.count()

        def check(calls: itertools.count[int] = calls, moment: int = moment) -> None:
            if next(calls) == moment:
                raise MemoryError

        try:
            residency.use_loras(SETS[1], check)
        except MemoryError:
            assert residency.loras == SETS[0]
            assert residency.is_ready(SETS[0])
            if moment % 4 == 0:  # an edit takes a while
                assert edited(residency) == expected[0]
        else:
            break

    assert moment > 8
    assert edited(residency) == expected[1]


def test_a_change_that_cannot_be_undone_costs_a_load(
    folder: Path, expected: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    residency = Residency(partial(opened, folder), DEVICE)
    residency.use_loras(SETS[1])
    residency.onload()

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr("step1x_edit.checkpoints.arena.Arena.write_changed", fail)
        with pytest.raises(torch.OutOfMemoryError):
            residency.use_loras({"hand": 0.5})

    assert residency.location == "Unloaded"
    residency.use_loras(SETS[0])
    residency.onload()
    assert edited(residency) == expected[0]


def test_a_name_or_a_file_that_is_wrong_leaves_what_was_before(
    tmp_path: Path, folder: Path, expected: list[bytes]
) -> None:
    broken = tmp_path / "broken.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1, 1)}, broken)
    gone = tmp_path / "gone.safetensors"
    loras = {**files(folder), broken: 0.0, gone: 0.0}
    residency = Residency(lambda: open_checkpoint(folder / "model", Wanted(loras=loras)), DEVICE)
    residency.use_loras(SETS[0])
    residency.onload()

    for name, kind, sentence in (
        ("hnd", InvalidParameterError, "loras has 'hnd', which is not here, did you mean hand?"),
        ("broken", CheckpointError, "broken.safetensors is not a LoRA for Step1X-Edit"),
        ("gone", CheckpointError, "cannot read .*gone.safetensors"),
    ):
        with pytest.raises(kind, match=sentence):
            residency.use_loras({"look": 1.0, name: 1.0})
        assert residency.loras == SETS[0]
    assert edited(residency) == expected[0]


def test_a_file_that_is_written_anew_counts_from_then_on(tmp_path: Path, folder: Path) -> None:
    file = write_lora(tmp_path / "mine.safetensors", ["final_layer.linear"], 3)
    loras = {file: 1.0}
    residency = Residency(lambda: open_checkpoint(folder / "model", Wanted(loras=loras)), None)
    residency.use_loras(None)
    residency.load()
    before = edited(residency)
    write_lora(file, ["final_layer.linear"], 4)
    os.utime(file, ns=(1, 1))

    assert not residency.is_ready(None)
    residency.use_loras(None)

    assert edited(residency) != before
    assert edited(residency) == picture(
        read_checkpoint(folder / "model", Wanted(loras=loras)).pipeline
    )


# --- in the worker --------------------------------------------------------------------------------


def job(loras: Strengths | None) -> EditJob:
    return EditJob(
        image=a_picture(),
        prompt="night",
        negative_prompt="",
        num_steps=2,
        guidance_scale=6.0,
        size_level=64,
        seed=0,
        loras=loras,
    )


def a_start(folder: Path) -> Start:
    loras = {str(file): strength for file, strength in files(folder).items()}
    return Start(model_path=str(folder / "model"), device=STAND_IN, loras=loras)


def outcome(worker: PipelineWorker, loras: Strengths | None) -> tuple[bytes, list[str]]:
    events = list(worker.edit(job(loras), lambda: None))
    assert isinstance(events[-1], Painted)
    return events[-1].image.tobytes(), [e.text for e in events if isinstance(e, Progress)]


def test_the_worker_edits_with_what_the_job_asks_for(folder: Path) -> None:
    worker = load_worker(a_start(folder))
    steps = ["encoding", "denoising 1/2", "denoising 2/2", "decoding"]

    for strengths in SETS:
        image, texts = outcome(worker, strengths)
        again, texts_again = outcome(worker, strengths)
        usual = {"look": 0.75} if strengths is None else strengths
        assert image == again
        assert worker.residence().loras == usual
        assert texts == ["loading model", *steps]
        assert texts_again == steps
    assert worker.residence().model == "demo"
    assert worker.residence().model_with_loras == "demo with LoRA look 0.75"


async def test_edits_switch_in_a_worker_process_that_loads_its_model_once(
    folder: Path, expected: list[bytes]
) -> None:
    """With a separate process, which takes some seconds to import torch."""
    engine = Engine(partial(WorkerProcess, a_start(folder)))
    try:
        results = [await engine.submit(job(strengths)).result() for strengths in SETS[2:]]
        status = engine.status()
    finally:
        await asyncio.to_thread(engine.close)

    assert [result.painted.image.tobytes() for result in results] == expected[2:]
    assert [result.residence.model_with_loras for result in results] == [
        "demo with LoRA look 0.5",
        "demo",
        "demo with LoRA hand 0.25, look -1",
        "demo with LoRA look 0.75",
    ]
    assert status.residence.location == "GPU"
    assert (status.total_loads, status.gpu_to_cpu, status.cpu_to_gpu) == (1, 0, 0)
