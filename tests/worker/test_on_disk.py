"""Blocks that stay on disk: the same picture bit for bit, in less of the host's memory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import weakref
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from command_line import edit
from extent import slow
from step1x_edit.channel import GIGA, EditJob, Painted, Start
from step1x_edit.checkpoints.ahead import ReadAhead
from step1x_edit.checkpoints.arena import PIECE, Arena, Block, Weight, blocks_of
from step1x_edit.checkpoints.memory_plan import (
    STREAMABLE,
    HostPlan,
    MemoryPlan,
    Rates,
    everything,
    with_share,
)
from step1x_edit.checkpoints.read import OpenedCheckpoint, Wanted, open_checkpoint, write_demo
from step1x_edit.engine.host_memory import HostMemory
from step1x_edit.errors import CheckpointError, ModelUnavailableError
from step1x_edit.model.pipeline import Edited, EditPipeline
from step1x_edit.model.request import NetworkRequest
from step1x_edit.worker.edits import PipelineWorker
from step1x_edit.worker.opening import STAND_IN as STAND_IN_NAME
from step1x_edit.worker.page_lock import lock_order
from step1x_edit.worker.process import load_worker
from step1x_edit.worker.rates import measured
from step1x_edit.worker.residency import Residency
from step1x_edit.worker.streaming import BlockStreamer, HostCopies, ThroughSlots
from tiny import a_picture, final_picture, location, tiny_pipeline

STAND_IN = torch.device("cpu")
STEPS = 3
REQUEST = NetworkRequest(a_picture(), "make it night", num_steps=STEPS, size_level=64)
COMPONENTS = ("conditioner", "prologue", "core")
LORA_BLOCKS = ("single_blocks.0.linear1", "single_blocks.1.modulation.lin")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, tiny_pipeline())
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> bytes:
    """The picture of a model that is wholly in memory and on its device."""
    residency = Residency(partial(open_checkpoint, folder), STAND_IN)
    residency.onload()
    return picture(residency)


def passing(opened: OpenedCheckpoint, *components: str) -> frozenset[str]:
    return frozenset(
        block.name
        for block in blocks_of(opened.weights)
        if block.component in components and STREAMABLE.fullmatch(block.name)
    )


def opened_with(folder: Path, components: Sequence[str], **asked: object) -> OpenedCheckpoint:
    """A checkpoint of which these components stay on disk."""
    opened = open_checkpoint(folder, Wanted(**asked))  # type: ignore[arg-type]
    return dataclasses.replace(opened, host=HostPlan(on_disk=passing(opened, *components)))


def residency_with(
    folder: Path,
    components: Sequence[str],
    share: float | None = 0.0,
    device: torch.device | None = STAND_IN,
    **asked: object,
) -> Residency:
    """Without a share of the core the whole model lives on the device."""

    def plan(blocks: Sequence[Block]) -> MemoryPlan:
        return everything(blocks) if share is None else with_share(blocks, share)

    return Residency(partial(opened_with, folder, components, **asked), device, plan=plan)


def edited(pipeline: EditPipeline) -> bytes:
    *_, last = pipeline.edit(REQUEST)
    assert isinstance(last, Edited)
    return last.image.tobytes()


def picture(residency: Residency) -> bytes:
    with residency.on_device() as checkpoint:
        return edited(checkpoint.pipeline)


def brought_picture(residency: Residency) -> bytes:
    residency.onload()
    return picture(residency)


@pytest.mark.parametrize("share", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("components", [COMPONENTS[:2], COMPONENTS], ids=len)
def test_the_picture_is_the_same_whatever_stays_on_disk(
    folder: Path, expected: bytes, components: Sequence[str], share: float | None
) -> None:
    residency = residency_with(folder, components, share)
    for _ in range(2):  # also after it has been away
        residency.onload()
        assert location(residency) == "GPU"
        assert picture(residency) == expected
        assert picture(residency) == expected
        residency.offload()
        assert location(residency) == "CPU"
    residency.release()
    residency.onload()
    assert picture(residency) == expected


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_codes_that_are_made_anew_for_each_edit_are_the_same(folder: Path, precision: str) -> None:
    inside = Residency(partial(open_checkpoint, folder, Wanted(precision=precision)), STAND_IN)  # type: ignore[arg-type]
    outside = residency_with(folder, COMPONENTS, precision=precision)
    for residency in (inside, outside):
        residency.onload()

    assert picture(outside) == picture(inside)


@pytest.mark.parametrize("share", [None, 0.0])
def test_what_stays_on_disk_takes_no_host_memory(folder: Path, share: float | None) -> None:
    inside, outside = residency_with(folder, (), share), residency_with(folder, COMPONENTS, share)
    for residency in (inside, outside):
        residency.onload()
        picture(residency)

    left_out = passing(open_checkpoint(folder), *COMPONENTS)
    size = sum(block.size for block in outside.blocks if block.name in left_out)
    held = [residency.placement().host_gb for residency in (inside, outside)]  # type: ignore[union-attr]
    assert held[0] is not None
    assert held[0] - size / GIGA == pytest.approx(held[1])
    outside.offload()
    assert outside.checkpoint is not None
    assert outside.checkpoint.pipeline.transformer.single_blocks[0].linear1.weight.numel() == 0
    assert {block.name for block in outside.blocks if block.offset is None} == left_out


@pytest.mark.parametrize("components", [COMPONENTS[:1], COMPONENTS], ids=len)
def test_without_a_device_blocks_compute_where_they_are_read_to(
    folder: Path, expected: bytes, components: Sequence[str]
) -> None:
    whole = Residency(partial(open_checkpoint, folder), None)
    residency = residency_with(folder, components, device=None)
    left_out = passing(open_checkpoint(folder), *components)
    whole.load()

    for _ in range(2):  # also after it has been released
        residency.onload()
        assert location(residency) == "CPU"
        assert picture(residency) == expected
        residency.offload()  # there is nowhere to go
        assert picture(residency) == expected
        size = sum(block.size for block in residency.blocks if block.name in left_out)
        held = [each.placement().host_gb for each in (whole, residency)]  # type: ignore[union-attr]
        assert held[0] - size / GIGA == pytest.approx(held[1])  # type: ignore[operator]
        residency.release()
        assert location(residency) == "Unloaded"


def test_without_a_device_two_blocks_from_disk_are_in_memory_at_a_time(
    folder: Path, expected: bytes
) -> None:
    residency = residency_with(folder, COMPONENTS, device=None)
    residency.load()
    assert residency._loaded is not None
    disk = residency._loaded.disk
    reads: list[str] = []
    memories: list[weakref.ref[torch.UntypedStorage]] = []
    read = disk._read

    def watched(block: str) -> Tensor:
        reads.append(block)
        memory = read(block)
        memories.append(weakref.ref(memory.untyped_storage()))
        assert sum(each() is not None for each in memories) <= 2
        return memory

    disk._read = watched

    assert picture(residency) == expected

    disk.close()
    counts = Counter(reads)
    left_out = passing(open_checkpoint(folder), *COMPONENTS)
    core = {block.name for block in residency.blocks if block.component == "core"} & left_out
    assert {counts[name] for name in left_out - core} == {1}
    assert sum(counts[name] for name in core) in (STEPS * len(core), STEPS * len(core) + 1)
    assert all(each() is None for each in memories)


def test_the_status_says_what_is_read_from_disk(folder: Path) -> None:
    residency = residency_with(folder, ["conditioner"])
    opened = residency._open_checkpoint
    plan = HostPlan(free=24 * 10**9, reads=("the conditioner is read from disk",))
    residency._open_checkpoint = lambda: dataclasses.replace(
        opened(), host=dataclasses.replace(plan, on_disk=opened().host.on_disk)
    )
    residency.onload()

    placement = residency.placement()

    assert placement is not None
    assert placement.reason.endswith(
        "; 24 GB of memory are free: the conditioner is read from disk"
    )


@pytest.mark.parametrize("device", [None, STAND_IN])
def test_a_second_edit_of_a_picture_reads_what_has_changed(
    folder: Path, expected: bytes, device: torch.device | None
) -> None:
    residency = residency_with(folder, COMPONENTS[:2], 0.0, device)
    residency.onload()
    assert residency._loaded is not None
    disk, reads = residency._loaded.disk, set[str]()
    read = disk._read

    def watched(block: str) -> Tensor:
        reads.add(block)
        return read(block)

    def reads_of(prompt: str) -> set[str]:
        reads.clear()
        with residency.on_device() as checkpoint:
            image = final_picture(checkpoint.pipeline, dataclasses.replace(REQUEST, prompt=prompt))
        assert (image.tobytes() == expected) == (prompt == REQUEST.prompt)
        return set(reads)

    disk._read = watched
    pipeline = residency._loaded.opened.checkpoint.pipeline
    pipeline.keep(2**24)
    left_out = passing(residency._loaded.opened, *COMPONENTS[:2])
    assert reads_of(REQUEST.prompt) == left_out

    assert reads_of(REQUEST.prompt) == set()
    # The first block of the vision tower may be read ahead, for an edit of another picture.
    first, *visual = sorted(name for name in left_out if ".visual." in name)
    assert left_out - reads_of("make it day") - {first} == set(visual)
    residency.release()
    assert not pipeline.forget()


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_slots", [2, 3])
def test_each_block_is_read_when_it_is_needed_and_let_go(
    folder: Path, expected: bytes, num_slots: int
) -> None:
    opened = opened_with(folder, COMPONENTS)
    arena = Arena(opened.weights, opened.host.on_disk)
    arena.fill()
    arena.attach(arena.memories)
    left_out = [block for block in arena.blocks if block.offset is None]
    reads: list[str] = []
    memories: list[weakref.ref[torch.UntypedStorage]] = []

    def read(block: str) -> Tensor:
        reads.append(block)
        memory = arena.read(block)
        memories.append(weakref.ref(memory.untyped_storage()))
        assert sum(each() is not None for each in memories) <= 2
        return memory

    def copy(source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    disk = ReadAhead(read)
    slots = torch.empty(num_slots, max(b.size for b in left_out), dtype=torch.uint8)
    passage = ThroughSlots(left_out, arena.memories, disk, slots, HostCopies(copy))
    modules = opened.checkpoint.pipeline.modules
    streamer = BlockStreamer(arena, modules, left_out, passage, STAND_IN)

    assert edited(opened.checkpoint.pipeline) == expected

    streamer.close()
    disk.close()
    counts = Counter(reads)
    once = [block.name for block in left_out if block.component != "core"]
    core = [block.name for block in left_out if block.component == "core"]
    assert {counts[name] for name in once} == {1}
    # Where there are slots for all of them they stay in there. What was begun last is for a step
    # that does not come.
    times = 1 if num_slots >= len(core) else STEPS
    assert sum(counts[name] for name in core) in (times * len(core), times * len(core) + 1)
    assert all(each() is None for each in memories)


def test_what_is_read_ahead_is_read_once_and_something_else_instead_if_need_be() -> None:
    reads: list[str] = []

    def read(block: str) -> Tensor:
        reads.append(block)
        if block == "bad":
            raise CheckpointError("gone")
        return torch.tensor([len(reads)])

    disk = ReadAhead(read)

    disk.begin("a")
    disk.begin("a")
    assert disk.take("a").item() == 1
    disk.begin("bad")
    assert disk.take("c").item() in (2, 3)  # whether the bad one had been begun or not
    with pytest.raises(CheckpointError):
        disk.take("bad")
    assert disk.take("a").item() == len(reads)
    disk.close()
    assert reads.count("a") == 2


@pytest.mark.parametrize("share", [None, 0.0])
def test_a_file_that_has_changed_is_named_and_read_anew_by_the_next_edit(
    tmp_path: Path, expected: bytes, share: float | None
) -> None:
    write_demo(tmp_path, tiny_pipeline())
    file = tmp_path / "model.safetensors"
    residency = residency_with(tmp_path, COMPONENTS[:2], share)
    residency.onload()
    assert picture(residency) == expected
    whole = file.read_bytes()
    residency.offload()

    file.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        brought_picture(residency)

    assert location(residency) == "Unloaded"
    file.write_bytes(whole)
    residency.onload()
    assert picture(residency) == expected


def test_numbers_that_are_not_finite_are_found_when_they_are_read(tmp_path: Path) -> None:
    write_demo(tmp_path, tiny_pipeline())
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["conditioner.language_model.layers.1.mlp.up_proj.weight"][3, 4] = torch.inf
    save_file(tensors, file, {"format": "pt"})
    residency = residency_with(tmp_path, ["conditioner"])
    residency.onload()

    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight that are not"):
        picture(residency)

    assert location(residency) == "Unloaded"


@pytest.mark.parametrize("moment", range(8))
def test_an_edit_that_is_stopped_leaves_a_model_that_works(
    folder: Path, expected: bytes, moment: int
) -> None:
    class StopError(Exception):
        pass

    residency = residency_with(folder, COMPONENTS)
    residency.onload()
    assert residency.checkpoint is not None
    pipeline = residency.checkpoint.pipeline
    modules = [module for part in pipeline.modules.values() for module in part.modules()]

    def stop(*_: object) -> None:
        raise StopError

    chosen = [modules[len(modules) * moment // 8]]
    handles = [module.register_forward_pre_hook(stop) for module in chosen]
    with contextlib.suppress(StopError):
        picture(residency)
    for handle in handles:
        handle.remove()

    assert picture(residency) == expected


@pytest.mark.parametrize("components", [(), ["conditioner"], COMPONENTS], ids=len)
@pytest.mark.parametrize(("share", "device"), [(None, STAND_IN), (0.3, STAND_IN), (None, None)])
def test_loras_are_added_to_what_stays_on_disk(
    tmp_path: Path,
    folder: Path,
    components: Sequence[str],
    share: float | None,
    device: torch.device | None,
) -> None:
    file = a_lora(tmp_path / "hand.safetensors", folder)
    usual = Residency(partial(open_checkpoint, folder, Wanted(loras={file: 0.5})), STAND_IN)
    usual.onload()
    plain = Residency(partial(open_checkpoint, folder), STAND_IN)
    plain.onload()
    residency = residency_with(folder, components, share, device, loras={file: 0.5})
    residency.onload()
    assert residency.checkpoint is not None
    residency.checkpoint.pipeline.keep(2**24)  # a prologue is only kept for the same LoRAs

    assert picture(residency) == picture(usual) != picture(plain)
    residency.use_loras({})
    assert picture(residency) == picture(plain)
    residency.offload()
    residency.use_loras(None)
    residency.onload()
    assert picture(residency) == picture(usual)
    if components:
        held = residency.placement().host_gb  # type: ignore[union-attr]
        assert held < plain.placement().host_gb  # type: ignore[union-attr,operator]


def a_lora(file: Path, folder: Path) -> Path:
    """A DoRA of a block of the core and of one of the prologue."""
    transformer = open_checkpoint(folder).checkpoint.pipeline.transformer
    random = torch.Generator().manual_seed(5)
    tensors = {}
    for name in LORA_BLOCKS:
        rows, columns = transformer.get_parameter(f"{name}.weight").shape
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = torch.randn(2, columns, generator=random)
        tensors[f"{key}.lora_up.weight"] = torch.randn(rows, 2, generator=random)
        tensors[f"{key}.dora_scale"] = torch.rand(1, columns, generator=random)
    save_file(tensors, file)
    return file


# --- through the worker ---------------------------------------------------------------------------


def outcome_of(worker: PipelineWorker) -> Painted:
    job = EditJob(a_picture(), "make it night", "", 2, 6.0, 64, seed=3)
    *_, last = worker.edit(job, lambda: None)
    assert isinstance(last, Painted)
    return last


SLOW, FAST = Rates(read=1e-6, step_s=1.0), Rates(read=1e12, step_s=1.0)


def a_worker(
    folder: Path, device: str, free: int, precision: str = "auto", rates: Rates = SLOW
) -> PipelineWorker:
    start = Start(model_path=str(folder), device=device, precision=precision)  # type: ignore[arg-type]
    return load_worker(start, lambda: HostMemory(free, 2 * free), lambda *_: rates)


def bytes_of(folder: Path, *components: str, precision: str = "auto") -> int:
    """What the components take, and all that can never stay on disk."""
    blocks = blocks_of(open_checkpoint(folder, Wanted(precision=precision)).weights)  # type: ignore[arg-type]
    return sum(
        block.size
        for block in blocks
        if block.component in components or not STREAMABLE.fullmatch(block.name)
    )


@pytest.mark.parametrize("device", ["cpu", STAND_IN_NAME])
def test_a_host_that_is_short_of_memory_reads_the_conditioner_from_disk(
    folder: Path, device: str
) -> None:
    free = 2 * bytes_of(folder, "core", "prologue")  # half of so little is left for others
    short, rich = a_worker(folder, device, free), a_worker(folder, device, GIGA)

    pictures = [outcome_of(worker).image.tobytes() for worker in (short, rich)]

    assert pictures[0] == pictures[1]
    placements = [worker.residence().placement for worker in (short, rich)]
    assert placements[0] is not None
    assert placements[1] is not None
    assert "the conditioner is read from disk" in placements[0].reason
    assert "disk" not in placements[1].reason
    assert placements[0].host_gb < placements[1].host_gb  # type: ignore[operator]
    assert short.residence().model == rich.residence().model == "demo"


@pytest.mark.parametrize("device", ["cpu", STAND_IN_NAME])
def test_a_disk_that_is_faster_than_a_step_keeps_a_core_exact_that_does_not_fit(
    folder: Path, device: str
) -> None:
    free = 2 * bytes_of(folder, "core") - 2
    short = a_worker(folder, device, free, rates=FAST)

    exact = outcome_of(short).image.tobytes()

    placement = short.residence().placement
    assert exact == outcome_of(a_worker(folder, device, GIGA)).image.tobytes()
    assert placement is not None
    assert placement.precision == "fp32"
    assert "a part of the core" in placement.reason
    if device == "cpu":
        assert "is read from disk in each step" in placement.reason
        assert 0 < placement.resident_share < 1


@pytest.mark.parametrize("device", ["cpu", STAND_IN_NAME])
def test_a_host_for_which_the_core_is_too_large_rounds_it_and_says_so(
    folder: Path, device: str
) -> None:
    worker = a_worker(folder, device, 2 * bytes_of(folder, "core") - 2)

    outcome_of(worker)

    placement = worker.residence().placement
    assert placement is not None
    assert worker.residence().model == "demo (int8)"
    assert placement.precision == "int8"
    assert "the weights are rounded to int8" in placement.reason


def test_a_small_model_is_measured_in_no_time(folder: Path) -> None:
    rates = measured(open_checkpoint(folder), None)

    assert rates.read > 0
    assert 0 < rates.step_s < 60


def test_a_precision_that_was_asked_for_is_kept(folder: Path) -> None:
    worker = a_worker(folder, STAND_IN_NAME, 2 * bytes_of(folder, "core") - 2, "bf16")

    outcome_of(worker)

    assert worker.residence().model == "demo (bf16)"


def test_without_a_device_a_model_that_is_far_too_large_is_refused_in_one_line(
    folder: Path,
) -> None:
    worker = a_worker(folder, "cpu", 1000)

    with pytest.raises(ModelUnavailableError, match=r"GB are free: free some$") as refused:
        outcome_of(worker)

    assert "\n" not in str(refused.value)


SHORT = """
import sys
from step1x_edit.engine import host_memory

