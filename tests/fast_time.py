"""An event loop in which a test does not have to wait for timeouts."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
from collections.abc import Iterator

_HAPPENS_WITHIN_S = 0.05


class FastLoop(asyncio.SelectorEventLoop):
    """Jumps to the next timer, within `hurry()`, when nothing else is left to do.

    Timers of the loop fire in their order, so of two timeouts the shorter one comes first.
    """

    _selector: selectors.BaseSelector  # typeshed does not declare it

    def __init__(self) -> None:
        super().__init__()
        self._ahead_s = 0.0
        self._is_hurried = False
        wait = self._selector.select

        def select(timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            if not self._is_hurried or not timeout:
                return wait(timeout)
            events = wait(min(timeout, _HAPPENS_WITHIN_S))
            if not events:
                self._ahead_s += timeout
            return events

        self._selector.select = select  # type: ignore[method-assign]

    def time(self) -> float:
        return super().time() + self._ahead_s

    @contextlib.contextmanager
    def hurry(self) -> Iterator[None]:
        """Let time pass immediately."""
        self._is_hurried = True
        try:
            yield
        finally:
            self._is_hurried = False
