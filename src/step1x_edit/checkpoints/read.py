"""Reading a checkpoint, in any of its three layouts, into a pipeline; writing the embedded one.

    official    step1x-edit-*.safetensors, vae.safetensors and a Qwen2.5-VL folder side by side
    diffusers   folders transformer/, vae/, text_encoder/, processor/
    demo        model.safetensors, config.json and tokenizer.json: everything in one folder

Transformer and conditioner may also be in GGUF. Files and versions are recognised by their tensors,
never by their names. Reading is strict: a tensor that is missing, unknown or of another shape is a
`CheckpointError`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from step1x_edit.checkpoints.arena import Arena, Block, Weight, blocks_of
from step1x_edit.checkpoints.changed import ChangedBlocks
from step1x_edit.checkpoints.dialects import (
    not_read,
    quantiser,
    with_scales,
    without_prefix,
)
from step1x_edit.checkpoints.find import (
    FileSet,
    choose_transformer,
    file_set,
    file_sets,
    find_vae,
    find_vlm,
    read_json,
)
from step1x_edit.checkpoints.gguf_vlm import as_published, check_models
from step1x_edit.checkpoints.keymap import (
    some_of,
    to_diffusers,
    to_official,
    transformer_links,
    vae_links,
)
from step1x_edit.checkpoints.lora import Loras
from step1x_edit.checkpoints.memory_plan import HostPlan
from step1x_edit.checkpoints.precision import is_code, with_codes
from step1x_edit.checkpoints.sizes import transformer_sizes, vae_sizes
from step1x_edit.checkpoints.stored import Stored, refuse_pickle, stored_tensors
from step1x_edit.errors import CheckpointError
from step1x_edit.model.autoencoder import Autoencoder
from step1x_edit.model.conditioner import Conditioner, measure_prefix_length
from step1x_edit.model.conditioner_v1_2 import ConditionerV12
from step1x_edit.model.config import V1_0, V1_1, V1_2, V1_2_PREVIEW, AutoencoderConfig, ModelConfig
from step1x_edit.model.language_model import add_lm_head
from step1x_edit.model.pipeline import EditPipeline, Recogniser
from step1x_edit.model.steps import PUBLISHED, Profile
from step1x_edit.model.transformer import Transformer

if TYPE_CHECKING:
    from step1x_edit.schemas.requests import Precision

DEMO_FOLDER: Final = Path(__file__).parents[1] / "model" / "demo"
DEMO_FORMAT: Final = 2
DEMO_NAME: Final = "demo"
STEPS_FILE: Final = "steps.json"
"""Beside the weights: a `Profile` for each version that `scripts/calibrate_steps.py` measured."""
QWEN_IM_START: Final = 151644
"""The id of <|im_start|> in the vocabulary of Qwen2.5-VL."""


@dataclass(frozen=True)
class Release:
    """A published model: its sizes, and those of its autoencoder."""

    model: ModelConfig
    vae: AutoencoderConfig = AutoencoderConfig()


RELEASES: Final[Mapping[str, Release]] = {
    "v1.0": Release(V1_0),
    "v1.1": Release(V1_1),
    "v1.2": Release(V1_2),
    "v1.2-preview": Release(V1_2_PREVIEW),
}

SAME_TENSORS: Final = {"v1.2-preview": "v1.2"}
"""Versions whose tensors equal those of another version, so that they must be named."""

_DTYPE_NAMES: Final = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

LM_HEAD: Final = "lm_head.weight"
EMBEDDINGS: Final = "language_model.embed_tokens.weight"


@dataclass(frozen=True)
class Wanted:
    """How to open a checkpoint."""

    version: str | None = None
    """Selects one of several transformers in a folder, and one of the versions of `SAME_TENSORS`.

    If there is none of that version, or the value is None, the newest transformer is opened.
    """
    dtype: torch.dtype | None = None
    """The type to compute in; None: float32 for the demo, bfloat16 for published models."""
    vae_dtype: torch.dtype = torch.float32
    """The type that the autoencoder computes in."""
    releases: Mapping[str, Release] = field(default_factory=lambda: RELEASES)
    loras: Mapping[Path, float] = field(default_factory=dict)
    """Files that can be added, and their default strengths."""
    precision: Precision = "auto"
    """See `with_precision`; bf16 also sets `dtype`."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is ready to edit."""

    name: str
    version: str
    pipeline: EditPipeline


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint whose network is built and checked, and whose weights are still in files."""

    checkpoint: Checkpoint
    weights: tuple[Weight, ...]
    loras: Loras = field(default_factory=Loras)
    """LoRAs that can be added to its transformer."""
    host: HostPlan = HostPlan()
    """The blocks that stay on disk."""
    packed: str = ""
    """How files in GGUF pack their numbers, in words."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of its weights in execution order."""
        return blocks_of(self.weights)

    @cached_property
    def precision(self) -> str:
        """The codes of the transformer's matrices, or the type of its numbers, and their origin."""
        weights = [each for each in self.weights if each.name.startswith("transformer.")]
        code = next((each.code for each in weights if each.code is not None), None)
        dtype = weights[0].dtype
        kept = code or _DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))
        return f"{kept} from {self.packed}" if self.packed else kept


