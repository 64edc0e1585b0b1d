"""The blocks of an arena as they are used: its own, or with LoRAs added.

If all blocks are in memory, the arena stays as it was read: a block that LoRAs change has a copy,
whose memory is reused when other LoRAs change it. If some stay on disk, memory is too scarce for
copies: blocks in memory are changed in place, and read again to undo that; those on disk are
changed each time they are read.
"""

from __future__ import annotations

from torch import Tensor

from step1x_edit.checkpoints.arena import Arena, Check, DeltaOf, never_stop
from step1x_edit.checkpoints.lora import Changes, Mark


class ChangedBlocks:
    """Host memory for each block, by name."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        names = [block.name for block in arena.blocks]
        self._marks: dict[str, tuple[Mark, ...] | None] = dict.fromkeys(names, ())
        self._deltas: dict[str, DeltaOf] = {}  # of blocks on disk
        self._has_room = len(arena.memories) == len(names)
        self.memories: dict[str, Tensor] = dict(arena.memories)
        """Always the same dictionary, so that its users see each change.

        Blocks that stay on disk are not in it.
        """

    def differing(self, changes: Changes) -> list[str]:
        """The blocks that do not have these changes yet, in execution order."""
        return [name for name, marks in self._marks.items() if marks != self._wanted(name, changes)]

    def put(self, block: str, changes: Changes, check: Check = never_stop) -> None:
        """Apply these changes to a block, and no others.

        `check` is called between its weights; if it raises, or memory runs out, the block counts
        as differing until it is put again.
        """
        wanted, base = self._wanted(block, changes), self._arena.memories.get(block)
        self._marks[block] = None
        if base is None:
            self._deltas[block] = changes.delta_of
        elif not wanted and self._has_room:
            self.memories[block] = base
        else:
            if self._has_room and self.memories[block] is base:
                self.memories[block] = self._arena.room_for(block)
            self._arena.write_changed(block, self.memories[block], changes.delta_of, check)
        self._marks[block] = wanted

    def read(self, block: str) -> Tensor:
        """A block that stays on disk, in new memory; raises as `Arena.fill` does."""
        if not self._marks[block]:
            return self._arena.read(block)
        memory = self._arena.room_for(block)
        self._arena.write_changed(block, memory, self._deltas[block])
        return memory

    def _wanted(self, block: str, changes: Changes) -> tuple[Mark, ...]:
        return changes.marks_of(self._arena.weights_of(block))
