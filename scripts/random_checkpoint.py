"""Write a checkpoint with random weights, in the layout of a published model and of its size.

    python scripts/random_checkpoint.py OUT [--version v1.1] [--layout official] [--width narrow]

Names, shapes, types, shards and config files are as published and the tokenizer is the real one
(the dev extra contains it), so that all code runs as with the published weights; only the pictures
are noise. Full size takes 42 GB of disk, but little memory: one block of random numbers is written
again and again. Each matrix is scaled by its number of columns, which keeps activations finite
through all blocks. `--width narrow` keeps the depth and reduces the widths to those of one
attention head; `--blocks 2 4` keeps the widths and reduces the depth.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from published_tokenizer import published_tokenizer
from step1x_edit.checkpoints.keymap import to_diffusers, to_official, transformer_links, vae_links
from step1x_edit.checkpoints.stored import DTYPES
from step1x_edit.hub.catalog import CATALOG, QWEN
from step1x_edit.model.autoencoder import Autoencoder
from step1x_edit.model.config import (
    V1_0,
    V1_1,
    V1_2,
    AutoencoderConfig,
    ModelConfig,
    TransformerConfig,
)
from step1x_edit.model.transformer import Transformer

GB: Final = 1e9

QWEN_7B: Final[Mapping[str, Any]] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}
"""The config.json of Qwen2.5-VL-7B-Instruct."""

WRITTEN_BY: Final = {"_diffusers_version": "0.35.0.dev0"}

SCHEDULER: Final[Mapping[str, Any]] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    **WRITTEN_BY,
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}

PARTS: Final[Mapping[str, Any]] = {
    "_class_name": "Step1XEditPipeline",
    **WRITTEN_BY,
    "processor": ["transformers", "Qwen2_5_VLProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "transformer": ["diffusers", "Step1XEditTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
"""The index of the diffusers layout."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of all networks of a model."""

    model: ModelConfig
    vae: AutoencoderConfig
    vlm: Mapping[str, Any]


FULL: Final = {
    model.version: Sizes(model, AutoencoderConfig(), QWEN_7B) for model in (V1_0, V1_1, V1_2)
}
LAYOUTS: Final = {
    "v1.0": ("official",),
    "v1.1": ("official", "diffusers"),
    "v1.2": ("diffusers",),
}
"""The layouts in which each version is published."""


def narrow(full: Sizes) -> Sizes:
    """The same depth in the width of one attention head."""
    transformer = full.model.transformer
    width = transformer.head_dim
    connector = replace(transformer.connector, in_features=width, hidden_size=width, num_heads=1)
    transformer = replace(
        transformer, hidden_size=width, num_heads=1, mlp_ratio=1.0, connector=connector
    )
    vision_width = (
        full.vlm["vision_config"]["hidden_size"] // full.vlm["vision_config"]["num_heads"]
    )
    vision = {"hidden_size": vision_width, "num_heads": 1, "out_hidden_size": width}
    vlm = {
        "hidden_size": width,
        "intermediate_size": width,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "vision_config": {
            **vision,
            "hidden_size": vision_width,
            "intermediate_size": width,
            "num_heads": 1,
            "out_hidden_size": width,
        },
    }
    return Sizes(
        replace(full.model, transformer=transformer),
        replace(full.vae, block_out_channels=(32, 64, 96, 96)),
        {**full.vlm, **vlm},
    )


def shallow(full: Sizes, double: int, single: int) -> Sizes:
    """The same widths with fewer blocks; the conditioner's towers get as many as are double."""
    transformer = replace(full.model.transformer, depth=double, depth_single=single)
    vision = {**full.vlm["vision_config"], "depth": double}
    vlm = {**full.vlm, "num_hidden_layers": double, "vision_config": vision}
    return replace(full, model=replace(full.model, transformer=transformer), vlm=vlm)


# --- files ----------------------------------------------------------------------------------------

Tensors = Mapping[str, Tensor]


