"""How long the products and convolutions of a stage take without anything else, on this machine.

The networks run once without numbers, which lists the shapes; each shape is then measured in the
type in which the processor is fastest. A stage cannot be faster unless it multiplies less.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step1x_edit.model.blocks import Layout
from step1x_edit.model.conditioner import MERGE_SIZE
from step1x_edit.model.transformer import QuotedText
from stopwatch import Cost, Lap, Stopwatch, now, total

ENOUGH_ROWS: Final = 2048
"""Products with more rows are measured with this number of them."""

Shape = tuple[int, ...]
"""Of a product: rows, inputs, outputs. Of a convolution: batch, inputs, size of output; kernel."""


def alone(work: Counter[Shape]) -> Cost:
    return total(
        [product_cost(shape, fastest_type()).times(count) for shape, count in work.items()]
    )


def tflop(work: Counter[Shape]) -> float:
    def of(shape: Shape) -> int:
        if len(shape) == 3:
            return 2 * math.prod(shape)
        batch, _, height, width, *kernel = shape
        return 2 * batch * height * width * math.prod(kernel)

    return sum(of(shape) * count for shape, count in work.items()) / 1e12


# --- measuring ------------------------------------------------------------------------------------


@functools.cache
def fastest_type() -> torch.dtype:
    """The type in which this processor multiplies matrices fastest."""
    types = (torch.float32, torch.bfloat16)
    return min(types, key=lambda dtype: product_cost((1024, 2048, 2048), dtype).cpu_seconds)


@functools.cache
def product_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    """The least that one product or convolution takes."""
    if len(shape) == 3:
        rows, inputs, outputs = shape
        few = min(rows, ENOUGH_ROWS)
        x, weight = torch.ones(few, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
        return least(lambda: F.linear(x, weight)).times(rows / few)
    kernel = torch.ones(shape[4:], dtype=dtype).contiguous(memory_format=torch.channels_last)
    x = torch.ones(shape[:4], dtype=dtype).contiguous(memory_format=torch.channels_last)
    return least(lambda: F.conv2d(x, kernel, padding="same"))


@torch.inference_mode()
def least(act: Callable[[], object], repeat: int = 3) -> Cost:
    costs = []
    for _ in range(repeat):
        before = now()
        act()
        costs.append(now().since(before))
    return Cost(*map(min, zip(*costs, strict=True)))


# --- listing --------------------------------------------------------------------------------------


def work_of(stage: str, watch: Stopwatch) -> Counter[Shape]:
    """The products and convolutions of a stage."""
    laps = watch.laps[stage]
    with torch.device("meta"), torch.inference_mode():
        if stage.startswith("conditioner"):
            return sum((tower_work(lap) for lap in laps), Counter())
        if stage in ("encoder", "decoder"):
            autoencoder = of_same_sizes(laps[0])
            code = autoencoder.encode if stage == "encoder" else autoencoder.decode
            return counted(autoencoder, lambda: code(like(laps[0], 0)))
        passes = zip(laps, watch.laps["prologue"], strict=False)  # of the first step
        return sum((transformer_work(stage, *each) for each in passes), Counter())


def tower_work(lap: Lap) -> Counter[Shape]:
    """A tower of the conditioner has one row per token or patch; its merger joins patches."""
    rows = math.prod(lap.shapes[0][:-1])
    with torch.device("meta"):
        tower = of_same_sizes(lap)
    return Counter(
        (rows // MERGE_SIZE**2 if "merger" in name else rows, layer.in_features, layer.out_features)
        for name, layer in tower.named_modules()
        if isinstance(layer, nn.Linear)
    )


def transformer_work(stage: str, lap: Lap, prologue: Lap) -> Counter[Shape]:
    network = of_same_sizes(prologue)
    prompt, mask, times = (like(prologue, index) for index in range(3))
    quoted = QuotedText(prompt, mask) if network.config.has_text_token_mapping else None
    if stage == "prologue":
        return counted(network, lambda: network.prologue(prompt, mask, times, quoted))
    step = network.prologue(prompt, mask, times[:1], quoted)[0]
    img, length = like(lap, 0), prompt.shape[1]
    rope = network.rope(torch.zeros(img.shape[1], 3), length)
    layout = Layout(rope, length, num_wanted=img.shape[1] // 2)
    return counted(network, lambda: network.core(img, step, layout))


def of_same_sizes(lap: Lap) -> Any:
    """The network of a lap, without numbers."""
    return type(lap.network)(lap.network.config)


def like(lap: Lap, index: int) -> Tensor:
    return torch.empty(lap.shapes[index])


def counted(network: nn.Module, run: Callable[[], object]) -> Counter[Shape]:
    """The shapes of all layers that run."""
    found: Counter[Shape] = Counter()

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            rows = inputs[0].numel() // layer.in_features
            found[rows, layer.in_features, layer.out_features] += 1
        elif isinstance(layer, nn.Conv2d):
            found[tuple(inputs[0].shape[:2] + output.shape[2:] + layer.weight.shape)] += 1

    for layer in network.modules():
        layer.register_forward_hook(note)
    run()
    return found
