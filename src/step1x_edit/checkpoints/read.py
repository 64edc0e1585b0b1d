"""Reading a checkpoint, in any of its three layouts, into a pipeline; writing the embedded one.

    official    step1x-edit-*.safetensors, vae.safetensors and a Qwen2.5-VL folder side by side
    diffusers   folders transformer/, vae/, text_encoder/, processor/
    demo        model.safetensors, config.json and tokenizer.json: everything in one folder

What a file is, and which version, is recognised by the tensors in it, never by its name. Reading
is strict: a tensor that is missing, unknown or of another shape is a `CheckpointError`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from step1x_edit.checkpoints.keymap import (
    SCALE_FACTOR,
    some_of,
    to_diffusers,
    to_official,
    transformer_links,
    vae_links,
)
from step1x_edit.errors import CheckpointError
from step1x_edit.model.conditioner import Conditioner
from step1x_edit.model.config import V1_0, V1_1, ModelConfig
from step1x_edit.model.pipeline import EditPipeline, Recogniser
from step1x_edit.model.transformer import Transformer

DEMO_FOLDER: Final = Path(__file__).parents[1] / "model" / "demo"
DEMO_FORMAT: Final = 1
MAPPING_WEIGHT: Final = "text_token_mapping.weight"
PICKLES: Final = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl"})


@dataclass(frozen=True)
class Release:
    """A published model: its sizes, and those of its autoencoder in diffusers' words."""

    model: ModelConfig
    vae: Mapping[str, Any]


FLUX_VAE: Final[Mapping[str, Any]] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": V1_1.latent_scale,
    "shift_factor": V1_1.latent_shift,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

