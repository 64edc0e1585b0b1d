"""Block streaming: weights that do not fit where the model computes are brought there in time.

Before a block runs, its parameters become views of the memory that it has come to; afterwards they
are empty, so that missing weights can never be used by mistake. The numbers are those of the files,
so the result is the same bit for bit, whichever blocks are streamed.

On a device a few slots are used in turn: while one block computes, the next is copied into another
slot. A block that is not in host memory is read from disk while the one before it computes, and its
memory is freed as soon as it has been copied. Without a device a block computes in the memory that
it was read into, which is freed as soon as it has run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from step1x_edit.checkpoints.ahead import ReadAhead
from step1x_edit.checkpoints.arena import Arena, Block

Copy = Callable[[Tensor, Tensor], None]
"""Copies the first tensor, in host memory, to the second."""


class Copies(Protocol):
    """Copies blocks into slots while the device computes. A large block takes several slots."""

    def start(self, slots: Sequence[int], source: Tensor, target: Tensor) -> None:
        """Begin to copy as soon as the work that reads the slots has ended."""

    def wait(self, slots: Sequence[int]) -> None:
        """Make all work submitted from now on wait for the copy."""

    def release(self, slots: Sequence[int]) -> None:
        """Mark the work submitted so far as the last that reads the slots."""

    def finish(self) -> None:
        """Wait for all copies."""


class HostCopies:
    """Copies synchronously, for the stand-in."""

    def __init__(self, copy: Copy) -> None:
        self._copy = copy

    def start(self, slots: Sequence[int], source: Tensor, target: Tensor) -> None:
        self._copy(source, target)

    def wait(self, slots: Sequence[int]) -> None:
        pass

    def release(self, slots: Sequence[int]) -> None:
        pass

    def finish(self) -> None:
        pass


class CudaCopies:
    """Copies on a separate CUDA stream."""

    def __init__(self, copy: Copy, device: torch.device, num_slots: int) -> None:
        self._copy = copy
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copied = [torch.cuda.Event() for _ in range(num_slots)]  # type: ignore[no-untyped-call]
        self._consumed = [torch.cuda.Event() for _ in range(num_slots)]  # type: ignore[no-untyped-call]

    def start(self, slots: Sequence[int], source: Tensor, target: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            for slot in slots:
                self._stream.wait_event(self._consumed[slot])
            self._copy(source, target)
            for slot in slots:
                self._copied[slot].record(self._stream)

    def wait(self, slots: Sequence[int]) -> None:
        for slot in slots:
            torch.cuda.current_stream(self._device).wait_event(self._copied[slot])

    def release(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._consumed[slot].record(torch.cuda.current_stream(self._device))

    def finish(self) -> None:
        self._stream.synchronize()


def copies_for(device: torch.device, num_slots: int, copy: Copy) -> Copies:
    """The copies that suit a device."""
    if device.type == "cuda":
        return CudaCopies(copy, device, num_slots)
    return HostCopies(copy)


class Passage(Protocol):
    """How blocks come to where they compute. Blocks are named by their index in execution order."""

    def bring(self, index: int) -> Tensor:
        """The bytes of a block where they are used; prepares the block that probably follows."""

    def release(self, index: int) -> None:
        """Mark the work submitted so far as the last that uses the block."""

    def forget(self, indices: Collection[int]) -> None:
        """Bring these blocks again when they are needed next."""

    def finish(self) -> None:
        """Wait for all copies."""


class BlockStreamer:
    """Brings the blocks of a network that do not stay where it computes, just in time."""

    def __init__(
        self,
        arena: Arena,
        modules: Mapping[str, nn.Module],
        blocks: Sequence[Block],
        passage: Passage,
        device: torch.device,
    ) -> None:
        """`modules` are the network's parts; `blocks` are those to stream, in execution order."""
        self._arena = arena
        self._blocks = blocks
        self._passage = passage
        self._device = device
        self._handles: list[RemovableHandle] = []
        for index, block in enumerate(blocks):
            self._arena.empty(block.name, device)
            part, _, path = block.name.partition(".")
            module = modules[part].get_submodule(path)
            self._handles += [
                module.register_forward_pre_hook(self._before(index)),
                # Also if the block fails or is cancelled.
                module.register_forward_hook(self._after(index), always_call=True),
            ]

    def close(self) -> None:
        """Remove the hooks. The caller must bind the parameters again."""
        for handle in self._handles:
            handle.remove()
        self._passage.finish()

    def forget(self, blocks: Collection[str]) -> None:
        """Bring these blocks again when they are needed next: their weights will change."""
        stale = {index for index, block in enumerate(self._blocks) if block.name in blocks}
        self._passage.forget(stale)

    def _before(self, index: int) -> Callable[..., None]:
        def bring(*_: object) -> None:
            # Tensors made in inference mode are of another kind, and compiled code would notice.
            with torch.inference_mode(False):
                self._arena.bind({self._blocks[index].name: self._passage.bring(index)})

        return bring

    def _after(self, index: int) -> Callable[..., None]:
        def drop(*_: object) -> None:
            with torch.inference_mode(False):
                self._passage.release(index)
                self._arena.empty(self._blocks[index].name, self._device)

        return drop