def measure():
    print("there is little memory", file=sys.stderr)
    return host_memory.HostMemory({free}, {free})

host_memory.measure = measure
"""


@slow
def test_the_command_line_makes_the_same_file_with_little_memory(
    tmp_path: Path, folder: Path
) -> None:
    Image.fromarray(a_picture()).save(tmp_path / "photo.png")
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    settings = {"MODEL_PATH": str(folder), "DEVICE": "cpu"}

    whole = edit(tmp_path, "whole.png", **settings)
    (hooks / "sitecustomize.py").write_text(SHORT.format(free=2 * bytes_of(folder, "core")))
    path = os.pathsep.join([str(hooks), os.environ.get("PYTHONPATH", "")])
    short = edit(tmp_path, "short.png", **settings, PYTHONPATH=path)

    assert (whole.returncode, short.returncode) == (0, 0), whole.stderr + short.stderr
    assert "there is little memory" in short.stderr
    assert (tmp_path / "whole.png").read_bytes() == (tmp_path / "short.png").read_bytes()


# --- page-locking ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lockable", "expected"),
    [
        (None, [(1, 4), (0, 1), (4, 5)]),
        (3 * PIECE, [(1, 4)]),
        (3 * PIECE + 5, [(1, 4)]),
        (2 * PIECE + 5, [(1, 3)]),
        (4 * PIECE, [(1, 4), (0, 1)]),
        (0, []),
    ],
)
def test_the_core_is_page_locked_first_and_in_whole_pieces(
    lockable: int | None, expected: list[tuple[int, int]]
) -> None:
    module = torch.nn.Module()
    sizes = {
        "conditioner.visual.blocks.0.x": PIECE + 256,
        "transformer.single_blocks.0.x": PIECE,
        "transformer.single_blocks.1.x": PIECE,
        "vae.decoder.x": 2 * PIECE - 256,
    }
    weights = [
        Weight(name, module, "x", (size,), torch.uint8, None) for name, size in sizes.items()
    ]
    arena = Arena(weights)

    parts = lock_order(arena, lockable)

    start = arena.memory.data_ptr()
    places = [(part.data_ptr() - start, part.data_ptr() - start + part.nbytes) for part in parts]
    assert places == [(first * PIECE, last * PIECE) for first, last in expected]
