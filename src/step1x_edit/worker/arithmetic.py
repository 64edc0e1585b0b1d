"""Which numbers a CPU computes with: float32, or bfloat16 if that is faster.

A processor may have instructions for bfloat16 and still be slower with them, so they are measured.
The two give slightly different pictures. The choice is therefore made once and kept in DATA_DIR,
and a seed means the same picture after every start. `chosen` makes and keeps such a choice.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from step1x_edit import cache, foreign_json
from step1x_edit.model.processor import bfloat16_instructions
from step1x_edit.settings import inherited_environment

log = logging.getLogger(__name__)

FILE: Final = cache.FOLDER / "arithmetic.json"
FASTER: Final = 1.25
"""How much faster rounder numbers must be in each kind of work: they cost exactness."""
REPEATS: Final = 5
ENOUGH_S: Final = 2.0
"""After this time one attempt more than the first is enough: long work varies less."""

_CPUINFO: Final = Path("/proc/cpuinfo")


def arithmetic_of(dtype: torch.dtype) -> str:
    """The numbers whose products a CPU computes, and the instructions that do it: `bf16 amx`."""
    instructions = bfloat16_instructions()
    if dtype is torch.bfloat16 and instructions:
        return f"bf16 {instructions}"
    return f"fp32 {torch.backends.cpu.get_cpu_capability().lower()}"


def numerics_of(device: str, num_processes: int = 1) -> str:
    """What the rounding of a device depends on: `cpu/avx512/2 threads/torch 2.13.0`.

    Threads divide the sums of a CPU among them, so their number counts too; and several processes
    run the prompts apart: `cpu/avx512/2×1 threads/torch 2.13.0`, `2×NVIDIA H100/torch 2.13.0`.
    """
    times = f"{num_processes}×" if num_processes > 1 else ""
    library = f"torch {torch.__version__.partition('+')[0]}"
    if device.startswith("cuda"):
        return f"{times}{torch.cuda.get_device_name(device)}/{library}"
    if device != "cpu":
        return f"{times}{device}/{library}"
    instructions = torch.backends.cpu.get_cpu_capability().lower()
    threads = f"{times}{threads_of(num_processes)} threads"
    return f"cpu/{instructions}/{threads}/{library}"


def threads_of(num_processes: int) -> int:
    """The threads of each of several processes that share the cores of a CPU."""
    return max(1, torch.get_num_threads() // num_processes)


def fastest(data_dir: Path, measure: Callable[[], dict[str, float]] | None = None) -> torch.dtype:
    """The type of numbers with which this processor is fastest, as found on the first call.

    `measure` returns how much faster bfloat16 is, for each kind of work.
    """
    instructions = bfloat16_instructions()
    if instructions is None:
        return torch.float32
    name = chosen(data_dir, processor(instructions), ("bf16", "fp32"), measure or measure_gains)
    return torch.bfloat16 if name == "bf16" else torch.float32


def chosen(
    data_dir: Path, key: str, names: tuple[str, str], measure: Callable[[], dict[str, float]]
) -> str:
    """The faster one of two kinds of arithmetic, as found on the first call with this key.

    The first one changes pictures. `measure` returns how much faster it is in each kind of work.
    """
    file = data_dir / FILE
    kept = _read(file)
    if key not in kept:
        gains = measure()
        name = names[0] if min(gains.values()) >= FASTER else names[1]
        log.info("%s computes in %s; %s is faster by %s", key, name, names[0], gains)
        # Read again: if another process has finished first, its choice stays.
        kept = {key: {"arithmetic": name, "gains": gains}} | _read(file)
        try:
            cache.replace_file(file, json.dumps(kept, indent=1).encode())
        except OSError as error:
            log.warning("the arithmetic is measured again at the next start: %s", error)
    return str(kept[key].get("arithmetic"))


def measure_gains() -> dict[str, float]:
    """How many times as fast bfloat16 is in the work that edits consist of; half a second."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows, matrix = numbers(1024, 1024), numbers(1024, 1024)
    picture = numbers(1, 64, 128, 128).contiguous(memory_format=torch.channels_last)
    kernel = numbers(64, 64, 3, 3)
    with torch.inference_mode():
        return {
            "products": _gain(F.linear, rows, matrix),
            "convolutions": _gain(lambda x, w: F.conv2d(x, w, padding=1), picture, kernel),
        }


def _gain(work: Callable[[Tensor, Tensor], Tensor], *numbers: Tensor) -> float:
    narrow = [each.bfloat16() for each in numbers]
    try:
        return round(least_seconds(work, *numbers) / least_seconds(work, *narrow), 2)
    except RuntimeError:  # the library has no such kernel for this processor
        return 0.0


def least_seconds(work: Callable[..., object], *numbers: Tensor) -> float:
    """The time of the fastest of a few attempts: other programs can only add time."""
    best, begun = math.inf, time.perf_counter()
    for attempt in range(REPEATS + 1):  # the first one prepares
        start = time.perf_counter()
        if attempt > 1 and start - begun > ENOUGH_S:
            break
        work(*numbers)
        best = min(best, time.perf_counter() - start)
    return best


def processor(instructions: str) -> str:
    """The processor with these instructions, the library, and what limits it."""
    limit = inherited_environment().get("ONEDNN_MAX_CPU_ISA")
    parts = (_processor(), instructions, f"torch {torch.__version__}", limit)
    return ", ".join(filter(None, parts))


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in _CPUINFO.read_text("utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _read(file: Path) -> dict[str, Any]:
    """What was found before; nothing if the file is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        kept = foreign_json.parse(file.read_text("utf-8"))
        if isinstance(kept, dict):
            return {key: value for key, value in kept.items() if isinstance(value, dict)}
    return {}
