"""Checkpoints: every layout gives the same network, and damage is reported in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from layouts import save, tiny_releases, write_diffusers, write_official
from step1x_edit.checkpoints.read import (
    Checkpoint,
    Release,
    Wanted,
    open_checkpoint,
    read_checkpoint,
    write_demo,
)
from step1x_edit.errors import CheckpointError
from step1x_edit.model.pipeline import EditPipeline
from step1x_edit.model.request import NetworkRequest
from tiny import VAE, a_picture, final_picture, tiny_pipeline

REQUEST = NetworkRequest(a_picture(), "make it night", num_steps=2, size_level=64)


@pytest.fixture(scope="module")
def pipeline() -> EditPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def originals(pipeline: EditPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network in all three layouts, one folder each."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_demo(folder / "demo", pipeline)
    write_official(folder / "official", pipeline)
    write_diffusers(folder / "diffusers", pipeline)
    return folder


@pytest.fixture
def copies(originals: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(originals, tmp_path / "copies"))


def read(path: Path, pipeline: EditPipeline, version: str | None = None) -> Checkpoint:
    """Read with the tiny sizes in the place of the published ones."""
    releases = tiny_releases(pipeline)
    return read_checkpoint(path, Wanted(dtype=torch.float32, version=version, releases=releases))


def picture(pipeline: EditPipeline) -> np.ndarray:
    return final_picture(pipeline, REQUEST)


@pytest.mark.parametrize(
    ("place", "name", "version"),
    [
        ("demo", "demo", "tiny"),
        ("official", "Step1X-Edit v1.1", "v1.1"),
        ("official/step1x-edit.safetensors", "Step1X-Edit v1.1", "v1.1"),
        ("diffusers", "Step1X-Edit v1.1", "v1.1"),
    ],
)
def test_every_layout_gives_the_same_picture(
    originals: Path, pipeline: EditPipeline, place: str, name: str, version: str
) -> None:
    checkpoint = read(originals / place, pipeline)

    assert (checkpoint.name, checkpoint.version) == (name, version)
    assert picture(checkpoint.pipeline).tobytes() == picture(pipeline).tobytes()


def test_the_recogniser_is_part_of_the_demo(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(labels=("night", "unknown"))
    write_demo(tmp_path, pipeline)

    recogniser = read_checkpoint(tmp_path).pipeline.recogniser

    assert recogniser is not None
    assert recogniser.labels == ("night", "unknown")
    assert pipeline.recogniser is not None
    assert torch.equal(recogniser.weight, pipeline.recogniser.weight)


def test_a_demo_is_stored_in_bfloat16_and_computes_in_float32(originals: Path) -> None:
    stored = load_file(originals / "demo" / "model.safetensors")

    checkpoint = read_checkpoint(originals / "demo")

    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert checkpoint.pipeline.transformer.img_in.weight.dtype == torch.float32


def test_real_models_compute_in_bfloat16_but_for_the_autoencoder(
    originals: Path, pipeline: EditPipeline
) -> None:
    releases = {"v1.1": Release(pipeline.config, VAE)}

    read = read_checkpoint(originals / "official", Wanted(releases=releases)).pipeline

    assert read.transformer.img_in.weight.dtype == torch.bfloat16
    assert read.conditioner.vlm.dtype == torch.bfloat16
    assert read.vae.dtype == torch.float32
    difference = picture(read).astype(int) - picture(pipeline)
    assert np.abs(difference).mean() < 8


def test_a_scale_factor_makes_it_v1_0(copies: Path, pipeline: EditPipeline) -> None:
    file = copies / "official" / "step1x-edit.safetensors"
    save({**load_file(file), "connector.scale_factor": torch.tensor([-0.9])}, file)

    checkpoint = read(copies / "official", pipeline)

    assert checkpoint.version == "v1.0"
    assert picture(checkpoint.pipeline).tobytes() != picture(pipeline).tobytes()


def test_of_several_transformers_the_wanted_or_the_newest_is_read(
    copies: Path, pipeline: EditPipeline
) -> None:
    file = copies / "official" / "step1x-edit.safetensors"
    older = {**load_file(file), "connector.scale_factor": torch.tensor([-0.9])}
    save(older, file.with_name("zzz.safetensors"))

    assert read(copies / "official", pipeline).version == "v1.1"
    assert read(copies / "official", pipeline, version="v1.0").version == "v1.0"
    assert read(copies / "official" / "zzz.safetensors", pipeline).version == "v1.0"


def test_float8_weights_are_widened(copies: Path, pipeline: EditPipeline) -> None:
    file = copies / "official" / "step1x-edit.safetensors"
    save({name: t.to(torch.float8_e4m3fn) for name, t in load_file(file).items()}, file)

    checkpoint = read(copies / "official", pipeline)

    weight = checkpoint.pipeline.transformer.img_in.weight
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, pipeline.transformer.img_in.weight, atol=0.02, rtol=0.1)


def test_mixed_types_are_read_tensor_by_tensor(copies: Path, pipeline: EditPipeline) -> None:
    """As some keep norms and biases wide, and others do not."""
    file = copies / "official" / "step1x-edit.safetensors"
    kinds = (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32)
    tensors = load_file(file)
    mixed = {name: tensors[name].to(kinds[i % 4]) for i, name in enumerate(sorted(tensors))}
    save(mixed, file)

    state = read(copies / "official", pipeline).pipeline.transformer.state_dict()

    assert all(torch.equal(state[name], tensor.float()) for name, tensor in mixed.items())


def test_the_parts_are_recognised_in_each_others_layout(
    copies: Path, pipeline: EditPipeline
) -> None:
    """A transformer in diffusers' names and shards beside an autoencoder in its own names."""
    official, diffusers = copies / "official", copies / "diffusers"
    (official / "step1x-edit.safetensors").unlink()
    for shard in (diffusers / "transformer").glob("*.safetensors"):
        shard.rename(official / shard.name)
    (diffusers / "vae" / "diffusion_pytorch_model.safetensors").rename(official / "vae.safetensors")

    checkpoint = read(official, pipeline)

    assert checkpoint.version == "v1.1"
    assert picture(checkpoint.pipeline).tobytes() == picture(pipeline).tobytes()


