"""Qwen2.5-VL as llama.cpp writes it: its names of tensors, and the way back to the published ones.

The language model is one file, the vision tower (mmproj) another. llama.cpp splits qkv of the
vision tower, and the patch embedding by its two frames; it permutes nothing in this architecture.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from step1x_edit.checkpoints.find import FileSet
from step1x_edit.checkpoints.gguf_file import read_header
from step1x_edit.checkpoints.stored import Stored
from step1x_edit.errors import CheckpointError

LANGUAGE: Final = "qwen2vl"
"""The architecture of the language model, as its file names it."""
VISION: Final = ("clip", "qwen2.5vl_merger")
"""The architecture of the vision tower, and its projector."""

_PATCHES: Final = "v.patch_embd.weight"
_OTHERS: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "v.post_ln": "visual.merger.ln_q",
    "mm.0": "visual.merger.mlp.0",
    "mm.2": "visual.merger.mlp.2",
}
_OF_A_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OF_A_VISION_BLOCK: Final = {
    "ln1": "norm1",
    "ln2": "norm2",
    "attn_qkv": "attn.qkv",
    "attn_out": "attn.proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def check_models(sets: Iterable[FileSet]) -> None:
    """Raise CheckpointError unless all of these files in GGUF are of Qwen2.5-VL."""
    found = set()
    for each in sets:
        fields = read_header(each.files[0]).fields
        named = " ".join(str(fields.get(f"general.{key}", "")) for key in ("name", "basename"))
        projector = fields.get("clip.projector_type", fields.get("clip.vision.projector_type"))
        is_older = re.search(r"qwen2[ _-]?vl", named, re.IGNORECASE) is not None
        if is_older or not (
            each.architecture == LANGUAGE or (each.architecture, projector) == VISION
        ):
            what = "Qwen2-VL" if is_older else projector or each.architecture or "no known model"
            raise CheckpointError(f"{each} is a GGUF of {what}, the conditioner is Qwen2.5-VL")
        found.add(each.architecture)
    if VISION[0] not in found:
        raise CheckpointError("the conditioner lacks its vision tower: add its GGUF named mmproj")


def as_published(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of both files by their published names; unknown names are unchanged."""
    rest = dict(tensors)
    named: dict[str, Stored] = {}
    if _PATCHES in rest and f"{_PATCHES}.1" in rest:
        frames = rest.pop(_PATCHES), rest.pop(f"{_PATCHES}.1")
        named["visual.patch_embed.proj.weight"] = _interleaved(*frames)
    for name in tensors:
        if match := re.fullmatch(r"v\.blk\.(\d+)\.attn_q\.(weight|bias)", name):
            parts = [f"v.blk.{match[1]}.attn_{part}.{match[2]}" for part in "qkv"]
            if all(part in rest for part in parts):
                fused = Stored.concatenate([rest.pop(part) for part in parts])
                named[f"visual.blocks.{match[1]}.attn.qkv.{match[2]}"] = fused
    return named | {_published(name): tensor for name, tensor in rest.items()}


def _published(name: str) -> str:
    module, _, parameter = name.rpartition(".")
    if module in _OTHERS:
        return f"{_OTHERS[module]}.{parameter}"
    match = re.fullmatch(r"(v\.)?blk\.(\d+)\.(\w+)", module)
    known = _OF_A_VISION_BLOCK if match and match[1] else _OF_A_LAYER
    if match is None or match[3] not in known:
        return name
    place = "visual.blocks" if match[1] else "model.layers"
    return f"{place}.{match[2]}.{known[match[3]]}.{parameter}"


def _interleaved(first: Stored, second: Stored) -> Stored:
    """Two frames (N, C, H, W) of a patch embedding as (N, C, 2, H, W)."""
    if len(first.shape) != 4 or first.shape != second.shape:
        raise CheckpointError(
            f"the conditioner has {_PATCHES} of shapes {first.shape} and {second.shape}"
        )
    rows, channels, *sides = first.shape
    flat = [each.reshape(rows * channels, *sides) for each in (first, second)]
    frames = [each.rows(row, row + 1) for row in range(rows * channels) for each in flat]
    return Stored.concatenate(frames).reshape(rows, channels, 2, *sides)
