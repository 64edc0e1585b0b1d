"""Checkpoints as they are published, but narrow: every tensor has its place in each layout."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from command_line import edit
from extent import by_extent
from http_server import TOKEN, serving
from layouts import (
    links_of,
    names_in,
    narrow_pipeline,
    save,
    write_diffusers,
    write_official,
    write_published,
)
from step1x_edit.checkpoints.keymap import SCALE_FACTOR, to_official, transformer_links, vae_links
from step1x_edit.checkpoints.read import Wanted, read_checkpoint
from step1x_edit.interfaces.cli import app
from step1x_edit.model.autoencoder import Autoencoder
from step1x_edit.model.config import V1_0, V1_1, V1_2, V1_2_PREVIEW, AutoencoderConfig, ModelConfig
from step1x_edit.model.pipeline import EditPipeline
from step1x_edit.model.request import NetworkRequest
from step1x_edit.model.transformer import Transformer
from step1x_edit.service.wiring import build_service
from step1x_edit.settings import Settings
from tiny import VAE, a_picture, final_picture

REQUEST = NetworkRequest(a_picture(), "night", num_steps=1, guidance_scale=1.0, size_level=64)
FLUX_VAE = AutoencoderConfig()
THIN_VAE = AutoencoderConfig(block_out_channels=(32, 32, 32, 32))
"""As little to compute as 32 groups of channels allow."""
KEYMAP = Path(__file__).parents[3] / "shared" / "reference" / "keymap.json"


def digest(shapes: dict[str, tuple[int, ...]]) -> str:
    """One number for all names and shapes."""
    lines = [f"{name} {'x'.join(map(str, shape))}\n" for name, shape in sorted(shapes.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def full_size(preset: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(preset.transformer)


def in_diffusers_names(preset: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What the links make of the shapes of a model of full size."""
    shapes = {name: tuple(tensor.shape) for name, tensor in full_size(preset).state_dict().items()}
    shapes.pop(SCALE_FACTOR, None)
    found: dict[str, tuple[int, ...]] = {}
    for link in transformer_links(preset.transformer):
        shape = shapes.pop(link.official)
        rows = link.rows or (shape[0],)
        for name, count in zip(link.diffusers, rows, strict=True):
            assert name not in found
            found[name] = (count, *shape[1:])
    assert not shapes
    return found


# Names and shapes of the published checkpoints, as the facts of the model list them.
@pytest.mark.parametrize(
    ("preset", "count", "gigabytes", "names_and_shapes"),
    [
        (
            V1_0,
            1196,
            24_855_600_768,
            "ac1244b27eb547ed07635172766cd274a141ea16815adad765ccd424109d5977",
        ),
        (
            V1_1,
            1196,
            24_855_600_768,
            "ac1244b27eb547ed07635172766cd274a141ea16815adad765ccd424109d5977",
        ),
        (
            V1_2,
            1198,
            24_884_969_088,
            "426bdecfeaf94cafd3dfbd253772948bbf223dafabdb395457aafc88ffcda371",
        ),
    ],
    ids=["v1.0", "v1.1", "v1.2"],
)
def test_a_model_of_full_size_maps_without_rest(
    preset: ModelConfig, count: int, gigabytes: int, names_and_shapes: str
) -> None:
    shapes = in_diffusers_names(preset)

    assert len(shapes) == count
    assert 2 * sum(int(np.prod(shape)) for shape in shapes.values()) == gigabytes
    assert digest(shapes) == names_and_shapes


@pytest.mark.parametrize(
    ("preset", "count", "names_and_shapes"),
    [
        (V1_0, 817, "68157b7d9f4b081ab80341adcdfc7376670b3fff04618778eeb814fb60725926"),
        (V1_1, 816, "fbc319c0a659f2a0457164891ccf062f3c9dabfed31948a451ae07d052f71775"),
    ],
    ids=["v1.0", "v1.1"],
)
def test_a_model_of_full_size_has_the_official_names(
    preset: ModelConfig, count: int, names_and_shapes: str
) -> None:
    shapes = {name: tuple(t.shape) for name, t in full_size(preset).state_dict().items()}

    assert len(shapes) == count
    assert digest(shapes) == names_and_shapes


def test_an_autoencoder_of_full_size_maps_without_rest() -> None:
    with torch.device("meta"):
        state = Autoencoder(FLUX_VAE).state_dict()
    links = vae_links(FLUX_VAE.block_out_channels, FLUX_VAE.layers_per_block)
    shapes, official = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for tensors in (state, to_official(state, links))
    )

    assert len(official) == len(shapes) == 244
    assert digest(shapes) == "129cf253774ad960a79a60ee4f77237459c2188175e44a698b55faf0cbb6b276"
    assert digest(official) == "a7a23e66b94002cf3e9b14f5a6b4b2b36227cbec03d203dd1d1f45f3f4780830"


