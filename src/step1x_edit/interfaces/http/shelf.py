"""Results kept in memory for a while, with limits. The module knows nothing about what it keeps."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Shelf(Generic[T]):
    """Things by name, limited by age, bytes and count; the oldest are dropped first."""

    def __init__(
        self,
        kept_s: float,
        kept_bytes: int,
        at_least: int,
        at_most: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kept_s = kept_s
        self._kept_bytes = kept_bytes
        self._at_least = at_least
        self._at_most = at_most
        self._now = now
        self._things: OrderedDict[str, tuple[float, int, T]] = OrderedDict()
        self._bytes = 0

    def put(self, name: str, thing: T, size: int) -> None:
        """Keep a thing of `size` bytes; the newest are kept whatever their size."""
        self.remove(name)
        self._things[name] = self._now() + self._kept_s, size, thing
        self._bytes += size
        self._sweep()

    def get(self, name: str) -> T | None:
        """The thing of this name, if it is still kept."""
        self._sweep()
        found = self._things.get(name)
        return None if found is None else found[2]

    def remove(self, name: str) -> None:
        """Forget a thing; does nothing if there is none of this name."""
        found = self._things.pop(name, None)
        if found is not None:
            self._bytes -= found[1]

    def _sweep(self) -> None:
        while self._things:
            name, (until, _, _) = next(iter(self._things.items()))
            count = len(self._things)
            is_too_much = self._bytes > self._kept_bytes and count > self._at_least
            if until > self._now() and not is_too_much and count <= self._at_most:
                return
            self.remove(name)