class FromDisk:
    """Blocks compute in the memory that they are read into: at most two of them are there."""

    def __init__(self, blocks: Sequence[Block], disk: ReadAhead) -> None:
        self._blocks = blocks
        self._disk = disk

    def bring(self, index: int) -> Tensor:
        memory = self._disk.take(self._blocks[index].name)
        self._disk.begin(self._blocks[following(self._blocks, index)].name)
        return memory

    def release(self, index: int) -> None:
        pass

    def forget(self, indices: Collection[int]) -> None:
        self._disk.drop()

    def finish(self) -> None:
        pass


class ThroughSlots:
    """Blocks are copied into slots on the device, from host memory or from disk."""

    def __init__(
        self,
        blocks: Sequence[Block],
        host: Mapping[str, Tensor],
        disk: ReadAhead,
        slots: Tensor,
        copies: Copies,
    ) -> None:
        """Blocks that are not in `host` come from `disk`.

        `slots` (N, size) are bytes on the device; a block larger than one slot takes all of them.
        """
        self._blocks = blocks
        self._host = host
        self._disk = disk
        self._slots = slots
        self._copies = copies
        self._holds: list[int | None] = [None] * len(slots)  # index of the block in each slot
        self._turn = 0

    def bring(self, index: int) -> Tensor:
        slots = self._where(index) or self._fetch(index, range(len(self._slots)))
        self._copies.wait(slots)
        next_one = following(self._blocks, index)
        # Waiting for the disk here would make the device wait too.
        if self._is_in_host(next_one) and not self._where(next_one):
            self._fetch(next_one, [s for s in range(len(self._slots)) if s not in slots])
        self._read_ahead(index)
        return self._memory(index, slots)

    def release(self, index: int) -> None:
        self._copies.release(self._where(index))

    def forget(self, indices: Collection[int]) -> None:
        self._copies.finish()
        self._holds = [None if held in indices else held for held in self._holds]

    def finish(self) -> None:
        self._copies.finish()

    def _where(self, index: int) -> list[int]:
        """The slots that hold this block or are being filled with it; empty if there are none."""
        return [slot for slot, held in enumerate(self._holds) if held == index]

    def _memory(self, index: int, slots: Sequence[int]) -> Tensor:
        """The bytes of a block in its slots."""
        memory = self._slots[slots[0]] if len(slots) == 1 else self._slots.view(-1)
        return memory[: self._blocks[index].size]

    def _fetch(self, index: int, free: Sequence[int]) -> Sequence[int]:
        """Begin to copy a block into free slots; returns them, or none if too few are free."""
        is_large = self._blocks[index].size > self._slots.shape[1]
        wanted = len(self._slots) if is_large else 1
        by_turn = sorted(free, key=lambda slot: (slot - self._turn) % len(self._slots))
        slots = sorted(by_turn[:wanted])
        if len(slots) < wanted:
            return []
        name = self._blocks[index].name
        source = self._host[name] if self._is_in_host(index) else self._read(index)
        self._turn = (slots[-1] + 1) % len(self._slots)
        # A large block is overwritten as a whole; and the new one is not there if copying fails.
        gone = {self._holds[slot] for slot in slots}
        self._holds = [None if held in gone else held for held in self._holds]
        self._copies.start(slots, source, self._memory(index, slots))
        if not self._is_in_host(index):
            self._copies.finish()  # before the memory of the source is freed
        for slot in slots:
            self._holds[slot] = index
        return slots

    def _is_in_host(self, index: int) -> bool:
        return self._blocks[index].name in self._host

    def _read(self, index: int) -> Tensor:
        """A block from disk; the next one is read while this one is copied."""
        source = self._disk.take(self._blocks[index].name)
        self._read_ahead(index)
        return source

    def _read_ahead(self, index: int) -> None:
        """Begin to read the next block that comes from disk, if there is one."""
        passed = {index}
        next_one = following(self._blocks, index)
        while next_one not in passed:
            if not self._is_in_host(next_one):
                if not self._where(next_one):
                    self._disk.begin(self._blocks[next_one].name)
                return
            passed.add(next_one)
            next_one = following(self._blocks, next_one)


def following(blocks: Sequence[Block], index: int) -> int:
    """The block that will probably run next: the core is repeated for each step."""
    next_one = (index + 1) % len(blocks)
    if blocks[index].component == "core" and blocks[next_one].component != "core":
        return next(i for i, block in enumerate(blocks) if block.component == "core")
    return next_one
