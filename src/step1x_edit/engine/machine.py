"""What this machine can run, as far as the parent may know it: the answer of a process that looks.

`survey` is that process. This module does not import it, so that torch stays out of ours.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Final

from step1x_edit.channel import Start
from step1x_edit.errors import InternalError, SettingsError
from step1x_edit.schemas.requests import PlanStatus
from step1x_edit.settings import inherited_environment

_CUDA_LIBRARY: Final = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_TIMEOUT_S: Final = 300.0  # libraries on a slow disk, and no more than that


@dataclasses.dataclass(frozen=True)
class Survey:
    """What was found; what has an error cannot be used."""

    torch: str | None = None
    torch_error: str | None = None
    device: str | None = None
    device_error: str | None = None
    device_free_gb: float | None = None
    device_total_gb: float | None = None
    checkpoint: str | None = None
    version: str | None = None
    weights_gb: float | None = None
    checkpoint_error: str | None = None
    size_multiple: int | None = None
    """Sides of an edited picture, in its working size, are multiples of so many pixels."""
    placement: PlanStatus | None = None
    """What would be kept where if the model were loaded now."""


def look(start: Start, timeout_s: float = _TIMEOUT_S) -> Survey:
    """Have a process of its own look, so that nothing of torch stays in ours."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "step1x_edit.worker.survey"],
            input=json.dumps(dataclasses.asdict(start)),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=inherited_environment(PYTHONSAFEPATH="1"),
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        if found["placement"] is not None:
            found["placement"] = PlanStatus(**found["placement"])
        return Survey(**found)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        return Survey(torch_error=first_line(last))
    except subprocess.TimeoutExpired:
        return Survey(torch_error=f"no answer within {timeout_s:g} s")
    except (OSError, ValueError, LookupError, TypeError) as error:
        return Survey(torch_error=first_line(f"{type(error).__name__}: {error}"))


def check_device(device: str) -> None:
    """Raise SettingsError if a device is asked for whose driver is not on this machine.

    Without torch no more can be known: how many cards there are is found by the first edit.
    """
    if device.startswith("cuda") and not has_gpu_driver():
        raise SettingsError(
            f"DEVICE is {device}, and this machine has no driver for it ({_CUDA_LIBRARY}); install "
            "the driver, give the container the GPU, or set DEVICE=auto or cpu"
        )


def has_gpu_driver() -> bool:
    """Whether a driver is installed by which torch could find a card."""
    if Path("/dev/kfd").exists():
        return True  # AMD's, which torch calls cuda as well
    try:
        ctypes.CDLL(_CUDA_LIBRARY)
    except OSError:
        return False
    return True


def first_line(text: str) -> str:
    """Of a text with many lines the first, safe to print."""
    first = (text.strip().splitlines() or ["unknown"])[0]
    return str(InternalError(first)).removeprefix(f"{InternalError.beginning}: ")