def open_checkpoint(path: Path | None = None, wanted: Wanted = Wanted()) -> OpenedCheckpoint:
    """Open a folder or file; None is the embedded demo. Only headers are read.

    Raises CheckpointError.
    """
    if wanted.precision == "bf16":
        wanted = replace(wanted, dtype=torch.bfloat16)
    opened = with_precision(_open(path, wanted), wanted.precision)
    shapes = {
        weight.name.removeprefix("transformer."): weight.source.shape
        for weight in opened.weights
        if weight.source is not None
    }
    links = transformer_links(opened.checkpoint.pipeline.transformer.config)
    return replace(opened, loras=Loras(wanted.loras, shapes, links))


def with_precision(opened: OpenedCheckpoint, precision: Precision) -> OpenedCheckpoint:
    """The same, with most matrices kept as codes if the precision is fp8, int8 or nf4.

    A precision other than the checkpoint's own is added to the name. The network is changed; call
    this before its weights are read.
    """
    checkpoint = opened.checkpoint
    if is_code(precision):
        weights = with_codes(checkpoint.pipeline.modules, opened.weights, precision)
        opened = replace(opened, weights=weights)
    elif precision == "auto" or checkpoint.name != DEMO_NAME:
        return opened  # published models are bf16
    notes = ", ".join(filter(None, (opened.packed, precision)))
    named = replace(checkpoint, name=f"{checkpoint.name.partition(' (')[0]} ({notes})")
    return replace(opened, checkpoint=named)


def _open(path: Path | None, wanted: Wanted) -> OpenedCheckpoint:
    path = DEMO_FOLDER if path is None else path.expanduser()
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}")
    refuse_pickle(path)
    if path.is_file():
        return _open_official([file_set([path])], path, wanted)
    if read_json(path / "config.json").get("format") is not None:
        return _open_demo(path, wanted)
    if (path / "transformer").is_dir():
        return _open_diffusers(path, wanted)
    return _open_official(file_sets(path), path, wanted)


def read_checkpoint(path: Path | None = None, wanted: Wanted = Wanted()) -> Checkpoint:
    """Open a checkpoint and read its weights into host memory. Raises CheckpointError."""
    opened = open_checkpoint(path, wanted)
    changes = opened.loras.changes()
    arena = Arena(opened.weights)
    arena.fill()
    blocks = ChangedBlocks(arena)
    for name in blocks.differing(changes):
        blocks.put(name, changes)
    arena.attach(blocks.memories)
    return opened.checkpoint


