"""Blocks that pass through the device: the same picture bit for bit, in less of its memory."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from step1x_edit.channel import GIGA
from step1x_edit.checkpoints.ahead import ReadAhead
from step1x_edit.checkpoints.arena import Arena, Block
from step1x_edit.checkpoints.memory_plan import MemoryPlan, everything, slot_size, with_share
from step1x_edit.checkpoints.read import open_checkpoint, write_demo
from step1x_edit.model.pipeline import Edited, EditPipeline
from step1x_edit.model.request import NetworkRequest
from step1x_edit.model.steps import Evaluations
from step1x_edit.worker.residency import Residency
from step1x_edit.worker.streaming import BlockStreamer, ThroughSlots
from tiny import EVEN, a_picture, location, tiny_pipeline

STAND_IN = torch.device("cpu")
STEPS = 3
REQUEST = NetworkRequest(a_picture(), "make it night", num_steps=STEPS, size_level=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, tiny_pipeline())
    return folder


def residency_with(folder: Path, share: float) -> Residency:
    plan: Callable[[Sequence[Block]], MemoryPlan] = partial(with_share, core_share=share)
    return Residency(partial(open_checkpoint, folder), STAND_IN, plan=plan)


def edited(pipeline: EditPipeline) -> bytes:
    *_, last = pipeline.edit(REQUEST)
    assert isinstance(last, Edited)
    return last.image.tobytes()


def picture(residency: Residency) -> bytes:
    with residency.on_device() as checkpoint:
        return edited(checkpoint.pipeline)


@pytest.fixture(scope="module")
def expected(folder: Path) -> bytes:
    """The picture of a model that is wholly on its device."""
    residency = Residency(partial(open_checkpoint, folder), STAND_IN)
    residency.onload()
    return picture(residency)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_picture_is_the_same_whatever_share_is_resident(
    folder: Path, expected: bytes, share: float
) -> None:
    residency = residency_with(folder, share)
    for _ in range(2):  # also after it has been away
        residency.onload()
        assert location(residency) == "GPU"
        assert residency.plan is not None
        assert residency.plan.is_streaming
        assert picture(residency) == expected
        assert picture(residency) == expected
        residency.offload()
        assert location(residency) == "CPU"
    residency.release()
    residency.onload()
    assert picture(residency) == expected


def test_what_passes_takes_no_memory_of_the_device_but_its_slots(folder: Path) -> None:
    whole = Residency(partial(open_checkpoint, folder), STAND_IN, plan=everything)
    core, none = residency_with(folder, 1.0), residency_with(folder, 0.0)
    for residency in (whole, core, none):
        residency.onload()

    taken = [residency.memory().allocated_gb for residency in (whole, core, none)]

    assert taken[0] > taken[1] > taken[2] > 0
    assert none.plan is not None
    passing = [block for block in none.blocks if block.name not in none.plan.resident]
    fixed = sum(block.size for block in none.blocks) - sum(block.size for block in passing)
    slots = none.plan.num_slots * slot_size((block.size for block in passing), none.plan.num_slots)
    assert taken[2] == (fixed + slots) / GIGA


def test_weights_that_are_not_there_cannot_be_used_by_mistake(folder: Path) -> None:
    residency = residency_with(folder, 0.0)
    residency.onload()
    assert residency.checkpoint is not None
    block = residency.checkpoint.pipeline.transformer.single_blocks[0]

    before = block.linear1.weight.numel()
    picture(residency)
    after = block.linear1.weight.numel()
    residency.offload()

    assert (before, after) == (0, 0)
    assert block.linear1.weight.numel() > 0


@pytest.mark.parametrize("moment", range(12))
def test_an_edit_that_is_stopped_leaves_a_model_that_works(
    folder: Path, expected: bytes, moment: int
) -> None:
    class StopError(Exception):
        pass

    residency = residency_with(folder, 0.3)
    residency.load()
    assert residency.checkpoint is not None
    calls = itertools.count()

    def stop(*_: object) -> None:
        if next(calls) == 5 * moment:
            raise StopError

    handles = [
        module.register_forward_pre_hook(stop)
        for part in residency.checkpoint.pipeline.modules.values()
        for module in part.modules()
    ]
    residency.onload()
    with pytest.raises(StopError):
        picture(residency)
    for handle in handles:
        handle.remove()

    assert picture(residency) == expected


def test_a_model_that_needs_more_than_there_is_gives_up_a_quarter_at_a_time(
    folder: Path, expected: bytes
) -> None:
    residency = residency_with(folder, 1.0)
    assert not residency.shrink()  # it is not there
    residency.onload()
    shares = []
    while residency.shrink():
        residency.onload()
        assert residency.plan is not None
        assert picture(residency) == expected
        shares.append(residency.plan.core_share)

    # Blocks are not cut: what is kept is at most what was asked for.
    assert shares[-1] == 0
    assert shares == sorted(shares, reverse=True)
    assert all(share <= 1 - 0.25 * (i + 1) + 1e-9 for i, share in enumerate(shares))
    residency.release()
    residency.onload()
    plan = residency.plan
    assert plan is not None
    assert plan.core_share == 1


class LateCopies:
    """Copies as late as it is allowed to, and notes what a device would get wrong."""

    def __init__(self, num_slots: int) -> None:
        self.under_way: dict[int, tuple[Tensor, Tensor]] = {}
        self.is_read = [False] * num_slots
        self.started: list[int] = []

    def start(self, slots: Sequence[int], source: Tensor, target: Tensor) -> None:
        assert not any(self.is_read[slot] for slot in slots), "overwrites what is being read"
        target.fill_(255)  # half of a copy
        for slot in slots:
            self.under_way[slot] = source, target
        self.started.append(target.nbytes)

    def wait(self, slots: Sequence[int]) -> None:
        for slot in slots:
            if slot in self.under_way:
                source, target = self.under_way.pop(slot)
                target.copy_(source)
            self.is_read[slot] = True

    def release(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.is_read[slot] = False

    def finish(self) -> None:
        self.under_way.clear()


@pytest.mark.parametrize("num_slots", [2, 3])
def test_copies_beside_the_computing_are_waited_for_and_begun_one_block_ahead(
    folder: Path, expected: bytes, num_slots: int
) -> None:
    opened = open_checkpoint(folder)
    arena = Arena(opened.weights)
    arena.fill()
    arena.attach(arena.memories)
    pipeline = opened.checkpoint.pipeline
    plan = with_share(arena.blocks, 0.0)
    passing = [block for block in arena.blocks if block.name not in plan.resident]
    copies = LateCopies(num_slots)
    size = slot_size((block.size for block in passing), num_slots)
    assert size < max(block.size for block in passing)  # so one takes all slots
    slots = torch.empty(num_slots, size, dtype=torch.uint8)
    disk = ReadAhead(arena.read)
    passage = ThroughSlots(passing, arena.memories, disk, slots, copies)
    streamer = BlockStreamer(arena, pipeline.modules, passing, passage, STAND_IN)

    assert edited(pipeline) == expected

    # Each block of the core once in each step; what was begun at the last is for a step to come.
    core = [block.size for block in passing if block.component == "core"]
    others = [block.size for block in passing if block.component != "core"]
    assert len(copies.started) <= STEPS * len(core) + len(others) + num_slots
    assert len(copies.started) >= STEPS * len(core)
    assert len(copies.under_way) <= 1  # one block ahead, if it was not there already

    # A step that runs nothing brings nothing.
    pipeline.profile, before = EVEN, len(copies.started)
    *_, turbo = pipeline.edit(dataclasses.replace(REQUEST, num_steps=10, mode="turbo"))
    assert isinstance(turbo, Edited)
    assert turbo.evaluations == Evaluations(8, 12)
    assert len(copies.started) - before <= 4 * len(core) + len(others) + num_slots
    streamer.close()
    arena.bind(arena.memories)
    assert edited(pipeline) == expected
