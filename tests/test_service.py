"""The operations: what an edit answers, saves and refuses, and what status tells."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import MakeService
from fakes import FakeWorker, Gate
from step1x_edit.channel import Progress
from step1x_edit.errors import (
    DeadlineExceededError,
    ImageFileNotFoundError,
    InvalidParameterError,
    OutputExistsError,
    PathNotAllowedError,
    ServerBusyError,
)
from step1x_edit.images import read_edit_record
from step1x_edit.schemas import MAX_SEED
from step1x_edit.service import EditService, build_service
from step1x_edit.settings import Settings


async def edit(service: EditService, photo: Path, **arguments: object) -> dict[str, object]:
    request = service.read_edit({"image_path": str(photo), "prompt": "invert", **arguments})
    return (await service.edit(request)).answer.to_dict()


async def test_an_edit_answers_exactly_as_the_contract_says(
    make_service: MakeService, photo: Path
) -> None:
    answer = await edit(make_service(), photo, seed=42)

    seconds = answer.pop("processing_time")
    assert isinstance(seconds, float)
    assert answer == {
        "status": "success",
        "message": "Image edited successfully",
        "output_path": str(photo.with_name("photo_edited.png")),
        "metadata": {
            "prompt": "invert",
            "num_steps": 28,
            "guidance_scale": 6.0,
            "size_level": 1024,
            "seed": 42,
            "gpu_location": "CPU",
            "gpu_memory_gb": 0.0,
            "model": "fake",
            "device": "cpu",
            "width": 64,
            "height": 48,
        },
    }


async def test_the_result_is_the_models_picture_in_the_size_of_the_input(
    make_service: MakeService, photo: Path
) -> None:
    before = np.asarray(Image.open(photo))

    answer = await edit(make_service(), photo)

    after = np.asarray(Image.open(str(answer["output_path"])))
    assert np.array_equal(after, 255 - before)


async def test_the_input_is_left_alone_and_results_are_numbered(
    make_service: MakeService, photo: Path
) -> None:
    service, content = make_service(), photo.read_bytes()

    names = [Path(str((await edit(service, photo))["output_path"])).name for _ in range(3)]

    assert len(set(names)) == 3
    assert names[0] == "photo_edited.png"
    assert photo.read_bytes() == content


async def test_a_seed_is_drawn_reported_and_gives_the_same_bytes_again(
    make_service: MakeService, photo: Path
) -> None:
    service = make_service()

    drawn = await edit(service, photo)
    again = await edit(service, photo, seed=drawn["metadata"]["seed"])  # type: ignore[index]

    assert 0 <= drawn["metadata"]["seed"] <= MAX_SEED  # type: ignore[index]
    first, second = (Path(str(answer["output_path"])) for answer in (drawn, again))
    assert first.read_bytes() == second.read_bytes()


async def test_the_file_says_how_it_was_made(make_service: MakeService, photo: Path) -> None:
    answer = await edit(make_service(), photo, seed=7, num_steps=10, negative_prompt="blurry")

    record = read_edit_record(Path(str(answer["output_path"])).read_bytes())

    assert record is not None
    assert (record.prompt, record.negative_prompt) == ("invert", "blurry")
    assert (record.seed, record.num_steps, record.model) == (7, 10, "fake")


async def test_a_models_warning_reaches_the_answer(make_service: MakeService, photo: Path) -> None:
    answer = await edit(make_service(FakeWorker(warning="does not know hats")), photo)

    assert answer["metadata"]["warning"] == "does not know hats"  # type: ignore[index]


async def test_defaults_of_the_operator_apply_where_the_caller_is_silent(
    make_service: MakeService, photo: Path
) -> None:
    service = make_service(default_num_steps=12, default_size_level=512)

    answer = await edit(service, photo, size_level=768)

    metadata = answer["metadata"]
    assert (metadata["num_steps"], metadata["size_level"]) == (12, 768)  # type: ignore[index]


async def test_progress_tells_every_phase_in_order(make_service: MakeService, photo: Path) -> None:
    service, texts = make_service(), []

    async def report(event: Progress) -> None:
        texts.append(event.text)

    request = service.read_edit({"image_path": str(photo), "prompt": "x", "num_steps": 10})
    await service.edit(request, report)

    assert texts[:4] == ["queued, position 1", "loading model", "encoding", "denoising 1/10"]
    assert texts[-3:] == ["denoising 10/10", "decoding", "saving"]


async def test_impossible_edits_are_refused_before_the_model_is_loaded(
    make_service: MakeService, photo: Path
) -> None:
    service = make_service()
    taken = photo.with_name("taken.png")
    taken.write_bytes(b"mine")

    with pytest.raises(ImageFileNotFoundError):
        await edit(service, photo.with_name("no.png"))
    with pytest.raises(PathNotAllowedError):
        await edit(service, Path("/etc/hostname"))
    with pytest.raises(OutputExistsError):
        await edit(service, photo, output_path=str(taken))
    with pytest.raises(OutputExistsError):
        await edit(service, photo, output_path=str(photo), overwrite=True)
    with pytest.raises(InvalidParameterError):
        await edit(service, photo, num_steps=9)

    assert service.status().gpu_status.model_location == "Unloaded"
    assert taken.read_bytes() == b"mine"


async def test_an_edit_that_is_cancelled_stops_and_saves_nothing(
    make_service: MakeService, photo: Path
) -> None:
    gate, worker = Gate(at_step=2), FakeWorker()
    worker.before_step = gate
    service = make_service(worker)
    task = asyncio.ensure_future(edit(service, photo))
    assert await asyncio.to_thread(gate.reached.wait, 60)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.open()
    worker.before_step = lambda job, step: None
    await edit(service, photo, output_path=str(photo.with_name("next.png")))

    assert worker.stopped_at == {"invert": 2}
    assert sorted(path.name for path in photo.parent.iterdir()) == ["next.png", "photo.png"]


async def test_status_has_every_field_of_the_contract(
    make_service: MakeService, photo: Path
) -> None:
    service = make_service(gpu_idle_timeout=90)
    await edit(service, photo)

    answer = service.status().to_dict()

    gpu_status = answer["gpu_status"]
    assert answer["status"] == "success"
    assert gpu_status.pop("idle_time") >= 0
    assert gpu_status == {
        "model_location": "CPU",
        "idle_timeout": 90,
        "gpu_memory_allocated_gb": 0.0,
        "gpu_memory_reserved_gb": 0.0,
        "auto_monitor_running": True,
        "statistics": {"total_loads": 1, "gpu_to_cpu": 0, "cpu_to_gpu": 0, "full_releases": 0},
        "model": "fake",
        "device": "cpu",
        "queue_length": 0,
    }


async def test_a_full_line_refuses_before_the_picture_is_read(
    make_service: MakeService, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    service = make_service(FakeWorker(before_step=gate), max_queue=1)
    running = asyncio.ensure_future(edit(service, photo))
    assert await asyncio.to_thread(gate.reached.wait, 60)
    queued = asyncio.Event()

    async def report(event: Progress) -> None:
        queued.set()

    request = service.read_edit({"image_path": str(photo), "prompt": "x"})
    waiting = asyncio.ensure_future(service.edit(request, report))
    await queued.wait()
    read: list[str] = []
    monkeypatch.setattr("step1x_edit.files.FileAccess.read", lambda self, path: read.append(path))

    with pytest.raises(ServerBusyError, match="1 edits are waiting"):
        await edit(service, photo)

    assert read == []
    gate.open()
    await asyncio.gather(running, waiting)


async def test_the_time_that_an_edit_may_take_is_a_setting(photo: Path) -> None:
    settings = Settings(allowed_dirs=(photo.parent,), _env_file=None)  # type: ignore[call-arg]
    over = settings.model_copy(update={"edit_timeout": -1})  # over before it begins: nobody waits
    service = build_service(over, start=FakeWorker())

    with pytest.raises(DeadlineExceededError, match="longer than -1 s"):
        await edit(service, photo)

    service.close()
