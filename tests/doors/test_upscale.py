"""Results are enlarged after the edit, at every door, by the model file that the user names."""

from __future__ import annotations

import asyncio
import hashlib
import io
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastmcp import Client
from PIL import Image
from test_one_request import some_spandrel
from typer.testing import CliRunner

from conftest import MakeService
from fakes import STREAMED, FakeWorker, Gate, a_job
from picture_files import difference, rgb_profile
from step1x_edit.channel import Phase, Progress, Start, UpscaleJob
from step1x_edit.checkpoints.read import write_demo
from step1x_edit.engine.engine import Engine
from step1x_edit.errors import EditCancelledError, SettingsError, Step1XEditError
from step1x_edit.interfaces.cli import app as cli
from step1x_edit.interfaces.mcp.server import build_mcp
from step1x_edit.pictures.images import decode, read_record
from step1x_edit.schemas.requests import EditRecord, GeneratePictureRequest, PictureRequest
from step1x_edit.service.service import EditedPicture, EditService
from step1x_edit.settings import Settings, load_settings
from step1x_edit.worker.process import load_worker
from tiny import tiny_pipeline
from upscaler import WorkerHere, expected, need_spandrel, write_upscaler

DISPLAY_P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
LIMITS = Settings(_env_file=None).limits
TOY: dict[str, Any] = {"seed": 1, "size_level": 512, "num_steps": 10, "guidance_scale": 1.0}


