"""Reading blocks that stay on disk: the next one already while one is in use."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor


class ReadAhead:
    """Reads one block at a time in a thread; at most two are in memory, if the caller drops his."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        """`read` gives the bytes of a block in memory of their own."""
        self._read = read
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._name: str | None = None
        self._begun: Future[Tensor] | None = None

    def begin(self, block: str) -> None:
        """Begin to read a block, unless that is the one begun last; what was begun is dropped."""
        if block != self._name:
            self.drop()
            self._name, self._begun = block, self._reader.submit(self._read, block)

    def take(self, block: str) -> Tensor:
        """The bytes of a block; raises what reading it has raised."""
        self.begin(block)
        begun = self._begun
        self._name, self._begun = None, None
        assert begun is not None
        return begun.result()

    def drop(self) -> None:
        """Forget what has been begun."""
        if self._begun is not None:
            self._begun.cancel()
        self._name, self._begun = None, None

    def close(self) -> None:
        """Wait for what is being read, and read nothing any more."""
        self.drop()
        self._reader.shutdown()
