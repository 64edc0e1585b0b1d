"""The sizes of a checkpoint's networks, from the shapes of its tensors.

Values that shapes do not determine – the head dimension of the connector, the axes of the rotary
encoding, the groups of the autoencoder's norms – come from the checkpoint's own config file, if it
has one, and otherwise are as published.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from step1x_edit.checkpoints.find import MAPPING_WEIGHT
from step1x_edit.checkpoints.keymap import SCALE_FACTOR
from step1x_edit.errors import CheckpointError
from step1x_edit.model.config import AutoencoderConfig, TransformerConfig


class Shaped(Protocol):
    """Anything with a shape."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class _Names(NamedTuple):
    """The names, in a layout, of the tensors whose shapes are used."""

    img_in: str
    final: str
    vector_in: str
    double: str
    single: str
    query_norm: str
    mlp: str


_OFFICIAL = _Names(
    img_in="img_in.weight",
    final="final_layer.linear.weight",
    vector_in="vector_in.in_layer.weight",
    double="double_blocks",
    single="single_blocks",
    query_norm="img_attn.norm.query_norm.scale",
    mlp="img_mlp.0.weight",
)
_DIFFUSERS = _Names(
    img_in="x_embedder.weight",
    final="proj_out.weight",
    vector_in="vec_embed.in_layer.weight",
    double="transformer_blocks",
    single="single_transformer_blocks",
    query_norm="attn.norm_q.weight",
    mlp="ff.net.0.proj.weight",
)


def transformer_sizes(
    tensors: Mapping[str, Shaped], described: Mapping[str, Any], published: TransformerConfig
) -> TransformerConfig:
    """The sizes of a transformer in either layout; `described` is its config file.

    Raises CheckpointError if a required tensor is missing, or the shapes contradict each other.
    """
    names = _OFFICIAL if _OFFICIAL.img_in in tensors else _DIFFUSERS

    def shape(name: str, dimensions: int = 2) -> tuple[int, ...]:
        if name not in tensors:
            raise CheckpointError(f"the transformer lacks tensors {name}")
        found = tuple(tensors[name].shape)
        if len(found) != dimensions or 0 in found:
            raise CheckpointError(f"the transformer has {name} of shape {found}")
        return found

    hidden_size, in_channels = shape(names.img_in)
    (head_dim,) = shape(f"{names.double}.0.{names.query_norm}", dimensions=1)
    connector_size, in_features = shape("connector.S.input_embedder.weight")
    known = published.connector
    connector_head = known.hidden_size // known.num_heads
    connector_heads = described.get("connector_heads_num", connector_size // connector_head)
    axes_dim = tuple(described.get("axes_dims_rope", published.axes_dim))
    if hidden_size % head_dim or sum(axes_dim) != head_dim or not connector_heads:
        raise CheckpointError(
            f"the transformer has heads of {head_dim} channels, {hidden_size} channels and "
            f"rotary axes {axes_dim}, which do not fit together"
        )
    blocks = r"connector\.S\.individual_token_refiner\.blocks"
    return replace(
        published,
        in_channels=in_channels,
        out_channels=shape(names.final)[0],
        hidden_size=hidden_size,
        num_heads=hidden_size // head_dim,
        axes_dim=axes_dim,
        depth=_count(tensors, re.escape(names.double)),
        depth_single=_count(tensors, re.escape(names.single)),
        mlp_ratio=shape(f"{names.double}.0.{names.mlp}")[0] / hidden_size,
        vec_in_dim=shape(names.vector_in)[1],
        has_text_token_mapping=MAPPING_WEIGHT in tensors,
        connector=replace(
            known,
            in_features=in_features,
            hidden_size=connector_size,
            num_heads=connector_heads,
            depth=_count(tensors, blocks),
            has_scale_factor=SCALE_FACTOR in tensors,
        ),
    )


def vae_sizes(
    tensors: Mapping[str, Shaped], described: Mapping[str, Any], published: AutoencoderConfig
) -> AutoencoderConfig:
    """The sizes of an autoencoder in either layout; `described` is its config file."""
    is_official = "encoder.down.0.block.0.conv1.weight" in tensors
    level, block = ("down", "block") if is_official else ("down_blocks", "resnets")
    prefix = rf"encoder\.{level}"
    levels = _count(tensors, prefix)
    widths = [f"encoder.{level}.{i}.{block}.0.conv1.weight" for i in range(levels)]
    if not levels or any(name not in tensors for name in (*widths, "encoder.conv_out.weight")):
        raise CheckpointError("the autoencoder lacks tensors of its encoder")
    return replace(
        published,
        block_out_channels=tuple(tensors[name].shape[0] for name in widths),
        layers_per_block=_count(tensors, rf"{prefix}\.0\.{block}"),
        latent_channels=tensors["encoder.conv_out.weight"].shape[0] // 2,
        norm_num_groups=described.get("norm_num_groups", published.norm_num_groups),
    )


def _count(names: Iterable[str], prefix: str) -> int:
    """The number of numbered parts behind a prefix, from 0 to the highest."""
    pattern = re.compile(rf"{prefix}\.(\d+)\.")
    numbers = {int(match[1]) for name in names if (match := pattern.match(name))}
    return max(numbers, default=-1) + 1
