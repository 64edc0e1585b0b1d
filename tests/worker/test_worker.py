"""The worker's model, with a whole pipeline at toy size and real moves of its weights."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from step1x_edit.channel import GIGA, EditJob, Memory, Painted, Phase, Progress, Residence, Start
from step1x_edit.checkpoints import arena
from step1x_edit.checkpoints.read import STEPS_FILE, open_checkpoint, write_demo
from step1x_edit.engine.worker_process import start_of
from step1x_edit.errors import (
    CheckpointError,
    EditCancelledError,
    InvalidParameterError,
    ModelUnavailableError,
    OutOfMemoryError,
)
from step1x_edit.model.steps import PUBLISHED, Evaluations
from step1x_edit.schemas.requests import Precision
from step1x_edit.settings import Settings
from step1x_edit.worker.edits import PipelineWorker
from step1x_edit.worker.opening import STAND_IN
from step1x_edit.worker.process import load_worker
from step1x_edit.worker.residency import Residency, allocate_slab
from tiny import EVEN, a_picture, tiny_pipeline


def job(prompt: str = "make it a night scene") -> EditJob:
    return EditJob(
        image=a_picture(),
        prompt=prompt,
        negative_prompt="",
        num_steps=2,
        guidance_scale=6.0,
        size_level=64,
        seed=3,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_demo(tmp_path / "checkpoint", tiny_pipeline())
    return tmp_path / "checkpoint"


def a_worker(folder: Path, device: str = "cpu") -> PipelineWorker:
    return load_worker(Start(model_path=str(folder), data_dir=str(folder.parent), device=device))


def go_on() -> None:
    """A check that never stops anything."""


def texts_of(worker: PipelineWorker, wanted: EditJob) -> list[str]:
    events = worker.edit(wanted, go_on)
    return [event.text for event in events if isinstance(event, Progress)]


def outcome_of(worker: PipelineWorker, wanted: EditJob) -> Painted:
    *_, last = worker.edit(wanted, go_on)
    assert isinstance(last, Painted)
    return last


@pytest.mark.parametrize(("label", "is_known"), [("unknown", False), ("night", True)])
def test_the_first_step_says_whether_the_model_has_learned_such_an_edit(
    tmp_path: Path, label: str, is_known: bool
) -> None:
    write_demo(tmp_path, tiny_pipeline(labels=(label,)))

    events = a_worker(tmp_path).edit(job(), go_on)

    first = next(one for one in events if isinstance(one, Progress) and one.step == 1)
    assert first.is_known == is_known


def test_the_first_edit_loads_the_model_and_the_next_one_finds_it(folder: Path) -> None:
    worker = a_worker(folder)
    assert worker.residence() == Residence()

    first, second = texts_of(worker, job()), texts_of(worker, job())

    steps = ["encoding", "denoising 1/2", "denoising 2/2", "decoding"]
    assert first == ["loading model", *steps]
    assert second == steps
    told = worker.residence()
    assert (told.location, told.model, told.device) == ("CPU", "demo", "cpu")
    assert told.memory == Memory(0.0, 0.0)
    assert told.size_multiple == 16
    assert told.placement is not None
    assert told.placement.precision == "fp32"
    assert told.placement.predicted_peak_gb is None  # there is no device to run out of memory
    assert told.placement.host_gb > 0  # type: ignore[operator]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_loading_tells_how_many_bytes_of_the_files_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    monkeypatch.setattr(arena, "REPORTED", 1000)
    tensors = load_file(folder / "model.safetensors").values()
    size = sum(tensor.nbytes for tensor in tensors)
    worker = load_worker(Start(model_path=str(folder), device=STAND_IN, precision=precision))

    first, *read = [
        (event.step, event.total)
        for event in worker.edit(job(), go_on)
        if isinstance(event, Progress) and event.phase is Phase.LOADING
    ]

    assert first == (0, 0)  # before anything is known
    assert len(read) > 5
    assert read == sorted(set(read))
    assert {total for _, total in read} == {size}
    assert read[-1] == (size, size)


def test_a_cancel_between_two_reports_of_loading_keeps_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena, "REPORTED", 1000)
    worker = a_worker(folder)
    events = worker.edit(job(), go_on)
    while not (isinstance(event := next(events), Progress) and event.total):
        pass

    events.close()  # as the worker's loop does

    assert worker.residence() == Residence()
    outcome_of(worker, job())


def test_the_placement_tells_what_an_edit_has_needed(folder: Path) -> None:
    worker = a_worker(folder, STAND_IN)

    outcome_of(worker, job())
    held = worker.residence()
    worker.offload()
    offloaded = worker.residence()

    assert held.placement is not None
    assert held.placement.reason == "everything fits"
    assert held.placement.measured_peak_gb == held.memory.allocated_gb > 0
    assert held.placement.predicted_peak_gb > held.memory.allocated_gb  # type: ignore[operator]
    assert offloaded.placement == held.placement  # how it was, and will be again


def test_the_placement_tells_in_which_codes_the_weights_are_kept(folder: Path) -> None:
    worker = load_worker(Start(model_path=str(folder), device="cpu", precision="int8"))

    outcome_of(worker, job())

    placement = worker.residence().placement
    assert placement is not None
    assert placement.precision == "int8"


@pytest.mark.skipif(sys.platform != "linux", reason="only there it can be measured again")
def test_without_a_device_the_peak_is_that_of_this_process_since_the_edit_began(
    folder: Path,
) -> None:
    ballast = np.ones(400 * 2**20, np.uint8)  # more than the library and the model together
    size_gb = ballast.nbytes / GIGA
    worker = a_worker(folder)
    outcome_of(worker, job())
    with_it = worker.residence().placement
    del ballast
    outcome_of(worker, job())
    without_it = worker.residence().placement

    assert with_it is not None
    assert without_it is not None
    assert with_it.measured_peak_gb is not None
    assert without_it.measured_peak_gb is not None
    assert with_it.measured_peak_gb > size_gb
    assert without_it.measured_peak_gb < with_it.measured_peak_gb - size_gb / 2


def test_the_picture_is_the_same_wherever_the_model_has_been(folder: Path) -> None:
    moving = a_worker(folder, STAND_IN)

    before = outcome_of(moving, job()).image
    held = moving.residence()
    moving.offload()
    offloaded = moving.residence()
    after = outcome_of(moving, job()).image

    assert held.location == "GPU"
    assert held.memory.allocated_gb > 0
    assert offloaded.location == "CPU"
    assert offloaded.memory.allocated_gb == 0
    assert np.array_equal(before, after)
    assert np.array_equal(before, outcome_of(a_worker(folder), job()).image)


@pytest.mark.parametrize(
    ("labels", "is_warned"), [(("unknown",), True), (("bw",), False), (("identity",), False)]
)
def test_only_wording_that_the_recogniser_does_not_know_is_warned_about(
    tmp_path: Path, labels: tuple[str, ...], is_warned: bool
) -> None:
    write_demo(tmp_path, tiny_pipeline(labels))

    warning = outcome_of(a_worker(tmp_path), job()).warning

    assert (warning is not None) == is_warned


def test_the_warning_names_what_is_known_in_plain_words(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(("unknown", "identity", "bw", "sepia", "red"))
    assert pipeline.recogniser is not None
    pipeline.recogniser.bias.data[0] = 1e6
    write_demo(tmp_path, pipeline)

    warning = outcome_of(a_worker(tmp_path), job("add a red hat")).warning

    assert warning is not None
    assert "the demo checkpoint does not know this edit" in warning
    assert "will have left the picture nearly as it was" in warning  # it is not measured
    assert "it knows: black and white, sepia, red tint. " in warning
    assert "MODEL_PATH" in warning


def test_a_prompt_that_is_not_read_to_its_end_is_warned_about(tmp_path: Path) -> None:
    write_demo(tmp_path, tiny_pipeline(("unknown",)))

    warning = outcome_of(a_worker(tmp_path), job("make it night " * 50)).warning

    assert warning is not None
    assert warning.startswith(
        "the end of the prompt was cut: this checkpoint reads at most 40 tokens of picture and "
        "prompt; the demo checkpoint does not know this edit"
    )


def test_a_mode_that_the_checkpoint_has_no_figures_for_is_refused(folder: Path) -> None:
    worker, turbo = a_worker(folder), dataclasses.replace(job(), mode="turbo", num_steps=10)

    for location in ("Unloaded", "CPU"):
        with pytest.raises(InvalidParameterError, match="mode turbo needs") as raised:
            texts_of(worker, turbo)
        assert raised.value.param == "mode"
        assert worker.residence().location == location
        texts_of(worker, job())
    worker = a_worker(measured(folder))
    with pytest.raises(InvalidParameterError, match="4 to 64"):
        texts_of(worker, dataclasses.replace(turbo, size_level=512))


def measured(folder: Path) -> Path:
    """The checkpoint with figures of its steps."""
    (folder / STEPS_FILE).write_text(json.dumps({"tiny": EVEN.to_json()}))
    return folder


def test_a_mode_that_was_measured_is_made_without_a_warning(folder: Path) -> None:
    turbo = dataclasses.replace(job(), mode="turbo", num_steps=10)

    outcome = outcome_of(a_worker(measured(folder)), turbo)

    assert outcome.evaluations == Evaluations(8, 12)
    assert outcome.warning is None


@pytest.mark.parametrize(
    "damaged", ["", "[]", '{"tiny": []}', '{"tiny": {"curves": []}}', '{"tiny": {"curves": 1}}']
)
def test_figures_that_are_damaged_are_refused_by_the_name_of_their_file(
    folder: Path, damaged: str
) -> None:
    (folder / STEPS_FILE).write_text(damaged)
    worker = a_worker(folder)

    with pytest.raises(CheckpointError, match=STEPS_FILE):
        texts_of(worker, job())


def test_figures_that_others_published_are_named_in_the_answer(folder: Path) -> None:
    opened = open_checkpoint(folder)
    opened.checkpoint.pipeline.profile = PUBLISHED
    worker = PipelineWorker(Residency(lambda: opened, None), "cpu")
    edit = dataclasses.replace(job(), num_steps=10)

    assert outcome_of(worker, edit).warning is None
    warning = outcome_of(worker, dataclasses.replace(edit, mode="turbo")).warning

    assert warning == PUBLISHED.caveat


def test_a_checkpoint_of_another_version_is_refused(folder: Path) -> None:
    worker = load_worker(Start(model_path=str(folder), model_version="v1.1", device="cpu"))

    with pytest.raises(CheckpointError, match=r"MODEL_VERSION is v1\.1, but the checkpoint is"):
        texts_of(worker, job())


def test_a_model_that_cannot_be_loaded_is_tried_again_by_the_next_edit(folder: Path) -> None:
    faults: list[Exception] = [OSError("disk on fire")]

    def opened() -> object:
        if faults:
            raise faults.pop()
        return open_checkpoint(folder)

    worker = PipelineWorker(Residency(opened, None), "cpu")  # type: ignore[arg-type]

    with pytest.raises(ModelUnavailableError, match="cannot be loaded"):
        texts_of(worker, job())
    assert worker.residence() == Residence()
    texts_of(worker, job())


def test_a_step_carries_the_preview_that_was_asked_for(folder: Path) -> None:
    worker = a_worker(folder)

    events = list(worker.edit(dataclasses.replace(job(), previews=1), go_on))

    previews = {
        event.text: event.preview
        for event in events
        if isinstance(event, Progress) and event.preview is not None
    }
    assert list(previews) == ["denoising 1/2"]
    outcome = events[-1]
    assert isinstance(outcome, Painted)
    assert previews["denoising 1/2"].shape == outcome.image.shape
    assert np.array_equal(outcome.image, outcome_of(a_worker(folder), job()).image)


# --- stopping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["loading model", "encoding", "denoising 1/2", "decoding"])
def test_a_cancel_stops_in_the_middle_of_every_phase(folder: Path, phase: str) -> None:
    worker = a_worker(folder, STAND_IN)
    seen: list[str] = []

    def check() -> None:
        if seen and seen[-1] == phase:
            raise EditCancelledError()

    def run() -> None:
        for event in worker.edit(job(), check):
            assert isinstance(event, Progress), "it continued to the end"
            seen.append(event.text)
            if phase.startswith("denoising"):
                check()  # as the worker's loop does after each event

    with pytest.raises(EditCancelledError):
        run()

    assert seen[-1] == phase
    assert np.array_equal(
        outcome_of(worker, job()).image, outcome_of(a_worker(folder), job()).image
    )


# --- what is kept of earlier edits ---------------------------------------------------------------


def edited_with(folder: Path, edit_cache_mb: int, jobs: list[EditJob]) -> tuple[list[bytes], int]:
    """The pictures, and how often the autoencoder has encoded one after the first edit."""
    settings = Settings(
        model_path=folder, device="cpu", edit_cache_mb=edit_cache_mb, _env_file=None
    )
    worker, calls = load_worker(start_of(settings)), list[object]()
    images = [outcome_of(worker, jobs[0]).image]
    checkpoint, residence = worker._residency.checkpoint, worker.residence()
    assert checkpoint is not None
    checkpoint.pipeline.vae.encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    images += [outcome_of(worker, each).image for each in jobs[1:]]
    assert without_peak(worker.residence()) == without_peak(residence)
    return [image.tobytes() for image in images], len(calls)


def without_peak(residence: Residence) -> Residence:
    assert residence.placement is not None
    placement = dataclasses.replace(residence.placement, measured_peak_gb=None)
    return dataclasses.replace(residence, placement=placement)


def test_the_setting_decides_what_is_kept_and_nothing_that_can_be_seen(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    changed = a_picture()
    changed[20, 30, 1] ^= 1
    jobs = [
        dataclasses.replace(job(), image=image, prompt=prompt)
        for image, prompt in ((a_picture(), "a secret"), (changed, "a secret"), (changed, "night"))
    ] * 2
    files = [*tmp_path.rglob("*")]

    with caplog.at_level("DEBUG"):
        usual, without = (
            edited_with(folder, size, jobs)
            for size in (Settings.model_fields["edit_cache_mb"].default, 0)
        )

    assert usual[0] == without[0] == usual[0][:3] * 2
    assert len(set(usual[0])) == 3
    assert (usual[1], without[1]) == (1, 5)
    assert [*tmp_path.rglob("*")] == files
    assert "secret" not in caplog.text


# --- memory runs out -----------------------------------------------------------------------------


class Faults:
    """Runs out of memory at chosen calls of a layer or of the allocator."""

    def __init__(self, *numbers: int) -> None:
        self.calls = 0
        self._numbers = numbers

    def __call__(self, *_: object) -> None:
        self.calls += 1
        if self.calls in self._numbers:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def with_faults(folder: Path, part: str, faults: Faults) -> PipelineWorker:
    worker = a_worker(folder, STAND_IN)
    texts_of(worker, job())
    fail_in(worker, part, faults)
    return worker


def fail_in(worker: PipelineWorker, part: str, faults: Faults) -> Faults:
    with worker._residency.on_device() as checkpoint:
        pipeline = checkpoint.pipeline
        module = {
            "encoding": pipeline.vae.encoder,
            "denoising": pipeline.transformer.final_layer,
            "decoding": pipeline.vae.decoder,
        }[part]
        module.register_forward_pre_hook(faults)
    return faults


@pytest.mark.parametrize(
    ("part", "call"), [("encoding", 1), ("denoising", 1), ("denoising", 2), ("decoding", 1)]
)
def test_memory_that_runs_out_once_costs_one_retry_and_no_step_twice(
    folder: Path, part: str, call: int
) -> None:
    faults = Faults(call)
    worker = with_faults(folder, part, faults)

    events = list(worker.edit(job(), go_on))

    steps = [event.step for event in events if isinstance(event, Progress) and event.total == 2]
    assert steps == [1, 2]
    assert faults.calls > call
    assert isinstance(events[-1], Painted)
    usual = outcome_of(a_worker(folder), job()).image.astype(int)
    assert np.abs(events[-1].image.astype(int) - usual).max() <= 1


@pytest.mark.parametrize("device", ["cpu", STAND_IN])
def test_a_masked_turbo_edit_keeps_what_fits_until_memory_runs_out(
    folder: Path, device: str
) -> None:
    curves = [{"tokens": tokens, "density": [[1.0, 1.0]]} for tokens in (1, 99)]
    profile = {"curves": curves, "has_regions": True}
    (folder / STEPS_FILE).write_text(json.dumps({"tiny": profile}))
    mask = np.zeros((40, 60), np.uint8)
    mask[0, 0] = 255
    wanted = dataclasses.replace(job(), num_steps=20, mode="turbo", mask=mask)
    worker = a_worker(folder, device)
    outcome_of(worker, job())
    rows: list[int] = []
    with worker._residency.on_device() as checkpoint:
        network = checkpoint.pipeline.transformer
        network.img_in.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    usual = outcome_of(worker, wanted)
    region, everything = min(rows), max(rows)
    assert rows == [everything, *[everything, region] * 3, everything]
    rows.clear()
    network.final_layer.register_forward_pre_hook(Faults(3))

    found = outcome_of(worker, wanted)

    assert rows[:3] == [everything, everything, region]
    assert set(rows[3:]) == {everything}  # one prompt after the other
    assert found.evaluations == usual.evaluations == Evaluations(16, 24)


@pytest.mark.parametrize("part", ["encoding", "denoising", "decoding"])
def test_memory_that_runs_out_again_costs_a_part_of_the_model_on_the_device(
    folder: Path, part: str
) -> None:
    worker = with_faults(folder, part, Faults(1, 2, 3))
    whole = worker.residence().memory.allocated_gb

    events = list(worker.edit(job(), go_on))

    steps = [event.step for event in events if isinstance(event, Progress) and event.total == 2]
    assert steps == [1, 2]
    assert isinstance(events[-1], Painted)
    assert worker.residence().location == "GPU"
    assert worker.residence().memory.allocated_gb < whole
    usual = outcome_of(a_worker(folder), job()).image.astype(int)
    assert np.abs(events[-1].image.astype(int) - usual).max() <= 1


@pytest.mark.parametrize("part", ["encoding", "denoising", "decoding"])
def test_memory_that_stays_short_ends_the_edit_and_the_next_one_works(
    folder: Path, part: str
) -> None:
    faults = Faults(*range(1, 100))
    worker = with_faults(folder, part, faults)

    with pytest.raises(OutOfMemoryError, match=r"^CUDA out of memory: .*lower size_level"):
        texts_of(worker, job())

    assert 3 <= faults.calls <= 6  # two plans, and at most four quarters of the model
    faults.calls = 100
    outcome_of(worker, job())


@pytest.mark.parametrize("part", ["encoding", "denoising", "decoding"])
def test_what_is_kept_of_earlier_edits_goes_before_the_plan_changes(
    folder: Path, part: str
) -> None:
    worker, other = a_worker(folder, STAND_IN), dataclasses.replace(job(), image=255 - a_picture())
    expected = outcome_of(worker, other)
    checkpoint = worker._residency.checkpoint
    assert checkpoint is not None
    checkpoint.pipeline.keep(2**24)
    outcome_of(worker, job())
    batches: list[int] = []
    checkpoint.pipeline.transformer.img_in.register_forward_pre_hook(
        lambda _, inputs: batches.append(inputs[0].shape[0])
    )
    faults = fail_in(worker, part, Faults(1))

    outcome = outcome_of(worker, other)

    assert faults.calls > 1
    assert outcome.image.tobytes() == expected.image.tobytes()
    assert set(batches) == {2}  # both prompts together, as the first plan has it
    encoded: list[object] = []
    checkpoint.pipeline.vae.encoder.register_forward_pre_hook(lambda *_: encoded.append(1))
    outcome_of(worker, job())
    assert encoded


def test_memory_that_runs_out_while_loading_is_tried_once_more(folder: Path) -> None:
    attempts = Faults(1)

    def allocate(size: int, device: torch.device) -> torch.Tensor:
        attempts()
        return allocate_slab(size, device)

    residency = Residency(lambda: open_checkpoint(folder), torch.device("cpu"), allocate)
    worker = PipelineWorker(residency, STAND_IN)

    texts = texts_of(worker, job())

    assert texts[:3] == ["loading model", "loading model", "encoding"]
    assert worker.residence().location == "GPU"


def test_closing_the_iterator_gives_the_model_back(folder: Path) -> None:
    worker = a_worker(folder, STAND_IN)
    events: Generator[Progress | Painted, None, None] = worker.edit(job(), go_on)
    while not (isinstance(event := next(events), Progress) and event.text == "denoising 1/2"):
        pass

    events.close()

    worker.offload()  # would raise while the model is lent
    assert worker.residence().location == "CPU"