@pytest.mark.skipif(
    not KEYMAP.is_file(), reason="the reference lies beside the checkout, if at all"
)
def test_the_names_and_shapes_are_those_of_the_reference() -> None:
    table = json.loads(KEYMAP.read_text("utf-8"))
    shapes = {name: list(t.shape) for name, t in full_size(V1_1).state_dict().items()}
    vae = vae_links(FLUX_VAE.block_out_channels, FLUX_VAE.layers_per_block)

    for rows, links in ((table["dit"], transformer_links(V1_1.transformer)), (table["vae"], vae)):
        expected = {row["official"]: row["diffusers"] for row in rows}
        assert {link.official: list(link.diffusers) for link in links} == expected
    assert {row["official"]: row["shape"] for row in table["dit"]} == shapes


# --- files ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """A way in which a version is published or passed on."""

    preset: ModelConfig
    write: Callable[[Path, EditPipeline, torch.dtype], None]
    stored: torch.dtype
    place: str = ""
    """What MODEL_PATH names in its folder."""


def in_one_file(folder: Path, pipeline: EditPipeline, stored: torch.dtype) -> None:
    write_diffusers(folder, pipeline, stored, shards=1)


LAYOUTS = {
    "v1.0": Layout(V1_0, write_official, torch.bfloat16, "step1x-edit.safetensors"),
    "v1.0-fp8": Layout(V1_0, write_official, torch.float8_e4m3fn),
    "v1.1": Layout(V1_1, write_official, torch.bfloat16),
    "v1.1-fp16": Layout(V1_1, write_official, torch.float16, "step1x-edit.safetensors"),
    "v1.1-diffusers": Layout(V1_1, write_published, torch.bfloat16),
    "v1.1-diffusers-fp32": Layout(V1_1, in_one_file, torch.float32),
    "v1.2-preview-fp32": Layout(V1_2_PREVIEW, in_one_file, torch.float32),
    "v1.2": Layout(V1_2, write_published, torch.bfloat16),
}
FAMILIES = {
    family: {name: layout for name, layout in LAYOUTS.items() if name.startswith(family)}
    for family in ("v1.0", "v1.1", "v1.2")
}
"""Layouts of the same numbers: they make the same picture. The preview only thinks differently."""


def names_of(layout: Layout, pipeline: EditPipeline) -> dict[str, set[str]]:
    """All names that the published files of a layout have, in the words of the presets."""
    is_official = layout.write is write_official
    with torch.device("meta"):
        vae = Autoencoder(FLUX_VAE).state_dict().keys()
    links = links_of(pipeline.vae)
    assert {name for link in links for name in link.diffusers} == vae
    if not is_official:
        return {"transformer": set(in_diffusers_names(layout.preset)), "vae": set(vae)}
    transformer = set(full_size(layout.preset).state_dict())
    return {"transformer": transformer, "vae": {link.official for link in links}}


def names_on_disk(layout: Layout, folder: Path) -> dict[str, set[str]]:
    if layout.write is write_official:
        files = {"transformer": "step1x-edit.safetensors", "vae": "vae.safetensors"}
    else:
        files = {"transformer": "transformer/*.safetensors", "vae": "vae/*.safetensors"}
    return {part: names_in(*folder.glob(pattern)) for part, pattern in files.items()}


@cache
def as_deep_as_published(preset: ModelConfig) -> EditPipeline:
    """A narrow model with all blocks of a preset; each layout stores its numbers without loss."""
    sizes = preset.transformer
    return narrow_pipeline(sizes.depth, sizes.depth_single, preset)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_the_published_models_is_read_in_each_layout(
    family: str, tmp_path: Path
) -> None:
    pictures = set()
    for name, layout in FAMILIES[family].items():
        original = as_deep_as_published(layout.preset)
        folder = tmp_path / name
        layout.write(folder, original, layout.stored)
        read = read_checkpoint(
            folder / layout.place, Wanted(version=layout.preset.version)
        ).pipeline

        assert names_on_disk(layout, folder) == names_of(layout, original)
        assert replace(read.config, conditioner=original.config.conditioner) == original.config
        for part in ("transformer", "vae", "conditioner"):
            expected, found = (each.modules[part].state_dict() for each in (original, read))
            assert expected.keys() == found.keys()
            assert all(torch.equal(found[name].float(), each) for name, each in expected.items())
        pictures.add(final_picture(read, REQUEST).tobytes())

    assert len(pictures) == 1


ONE_OF_EACH_VERSION = ("v1.0", "v1.1-diffusers", "v1.2")
"""A file and folders, with both kinds of names."""


