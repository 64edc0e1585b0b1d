"""The peak memory of an edit, as reported by the allocator or the system."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

_REFS: Final = Path("/proc/self/clear_refs")
_STATUS: Final = Path("/proc/self/status")
_RESET_PEAK: Final = "5"  # only the peak of the resident set, see proc(5)


class PeakMeter:
    """Measures from `begin` on: the allocator of a GPU, or this process's resident set.

    For the stand-in of a GPU only the slabs are known; `held` returns their bytes.
    """

    def __init__(self, device: torch.device | None, held: Callable[[], int]) -> None:
        self._device = device
        self._held = held
        self._has_begun = False
        self._highest = 0

    def begin(self) -> None:
        """Start again."""
        self._highest = self._held()
        self._has_begun = True
        if self._device is None:
            self._has_begun = _reset_resident_peak()
        elif self._device.type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.reset_peak_memory_stats(self._device)

    def note(self) -> None:
        """Record what is held now; only the stand-in needs this."""
        self._highest = max(self._highest, self._held())

    def read(self) -> int | None:
        """The most bytes since `begin`; None before that, or if the system does not report it."""
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
    except OSError:  # not Linux, or not allowed: the peak since the start means something else
        return False
    return True


def _resident_peak() -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
