"""A pipeline written to disk in the layouts of the published models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import save_file

from step1x_edit.checkpoints.keymap import (
    Link,
    to_diffusers,
    to_official,
    transformer_links,
    vae_links,
)
from step1x_edit.checkpoints.read import Release
from step1x_edit.model.pipeline import EditPipeline
from tiny import VAE


def write_official(folder: Path, pipeline: EditPipeline) -> None:
    folder.mkdir()
    vae = to_official(pipeline.vae.state_dict(), tiny_vae_links())
    save(vae, folder / "vae.safetensors")
    save(pipeline.transformer.state_dict(), folder / "step1x-edit.safetensors")
    vlm_folder = folder / "Qwen"
    vlm_folder.mkdir()
    # The names that Qwen2.5-VL was published with, which the library has renamed since.
    vlm = {
        f"model.{name.removeprefix('language_model.')}" if name.startswith("lang") else name: tensor
        for name, tensor in pipeline.conditioner.vlm.state_dict().items()
    }
    vocabulary, width = vlm["model.embed_tokens.weight"].shape
    save(
        {**vlm, "lm_head.weight": torch.zeros(vocabulary, width)}, vlm_folder / "model.safetensors"
    )
    pipeline.conditioner.vlm.config.save_pretrained(vlm_folder)
    pipeline.conditioner.tokenizer.save(str(vlm_folder / "tokenizer.json"))


def write_diffusers(folder: Path, pipeline: EditPipeline) -> None:
    links = transformer_links(pipeline.config.transformer)
    transformer = to_diffusers(pipeline.transformer.state_dict(), links)
    names = sorted(transformer)
    for name in ("transformer", "vae", "text_encoder", "processor"):
        (folder / name).mkdir(parents=True)
    for shard in range(2):
        part = {name: transformer[name] for name in names[shard::2]}
        save(part, folder / "transformer" / f"model-{shard + 1}-of-2.safetensors")
    save(pipeline.vae.state_dict(), folder / "vae" / "model.safetensors")
    pipeline.conditioner.vlm.save_pretrained(folder / "text_encoder")
    pipeline.conditioner.tokenizer.save(str(folder / "processor" / "tokenizer.json"))


def tiny_vae_links() -> list[Link]:
    return vae_links(VAE["block_out_channels"], VAE["layers_per_block"])


def save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"}
    )


def tiny_releases(pipeline: EditPipeline) -> dict[str, Release]:
    """The tiny sizes in the place of the published ones."""
    transformer = pipeline.config.transformer
    connector = dataclasses.replace(transformer.connector, has_scale_factor=True)
    v1_0 = dataclasses.replace(
        pipeline.config,
        transformer=dataclasses.replace(transformer, connector=connector),
        reference_offset=(0.0, 0.0, 0.0),
    )
    return {"v1.0": Release(v1_0, VAE), "v1.1": Release(pipeline.config, VAE)}
