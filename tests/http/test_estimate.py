"""The estimate of an edit before it is made: nothing is run for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

from conftest import MakeService
from fakes import STREAMED, FakeWorker, Gate, ManualClock, a_job, evaluated_steps
from http_server import calling, until
from step1x_edit.channel import EditJob, Start
from step1x_edit.engine.machine import Survey, inspect_machine
from step1x_edit.interfaces.cli.models import models_app
from step1x_edit.interfaces.http.estimate import ESTIMATE_PATH
from step1x_edit.interfaces.http.openai.requests import EDITS_PATH
from step1x_edit.model.request import Mode
from step1x_edit.model.steps import num_evaluated

WEIGHTS = Path(__file__).with_name("weights")
SEEN = Survey(
    torch="2.13",
    device="cuda",
    checkpoint="Step1X-Edit v1.1",
    version="v1.1",
    size_multiple=16,
    placement=STREAMED,
)


def never() -> Survey:
    raise AssertionError("nobody should have to look")


def estimate(client: httpx2.Client, **fields: object) -> dict[str, Any]:
    answer = client.post(ESTIMATE_PATH, json={"prompt": "add a red hat", **fields})
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def edit(client: httpx2.Client, photo: Path, **fields: str) -> None:
    answer = client.post(
        EDITS_PATH, files={"image": photo.read_bytes()}, data={"prompt": "x", **fields}
    )
    assert answer.status_code == 200, answer.text


def ticking(clock: ManualClock) -> Callable[[EditJob, int], None]:
    """Evaluated steps that take two seconds, the first five with all that comes before it."""

    def step(job: EditJob, number: int) -> None:
        if number in evaluated_steps(job):
            clock.advance(5.0 if number == 1 else 2.0)

    return step


def test_a_model_that_is_not_loaded_is_looked_at_once_and_not_started(
    make_service: MakeService, worker: FakeWorker
) -> None:
    looks: list[Survey] = []

    def take_survey() -> Survey:
        looks.append(SEEN)
        return SEEN

    with calling(make_service(worker, take_survey=take_survey)) as client:
        told = estimate(client, width=640, height=480, size_level=512)
        again = estimate(client, size_level=1024)

    assert told == {
        "status": "success",
        "width": 592,
        "height": 432,
        "num_steps": 28,
        "guidance_scale": 6.0,
        "size_level": 512,
        "mode": "exact",
        "n": 1,
        "predicted_seconds": None,
        "predicted_peak_gb": 6.7,  # less than planned for 1024
        "must_load": True,
        "queue_length": 0,
        "model": "Step1X-Edit v1.1",
        "device": "cuda",
        "reason": STREAMED.reason,
        "note": None,
    }
    assert (again["width"], again["height"], again["predicted_peak_gb"]) == (1024, 1024, 7.4)
    assert len(looks) == 1
    assert worker.started == []


def test_a_loaded_model_tells_itself_and_the_time_by_the_last_edit_of_the_kind(
    make_service: MakeService, photo: Path
) -> None:
    clock = ManualClock()
    worker = FakeWorker(
        before_step=ticking(clock), device="cuda:0", placement=STREAMED, size_multiple=32
    )
    with calling(make_service(worker, clock, never)) as client:
        edit(client, photo, num_steps="10", size_level="512")
        same = estimate(client, num_steps=20, size_level=512, n=3, width=640, height=480)
        unguided = estimate(client, size_level=512, guidance_scale=1)
        larger = estimate(client, size_level=1024)

    # Each step takes 2 s; of the 5 s before the end of the first step 3 are for the rest.
    assert same["predicted_seconds"] == 3 * (20 * 2 + 3)
    assert (same["width"], same["height"]) == (576, 416)
    assert (same["must_load"], same["model"]) == (False, "fake")
    assert unguided["predicted_seconds"] is None
    assert larger["predicted_seconds"] is None


@pytest.mark.parametrize("learned_from", ["exact", "fast", "turbo"])
def test_the_time_in_one_mode_tells_that_in_the_others(
    make_service: MakeService, photo: Path, learned_from: str
) -> None:
    clock = ManualClock()
    worker = FakeWorker(before_step=ticking(clock), placement=STREAMED)
    modes: list[Mode] = ["turbo", "fast", "exact"]
    with calling(make_service(worker, clock, never)) as client:
        edit(client, photo, num_steps="20", mode=learned_from)
        told = [estimate(client, num_steps=50, mode=mode) for mode in modes]

    assert [one["mode"] for one in told] == modes
    seconds = [one["predicted_seconds"] for one in told]
    assert seconds == [num_evaluated(mode, 50) * 2 + 3 for mode in modes]
    assert seconds == sorted(set(seconds))


def test_products_of_codes_do_not_change_the_time_of_exact_edits(
    make_service: MakeService, photo: Path
) -> None:
    clock = ManualClock()

    def before_step(job: EditJob, step: int) -> None:
        clock.advance(2 if job.mode == "exact" else 1)

    worker = FakeWorker(before_step=before_step, placement=STREAMED)
    with calling(make_service(worker, clock, never)) as client:
        edit(client, photo, num_steps="20")
        before = estimate(client, num_steps=50)
        edit(client, photo, num_steps="20", mode="fast")
        after = estimate(client, num_steps=50)

    assert before["predicted_seconds"] == after["predicted_seconds"] == 100


def test_the_time_of_a_reflection_is_that_of_all_the_rounds_that_it_may_take(
    make_service: MakeService, photo: Path
) -> None:
    clock = ManualClock()
    worker = FakeWorker(before_step=ticking(clock), model="v1.2", placement=STREAMED)
    with calling(make_service(worker, clock, never)) as client:
        edit(client, photo, num_steps="10", reflection="true")  # it takes two rounds
        bounds = [
            estimate(client, num_steps=20, reflection=True, reflection_rounds=rounds)
            for rounds in (1, 2, 3)
        ]
        plain = estimate(client, num_steps=20)

    # Each step takes 2 s, and 3 s of each round are for the rest.
    assert [told["predicted_seconds"] for told in bounds] == [43, 86, 129]
    assert plain["predicted_seconds"] is None


def test_the_time_is_known_while_the_model_waits_in_memory(
    make_service: MakeService, photo: Path
) -> None:
    clock = ManualClock()
    worker = FakeWorker(before_step=ticking(clock), device="cuda:0", placement=STREAMED)
    with calling(make_service(worker, clock, never)) as client:
        edit(client, photo, num_steps="10")
        client.post("/api/gpu/offload")
        told = estimate(client, num_steps=10)

    assert told["must_load"]
    assert told["predicted_seconds"] == 23
    assert told["reason"] == STREAMED.reason


def test_waiting_edits_are_counted(make_service: MakeService, photo: Path) -> None:
    gate = Gate()
    service = make_service(FakeWorker(before_step=gate, placement=STREAMED), None, never)
    with calling(service) as client, ThreadPoolExecutor() as callers:
        edits = [callers.submit(edit, client, photo) for _ in range(2)]
        until(lambda: service.status().gpu_status.queue_length == 1)
        assert gate.reached.wait(60)
        told = estimate(client)
        gate.open()
        for each in edits:
            each.result()

    assert told["queue_length"] == 1
    assert told["must_load"] is False


async def test_whoever_asks_meanwhile_waits_for_the_same_look(make_service: MakeService) -> None:
    looks: list[None] = []
    gate = Gate()

    def take_survey() -> Survey:
        looks.append(None)
        gate(a_job(), 1)
        return SEEN

    service = make_service(take_survey=take_survey)
    request = service.read_picture({"prompt": "x"})
    asked = [asyncio.ensure_future(service.estimate(request)) for _ in range(3)]
    assert await asyncio.to_thread(gate.reached.wait, 60)
    gate.open()
    answers = await asyncio.gather(*asked)

    assert len(looks) == 1
    assert {answer.model for answer in answers} == {"Step1X-Edit v1.1"}


def test_what_one_server_has_found_out_the_next_one_and_the_list_of_models_use(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    looks: list[None] = []

    def look(*_: object) -> Survey:
        looks.append(None)
        return Survey(torch="2.13", device="cpu", checkpoint="demo", version="demo")

    monkeypatch.setattr("step1x_edit.engine.machine.inspect_machine", look)
    with calling(make_service()) as client:
        told = estimate(client)
    with calling(make_service()) as client:
        told_again = estimate(client)
    listed = CliRunner().invoke(models_app, ["list"]).stdout

    assert told["model"] == "demo"
    assert told_again == told
    assert listed.startswith("* demo")
    assert len(looks) == 1


def test_what_nobody_could_find_out_is_null_and_says_why(make_service: MakeService) -> None:
    slow = Survey(torch_error="no answer within 60 s")
    with calling(make_service(take_survey=lambda: slow)) as client:
        told = estimate(client)

    assert told["predicted_peak_gb"] is told["predicted_seconds"] is told["reason"] is None
    assert told["note"] == "no answer within 60 s"


def test_a_process_that_takes_too_long_is_given_up() -> None:
    assert inspect_machine(Start(device="cpu"), timeout_s=0.01) == Survey(
        torch_error="no answer within 0.01 s"
    )


@pytest.mark.parametrize(
    ("seen", "sentence"),
    [
        (
            replace(SEEN, checkpoint_error=f"Manager not initialized: nothing at {WEIGHTS}"),
            "Manager not initialized: nothing at MODEL_PATH",
        ),
        (
            replace(SEEN, device_error="invalid device ordinal"),
            "Manager not initialized: DEVICE cuda: invalid device ordinal",
        ),
    ],
)
def test_what_an_edit_would_be_told_is_told_now(
    make_service: MakeService, seen: Survey, sentence: str
) -> None:
    with calling(make_service(take_survey=lambda: seen, model_path=WEIGHTS)) as client:
        answer = client.post(ESTIMATE_PATH, json={"prompt": "x"})

    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "model_unavailable"
    assert answer.json()["error"]["message"] == sentence


@pytest.mark.parametrize(
    ("fields", "status", "sentence"),
    [
        ({"num_steps": 5}, 400, "num_steps must be between 10 and 50, got 5"),
        ({"n": 11}, 400, "n must be between 1 and 10, got 11"),
        ({"width": 640}, 400, "width and height must be given together"),
        ({"width": 0, "height": 9}, 400, "width must be between 1 and 100000, got 0"),
        ({"width": 64, "height": 6400}, 400, "the longer side may be at most 16 times"),
        ({"width": 90_000, "height": 90_000}, 413, "at most 50 megapixels are allowed"),
        ({"images": []}, 400, "images is not accepted here: give the picture's width and height"),
        ({"stps": 5}, 400, "'stps' is unknown"),
        ({"prompt": None}, 400, "prompt is missing"),
        ({"model": "v9"}, 404, "v9"),
    ],
)
def test_wrong_fields_are_told_as_the_edit_would_tell_them(
    make_service: MakeService, fields: dict[str, object], status: int, sentence: str
) -> None:
    with calling(make_service(take_survey=never)) as client:
        answer = client.post(ESTIMATE_PATH, json={"prompt": "x", **fields})

    assert answer.status_code == status
    assert sentence in answer.json()["error"]["message"]


def test_a_form_will_do_as_well_but_not_with_the_picture(
    make_service: MakeService, photo: Path
) -> None:
    fields = {"prompt": (None, "x"), "width": (None, "64"), "height": (None, "48")}
    with calling(make_service(take_survey=lambda: SEEN)) as client:
        told = client.post(ESTIMATE_PATH, files=fields).json()
        with_it = client.post(ESTIMATE_PATH, files={**fields, "image": photo.read_bytes()})
        bare = client.post(ESTIMATE_PATH, content=b"x", headers={"Content-Type": "text/plain"})

    assert (told["width"], told["height"]) == (1168, 880)
    assert with_it.status_code == 400
    assert "image is not accepted here" in with_it.json()["error"]["message"]
    assert bare.status_code == 415


def test_it_wants_the_key_and_counts_as_no_work(make_service: MakeService) -> None:
    service = make_service(take_survey=lambda: SEEN)
    with calling(service, rate_limit=1) as client:
        answers = [client.post(ESTIMATE_PATH, json={"prompt": "x"}) for _ in range(3)]
        stranger = client.post(
            ESTIMATE_PATH, json={"prompt": "x"}, headers={"Authorization": "Bearer wrong"}
        )

    assert [answer.status_code for answer in answers] == [200] * 3
    assert stranger.status_code == 401
