"""What this machine can run: the answer of a separate process, and what is known without torch.

`survey` is that process. This module does not import it, so that torch stays out of the parent.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Final

from step1x_edit.channel import Start
from step1x_edit.errors import (
    CheckpointError,
    InternalError,
    InvalidParameterError,
    SettingsError,
)
from step1x_edit.schemas.plan import PlanStatus
from step1x_edit.settings import inherited_environment

_CUDA_LIBRARY: Final = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
TIMEOUT_S: Final = 300.0  # enough to import the libraries from a slow disk


@dataclasses.dataclass(frozen=True)
class Survey:
    """The result of an inspection; a part with an error cannot be used."""

    torch: str | None = None
    torch_error: str | None = None
    device: str | None = None
    device_error: str | None = None
    arithmetic: str | None = None
    """The numbers that a CPU computes with, such as `bf16 amx`."""
    device_free_gb: float | None = None
    device_total_gb: float | None = None
    checkpoint: str | None = None
    version: str | None = None
    weights_gb: float | None = None
    checkpoint_error: str | None = None
    size_multiple: int | None = None
    """The sides of an edited picture, in its working size, are multiples of this, in pixels."""
    placement: PlanStatus | None = None
    """How the model would be placed if it were loaded now."""
    upscale: int | None = None
    """How many times the network of UPSCALE_MODEL enlarges; None without one."""
    upscale_error: str | None = None


def inspect_machine(start: Start, timeout_s: float = TIMEOUT_S) -> Survey:
    """Inspect the machine in a separate process, so that torch is never imported in this one."""
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
        plan = found["placement"]
        return Survey(**found | {"placement": None if plan is None else PlanStatus(**plan)})
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        return Survey(torch_error=first_line(last))
    except subprocess.TimeoutExpired:
        return Survey(torch_error=f"no answer within {timeout_s:g} s")
    except (OSError, ValueError, LookupError, TypeError) as error:
        return Survey(torch_error=first_line(f"{type(error).__name__}: {error}"))


def check_device(device: str, number: int) -> None:
    """Raise SettingsError if the driver of the device is missing here, or it has too few GPUs.

    No more is known without torch; the first edit finds out what else is wrong.
    """
    if device.startswith("cuda") and not has_gpu_driver():
        raise SettingsError(
            f"DEVICE is {device}, and this machine has no driver for it ({_CUDA_LIBRARY}); install "
            "the driver, give the container the GPU, or set DEVICE=auto or cpu"
        )
    if number > 1 and device != "cpu" and 0 < (found := _num_gpus()) < number:
        raise SettingsError(
            f"GPUS_PER_EDIT is {number} and the driver finds {found} here: set a lower "
            "GPUS_PER_EDIT, or make more GPUs visible"
        )


def check_upscale_model(path: Path | None) -> None:
    """Raise an error if no picture can be enlarged, as far as it is known without torch."""
    if importlib.util.find_spec("spandrel") is None:
        raise InvalidParameterError(
            "upscale needs an extra: pip install 'step1x-edit[upscale]'", param="upscale"
        )
    if path is None:
        raise InvalidParameterError(
            "upscale needs a model: set UPSCALE_MODEL to a .safetensors or .pth file",
            param="upscale",
        )
    if not path.is_file():
        raise CheckpointError("there is no file at UPSCALE_MODEL")


def has_gpu_driver() -> bool:
    """Whether a driver is installed with which torch can find a card."""
    if Path("/dev/kfd").exists():
        return True  # of AMD, which torch also calls cuda
    try:
        ctypes.CDLL(_CUDA_LIBRARY)
    except OSError:
        return False
    return True


def _num_gpus() -> int:
    """How many cards CUDA's driver lets this process see; 0 if it cannot say."""
    number = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL(_CUDA_LIBRARY)
        driver.cuInit(0)
        driver.cuDeviceGetCount(ctypes.byref(number))
    except (OSError, AttributeError):
        return 0
    return number.value


def first_line(text: str) -> str:
    """The first line of a text, safe to print."""
    first = (text.strip().splitlines() or ["unknown"])[0]
    return str(InternalError(first)).removeprefix(f"{InternalError.beginning}: ")
