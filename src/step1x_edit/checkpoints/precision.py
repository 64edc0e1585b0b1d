"""Keeping the matrices of a network as codes: which ones, and what that makes of its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Final

from torch import nn
from typing_extensions import TypeIs

from step1x_edit.checkpoints.arena import Weight
from step1x_edit.model.quantised import CODES, Code, QuantLinear
from step1x_edit.schemas import Precision

CODED: Final = re.compile(
    r"transformer\.(double|single)_blocks\.\d+\."
    r"|transformer\.connector\.S\.individual_token_refiner\.blocks\.\d+\."
    r"|conditioner\.(visual\.blocks|language_model\.layers)\.\d+\."
)
"""Where linear layers are kept as codes: nine tenths of the weights, and none of the ends."""


def is_code(precision: Precision) -> TypeIs[Code]:
    """Whether matrices are kept as codes."""
    return precision in CODES


def with_codes(
    modules: Mapping[str, nn.Module], weights: Iterable[Weight], kind: Code
) -> tuple[Weight, ...]:
    """Exchange layers of these networks, and say where the weights of the new ones come from."""
    return tuple(_with_codes(modules, list(weights), kind))


def bytes_with(weights: Iterable[Weight], kind: Code) -> int:
    """What weights in full precision would take with codes."""
    total = 0
    for weight in weights:
        if _is_coded(weight):
            assert isinstance(weight.module, nn.Linear)
            total += sum(
                tensor.nbytes for tensor in QuantLinear.like(weight.module, kind).buffers()
            )
        else:
            total += weight.size
    return total


def _with_codes(
    modules: Mapping[str, nn.Module], weights: list[Weight], kind: Code
) -> Iterator[Weight]:
    made: dict[nn.Module, QuantLinear] = {}
    for weight in weights:
        if not _is_coded(weight):
            continue
        assert isinstance(weight.module, nn.Linear)
        made[weight.module] = QuantLinear.like(weight.module, kind)
        part, _, path = weight.name.removesuffix(".weight").partition(".")
        modules[part].set_submodule(path, made[weight.module])
    for weight in weights:
        layer = made.get(weight.module)
        if layer is None:
            yield weight
        elif weight.attribute == "weight":
            yield from _codes_of(weight, layer)
        else:
            yield replace(weight, module=layer)


def _codes_of(weight: Weight, layer: QuantLinear) -> Iterator[Weight]:
    """The tensors that take the place of a matrix."""
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
    """Whether a weight is a matrix of the layers that are exchanged."""
    return (
        weight.attribute == "weight"
        and isinstance(weight.module, nn.Linear)
        and CODED.match(weight.name) is not None
    )