def write_demo(folder: Path, pipeline: EditPipeline) -> None:
    """Write a whole pipeline in the demo layout, in bfloat16; `read_checkpoint` reads it back."""
    tensors = {
        f"{part}.{name}": tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for part, module in pipeline.modules.items()
        for name, tensor in module.state_dict().items()
    }
    config = {
        "format": DEMO_FORMAT,
        "version": pipeline.config.version,
        "model": pipeline.config.to_json(),
        "vae": asdict(pipeline.vae.config),
        "conditioner": pipeline.conditioner.vlm.config.to_dict(),
        "recogniser": {"labels": pipeline.recogniser.labels if pipeline.recogniser else []},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    pipeline.conditioner.tokenizer.save(str(folder / "tokenizer.json"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _open_demo(folder: Path, wanted: Wanted) -> OpenedCheckpoint:
    dtype = wanted.dtype or torch.float32
    config = read_json(folder / "config.json")
    if config["format"] != DEMO_FORMAT:
        raise CheckpointError(f"{folder} has format {config['format']}, known is {DEMO_FORMAT}")
    try:
        model = ModelConfig.from_json(config["model"])
        labels = config["recogniser"]["labels"]
        features = model.transformer.connector.in_features
        with _WithoutWeights():
            transformer = Transformer(model.transformer)
            vae = Autoencoder(AutoencoderConfig.from_json(config["vae"]))
            recogniser = Recogniser(features, labels) if labels else None
        vlm = _build_vlm(config["conditioner"], folder / "config.json", model)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is not valid: {error!r}") from error
    parts = _by_prefix(stored_tensors([folder / "model.safetensors"]))
    weights = [
        *_weights("transformer", transformer, parts.pop("transformer", {}), dtype),
        *_weights("vae", vae, parts.pop("vae", {}), wanted.vae_dtype),
        *_weights("conditioner", vlm, parts.pop("conditioner", {}), dtype),
    ]
    if recogniser:
        stored = parts.pop("recogniser", {})
        weights += _weights("recogniser", recogniser, stored, torch.float32)
    if parts:
        raise CheckpointError(f"{folder} has unknown tensors {some_of(parts)}")
    conditioner = _conditioner(vlm, folder, model)
    profile = _profile(folder, model.version)
    pipeline = EditPipeline(transformer, vae, conditioner, model, recogniser, profile=profile)
    checkpoint = Checkpoint(DEMO_NAME, str(config["version"]), pipeline)
    return OpenedCheckpoint(checkpoint, tuple(weights))


def _open_official(sets: Sequence[FileSet], place: Path, wanted: Wanted) -> OpenedCheckpoint:
    version = SAME_TENSORS.get(wanted.version or "", wanted.version)
    chosen = choose_transformer(sets, place, version)
    folder = place if place.is_dir() else place.parent
    vlm = find_vlm(folder)
    return _assemble(_Files(folder, chosen, {}, find_vae(folder), vlm, vlm), wanted)


def _open_diffusers(folder: Path, wanted: Wanted) -> OpenedCheckpoint:
    inside = folder / "transformer"
    chosen = choose_transformer(file_sets(inside), inside, None)
    places = [folder / name for name in ("processor", "tokenizer", "text_encoder")]
    tokenizer = next((each for each in places if (each / "tokenizer.json").is_file()), places[0])
    described = read_json(inside / "config.json")
    vlm = folder / "text_encoder"
    return _assemble(_Files(folder, chosen, described, find_vae(folder), vlm, tokenizer), wanted)


@dataclass(frozen=True)
class _Files:
    """The locations of the parts of a published model."""

    place: Path
    """The folder of the whole."""
    transformer: FileSet
    described: Mapping[str, Any]
    """The sizes of the transformer, if a config file states them."""
    vae: FileSet
    vlm: Path
    tokenizer: Path


def _assemble(files: _Files, wanted: Wanted) -> OpenedCheckpoint:
    """Build a published model from its parts, each in either layout."""
    version = _version(files.transformer, wanted.version)
    if version not in wanted.releases:
        raise CheckpointError(
            f"{files.transformer} is Step1X-Edit {version}, which is not supported yet"
        )
    release = wanted.releases[version]
    dtype = wanted.dtype or torch.bfloat16
    tensors: Mapping[str, Stored] = _read_dialect(files.transformer)
    sizes = transformer_sizes(tensors, files.described, release.model.transformer)
    if not files.transformer.is_official:
        tensors = to_official(tensors, transformer_links(sizes))
    vae_config, vae_tensors = _open_vae(files.vae, release)
    with _WithoutWeights():
        transformer = Transformer(sizes)
        vae = Autoencoder(vae_config)
    vlm, vlm_tensors, vlm_packed = _open_vlm(files.vlm, release.model)
    weights = [
        *_weights("transformer", transformer, tensors, dtype),
        *_weights("vae", vae, vae_tensors, wanted.vae_dtype),
        *_weights("conditioner", vlm, vlm_tensors, dtype),
    ]
    model = replace(release.model, transformer=sizes)
    conditioner = _conditioner(vlm, files.tokenizer, model, is_published=True)
    profile = _profile(files.place, version) or PUBLISHED
    pipeline = EditPipeline(transformer, vae, conditioner, model, profile=profile)
    packed = ", ".join(filter(None, (files.transformer.packed, vlm_packed)))
    name = f"Step1X-Edit {version}" + (f" ({packed})" if packed else "")
    checkpoint = Checkpoint(name, version, pipeline)
    return OpenedCheckpoint(checkpoint, tuple(weights), packed=packed)


def _read_dialect(files: FileSet) -> dict[str, Stored]:
    """The tensors by their names in the network, with their scales. Raises CheckpointError."""
    plain = without_prefix(stored_tensors(files.files), files.prefix)
    tensors = with_scales(plain, files.files, files.prefix)
    if tool := quantiser(tensors):
        raise CheckpointError(not_read(files, tool))
    return tensors


def _profile(folder: Path, version: str) -> Profile | None:
    """What was measured of the steps of a version, if anything."""
    file = folder / STEPS_FILE
    measured = read_json(file).get(version)
    if measured is None:
        return None
    try:
        return Profile.from_json(measured)
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid: {error}") from error


def _version(transformer: FileSet, wanted: str | None) -> str:
    """The version of a transformer by its tensors, or the requested one if those are the same."""
    if wanted is not None and SAME_TENSORS.get(wanted) == transformer.version:
        return wanted
    return transformer.version


def _open_vae(files: FileSet, release: Release) -> tuple[AutoencoderConfig, dict[str, Stored]]:
    """The autoencoder's sizes, and its tensors by their diffusers names."""
    tensors = stored_tensors(files.files)
    described = read_json(files.files[0].parent / "config.json")
    config = vae_sizes(tensors, described, release.vae)
    if files.is_official:
        links = vae_links(config.block_out_channels, config.layers_per_block)
        tensors = to_diffusers(tensors, links)
    return config, tensors


def _open_vlm(folder: Path, model: ModelConfig) -> tuple[Qwen2_5_VLModel, dict[str, Stored], str]:
    """The inner model, with the language head if it reasons, its tensors by its own names, and how
    they are packed.

    If the head shares its weights with the embeddings, it gets a copy of them.
    """
    found = file_sets(folder)
    sets = [each for each in found if not each.packed] or found
    if not sets:
        raise CheckpointError(f"cannot read the conditioner in {folder}: no safetensors there")
    file = folder / "config.json"
    vlm = _build_vlm(read_json(file), file, model)
    tensors: dict[str, Stored] = {}
    files = FileSet(tuple(file for each in sets for file in each.files), frozenset())
    stored = _read_dialect(files)
    packed = ""
    if sets[0].packed:
        check_models(sets)
        stored = as_published(stored)
        largest = max(sets, key=lambda each: each.files[0].stat().st_size)
        packed = f"conditioner {largest.packed}"
    for published, tensor in stored.items():
        if published.startswith("lm_head.") and model.reasoning is None:
            continue
        name = _inner_name(published)
        if name in tensors:
            raise CheckpointError(f"the conditioner has unknown tensors {published}")
        tensors[name] = tensor
    if model.reasoning and vlm.config.tie_word_embeddings and EMBEDDINGS in tensors:
        tensors.setdefault(LM_HEAD, tensors[EMBEDDINGS])
    return vlm, tensors, packed


def _build_vlm(config: Mapping[str, Any], file: Path, model: ModelConfig) -> Qwen2_5_VLModel:
    try:
        with _WithoutWeights():
            vlm = Qwen2_5_VLModel(Qwen2_5_VLConfig(**config))
            if model.reasoning is not None:
                add_lm_head(vlm)
            return vlm
    except Exception as error:  # a bad config fails anywhere in two libraries
        raise CheckpointError(f"{file} is not valid: {error!r}") from error


def _inner_name(published: str) -> str:
    """The name of a tensor in the inner model.

    Qwen2.5-VL was published with `model.layers…` and `visual…`; newer libraries write
    `model.language_model.layers…` and `model.visual…`.
    """
    name = published.removeprefix("model.")
    known = ("visual.", "language_model.", "lm_head.")
    return name if name.startswith(known) else f"language_model.{name}"


def _conditioner(
    vlm: Qwen2_5_VLModel, folder: Path, model: ModelConfig, is_published: bool = False
) -> Conditioner | ConditionerV12:
    """The conditioner with the tokenizer of a folder.

    A published model drops a number of tokens from its prompt, which applies to Qwen2.5-VL's
    vocabulary; with another vocabulary the tokens of the same words are counted.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"no tokenizer.json in {folder}")
    try:
        tokenizer = Tokenizer.from_str(file.read_text("utf-8"))
        config = model.conditioner
        if is_published and tokenizer.token_to_id("<|im_start|>") != QWEN_IM_START:
            config = replace(config, prefix_length=measure_prefix_length(tokenizer, config))
        if config.is_padded:
            return Conditioner(vlm, tokenizer, config)
        return ConditionerV12(vlm, tokenizer, config)
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise CheckpointError(f"{file} does not fit this model: {error}") from error


_RANDOM: Final = {"normal_", "uniform_", "kaiming_uniform_"}
"""By name: transformers replaces the functions while it builds a network."""


class _WithoutWeights(TorchFunctionMode):
    """Within it networks are built without memory for their weights, but with real buffers.

    The layers of all libraries used here create their weights with `torch.empty`, and nothing else
    does. Computed buffers, such as rotary frequencies, are not in the files and must exist.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            return func(*args, **(kwargs | {"device": "meta"}))
        # Torch would import its compiler to fill a tensor that has no memory.
        if getattr(func, "__name__", None) in _RANDOM:
            tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


PART_NAMES: Final = {"vae": "autoencoder"}
"""The names of parts in messages, if they differ."""


def _weights(
    part: str, module: nn.Module, tensors: Mapping[str, Stored], dtype: torch.dtype
) -> list[Weight]:
    """The weights of a module, and the source of their numbers.

    Raises CheckpointError unless names and shapes agree exactly.
    """
    what = PART_NAMES.get(part, part)
    module.eval().requires_grad_(False)
    expected = module.state_dict()
    if missing := expected.keys() - tensors.keys():
        raise CheckpointError(f"the {what} lacks tensors {some_of(missing)}")
    if unknown := tensors.keys() - expected.keys():
        raise CheckpointError(f"the {what} has unknown tensors {some_of(unknown)}")
    weights = []
    for name, tensor in tensors.items():
        if tensor.shape != tuple(expected[name].shape):
            shapes = f"{tensor.shape} instead of {tuple(expected[name].shape)}"
            raise CheckpointError(f"the {what} has {name} of shape {shapes}")
        if expected[name].is_floating_point() and not tensor.is_floating_point():
            raise CheckpointError(f"the {what} has {name} as integers, whose scale is unknown")
    for name in expected:
        shape = tuple(expected[name].shape)
        weights.append(Weight(f"{part}.{name}", *_owner(module, name), shape, dtype, tensors[name]))
    for name, buffer in module.named_buffers():
        if name not in expected:
            shape = tuple(buffer.shape)
            owner = _owner(module, name)
            weights.append(Weight(f"{part}.{name}", *owner, shape, buffer.dtype, buffer))
    return weights


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule that holds a tensor, and its name there."""
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path), attribute


def _by_prefix(tensors: Mapping[str, Stored]) -> dict[str, dict[str, Stored]]:
    parts: dict[str, dict[str, Stored]] = {}
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition(".")
        parts.setdefault(prefix, {})[rest] = tensor
    return parts
