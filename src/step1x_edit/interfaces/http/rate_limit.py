"""The rate limit of each caller: requests per minute, with bursts.

It knows nothing about requests; the guard decides who counts as one caller.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

from step1x_edit.errors import RateLimitedError

_BURST: Final = 20
_REMEMBERED: Final = 1000  # callers, before those with a full share are removed


class RateLimit:
    """A token bucket for each caller: requests use it up, and it refills evenly."""

    def __init__(self, per_minute: int, now: Callable[[], float] = time.monotonic) -> None:
        """With `per_minute` 0 there is no limit."""
        self._per_minute = per_minute
        self._burst = max(1, min(_BURST, per_minute // 3))
        self._now = now
        self._whole_at: dict[str, float] = {}  # the time when a caller's share is full again

    def spend(self, caller: str) -> None:
        """Use one request of the caller's share; raises RateLimitedError if it is used up."""
        if self._per_minute == 0:
            return
        now, each_s = self._now(), 60 / self._per_minute
        whole_at = max(now, self._whole_at.get(caller, now)) + each_s
        wait_s = whole_at - now - self._burst * each_s
        if wait_s > 1e-6:  # less is a rounding error
            raise RateLimitedError(
                f"at most {self._per_minute} a minute (RATE_LIMIT), try again in "
                f"{math.ceil(wait_s)} s",
                retry_after_s=wait_s,
            )
        self._whole_at[caller] = whole_at
        if len(self._whole_at) > _REMEMBERED:
            self._whole_at = {who: at for who, at in self._whole_at.items() if at > now}
