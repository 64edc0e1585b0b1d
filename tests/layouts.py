"""A pipeline written to disk in the layouts of the published models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from step1x_edit.checkpoints.keymap import (
    Link,
    to_diffusers,
    to_official,
    transformer_links,
    vae_links,
)
from step1x_edit.checkpoints.read import FLUX_VAE, Release
from step1x_edit.model.config import V1_1, V1_2_PREVIEW, ModelConfig
from step1x_edit.model.pipeline import EditPipeline
from step1x_edit.model.transformer import Transformer
from tiny import VAE, tiny_pipeline, tiny_pipeline_v1_2

FULL_VAE = {**FLUX_VAE, "block_out_channels": (32,) * 4, "norm_num_groups": 32}
"""All tensors of the published autoencoder, and few numbers in each."""


def write_official(folder: Path, pipeline: EditPipeline) -> None:
    folder.mkdir()
    vae = to_official(pipeline.vae.state_dict(), links_of(pipeline.vae))
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


def links_of(vae: AutoencoderKL) -> list[Link]:
    return vae_links(vae.config["block_out_channels"], vae.config["layers_per_block"])


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
        generation_negative_prompt=None,
    )
    return {"v1.0": Release(v1_0, VAE), "v1.1": Release(pipeline.config, VAE)}


def tiny_releases_v1_2(pipeline: EditPipeline) -> dict[str, Release]:
    """The same for v1.2 and its preview."""
    preview = dataclasses.replace(pipeline.config, reasoning=V1_2_PREVIEW.reasoning)
    return {"v1.2": Release(pipeline.config, VAE), "v1.2-preview": Release(preview, VAE)}


def narrow_pipeline(depth: int, depth_single: int, preset: ModelConfig = V1_1) -> EditPipeline:
    """A published model at a width of one head and with so many blocks; the conditioner is tiny.

    What shapes do not tell is as published, so that it can be read without knowing its sizes.
    """
    base = tiny_pipeline() if preset is V1_1 else tiny_pipeline_v1_2()
    in_features = base.config.transformer.connector.in_features
    connector = dataclasses.replace(
        preset.transformer.connector, in_features=in_features, hidden_size=128, num_heads=1
    )
    sizes = dataclasses.replace(
        preset.transformer,
        hidden_size=128,
        num_heads=1,
        mlp_ratio=1.0,
        depth=depth,
        depth_single=depth_single,
        connector=connector,
    )
    torch.manual_seed(4)
    transformer = Transformer(sizes).eval().requires_grad_(False)
    vae = AutoencoderKL(**FULL_VAE).eval().requires_grad_(False)
    for module in (transformer, vae):
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())  # so that storing them loses nothing
    model = dataclasses.replace(preset, transformer=sizes)
    return EditPipeline(transformer, vae, base.conditioner, model)
