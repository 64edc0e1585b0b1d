"""Stored jobs over REST: accepted once durable, heard to their end, and there after a restart."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import sqlite3
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from starlette.requests import Request

from conftest import MakeService
from fakes import FakeWorker, Gate, canvas
from http_server import calling, until
from step1x_edit.channel import EditJob
from step1x_edit.errors import DeadlineExceededError, OutOfMemoryError, Step1XEditError
from step1x_edit.interfaces.http.idempotency import Runs
from step1x_edit.interfaces.http.jobs import job_routes
from step1x_edit.pictures.images import read_edit_record
from step1x_edit.schemas.answers import JobAnswer, JobsAnswer
from step1x_edit.service.job_store import DATABASE_NAME, JobStore

UNKNOWN = "0" * 44


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def create(
    client: httpx2.Client,
    photo: Path,
    prompt: str = "x",
    mask: bytes | None = None,
    **fields: str,
) -> dict[str, Any]:
    """Have a job accepted."""
    files = {"file": (photo.name, photo.read_bytes())}
    if mask is not None:
        files["mask"] = ("mask.png", mask)
    answer = client.post(
        "/v1/jobs",
        files=files,
        data={"prompt": prompt, "num_steps": "10", **fields},
    )
    assert answer.status_code == 202
    told: dict[str, Any] = answer.json()
    JobAnswer.model_validate(told)
    assert answer.headers["location"] == f"/v1/jobs/{told['id']}"
    return told


def a_mask(size: tuple[int, int]) -> bytes:
    """A mask that lets the right half of a picture change."""
    image = Image.new("L", size, 0)
    image.paste(255, (size[0] // 2, 0, *size))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def events_in(text: str) -> list[tuple[int, dict[str, Any]]]:
    """The events of a stream, as a browser reads them."""
    found = []
    for block in re.sub(r"(?m)^:.*\n\n?", "", text).split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        assert fields.keys() == {"id", "data"}
        found.append((int(fields["id"]), json.loads(fields["data"])))
    return found


def ended(client: httpx2.Client, job_id: str) -> dict[str, Any]:
    """The job once its end has been heard."""
    client.get(f"/v1/jobs/{job_id}/events").raise_for_status()
    told: dict[str, Any] = client.get(f"/v1/jobs/{job_id}").json()
    JobAnswer.model_validate(told)
    return told


def code_of(answer: httpx2.Response) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.json()["code"]


def stored(data_dir: Path) -> set[str]:
    return {folder.name for folder in (data_dir / "jobs").iterdir()}


# --- the life of a job ----------------------------------------------------------------------------


def test_a_job_is_accepted_done_and_fetched(make_service: MakeService, photo: Path) -> None:
    with calling(make_service()) as client:
        accepted = create(client, photo, "invert 戴红帽子", guidance_scale="4.5", seed="7")
        heard = client.get(f"/v1/jobs/{accepted['id']}/events")
        job = client.get(f"/v1/jobs/{accepted['id']}").json()
        picture = client.get(f"/v1/jobs/{accepted['id']}/content")
        direct = client.post(
            "/api/edit",
            files={"file": photo.read_bytes()},
            data={
                "prompt": "invert 戴红帽子",
                "num_steps": "10",
                "guidance_scale": "4.5",
                "seed": "7",
            },
        )

    assert (accepted["status"], accepted["position"]) == ("queued", 1)
    assert accepted["request"]["size_level"] == 1024
    assert heard.headers["content-type"].startswith("text/event-stream")
    events = events_in(heard.text)
    assert [number for number, _ in events] == list(range(1, len(events) + 1))
    statuses = [event["status"] for _, event in events]
    assert statuses == ["queued", *["running"] * (len(events) - 2), "succeeded"]
    assert job["status"] == "succeeded"
    assert job["metadata"]["seed"] == 7
    assert job["processing_time"] >= 0
    assert job["created_at"] <= job["started_at"] <= job["finished_at"]
    assert job["request"] == accepted["request"]
    assert "error" not in job
    assert picture.headers["content-type"] == "image/png"
    assert picture.headers["cache-control"] == "no-store"
    assert np.array_equal(pixels_of(picture.content), 255 - pixels_of(photo.read_bytes()))
    assert picture.content == direct.content
    record = read_edit_record(picture.content)
    assert record is not None
    assert record.prompt == "invert 戴红帽子"


def test_a_job_keeps_to_its_mask(make_service: MakeService, photo: Path) -> None:
    mask = a_mask((64, 48))
    with calling(make_service()) as client:
        told = create(client, photo, seed="7", mask=mask)
        job = ended(client, told["id"])
        picture = client.get(f"/v1/jobs/{job['id']}/content").content
        direct = client.post(
            "/api/edit",
            files={"file": photo.read_bytes(), "mask": mask},
            data={"prompt": "x", "num_steps": "10", "seed": "7"},
        )

    assert job["metadata"]["changed_share"] == 0.5
    assert picture == direct.content
    assert np.array_equal(pixels_of(picture)[:, :32], pixels_of(photo.read_bytes())[:, :32])


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OutOfMemoryError("use a smaller size_level"), "failed"),
        (DeadlineExceededError("it took too long"), "expired"),
    ],
)
def test_a_job_that_fails_says_why_as_every_other_door(
    make_service: MakeService, photo: Path, error: Step1XEditError, status: str
) -> None:
    def fail(job: EditJob, step: int) -> None:
        raise error

    with calling(make_service(FakeWorker(before_step=fail))) as client:
        job_id = create(client, photo)["id"]
        job = ended(client, job_id)
        picture = client.get(f"/v1/jobs/{job_id}/content")

    assert (job["status"], job["code"], job["error"]) == (status, error.code, str(error))
    assert code_of(picture) == (409, "job_conflict")


@pytest.mark.parametrize(
    ("fields", "status", "detail"),
    [
        ({"num_steps": "5"}, 422, "Invalid parameter: num_steps must be between 10 and 50"),
        ({"setps": "10"}, 422, "Invalid parameter: 'setps' is unknown"),
        ({"prompt": ""}, None, ""),  # the only good one
        ({"prompt": None}, 422, "Invalid parameter: prompt is missing"),
        ({"file": None}, 422, "Invalid parameter: file is missing"),
        ({"file": b"no picture"}, 415, "Unsupported image format: the file is none of PNG"),
        ({"file": b"+" * (2**20 + 1)}, 413, "Image too large: at most 1 MB are allowed"),
        ({"mask": a_mask((64, 64))}, 422, "Invalid parameter: mask is 64×64 pixels, the picture"),
        ({"mask": b"no picture"}, 415, "Unsupported image format: mask: the file is none of PNG"),
        ({"mask": "mask.png"}, 422, "Invalid parameter: mask must be an uploaded file"),
    ],
)
def test_a_form_that_is_refused_says_why_and_leaves_nothing(
    make_service: MakeService,
    photo: Path,
    tmp_path: Path,
    fields: dict[str, Any],
    status: int | None,
    detail: str,
) -> None:
    given = {"prompt": "x", "file": photo.read_bytes(), **fields}
    parts = {
        name: ("a.png", value) if isinstance(value, bytes) else (None, value)
        for name, value in given.items()
        if value is not None
    }
    limits: dict[str, object] = {"max_upload_mb": 1}
    data_dir = tmp_path / "data"
    with calling(make_service(**limits), data_dir=data_dir, **limits) as client:
        answer = client.post("/v1/jobs", files=parts)
        listed = client.get("/v1/jobs").json()["data"]
        left = stored(data_dir)

    if status is None:
        assert answer.status_code == 202
        assert [job["id"] for job in listed] == list(left) == [answer.json()["id"]]
    else:
        assert answer.status_code == status
        assert answer.json()["detail"].startswith(detail)
        assert listed == []
        assert left == set()


def test_a_job_that_is_asked_for_again_with_the_same_key_is_accepted_once(
    make_service: MakeService, photo: Path
) -> None:
    key = {"Idempotency-Key": "one"}
    with calling(make_service(FakeWorker(can_generate=True))) as client:

        def ask(prompt: str) -> httpx2.Response:
            file = {"file": photo.read_bytes()}
            return client.post("/v1/jobs", files=file, data={"prompt": prompt}, headers=key)

        first, again, other = ask("x"), ask("x"), ask("y")
        words = [client.post("/v1/jobs", json={"prompt": "x"}, headers=key) for _ in range(2)]
        listed = client.get("/v1/jobs").json()

    assert [first.status_code, again.status_code] == [202, 202]
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["location"] == first.headers["location"]
    assert [answer.headers.get("idempotent-replayed") for answer in (first, again)] == [
        None,
        "true",
    ]
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_key")
    assert [answer.status_code for answer in words] == [409, 409]  # the key belongs to the form
    assert [job["id"] for job in listed["data"]] == [first.json()["id"]]


def test_a_full_queue_says_when_to_come_back(make_service: MakeService, photo: Path) -> None:
    gate = Gate()
    with calling(make_service(FakeWorker(before_step=gate)), max_queue=1) as client:
        create(client, photo)
        assert gate.reached.wait(60)
        create(client, photo)
        # It is refused before its form is looked at: no such form would be taken.
        refused = client.post("/v1/jobs", content=b"x" * 1000)
        gate.open()

    assert code_of(refused) == (503, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1


def test_old_jobs_give_way_where_there_is_no_more_room(
    make_service: MakeService, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)  # 0.4 MB, twice
    path = tmp_path / "noise.png"
    Image.fromarray(noise).save(path)
    with calling(make_service(), jobs_max_mb=1) as client:
        first = ended(client, create(client, path)["id"])
        second = ended(client, create(client, path)["id"])
        statuses = [client.get(f"/v1/jobs/{job['id']}").status_code for job in (first, second)]

    assert (first["status"], second["status"]) == ("succeeded", "succeeded")
    assert statuses == [404, 200]


def test_jobs_are_forgotten_when_they_are_old(
    make_service: MakeService, photo: Path, tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    with calling(make_service(), data_dir=data_dir) as client:
        job = ended(client, create(client, photo)["id"])
    with contextlib.closing(sqlite3.connect(data_dir / DATABASE_NAME)) as database, database:
        database.execute("UPDATE jobs SET finished_at = finished_at - 100")
    with calling(make_service(), data_dir=data_dir, jobs_max_age=200) as client:
        still = client.get(f"/v1/jobs/{job['id']}").status_code
    with calling(make_service(), data_dir=data_dir, jobs_max_age=100) as client:
        gone = client.get(f"/v1/jobs/{job['id']}").status_code

    assert (still, gone) == (200, 404)
    assert stored(data_dir) == set()


# --- events ---------------------------------------------------------------------------------------


def test_who_was_cut_off_hears_the_rest_and_who_has_heard_all_is_told_so(
    make_service: MakeService, photo: Path
) -> None:
    with calling(make_service()) as client:
        path = f"/v1/jobs/{create(client, photo)['id']}/events"
        whole = events_in(client.get(path).text)
        rest = events_in(client.get(path, headers={"Last-Event-ID": "2"}).text)
        over = client.get(path, headers={"Last-Event-ID": str(len(whole))})
        wrong = client.get(path, headers={"Last-Event-ID": "two"})

    assert rest == whole[2:]
    assert (over.status_code, over.content) == (204, b"")
    assert code_of(wrong) == (422, "invalid_parameter")
    assert wrong.json()["detail"] == (
        "Invalid parameter: Last-Event-ID must be the number of an event"
    )


def test_an_event_counts_only_where_there_is_something_to_count(
    make_service: MakeService, photo: Path
) -> None:
    gate = Gate()
    service = make_service(FakeWorker(before_step=gate))
    with calling(service) as client:
        with ThreadPoolExecutor(1) as pool:  # an edit that is in front of the job
            form: dict[str, Any] = {
                "files": {"file": photo.read_bytes()},
                "data": {"prompt": "first"},
            }
            edit = pool.submit(client.post, "/api/edit", **form)
            assert gate.reached.wait(60)
            job = create(client, photo)["id"]
            until(lambda: service.status().gpu_status.queue_length == 1)
            gate.open()
            assert edit.result(60).status_code == 200
        events = events_in(client.get(f"/v1/jobs/{job}/events").text)

    told = [event["progress"] for _, event in events if "progress" in event]
    found = {progress["phase"]: progress for progress in told}
    assert found["queued"] == {"phase": "queued", "position": 1}
    assert found["encoding"] == {"phase": "encoding"}
    assert found["denoising"].keys() == {"phase", "step", "total"}
    assert found["denoising"]["total"] == 10


def test_events_come_while_the_job_runs(make_service: MakeService, photo: Path) -> None:
    gate = Gate()
    with calling(make_service(FakeWorker(before_step=gate))) as client:
        path = f"/v1/jobs/{create(client, photo)['id']}/events"
        with client.stream("GET", path) as stream:
            heard = ""
            for line in stream.iter_lines():
                heard += f"{line}\n"
                if '"encoding"' in line:
                    gate.open()
                    break
        rest = client.get(path, headers={"Last-Event-ID": "1"})

    assert '"queued"' in heard
    assert '"succeeded"' not in heard
    assert events_in(rest.text)[-1][1]["status"] == "succeeded"


async def test_silence_is_filled_with_comments(
    make_service: MakeService, photo: Path, tmp_path: Path
) -> None:
    async with JobStore(tmp_path / "data") as store:
        job = await store.create(photo.read_bytes(), {"prompt": "x"})
        closing = asyncio.Event()
        routes = job_routes(make_service(), store, Runs(), closing, keep_alive_s=0.001).routes
        (events,) = [route for route in routes if route.name == "events"]  # type: ignore
        scope = {"type": "http", "headers": [], "path_params": {"job_id": job.id}}
        answer = await events.endpoint(Request(scope))  # type: ignore
        pieces: AsyncIterator[str] = aiter(answer.body_iterator)
        while (first := await anext(pieces)).startswith(":"):
            pass
        silences = [await anext(pieces) for _ in range(3)]
        await store.cancel(job.id)
        later = [piece async for piece in pieces]

    assert first.startswith("id: 1\ndata: {")
    assert silences == [": still there\n\n"] * 3
    assert [number for number, _ in events_in("".join(later))] == [2]


# --- cancelling and forgetting --------------------------------------------------------------------


def test_jobs_are_cancelled_whether_they_wait_or_run(
    make_service: MakeService, photo: Path
) -> None:
    gate, worker = Gate(at_step=2), FakeWorker()
    worker.before_step = gate
    service = make_service(worker)
    with calling(service) as client:
        running_, waiting = create(client, photo, "running"), create(client, photo, "waiting")
        assert gate.reached.wait(60)
        kept = client.delete(f"/v1/jobs/{running_['id']}")
        cancelled = [
            client.post(f"/v1/jobs/{job['id']}/cancel").json() for job in (waiting, running_)
        ]
        again = client.post(f"/v1/jobs/{running_['id']}/cancel").json()
        until(lambda: service.outcomes.get("cancelled") == 1)
        gate.open()
        last = create(client, photo, "last")
        end = ended(client, last["id"])
        content = client.get(f"/v1/jobs/{running_['id']}/content")

    assert code_of(kept) == (409, "job_conflict")
    assert [job["status"] for job in cancelled] == ["cancelled", "cancelled"]
    assert [job["code"] for job in cancelled] == ["cancelled", "cancelled"]
    assert again == cancelled[1]
    assert end["status"] == "succeeded"
    assert code_of(content) == (409, "job_conflict")
    assert worker.started == ["running", "last"]
    assert worker.stopped_at == {"running": 2}


def test_a_deleted_job_is_gone_with_its_files(
    make_service: MakeService, photo: Path, tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    with calling(make_service(), data_dir=data_dir) as client:
        job_id = create(client, photo)["id"]
        ended(client, job_id)
        before = stored(data_dir)
        deleted = client.delete(f"/v1/jobs/{job_id}")
        after = stored(data_dir)
        again = client.delete(f"/v1/jobs/{job_id}")
        listed = client.get("/v1/jobs").json()

    assert (before, after) == ({job_id}, set())
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert code_of(again) == (404, "not_found")
    assert listed["data"] == []


@pytest.mark.parametrize("job_id", [UNKNOWN, "x", "%00", "戴"])
def test_who_names_a_wrong_id_finds_nothing(make_service: MakeService, job_id: str) -> None:
    with calling(make_service()) as client:
        answers = [
            client.request(method, f"/v1/jobs/{job_id}{rest}")
            for method, rest in (
                ("GET", ""),
                ("GET", "/events"),
                ("GET", "/content"),
                ("POST", "/cancel"),
                ("DELETE", ""),
            )
        ]
        figures = client.get("/metrics").text

    assert [code_of(answer) for answer in answers] == [(404, "not_found")] * 5
    assert all(answer.json()["title"] == "Job not found" for answer in answers)
    assert 'http_requests_total{path="/v1/jobs/{job_id}",status="404"} 2.0' in figures
    assert f"/v1/jobs/{job_id}" not in figures


# --- listing --------------------------------------------------------------------------------------


def test_jobs_are_listed_newest_first_page_by_page(make_service: MakeService, photo: Path) -> None:
    with calling(make_service()) as client:
        ids = [create(client, photo)["id"] for _ in range(3)]
        for job_id in ids:
            ended(client, job_id)
        first = client.get("/v1/jobs", params={"limit": "2"}).json()
        rest = client.get("/v1/jobs", params={"after": first["last_id"]}).json()

    JobsAnswer.model_validate(first)
    assert [job["id"] for job in first["data"]] == [ids[2], ids[1]]
    assert (first["has_more"], first["first_id"], first["last_id"]) == (True, ids[2], ids[1])
    assert [job["id"] for job in rest["data"]] == [ids[0]]
    assert rest["has_more"] is False


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ("limit=0", "limit must be between 1 and 100, got 0"),
        ("limit=many", "limit must be a whole number between 1 and 100, got 'many'"),
        ("limits=5", "'limits' is unknown, did you mean limit?"),
        ("after=x", "after must be the id of a job, got 'x'"),
        ("limit=1&limit=2", "'limit' is given twice"),
    ],
)
def test_what_is_wrong_with_a_list_is_said_by_name(
    make_service: MakeService, query: str, detail: str
) -> None:
    with calling(make_service()) as client:
        answer = client.get(f"/v1/jobs?{query}")

    assert code_of(answer) == (422, "invalid_parameter")
    assert answer.json()["detail"] == f"Invalid parameter: {detail}"


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_text", ["{", '{"a": 1}'])
def test_a_damaged_job_is_left_out_of_the_list_and_named_in_the_log(
    make_service: MakeService,
    photo: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    request_text: str,
) -> None:
    data_dir, gate = tmp_path / "data", Gate()
    with calling(make_service(FakeWorker(before_step=gate)), data_dir=data_dir) as client:
        first, broken, last = (create(client, photo, prompt)["id"] for prompt in "abc")
    gate.open()
    with contextlib.closing(sqlite3.connect(data_dir / DATABASE_NAME)) as connection:
        connection.execute("UPDATE jobs SET request = ? WHERE id = ?", (request_text, broken))
        connection.commit()
    with calling(make_service(), data_dir=data_dir) as client:
        whole = [ended(client, job_id)["status"] for job_id in (first, last)]
        listed = client.get("/v1/jobs").json()
        pages = [client.get("/v1/jobs?limit=1").json()]
        while pages[-1]["has_more"]:
            after = pages[-1]["last_id"]
            pages.append(client.get(f"/v1/jobs?limit=1&after={after}").json())
        asked = [client.get(f"/v1/jobs/{broken}"), client.post(f"/v1/jobs/{broken}/cancel")]

    assert whole == ["succeeded", "succeeded"]
    assert [job["id"] for job in listed["data"]] == [last, first]
    assert [job["id"] for page in pages for job in page["data"]] == [last, first]
    assert [code_of(answer) for answer in asked] == [(404, "not_found")] * 2
    assert f"the stored job {broken} " in caplog.text
    assert "Traceback" not in caplog.text


# --- starting again -------------------------------------------------------------------------------


def test_after_a_restart_ended_jobs_are_there_and_the_others_run(
    make_service: MakeService, photo: Path, tmp_path: Path
) -> None:
    data_dir, gate = tmp_path / "data", Gate()

    def hold(job: EditJob, step: int) -> None:
        if job.prompt == "held":
            gate(job, step)

    again = FakeWorker()
    with calling(make_service(FakeWorker(before_step=hold)), data_dir=data_dir) as client:
        done = ended(client, create(client, photo, "done")["id"])
        picture = client.get(f"/v1/jobs/{done['id']}/content").content
        held, waiting = create(client, photo, "held"), create(client, photo, "waiting")
        assert gate.reached.wait(60)
    with calling(make_service(again), data_dir=data_dir) as client:
        found = client.get(f"/v1/jobs/{done['id']}").json()
        same = client.get(f"/v1/jobs/{done['id']}/content").content
        finished = [ended(client, job["id"]) for job in (held, waiting)]
        results = [client.get(f"/v1/jobs/{job['id']}/content").content for job in (held, waiting)]
        heard = events_in(client.get(f"/v1/jobs/{held['id']}/events").text)
    gate.open()

    assert (found, same) == (done, picture)
    assert again.started == ["held", "waiting"]
    assert [job["status"] for job in finished] == ["succeeded", "succeeded"]
    for result in results:
        assert np.array_equal(pixels_of(result), 255 - pixels_of(photo.read_bytes()))
    states = [event["status"] for _, event in heard if "progress" not in event]
    assert states == ["queued", "running", "queued", "running", "succeeded"]


def test_a_job_that_is_to_reason_does_so_after_a_restart_too(
    make_service: MakeService, photo: Path, tmp_path: Path
) -> None:
    data_dir, gate = tmp_path / "data", Gate()
    asked: dict[str, Any] = {"thinking": "true", "reflection": "true", "reflection_rounds": "2"}
    holding = FakeWorker(before_step=gate, model="v1.2")
    with calling(make_service(holding), data_dir=data_dir) as client:
        accepted = create(client, photo, **asked)
        waiting = create(client, photo, "after it", **asked)
        assert gate.reached.wait(60)
    with calling(make_service(FakeWorker(model="v1.2")), data_dir=data_dir) as client:
        job = ended(client, accepted["id"])
        ended(client, waiting["id"])
        heard = events_in(client.get(f"/v1/jobs/{accepted['id']}/events").text)
        picture = client.get(f"/v1/jobs/{accepted['id']}/content").content
    with calling(make_service(), data_dir=data_dir) as client:
        kept = client.get(f"/v1/jobs/{accepted['id']}").json()
        refused = ended(client, create(client, photo, **asked)["id"])
    gate.open()

    assert (job["request"]["thinking"], job["request"]["reflection"]) == (True, True)
    assert job["request"]["reflection_rounds"] == 2
    assert kept == job
    assert job["metadata"]["reasoning"]["prompt"] == "x, and nothing else"
    assert [one["score"] for one in job["metadata"]["reasoning"]["rounds"]] == [6.5, 9.0]
    phases = {event["progress"]["phase"] for _, event in heard if "progress" in event}
    assert {"thinking", "reflecting"} <= phases
    record = read_edit_record(picture)
    assert record is not None
    assert record.rewritten_prompt == "x, and nothing else"
    assert record.reflection_rounds == 2
    assert (refused["status"], refused["code"]) == ("failed", "invalid_parameter")
    assert "thinking needs Step1X-Edit v1.2" in refused["error"]


@pytest.mark.parametrize("given", [{}, {"seed": "-1"}])
def test_a_job_that_is_run_again_after_a_restart_makes_the_same_picture(
    make_service: MakeService, photo: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    seeds: list[int] = []
    gate = Gate()

    def hold(job: EditJob, step: int) -> None:
        seeds.append(job.seed)
        gate(job, step)

    def painted(job: EditJob) -> np.ndarray:
        shape = canvas(job).shape
        return np.random.default_rng(job.seed).integers(0, 256, shape, dtype=np.uint8)

    data_dir, again = tmp_path / "data", FakeWorker(paint=painted)
    with calling(make_service(FakeWorker(before_step=hold)), data_dir=data_dir) as client:
        first = create(client, photo, mask=a_mask((64, 48)), **given)
        other = create(client, photo, **given)
        assert gate.reached.wait(60)
    with calling(make_service(again), data_dir=data_dir) as client:
        job = ended(client, first["id"])
        picture = client.get(f"/v1/jobs/{first['id']}/content").content
        direct = client.post(
            "/api/edit",
            files={"file": photo.read_bytes(), "mask": a_mask((64, 48))},
            data={"prompt": "x", "num_steps": "10", "seed": str(first["request"]["seed"])},
        )
    gate.open()

    assert seeds == [first["request"]["seed"]]
    assert job["metadata"]["seed"] == first["request"]["seed"]
    assert picture == direct.content
    assert first["request"]["seed"] != other["request"]["seed"]


def test_without_the_api_there_are_no_jobs_and_nothing_is_stored(
    make_service: MakeService, tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    doors = {"enable_api": False, "enable_ui": False}  # the page keeps separate files
    with calling(make_service(), data_dir=data_dir, **doors) as client:
        answer = client.get("/v1/jobs")

    assert code_of(answer) == (404, "not_found")
    assert not data_dir.exists()
