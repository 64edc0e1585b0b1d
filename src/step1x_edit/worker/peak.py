"""The most memory that an edit has needed, as the allocator or the system tells it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

_REFS: Final = Path("/proc/self/clear_refs")
_STATUS: Final = Path("/proc/self/status")
_RESET_PEAK: Final = "5"  # of the resident set, says proc(5); nothing else is touched


class PeakMeter:
    """Measures from `begin` on: on a GPU its allocator, without one this process's resident set.

    Of the stand-in for a GPU the slabs are all there is to know; `held` tells their bytes.
    """

    def __init__(self, device: torch.device | None, held: Callable[[], int]) -> None:
        self._device = device
        self._held = held
        self._has_begun = False
        self._highest = 0

    def begin(self) -> None:
        """Forget what was before."""
        self._highest = self._held()
        self._has_begun = True
        if self._device is None:
            self._has_begun = _reset_resident_peak()
        elif self._device.type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.reset_peak_memory_stats(self._device)

    def note(self) -> None:
        """Take down what is held now; only a stand-in has to be told."""
        self._highest = max(self._highest, self._held())

    def read(self) -> int | None:
        """The most bytes since `begin`; None if nobody has begun, or the system does not tell."""
        if not self._has_begun:
            return None
        if self._device is None:
            return _resident_peak()
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return self._highest


def _reset_resident_peak() -> bool:
    try:
        _REFS.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:  # not Linux, or not allowed: a peak since the start would say something else
        return False
    return True


def _resident_peak() -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
