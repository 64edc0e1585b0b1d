"""Checkpoints as other tools write them: the same numbers, or a refusal that names the tool."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from layouts import tiny_releases, write_diffusers, write_official
from step1x_edit.checkpoints.read import Wanted, read_checkpoint
from step1x_edit.errors import CheckpointError
from step1x_edit.model.pipeline import EditPipeline
from tiny import tiny_pipeline

Tensors = dict[str, Tensor]
FILE = "step1x-edit.safetensors"
LAYER = "single_blocks.0.linear1"
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def pipeline() -> EditPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def original(pipeline: EditPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "model"
    write_official(folder, pipeline)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def weights(path: Path, pipeline: EditPipeline) -> Tensors:
    """The transformer's weights, in float32."""
    wanted = Wanted(dtype=torch.float32, releases=tiny_releases(pipeline))
    return dict(read_checkpoint(path, wanted).pipeline.transformer.state_dict())


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name].float()) for name in expected
    )


@pytest.mark.parametrize(
    "prefix",
    ["model.diffusion_model.", "module._orig_mod.", "transformer.", "net.", "pipe.dit."],
)
def test_a_prefix_of_all_names_does_not_matter(
    folder: Path, pipeline: EditPipeline, prefix: str
) -> None:
    tensors = load_file(folder / FILE)
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, folder / FILE)

    assert same(weights(folder, pipeline), tensors)


def coded(tensors: Tensors) -> tuple[Tensors, dict[str, float]]:
    """Matrices in fp8, and the scales that belong to them."""
    scales = {
        name: float(tensor.abs().max()) / 448
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and name.endswith(".weight")
    }
    codes = {name: (tensors[name] / scale).to(FP8) for name, scale in scales.items()}
    return tensors | codes, scales


def layer_of(name: str) -> str:
    return name.removesuffix(".weight")


def with_scale_weights(codes: Tensors, scales: dict[str, float]) -> tuple[Tensors, dict[str, str]]:
    beside = {f"{layer_of(name)}.scale_weight": torch.tensor(scales[name]) for name in scales}
    inputs = {f"{layer_of(name)}.scale_input": torch.ones(1) for name in scales}
    return codes | beside | inputs | {"scaled_fp8": torch.zeros(2).to(FP8)}, {}


def with_tensors_of_json(
    codes: Tensors, scales: dict[str, float]
) -> tuple[Tensors, dict[str, str]]:
    text = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}).encode()
    for name, scale in scales.items():
        codes[f"{layer_of(name)}.weight_scale"] = torch.tensor([scale])
        codes[f"{layer_of(name)}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    return codes, {}


def with_formats_in_the_header(
    codes: Tensors, scales: dict[str, float]
) -> tuple[Tensors, dict[str, str]]:
    beside = {f"{layer_of(name)}.weight_scale": torch.tensor(scales[name]) for name in scales}
    inputs = {f"{layer_of(name)}.input_scale": torch.tensor(1.0) for name in scales}
    formats = {PREFIXED + layer_of(name): {"format": "float8_e4m3fn"} for name in scales}
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": formats})}
    return codes | beside | inputs, header


PREFIXED = "model.diffusion_model."


@pytest.mark.parametrize(
    "way", [with_scale_weights, with_tensors_of_json, with_formats_in_the_header]
)
def test_fp8_of_comfyui_has_its_scales(
    folder: Path,
    pipeline: EditPipeline,
    way: Callable[[Tensors, dict[str, float]], tuple[Tensors, dict[str, str]]],
) -> None:
    codes, scales = coded(load_file(folder / FILE))
    expected = {name: codes[name].float() * scales.get(name, 1.0) for name in codes}
    tensors, header = way(dict(codes), scales)
    save_file({PREFIXED + name: tensors[name] for name in tensors}, folder / FILE, header)

    assert same(weights(folder, pipeline), expected)


@pytest.mark.parametrize("suffix", [".sft", ".SAFETENSORS"])
def test_the_suffix_of_a_file_may_be_another(
    folder: Path, pipeline: EditPipeline, suffix: str
) -> None:
    tensors = load_file(folder / FILE)
    (folder / FILE).rename(folder / f"model{suffix}")

    assert same(weights(folder, pipeline), tensors)


def test_shards_may_lie_in_a_folder_below_their_index(
    tmp_path: Path, pipeline: EditPipeline
) -> None:
    write_diffusers(tmp_path, pipeline)
    expected = weights(tmp_path, pipeline)
    transformer = tmp_path / "transformer"
    shards = sorted(transformer.glob("*.safetensors"))
    (transformer / "shards").mkdir()
    for shard in shards:
        shard.rename(transformer / "shards" / shard.name)
    index = {"weight_map": {str(i): f"shards/{shard.name}" for i, shard in enumerate(shards)}}
    (transformer / "model.safetensors.index.json").write_text(json.dumps(index))

    assert same(weights(tmp_path, pipeline), expected)


def beside(**tensors: Tensor) -> Callable[[Path], None]:
    """Adds tensors for a layer; `weight` replaces its own."""

    def damage(file: Path) -> None:
        added = {f"{LAYER}.{name.replace('__', '.')}": tensors[name] for name in tensors}
        save_file(load_file(file) | added, file)

    return damage


def in_place_of_weights(*suffixes: str) -> Callable[[Path], None]:
    """All weights under other names."""

    def damage(file: Path) -> None:
        tensors = load_file(file)
        matrices = [name for name in tensors if name.endswith(".weight")]
        codes = torch.zeros(1, dtype=torch.int8)
        new = {layer_of(name) + suffix: codes.clone() for name in matrices for suffix in suffixes}
        save_file({name: tensors[name] for name in tensors if name not in matrices} | new, file)

    return damage


def as_json(**described: object) -> Tensor:
    return torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)


