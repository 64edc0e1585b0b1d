"""Models whose codes were written into a file: the same picture, and nothing is rounded."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from command_line import edit
from extent import slow
from step1x_edit.channel import EditJob, Painted, Start
from step1x_edit.checkpoints import arena, conversion, converted
from step1x_edit.checkpoints.converted import converted_files, converted_folder, remove_converted
from step1x_edit.checkpoints.read import Wanted, open_checkpoint, write_demo
from step1x_edit.engine.host_memory import HostMemory
from step1x_edit.errors import ModelUnavailableError, NoSpaceError
from step1x_edit.model.quantised import CODES, Code
from step1x_edit.worker.convert import convert
from step1x_edit.worker.process import load_worker
from tiny import a_picture, tiny_pipeline

JOB = EditJob(a_picture(), "make it night", num_steps=1, size_level=64, seed=1)
LAYER = "single_blocks.0.linear1"


class RoundedError(Exception):
    """A matrix was rounded."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_demo(folder, tiny_pipeline())
    return folder


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Start:
    return Start(str(model), data_dir=str(tmp_path), device="cpu", precision="int8")


@pytest.fixture
def refuse_rounding(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def refuse(*_: object) -> None:
        raise RoundedError

    return lambda: monkeypatch.setattr(arena, "code_into", refuse)


def edited(start: Start, free: int | None = None, **job: object) -> tuple[bytes, str]:
    """The picture, and the plan in words."""
    memory = None if free is None else HostMemory(total=free, available=free)
    worker = load_worker(start, lambda: memory)
    *_, last = worker.edit(replace(JOB, **job), lambda: None)  # type: ignore[arg-type]
    assert isinstance(last, Painted)
    placement = worker.residence().placement
    assert placement is not None
    return last.image.tobytes(), f"{placement.precision}: {placement.reason}"


def convert_into(folder: Path | None, start: Start) -> Path:
    answer = io.StringIO()
    convert(start, folder, answer)
    first, *reports = map(json.loads, answer.getvalue().splitlines())
    assert [report["done"] for report in reports] == sorted(report["done"] for report in reports)
    assert reports[-1]["done"] == reports[-1]["total"] > 0
    return Path(first["file"])


@pytest.mark.parametrize("kind", CODES)
def test_the_picture_is_the_same_and_nothing_is_rounded(
    start: Start, kind: Code, refuse_rounding: Callable[[], None]
) -> None:
    start = replace(start, precision=kind)
    expected, _ = edited(start)

    file = convert_into(None, start)

    refuse_rounding()
    picture, reason = edited(start)
    assert picture == expected
    assert f"its codes are read from {file.name}" in reason
    with pytest.raises(ModelUnavailableError, match="cannot be loaded"):
        edited(replace(start, precision="fp8" if kind == "int8" else "int8"))


def test_loras_are_added_before_the_rounding(start: Start, tmp_path: Path) -> None:
    rows, columns = tiny_pipeline().transformer.get_parameter(f"{LAYER}.weight").shape
    key, lora = f"lora_unet_{LAYER.replace('.', '_')}", tmp_path / "hand.safetensors"
    down, up = torch.ones(2, columns), torch.ones(rows, 2)
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, lora)
    start = replace(start, loras={str(lora): 0.5})
    expected, plain = edited(start)[0], edited(start, loras={})[0]

    convert_into(None, start)

    assert edited(start)[0] == expected != plain
    assert edited(start, loras={})[0] == plain


def test_auto_uses_the_codes_if_exact_weights_do_not_all_fit(start: Start, model: Path) -> None:
    size = sum(block.size for block in open_checkpoint(model).blocks)
    start = replace(start, precision="auto")
    convert_into(None, replace(start, precision="nf4"))

    assert edited(start, free=2 * size)[1].startswith("fp32: ")  # half of it is reserved
    assert edited(start, free=2 * size - 2)[1].startswith("nf4: ")


