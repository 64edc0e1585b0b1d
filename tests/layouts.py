"""A pipeline written to disk in the layouts of the published models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from step1x_edit.checkpoints.keymap import (
    Link,
    to_diffusers,
    to_official,
    transformer_links,
    vae_links,
)
from step1x_edit.checkpoints.read import Release
from step1x_edit.model.autoencoder import Autoencoder
from step1x_edit.model.config import (
    V1_1,
    V1_2_PREVIEW,
    AutoencoderConfig,
    ModelConfig,
    TransformerConfig,
)
from step1x_edit.model.pipeline import EditPipeline
from step1x_edit.model.transformer import Transformer
from tiny import VAE, tiny_pipeline, tiny_pipeline_v1_2

FULL_VAE = AutoencoderConfig(block_out_channels=(32, 64, 96, 96))
"""All tensors of the published autoencoder, with few numbers in each."""

WEIGHTS = "diffusion_pytorch_model"


def write_official(
    folder: Path, pipeline: EditPipeline, stored: torch.dtype = torch.float32
) -> None:
    """One file for the transformer, with `stored` as its type, and the others beside it."""
    folder.mkdir()
    vae = to_official(pipeline.vae.state_dict(), links_of(pipeline.vae))
    save(vae, folder / "vae.safetensors")
    save(converted(pipeline.transformer.state_dict(), stored), folder / "step1x-edit.safetensors")
    vlm_folder = folder / "Qwen"
    vlm_folder.mkdir()
    # The names that Qwen2.5-VL was published with; the library has renamed them since.
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


def write_diffusers(
    folder: Path, pipeline: EditPipeline, stored: torch.dtype = torch.float32, shards: int = 2
) -> None:
    """A folder for each part, with only the weights and the required files."""
    links = transformer_links(pipeline.config.transformer)
    state = converted(pipeline.transformer.state_dict(), stored)
    transformer = to_diffusers(state, links)
    names = sorted(transformer)
    for name in ("transformer", "vae", "text_encoder", "processor"):
        (folder / name).mkdir(parents=True)
    for shard in range(shards):
        part = {name: transformer[name] for name in names[shard::shards]}
        number = f"-{shard + 1:05}-of-{shards:05}" if shards > 1 else ""
        save(part, folder / "transformer" / f"{WEIGHTS}{number}.safetensors")
    save(pipeline.vae.state_dict(), folder / "vae" / f"{WEIGHTS}.safetensors")
    pipeline.conditioner.vlm.save_pretrained(folder / "text_encoder")
    pipeline.conditioner.tokenizer.save(str(folder / "processor" / "tokenizer.json"))


def write_published(
    folder: Path, pipeline: EditPipeline, stored: torch.dtype = torch.bfloat16
) -> None:
    """The diffusers layout with everything that the repositories contain beside the weights."""
    write_diffusers(folder, pipeline, stored, shards=3)
    (folder / "text_encoder" / "model.safetensors").unlink()
    pipeline.conditioner.vlm.save_pretrained(folder / "text_encoder", max_shard_size="100KB")
    files = sorted((folder / "transformer").glob("*.safetensors"))
    index = {name: file.name for file in files for name in names_in(file)}
    described = {
        "model_index.json": {"_class_name": "Step1XEditPipeline"},
        f"transformer/{WEIGHTS}.safetensors.index.json": {"weight_map": index},
        "transformer/config.json": in_diffusers_words(pipeline.config.transformer),
        "vae/config.json": dataclasses.asdict(pipeline.vae.config),
    }
    for name, content in described.items():
        (folder / name).write_text(json.dumps(content), "utf-8")


def in_diffusers_words(sizes: TransformerConfig) -> dict[str, object]:
    """The sizes in the published config of a transformer."""
    return {
        "_class_name": "Step1XEditTransformer2DModel",
        "in_channels": sizes.in_channels,
        "num_layers": sizes.depth,
        "num_single_layers": sizes.depth_single,
        "attention_head_dim": sizes.head_dim,
        "num_attention_heads": sizes.num_heads,
        "connector_heads_num": sizes.connector.num_heads,
        "axes_dims_rope": sizes.axes_dim,
        "enable_text_token_mapping": sizes.has_text_token_mapping,
    }


def names_in(*files: Path) -> set[str]:
    """The names of all tensors in the files; none is in two of them."""
    names: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert names.isdisjoint(opened.keys())
            names |= set(opened.keys())
    return names


def links_of(vae: Autoencoder) -> list[Link]:
    return vae_links(vae.config.block_out_channels, vae.config.layers_per_block)


def converted(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"}
    )


def tiny_releases(pipeline: EditPipeline) -> dict[str, Release]:
    """The tiny sizes in place of the published ones."""
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


def narrow_pipeline(
    depth: int,
    depth_single: int,
    preset: ModelConfig = V1_1,
    vae_sizes: AutoencoderConfig = FULL_VAE,
) -> EditPipeline:
    """A published model with one head and n blocks; the conditioner is tiny.

    Values that shapes do not determine are as published, so that it can be read without its sizes.
    """
    base = tiny_pipeline() if preset.conditioner.is_padded else tiny_pipeline_v1_2()
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
    vae = Autoencoder(vae_sizes).eval().requires_grad_(False)
    # So that storing them loses nothing, in any type.
    for module, dtype in ((transformer, torch.float8_e4m3fn), (vae, torch.bfloat16)):
        for parameter in module.parameters():
            parameter.copy_(parameter.to(dtype))
    model = dataclasses.replace(preset, transformer=sizes)
    return EditPipeline(transformer, vae, base.conditioner, model)
