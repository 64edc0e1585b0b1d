"""Checkpoints as they are published, but narrow: every tensor has its place in each layout."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import edit
from layouts import narrow_pipeline, write_diffusers, write_official
from step1x_edit.checkpoints.keymap import SCALE_FACTOR, transformer_links, vae_links
from step1x_edit.checkpoints.read import FLUX_VAE, read_checkpoint
from step1x_edit.model.config import V1_0, V1_1, V1_2, ModelConfig
from step1x_edit.model.transformer import Transformer
from tiny import a_picture

WRITERS = {"official": write_official, "diffusers": write_diffusers}
KEYMAP = Path(__file__).parents[2] / "shared" / "reference" / "keymap.json"


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


@pytest.mark.skipif(
    not KEYMAP.is_file(), reason="the reference lies beside the checkout, if at all"
)
def test_the_names_and_shapes_are_those_of_the_reference() -> None:
    table = json.loads(KEYMAP.read_text("utf-8"))
    shapes = {name: list(t.shape) for name, t in full_size(V1_1).state_dict().items()}
    vae = vae_links(FLUX_VAE["block_out_channels"], FLUX_VAE["layers_per_block"])

    for rows, links in ((table["dit"], transformer_links(V1_1.transformer)), (table["vae"], vae)):
        expected = {row["official"]: row["diffusers"] for row in rows}
        assert {link.official: list(link.diffusers) for link in links} == expected
    assert {row["official"]: row["shape"] for row in table["dit"]} == shapes


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", WRITERS)
def test_every_block_of_the_published_models_is_read_in_each_layout(
    layout: str, tmp_path: Path
) -> None:
    original = narrow_pipeline(V1_1.transformer.depth, V1_1.transformer.depth_single)
    WRITERS[layout](tmp_path / layout, original)

    read = read_checkpoint(tmp_path / layout, dtype=torch.float32).pipeline

    assert read.transformer.config == original.transformer.config
    for part in ("transformer", "vae", "conditioner"):
        expected, found = (each.modules[part].state_dict() for each in (original, read))
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shallow model in each layout, and a photograph."""
    folder = tmp_path_factory.mktemp("layouts")
    pipeline = narrow_pipeline(depth=1, depth_single=1)
    for layout, write in WRITERS.items():
        write(folder / layout, pipeline)
    Image.fromarray(a_picture()).save(folder / "photo.png")
    return folder


def test_the_command_line_makes_the_same_picture_with_each_layout(places: Path) -> None:
    pictures = set()
    for place in ("official/step1x-edit.safetensors", "diffusers"):
        done = edit(places, "night.png", MODEL_PATH=str(places / place))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["metadata"]["model"] == "Step1X-Edit v1.1"
        pictures.add((places / "night.png").read_bytes())
        (places / "night.png").unlink()

    assert len(pictures) == 1