def write_checkpoint(folder: Path, sizes: Sizes, layout: str) -> None:
    """Write all files or, if that fails, none. Raises OSError, also if the disk has no room."""
    if folder.exists() and any(folder.iterdir()):
        raise OSError(f"{folder} is not empty: name a new folder")
    weights, texts = official(sizes) if layout == "official" else diffusers(sizes)
    needed = sum(tensor.nbytes for tensors in weights.values() for tensor in tensors.values())
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(place).free
    if free < needed + GB:
        raise OSError(
            f"{folder} needs {needed / GB:.1f} GB and the disk has {free / GB:.1f} GB free: "
            "free some, name a folder on another disk or add --width narrow"
        )
    try:
        for name, text in texts.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        numbers = Numbers()
        for name, tensors in weights.items():
            print(f"{folder / name}", flush=True)
            with (folder / name).open("xb") as opened:
                write_safetensors(opened, tensors, numbers)
    except BaseException:  # also Ctrl-C
        shutil.rmtree(folder, ignore_errors=True)
        raise


def official(sizes: Sizes) -> tuple[dict[str, Tensors], dict[str, str]]:
    """Weights and texts of the official layout, by file."""
    transformer, vae, vlm = networks(sizes)
    links = vae_links(sizes.vae.block_out_channels, sizes.vae.layers_per_block)
    source = next(each for each in CATALOG if each.version == sizes.model.version).sources[0]
    transformer_file, vae_file = source.patterns
    weights, texts = shards(vlm, f"{QWEN.subfolder}/model", 4 * GB)
    texts |= {
        f"{QWEN.subfolder}/config.json": as_json(sizes.vlm),
        f"{QWEN.subfolder}/tokenizer.json": published_tokenizer().to_str(),
    }
    return {transformer_file: transformer, vae_file: to_official(vae, links), **weights}, texts


def diffusers(sizes: Sizes) -> tuple[dict[str, Tensors], dict[str, str]]:
    """The same of the diffusers layout."""
    transformer, vae, vlm = networks(sizes)
    renamed = to_diffusers(transformer, transformer_links(sizes.model.transformer))
    tokenizer = published_tokenizer().to_str()
    weights: dict[str, Tensors] = {}
    texts = {
        "model_index.json": as_json(PARTS),
        "scheduler/scheduler_config.json": as_json(SCHEDULER),
        "transformer/config.json": as_json(in_diffusers_words(sizes.model.transformer)),
        "vae/config.json": as_json(vae_in_diffusers_words(sizes)),
        "text_encoder/config.json": as_json(sizes.vlm),
        "processor/tokenizer.json": tokenizer,
    }
    if sizes.model.version == "v1.2":
        texts["text_encoder/tokenizer.json"] = tokenizer
    for tensors, start, limit in (
        (dict(sorted(renamed.items())), "transformer/diffusion_pytorch_model", 10 * GB),
        (vae, "vae/diffusion_pytorch_model", 10 * GB),
        (vlm, "text_encoder/model", 5 * GB),
    ):
        files, index = shards(tensors, start, limit)
        weights |= files
        texts |= index
    return weights, texts


def networks(sizes: Sizes) -> tuple[Tensors, Tensors, Tensors]:
    """Transformer, autoencoder and conditioner: shapes and types without numbers."""
    with torch.device("meta"):
        transformer = Transformer(sizes.model.transformer).bfloat16()
        vae = Autoencoder(sizes.vae)
        vlm = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**sizes.vlm)).bfloat16()
    # The names that Qwen2.5-VL was published with; the library has renamed them since.
    published = {
        name.removeprefix("model.").replace("language_model.", "model."): tensor
        for name, tensor in vlm.state_dict().items()
    }
    return transformer.state_dict(), vae.state_dict(), published


def shards(tensors: Tensors, start: str, limit: float) -> tuple[dict[str, Tensors], dict[str, str]]:
    """Files of at most `limit` bytes whose names begin with `start`, and their index if needed."""
    split = split_torch_state_dict_into_shards(
        dict(tensors),
        filename_pattern=f"{start}{{suffix}}.safetensors",
        max_shard_size=int(limit),
    )
    files: dict[str, Tensors] = {
        file: {name: tensors[name] for name in names}
        for file, names in split.filename_to_tensors.items()
    }
    if not split.is_sharded:
        return files, {}
    placed = {name: Path(file).name for name, file in split.tensor_to_filename.items()}
    index = {"metadata": split.metadata, "weight_map": placed}
    return files, {f"{start}.safetensors.index.json": as_json(index)}


