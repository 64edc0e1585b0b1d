"""The two layouts of the weights, and the conversions between them.

The *official* layout fuses q, k and v into one matrix and, in single blocks, the MLP as well; our
network uses it. The *diffusers* layout splits them and renames everything. A `Link` connects one
official tensor with the diffusers tensors that hold the same numbers. All links of a model follow
from its sizes, so there is no table of names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from step1x_edit.checkpoints.stored import Stored, shortened
from step1x_edit.errors import CheckpointError
from step1x_edit.model.config import TransformerConfig

T = TypeVar("T", Tensor, Stored)
"""Layouts are converted in the same way whether the numbers are in memory or still in files."""

SCALE_FACTOR = "connector.scale_factor"


@dataclass(frozen=True)
class Link:
    """One tensor of the official layout and its counterparts in the diffusers layout."""

    official: str
    diffusers: tuple[str, ...]
    rows: tuple[int, ...] = ()
    """Rows of each counterpart, if there are several."""
    is_half_swapped: bool = False
    """The final layer: official shift, scale; diffusers scale, shift."""
    is_convolution: bool = False
    """A 1x1 convolution in the official layout, a linear weight in diffusers."""

    def split(self, tensor: T) -> list[T]:
        """Convert the official tensor to its counterparts."""
        if self.is_convolution:
            return [_flat(self.official, tensor)]
        if self.is_half_swapped:
            return [_swap_halves(tensor)]
        if not self.rows:
            return [tensor]
        if sum(self.rows) != tensor.shape[0]:
            raise CheckpointError(
                f"{self.official} has {tensor.shape[0]} rows instead of {sum(self.rows)}"
            )
        ends = list(accumulate(self.rows))
        return [_rows(tensor, end - rows, end) for rows, end in zip(self.rows, ends, strict=True)]

    def join(self, parts: Sequence[T]) -> T:
        """Convert the counterparts to the official tensor."""
        if self.is_convolution:
            return parts[0].reshape(*parts[0].shape, 1, 1)
        if self.is_half_swapped:
            return _swap_halves(parts[0])
        if not self.rows:
            return parts[0]
        for name, part, rows in zip(self.diffusers, parts, self.rows, strict=True):
            if part.shape[0] != rows:
                raise CheckpointError(f"{name} has {part.shape[0]} rows instead of {rows}")
            if part.shape[1:] != parts[0].shape[1:]:
                raise CheckpointError(f"{name} has rows of another size than {self.diffusers[0]}")
        return _concatenate(parts)


def to_diffusers(tensors: Mapping[str, T], links: Sequence[Link]) -> dict[str, T]:
    """Convert a whole official model. Raises CheckpointError on missing or unknown names."""
    _check_names(tensors, (link.official for link in links))
    return {
        name: part
        for link in links
        for name, part in zip(link.diffusers, link.split(tensors[link.official]), strict=True)
    }


def to_official(tensors: Mapping[str, T], links: Sequence[Link]) -> dict[str, T]:
    """Convert a whole diffusers model. Raises CheckpointError on missing or unknown names."""
    _check_names(tensors, (name for link in links for name in link.diffusers))
    return {link.official: link.join([tensors[name] for name in link.diffusers]) for link in links}


def transformer_links(config: TransformerConfig) -> list[Link]:
    """List the links of a transformer; only v1.0's `scale_factor` has none."""
    links = [
        *_pair("img_in", "x_embedder"),
        *_pair("txt_in", "context_embedder"),
        *_pair("time_in.in_layer", "time_embed.in_layer"),
        *_pair("time_in.out_layer", "time_embed.out_layer"),
        *_pair("vector_in.in_layer", "vec_embed.in_layer"),
        *_pair("vector_in.out_layer", "vec_embed.out_layer"),
        *_pair("final_layer.linear", "proj_out"),
        *_pair("final_layer.adaLN_modulation.1", "norm_out.linear", is_half_swapped=True),
    ]
    for i in range(config.depth):
        links += _double_block(f"double_blocks.{i}", f"transformer_blocks.{i}", config)
    for i in range(config.depth_single):
        links += _single_block(f"single_blocks.{i}", f"single_transformer_blocks.{i}", config)
    for module in _connector_modules(config.connector.depth):
        links += _pair(module, module)
    if config.has_text_token_mapping:
        links += _pair("text_token_mapping", "text_token_mapping")
    return links


