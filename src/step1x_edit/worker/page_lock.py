"""Page-locking of host memory, which lets copies to a GPU run at the full bandwidth."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

from step1x_edit.channel import GIGA
from step1x_edit.checkpoints.arena import PIECE, Arena

logger = logging.getLogger(__name__)

LOCKED_AT_ONCE: Final = 2**30
"""Bytes per call: calls for hundreds of gigabytes fail."""


class Pages(Protocol):
    """A system that page-locks memory."""

    def lock(self, address: int, size: int) -> None: ...  # raises RuntimeError

    def unlock(self, address: int) -> None: ...


class CudaPages:
    """Page-locking by the CUDA runtime."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]

    def lock(self, address: int, size: int) -> None:
        with torch.cuda.device(self._device):
            result = int(self._runtime.cudaHostRegister(address, size, 0))
        if result != 0:
            raise RuntimeError(f"cudaHostRegister says {result}")

    def unlock(self, address: int) -> None:
        with torch.cuda.device(self._device):
            self._runtime.cudaHostUnregister(address)


class PageLock:
    """Page-locks host memory in the background.

    If the system refuses, copies go through the driver's own buffers: slower, but correct.
    """

    def __init__(
        self, memories: Sequence[Tensor], pages: Pages, at_once: int = LOCKED_AT_ONCE
    ) -> None:
        """`memories` are locked in this order."""
        self._memories = memories
        self._pages = pages
        self._at_once = at_once
        self._locked: list[int] = []
        self._is_stopped = threading.Event()
        self._locking = threading.Lock()
        # The CUDA runtime keeps the last error of each thread and returns it from the next call
        # on that thread. In a separate thread a refusal disturbs no other call.
        self._thread = threading.Thread(target=self._lock_all, name="page-lock", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Lock nothing within this context, so that a copy sees either locked pages or not."""
        with self._locking:
            yield

    def undo(self) -> None:
        """Unlock everything; waits for the call that is running."""
        self._is_stopped.set()
        self._thread.join()
        for address in self._locked:
            self._pages.unlock(address)
        self._locked.clear()

    def _lock_all(self) -> None:
        for memory in self._memories:
            for offset in range(0, memory.nbytes, self._at_once):
                if self._is_stopped.is_set():
                    return
                address = memory.data_ptr() + offset
                try:
                    with self._locking:
                        self._pages.lock(address, min(self._at_once, memory.nbytes - offset))
                except RuntimeError as error:
                    logger.info("host memory stays pageable: %s", error)
                    return
                self._locked.append(address)
        locked = sum(memory.nbytes for memory in self._memories)
        logger.info("page-locked %.2f GB of host memory", locked / GIGA)


def lock_order(arena: Arena, lockable: int | None) -> list[Tensor]:
    """The parts of an arena to page-lock, at most `lockable` bytes in total.

    The core comes first, because each step copies it. Parts end at the edges of copied pieces.
    """
    offsets = [
        (block.offset, block.offset + block.size)
        for block in arena.blocks
        if block.component == "core" and block.offset is not None
    ]
    start = min((first for first, _ in offsets), default=0) // PIECE * PIECE
    stop = -(-max((last for _, last in offsets), default=0) // PIECE) * PIECE
    parts = []
    room = arena.size if lockable is None else lockable
    for part in (arena.memory[start:stop], arena.memory[:start], arena.memory[stop:]):
        if part.nbytes > room:
            part = part[: room // PIECE * PIECE]
        if part.nbytes:
            parts.append(part)
        room -= part.nbytes
    return parts
