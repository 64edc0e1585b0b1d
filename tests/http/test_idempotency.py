"""What is asked for again is not done again: counted by the edits that the worker began."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from conftest import MakeService
from fakes import FakeWorker, Gate
from http_server import TOKEN, calling, serving, until
from step1x_edit.channel import EditJob
from step1x_edit.errors import EditCancelledError, IdempotencyKeyError, OutOfMemoryError
from step1x_edit.interfaces.http.idempotency import Identity, Run, Runs, digest_of
from step1x_edit.interfaces.http.shelf import Shelf
from step1x_edit.interfaces.pursuits import Notify

EDIT = "/api/edit"
OPENAI = "/v1/images/edits"
FILE_OF = {EDIT: "file", OPENAI: "image"}

at_both_doors = pytest.mark.parametrize("path", [EDIT, OPENAI])


def form(path: str, photo: Path, **fields: str) -> dict[str, Any]:
    return {
        "files": {FILE_OF[path]: (photo.name, photo.read_bytes())},
        "data": {"prompt": "x", **fields},
    }


def picture(answer: httpx2.Response) -> bytes:
    assert answer.status_code == 200, answer.text
    if answer.headers["content-type"] == "application/json":
        return base64.b64decode(answer.json()["data"][0]["b64_json"])
    return answer.content


def is_replayed(answer: httpx2.Response) -> bool:
    return answer.headers.get("idempotent-replayed") == "true"


KEY = {"Idempotency-Key": "one"}
FIRST = {"X-Stainless-Retry-Count": "0"}
AGAIN = {"X-Stainless-Retry-Count": "1"}


@pytest.fixture
def client(make_service: MakeService, worker: FakeWorker) -> Iterator[httpx2.Client]:
    """A client of a server that edits with `worker`."""
    with calling(make_service(worker)) as client:
        yield client


# --- after the end --------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(KEY, KEY), (FIRST, AGAIN), (AGAIN, AGAIN)])
@at_both_doors
def test_what_has_been_done_is_answered_again(
    client: httpx2.Client,
    worker: FakeWorker,
    photo: Path,
    path: str,
    first: dict[str, str],
    second: dict[str, str],
) -> None:
    answers = [
        client.post(path, headers=headers, **form(path, photo)) for headers in (first, second)
    ]

    assert picture(answers[0]) == picture(answers[1])  # although each would draw a seed
    assert [is_replayed(answer) for answer in answers] == [False, True]
    assert len(worker.started) == 1


@pytest.mark.parametrize(
    ("first", "second"), [({}, {}), (FIRST, FIRST), (KEY, {}), (KEY, {"Idempotency-Key": "two"})]
)
@at_both_doors
def test_what_is_asked_for_anew_is_done_anew(
    client: httpx2.Client,
    worker: FakeWorker,
    photo: Path,
    path: str,
    first: dict[str, str],
    second: dict[str, str],
) -> None:
    answers = [
        client.post(path, headers=headers, **form(path, photo)) for headers in (first, second)
    ]

    assert picture(answers[0]) != picture(answers[1])
    assert not any(is_replayed(answer) for answer in answers)
    assert len(worker.started) == 2


@pytest.mark.parametrize("changes", [{"prompt": "y"}, {"seed": "7"}])
@at_both_doors
def test_a_retry_of_another_request_is_a_request_of_its_own(
    client: httpx2.Client, worker: FakeWorker, photo: Path, path: str, changes: dict[str, str]
) -> None:
    client.post(path, headers=FIRST, **form(path, photo))
    other = client.post(path, headers=AGAIN, **form(path, photo, **changes))

    assert not is_replayed(other)
    assert len(worker.started) == 2


@pytest.mark.parametrize("changes", [{"prompt": "y"}, {"seed": "7"}, {"size_level": "512"}])
@at_both_doors
def test_a_key_belongs_to_one_request(
    client: httpx2.Client, worker: FakeWorker, photo: Path, path: str, changes: dict[str, str]
) -> None:
    client.post(path, headers=KEY, **form(path, photo))
    other = client.post(path, headers=KEY, **form(path, photo, **changes))

    assert other.status_code == 409
    assert "Idempotency-Key in use: it came with another request before" in other.text
    assert len(worker.started) == 1


@at_both_doors
def test_a_key_belongs_to_one_picture(
    client: httpx2.Client, worker: FakeWorker, photo: Path, path: str
) -> None:
    client.post(path, headers=KEY, **form(path, photo))
    parts = form(path, photo)
    parts["files"]["mask"] = ("mask.png", photo.read_bytes())
    masked = client.post(path, headers=KEY, **parts)

    assert masked.status_code == 409
    assert len(worker.started) == 1


@pytest.mark.parametrize("keys", [[""], ["x" * 256], ["a b"], ["a", "b"]])
@at_both_doors
def test_an_unusable_key_is_refused(
    client: httpx2.Client, worker: FakeWorker, photo: Path, path: str, keys: list[str]
) -> None:
    headers = [("Idempotency-Key", key) for key in keys]
    answer = client.post(path, headers=headers, **form(path, photo))

    assert answer.status_code == (400 if path == OPENAI else 422)
    assert "Invalid parameter: Idempotency-Key must be 1 to 255" in answer.text
    assert worker.started == []


@at_both_doors
def test_what_has_failed_is_tried_again(make_service: MakeService, photo: Path, path: str) -> None:
    worker = FakeWorker()

    def fail_once(job: EditJob, step: int) -> None:
        if len(worker.started) == 1:
            raise OutOfMemoryError("use a smaller size_level")

    worker.before_step = fail_once
    with calling(make_service(worker)) as client:
        failed = client.post(path, headers=KEY, **form(path, photo))
        second = client.post(path, headers=KEY, **form(path, photo))

    assert failed.status_code == 503
    assert second.status_code == 200
    assert len(worker.started) == 2


# --- while it runs --------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(KEY, KEY), (FIRST, AGAIN)])
@at_both_doors
def test_a_second_request_waits_with_the_first_even_if_the_queue_is_full(
    make_service: MakeService,
    photo: Path,
    path: str,
    first: dict[str, str],
    second: dict[str, str],
) -> None:
    gate = Gate()
    worker = FakeWorker(before_step=gate)
    service = make_service(worker, max_queue=1)
    with calling(service) as client, ThreadPoolExecutor() as pool:

        def ask(headers: dict[str, str], **fields: str) -> Future[httpx2.Response]:
            return pool.submit(client.post, path, headers=headers, **form(path, photo, **fields))

        asked = [ask(first)]
        assert gate.reached.wait(60)
        other = ask({}, prompt="other")
        until(lambda: service.status().gpu_status.queue_length == 1)
        asked.append(ask(second))
        gate.open()
        answers = [each.result(60) for each in asked]
        other.result(60)

    assert picture(answers[0]) == picture(answers[1])
    assert sorted(worker.started) == ["other", "x"]


@pytest.mark.parametrize(("first", "second"), [(KEY, KEY), (FIRST, AGAIN)])
@at_both_doors
def test_an_edit_whose_caller_has_left_is_found_again(
    make_service: MakeService,
    photo: Path,
    path: str,
    first: dict[str, str],
    second: dict[str, str],
) -> None:
    gate = Gate(at_step=2)
    worker = FakeWorker(before_step=gate)
    service = make_service(worker)
    with calling(service) as client, ThreadPoolExecutor() as pool:
        with pytest.raises(httpx2.ReadTimeout):
            client.post(path, headers=first, timeout=1, **form(path, photo))
        assert gate.reached.wait(60)
        asked = pool.submit(client.post, path, headers=second, **form(path, photo))
        gate.open()
        answer = asked.result(60)

    assert picture(answer)
    assert is_replayed(answer)
    assert len(worker.started) == 1
    assert service.outcomes == {"success": 1}


@at_both_doors
def test_one_of_two_who_wait_may_leave(make_service: MakeService, photo: Path, path: str) -> None:
    gate = Gate(at_step=2)
    worker = FakeWorker(before_step=gate)
    with calling(make_service(worker)) as client, ThreadPoolExecutor() as pool:
        asked = pool.submit(client.post, path, headers=KEY, **form(path, photo))
        assert gate.reached.wait(60)
        with pytest.raises(httpx2.ReadTimeout):
            client.post(path, headers=KEY, timeout=1, **form(path, photo))
        gate.open()
        answer = asked.result(60)

    assert picture(answer)
    assert len(worker.started) == 1


# --- OpenAI's client ------------------------------------------------------------------------------


def test_their_client_that_gives_up_waiting_and_tries_again_costs_one_edit(
    make_service: MakeService, photo: Path
) -> None:
    gate = Gate(at_step=2)
    worker = FakeWorker(before_step=gate)
    service = make_service(worker)
    counts: list[str] = []

    def note(request: httpx2.Request) -> None:
        counts.append(request.headers["x-stainless-retry-count"])
        if len(counts) == 2:
            gate.open()

    with serving(service) as url:
        http = httpx2.Client(trust_env=False, event_hooks={"request": [note]})
        with openai.OpenAI(
            base_url=f"{url}/v1", api_key=TOKEN, timeout=2.0, max_retries=9, http_client=http
        ) as client:
            answer = client.images.edit(image=photo, prompt="x")

    assert answer.data is not None
    assert answer.data[0].b64_json
    assert counts[:2] == ["0", "1"]
    assert worker.started == ["x"]
    assert service.outcomes == {"success": 1}


def test_a_stream_is_told_again_from_its_beginning(make_service: MakeService, photo: Path) -> None:
    seen = threading.Semaphore(0)

    def step_by_step(job: EditJob, step: int) -> None:
        if step - 1 in job.preview_steps:
            assert seen.acquire(timeout=240)

    worker = FakeWorker(before_step=step_by_step)
    with (
        serving(make_service(worker)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0) as client,
    ):
        told: list[list[Any]] = []
        for _ in range(2):
            stream = client.images.edit(
                image=photo, prompt="x", stream=True, partial_images=2, extra_headers=KEY
            )
            told.append([])
            for event in stream:
                told[-1].append(event)
                seen.release()

    assert told[0] == told[1]
    assert [event.type.rpartition(".")[2] for event in told[0]] == [
        "partial_image",
        "partial_image",
        "completed",
    ]
    assert worker.started == ["x"]


# --- the parts ------------------------------------------------------------------------------------


def test_a_shelf_keeps_to_its_bounds() -> None:
    now = 0.0
    shelf: Shelf[str] = Shelf(10, 100, at_least=2, at_most=4, now=lambda: now)
    for name in "abcde":
        shelf.put(name, name, 10)
    by_count = [shelf.get(name) for name in "abcde"]
    shelf.put("f", "f", 500)
    by_bytes = [shelf.get(name) for name in "def"]
    shelf.put("e", "E", 1)
    replaced = shelf.get("e")
    now = 10.0
    by_age = [shelf.get(name) for name in "ef"]
    shelf.put("g", "g", 60)
    shelf.put("h", "h", 40)

    assert by_count == [None, "b", "c", "d", "e"]
    assert by_bytes == [None, "e", "f"]
    assert replaced == "E"
    assert by_age == [None, None]
    assert [shelf.get("g"), shelf.get("h")] == ["g", "h"]


def test_a_digest_is_of_the_fields_and_not_of_their_order() -> None:
    one = digest_of([("a", b"1"), ("b", b"2")])

    assert one == digest_of([("b", b"2"), ("a", b"1")])
    assert len({one, digest_of([("a", b"12")]), digest_of([("a", b"1"), ("b2", b"")])}) == 3


class Waiting:
    """Work that ends when the test says so; knows how often it was begun and cancelled."""

    def __init__(self) -> None:
        self.begun = self.cancelled = 0
        self.end = asyncio.Event()

    async def __call__(self, notify: Notify[str]) -> str:
        self.begun += 1
        await notify("begun")
        try:
            await self.end.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return "done"


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_work_that_nobody_waits_for_ends_when_its_grace_is_over() -> None:
    work, runs = Waiting(), Runs(grace_s=0.01)
    identity = Identity("name", "digest", is_retry=True)
    run, _ = runs.find(identity, work, len)
    with run.heard():
        await settled()
    with run.heard():  # came back in time
        later = asyncio.Event()
        asyncio.get_running_loop().call_later(0.02, later.set)
        await later.wait()
        assert work.cancelled == 0
    with pytest.raises(EditCancelledError):
        await run.result()
    again, was_there = runs.find(identity, work, len)
    work.end.set()

    assert work.cancelled == 1
    assert (await again.result(), was_there, work.begun) == ("done", False, 2)


async def test_work_without_a_name_ends_at_once() -> None:
    work = Waiting()
    run, _ = Runs().find(None, work, len)
    with run.heard():
        await settled()
    await settled()

    assert work.cancelled == 1


async def test_a_key_of_running_work_belongs_to_it() -> None:
    work, runs = Waiting(), Runs()
    runs.find(Identity("name", "digest", is_retry=True), work, len)

    with pytest.raises(IdempotencyKeyError):
        runs.find(Identity("name", "another", is_retry=True), work, len)
    work.end.set()


async def test_a_new_request_takes_the_place_of_the_older() -> None:
    first, second, runs = Waiting(), Waiting(), Runs()
    older, _ = runs.find(Identity("name", "digest", is_retry=False), first, len)
    newer, _ = runs.find(Identity("name", "digest", is_retry=False), second, len)
    second.end.set()
    await newer.result()
    first.end.set()
    await older.result()
    found, was_there = runs.find(Identity("name", "digest", is_retry=True), second, len)

    assert was_there
    assert found is newer


async def test_outcomes_are_kept_for_a_while_only() -> None:
    work, runs = Waiting(), Runs(kept_s=0.0)
    identity = Identity("name", "digest", is_retry=True)
    work.end.set()
    run, _ = runs.find(identity, work, len)
    await run.result()
    await settled()
    _, was_there = runs.find(identity, work, len)

    assert not was_there


async def test_events_are_told_to_everybody_from_the_beginning() -> None:
    go = asyncio.Event()

    async def work(notify: Notify[int]) -> None:
        await notify(1)
        await go.wait()
        await notify(2)
        await asyncio.sleep(0)
        await notify(3)

    run: Run[int, None] = Run(work, 0.0)
    early = asyncio.ensure_future(_all(run))
    await settled()
    go.set()

    assert await early == [1, 2, 3]
    assert await _all(run) == [1, 2, 3]


async def _all(run: Run[int, None]) -> list[int]:
    return [event async for event in run.events()]
