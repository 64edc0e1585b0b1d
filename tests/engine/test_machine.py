"""What is known of a machine without torch."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from step1x_edit.engine.machine import check_device
from step1x_edit.errors import SettingsError


class TwoGpus:
    """CUDA's driver on a machine with two of them."""

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGetCount(self, number: Any) -> int:  # noqa: N802
        number._obj.value = 2
        return 0


def test_more_gpus_than_there_are_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: TwoGpus())

    check_device("cuda", 2)
    check_device("cpu", 4)
    with pytest.raises(SettingsError, match="GPUS_PER_EDIT is 4 and the driver finds 2 here"):
        check_device("auto", 4)