def touch(model: Path, file: Path) -> str:
    tensors = load_file(model / "model.safetensors")
    tensors[f"transformer.{LAYER}.weight"] += 1
    save_file(tensors, model / "model.safetensors")
    return "was made from other files than the model has now"


def cut(_: Path, file: Path) -> str:
    os.truncate(file, file.stat().st_size - 1)
    return "is damaged"


def scribble(_: Path, file: Path) -> str:
    file.write_bytes(b"scribble" + file.read_bytes()[8:])
    return "is damaged"


def outdate(_: Path, file: Path) -> str:
    said = b'"format_version":"'
    file.write_bytes(file.read_bytes().replace(said + b'1"', said + b'0"'))
    return "was written by another version of this program"


@pytest.mark.parametrize("spoil", [touch, cut, scribble, outdate])
def test_a_file_that_does_not_belong_to_the_model_is_not_used_and_named(
    start: Start, model: Path, tmp_path: Path, spoil: Callable[[Path, Path], str]
) -> None:
    file = convert_into(None, start)
    problem = spoil(model, file)
    expected, _ = edited(replace(start, data_dir=""))

    picture, reason = edited(start)

    assert picture == expected
    assert f"{file.name} {problem}, so it is not used" in reason
    assert [found.problem for found in converted_files(tmp_path, model)] == [
        f"{file.name} {problem}"
    ]


def test_wrong_codes_are_rounded_again(
    start: Start, caplog: pytest.LogCaptureFixture, refuse_rounding: Callable[[], None]
) -> None:
    expected, _ = edited(start)
    file = convert_into(None, start)
    content = bytearray(file.read_bytes())
    content[-5000] ^= 1
    file.write_bytes(content)

    assert edited(start)[0] == expected
    assert f"{file.name} has wrong codes of " in caplog.text
    refuse_rounding()
    with pytest.raises(ModelUnavailableError, match="cannot be loaded"):
        edited(start)


def test_another_folder_is_found_and_goes_with_the_model(
    start: Start, model: Path, tmp_path: Path, refuse_rounding: Callable[[], None]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        file = convert_into(folder, start)
        assert file.parent == folder
    assert not list(first.iterdir())  # replaced
    refuse_rounding()
    assert file.name in edited(start)[1]

    assert remove_converted(tmp_path, model) > 0

    assert not list(second.iterdir())
    assert not list(converted_folder(tmp_path).iterdir())


def test_nothing_is_left_of_a_conversion_that_ends_early(start: Start, tmp_path: Path) -> None:
    opened = open_checkpoint(Path(start.model_path or ""), Wanted(precision="int8"))
    writing = conversion.write_codes(opened, tmp_path / "codes.safetensors")
    next(writing)
    assert [file.suffix for file in tmp_path.glob("codes*")] == [converted.PARTIAL]

    writing.close()

    assert not list(tmp_path.glob("codes*"))


def test_a_disk_that_is_too_small_is_named_before_the_work(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)

    with pytest.raises(NoSpaceError, match=r"the codes take .* free some, or choose another"):
        convert_into(None, start)


@slow
def test_at_the_command_line(model: Path, tmp_path: Path) -> None:
    Image.fromarray(a_picture(96, 64)).save(tmp_path / "photo.png")
    settings = {"MODEL_PATH": str(model), "PRECISION": "int8", "DATA_DIR": str(tmp_path / "data")}
    assert edit(tmp_path, "rounded.png", **settings).returncode == 0
    arguments = ["models", "convert", str(model), "--precision", "int8"]

    made = subprocess.run(
        [sys.executable, "-m", "step1x_edit.interfaces.cli", *arguments],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )

    assert Path(made.stdout.strip()).is_file()
    assert edit(tmp_path, "read.png", **settings).returncode == 0
    assert (tmp_path / "read.png").read_bytes() == (tmp_path / "rounded.png").read_bytes()
