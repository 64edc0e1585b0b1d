"""Reading blocks that stay on disk, the next one while one is in use."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor


class ReadAhead:
    """Reads one block at a time in a thread; at most two are in memory if the caller drops one."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        """`read` returns the bytes of a block in new memory."""
        self._read = read
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._name: str | None = None
        self._begun: Future[Tensor] | None = None

    def begin(self, block: str) -> None:
        """Begin to read a block, unless it was begun last; drops another one."""
        if block != self._name:
            self.drop()
            self._name, self._begun = block, self._reader.submit(self._read, block)

    def take(self, block: str) -> Tensor:
        """The bytes of a block; raises the error of reading it."""
        self.begin(block)
        begun = self._begun
        self._name, self._begun = None, None
        assert begun is not None
        return begun.result()

    def drop(self) -> None:
        """Drop the block that was begun."""
        if self._begun is not None:
            self._begun.cancel()
        self._name, self._begun = None, None

    def close(self) -> None:
        """Wait for the block that is being read, and read no more."""
        self.drop()
        self._reader.shutdown()
