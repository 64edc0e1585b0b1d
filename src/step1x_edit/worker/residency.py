"""Residency: where the model is, and how it moves between disk, host memory and the device.

    Unloaded --load--> CPU --onload--> GPU
    Unloaded <--release-- CPU <--offload-- GPU

Weights never change, so the arena in host memory stays valid for as long as the model is loaded.
Onloading copies its blocks into slabs on the device and makes the network's parameters views of
the slabs; offloading points the parameters at the arena again, drops the slabs and copies nothing.
Blocks that the memory plan does not keep on the device are streamed while the model computes.
Blocks for which the host has no memory stay on disk and are read each time they are needed, also if
the model computes in host memory. A reply keeps other blocks in memory than an edit: they change
places. LoRAs are added to copies of the blocks that they change; only these blocks move.
A residency belongs to one thread and has no lock. It knows nothing of jobs, pipes or users' files.

All moves happen outside inference mode, even if the caller is in it: tensors made in it are of
another kind, and compiled code would be compiled again for them.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from step1x_edit.channel import GIGA, Memory
from step1x_edit.checkpoints.ahead import ReadAhead
from step1x_edit.checkpoints.arena import PIECE, Arena, Block, Check, Read, never_stop
from step1x_edit.checkpoints.changed import ChangedBlocks
from step1x_edit.checkpoints.lora import Changes
from step1x_edit.checkpoints.memory_plan import (
    MemoryPlan,
    Use,
    everything,
    plan_status,
    slot_size,
    with_share,
)
from step1x_edit.checkpoints.read import Checkpoint, OpenedCheckpoint
from step1x_edit.errors import CheckpointError
from step1x_edit.worker.page_lock import CudaPages, PageLock, lock_order
from step1x_edit.worker.peak import PeakMeter
from step1x_edit.worker.streaming import BlockStreamer, FromDisk, ThroughSlots, copies_for

if TYPE_CHECKING:
    from step1x_edit.schemas.answers import Location
    from step1x_edit.schemas.plan import PlanStatus
    from step1x_edit.schemas.requests import Precision

logger = logging.getLogger(__name__)


def allocate_slab(size: int, device: torch.device) -> Tensor:
    """Take memory on the device. Raises torch.OutOfMemoryError."""
    return torch.empty(size, dtype=torch.uint8, device=device)


def accept_any(checkpoint: Checkpoint) -> None:
    """Accept every model."""


@dataclass
class Loaded:
    """A model in host memory, except for the blocks that stay on disk."""

    opened: OpenedCheckpoint
    arena: Arena
    host: ChangedBlocks
    """The blocks in host memory, with the LoRAs added."""
    disk: ReadAhead
    """Reads the blocks that are not in host memory."""
    on_disk: frozenset[str]
    """The names of these blocks."""
    changes: Changes
    """The LoRAs in the model."""
    page_lock: PageLock | None
    streamer: BlockStreamer | None = None
    """Brings the blocks on disk if the model computes in host memory."""
    plan: MemoryPlan | None = None
    """By which the model was last placed on the device."""
    core_limit: float = 1.0
    """The largest share of the core's bytes that may stay on the device."""
    core_tried: float = 0.0
    """The share of the last attempt to place it, also if that failed."""

    @property
    def size(self) -> int:
        """Bytes of host memory that hold weights."""
        tensors = (self.arena.memory, *self.host.memories.values())
        storages = [tensor.untyped_storage() for tensor in tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def copy(self, source: Tensor, target: Tensor, check: Check = never_stop) -> None:
        """Copy from host memory in pieces."""
        # Pieces end where the arena's do, so that none is half page-locked: CUDA refuses those.
        start, end = source.storage_offset(), source.storage_offset() + source.nbytes
        edges = [start, *range((start // PIECE + 1) * PIECE, end, PIECE), end]
        for first, last in itertools.pairwise(edges):
            check()
            place = slice(first - start, last - start)
            with self.page_lock.paused() if self.page_lock else contextlib.nullcontext():
                target[place].copy_(source[place], non_blocking=True)

    def put(self, block: str, target: Tensor, check: Check) -> None:
        """Copy a block to its place on the device, from host memory or from disk."""
        if block in self.host.memories:
            self.copy(self.host.memories[block], target, check)
            return
        self.copy(self.disk.take(block), target, check)
        _synchronize(target.device)  # before the memory of the source is freed

    def stream_from_disk(self) -> None:
        """Bring the blocks on disk to host memory whenever they are needed there."""
        blocks = [block for block in self.arena.blocks if block.name in self.on_disk]
        modules = self.opened.checkpoint.pipeline.modules
        if blocks:
            passage, host = FromDisk(blocks, self.disk), torch.device("cpu")
            self.streamer = BlockStreamer(self.arena, modules, blocks, passage, host)

    def bind_on_host(self, blocks: Iterable[str]) -> None:
        """Point the parameters of blocks at host memory; those of blocks on disk become empty."""
        for block in blocks:
            if block in self.host.memories:
                self.arena.bind({block: self.host.memories[block]})
            else:
                self.arena.empty(block, torch.device("cpu"))


@dataclass(frozen=True)
class Placed:
    """What a model has on the device."""

    plan: MemoryPlan
    slabs: list[Tensor]
    """All its memory there."""
    resident: Mapping[str, Tensor]
    """The places of the resident blocks in the slabs."""
    streamer: BlockStreamer | None
    """Brings the other blocks, if there are any."""


class Residency:
    """Moves one model between disk, host memory and a device, and lends it where it computes.

    Without a device the model computes in host memory. The device "cpu" is a second copy in host
    memory that stands in for a GPU.
    """

    def __init__(
        self,
        open_checkpoint: Callable[[], OpenedCheckpoint],
        device: torch.device | None,
        allocate: Callable[[int, torch.device], Tensor] = allocate_slab,
        plan: Callable[[Sequence[Block]], MemoryPlan] = everything,
    ) -> None:
        """`plan` is called each time the model goes to the device, to decide what stays there."""
        self._open_checkpoint = open_checkpoint
        self._device = device
        self._allocate = allocate
        self._choose_plan = plan
        self._peak = PeakMeter(device, self._held)
        self._wanted: Mapping[str, float] | None = None  # the LoRAs to load with
        self._loaded: Loaded | None = None
        self._placed: Placed | None = None  # only while it is loaded
        self._is_lent = False

    @property
    def location(self) -> Location:
        """Where the numbers of the parameters are, judged by their addresses."""
        if self._loaded is None:
            return "Unloaded"
        placed = self._placed
        if placed and self._loaded.arena.lies_in(placed.slabs, placed.plan.resident):
            return "GPU"
        return "CPU"

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The loaded checkpoint, to read its name and sizes; to compute with it, borrow it."""
        return None if self._loaded is None else self._loaded.opened.checkpoint

    @property
    def precision(self) -> Precision:
        """How the weights of the loaded model are kept."""
        return "auto" if self._loaded is None else self._loaded.opened.host.precision

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the loaded model in execution order; empty if none is loaded."""
        return () if self._loaded is None else self._loaded.arena.blocks

    @property
    def plan(self) -> MemoryPlan | None:
        """What stays on the device and what is streamed; None while nothing is there."""
        return None if self._placed is None else self._placed.plan

    @property
    def is_whole(self) -> bool:
        """Whether all weights are where they compute, and stay there."""
        if self._device is None:
            return self._loaded is not None and not self._loaded.on_disk
        return self._placed is not None and not self._placed.plan.is_streaming

    @property
    def loras(self) -> Mapping[str, float]:
        """The LoRAs in the model, and the strength of each."""
        return {} if self._loaded is None else self._loaded.changes.strengths

    def is_ready(self, strengths: Mapping[str, float] | None, use: Use = "edit") -> bool:
        """Whether the model is where it computes, with the LoRAs that `use_loras` would add.

        For another use other blocks are in host memory, if not all of them are.

        Raises InvalidParameterError for an unknown name.
        """
        loaded = self._loaded
        if loaded is None or self.location != ("CPU" if self._device is None else "GPU"):
            return False
        is_for_use = loaded.on_disk == loaded.opened.host.out(use)
        return is_for_use and loaded.opened.loras.marks(strengths) == loaded.changes.marks

    def memory(self) -> Memory:
        """Device memory as its allocator reports it; for a stand-in, the bytes of the slabs."""
        if self._device is None:
            return Memory()
        if self._device.type == "cuda":
            return Memory(
                allocated_gb=torch.cuda.memory_allocated(self._device) / GIGA,
                reserved_gb=torch.cuda.memory_reserved(self._device) / GIGA,
            )
        return Memory(allocated_gb=self._held() / GIGA, reserved_gb=self._held() / GIGA)

    def begin_edit(self) -> None:
        """Measure the peak of memory from here on."""
        self._peak.begin()

    def placement(self) -> PlanStatus | None:
        """How the model is placed and what an edit has needed; None until that is decided."""
        loaded = self._loaded
        if loaded is None or (self._device is not None and loaded.plan is None):
            return None
        peak = self._peak.read()
        return replace(
            plan_status(loaded.plan, loaded.opened.precision, loaded.opened.host),
            measured_peak_gb=None if peak is None else peak / GIGA,
            host_gb=loaded.size / GIGA,
        )

    def load(
        self,
        check: Check = never_stop,
        accept: Callable[[Checkpoint], None] = accept_any,
        use: Use = "edit",
    ) -> None:
        """Read the weights from disk into host memory; does nothing if they are there.

        Blocks that the host's memory plan leaves on disk for this use stay there. `accept` is
        given the model before its weights are read, and `check` is called between pieces; if
        either raises, nothing is kept. Raises CheckpointError.
        """
        deque(self.loading(check, accept, use), maxlen=0)

    @torch.inference_mode(False)
    def loading(
        self,
        check: Check = never_stop,
        accept: Callable[[Checkpoint], None] = accept_any,
        use: Use = "edit",
    ) -> Iterator[Read]:
        """Load as `load` does, and yield what has been read; closing the iterator stops it."""
        self._refuse_if_lent()
        if self._loaded is not None and self._loaded.on_disk == self._loaded.opened.host.out(use):
            return
        try:
            if self._loaded is None:
                opened = self._open_checkpoint()
                accept(opened.checkpoint)
                loaded = yield from self._reading(opened, use, check)
                loaded.arena.attach(loaded.host.memories)
            else:
                loaded = yield from self._reading_instead(self._loaded.opened, use, check)
                loaded.arena.bind(loaded.host.memories)
            if self._device is None:
                loaded.stream_from_disk()
        except BaseException as error:
            _forget_locals(error)
            raise
        self._loaded = loaded
        name, size = loaded.opened.checkpoint.name, loaded.arena.size
        logger.info("Unloaded → CPU: %s, %.2f GB", name, size / GIGA)
        if reason := loaded.opened.host.reason():
            logger.info("%s", reason)

    @torch.inference_mode(False)
    def use_loras(self, strengths: Mapping[str, float] | None, check: Check = never_stop) -> None:
        """Put these LoRAs, by name, into the model; None means those it was opened with.

        Only blocks that differ are computed again and copied. If that fails, or `check` raises,
        the model is as before. If the model is not loaded, it will be loaded with them. Raises
        InvalidParameterError for an unknown name, and CheckpointError for a file that does not
        fit.
        """
        self._refuse_if_lent()
        if self._loaded is not None:
            before, wanted = self._loaded.changes, self._loaded.opened.loras.changes(strengths)
            try:
                self._change(self._loaded, wanted, check)
            except BaseException as error:
                _forget_locals(error)
                self._change_back(before)
                raise
        self._wanted = strengths

    @torch.inference_mode(False)
    def onload(self, check: Check = never_stop) -> None:
        """Copy the weights to the device, from disk if necessary; does nothing if they are there.

        `check` is called between pieces. If it raises, or the device's memory runs out, the model
        stays in host memory and nothing is kept on the device.
        """
        self._refuse_if_lent()
        if self._loaded is None:
            self.load(check)
        if self._loaded is None or self._device is None or self._placed is not None:
            return
        slabs: list[Tensor] = []
        try:
            self._placed = self._place(self._loaded, self._device, slabs, check)
        except BaseException as error:
            _forget_locals(error)
            self._free(slabs)
            if isinstance(error, CheckpointError):  # a file of a block on disk has changed
                self.release()
            raise
        self._peak.note()
        logger.info("CPU → GPU: %.2f GB, %s", self._held() / GIGA, self._placed.plan.reason)

    @torch.inference_mode(False)
    def offload(self) -> None:
        """Free the device's memory; the model stays in host memory. Nothing is copied.

        Does nothing if the model is not on the device. What the pipeline keeps of earlier edits is
        in host memory and stays there.
        """
        self._refuse_if_lent()
        if self._loaded is None or self._placed is None:
            return
        slabs = self._leave_device(self._loaded)
        self._loaded.bind_on_host(block.name for block in self._loaded.arena.blocks)
        self._free(slabs)
        logger.info("GPU → CPU")

    def shrink(self) -> bool:
        """Offload, and keep a quarter of the core less on the device until the model is released.

        Less than at the last attempt, also if that failed. False if none of the core was resident.
        """
        if self._loaded is None or self._loaded.core_tried == 0:
            return False
        self._loaded.core_limit = max(0.0, self._loaded.core_tried - 0.25)
        self.offload()
        return True

    @torch.inference_mode(False)
    def release(self) -> None:
        """Forget the model, on the device and in host memory; does nothing if there is none."""
        self._refuse_if_lent()
        loaded = self._loaded
        if loaded is None:
            return
        loaded.opened.checkpoint.pipeline.forget()
        memories = self._leave_device(loaded)  # first: running copies need their pages locked
        if loaded.page_lock is not None:
            loaded.page_lock.undo()
        if loaded.streamer is not None:
            loaded.streamer.close()
        loaded.disk.close()
        # Detach the weights so that stray references do not keep them alive.
        loaded.arena.detach()
        memories += [loaded.arena.memory, *loaded.host.memories.values()]
        self._loaded = loaded = None
        self._free(memories)
        logger.info("released: Unloaded")

    @contextlib.contextmanager
    def on_device(self) -> Iterator[Checkpoint]:
        """Lend the model where it computes; it does not move until it is returned.

        Raises RuntimeError if it is not there: `onload` brings it. If the model's files have
        changed or gone while it is lent, it is released, so that the next edit reads them again.
        """
        self._refuse_if_lent()
        if self._loaded is None or (self._device is not None and self._placed is None):
            raise RuntimeError(f"the model is not on the device: it is {self.location}")
        self._is_lent = True
        try:
            yield self._loaded.opened.checkpoint
        except CheckpointError as error:
            _forget_locals(error)
            self._is_lent = False
            self.release()
            raise
        finally:
            self._is_lent = False
            if self._loaded is not None:
                self._loaded.disk.drop()  # the block that was read ahead

    def _refuse_if_lent(self) -> None:
        if self._is_lent:
            raise RuntimeError("the model is lent, and stays where it is until it is returned")

    def _held(self) -> int:
        """Bytes of the slabs."""
        return 0 if self._placed is None else sum(slab.nbytes for slab in self._placed.slabs)

    def _reading(
        self, opened: OpenedCheckpoint, use: Use, check: Check
    ) -> Generator[Read, None, Loaded]:
        """Read the weights of a checkpoint into host memory; its network gets them from there."""
        changes = opened.loras.changes(self._wanted)
        on_disk = opened.host.out(use)
        arena = Arena(opened.weights, on_disk)
        host = ChangedBlocks(arena)
        yield from arena.filling(check)
        for name in host.differing(changes):
            host.put(name, changes, check)
        disk = ReadAhead(host.read)
        page_lock = None
        if self._device is not None and self._device.type == "cuda":
            parts = lock_order(arena, opened.host.lockable)
            page_lock = PageLock(parts, CudaPages(self._device))
        return Loaded(opened, arena, host, disk, on_disk, changes, page_lock)

    def _reading_instead(
        self, opened: OpenedCheckpoint, use: Use, check: Check
    ) -> Generator[Read, None, Loaded]:
        """Read what this use needs in host memory, which what the last one needed leaves first."""
        assert self._loaded is not None
        core_limit, plan = self._loaded.core_limit, self._loaded.plan
        self.release()
        loaded = yield from self._reading(opened, use, check)
        return replace(loaded, core_limit=core_limit, plan=plan)

    def _place(
        self, loaded: Loaded, device: torch.device, slabs: list[Tensor], check: Check
    ) -> Placed:
        """Put the model on the device; the memory that it takes there is added to `slabs`."""
        blocks = loaded.arena.blocks
        plan = self._choose_plan(blocks)
        if plan.core_share > loaded.core_limit:
            plan = with_share(blocks, loaded.core_limit)
        plan = replace(plan, host=loaded.opened.host)
        loaded.core_tried = plan.core_share
        staying = [block for block in blocks if block.name in plan.resident]
        passing = [block for block in blocks if block.name not in plan.resident]
        resident = self._copy_resident(loaded, staying, device, slabs, check)
        slots = None
        if plan.is_streaming:
            size = slot_size((block.size for block in passing), plan.num_slots)
            slabs.append(self._allocate(plan.num_slots * size, device))
            slots = slabs[-1].view(plan.num_slots, size)
        _synchronize(device)
        loaded.arena.bind(resident)
        streamer = None
        if slots is not None:
            copies = copies_for(device, plan.num_slots, loaded.copy)
            passage = ThroughSlots(passing, loaded.host.memories, loaded.disk, slots, copies)
            modules = loaded.opened.checkpoint.pipeline.modules
            streamer = BlockStreamer(loaded.arena, modules, passing, passage, device)
        loaded.plan = plan
        return Placed(plan, slabs, resident, streamer)

    def _copy_resident(
        self,
        loaded: Loaded,
        staying: Sequence[Block],
        device: torch.device,
        slabs: list[Tensor],
        check: Check,
    ) -> dict[str, Tensor]:
        """Copy the blocks that stay into new slabs, one per component; returns their places."""
        on_disk = [block.name for block in staying if block.name not in loaded.host.memories]
        following = dict(itertools.pairwise(on_disk))
        places = {}
        for _, members in itertools.groupby(staying, key=lambda block: block.component):
            blocks = list(members)
            check()
            slabs.append(self._allocate(sum(block.size for block in blocks), device))
            start = 0
            for block in blocks:
                places[block.name] = slabs[-1][start : start + block.size]
                loaded.put(block.name, places[block.name], check)
                if block.name in following:
                    loaded.disk.begin(following[block.name])
                start += block.size
        return places

    def _change(self, loaded: Loaded, changes: Changes, check: Check) -> None:
        """Change the blocks in host memory, and where they compute."""
        names = loaded.host.differing(changes)
        if names:
            loaded.opened.checkpoint.pipeline.forget_prologues()
        if self._placed is not None and self._placed.streamer is not None:
            self._placed.streamer.forget(names)
        for name in names:
            check()
            loaded.host.put(name, changes, check)
            if self._placed is None:
                loaded.bind_on_host([name])
            elif name in self._placed.resident:  # the others are copied when they are needed
                loaded.put(name, self._placed.resident[name], check)
        if self._device is not None:
            _synchronize(self._device)
        loaded.changes = changes

    def _change_back(self, changes: Changes) -> None:
        """Undo a change that was not completed; if that fails, the model is released."""
        if self._loaded is None:
            return
        try:
            self._change(self._loaded, changes, never_stop)
        except (CheckpointError, MemoryError, RuntimeError):
            logger.exception("a change of LoRAs could not be undone: the model is loaded again")
            self.release()

    def _leave_device(self, loaded: Loaded) -> list[Tensor]:
        """Stop streaming and drop what is kept beside the weights; returns the slabs."""
        loaded.opened.checkpoint.pipeline.forget_tables()
        placed, self._placed = self._placed, None
        if placed is not None and placed.streamer is not None:
            placed.streamer.close()
        loaded.disk.drop()
        return [] if placed is None else placed.slabs

    def _free(self, memories: list[Tensor]) -> None:
        """Drop these tensors, and have the allocator return their memory to the driver."""
        storages = [weakref.ref(memory.untyped_storage()) for memory in memories]
        memories.clear()
        # Collecting takes longer than everything else, and only cycles make it necessary.
        if any(storage() is not None for storage in storages):
            gc.collect()
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.empty_cache()


def _synchronize(device: torch.device) -> None:
    """Wait for the copies to a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget_locals(error: BaseException) -> None:
    """Clear the frames that an error came through: they keep memory alive as long as it lives."""
    traceback.clear_frames(error.__traceback__)
