"""The blocks of an arena as they are used: its own, or copies with LoRAs added.

The arena stays as it was read. A block that LoRAs change has a copy, whose memory is reused when
other LoRAs change it; a block that no LoRA changes has none.
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
        """Always the same dictionary, so that its users see each change.

        Blocks that stay on disk are not in it, unless LoRAs change them.
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