def as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def in_diffusers_words(sizes: TransformerConfig) -> dict[str, Any]:
    """The published config of a transformer."""
    described = {
        "_class_name": "Step1XEditTransformer2DModel",
        **WRITTEN_BY,
        "attention_head_dim": sizes.head_dim,
        "axes_dims_rope": sizes.axes_dim,
        "connector_depth": sizes.connector.depth,
        "connector_heads_num": sizes.connector.num_heads,
        "connector_hidden_size": sizes.connector.hidden_size,
        "connector_in_channels": sizes.connector.in_features,
        "guidance_embeds": False,
        "in_channels": sizes.in_channels,
        "joint_attention_dim": sizes.connector.hidden_size,
        "num_attention_heads": sizes.num_heads,
        "num_layers": sizes.depth,
        "num_single_layers": sizes.depth_single,
        "out_channels": sizes.out_channels,
        "patch_size": 1,
        "timestep_in_dim": 256,
        "vector_in_dim": sizes.vec_in_dim,
    }
    mapping = {"enable_text_token_mapping": True} if sizes.has_text_token_mapping else {}
    return described | mapping


def vae_in_diffusers_words(sizes: Sizes) -> dict[str, Any]:
    """The published config of an autoencoder."""
    levels = len(sizes.vae.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        **WRITTEN_BY,
        "act_fn": "silu",
        **asdict(sizes.vae),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": 3,
        "latents_mean": None,
        "latents_std": None,
        "out_channels": 3,
        "sample_size": 1024,
        "scaling_factor": sizes.model.latent_scale,
        "shift_factor": sizes.model.latent_shift,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


# --- numbers --------------------------------------------------------------------------------------

BLOCK: Final = 2**20 - 3
"""A prime, so that the rows of a matrix are shifted against each other and none occurs twice."""
VECTOR_SPREAD: Final = 0.1


class Numbers:
    """An endless sequence of random numbers, which repeats a block."""

    def __init__(self) -> None:
        block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
        self.twice = torch.cat([block, block])
        self.position = 0

    def write(self, file: BinaryIO, name: str, tensor: Tensor) -> None:
        """Write the next numbers, in the tensor's type and with its mean and spread."""
        count = tensor.numel()
        mean, spread = scale_of(name, tensor)
        some = self.twice[self.position : self.position + min(count, BLOCK)]
        data = (some * spread + mean).to(tensor.dtype).view(torch.uint8).numpy().data
        repeats, rest = divmod(tensor.nbytes, len(data))
        for _ in range(repeats):
            file.write(data)
        file.write(data[:rest])
        self.position = (self.position + count) % BLOCK


def scale_of(name: str, tensor: Tensor) -> tuple[float, float]:
    """Mean and spread: a matrix keeps the size of what it multiplies, and norms are about 1."""
    if tensor.dim() > 1:
        return 0.0, 1 / math.sqrt(math.prod(tensor.shape[1:]))
    return (0.0 if name.endswith(".bias") else 1.0), VECTOR_SPREAD


def write_safetensors(file: BinaryIO, tensors: Tensors, numbers: Numbers) -> None:
    """Write the header of the format, then the numbers of each tensor."""
    types = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": types[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, tensor in tensors.items():
        numbers.write(file, name, tensor)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("--version", choices=FULL, default="v1.1")
    parser.add_argument("--layout", choices=("official", "diffusers"))
    parser.add_argument("--width", choices=("full", "narrow"), default="full")
    parser.add_argument("--blocks", type=int, nargs=2, metavar=("DOUBLE", "SINGLE"))
    arguments = parser.parse_args()
    layouts = LAYOUTS[arguments.version]
    layout = arguments.layout or layouts[0]
    if layout not in layouts:
        parser.error(f"{arguments.version} is published in the {layouts[0]} layout only")

    sizes = FULL[arguments.version]
    if arguments.width == "narrow":
        sizes = narrow(sizes)
    if arguments.blocks is not None:
        if min(arguments.blocks) < 1:
            parser.error("--blocks needs at least one block of each kind")
        sizes = shallow(sizes, *arguments.blocks)
    try:
        write_checkpoint(arguments.folder, sizes, layout)
    except OSError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped: nothing was kept")


if __name__ == "__main__":
    main()
