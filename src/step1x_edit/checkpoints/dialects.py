"""What other tools add to the names and numbers of a checkpoint.

Prefixes of names, and the scales that ComfyUI stores beside numbers in fp8, are removed or applied.
The numbers of other quantisers are not read; their tools are recognised by names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from step1x_edit import foreign_json
from step1x_edit.checkpoints.stored import Stored, metadata_of, shortened
from step1x_edit.errors import CheckpointError

PREFIX: Final = re.compile(
    r"((base_model\.model|model|diffusion_model|transformer|module|_orig_mod|unet|pipe|dit|net)\.)*"
)
"""What tools put before the names of a network's tensors."""

_QUANTISERS: Final = {
    "torchao": r"\._weight_(qdata|scale|zero_point)$",
    "quanto": r"\.weight\._(data|scale|shift)",
    "bitsandbytes": r"\.(absmax|quant_map|nested_\w+|SCB|weight_format)$|\.quant_state\.",
    "GPTQ, AWQ or SVDQuant": r"\.(qweight|qzeros)$",
    "compressed-tensors": r"\.weight_(packed|scale|zero_point|shape)$",
}
_FORMATS: Final = frozenset({"float8_e4m3fn", "float8_e5m2"})
"""The formats of ComfyUI that multiply a matrix by one scale."""


def prefix_of(names: Iterable[str], marks: Iterable[str]) -> str:
    """What precedes all names, if one of them ends with one of the marks."""
    names, marks = list(names), tuple(marks)
    starts = {name[: -len(mark)] for name in names for mark in marks if name.endswith(mark)}
    known = [start for start in starts if PREFIX.fullmatch(start)]
    return min(known, key=len, default="")


def without_prefix(tensors: Mapping[str, Stored], prefix: str) -> dict[str, Stored]:
    """The tensors by their names in the network. Raises CheckpointError if two become equal."""
    plain = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise CheckpointError(f"the checkpoint repeats tensors with and without {prefix}")
    return plain


def quantiser(names: Iterable[str]) -> str | None:
    """The tool that saved the numbers of these tensors in a form that is not read."""
    names = list(names)
    return next(
        (
            tool
            for tool, form in _QUANTISERS.items()
            if any(re.search(form, each) for each in names)
        ),
        None,
    )


def not_read(file: object, tool: str) -> str:
    """Why a checkpoint of such a tool is refused."""
    return (
        f"{file} was saved by {tool}, whose numbers are not read: use a checkpoint in bf16 or fp8, "
        "and PRECISION for less memory"
    )


def with_scales(
    tensors: Mapping[str, Stored], files: Iterable[Path], prefix: str = ""
) -> dict[str, Stored]:
    """The tensors with their scales in them. Raises CheckpointError for what is not understood.

    ComfyUI stores `X.scale_weight`, or `X.weight_scale` and the format of X as a tensor of JSON or
    in the header; scales of inputs, which are for products in fp8, do not matter.
    """
    plain = dict(tensors)
    for name in tensors:
        layer, _, role = name.rpartition(".")
        if role == "scale_weight":
            plain[f"{layer}.weight"] = _scaled(plain, layer, plain.pop(name))
            plain.pop(f"{layer}.scale_input", None)
    plain.pop("scaled_fp8", None)
    for layer, described in _formats(tensors, files, prefix):
        kind = described.get("format")
        if str(kind) not in _FORMATS or described.get("convrot"):
            raise CheckpointError(not_read(shortened(layer), f"ComfyUI as {kind}"))
        scale = plain.pop(f"{layer}.weight_scale", None)
        if scale is not None:
            plain[f"{layer}.weight"] = _scaled(plain, layer, scale)
        plain.pop(f"{layer}.input_scale", None)
        plain.pop(f"{layer}.comfy_quant", None)
    return plain


def _formats(
    tensors: Mapping[str, Stored], files: Iterable[Path], prefix: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The layers whose formats ComfyUI describes."""
    if not any(name.endswith((".weight_scale", ".comfy_quant")) for name in tensors):
        return
    try:
        for file in files:
            header = foreign_json.parse(metadata_of(file).get("_quantization_metadata", "{}"))
            for layer, described in header.get("layers", {}).items():
                yield layer.removeprefix(prefix), dict(described)
        for name, tensor in tensors.items():
            if name.endswith(".comfy_quant"):
                text = tensor.read(torch.uint8).numpy().tobytes()
                yield name.removesuffix(".comfy_quant"), dict(foreign_json.parse(text))
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"ComfyUI's description of layers cannot be read: {error}") from error


def _scaled(tensors: Mapping[str, Stored], layer: str, scale: Stored) -> Stored:
    """The weight of a layer, multiplied by a scale."""
    weight = tensors.get(f"{layer}.weight")
    if weight is None or any(span.dtype.itemsize > 1 for span in weight.spans):
        raise CheckpointError(f"{shortened(layer)} has a scale, but no weight in fp8")
    if any(span.scale != 1.0 for span in weight.spans):
        raise CheckpointError(f"{shortened(layer)} has two scales")
    if math.prod(scale.shape) != 1:
        raise CheckpointError(
            f"{shortened(layer)} has scales of shape {scale.shape}: one scale is supported"
        )
    factor = float(scale.read(torch.float32))
    if not math.isfinite(factor):
        raise CheckpointError(f"the scale of {shortened(layer)} is not finite")
    return weight.times(factor)
