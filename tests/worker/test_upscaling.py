"""The network of a model file enlarges a picture in tiles, wherever the edit computes."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from second_device import SECOND, second_device
from step1x_edit.channel import GIGA, EditJob, Painted, Progress, Start, UpscaleJob
from step1x_edit.checkpoints.read import write_demo
from step1x_edit.errors import (
    CheckpointError,
    EditCancelledError,
    InvalidParameterError,
    ModelUnavailableError,
    OutOfMemoryError,
)
from step1x_edit.model.request import Pixels
from step1x_edit.worker import upscaling
from step1x_edit.worker.process import load_worker
from step1x_edit.worker.survey import survey
from step1x_edit.worker.upscaling import Upscaler
from tiny import a_picture, tiny_pipeline
from upscaler import expected, need_spandrel, weights, write_upscaler

PICTURE: Pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _spandrel() -> None:
    need_spandrel()


def never() -> None:
    """A check that stops nothing."""


def enlarged(
    upscaler: Upscaler, factor: int, tile: int = 256, check: Callable[[], None] = never
) -> tuple[list[str], Pixels]:
    *events, last = upscaler.enlarge(PICTURE, factor, tile, check)
    assert isinstance(last, Painted)
    return [event.text for event in events if isinstance(event, Progress)], last.image


@pytest.mark.parametrize(("name", "scale"), [("4x.safetensors", 4), ("2x.pth", 2), ("8x.pth", 8)])
def test_a_picture_becomes_what_the_network_makes_of_it(
    tmp_path: Path, name: str, scale: int
) -> None:
    upscaler = Upscaler(str(write_upscaler(tmp_path / name, scale)), None)

    for factor in (2, 4)[: scale // 2]:  # a network that enlarges more is reduced by the mean
        _, image = enlarged(upscaler, factor)
        assert np.array_equal(image, expected(PICTURE, factor))


def test_no_seam_shows_between_tiles(tmp_path: Path) -> None:
    upscaler = Upscaler(str(write_upscaler(tmp_path / "4x.safetensors")), None)

    texts, image = enlarged(upscaler, 4, tile=40)

    assert texts == [f"upscaling {number}/6" for number in range(7)]
    assert np.array_equal(image, enlarged(upscaler, 4)[1])


def test_values_that_are_not_numbers_are_not_made_black(tmp_path: Path) -> None:
    damaged = {name: tensor * float("nan") for name, tensor in weights(4).items()}
    save_file(damaged, tmp_path / "4x.safetensors")
    upscaler = Upscaler(str(tmp_path / "4x.safetensors"), None)

    with pytest.raises(CheckpointError, match="makes values that are not numbers"):
        enlarged(upscaler, 4)


def test_a_cancel_ends_the_work_within_a_tile(tmp_path: Path) -> None:
    upscaler = Upscaler(str(write_upscaler(tmp_path / "4x.safetensors")), None)
    layers: list[int] = []

    def third_layer() -> None:
        layers.append(len(layers))
        if len(layers) == 3:
            raise EditCancelledError()

    with pytest.raises(EditCancelledError):
        enlarged(upscaler, 4, check=third_layer)

    assert len(layers) == 3
    enlarged(upscaler, 4)  # nothing is left of the check
    assert len(layers) == 3


def test_it_computes_on_the_device_of_the_edit_and_leaves_it(tmp_path: Path) -> None:
    file = write_upscaler(tmp_path / "4x.safetensors")
    with second_device():
        upscaler = Upscaler(str(file), SECOND)

        _, image = enlarged(upscaler, 4)

        assert upscaler._load().network.device == torch.device("cpu")
    assert np.array_equal(image, expected(PICTURE, 4))


@pytest.fixture
def start(tmp_path: Path) -> Start:
    write_demo(tmp_path / "model", tiny_pipeline())
    file = write_upscaler(tmp_path / "2x.safetensors", 2)
    return Start(model_path=str(tmp_path / "model"), upscale_model=str(file), device="cpu")


def test_its_weights_count_as_memory_of_the_host(start: Start) -> None:
    worker = load_worker(start)
    edit = EditJob(image=a_picture(), prompt="x", num_steps=2, size_level=64)
    [*worker.edit(edit, never)]
    before = worker.residence().placement

    [*worker.edit(UpscaleJob(a_picture(), 2), never)]

    after = worker.residence().placement
    assert before is not None
    assert after is not None
    assert after.host_gb - before.host_gb == pytest.approx(780_124 / GIGA)  # type: ignore


def test_a_factor_that_the_network_cannot_give_is_refused_before_the_edit(start: Start) -> None:
    edit = EditJob(image=a_picture(), prompt="x", num_steps=2, size_level=64, upscale=4)

    with pytest.raises(InvalidParameterError, match="enlarges 2 times; use upscale 2, or"):
        next(load_worker(start).edit(edit, never))


def test_less_is_computed_at_once_if_memory_runs_out(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = load_worker(start)
    room = 100

    def allocate(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if max(inputs[0].shape[2:]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")

    network = worker._upscaler._load().network.model
    network.register_forward_pre_hook(allocate)
    monkeypatch.setattr("step1x_edit.worker.edits.TILES", (64, 32))

    *_, last = worker.edit(UpscaleJob(PICTURE, 2), never)

    assert isinstance(last, Painted)
    assert np.array_equal(last.image, expected(PICTURE, 2))
    room = 50
    with pytest.raises(OutOfMemoryError, match="try a lower upscale"):
        [*worker.edit(UpscaleJob(PICTURE, 2), never)]


class _Harm:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (Path("harm"),)  # type: ignore[return-value]


def _write_harm(file: Path) -> None:
    file.write_bytes(pickle.dumps({"weight": _Harm()}, protocol=2))


def _write_other(file: Path) -> None:
    save_file({"weight": torch.zeros(1)}, file)


def _write_grey(file: Path) -> None:
    write_upscaler(file, 2, channels=1)


def _write_cut(file: Path) -> None:
    write_upscaler(file)
    file.write_bytes(file.read_bytes()[:-1000])


def _write_huge(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(upscaling._LARGEST + 1)


@pytest.mark.parametrize(
    ("write", "name", "sentence"),
    [
        (_write_harm, "4x.pth", "is no .pth file with nothing but weights"),
        (_write_cut, "4x.safetensors", "is no .safetensors file with nothing but weights"),
        (_write_other, "4x.safetensors", "of no architecture that spandrel knows"),
        (_write_grey, "4x.safetensors", "does not enlarge pictures in colour"),
        (_write_huge, "4x.pth", "has 2.0 GB: it is no upscaler"),
    ],
)
def test_a_file_that_is_no_upscaler_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path], None],
    name: str,
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)

    with pytest.raises(CheckpointError, match=sentence):
        Upscaler(str(tmp_path / name), None).check(4)

    assert not Path("harm").exists()


def test_a_survey_says_how_many_times_it_enlarges_or_why_it_does_not(start: Start) -> None:
    assert survey(start).upscale == 2

    Path(start.upscale_model or "").unlink()

    found = survey(start)
    assert found.upscale is None
    assert "there is no file at UPSCALE_MODEL" in (found.upscale_error or "")


def test_a_torchvision_that_does_not_fit_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_upscaler(tmp_path / "4x.safetensors")
    for name in [name for name in sys.modules if name.startswith(("spandrel", "torchvision"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if it could not be imported

    with pytest.raises(ModelUnavailableError, match="needs a torchvision that fits torch"):
        Upscaler(str(file), None).check(4)
