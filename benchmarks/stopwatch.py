"""What the networks' methods cost, measured in whatever code calls them."""

from __future__ import annotations

import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from torch import Tensor, nn
from torch.profiler import profile
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLTextModel,
)

from step1x_edit.model.autoencoder import Autoencoder
from step1x_edit.model.transformer import Transformer

GB: Final = 1e9
STAGES: Final = (
    ("conditioner, picture", Qwen2_5_VisionTransformerPretrainedModel, "forward"),
    ("conditioner, words", Qwen2_5_VLTextModel, "forward"),
    ("encoder", Autoencoder, "encode"),
    ("prologue", Transformer, "prologue"),
    ("step", Transformer, "core"),
    ("decoder", Autoencoder, "decode"),
)


class Cost(NamedTuple):
    """What something takes."""

    seconds: float
    cpu_seconds: float
    disk_gb: float

    def since(self, before: Cost) -> Cost:
        return Cost(*(after - earlier for after, earlier in zip(self, before, strict=True)))

    def times(self, factor: float) -> Cost:
        return Cost(*(value * factor for value in self))


def now() -> Cost:
    """What the process has taken so far, from any beginning."""
    return Cost(time.perf_counter(), time.process_time(), of_process("io", "read_bytes") / GB)


def total(costs: Sequence[Cost]) -> Cost:
    return Cost(*(math.fsum(cost[column] for cost in costs) for column in range(3)))


def peak_gb() -> float:
    """The most memory of the process since the product began to measure it, with each edit."""
    return of_process("status", "VmHWM") * 1024 / GB


def of_process(file: str, name: str) -> int:
    """A number that Linux reports about this process; 0 elsewhere."""
    try:
        lines = Path(f"/proc/self/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


@dataclass(frozen=True)
class Lap:
    """One call of a method."""

    network: nn.Module
    shapes: list[tuple[int, ...]]
    """Of the tensors among its arguments."""
    cost: Cost
    peak_gb: float


@dataclass
class Stopwatch:
    """The laps of each stage; the first pass of the core is also profiled."""

    laps: dict[str, list[Lap]] = field(default_factory=lambda: defaultdict(list))
    profile: profile = field(default_factory=profile)

    @contextmanager
    def running(self) -> Iterator[None]:
        with ExitStack() as stack:
            for stage, owner, method in STAGES:
                original = getattr(owner, method)
                setattr(owner, method, self._timed(stage, original))
                stack.callback(setattr, owner, method, original)
            yield

    def _timed(self, stage: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def timed(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
            is_first = stage == "step" and not self.laps[stage]
            with self.profile if is_first else nullcontext():
                before = now()
                result = original(network, *args, **kwargs)
                cost = now().since(before)
            inputs = (*args, *kwargs.values())
            shapes = [tuple(each.shape) for each in inputs if isinstance(each, Tensor)]
            self.laps[stage].append(Lap(network, shapes, cost, peak_gb()))
            return result

        return timed

    def steps(self) -> list[list[Lap]]:
        """The passes of each step: one for each prologue."""
        laps, passes = self.laps["step"], len(self.laps["prologue"])
        return [laps[i : i + passes] for i in range(0, len(laps), passes)]

    def shares(self) -> dict[str, float]:
        """The operations that take most of the profiled pass, and their shares of it."""
        events = self.profile.key_averages()
        whole = sum(event.self_cpu_time_total for event in events)
        shares = {event.key: event.self_cpu_time_total / whole for event in events}
        return {key: share for key, share in shares.items() if share > 0.01}
