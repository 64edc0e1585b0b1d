"""A checkpoint of random numbers has everything that a published one has, and edits."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from extent import by_extent
from random_checkpoint import (
    FULL,
    LAYOUTS,
    diffusers,
    main,
    narrow,
    official,
    shallow,
    write_checkpoint,
)
from step1x_edit.checkpoints.read import read_checkpoint
from step1x_edit.model.request import NetworkRequest
from tiny import a_picture, final_picture

PUBLISHED = [(version, layout) for version, layouts in LAYOUTS.items() for layout in layouts]
SOME = [("v1.1", "official"), ("v1.2", "diffusers")]
REQUEST = NetworkRequest(a_picture(), "a 'Hi'", num_steps=1, guidance_scale=1.0, size_level=64)


class Disk(NamedTuple):
    """What the system says about a disk."""

    total: int
    used: int
    free: int


@pytest.mark.parametrize(("version", "layout"), by_extent(SOME, PUBLISHED))
def test_a_narrow_one_of_full_depth_edits_in_bfloat16(
    tmp_path: Path, version: str, layout: str
) -> None:
    write_checkpoint(tmp_path / "model", narrow(FULL[version]), layout)

    checkpoint = read_checkpoint(tmp_path / "model")

    pipeline = checkpoint.pipeline
    sizes = pipeline.config.transformer
    assert (checkpoint.version, sizes.depth, sizes.depth_single) == (version, 19, 38)
    assert pipeline.conditioner.config == FULL[version].model.conditioner
    assert final_picture(pipeline, REQUEST).std() > 0  # numbers that are not finite raise


def test_files_and_shards_have_the_published_sizes() -> None:
    weights, texts = diffusers(FULL["v1.1"])

    gigabytes = {
        name: round(sum(tensor.nbytes for tensor in tensors.values()) / 1e9, 2)
        for name, tensors in weights.items()
    }
    assert list(gigabytes.values()) == [9.97, 9.99, 4.89, 0.34, 4.97, 4.99, 4.93, 1.69]
    assert "text_encoder/model-00004-of-00004.safetensors" in gigabytes
    configs = ("model_index", "transformer/config", "vae/config", "scheduler/scheduler_config")
    assert [len(texts[f"{name}.json"]) for name in configs] == [441, 536, 774, 486]


def test_the_official_layout_has_the_conditioner_beside_single_files() -> None:
    weights, texts = official(shallow(FULL["v1.0"], 1, 1))

    assert list(weights)[:2] == ["step1x-edit-i1258.safetensors", "vae.safetensors"]
    folder = "Qwen2.5-VL-7B-Instruct"
    assert {f"{folder}/config.json", f"{folder}/tokenizer.json"} <= texts.keys()
    names = {name for file in weights if file.startswith(folder) for name in weights[file]}
    assert {"model.embed_tokens.weight", "visual.patch_embed.proj.weight"} < names


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Disk(10**12, 0, 7 * 10**9))

    with pytest.raises(OSError, match=r"needs 7\.3 GB and the disk has 7\.0 GB free"):
        write_checkpoint(tmp_path / "model", shallow(FULL["v1.1"], 2, 4), "official")

    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit for the size of files")
def test_if_a_file_cannot_be_written_whole_nothing_is_kept(tmp_path: Path) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_checkpoint(tmp_path / "model", narrow(FULL["v1.1"]), "official")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert not list(tmp_path.iterdir())


def test_blocks_are_counted_from_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["random_checkpoint.py", str(tmp_path / "model"), "--blocks", "0", "2"]
    monkeypatch.setattr(sys, "argv", arguments)

    with pytest.raises(SystemExit):
        main()

    assert "at least one block of each kind" in capsys.readouterr().err


def test_a_folder_with_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")

    with pytest.raises(OSError, match="is not empty"):
        write_checkpoint(tmp_path, narrow(FULL["v1.1"]), "official")
