"""The data of a training: three forms of it, and every fault in one go."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from step1x_edit.engine.machine import has_gpu_driver
from step1x_edit.interfaces.cli import app
from step1x_edit.schemas.training import Pair
from step1x_edit.service.files import FileAccess
from step1x_edit.service.pairs import Pairs, read_pairs
from step1x_edit.settings import Limits

LIMITS = Limits(max_bytes=10**7, max_pixels=10**6)
run = CliRunner()


def picture(path: Path, width: int = 32, height: int = 24) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path)
    return str(path)


def read(data: Path, sources: Path | None = None) -> Pairs:
    return read_pairs(data, sources, FileAccess((data.parent,), 10**7), LIMITS)


@pytest.fixture
def expected(tmp_path: Path) -> list[tuple[str, str, str | None]]:
    """Two pairs, in files of both kinds."""
    return [
        (picture(tmp_path / "in" / "a.png"), "add a hat", picture(tmp_path / "out" / "a.png")),
        (picture(tmp_path / "in" / "b.jpg"), "戴帽子", picture(tmp_path / "out" / "b.webp")),
    ]


def plain(pairs: list[Pair]) -> list[tuple[str, str, str | None]]:
    return [(pair.source, pair.prompt, pair.target) for pair in pairs]


def test_a_folder_of_targets_with_their_instructions(
    tmp_path: Path, expected: list[tuple[str, str, str | None]]
) -> None:
    (tmp_path / "out" / "a.txt").write_text("add a hat\n")
    (tmp_path / "out" / "b.txt").write_text("戴帽子", encoding="utf-8")

    found = read(tmp_path / "out", tmp_path / "in")

    assert not found.faults
    assert plain(found.pairs) == expected


def test_the_form_of_the_authors(
    tmp_path: Path, expected: list[tuple[str, str, str | None]]
) -> None:
    data = {
        "out/a.png": {"ref_image_path": expected[0][0], "caption": "add a hat"},
        "out/b.webp": {"ref_image_path": "in/b.jpg", "caption": "戴帽子"},
    }
    (tmp_path / "data.json").write_text(json.dumps(data, indent=1))

    found = read(tmp_path / "data.json")

    assert not found.faults
    assert plain(found.pairs) == expected


def test_a_manifest_with_targets_and_edits_to_keep(
    tmp_path: Path, expected: list[tuple[str, str, str | None]]
) -> None:
    lines = [
        {"image": "in/a.png", "prompt": "add a hat", "target": "out/a.png", "num_steps": 20},
        {"image": "in/b.jpg", "prompt": "戴帽子", "target": "out/b.webp"},
        {"image": "in/a.png", "prompt": "", "keep": True},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))

    found = read(tmp_path / "data.jsonl")

    assert not found.faults
    assert plain(found.pairs) == [*expected, (expected[0][0], "", None)]


def test_all_faults_are_named_with_file_and_line_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALLOWED_DIRS", str(tmp_path))
    picture(tmp_path / "a.png")
    picture(tmp_path / "tall.png", 24, 32)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    lines = [
        '{"image": "a.png", "prompt": "x", "target": "a.png"}',
        '{"image": "a.png", "prompt": "x", "target": "gone.png"}',
        '{"image": "a.png", "prompt": "x"}',
        '{"image": "a.png", "prompt": "  ", "target": "a.png"}',
        '{"image": "a.png", "prompt": "x", "target": "tall.png"}',
        "{",
        '{"image": "broken.png", "prompt": "x", "keep": true, "target": "a.png"}',
        '{"image": "broken.png", "prompt": "x", "target": "a.png", "hat": 1}',
        '{"image": "broken.png", "prompt": "x", "keep": true}',
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines))

    result = run.invoke(
        app, ["train-lora", str(data), "--output", str(tmp_path / "my.safetensors")]
    )

    *faults, last = result.stderr.splitlines()
    assert result.exit_code == 2
    assert [fault.split(": ")[0] for fault in faults] == [f"{data}:{line}" for line in range(2, 10)]
    for fault, words in zip(
        faults,
        (
            "Image file not found",
            'target is missing; "keep": true',
            "the instruction is empty",
            "the target is 24 x 32 and the source 32 x 24: crop one",
            "it is not JSON",
            "it has a target and keep",
            "'hat' is unknown",
            "Unsupported image format",
        ),
        strict=True,
    ):
        assert words in fault
    assert last == "Invalid parameter: data.jsonl has 8 faults, named above; nothing was loaded"
    assert not (tmp_path / "my.train").exists()


def test_faults_of_a_folder_and_of_the_form_of_the_authors(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "out" / "a.png")
    picture(tmp_path / "out" / "b.png")
    (tmp_path / "out" / "b.txt").write_text("x")
    data = tmp_path / "data.json"
    data.write_text('{\n"out/a.png": {"ref_image_path": "in/a.png", "caption": 3},\n"b": []\n}')
    (tmp_path / "torn.json").write_text('{"a": {},\n')

    assert read(tmp_path / "out", tmp_path / "in").faults == [
        f"{tmp_path / 'out' / 'a.txt'}: there is no instruction in UTF-8 for a.png",
        f"{tmp_path / 'out' / 'b.png'}: {tmp_path / 'in'} has no picture b",
    ]
    assert [fault.split(": ")[0] for fault in read(data).faults] == [f"{data}:2", f"{data}:3"]
    assert read(tmp_path / "torn.json").faults[0].startswith(f"{tmp_path / 'torn.json'}:2: it is")


@pytest.mark.skipif(has_gpu_driver(), reason="there is a driver")
def test_a_device_without_a_driver_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEVICE", "cuda")
    picture(tmp_path / "a.png")
    (tmp_path / "data.jsonl").write_text('{"image": "a.png", "prompt": "x", "target": "a.png"}')

    result = run.invoke(app, ["train-lora", "data.jsonl", "--output", "my.safetensors"])

    assert result.exit_code == 2
    assert "DEVICE is cuda, and this machine has no driver for it" in result.stderr
    assert not (tmp_path / "my.train").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "0"], "rank must be between 1 and 1024"),
        (["--size", "512,8"], "size must be whole numbers between 64 and 1536"),
        (["--output", "my.ckpt"], "my.ckpt must end in .safetensors"),
        (["--output", "other.safetensors"], "other.safetensors; --overwrite replaces it"),
        (["--output", "folder.safetensors", "--overwrite"], "folder.safetensors is a folder"),
        (["--held-out", "1"], "held_out must be less than the number of pairs with a target, 1"),
        (["--sources", "in"], "--sources is for a folder of targets only"),
    ],
)
def test_what_cannot_be_trained_is_said_at_once(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.png")
    (tmp_path / "data.jsonl").write_text('{"image": "a.png", "prompt": "x", "target": "a.png"}')
    (tmp_path / "other.safetensors").touch()
    (tmp_path / "other.train").mkdir()
    (tmp_path / "folder.safetensors").mkdir()

    result = run.invoke(app, ["train-lora", "data.jsonl", "--output", "my.safetensors", *flags])

    assert result.exit_code in (1, 2)
    assert message in result.stderr