def vae_links(block_out_channels: Sequence[int], layers_per_block: int) -> list[Link]:
    """List the links of an autoencoder with attention in the middle and no quant convolutions."""
    channels = list(block_out_channels)
    last = len(channels) - 1
    links: list[Link] = []
    for half in ("encoder", "decoder"):
        links += _pair(f"{half}.conv_in", f"{half}.conv_in")
        links += _pair(f"{half}.norm_out", f"{half}.conv_norm_out")
        links += _pair(f"{half}.conv_out", f"{half}.conv_out")
        links += _vae_middle(half)
    for i, width in enumerate(channels):
        official, diffusers = f"encoder.down.{i}", f"encoder.down_blocks.{i}"
        width_before = channels[max(i - 1, 0)]
        for j in range(layers_per_block):
            has_shortcut = j == 0 and width_before != width
            links += _resnet(f"{official}.block.{j}", f"{diffusers}.resnets.{j}", has_shortcut)
        if i < last:
            links += _pair(f"{official}.downsample.conv", f"{diffusers}.downsamplers.0.conv")
    for i, width in enumerate(channels):
        # The official decoder numbers its levels from the picture, diffusers from the latents.
        official, diffusers = f"decoder.up.{i}", f"decoder.up_blocks.{last - i}"
        width_before = channels[min(i + 1, last)]
        for j in range(layers_per_block + 1):
            has_shortcut = j == 0 and width_before != width
            links += _resnet(f"{official}.block.{j}", f"{diffusers}.resnets.{j}", has_shortcut)
        if i > 0:
            links += _pair(f"{official}.upsample.conv", f"{diffusers}.upsamplers.0.conv")
    return links


def _double_block(official: str, diffusers: str, config: TransformerConfig) -> Iterator[Link]:
    third = (config.hidden_size,) * 3
    for stream, norm, qkv, proj, query_norm, key_norm, ff in (
        ("img", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "norm_q", "norm_k", "ff"),
        (
            "txt",
            "norm1_context",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            "to_add_out",
            "norm_added_q",
            "norm_added_k",
            "ff_context",
        ),
    ):
        attn = f"{official}.{stream}_attn"
        yield from _pair(f"{official}.{stream}_mod.lin", f"{diffusers}.{norm}.linear")
        yield from _fused(f"{attn}.qkv", [f"{diffusers}.attn.{name}" for name in qkv], third)
        yield from _norms(attn, f"{diffusers}.attn", query_norm, key_norm)
        yield from _pair(f"{attn}.proj", f"{diffusers}.attn.{proj}")
        yield from _pair(f"{official}.{stream}_mlp.0", f"{diffusers}.{ff}.net.0.proj")
        yield from _pair(f"{official}.{stream}_mlp.2", f"{diffusers}.{ff}.net.2")


def _single_block(official: str, diffusers: str, config: TransformerConfig) -> Iterator[Link]:
    parts = [f"{diffusers}.attn.{name}" for name in ("to_q", "to_k", "to_v")]
    rows = (*(config.hidden_size,) * 3, config.mlp_size)
    yield from _pair(f"{official}.modulation.lin", f"{diffusers}.norm.linear")
    yield from _fused(f"{official}.linear1", [*parts, f"{diffusers}.proj_mlp"], rows)
    yield from _norms(official, f"{diffusers}.attn", "norm_q", "norm_k")
    yield from _pair(f"{official}.linear2", f"{diffusers}.proj_out")


