"""Residency: where the model is, and how it gets from disk to host memory, to the device and back.

    Unloaded --load--> CPU --onload--> GPU
    Unloaded <--release-- CPU <--offload-- GPU

Weights never change, so the arena in host memory stays valid for as long as the model is loaded:
onloading copies its blocks into slabs on the device and lets the network's parameters be views
into them; offloading turns the parameters back to the arena, drops the slabs and copies nothing.
What the memory plan does not keep on the device passes through it while the model computes.
Blocks for which the host has no memory stay on disk and are read each time they are needed.
LoRAs are added to copies of the blocks that they change, of which only the changed ones move.
Residency belongs to one thread and has no lock. It knows nothing of jobs, pipes or users' files.

Moves are made outside of inference mode whatever the caller is in: tensors born in it are of
another kind, and compiled code would be compiled anew for them.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from step1x_edit.channel import GIB, Memory, Placement
from step1x_edit.checkpoints.ahead import ReadAhead
from step1x_edit.checkpoints.arena import PIECE, Arena, Block, Weight, never_stop
from step1x_edit.checkpoints.changed import ChangedBlocks
from step1x_edit.checkpoints.lora import Changes, Loras
from step1x_edit.checkpoints.memory_plan import (
    HostPlan,
    MemoryPlan,
    everything,
    slot_size,
    with_share,
)
from step1x_edit.checkpoints.read import Checkpoint, OpenedCheckpoint
from step1x_edit.errors import CheckpointError
from step1x_edit.worker.page_lock import CudaPages, PageLock, lock_order
from step1x_edit.worker.peak import PeakMeter
from step1x_edit.worker.streaming import BlockStreamer, copies_for

if TYPE_CHECKING:
    from step1x_edit.schemas.requests import Location

logger = logging.getLogger(__name__)

_PRECISIONS: Final = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def allocate_slab(size: int, device: torch.device) -> Tensor:
    """Take memory on the device. Raises torch.OutOfMemoryError."""
    return torch.empty(size, dtype=torch.uint8, device=device)


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
        """`plan` says, each time the model goes to the device, what will live there."""
        self._open_checkpoint = open_checkpoint
        self._device = device
        self._allocate = allocate
        self._choose_plan = plan
        self._checkpoint: Checkpoint | None = None
        self._arena: Arena | None = None
        self._host: ChangedBlocks | None = None
        self._loras = Loras()  # that there are
        self._changes = Changes()  # that are in the model
        self._wanted: Mapping[str, float] | None = None  # of LoRAs, when the model is loaded
        self._plan: MemoryPlan | None = None  # of what is on the device
        self._last_plan: MemoryPlan | None = None  # or was there before it was offloaded
        self._precision = ""
        self._peak = PeakMeter(device, lambda: sum(slab.nbytes for slab in self._slabs))
        self._resident: dict[str, Tensor] = {}  # where in the slabs the blocks are that stay
        self._most_of_core = 1.0  # that may stay, as a share of its bytes
        self._tried_of_core = 0.0  # the last time
        self._slabs: list[Tensor] = []
        self._streamer: BlockStreamer | None = None
        self._disk: ReadAhead | None = None  # reads the blocks that are not in host memory
        self._host_plan = HostPlan()
        self._page_lock: PageLock | None = None
        self._is_lent = False

    @property
    def location(self) -> Location:
        """Where the numbers of the parameters lie, by their addresses."""
        if self._arena is None:
            return "Unloaded"
        if self._plan is None or not self._arena.lies_in(self._slabs, self._plan.resident):
            return "CPU"
        return "GPU"

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The loaded checkpoint, to be asked for its name; to compute with it, borrow it."""
        return self._checkpoint

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the loaded model in execution order; none if there is none."""
        return self._arena.blocks if self._arena else ()

    @property
    def plan(self) -> MemoryPlan | None:
        """What lives on the device and what passes through it; None while nothing is there."""
        return self._plan

    @property
    def loras(self) -> Mapping[str, float]:
        """The LoRAs that are in the model, and how much of each."""
        return self._changes.strengths

    def has_loras(self, strengths: Mapping[str, float] | None) -> bool:
        """Whether the model is loaded, and as `use_loras` would make it."""
        return self._host is not None and self._loras.marks(strengths) == self._changes.marks

    def memory(self) -> Memory:
        """What the device's allocator says; of a stand-in, the bytes of the slabs."""
        if self._device is None:
            return Memory()
        if self._device.type == "cuda":
            return Memory(
                allocated_gb=torch.cuda.memory_allocated(self._device) / GIB,
                reserved_gb=torch.cuda.memory_reserved(self._device) / GIB,
            )
        taken_gb = sum(slab.nbytes for slab in self._slabs) / GIB
        return Memory(allocated_gb=taken_gb, reserved_gb=taken_gb)

    def begin_edit(self) -> None:
        """Measure the peak of memory anew from here."""
        self._peak.begin()

    def placement(self) -> Placement | None:
        """How the model is placed and what an edit has needed; None while that is not decided."""
        if self._host is None or self._arena is None:
            return None
        if self._device is not None and self._last_plan is None:
            return None
        storages = {
            memory.data_ptr(): memory.nbytes()
            for memory in (
                host.untyped_storage()
                for host in (self._arena.memory, *self._host.memories.values())
            )
        }
        peak = self._peak.read()
        return replace(
            placement_of(self._last_plan, self._precision, self._host_plan),
            measured_peak_gb=None if peak is None else peak / GIB,
            host_gb=sum(storages.values()) / GIB,
        )

    @torch.inference_mode(False)
    def load(
        self,
        check: Callable[[], None] = never_stop,
        accept: Callable[[Checkpoint], None] = lambda checkpoint: None,
    ) -> None:
        """Read the weights from disk into host memory; does nothing if they are there.

        What its memory plan leaves on disk stays there, if there is a device. `accept` is shown
        the model before its weights are read, and `check` is called between pieces; if either
        raises, nothing is kept. Raises CheckpointError.
        """
        self._refuse_if_lent()
        if self._arena is not None:
            return
        opened = self._open_checkpoint()
        accept(opened.checkpoint)
        changes = opened.loras.changes(self._wanted)
        plan = opened.host
        arena = Arena(opened.weights, plan.on_disk if self._device is not None else ())
        host = ChangedBlocks(arena)
        try:
            arena.fill(check)
            for name in host.differing(changes):
                host.put(name, changes, check)
        except BaseException as error:
            _forget_locals(error)
            del arena, host
            raise
        arena.attach(host.memories)
        self._disk, self._host_plan = ReadAhead(arena.read), plan
        self._checkpoint, self._arena, self._host = opened.checkpoint, arena, host
        self._precision = precision_of(opened.weights)
        self._loras, self._changes = opened.loras, changes
        if self._device is not None and self._device.type == "cuda":
            parts = lock_order(arena, plan.lockable)
            self._page_lock = PageLock(parts, CudaPages(self._device))
        logger.info("Unloaded → CPU: %s, %.2f GB", opened.checkpoint.name, arena.size / GIB)

    @torch.inference_mode(False)
    def use_loras(
        self, strengths: Mapping[str, float] | None, check: Callable[[], None] = never_stop
    ) -> None:
        """Have these LoRAs in the model, by their names; None is as the checkpoint was opened.

        Only blocks that differ are made anew and copied to where they lie. If that fails, or
        `check` raises in between, the model is as before. A model that is not loaded will be
        loaded so. Raises InvalidParameterError for a name that there is not, and CheckpointError
        for a file that does not fit.
        """
        self._refuse_if_lent()
        if self._host is not None:
            before, wanted = self._changes, self._loras.changes(strengths)
            try:
                self._change(wanted, check)
            except BaseException as error:
                _forget_locals(error)
                self._change_back(before)
                raise
            self._changes = wanted
        self._wanted = strengths

    @torch.inference_mode(False)
    def onload(self, check: Callable[[], None] = never_stop) -> None:
        """Copy the weights to the device, from disk if need be; does nothing if they are there.

        `check` is called between pieces. If it raises, or the device's memory runs out, the model
        stays in host memory and nothing is kept on the device.
        """
        self._refuse_if_lent()
        self.load(check)
        if self._device is None or self._plan is not None:
            return
        assert self._arena is not None
        assert self._host is not None
        assert self._checkpoint is not None
        plan = self._choose_plan(self._arena.blocks)
        if plan.core_share > self._most_of_core:
            plan = with_share(self._arena.blocks, self._most_of_core)
        plan = replace(plan, host=self._host_plan)
        self._tried_of_core = plan.core_share
        slabs: list[Tensor] = []
        try:
            resident = self._place(plan, slabs, check)
            slots = self._slots(plan, slabs)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        except BaseException as error:
            _forget_locals(error)
            storages = [weakref.ref(slab.untyped_storage()) for slab in slabs]
            slabs.clear()
            self._give_back(storages)
            if isinstance(error, CheckpointError):  # what was left on disk is not there any more
                self.release()
            raise
        self._arena.bind(resident)
        self._resident = resident
        if slots is not None:
            self._streamer = BlockStreamer(
                self._arena,
                self._host.memories,
                self._checkpoint.pipeline.modules,
                [block for block in self._arena.blocks if block.name not in plan.resident],
                slots,
                copies_for(self._device, len(slots), self._copy),
                self._disk,
            )
        self._slabs, self._plan, self._last_plan = slabs, plan, plan
        self._peak.note()
        logger.info("CPU → GPU: %.2f GB, %s", sum(s.nbytes for s in slabs) / GIB, plan.reason)

    @torch.inference_mode(False)
    def offload(self) -> None:
        """Free the device's memory; the model is in host memory. Nothing is copied.

        Does nothing if the model is not on the device.
        """
        self._refuse_if_lent()
        if self._arena is None or self._host is None or self._plan is None:
            return
        self._leave_device()
        self._bind_on_host(block.name for block in self._arena.blocks)
        storages = [weakref.ref(slab.untyped_storage()) for slab in self._slabs]
        self._slabs, self._resident, self._plan = [], {}, None
        self._give_back(storages)
        logger.info("GPU → CPU")

    def shrink(self) -> bool:
        """Offload, and keep a quarter of the core less on the device from now on, until released.

        Less than the last time, also if that has failed. False if nothing is left to leave out.
        """
        if self._tried_of_core == 0:
            return False
        self._most_of_core = max(0.0, self._tried_of_core - 0.25)
        self.offload()
        return True

    @torch.inference_mode(False)
    def release(self) -> None:
        """Forget the model, on the device and in host memory; does nothing if there is none."""
        self._refuse_if_lent()
        if self._arena is None or self._host is None:
            return
        self._leave_device()  # first, because a copy that is under way needs its pages locked
        if self._page_lock is not None:
            self._page_lock.undo()
        if self._disk is not None:
            self._disk.close()
        # Whoever still holds the network, holds no weights.
        self._arena.detach()
        memories = [self._arena.memory, *self._host.memories.values(), *self._slabs]
        storages = [weakref.ref(memory.untyped_storage()) for memory in memories]
        del memories
        self._checkpoint, self._arena, self._page_lock = None, None, None
        self._disk, self._host_plan = None, HostPlan()
        self._host, self._slabs, self._resident = None, [], {}
        self._plan, self._last_plan = None, None
        self._loras, self._changes = Loras(), Changes()
        self._most_of_core, self._tried_of_core = 1.0, 0.0
        self._give_back(storages)
        logger.info("released: Unloaded")

    @contextlib.contextmanager
    def on_device(self) -> Iterator[Checkpoint]:
        """Lend the model where it computes; nothing moves it until it is given back.

        Raises RuntimeError if it is not there: `onload` brings it. A model whose files have
        changed or gone while it is lent is released, so that the next edit reads them anew.
        """
        self._refuse_if_lent()
        if self._checkpoint is None or (self._device is not None and self._plan is None):
            raise RuntimeError(f"the model is not on the device: it is {self.location}")
        self._is_lent = True
        try:
            yield self._checkpoint
        except CheckpointError as error:
            _forget_locals(error)
            self._is_lent = False
            self.release()
            raise
        finally:
            self._is_lent = False
            if self._disk is not None:
                self._disk.drop()  # what would have been next

    def _refuse_if_lent(self) -> None:
        if self._is_lent:
            raise RuntimeError("the model is lent, and stays where it is until it is given back")

    def _place(
        self, plan: MemoryPlan, slabs: list[Tensor], check: Callable[[], None]
    ) -> dict[str, Tensor]:
        """Copy what is to stay into new slabs, one for each component; tells where it lies."""
        assert self._arena is not None
        assert self._host is not None
        assert self._disk is not None
        assert self._device is not None
        staying = [block for block in self._arena.blocks if block.name in plan.resident]
        on_disk = [block.name for block in staying if block.name not in self._host.memories]
        places = {}
        for _, members in itertools.groupby(staying, key=lambda block: block.component):
            blocks = list(members)
            check()
            slab = self._allocate(sum(block.size for block in blocks), self._device)
            slabs.append(slab)
            start = 0
            for block in blocks:
                places[block.name] = slab[start : start + block.size]
                self._put(block.name, places[block.name], check)
                if block.name in on_disk[:-1]:
                    self._disk.begin(on_disk[on_disk.index(block.name) + 1])
                start += block.size
        return places

    def _put(self, block: str, target: Tensor, check: Callable[[], None]) -> None:
        """Copy a block to where it lies on the device, from host memory or from disk."""
        assert self._host is not None
        assert self._disk is not None
        if block in self._host.memories:
            self._copy(self._host.memories[block], target, check)
            return
        self._copy(self._disk.take(block), target, check)
        if target.is_cuda:  # what has been read is let go
            torch.cuda.synchronize(target.device)

    def _bind_on_host(self, blocks: Iterable[str]) -> None:
        """Turn blocks to host memory; what is not there is nowhere."""
        assert self._arena is not None
        assert self._host is not None
        for block in blocks:
            if block in self._host.memories:
                self._arena.bind({block: self._host.memories[block]})
            else:
                self._arena.empty(block, torch.device("cpu"))

    def _slots(self, plan: MemoryPlan, slabs: list[Tensor]) -> Tensor | None:
        """Room for what passes, in one slab."""
        assert self._arena is not None
        assert self._device is not None
        if not plan.is_streaming:
            return None
        passing = (block.size for block in self._arena.blocks if block.name not in plan.resident)
        size = slot_size(passing, plan.num_slots)
        slabs.append(self._allocate(plan.num_slots * size, self._device))
        return slabs[-1].view(plan.num_slots, size)

    def _change(self, changes: Changes, check: Callable[[], None]) -> None:
        """Make the blocks as these changes make them, in host memory and where they compute."""
        assert self._arena is not None
        assert self._host is not None
        names = self._host.differing(changes)
        if self._streamer is not None:
            self._streamer.forget(names)
        for name in names:
            check()
            self._host.put(name, changes, check)
            if self._plan is None:
                self._bind_on_host([name])
            elif name in self._resident:  # the others pass, and are copied when their turn comes
                self._put(name, self._resident[name], check)
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _change_back(self, changes: Changes) -> None:
        """Undo what has been done of a change; a model for which that fails is released."""
        try:
            self._change(changes, never_stop)
        except (CheckpointError, MemoryError, RuntimeError):
            logger.exception("a change of LoRAs could not be undone: the model is loaded anew")
            self.release()

    def _leave_device(self) -> None:
        """Stop the blocks that pass, and forget what was kept beside the weights."""
        if self._checkpoint is not None:
            self._checkpoint.pipeline.forget_tables()
        if self._streamer is not None:
            self._streamer.close()
            self._streamer = None
        if self._disk is not None:
            self._disk.drop()

    def _copy(self, source: Tensor, target: Tensor, check: Callable[[], None] = never_stop) -> None:
        """Copy a block in pieces."""
        # Pieces end where the arena's do, so that none is half page-locked: CUDA refuses those.
        start, end = source.storage_offset(), source.storage_offset() + source.nbytes
        edges = [start, *range((start // PIECE + 1) * PIECE, end, PIECE), end]
        for first, last in itertools.pairwise(edges):
            check()
            place = slice(first - start, last - start)
            with self._page_lock.paused() if self._page_lock else contextlib.nullcontext():
                target[place].copy_(source[place], non_blocking=True)

    def _give_back(self, storages: Iterable[weakref.ref[torch.UntypedStorage]]) -> None:
        """Let the allocator return to the driver what has just been dropped."""
        # Collecting takes longer than all the rest, and only cycles make it necessary.
        if any(storage() is not None for storage in storages):
            gc.collect()
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.empty_cache()


def placement_of(plan: MemoryPlan | None, precision: str, host: HostPlan) -> Placement:
    """What there is to tell of a plan; without one the model computes in host memory."""
    if plan is None:
        return Placement(
            resident_share=1.0,
            precision=precision,
            streaming=False,
            slots=0,
            joint_branches=True,
            reason="; ".join(filter(None, ("the model computes in host memory", host.reason()))),
        )
    return Placement(
        resident_share=plan.core_share,
        precision=precision,
        streaming=plan.is_streaming,
        slots=plan.num_slots,
        joint_branches=plan.has_joint_branches,
        reason=plan.reason,
        predicted_peak_gb=plan.peak / GIB,
    )


def precision_of(weights: Iterable[Weight]) -> str:
    """In which numbers the transformer computes, or in which codes its matrices are kept."""
    weights = [weight for weight in weights if weight.name.startswith("transformer.")]
    code = next((weight.code for weight in weights if weight.code is not None), None)
    if code is not None:
        return code
    dtype = weights[0].dtype
    return _PRECISIONS.get(dtype, str(dtype).removeprefix("torch."))


def _forget_locals(error: BaseException) -> None:
    """Empty the frames that an error came through: they would keep memory as long as it lives."""
    traceback.clear_frames(error.__traceback__)
