"""The blocks of an arena as they are to be used: its own, or copies with LoRAs in them.

The arena stays as it was read. A block that LoRAs change has a copy, whose memory is used again
when other LoRAs change it; one that none changes any more has none.
"""

from __future__ import annotations

from torch import Tensor

from step1x_edit.checkpoints.arena import Arena, Check, never_stop
from step1x_edit.checkpoints.lora import Changes, Mark


class ChangedBlocks:
    """Host memory for each block, by name."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        names = (block.name for block in arena.blocks)
        self._marks: dict[str, tuple[Mark, ...] | None] = dict.fromkeys(names, ())
        self.memories: dict[str, Tensor] = dict(arena.memories)
        """Always the same dictionary, so that whoever copies from it sees what is there now.

        Blocks that stay on disk are not in it, unless LoRAs change them.
        """

    def differing(self, changes: Changes) -> list[str]:
        """The blocks that are not as these changes make them, in execution order."""
        return [name for name, marks in self._marks.items() if marks != self._wanted(name, changes)]

    def put(self, block: str, changes: Changes, check: Check = never_stop) -> None:
        """Make a block as these changes make it.

        `check` is called between its weights; if it raises, or memory runs out, the block differs
        from everything until it is put again.
        """
        wanted, base = self._wanted(block, changes), self._arena.memories.get(block)
        self._marks[block] = None
        if wanted:
            if self.memories.get(block) is base:
                self.memories[block] = self._arena.room_for(block)
            self._arena.write_changed(block, self.memories[block], changes.delta_of, check)
        elif base is None:
            self.memories.pop(block, None)
        else:
            self.memories[block] = base
        self._marks[block] = wanted

    def _wanted(self, block: str, changes: Changes) -> tuple[Mark, ...]:
        return changes.marks_of(self._arena.weights_of(block))
