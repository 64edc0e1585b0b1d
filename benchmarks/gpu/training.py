"""A step of training a LoRA: its time, its memory, and the operations per second."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from bench_residency import synchronize
from gpu.bench import Bench, Figures, peak_gb, start_peak
from gpu.networks import our_network
from step1x_edit.schemas.training import TrainRequest
from step1x_edit.training.loop import Drawn, Training

RANKS = (16, 64)
STEPS = 4
"""The first one is not counted: it allocates what the optimiser keeps."""


def training(bench: Bench) -> Figures:
    """Steps of the smallest and the largest picture at both ranks, one pair each.

    `--estimate` of `step1x-edit train-lora` says what to expect; it is right if no loss is lost.
    """
    bench.drop("ours")  # other sections have made it for inference alone
    figures: Figures = {"steps": [], "left_out": []}
    sizes = sorted({min(bench.scale.pictures), max(bench.scale.pictures)})
    for rank in RANKS:
        network = our_network(bench.scale.model.transformer, bench.device, bench.dtype)
        learning = Training(network, bench.scale.model, TrainRequest(rank=rank))
        for pixels in sizes:
            if bench.is_over():
                figures["left_out"].append(f"{pixels} at rank {rank}")
                continue
            figures["steps"].append(
                {"rank": rank, "pixels": pixels, **_steps(bench, learning, pixels)}
            )
        del network, learning
        bench.drop()
    figures["is_right"] = all(math.isfinite(row["loss"]) for row in figures["steps"])
    return figures


def _steps(bench: Bench, learning: Training, pixels: int) -> dict[str, Any]:
    encoded = learning.spared(bench.encoded(pixels))
    target = encoded.reference.float()
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(7))
    taken: list[float] = []
    before, loss = start_peak(bench.device), math.nan
    for _ in range(STEPS):
        synchronize(bench.device)
        started = time.perf_counter()
        loss = learning.descend([learning.loss(encoded, target, Drawn(0.6, noise))])
        synchronize(bench.device)
        taken.append(time.perf_counter() - started)
    return {"loss": loss, "step_ms": 1000 * min(taken[1:]), **peak_gb(bench.device, before)}
