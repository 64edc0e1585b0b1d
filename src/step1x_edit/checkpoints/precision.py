"""Keeping the matrices of a network as codes: which matrices, and the resulting weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from torch import nn
from typing_extensions import TypeIs

from step1x_edit.checkpoints.arena import Weight
from step1x_edit.model.quantised import CODES, Code, QuantLinear

if TYPE_CHECKING:
    from step1x_edit.schemas.requests import Precision

CODED: Final = re.compile(
    r"transformer\.(double|single)_blocks\.\d+\."
    r"|transformer\.connector\.S\.individual_token_refiner\.blocks\.\d+\."
    r"|conditioner\.(visual\.blocks|language_model\.layers)\.\d+\."
)
"""The linear layers that are kept as codes: nearly all weights, except the first and last ones."""

IN_EVERY_STEP: Final = re.compile(r"transformer\.(double|single)_blocks\.\d+\.(?!.*mod)")
"""The layers whose codes a GPU multiplies directly. Layers that run once per edit would not get
faster, and the conditioner's inputs have outliers that do not survive 8-bit rounding."""


def is_code(precision: Precision) -> TypeIs[Code]:
    """Whether matrices are kept as codes."""
    return precision in CODES


def with_codes(
    modules: Mapping[str, nn.Module], weights: Iterable[Weight], kind: Code
) -> tuple[Weight, ...]:
    """Replace layers of these networks, and describe the source of the new layers' weights."""
    return tuple(_with_codes(modules, list(weights), kind))


def _with_codes(
    modules: Mapping[str, nn.Module], weights: list[Weight], kind: Code
) -> Iterator[Weight]:
    made: dict[nn.Module, QuantLinear] = {}
    for weight in weights:
        if not _is_coded(weight):
            continue
        assert isinstance(weight.module, nn.Linear)
        layer = QuantLinear.like(weight.module, kind)
        layer.may_round_input = IN_EVERY_STEP.match(weight.name) is not None
        made[weight.module] = layer
        part, _, path = weight.name.removesuffix(".weight").partition(".")
        modules[part].set_submodule(path, layer)
    for weight in weights:
        if weight.module not in made:
            yield weight
        elif weight.attribute == "weight":
            yield from _codes_of(weight, made[weight.module])
        else:
            yield replace(weight, module=made[weight.module])


def _codes_of(weight: Weight, layer: QuantLinear) -> Iterator[Weight]:
    """The tensors that replace a matrix."""
    codes = replace(
        weight,
        module=layer,
        attribute="codes",
        shape=tuple(layer.codes.shape),
        dtype=layer.codes.dtype,
        code=layer.kind,
    )
    yield codes
    yield Weight(
        codes.scale_name, layer, "scale", tuple(layer.scale.shape), layer.scale.dtype, None
    )
    for name, table in layer.named_buffers():
        if name not in ("codes", "scale"):
            owner = f"{weight.name.removesuffix('.weight')}.{name}"
            yield Weight(owner, layer, name, tuple(table.shape), table.dtype, table)


def _is_coded(weight: Weight) -> bool:
    """Whether a weight is a matrix of a replaced layer."""
    return (
        weight.attribute == "weight"
        and isinstance(weight.module, nn.Linear)
        and CODED.match(weight.name) is not None
    )