NUMBERS = torch.ones(1)
CODES = torch.ones(224, 32, dtype=torch.int8)
SMALL = CODES.to(FP8)
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "torchao": (
        in_place_of_weights("._weight_qdata", "._weight_scale"),
        f"{FILE} was saved by torchao, whose numbers are not read",
    ),
    "quanto": (
        in_place_of_weights(".weight._data", ".weight._scale"),
        f"{FILE} was saved by quanto",
    ),
    "bitsandbytes": (
        beside(weight__absmax=NUMBERS, weight__quant_map=NUMBERS + 1, weight=CODES.to(torch.uint8)),
        f"{FILE} was saved by bitsandbytes",
    ),
    "bitsandbytes in 8 bits": (beside(SCB=NUMBERS, weight=CODES), "was saved by bitsandbytes"),
    "compressed-tensors": (
        beside(weight=SMALL, weight_scale=NUMBERS),
        f"{FILE} was saved by compressed-tensors",
    ),
    "GPTQ": (in_place_of_weights(".qweight", ".qzeros"), "was saved by GPTQ, AWQ or SVDQuant"),
    "int8 of ComfyUI": (
        beside(weight=CODES, weight_scale=NUMBERS, comfy_quant=as_json(format="int8_tensorwise")),
        f"{LAYER} was saved by ComfyUI as int8_tensorwise",
    ),
    "a format that is no text": (
        beside(comfy_quant=as_json(format=["float8_e4m3fn"])),
        f"{LAYER} was saved by ComfyUI as ['float8_e4m3fn']",
    ),
    "a description that is none": (
        beside(comfy_quant=torch.ones(3, dtype=torch.uint8)),
        "ComfyUI's description of layers cannot be read",
    ),
    "scales of rows": (
        beside(weight=SMALL, scale_weight=torch.ones(224)),
        f"{LAYER} has scales of shape (224,): one scale is supported",
    ),
    "a scale of nothing": (beside(scale_weight=NUMBERS), f"{LAYER} has a scale, but no weight in"),
    "two scales": (
        beside(
            weight=SMALL,
            scale_weight=NUMBERS * 2,
            weight_scale=NUMBERS * 3,
            comfy_quant=as_json(format="float8_e4m3fn"),
        ),
        f"{LAYER} has two scales",
    ),
    "an endless scale": (
        beside(weight=SMALL, scale_weight=NUMBERS * torch.inf),
        f"the scale of {LAYER} is not finite",
    ),
    "integers": (beside(weight=CODES), f"has {LAYER}.weight as integers, whose scale is unknown"),
    "truth values": (beside(weight=CODES > 0), f"has {LAYER}.weight as integers"),
    "an unknown type": (
        beside(weight=CODES.to(torch.uint16)),
        f"{FILE} has numbers of type U16, which is not supported",
    ),
    "a long name": (
        beside(**{"x" * 10_000: NUMBERS}),
        "unknown tensors single_blocks.0.linear1.xxx",
    ),
}


@pytest.mark.parametrize("tool", REFUSED)
def test_numbers_that_are_not_read_are_refused_by_name(
    folder: Path, pipeline: EditPipeline, tool: str
) -> None:
    damage, sentence = REFUSED[tool]
    damage(folder / FILE)

    with pytest.raises(CheckpointError) as refused:
        weights(folder, pipeline)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500