def a_png(channels: int = 3, **options: Any) -> bytes:
    pixels = np.random.default_rng(2).integers(0, 256, (6, 10, channels), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((80, 48)).save(stream, "PNG", **options)
    return stream.getvalue()


def a_mask() -> bytes:
    mask = Image.new("L", (80, 48))
    mask.paste(255, (20, 10, 50, 40))
    mask.save(stream := io.BytesIO(), "PNG")
    return stream.getvalue()


# --- a real upscaler after a toy of the model -----------------------------------------------------


@pytest.fixture
def make_real(tmp_path: Path, make_service: MakeService) -> Callable[[], EditService]:
    """Services that enlarge with a model of 4 times."""
    need_spandrel()
    write_demo(tmp_path / "model", tiny_pipeline())
    file = write_upscaler(tmp_path / "4x.safetensors")
    start = Start(model_path=str(tmp_path / "model"), upscale_model=str(file), device="cpu")
    model = load_worker(start)

    def make() -> EditService:
        worker: Any = WorkerHere(model)
        return make_service(worker, upscale_model=file)

    return make


@pytest.fixture
def real(make_real: Callable[[], EditService]) -> EditService:
    """One of them."""
    return make_real()


async def edited(
    service: EditService, data: bytes, mask: bytes | None = None, **options: Any
) -> EditedPicture:
    request = PictureRequest(prompt="x", **TOY, **options)
    return await service.edit_picture(data, request, mask=mask)


@pytest.mark.parametrize(
    ("factor", "options"),
    [
        (4, {"mask": a_mask(), "region": "full"}),
        (2, {"outpaint": "0 25%"}),
    ],
)
async def test_the_finished_picture_is_enlarged(
    real: EditService, factor: int, options: dict[str, Any]
) -> None:
    before = await edited(real, a_png(), **options)

    after = await edited(real, a_png(), upscale=factor, **options)

    assert np.array_equal(
        decode(after.data, LIMITS).pixels, expected(before.picture.pixels, factor)
    )
    sides = factor * before.picture.width, factor * before.picture.height
    assert (after.metadata.width, after.metadata.height) == sides
    assert after.metadata.changed_share == before.metadata.changed_share
    if before.metadata.region is not None:
        assert after.metadata.region is not None
        assert after.metadata.region.box == [factor * side for side in before.metadata.region.box]


async def test_transparency_profile_and_density_are_kept(real: EditService) -> None:
    data = a_png(4, icc_profile=rgb_profile(DISPLAY_P3), dpi=(300, 300))
    before, after = await edited(real, data), await edited(real, data, upscale=2)

    with Image.open(io.BytesIO(after.data)) as image:
        assert image.info["icc_profile"] == rgb_profile(DISPLAY_P3)
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    alpha_after = decode(after.data, LIMITS).alpha
    assert before.picture.alpha is not None
    assert alpha_after is not None
    alpha = Image.fromarray(before.picture.alpha).resize((160, 96), Image.Resampling.LANCZOS)
    assert np.array_equal(alpha_after, np.asarray(alpha))
    assert difference(after.picture.in_srgb, expected(before.picture.in_srgb, 2)) < 1


async def test_the_file_says_what_enlarged_it(real: EditService, tmp_path: Path) -> None:
    made = await edited(real, a_png(), upscale=2)

    record = read_record(made.data)
    assert isinstance(record, EditRecord)
    sha256 = hashlib.sha256((tmp_path / "4x.safetensors").read_bytes()).hexdigest()
    said = (
        record.upscale,
        record.upscaler,
        record.upscaler_sha256,
        made.metadata.to_dict()["upscale"],
    )
    assert said == (2, "4x.safetensors", sha256, 2)
    assert not {"upscale", "upscaler"} & read_plain(await edited(real, a_png())).keys()


def read_plain(made: EditedPicture) -> dict[str, Any]:
    record = read_record(made.data)
    assert record is not None
    return record.model_dump(exclude_none=True)


def test_a_result_is_made_again_from_its_file(
    make_real: Callable[[], EditService],
    tmp_path: Path,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("step1x_edit.service.wiring.build_service", lambda _: make_real())
    monkeypatch.chdir(tmp_path)
    run, words = CliRunner(), ["--size-level=512", "--num-steps=10", "--upscale=2"]
    made = run.invoke(cli, ["edit", str(photo), "x", "--output=made.png", *words])
    assert made.exit_code == 0, made.stderr

    again = run.invoke(cli, ["replay", "made.png", "--check"])

    assert (again.exit_code, again.stdout) == (0, "equal to the byte\n")
    with Image.open("made.png") as image:
        assert image.size == (128, 96)


# --- with a fake worker ---------------------------------------------------------------------------


@pytest.fixture
def some_file(tmp_path: Path) -> Iterator[Path]:
    """A model file that no fake worker reads."""
    (file := tmp_path / "4x.pth").touch()
    with some_spandrel():
        yield file


async def test_progress_counts_the_tiles_and_only_rises(
    make_service: MakeService, some_file: Path, photo: Path
) -> None:
    heard: list[tuple[float, str | None]] = []

    async def listen(progress: float, total: float | None, message: str | None) -> None:
        assert progress < (total or 0)
        heard.append((progress, message))

    service = make_service(upscale_model=some_file)
    async with Client(build_mcp(service, step_pause_s=0)) as client:
        arguments = {"image_path": str(photo), "prompt": "x", "num_steps": 10, "upscale": 2}
        await client.call_tool("edit_image", arguments, progress_handler=listen)

    tiles = ["upscaling", "upscaling 0/2", "upscaling 1/2", "upscaling 2/2"]
    assert list(dict.fromkeys(said for _, said in heard))[-6:] == ["decoding", *tiles, "saving"]
    assert sorted(set(heard)) == heard


async def test_a_generated_picture_is_enlarged_too(
    make_service: MakeService, some_file: Path
) -> None:
    service = make_service(model_version="v1.1", upscale_model=some_file)
    request = GeneratePictureRequest(prompt="a fox", width=256, height=512, upscale=2)

    made = await service.generate_picture(request)

    assert (made.picture.width, made.picture.height) == (512, 1024)


async def test_an_edit_ends_before_another_one_begins(some_file: Path) -> None:
    gate, worker = Gate(), FakeWorker()
    worker.before_step = gate
    engine = Engine(worker)
    try:
        first, second = engine.submit(a_job("first")), engine.submit(a_job("second"))
        await asyncio.to_thread(gate.reached.wait, 60)

        end = engine.submit_end(UpscaleJob(np.zeros((4, 6, 3), np.uint8), 2))

        assert [event.text async for event in _up_to(end, Phase.QUEUED)] == ["queued, position 1"]
        gate.open()
        assert (await end.result()).painted.image.shape == (8, 12, 3)
        await asyncio.gather(first.result(), second.result())
        assert worker.started == ["first", "second"]
    finally:
        engine.close()


async def _up_to(edit: Any, phase: Phase) -> Any:
    async for event in edit.events():
        yield event
        if event.phase is phase:
            return


async def test_a_cancel_while_it_is_enlarged_leaves_no_file(
    make_service: MakeService, some_file: Path, photo: Path
) -> None:
    service = make_service(upscale_model=some_file)

    async def stop(event: Progress) -> None:
        if event.phase is Phase.UPSCALING and event.step == 1:
            raise EditCancelledError()

    request = PictureRequest(prompt="x", upscale=2)
    with pytest.raises(EditCancelledError):
        await service.edit_picture(photo.read_bytes(), request, stop)

    made = await service.edit_picture(photo.read_bytes(), request)
    assert made.metadata.to_dict()["upscale"] == 2


def _without_the_extra(patch: pytest.MonkeyPatch, file: Path) -> None:
    patch.setitem(sys.modules, "spandrel", None)


def _without_a_file(patch: pytest.MonkeyPatch, file: Path) -> None:
    file.unlink()


def _as_it_is(patch: pytest.MonkeyPatch, file: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "settings", "sentence"),
    [
        (_without_the_extra, {}, "Invalid parameter: upscale needs an extra: pip install "),
        (_without_a_file, {}, "there is no file at UPSCALE_MODEL"),
        (_as_it_is, {"upscale_model": None}, "Invalid parameter: upscale needs a model: set "),
        (
            _as_it_is,
            {"max_megapixels": 1},
            "Invalid parameter: upscale 4 would make 1600×1200 pixels of 400×300, at most 1 ",
        ),
    ],
)
async def test_what_cannot_be_enlarged_is_refused_before_the_edit(
    make_service: MakeService,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    some_file: Path,
    change: Callable[[pytest.MonkeyPatch, Path], None],
    settings: dict[str, Any],
    sentence: str,
) -> None:
    Image.new("RGB", (400, 300)).save(photo := tmp_path / "photo.png")
    worker = FakeWorker()
    service = make_service(worker, **{"upscale_model": some_file, **settings})
    change(monkeypatch, some_file)

    async with Client(build_mcp(service)) as client:
        arguments = {"image_path": str(photo), "prompt": "x", "upscale": 4}
        called = await client.call_tool("edit_image", arguments, raise_on_error=False)
        batch = {"image_paths": [str(photo)], "prompts": "x", "upscale": 4}
        answer = await client.call_tool("batch_edit_images", batch, raise_on_error=False)

    assert sentence in called.structured_content["error"]
    assert sentence in str(answer.structured_content)
    assert worker.started == []
    with pytest.raises(Step1XEditError, match=re.escape(sentence)):
        await service.estimate(service.read_picture({"prompt": "x", "upscale": 4}), (400, 300))


async def test_a_format_that_cannot_hold_the_result_is_refused(
    make_service: MakeService, some_file: Path
) -> None:
    Image.new("RGB", (5000, 400)).save(stream := io.BytesIO(), "PNG")
    request = PictureRequest(prompt="x", upscale=4)

    with pytest.raises(Step1XEditError, match="WEBP holds at most 16383 pixels per side"):
        await make_service(upscale_model=some_file).edit_picture(
            stream.getvalue(), request, suffix=".webp"
        )


@pytest.mark.parametrize("name", ["4x.ckpt", "4x.onnx", "4x"])
def test_another_kind_of_file_stops_the_start(name: str) -> None:
    with pytest.raises(SettingsError, match=r"UPSCALE_MODEL must be a \.safetensors or \.pth file"):
        load_settings({"upscale_model": name})


async def test_an_estimate_says_that_it_ends_before_the_enlargement(
    make_service: MakeService, some_file: Path, photo: Path
) -> None:
    service = make_service(FakeWorker(placement=STREAMED), upscale_model=some_file)
    request = PictureRequest(prompt="x", upscale=2)
    await service.edit_picture(photo.read_bytes(), request)

    answer = await service.estimate(request, (64, 48))

    assert answer.note == "predicted_seconds is the time until the picture is enlarged"