def test_sizes_come_from_the_tensors(copies: Path, pipeline: EditPipeline) -> None:
    """With one block more than the release has, in each layout."""
    file = copies / "official" / "step1x-edit.safetensors"
    change(
        file,
        lambda tensors: tensors.update(
            {
                name.replace("single_blocks.1.", "single_blocks.2."): tensor.clone()
                for name, tensor in tensors.items()
                if name.startswith("single_blocks.1.")
            }
        ),
    )

    config = read(copies / "official", pipeline).pipeline.transformer.config

    assert config.depth_single == pipeline.config.transformer.depth_single + 1


def change(file: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save(tensors, file)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES: dict[str, tuple[str, str, Callable[[Path], object], str]] = {
    "a missing tensor": (
        "official",
        "step1x-edit.safetensors",
        lambda file: change(file, lambda tensors: tensors.pop("img_in.bias")),
        "the transformer lacks tensors img_in.bias",
    ),
    "an unknown tensor": (
        "official",
        "step1x-edit.safetensors",
        lambda file: change(file, lambda tensors: tensors.update(extra=torch.zeros(1))),
        "the transformer has unknown tensors extra",
    ),
    "a number that is none": (
        "official",
        "step1x-edit.safetensors",
        lambda file: change(
            file, lambda tensors: tensors["single_blocks.0.linear1.weight"][-1, 2].fill_(torch.nan)
        ),
        "holds numbers in transformer.single_blocks.0.linear1.weight that are not finite",
    ),
    "an endless number": (
        "official",
        "vae.safetensors",
        lambda file: change(
            file, lambda tensors: tensors["decoder.conv_in.bias"][0].fill_(-torch.inf)
        ),
        "holds numbers in vae.decoder.conv_in.bias that are not finite",
    ),
    "a wrong shape": (
        "official",
        "step1x-edit.safetensors",
        lambda file: change(file, lambda tensors: tensors.update({"img_in.bias": torch.ones(3)})),
        "img_in.bias of shape (3,) instead of (32,)",
    ),
    "a truncated file": (
        "official",
        "step1x-edit.safetensors",
        truncate,
        "step1x-edit.safetensors",
    ),
    "no autoencoder": ("official", "vae.safetensors", Path.unlink, "no autoencoder"),
    "an incomplete autoencoder": (
        "official",
        "vae.safetensors",
        lambda file: change(file, lambda tensors: tensors.pop("decoder.conv_in.bias")),
        "decoder.conv_in.bias",
    ),
    "no conditioner": ("official", "Qwen", shutil.rmtree, "no folder with Qwen2.5-VL"),
    "no tokenizer": ("official", "Qwen/tokenizer.json", Path.unlink, "no tokenizer.json"),
    "a conditioner without weights": (
        "official",
        "Qwen/model.safetensors",
        Path.unlink,
        "cannot read the conditioner",
    ),
    "a conditioner of no sizes": (
        "official",
        "Qwen/config.json",
        lambda file: file.write_text('{"model_type": "qwen2_5_vl", "hidden_size": "wide"}'),
        "config.json is not valid",
    ),
    "a conditioner with two tensors of one name": (
        "official",
        "Qwen/model.safetensors",
        lambda file: change(
            file,
            lambda tensors: tensors.update(
                {"model.language_model.norm.weight": tensors["model.norm.weight"].clone()}
            ),
        ),
        "the conditioner has unknown tensors",
    ),
    "a convolution that is none": (
        "official",
        "vae.safetensors",
        lambda file: change(
            file,
            lambda tensors: tensors.update({"decoder.mid.attn_1.q.weight": torch.ones(2, 2, 3, 3)}),
        ),
        "is not a 1x1 convolution",
    ),
    "an incomplete conditioner": (
        "official",
        "Qwen/model.safetensors",
        lambda file: change(file, lambda tensors: tensors.pop("model.norm.weight")),
        "the conditioner lacks tensors",
    ),
    "a tokenizer of another model": (
        "official",
        "Qwen/tokenizer.json",
        lambda file: file.write_text(file.read_text("utf-8").replace("vision_end", "other")),
        "vision_end",
    ),
    "a missing shard": (
        "diffusers",
        "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
        Path.unlink,
        "has 1 of the 2 files of diffusion_pytorch_model: the others are missing",
    ),
    "a missing shard that the index lists": (
        "diffusers",
        "transformer",
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors",'
            ' "b": "last.safetensors"}}'
        ),
        "lacks last.safetensors, which its index lists",
    ),
    "an index that is none": (
        "diffusers",
        "transformer",
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        "cannot read",
    ),
    "an unfinished download": (
        "official",
        "step1x-edit.safetensors",
        lambda file: file.rename(f"{file}.incomplete"),
        "step1x-edit.safetensors.incomplete is not complete: download it again",
    ),
    "a model like FLUX": (
        "official",
        "step1x-edit.safetensors",
        lambda file: change(
            file,
            lambda tensors: [tensors.pop(name) for name in list(tensors) if "connector" in name],
        ),
        "step1x-edit.safetensors has no connector: it is another model of this kind, such as FLUX",
    ),
    "a model of quite another kind": (
        "official",
        "step1x-edit.safetensors",
        lambda file: save({"down_blocks.0.attentions.0.to_q.weight": torch.ones(2)}, file),
        "step1x-edit.safetensors is of another model",
    ),
    "a LoRA": (
        "official",
        "step1x-edit.safetensors",
        lambda file: save(
            {
                "lora_unet_single_blocks_0_linear1.alpha": torch.ones(1),
                "lora_unet_single_blocks_0_linear1.lora_up.weight": torch.ones(1),
            },
            file,
        ),
        "step1x-edit.safetensors is a LoRA: set LORA_PATH to it",
    ),
    "only the autoencoder": (
        "official",
        "step1x-edit.safetensors",
        Path.unlink,
        "vae.safetensors is the autoencoder alone",
    ),
    "heads that do not fit": (
        "official",
        "step1x-edit.safetensors",
        lambda file: change(
            file,
            lambda tensors: tensors.update(
                {"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(12)}
            ),
        ),
        "which do not fit together",
    ),
    "an empty folder": (
        "diffusers",
        "vae/diffusion_pytorch_model.safetensors",
        Path.unlink,
        "no autoencoder",
    ),
    "no weights": ("demo", "model.safetensors", Path.unlink, "model.safetensors"),
    "a demo without an autoencoder": (
        "demo",
        "model.safetensors",
        lambda file: change(
            file,
            lambda tensors: [tensors.pop(name) for name in list(tensors) if name[:3] == "vae"],
        ),
        "the autoencoder lacks tensors",
    ),
    "a tensor of no part": (
        "demo",
        "model.safetensors",
        lambda file: change(file, lambda tensors: tensors.update({"lora.w": torch.ones(1)})),
        "unknown tensors lora",
    ),
    "a config that is not JSON": (
        "demo",
        "config.json",
        lambda file: file.write_text("{"),
        "config.json",
    ),
    "a config that is nested too deeply": (
        "demo",
        "config.json",
        lambda file: file.write_text("[" * 100_000),
        "cannot read",
    ),
    "a config without sizes": (
        "demo",
        "config.json",
        lambda file: file.write_text('{"format": 2}'),
        "config.json is not valid",
    ),
    "a config of the future": (
        "demo",
        "config.json",
        lambda file: file.write_text('{"format": 3}'),
        "format 3",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_in_one_line(copies: Path, pipeline: EditPipeline, damage: str) -> None:
    layout, place, break_it, message = DAMAGES[damage]
    break_it(copies / layout / place)

    with pytest.raises(CheckpointError) as raised:
        read(copies / layout, pipeline)

    told = str(raised.value)
    assert told.startswith("Manager not initialized: ")
    assert message in told
    assert "\n" not in told
    assert len(told) <= 500


def test_the_conditioner_is_read_under_its_older_and_its_newer_names(
    copies: Path, pipeline: EditPipeline
) -> None:
    file = copies / "official" / "Qwen" / "model.safetensors"
    older = load_file(file)
    newer = {
        f"model.{name}" if name.startswith("visual.") else name: tensor
        for name, tensor in older.items()
    }
    newer = {
        name.replace("model.", "model.language_model.", 1)
        if name.startswith("model.") and not name.startswith("model.visual.")
        else name: tensor
        for name, tensor in newer.items()
    }
    assert not older.keys() & newer.keys() - {"lm_head.weight"}
    save(newer, file)

    checkpoint = read(copies / "official", pipeline)

    assert picture(checkpoint.pipeline).tobytes() == picture(pipeline).tobytes()


def test_opening_a_checkpoint_takes_no_memory_for_its_weights(
    originals: Path, pipeline: EditPipeline
) -> None:
    opened = open_checkpoint(originals / "official", Wanted(releases=tiny_releases(pipeline)))

    for module in opened.checkpoint.pipeline.modules.values():
        for name, parameter in module.named_parameters():
            assert parameter.is_meta or parameter.dim() == 1, name


def test_a_version_that_is_not_known_is_named(copies: Path, pipeline: EditPipeline) -> None:
    change(
        copies / "diffusers" / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors",
        lambda tensors: tensors.update({"text_token_mapping.weight": torch.ones(1)}),
    )

    with pytest.raises(CheckpointError, match=r"v1\.2, which is not supported yet"):
        read(copies / "diffusers", pipeline)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin"])
def test_pickled_weights_are_refused(tmp_path: Path, pipeline: EditPipeline, name: str) -> None:
    (tmp_path / name).touch()

    for path in (tmp_path / name, tmp_path):
        with pytest.raises(CheckpointError, match=f"{name}.*only safetensors"):
            read(path, pipeline)


def test_a_place_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        read_checkpoint(tmp_path / "nowhere")


def test_an_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no Step1X-Edit transformer"):
        read_checkpoint(tmp_path)


def test_a_demo_config_can_be_read_by_people(originals: Path) -> None:
    config = json.loads((originals / "demo" / "config.json").read_text("utf-8"))

    assert config["format"] == 2
    assert config["model"]["conditioner"]["prompt_prefix"] == "Edit the picture:"
    assert config["vae"]["latent_channels"] == 16
