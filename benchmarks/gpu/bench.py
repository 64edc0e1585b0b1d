"""Shared by the sections: the run, the networks, the clock and the rows of figures."""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import bench_residency
from bench_residency import GB, held_gb, synchronize
from gpu.networks import NUM_STEPS, encoded_prompts, our_network, peer_network
from step1x_edit.model.config import V1_1, ConnectorConfig, ModelConfig, TransformerConfig
from step1x_edit.model.denoising import Encoded
from step1x_edit.model.transformer import Transformer

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

Figures = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """The parameters of a run: sizes of the network, the pictures and the caps."""

    model: ModelConfig
    pictures: dict[int, int]
    """Side in pixels, and the number of the 28 steps that are run."""
    valid: tuple[int, int]
    """Rows of the two prompts that are not padding."""
    matrix: int
    caps_gb: tuple[float, ...]
    file_transformer: TransformerConfig
    """The bytes written to disk to be read back."""
    backend: str
    """Who compiles."""


FULL = Scale(
    model=V1_1,
    pictures={512: 28, 768: 8, 1024: 8},
    valid=(352, 340),
    matrix=8192,
    caps_gb=(24, 16, 12, 8, 6),
    file_transformer=bench_residency.scaled(6.0),
    backend="inductor",
)
SMALL_TRANSFORMER = TransformerConfig(
    hidden_size=32,
    num_heads=2,
    axes_dim=(4, 6, 6),
    depth=1,
    depth_single=1,
    vec_in_dim=24,
    connector=ConnectorConfig(in_features=20, hidden_size=16, num_heads=2),
)
SMALL = Scale(
    model=replace(
        V1_1,
        version="small",
        transformer=SMALL_TRANSFORMER,
        conditioner=replace(V1_1.conditioner, text_length=12),
    ),
    pictures={32: 28, 64: 2},
    valid=(9, 5),
    matrix=64,
    caps_gb=(3.0, 2.0),  # the plan's fixed costs are those of a real GPU
    file_transformer=SMALL_TRANSFORMER,
    backend="eager",  # torch.compile's backend that compiles nothing
)


@dataclass
class Bench:
    """The networks, created at their first use, and values that sections share."""

    scale: Scale
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    is_over: Callable[[], bool] = lambda: False
    """Whether the section's time is up; checked between steps."""
    exact: list[Tensor] = field(default_factory=list)
    """Velocities of the smallest picture, computed in float32 from the same weights."""
    floor: float | None = None
    """The error of the plain path against these."""
    finals: dict[str, Tensor] = field(default_factory=dict)
    """The last latents of the smallest picture, by the path that computed them."""

    @cached_property
    def ours(self) -> Transformer:
        return our_network(self.scale.model.transformer, self.device, self.dtype)

    @cached_property
    def reference(self) -> Transformer:
        """The network whose weights the plain path uses: ours."""
        return self.ours

    @cached_property
    def peer(self) -> FluxTransformer2DModel:
        return peer_network(self.scale.model.transformer, self.device, self.dtype)

    def drop(self, *names: str) -> None:
        """Free the memory of these networks."""
        for name in names:
            self.__dict__.pop(name, None)
        gc.collect()  # compiled code has reference cycles
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def encoded(self, pixels: int) -> Encoded:
        return encoded_prompts(self.scale.model, pixels, self.scale.valid, self.device)

    @property
    def smallest(self) -> int:
        return min(self.scale.pictures)


# --- tools ----------------------------------------------------------------------------------------


def relative(found: Tensor, expected: Tensor) -> float:
    """The distance relative to the expected tensor; infinite if a number is not finite."""
    distance = float((found - expected).norm() / expected.norm())
    return distance if distance == distance else float("inf")


def furthest(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    return max(relative(one, other) for one, other in zip(found, expected, strict=True))


def block_tflop(config: TransformerConfig, text: int, image: int) -> float:
    """The work of a step of the reference: all blocks, all rows, both prompts."""
    rows, blocks = text + 2 * image, config.depth + config.depth_single
    products = 2 * 12 * config.hidden_size**2 * rows
    attention = 4 * rows**2 * config.hidden_size
    return 2 * blocks * (products + attention) / 1e12


def best_seconds(device: torch.device, act: Callable[[], object], repeat: int = 5) -> float:
    act()
    times = []
    for _ in range(repeat):
        synchronize(device)
        started = time.perf_counter()
        act()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def start_peak(device: torch.device) -> int:
    """Bytes allocated now, the baseline of the peak; None for a stand-in."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_gb(device: torch.device, before: int) -> Figures:
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device)
    return {
        "peak_allocated_gb": peak / GB,
        "activations_gb": (peak - before) / GB,
        "peak_reserved_gb": torch.cuda.max_memory_reserved(device) / GB,
        "held_gb": held_gb(device),
    }


T = TypeVar("T")


def step_seconds(bench: Bench, steps: Iterator[T], number: int) -> tuple[list[float], T | None]:
    """The time of each of the first steps, and the last result."""
    taken: list[float] = []
    last: T | None = None
    synchronize(bench.device)
    started = time.perf_counter()
    for step in itertools.islice(steps, number):
        last = step
        synchronize(bench.device)
        now = time.perf_counter()
        taken.append(now - started)
        started = now
        if bench.is_over():
            break
    return taken, last


@torch.inference_mode()
def rows(
    bench: Bench,
    make: Callable[[Encoded], Iterator[Any]],
    name: str | None = None,
    most: int = NUM_STEPS,
) -> Figures:
    """One row for each picture: a loop of 28 steps, of which the first few are run.

    The first step includes the one-time work of an edit.
    """
    found, left_out = [], []
    for pixels, wanted in bench.scale.pictures.items():
        if bench.is_over():
            left_out.append(pixels)
            continue
        encoded = bench.encoded(pixels)
        step_seconds(bench, make(encoded), 2)  # one-time costs
        before = start_peak(bench.device)
        taken, last = step_seconds(bench, make(encoded), min(wanted, most))
        if last is not None and name and len(taken) == NUM_STEPS and pixels == bench.smallest:
            bench.finals[name] = last.latents.cpu()
        if len(taken) < 2:
            left_out.append(pixels)
            continue
        found.append(
            {"pixels": pixels} | _row(bench, encoded, taken) | peak_gb(bench.device, before)
        )
    return {"rows": found} | ({"left_out": left_out} if left_out else {})


def _row(bench: Bench, encoded: Encoded, taken: Sequence[float]) -> Figures:
    usual = statistics.median(taken[1:])
    config, text = bench.scale.model.transformer, bench.scale.model.conditioner.text_length
    is_whole = len(taken) == NUM_STEPS
    return {
        "steps_run": len(taken),
        "first_step_ms": 1000 * taken[0],
        "step_ms": 1000 * usual,
        "step_min_ms": 1000 * min(taken[1:]),
        "step_max_ms": 1000 * max(taken[1:]),
        "loop_s": sum(taken) if is_whole else taken[0] + (NUM_STEPS - 1) * usual,
        "loop_is": "measured" if is_whole else "extrapolated",
        "tflop_per_s": block_tflop(config, text, encoded.rows * encoded.columns) / usual,
    }


def smi(query: str) -> str | None:
    """The output of the driver's own tool."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return told.stdout.splitlines()[0].strip()
    return None


def attention_kernels(first: SDPBackend) -> contextlib.AbstractContextManager[None]:
    """Prefer one kernel; masks and other devices use the others."""
    rest = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    order = [first, *(each for each in rest if each is not first)]
    return sdpa_kernel(order, set_priority=True)


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}"