RELEASES: Final[Mapping[str, Release]] = {
    "v1.0": Release(V1_0, FLUX_VAE),
    "v1.1": Release(V1_1, FLUX_VAE),
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is ready to edit."""

    name: str
    version: str
    pipeline: EditPipeline


def read_checkpoint(
    path: Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    version: str | None = None,
    releases: Mapping[str, Release] = RELEASES,
) -> Checkpoint:
    """Read a folder or file; None is the embedded demo.

    Without a `dtype` the demo computes in float32 and the real models in bfloat16; the
    autoencoder always in float32. Where a folder holds several transformers, `version` chooses;
    without it, or if there is none of that version, the newest is read. Raises CheckpointError.
    """
    path = DEMO_FOLDER if path is None else path.expanduser()
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}")
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path.name} may run code when read: only safetensors are accepted")
    if path.is_file():
        return _read_official([path], path.parent, device, dtype, version, releases)
    if _json(path / "config.json").get("format") is not None:
        return _read_demo(path, device, dtype)
    if (path / "transformer").is_dir():
        return _read_diffusers(path, device, dtype, releases)
    files = sorted(path.glob("*.safetensors"))
    return _read_official(files, path, device, dtype, version, releases)


def write_demo(folder: Path, pipeline: EditPipeline) -> None:
    """Write a whole pipeline in the demo layout, in bfloat16; `read_checkpoint` reads it back."""
    parts = {
        "transformer": pipeline.transformer,
        "vae": pipeline.vae,
        "conditioner": pipeline.conditioner.vlm,
        **({"recogniser": pipeline.recogniser} if pipeline.recogniser else {}),
    }
    tensors = {
        f"{part}.{name}": tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    vae = {key: value for key, value in pipeline.vae.config.items() if not key.startswith("_")}
    config = {
        "format": DEMO_FORMAT,
        "version": pipeline.config.version,
        "model": pipeline.config.to_json(),
        "vae": vae,
        "conditioner": pipeline.conditioner.vlm.config.to_dict(),
        "recogniser": {"labels": pipeline.recogniser.labels if pipeline.recogniser else []},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    pipeline.conditioner.tokenizer.save(str(folder / "tokenizer.json"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _read_demo(folder: Path, device: str | torch.device, dtype: torch.dtype | None) -> Checkpoint:
    config = _json(folder / "config.json")
    if config["format"] != DEMO_FORMAT:
        raise CheckpointError(f"{folder} has format {config['format']}, known is {DEMO_FORMAT}")
    try:
        model = ModelConfig.from_json(config["model"])
        transformer = _empty_transformer(model)
        vae = _empty_vae(config["vae"])
        vlm = Qwen2_5_VLModel(Qwen2_5_VLConfig(**config["conditioner"]))
        labels = config["recogniser"]["labels"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is not valid: {error!r}") from error
    dtype = dtype or torch.float32
    features = model.transformer.connector.in_features
    recogniser = Recogniser(features, labels) if labels else None
    parts = _by_prefix(_tensors([folder / "model.safetensors"]))
    _fill(transformer, parts.pop("transformer", {}), "transformer", device, dtype)
    _fill(vae, parts.pop("vae", {}), "autoencoder", device, torch.float32)
    _fill(vlm, parts.pop("conditioner", {}), "conditioner", device, dtype)
    if recogniser:
        _fill(recogniser, parts.pop("recogniser", {}), "recogniser", device, torch.float32)
    if parts:
        raise CheckpointError(f"{folder} has unknown tensors {some_of(parts)}")
    conditioner = _conditioner(vlm, folder, model)
    pipeline = EditPipeline(transformer, vae, conditioner, model, recogniser)
    return Checkpoint("demo", str(config["version"]), pipeline)


def _read_official(
    files: Sequence[Path],
    folder: Path,
    device: str | torch.device,
    dtype: torch.dtype | None,
    wanted: str | None,
    releases: Mapping[str, Release],
) -> Checkpoint:
    version, file = _choose_transformer(files, folder, wanted, releases)
    vae_file = _find_vae(folder)
    vlm_folder = _find_vlm(folder)
    release = releases[version]
    links = vae_links(release.vae["block_out_channels"], release.vae["layers_per_block"])
    return _assemble(
        version,
        release,
        transformer_tensors=_tensors([file]),
        vae_tensors=to_diffusers(_tensors([vae_file]), links),
        vlm_folder=vlm_folder,
        tokenizer_folder=vlm_folder,
        device=device,
        dtype=dtype,
    )


def _read_diffusers(
    folder: Path,
    device: str | torch.device,
    dtype: torch.dtype | None,
    releases: Mapping[str, Release],
) -> Checkpoint:
    tensors = _tensors(_safetensors_in(folder / "transformer"))
    version = _version(tensors)
    release = _release(version, folder, releases)
    tokenizers = [folder / name for name in ("processor", "tokenizer", "text_encoder")]
    return _assemble(
        version,
        release,
        transformer_tensors=to_official(tensors, transformer_links(release.model.transformer)),
        vae_tensors=_tensors(_safetensors_in(folder / "vae")),
        vlm_folder=folder / "text_encoder",
        tokenizer_folder=next(
            (found for found in tokenizers if (found / "tokenizer.json").is_file()), tokenizers[0]
        ),
        device=device,
        dtype=dtype,
    )


def _assemble(
    version: str,
    release: Release,
    *,
    transformer_tensors: Mapping[str, Tensor],
    vae_tensors: Mapping[str, Tensor],
    vlm_folder: Path,
    tokenizer_folder: Path,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> Checkpoint:
    """Put a published model together."""
    dtype = dtype or torch.bfloat16
    transformer = _empty_transformer(release.model)
    _fill(transformer, transformer_tensors, "transformer", device, dtype)
    vae = _empty_vae(release.vae)
    _fill(vae, vae_tensors, "autoencoder", device, torch.float32)
    vlm = _read_vlm(vlm_folder, dtype).to(device)
    conditioner = _conditioner(vlm, tokenizer_folder, release.model)
    pipeline = EditPipeline(transformer, vae, conditioner, release.model)
    return Checkpoint(f"Step1X-Edit {version}", version, pipeline)


def _choose_transformer(
    files: Sequence[Path], folder: Path, wanted: str | None, releases: Mapping[str, Release]
) -> tuple[str, Path]:
    """The version and file of the wanted transformer, or else of the newest."""
    found = {_version(names): file for file in files if _is_transformer(names := _names(file))}
    if not found:
        refused = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        hint = f"; {refused[0]} is not read: only safetensors are accepted" if refused else ""
        raise CheckpointError(f"no Step1X-Edit transformer in {folder}{hint}")
    version = wanted if wanted in found else max(found)
    _release(version, found[version], releases)
    return version, found[version]


def _version(names: Iterable[str]) -> str:
    names = set(names)
    if MAPPING_WEIGHT in names:
        return "v1.2"
    return "v1.0" if SCALE_FACTOR in names else "v1.1"


def _release(version: str, place: Path, releases: Mapping[str, Release]) -> Release:
    if version not in releases:
        raise CheckpointError(f"{place} is Step1X-Edit {version}, which is not supported yet")
    return releases[version]


def _is_transformer(names: Iterable[str]) -> bool:
    return "double_blocks.0.img_attn.qkv.weight" in names


def _find_vae(folder: Path) -> Path:
    for file in sorted(folder.glob("*.safetensors")):
        if "decoder.up.0.block.0.conv1.weight" in _names(file):
            return file
    raise CheckpointError(f"no autoencoder (vae.safetensors) in {folder}")


def _find_vlm(folder: Path) -> Path:
    for config in sorted(folder.glob("*/config.json")):
        if _json(config).get("model_type") == "qwen2_5_vl":
            return config.parent
    raise CheckpointError(f"no folder with Qwen2.5-VL-7B-Instruct in {folder}")


def _read_vlm(folder: Path, dtype: torch.dtype) -> Qwen2_5_VLModel:
    """The inner model, without the language head; transformers knows the older tensor names."""
    try:
        vlm, report = Qwen2_5_VLModel.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the conditioner in {folder}: {error}") from error
    if report["missing_keys"]:
        raise CheckpointError(f"the conditioner misses tensors {some_of(report['missing_keys'])}")
    unknown = {name for name in report["unexpected_keys"] if not name.startswith("lm_head.")}
    if unknown:
        raise CheckpointError(f"the conditioner has unknown tensors {some_of(unknown)}")
    return vlm.eval().requires_grad_(False)


def _conditioner(vlm: Qwen2_5_VLModel, folder: Path, model: ModelConfig) -> Conditioner:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"no tokenizer.json in {folder}")
    try:
        return Conditioner(vlm, Tokenizer.from_str(file.read_text("utf-8")), model.conditioner)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise CheckpointError(f"{file} does not fit this model: {error}") from error


def _empty_transformer(model: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(model.transformer)


def _empty_vae(config: Mapping[str, Any]) -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(**config)


def _fill(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    what: str,
    device: str | torch.device,
    dtype: torch.dtype,
) -> None:
    """Give a module its weights. Raises CheckpointError unless names and shapes agree exactly."""
    expected = module.state_dict()
    if missing := expected.keys() - tensors.keys():
        raise CheckpointError(f"the {what} misses tensors {some_of(missing)}")
    if unknown := tensors.keys() - expected.keys():
        raise CheckpointError(f"the {what} has unknown tensors {some_of(unknown)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
            raise CheckpointError(f"the {what} has {name} of shape {shapes}")
    # Copied, because the tensors of a safetensors file live and die with the file.
    weights = {name: tensor.to(device, dtype, copy=True) for name, tensor in tensors.items()}
    module.load_state_dict(weights, assign=True)
    module.to(device).eval().requires_grad_(False)


def _tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of the files, mapped into memory rather than read."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 not a dict
                    if name in tensors:
                        raise CheckpointError(f"{file} repeats the tensor {name}")
                    tensors[name] = opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {file}: {error}") from error
    return tensors


def _names(file: Path) -> set[str]:
    """The names of a file's tensors, from its header."""
    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error


def _safetensors_in(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"no safetensors in {folder}")
    return files


def _by_prefix(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition(".")
        parts.setdefault(prefix, {})[rest] = tensor
    return parts


def _json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold an object")
    return content