@pytest.mark.timeout(600)  # each layout takes two processes
def test_the_command_line_makes_the_same_picture_with_each_layout(tmp_path: Path) -> None:
    # One block of each kind: that all are read is seen above, where a picture costs less.
    Image.fromarray(a_picture()).save(tmp_path / "photo.png")

    def pixels(name: str) -> bytes:
        layout, folder = LAYOUTS[name], tmp_path / name
        version = layout.preset.version
        layout.write(folder, narrow_pipeline(1, 1, layout.preset, THIN_VAE), layout.stored)
        settings = {"MODEL_PATH": str(folder / layout.place), "MODEL_VERSION": version}
        done = edit(tmp_path, f"{name}.png", **settings, DEFAULT_GUIDANCE_SCALE="1")
        shutil.rmtree(folder)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["metadata"]["model"] == f"Step1X-Edit {version}"
        return Image.open(tmp_path / f"{name}.png").tobytes()

    pictures = {name: pixels(name) for name in by_extent(ONE_OF_EACH_VERSION, tuple(LAYOUTS))}

    found = [
        {pictures[name] for name in family if name in pictures} for family in FAMILIES.values()
    ]
    assert [len(alike) for alike in found] == [1] * len(FAMILIES)
    assert len(set().union(*found)) == len(FAMILIES)


# --- damage ---------------------------------------------------------------------------------------

SHARD = "transformer/diffusion_pytorch_model-00002-of-00003.safetensors"


def altered(file: Path, alter: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    alter(tensors)
    save(tensors, file)


def only_a_pickle(folder: Path) -> None:
    shutil.rmtree(folder / "transformer")
    (folder / "transformer").mkdir()
    (folder / "transformer" / "pytorch_model.bin").touch()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "lacks diffusion_pytorch_model-00002-of-00003.safetensors, which its index lists": (
        lambda folder: (folder / SHARD).unlink()
    ),
    "text_encoder lacks model-00002-of-00005.safetensors, which its index lists": (
        lambda folder: (folder / "text_encoder" / "model-00002-of-00005.safetensors").unlink()
    ),
    "the checkpoint has unknown tensors extra.weight": lambda folder: altered(
        folder / SHARD, lambda tensors: tensors.update({"extra.weight": torch.zeros(1)})
    ),
    "the transformer has img_in.bias of shape (3,) instead of (128,)": lambda folder: altered(
        one_with("x_embedder.bias", folder / "transformer"),
        lambda tensors: tensors.update({"x_embedder.bias": torch.zeros(3)}),
    ),
    "holds numbers in transformer.img_in.bias that are not finite": lambda folder: altered(
        one_with("x_embedder.bias", folder / "transformer"),
        lambda tensors: tensors["x_embedder.bias"][7].fill_(torch.nan),
    ),
    SHARD: lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-100]),
    "pytorch_model.bin is not read: only safetensors are accepted": only_a_pickle,
}


def one_with(name: str, folder: Path) -> Path:
    """The file of a folder that holds this tensor."""
    return next(file for file in folder.glob("*.safetensors") if name in names_in(file))


def test_the_command_line_tells_damage_in_one_sentence(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "model"
    write_published(whole, narrow_pipeline(1, 1, vae_sizes=VAE))
    Image.fromarray(a_picture()).save(tmp_path / "photo.png")
    settings = {"model_path": folder, "device": "cpu", "allowed_dirs": (tmp_path,)}
    service = build_service(Settings(_env_file=None, **settings))  # type: ignore[arg-type]
    words = ["edit", str(tmp_path / "photo.png"), "night", "--output", str(tmp_path / "night.png")]
    words += ["--num-steps", "10", "--size-level", "512", "--guidance-scale", "1"]

    with contextlib.closing(service), serving(service) as url:
        for told, damage in DAMAGES.items():
            shutil.copytree(whole, folder)
            damage(folder)
            done = CliRunner().invoke(app, [*words, "--url", url, "--api-key", TOKEN])
            shutil.rmtree(folder)

            assert done.exit_code == 1
            assert not done.stdout
            *_, line = done.stderr.splitlines()
            assert "Manager not initialized: " in line
            assert told in line
        whole.rename(folder)
        done = CliRunner().invoke(app, [*words, "--url", url, "--api-key", TOKEN])

    assert done.exit_code == 0, done.stderr


def test_the_command_line_refuses_a_pickle_by_its_name(tmp_path: Path) -> None:
    Image.fromarray(a_picture()).save(tmp_path / "photo.png")
    (tmp_path / "model.pt").touch()

    done = edit(tmp_path, "night.png", MODEL_PATH=str(tmp_path / "model.pt"))

    assert done.returncode == 1
    sentence = "model.pt may run code when read: only safetensors are accepted"
    assert json.loads(done.stdout)["error"] == f"Manager not initialized: {sentence}"
