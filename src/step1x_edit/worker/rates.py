"""How fast this machine reads a checkpoint from disk and computes a step with it, measured.

The memory plan compares the two. Measuring takes about a second, unless the disk is slow.
"""

from __future__ import annotations

import math
import time
from typing import Final

import torch

from step1x_edit.checkpoints.arena import Arena, Weight
from step1x_edit.checkpoints.memory_plan import STREAMABLE, Rates
from step1x_edit.checkpoints.read import OpenedCheckpoint
from step1x_edit.checkpoints.stored import Stored
from step1x_edit.model.processor import Linear
from step1x_edit.worker.arithmetic import least_seconds

TOKENS: Final = 2 * 32 * 32
"""Tokens of picture and reference at 512 pixels: a step has no fewer, and those of its text."""


def measured(opened: OpenedCheckpoint, place: torch.device | None) -> Rates:
    """Measure with a checkpoint whose weights are still in files; `place` is None for the CPU."""
    arena = Arena(opened.weights, on_disk={block.name for block in opened.blocks})
    core = [block for block in arena.blocks if block.component == "core"]
    names = {name for block in core for name in arena.weights_of(block.name)}
    weights = [weight for weight in opened.weights if weight.name in names and weight.source]
    smallest = min(core, key=lambda block: (not STREAMABLE.fullmatch(block.name), block.size))
    return Rates(
        read=_read_rate(arena, smallest.name, weights),
        step_s=_step_s(opened, weights, place or torch.device("cpu")),
    )


def _read_rate(arena: Arena, block: str, weights: list[Weight]) -> float:
    """Bytes per second of a block that comes from the disk, not from memory of the system."""
    names = arena.weights_of(block)
    for weight in weights:
        if weight.name in names and isinstance(weight.source, Stored):
            (weight.source if weight.kept is None else weight.kept.codes).forget()
    start = time.perf_counter()
    size = arena.read(block).nbytes
    return size / (time.perf_counter() - start)


def _step_s(opened: OpenedCheckpoint, weights: list[Weight], device: torch.device) -> float:
    """Seconds of the products of a step; of a few attempts the fastest counts."""
    width = opened.checkpoint.pipeline.transformer.config.hidden_size
    dtype = next(each.dtype for each in weights if each.name == "transformer.img_in.weight")
    rows = torch.ones(TOKENS, width, dtype=dtype, device=device)
    layer = Linear(width, width, dtype=dtype, device=device)
    with torch.inference_mode():
        # On a device, reading one number waits for the product.
        fastest = least_seconds(lambda x: layer(x)[0, 0].item(), rows)
    numbers = sum(math.prod(each.source.shape) for each in weights if each.source is not None)
    return fastest * numbers / layer.weight.numel()