def _connector_modules(depth: int) -> Iterator[str]:
    yield "connector.global_proj_out"
    yield "connector.S.input_embedder"
    yield from (f"connector.S.t_embedder.mlp.{i}" for i in (0, 2))
    yield from (f"connector.S.c_embedder.linear_{i}" for i in (1, 2))
    for i in range(depth):
        block = f"connector.S.individual_token_refiner.blocks.{i}"
        for name in ("norm1", "norm2", "self_attn_qkv", "self_attn_proj", "mlp.fc1", "mlp.fc2"):
            yield f"{block}.{name}"
        yield f"{block}.adaLN_modulation.1"


def _vae_middle(half: str) -> Iterator[Link]:
    official, diffusers = f"{half}.mid", f"{half}.mid_block"
    yield from _resnet(f"{official}.block_1", f"{diffusers}.resnets.0", has_shortcut=False)
    yield from _resnet(f"{official}.block_2", f"{diffusers}.resnets.1", has_shortcut=False)
    official, diffusers = f"{official}.attn_1", f"{diffusers}.attentions.0"
    yield from _pair(f"{official}.norm", f"{diffusers}.group_norm")
    for ours, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        weight, bias = _pair(f"{official}.{ours}", f"{diffusers}.{theirs}")
        yield Link(weight.official, weight.diffusers, is_convolution=True)
        yield bias


def _resnet(official: str, diffusers: str, has_shortcut: bool) -> Iterator[Link]:
    for name in ("norm1", "conv1", "norm2", "conv2"):
        yield from _pair(f"{official}.{name}", f"{diffusers}.{name}")
    if has_shortcut:
        yield from _pair(f"{official}.nin_shortcut", f"{diffusers}.conv_shortcut")


def _norms(official: str, diffusers: str, query_norm: str, key_norm: str) -> Iterator[Link]:
    yield Link(f"{official}.norm.query_norm.scale", (f"{diffusers}.{query_norm}.weight",))
    yield Link(f"{official}.norm.key_norm.scale", (f"{diffusers}.{key_norm}.weight",))


def _pair(official: str, diffusers: str, is_half_swapped: bool = False) -> tuple[Link, Link]:
    weight = Link(f"{official}.weight", (f"{diffusers}.weight",), is_half_swapped=is_half_swapped)
    bias = Link(f"{official}.bias", (f"{diffusers}.bias",), is_half_swapped=is_half_swapped)
    return weight, bias


def _fused(official: str, parts: Sequence[str], rows: tuple[int, ...]) -> Iterator[Link]:
    for kind in ("weight", "bias"):
        yield Link(f"{official}.{kind}", tuple(f"{part}.{kind}" for part in parts), rows)


def _flat(name: str, tensor: T) -> T:
    if tuple(tensor.shape[2:]) != (1, 1):
        raise CheckpointError(f"{name} of shape {tuple(tensor.shape)} is not a 1x1 convolution")
    return tensor.reshape(*tensor.shape[:2])


def _swap_halves(tensor: T) -> T:
    half = tensor.shape[0] // 2
    return _concatenate([_rows(tensor, half, tensor.shape[0]), _rows(tensor, 0, half)])


def _rows(tensor: T, start: int, stop: int) -> T:
    """Some rows; those in memory are copied, because safetensors does not write views."""
    return tensor.rows(start, stop) if isinstance(tensor, Stored) else tensor[start:stop].clone()


def _concatenate(parts: Sequence[T]) -> T:
    if isinstance(parts[0], Stored):
        return Stored.concatenate(parts)
    return torch.cat(list(parts))


def _check_names(tensors: Mapping[str, object], expected: Iterable[str]) -> None:
    names = set(expected)
    for problem, wrong in (
        ("lacks", names - tensors.keys()),
        ("has unknown", tensors.keys() - names),
    ):
        if wrong:
            raise CheckpointError(f"the checkpoint {problem} tensors {some_of(wrong)}")


def some_of(names: Iterable[str]) -> str:
    """Up to three names, and the number of further ones."""
    listed = sorted(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(map(shortened, listed[:3])) + more
