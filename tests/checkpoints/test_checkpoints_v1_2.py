"""Checkpoints of v1.2: with a separate conditioner, and a head by which it talks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from layouts import save, tiny_releases, tiny_releases_v1_2, write_diffusers
from step1x_edit.channel import Start
from step1x_edit.checkpoints.arena import Arena
from step1x_edit.checkpoints.memory_plan import with_share
from step1x_edit.checkpoints.read import (
    Checkpoint,
    Wanted,
    open_checkpoint,
    read_checkpoint,
    write_demo,
)
from step1x_edit.errors import CheckpointError
from step1x_edit.hub.pulled import models_folder
from step1x_edit.model.conditioner_v1_2 import ConditionerV12
from step1x_edit.model.config import V1_2, V1_2_PREVIEW
from step1x_edit.model.pipeline import EditPipeline
from step1x_edit.model.request import NetworkRequest
from step1x_edit.worker.opening import open_chosen
from tiny import a_picture, final_picture, tiny_pipeline, tiny_pipeline_v1_2

HEAD = "lm_head.weight"
REQUEST = NetworkRequest(a_picture(), 'write "no" here', num_steps=2, size_level=64)


@pytest.fixture(scope="module")
def pipeline() -> EditPipeline:
    return tiny_pipeline_v1_2()


@pytest.fixture(scope="module")
def original(pipeline: EditPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v1_2") / "model"
    write_diffusers(folder, pipeline)
    return folder


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


def read(path: Path, pipeline: EditPipeline, version: str | None = None) -> Checkpoint:
    releases = tiny_releases_v1_2(pipeline)
    return read_checkpoint(path, Wanted(dtype=torch.float32, version=version, releases=releases))


def picture(pipeline: EditPipeline) -> bytes:
    return final_picture(pipeline, REQUEST).tobytes()


def head_of(checkpoint: Checkpoint) -> torch.Tensor:
    return checkpoint.pipeline.conditioner.vlm.get_parameter("lm_head.weight")


def test_it_is_read_as_it_was_written(original: Path, pipeline: EditPipeline) -> None:
    checkpoint = read(original, pipeline)

    assert (checkpoint.name, checkpoint.version) == ("Step1X-Edit v1.2", "v1.2")
    assert isinstance(checkpoint.pipeline.conditioner, ConditionerV12)
    assert picture(checkpoint.pipeline) == picture(pipeline)
    assert torch.equal(head_of(checkpoint), pipeline.conditioner.vlm.lm_head.weight)


def test_the_conditioner_may_have_the_names_of_either_era(
    copy: Path, pipeline: EditPipeline
) -> None:
    file = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    bare = {
        name.removeprefix("model.").removeprefix("language_model."): tensor
        for name, tensor in tensors.items()
    }
    eras = {
        "2025": {
            name if name.startswith(("visual.", "lm_head.")) else f"model.{name}": tensor
            for name, tensor in bare.items()
        },
        "2026": {
            f"model.{name}"
            if name.startswith("visual.")
            else name
            if name == HEAD
            else f"model.language_model.{name}": tensor
            for name, tensor in bare.items()
        },
    }
    for names in eras.values():
        save(names, file)
        assert picture(read(copy, pipeline).pipeline) == picture(pipeline)


def test_without_a_head_it_is_not_whole(copy: Path, pipeline: EditPipeline) -> None:
    file = copy / "text_encoder" / "model.safetensors"
    save({name: t for name, t in load_file(file).items() if name != HEAD}, file)
    config = copy / "text_encoder" / "config.json"
    text = config.read_text("utf-8")

    tied = head_of(read(copy, pipeline))
    config.write_text(text.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))

    embeddings = pipeline.conditioner.vlm.get_input_embeddings().weight
    assert torch.equal(tied, embeddings)
    with pytest.raises(CheckpointError, match=r"the conditioner lacks tensors lm_head\.weight"):
        read(copy, pipeline)


def test_models_that_cannot_think_leave_the_head_in_its_file(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    write_diffusers(tmp_path / "model", pipeline)
    file = tmp_path / "model" / "text_encoder" / "model.safetensors"
    save({**load_file(file), HEAD: torch.zeros(300, 32)}, file)

    opened = open_checkpoint(tmp_path / "model", Wanted(releases=tiny_releases(pipeline)))

    assert all("lm_head" not in weight.name for weight in opened.weights)


def test_the_head_is_a_block_that_may_pass_through_a_device(
    original: Path, pipeline: EditPipeline
) -> None:
    opened = open_checkpoint(original, Wanted(releases=tiny_releases_v1_2(pipeline)))

    blocks = Arena(opened.weights).blocks

    (head,) = (block for block in blocks if "lm_head" in block.name)
    assert (head.name, head.component) == ("conditioner.lm_head", "conditioner")
    assert head.name not in with_share(blocks, 0.0).resident


def test_only_a_word_tells_the_preview(original: Path, pipeline: EditPipeline) -> None:
    final, preview = (read(original, pipeline, v) for v in (None, "v1.2-preview"))

    assert (preview.name, preview.version) == ("Step1X-Edit v1.2-preview", "v1.2-preview")
    assert final.pipeline.config.reasoning == V1_2.reasoning
    assert preview.pipeline.config.reasoning == V1_2_PREVIEW.reasoning
    assert picture(final.pipeline) == picture(preview.pipeline)


def test_a_model_of_another_version_is_no_preview(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    write_diffusers(tmp_path / "model", pipeline)

    checkpoint = read_checkpoint(
        tmp_path / "model", Wanted(version="v1.2-preview", releases=tiny_releases(pipeline))
    )

    assert checkpoint.version == "v1.1"


@pytest.mark.parametrize(
    ("folder", "version", "found"),
    [
        ("v1.2-preview", "auto", "v1.2-preview"),
        ("v1.2", "auto", "v1.2"),
        ("v1.2-preview", "v1.2", "v1.2"),
        ("elsewhere", "auto", "v1.2"),
        ("elsewhere", "v1.2-preview", "v1.2-preview"),
    ],
)
def test_a_pulled_preview_is_known_by_its_name(
    tmp_path: Path, narrow: Path, folder: str, version: str, found: str
) -> None:
    data_dir = tmp_path / "data"
    models = models_folder(data_dir) if folder.startswith("v") else tmp_path
    models.mkdir(parents=True, exist_ok=True)
    place = models / folder
    shutil.copytree(narrow, place)
    model_path = folder if folder.startswith("v") else str(place)
    start = Start(model_path=model_path, data_dir=str(data_dir), model_version=version)

    assert open_chosen(start).checkpoint.version == found


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published but for its width."""
    from layouts import narrow_pipeline

    folder = tmp_path_factory.mktemp("narrow") / "model"
    write_diffusers(folder, narrow_pipeline(1, 1, V1_2))
    return folder


def test_a_small_v1_2_can_be_stored_in_one_folder(tmp_path: Path, pipeline: EditPipeline) -> None:
    write_demo(tmp_path, pipeline)

    read = read_checkpoint(tmp_path).pipeline

    assert read.config == pipeline.config
    assert picture(read) == picture(pipeline)
