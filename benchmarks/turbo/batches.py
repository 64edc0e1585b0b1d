"""Whether edits that wait are faster as one batch than one after the other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from bench_demo import PROMPTS
from bench_precision import TEXT_LENGTH, random_block, wide_layout
from step1x_edit.model.blocks import DoubleStreamBlock, Layout, SingleStreamBlock
from step1x_edit.model.config import V1_1
from step1x_edit.model.denoising import join, keep_one_pad
from step1x_edit.model.flow import schedule
from step1x_edit.model.latents import image_position_ids
from turbo.edits import Demo, Way
from turbo.timing import median_ratio

EDITS: Final = 8
WIDE_PROMPTS: Final = 4
"""Rows of two edits at full width, with two gigabytes of memory."""

Row = dict[str, Any]


@torch.inference_mode()
def demo_batches(demo: Demo, turns: int, edits: int = EDITS) -> list[Row]:
    """CPU seconds of one step of all edits, in batches of 1 prompt (half an edit) to all prompts.

    Everything before and after the steps is left out; it is the same work however edits run.
    """
    pipeline = demo.pipeline
    requests = [demo.request("coffee", edit, Way("exact", 28)) for edit in [*PROMPTS][:edits]]
    encoded = [pipeline.encode(request) for request in requests]
    first = encoded[0]
    number = first.rows * first.columns
    branches = keep_one_pad([branch for each in encoded for branch in each.branches])
    length, network = branches[0].embeds.shape[1], pipeline.transformer
    ids = image_position_ids(first.rows, first.columns, pipeline.config.reference_offset)
    layout = Layout(network.rope(ids, length), length, branches[0].pad_copies, number)
    middle = schedule(28, number)[14:15]
    noise = pipeline.start(first, seed=0).latents.to(network.img_in.weight.dtype)
    img = torch.cat([noise, first.reference.to(noise.dtype)], dim=1)  # (1, 2N, C)

    def run_of(batch: int) -> Callable[[], object]:
        joined = [join(branches[i : i + batch]) for i in range(0, len(branches), batch)]
        steps = [network.prologue(each.embeds, each.mask, middle)[0] for each in joined]
        rows = img.expand(batch, -1, -1).contiguous()
        return lambda: [network.core(rows, step, layout) for step in steps]

    runs = {batch: run_of(batch) for batch in batches_up_to(len(branches))}
    return in_turns(runs, turns, edits)


@torch.inference_mode()
def wide_batches(
    kind: type[DoubleStreamBlock | SingleStreamBlock],
    dtype: torch.dtype,
    turns: int,
    prompts: int = WIDE_PROMPTS,
) -> list[Row]:
    """The same with one block of the published sizes and random weights."""
    block, layout = random_block(kind, dtype), wide_layout()
    width, rows = V1_1.transformer.hidden_size, layout.rope.shape[2]

    def run_of(batch: int) -> Callable[[], object]:
        def numbers(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, dtype=dtype) / 4

        x, txt, img = (
            numbers(rows, width),
            numbers(TEXT_LENGTH, width),
            numbers(rows - TEXT_LENGTH, width),
        )
        if isinstance(block, SingleStreamBlock):
            run = partial(block, x, numbers(3 * width), layout)
        else:
            run = partial(block, img, txt, numbers(6 * width), numbers(6 * width), layout)
        return lambda: [run() for _ in range(prompts // batch)]

    runs = {batch: run_of(batch) for batch in batches_up_to(prompts)}
    return in_turns(runs, turns, prompts / 2)


def batches_up_to(most: int) -> list[int]:
    return [batch for batch in (1, 2, 4, 8, 16) if batch <= most]


def in_turns(runs: dict[int, Callable[[], object]], turns: int, edits: float) -> list[Row]:
    """CPU seconds per edit for each size of a batch, and the median ratio to one edit at a time."""
    taken: dict[int, list[float]] = {batch: [] for batch in runs}
    for run in runs.values():
        run()  # one-time costs
    for _ in range(turns):
        for batch, run in runs.items():
            started = time.process_time()
            run()
            taken[batch].append((time.process_time() - started) / edits)
    return [
        {
            "prompts": batch,
            "cpu_s_per_edit": statistics.median(times),
            "of_one_edit": median_ratio(times, taken[2]),
        }
        for batch, times in taken.items()
    ]
