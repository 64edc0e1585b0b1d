"""Products of 8-bit codes for edits that need not be exact, if they are faster on this device.

The layers that run in each step get copies in codes, which stay beside the exact ones for as long
as the model is where it computes. Whether they are faster is measured once for each size of layers
and kept, so that a seed gives the same picture after every start.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, TypeAlias

import torch
from torch import Tensor, nn

from step1x_edit.channel import GIGA
from step1x_edit.checkpoints.arena import Check
from step1x_edit.checkpoints.precision import IN_EVERY_STEP
from step1x_edit.model.pipeline import EditPipeline
from step1x_edit.model.quantised import Code, QuantLinear
from step1x_edit.model.transformer import Transformer
from step1x_edit.worker.arithmetic import arithmetic_of, chosen, least_seconds, processor

log = logging.getLogger(__name__)

KINDS: Final[tuple[Code, ...]] = ("fp8", "int8")
"""The codes that devices multiply, the more exact ones first."""
TOKENS: Final = 2 * 64 * 64
"""Rows of picture and reference at 1024 pixels; with fewer rows, codes gain more."""
RUNS: Final = 8
"""Rounding a layer must pay within so many runs of it: those of four steps with two prompts."""

Layers: TypeAlias = Mapping[str, nn.Linear]
Measure: TypeAlias = Callable[[Layers, Code, Check], dict[str, float]]
"""Returns how much faster each layer is in codes; stops if the check raises."""


class Products:
    """Decides on the copies in codes, and makes them."""

    def __init__(self, data_dir: Path, measure: Measure | None = None) -> None:
        self._data_dir = data_dir
        self._measure = measure or measure_gains
        self._kinds: dict[str, Code | None] = {}
        self._has_run_out = False

    def making(self, pipeline: EditPipeline, room: int, check: Check) -> Iterator[None]:
        """Make the copies, unless they are there; yields before measuring and after each layer.

        All weights must be where they compute. Makes none if they are not faster, if they need
        more than `room` bytes, if memory has run out with some before, or if the layers are codes.
        """
        layers = _layers_in_every_step(pipeline.transformer)
        if pipeline.coded is not None or self._has_run_out or not layers:
            return
        if not self._kinds:
            yield
        kind = self._kind(layers, check)
        size = sum(layer.weight.numel() for layer in layers.values())
        if kind is None or size > room:
            return
        yield from coding(pipeline, kind)
        log.info("%.2f GB of copies in %s are kept for fast edits", size / GIGA, kind)

    def drop(self, pipeline: EditPipeline) -> bool:
        """Drop the copies and make no others, because memory ran out; False if there are none."""
        if pipeline.coded is None:
            return False
        pipeline.coded, self._has_run_out = None, True
        return True

    def _kind(self, layers: Layers, check: Check) -> Code | None:
        """The codes in which these layers are faster; None if there are none."""
        by_size = {f"{x.in_features}x{x.out_features}": x for x in layers.values()}
        largest = dict(sorted(by_size.items(), key=lambda item: item[1].weight.numel())[-2:])
        layer = next(iter(largest.values()))
        kind = _multiplied(layer)
        if kind is None:
            return None
        key = ", ".join((_machine(layer.weight), f"{kind} of {' and '.join(largest)}"))
        if key not in self._kinds:
            measure = functools.partial(self._measure, largest, kind, check)
            is_faster = chosen(self._data_dir, key, (kind, "exact"), measure) == kind
            self._kinds[key] = kind if is_faster else None
        return self._kinds[key]


def coding(pipeline: EditPipeline, kind: Code) -> Iterator[None]:
    """Make the copies in these codes; yields after each layer."""
    coded = _sharing_copy(pipeline.transformer)
    for name, layer in _layers_in_every_step(pipeline.transformer).items():
        coded.set_submodule(name, _in_codes(layer, kind))
        yield
    pipeline.coded = coded


def kind_of(coded: Transformer) -> Code:
    """The codes of a copy."""
    return next(layer.kind for layer in coded.modules() if isinstance(layer, QuantLinear))


@torch.inference_mode()
def measure_gains(layers: Layers, kind: Code, check: Check) -> dict[str, float]:
    """How many times as fast these layers are in codes, with their rounding."""
    return {name: _gain(layer, kind, check) for name, layer in layers.items()}


def _gain(layer: nn.Linear, kind: Code, check: Check) -> float:
    def seconds(work: Callable[[], Tensor]) -> float:
        def run() -> None:
            check()
            work().flatten()[0].item()  # waits for a device

        return least_seconds(run)

    rows, coded = layer.weight.new_ones(1, TOKENS, layer.in_features), _in_codes(layer, kind)
    exact, rounded = seconds(lambda: layer(rows)), seconds(lambda: coded(rows))
    rounding = seconds(lambda: _in_codes(layer, kind).scale)
    return round(exact / (rounded + rounding / RUNS), 2)


def _multiplied(layer: nn.Linear) -> Code | None:
    """The codes that the layer's device multiplies; None if it would widen them."""
    for kind in KINDS:
        sizes = layer.in_features, layer.out_features
        if QuantLinear(*sizes, kind, bias=None, device="meta").can_multiply_codes(layer.weight):
            return kind
    return None


def _in_codes(layer: nn.Linear, kind: Code) -> QuantLinear:
    coded = QuantLinear.of(layer, kind)
    coded.may_round_input = True
    return coded


def _layers_in_every_step(transformer: Transformer) -> Layers:
    """The layers that precisions with codes would multiply, unless they are codes already."""
    return {
        name: layer
        for name, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear) and IN_EVERY_STEP.match(f"transformer.{name}.")
    }


def _sharing_copy(transformer: Transformer) -> Transformer:
    """A copy with the same tensors."""
    tensors = (*transformer.parameters(), *transformer.buffers())
    return copy.deepcopy(transformer, {id(tensor): tensor for tensor in tensors})


def _machine(weight: Tensor) -> str:
    """What the speed of a product depends on, besides its size."""
    if weight.device.type == "cpu":
        return processor(arithmetic_of(weight.dtype))
    name = torch.cuda.get_device_name(weight.device)
    return f"{name}, {weight.dtype}, torch {torch.__version__}"
