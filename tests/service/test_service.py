"""The operations: what an edit answers, saves and refuses, and what status tells."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import MakeService, edits_of
from fakes import NUMERICS, FakeWorker, Gate, ManualClock, inverted, settled, slow_disk
from step1x_edit.channel import EditJob, Memory, Phase, Progress
from step1x_edit.errors import (
    DeadlineExceededError,
    ImageFileNotFoundError,
    ImageTooLargeError,
    InvalidParameterError,
    OutputExistsError,
    PathNotAllowedError,
    ServerBusyError,
    Step1XEditError,
    UnsupportedImageError,
)
from step1x_edit.pictures.images import Pixels, read_edit_record
from step1x_edit.schemas.requests import MAX_SEED
from step1x_edit.service.service import EditService


async def edit(service: EditService, photo: Path, **arguments: object) -> dict[str, object]:
    request = service.read_edit({"image_path": str(photo), "prompt": "invert", **arguments})
    return (await edits_of(service).edit(request)).answer.to_dict()


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
            "arithmetic": "fp32 avx2",
            "numerics": NUMERICS,
            "width": 64,
            "height": 48,
            "mode": "exact",
            "evaluations_done": 56,
            "evaluations_skipped": 0,
        },
    }


async def test_an_edit_answers_what_the_model_thought(
    make_service: MakeService, photo: Path
) -> None:
    service = make_service(FakeWorker(model="v1.2"))

    answer = await edit(service, photo, thinking=True, reflection=True)

    metadata: Any = answer["metadata"]
    assert metadata["prompt"] == "invert"
    reasoning = metadata["reasoning"]
    assert reasoning["prompt"] == "invert, and nothing else"
    assert reasoning["best"] == 2
    first, second = reasoning["rounds"]
    assert (first["from_round"], second["from_round"]) == (0, 1)
    assert second["prompt"] == "make the hat larger"
    assert list(second) == [
        "prompt",
        "from_round",
        "verdict",
        "description",
        "score",
        "reason",
        "edit_score",
        "quality_score",
        "value",
    ]


async def test_thoughts_without_a_reflection_have_one_round_and_no_verdict(
    make_service: MakeService, photo: Path
) -> None:
    answer = await edit(make_service(FakeWorker(model="v1.2")), photo, thinking=True)

    metadata: Any = answer["metadata"]
    assert metadata["reasoning"] == {
        "prompt": "invert, and nothing else",
        "rounds": [{"prompt": "invert, and nothing else", "from_round": 0}],
        "best": 1,
    }


async def test_the_file_says_that_the_model_thought_and_only_then(
    make_service: MakeService, photo: Path
) -> None:
    service = make_service(FakeWorker(model="v1.2"))

    plain = await edit(service, photo)
    thought = await edit(service, photo, thinking=True, reflection=True)

    record = read_edit_record(Path(str(thought["output_path"])))
    assert record is not None
    assert (record.prompt, record.thinking, record.reflection) == ("invert", True, True)
    assert record.reflection_rounds == 3
    assert record.rewritten_prompt == "invert, and nothing else"
    written = Path(str(plain["output_path"])).read_bytes()
    assert b"thinking" not in written
    assert b"reflection_rounds" not in written
    assert b"rewritten_prompt" not in written


async def test_the_file_names_the_mode_unless_it_is_exact(
    make_service: MakeService, photo: Path
) -> None:
    service = make_service(default_mode="fast")

    fast = await edit(service, photo)
    exact = await edit(service, photo, mode="exact")

    files = [Path(str(answer["output_path"])) for answer in (fast, exact)]
    records = [read_edit_record(file) for file in files]
    assert [record and record.mode for record in records] == ["fast", "exact"]
    assert b'"mode"' not in files[1].read_bytes()  # the bytes of exact files are as before
    skipped: Any = [answer["metadata"] for answer in (fast, exact)]
    assert [metadata["mode"] for metadata in skipped] == ["fast", "exact"]
    assert skipped[0]["evaluations_skipped"] > skipped[1]["evaluations_skipped"] == 0


async def test_each_round_is_shown_small_in_the_colours_of_the_input(
    make_service: MakeService, tmp_path: Path
) -> None:
    path = tmp_path / "noise.png"
    Image.effect_noise((900, 700), 200).convert("RGB").save(path)
    service = make_service(FakeWorker(model="v1.2"))
    request = service.read_picture({"prompt": "x", "reflection": True})

    edited = await service.edit_picture(path.read_bytes(), request)

    assert len(edited.rounds) == 2
    for small in edited.rounds:
        shown = Image.open(io.BytesIO(small))
        assert (shown.format, max(shown.size) <= 512) == ("JPEG", True)
        assert len(base64.b64encode(small)) <= 48 * 1024


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
    await edits_of(service).edit(request, report)

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
        "arithmetic": "fp32 avx2",
        "numerics": NUMERICS,
        "queue_length": 0,
    }


async def test_the_status_has_the_memory_of_each_further_gpu(
    make_service: MakeService, photo: Path
) -> None:
    held, others = Memory(1.0, 2.0), (Memory(3.0, 4.0), Memory(5.0, 6.0))
    service = make_service(FakeWorker(device="cuda:0", held=held, others=others))
    await edit(service, photo)

    gpu_status = service.status().to_dict()["gpu_status"]

    assert gpu_status["gpu_memory_allocated_gb"] == 1.0
    assert gpu_status["other_devices"] == [
        {"device": "cuda:1", "allocated_gb": 3.0, "reserved_gb": 4.0},
        {"device": "cuda:2", "allocated_gb": 5.0, "reserved_gb": 6.0},
    ]


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
    waiting = asyncio.ensure_future(edits_of(service).edit(request, report))
    await queued.wait()
    read: list[str] = []
    monkeypatch.setattr(
        "step1x_edit.service.files.FileAccess.read", lambda self, path: read.append(path)
    )

    with pytest.raises(ServerBusyError, match="1 edit is waiting"):
        await edit(service, photo)

    assert read == []
    gate.open()
    await asyncio.gather(running, waiting)


async def test_the_time_that_an_edit_may_take_is_a_setting(
    make_service: MakeService, photo: Path
) -> None:
    clock = ManualClock()
    worker = FakeWorker(before_step=lambda job, step: clock.advance(9))
    service = make_service(worker, clock=clock, edit_timeout=60)

    with pytest.raises(DeadlineExceededError, match="longer than 60 s"):
        await edit(service, photo)


async def test_the_time_that_loading_may_take_is_another_setting(
    make_service: MakeService, photo: Path
) -> None:
    clock = ManualClock()
    service = make_service(
        FakeWorker(load=slow_disk(clock, 100)), clock=clock, edit_timeout=60, load_timeout=401
    )
    await edit(service, photo)

    service = make_service(
        FakeWorker(load=slow_disk(clock, 100)), clock=clock, edit_timeout=60, load_timeout=399
    )
    with pytest.raises(DeadlineExceededError, match=r"loading the model took longer than 399 s"):
        await edit(service, photo)


async def test_the_times_after_which_an_idle_model_leaves_are_settings(
    make_service: MakeService, photo: Path
) -> None:
    clock = ManualClock()
    service = make_service(
        FakeWorker(device="cuda"), clock=clock, gpu_idle_timeout=5, gpu_release_timeout=20
    )
    await edit(service, photo)

    places = [service.status().gpu_status.model_location]
    for seconds in (5, 15):
        clock.advance(seconds)
        await asyncio.to_thread(settled, clock)
        places.append(service.status().gpu_status.model_location)

    assert places == ["GPU", "CPU", "Unloaded"]


# --- moves ---------------------------------------------------------------------------------------


async def test_offload_and_release_answer_as_the_contract_says(
    make_service: MakeService, photo: Path
) -> None:
    worker = FakeWorker(device="cuda", held=Memory(allocated_gb=0.12, reserved_gb=0.5))
    service = make_service(worker)
    nothing = (await service.offload()).to_dict()
    done = await edit(service, photo)

    offloaded = (await service.offload()).to_dict()
    released = (await service.release()).to_dict()

    assert nothing["message"] == (
        "Nothing to offload. Model location: Unloaded, GPU memory: 0.00GB"
    )
    assert done["metadata"]["gpu_location"] == "GPU"  # type: ignore[index]
    assert done["metadata"]["gpu_memory_gb"] == 0.12  # type: ignore[index]
    assert offloaded["status"] == "success"
    assert offloaded["message"] == "GPU offloaded. Model now on CPU, GPU memory: 0.00GB"
    assert offloaded["gpu_status"]["statistics"]["gpu_to_cpu"] == 1
    assert released["message"] == ("GPU released. Model location: Unloaded, GPU memory: 0.00GB")
    assert released["gpu_status"]["statistics"]["full_releases"] == 1


# --- pictures that callers send -------------------------------------------------------------------


async def test_a_picture_that_is_sent_comes_back_and_no_file_is_touched(
    make_service: MakeService, photo: Path
) -> None:
    service = make_service()
    phases = []

    async def report(event: Progress) -> None:
        phases.append(event.phase)

    request = service.read_picture({"prompt": "x", "seed": 5, "num_steps": None})
    edited = await service.edit_picture(photo.read_bytes(), request, report, suffix=".webp")
    saved = await edits_of(service).edit(
        service.read_edit({"image_path": photo, "prompt": "x", "seed": 5, "output_path": None})
    )

    assert Image.open(io.BytesIO(edited.data)).format == "WEBP"
    assert np.array_equal(edited.picture.pixels, saved.edited.picture.pixels)
    assert edited.metadata == saved.answer.metadata
    assert phases[-1] == Phase.SAVING
    assert sorted(path.name for path in photo.parent.iterdir()) == [
        photo.name,
        "photo_edited.png",
    ]


async def test_the_report_brings_as_many_previews_as_were_asked_for(
    make_service: MakeService, photo: Path
) -> None:
    turns = threading.Semaphore(1)

    def take_a_turn(job: EditJob, step: int) -> None:
        turns.acquire(timeout=240)

    service = make_service(FakeWorker(before_step=take_a_turn))
    previews: dict[str, Pixels] = {}

    async def report(event: Progress) -> None:
        if event.phase is Phase.DENOISING:
            turns.release()  # the worker goes no faster than we look
        if event.preview is not None:
            previews[event.text] = event.preview

    picture = {"prompt": "x", "num_steps": 10}
    request = service.read_picture(picture)
    await service.edit_picture(photo.read_bytes(), request, report, previews=3)

    assert list(previews) == ["denoising 2/10", "denoising 5/10", "denoising 7/10"]
    assert {pixels.shape for pixels in previews.values()} == {(48, 64, 3)}
    assert previews["denoising 5/10"].max() == 5


async def test_edits_are_counted_by_how_they_end(make_service: MakeService, photo: Path) -> None:
    gate, worker = Gate(), FakeWorker()
    worker.before_step = lambda job, step: gate(job, step) if job.prompt == "stop" else None
    service = make_service(worker)
    stopped = asyncio.ensure_future(
        service.edit_picture(photo.read_bytes(), service.read_picture({"prompt": "stop"}))
    )
    await asyncio.to_thread(gate.reached.wait, 60)
    stopped.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopped
    gate.open()
    await service.edit_picture(photo.read_bytes(), service.read_picture({"prompt": "go"}))

    assert service.outcomes == {"cancelled": 1, "success": 1}


# --- an input that was made here ------------------------------------------------------------------


async def test_the_seed_that_made_a_picture_is_warned_of_when_it_edits_it(
    make_service: MakeService, photo: Path
) -> None:
    service = make_service()
    first = await edit(service, photo, seed=7)
    result = Path(str(first["output_path"]))

    again = await edit(service, result, seed=7)
    of_other_size = await edit(service, result, seed=7, size_level=512)
    of_other_seed = await edit(service, result, seed=8)
    drawn = await edit(service, result)

    warning = "seed 7 also made the input, which can leave a halo; use another seed"
    assert again["metadata"]["warning"] == warning  # type: ignore[index]
    for answer in (first, of_other_size, of_other_seed, drawn):
        assert "warning" not in answer["metadata"]  # type: ignore[operator]


async def test_a_generated_picture_is_not_edited_with_its_own_noise_unwarned(
    make_service: MakeService, tmp_path: Path
) -> None:
    service = make_service(model_version="v1.1")
    asked = {"prompt": "a fox", "width": 512, "height": 512, "seed": 7}
    asked["output_path"] = str(tmp_path / "fox.webp")
    await edits_of(service).generate(service.read_generate(asked))

    same = await edit(service, tmp_path / "fox.webp", seed=7, size_level=512)
    larger = await edit(service, tmp_path / "fox.webp", seed=7)

    assert "seed 7" in same["metadata"]["warning"]  # type: ignore[index]
    assert "warning" not in larger["metadata"]  # type: ignore[operator]


async def test_a_seed_that_made_the_input_is_drawn_again(
    make_service: MakeService, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, drawn = make_service(), iter([7, 7, 8])
    monkeypatch.setattr("secrets.randbelow", lambda most: next(drawn))
    first = await edit(service, photo)

    second = await edit(service, Path(str(first["output_path"])))

    assert [one["metadata"]["seed"] for one in (first, second)] == [7, 8]  # type: ignore[index]


# --- masks ----------------------------------------------------------------------------------------


def mask_beside(photo: Path, name: str = "mask.png", right: object = 255) -> Path:
    """A mask that lets the right half of the photograph change."""
    mask = Image.new("L", (64, 48), 0)
    mask.paste(right, (32, 0, 64, 48))  # type: ignore[arg-type]
    path = photo.with_name(name)
    mask.save(path)
    return path


async def test_outside_of_the_mask_the_picture_stays_and_the_answer_says_how_much_changed(
    make_service: MakeService, photo: Path
) -> None:
    before, mask = np.asarray(Image.open(photo)), mask_beside(photo)

    answer = await edit(make_service(), photo, mask_path=mask, seed=3)

    after = np.asarray(Image.open(str(answer["output_path"])))
    assert np.array_equal(after[:, :32], before[:, :32])
    assert np.array_equal(after[:, 36:], 255 - before[:, 36:])
    assert answer["metadata"]["changed_share"] == 0.5  # type: ignore[index]
    record = read_edit_record(Path(str(answer["output_path"])))
    assert record is not None
    assert record.input_sha256 == hashlib.sha256(photo.read_bytes()).hexdigest()
    assert record.mask_sha256 == hashlib.sha256(mask.read_bytes()).hexdigest()
    assert (record.arithmetic, record.numerics) == ("fp32 avx2", NUMERICS)


async def test_a_mask_is_laid_on_the_picture_in_its_own_size(
    make_service: MakeService, photo: Path
) -> None:
    def small(job: EditJob) -> np.ndarray:  # as a model does that works at another resolution
        return np.full((24, 32, 3), 255, np.uint8)

    before = np.asarray(Image.open(photo))
    answer = await edit(make_service(FakeWorker(paint=small)), photo, mask_path=mask_beside(photo))

    after = np.asarray(Image.open(str(answer["output_path"])))
    assert np.array_equal(after[:, :32], before[:, :32])
    assert (after[:, 36:] == 255).all()


async def test_a_mask_that_is_sent_does_the_same_as_one_in_a_file(
    make_service: MakeService, photo: Path
) -> None:
    service, mask = make_service(), mask_beside(photo)

    request = service.read_picture({"prompt": "invert", "seed": 3})
    sent = await service.edit_picture(photo.read_bytes(), request, mask=mask.read_bytes())
    saved = await edit(service, photo, mask_path=mask, seed=3)

    assert sent.data == Path(str(saved["output_path"])).read_bytes()
    assert sent.metadata.changed_share == 0.5


@pytest.mark.parametrize("mode", ["exact", "fast", "turbo"])
async def test_only_turbo_shows_the_mask_to_the_model(
    make_service: MakeService, photo: Path, mode: str
) -> None:
    shown: list[np.ndarray | None] = []

    def paint(job: EditJob) -> np.ndarray:
        shown.append(job.mask)
        return inverted(job)

    service = make_service(FakeWorker(paint=paint))
    await edit(service, photo, mask_path=mask_beside(photo), mode=mode)
    await edit(service, photo, mode=mode)

    masked, plain = shown
    assert plain is None
    if mode != "turbo":
        assert masked is None
        return
    assert masked is not None
    assert np.array_equal(masked != 0, np.indices((48, 64))[1] >= 32)


async def test_a_mask_is_checked_before_the_edit_is_queued(
    make_service: MakeService, photo: Path
) -> None:
    worker = FakeWorker()
    service = make_service(worker, max_upload_mb=1)
    other, black = photo.with_name("other.png"), mask_beside(photo, "black.png", right=0)
    text, heavy = photo.with_name("text.png"), photo.with_name("heavy.png")
    Image.new("L", (48, 64), 255).save(other)
    text.write_bytes(b"no picture")
    heavy.write_bytes(b"x" * (2**20 + 1))

    async def refusal(mask: Path, kind: type[Step1XEditError]) -> str:
        with pytest.raises(kind) as caught:
            await edit(service, photo, mask_path=mask)
        return str(caught.value)

    assert await refusal(other, InvalidParameterError) == (
        "Invalid parameter: mask is 48×64 pixels, the picture is 64×48; "
        "both must have the same size"
    )
    assert "mask selects nothing" in await refusal(black, InvalidParameterError)
    sentence = await refusal(text, UnsupportedImageError)
    assert sentence.startswith("Unsupported image format: mask: the file is none of PNG")
    sentence = await refusal(heavy, ImageTooLargeError)
    assert sentence == "Image too large: mask: at most 1 MB are allowed"
    missing = photo.with_name("no.png")
    assert await refusal(missing, ImageFileNotFoundError) == f"Image file not found: {missing}"
    await refusal(Path("/etc/hostname"), PathNotAllowedError)
    assert worker.started == []


async def test_a_mask_is_an_input_that_is_never_overwritten(
    make_service: MakeService, photo: Path
) -> None:
    service, mask = make_service(), mask_beside(photo, "photo_edited.png")
    before = mask.read_bytes()

    answer = await edit(service, photo, mask_path=mask, overwrite=True)
    with pytest.raises(OutputExistsError):
        await edit(service, photo, mask_path=mask, output_path=str(mask), overwrite=True)

    assert answer["output_path"] == str(photo.with_name("photo_edited_2.png"))
    assert mask.read_bytes() == before


async def test_the_transparency_of_a_picture_can_be_its_own_mask(
    make_service: MakeService, photo: Path
) -> None:
    image = Image.open(photo).convert("RGBA")
    image.paste((0, 0, 0, 0), (32, 0, 64, 48))
    image.save(photo)

    answer = await edit(make_service(), photo, mask_path=photo)

    after = np.asarray(Image.open(str(answer["output_path"])))
    assert np.array_equal(after[:, :32], np.asarray(image)[:, :32])
    assert answer["metadata"]["changed_share"] == 0.5  # type: ignore[index]
