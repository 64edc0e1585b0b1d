"""Fetching models over REST, from a hub that lies on this machine and fails as hubs do."""

from __future__ import annotations

import json
import random
import re
import shutil
import threading
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from huggingface_hub import constants

from conftest import MakeService
from http_server import TOKEN, calling, serving, until
from local_hub import LISTING, Fault, Hub, asked_by_default, running_hub
from step1x_edit.hub.catalog import CATALOG, find_model
from step1x_edit.hub.pulls import REPORT_S, Speed
from step1x_edit.schemas.answers import ModelsAnswer, PullAnswer

NAME, OTHER = "v1.2", "v1.2-preview"
BIG = "transformer/model.safetensors"
WEIGHTS = random.Random(0).randbytes(400_000)
FILES = {"model_index.json": b"{}", BIG: WEIGHTS, "transformer/run.py": b"print('no')"}
TOTAL = len(WEIGHTS) + 2
LONG_PAUSE = Fault(503, {"Retry-After": "60"})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 60)
    with running_hub() as hub:
        asked_by_default(hub, monkeypatch)
        hub.repos[find_model(NAME).repos[0]] = dict(FILES)
        hub.repos[find_model(OTHER).repos[0]] = {**FILES, BIG: WEIGHTS[::-1]}
        yield hub


@pytest.fixture
def client(make_service: MakeService, hub: Hub, tmp_path: Path) -> Iterator[httpx2.Client]:
    with calling(make_service(), data_dir=tmp_path) as client:
        yield client


Event = tuple[str, dict[str, Any]]


def events_of(stream: httpx2.Response) -> Iterator[Event]:
    """The events of a stream as they come."""
    assert stream.status_code == 200
    assert stream.headers["content-type"].startswith("text/event-stream")
    name = ""
    for line in stream.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def pull(client: httpx2.Client, name: str = NAME) -> list[Event]:
    """Everything that is reported about a pull, up to its end."""
    with client.stream("POST", f"/api/models/{name}/pull") as stream:
        return list(events_of(stream))


def listed(client: httpx2.Client) -> dict[str, Any]:
    answer = client.get("/api/models").json()
    ModelsAnswer.model_validate(answer)
    return {model["name"]: model for model in answer["models"]}


def latest(client: httpx2.Client) -> dict[str, Any]:
    told: dict[str, Any] = client.get("/api/models").json()["pull"]
    PullAnswer.model_validate(told)
    return told


def held_at(hub: Hub, count: int) -> threading.Event:
    """Stop the large file after this many bytes until the event is set."""
    go_on = threading.Event()
    hub.faults[BIG] = iter([Fault(stall_after=count, go_on=go_on)])
    return go_on


def heard_of(events: Iterator[Event], done: int) -> list[Event]:
    """Listen until this many bytes are reported."""
    heard = []
    for event in events:
        heard.append(event)
        if event[1].get("done", 0) >= done:
            return heard
    raise AssertionError(heard)


# --- what arrives ---------------------------------------------------------------------------------


def test_a_model_is_fetched_and_its_folder_told(
    client: httpx2.Client, hub: Hub, tmp_path: Path
) -> None:
    before = listed(client)
    heard = pull(client)
    after = listed(client)

    folder = tmp_path / "models" / NAME
    *progress, end = heard
    assert end == ("pulled", {"path": str(folder)})
    assert {name for name, _ in progress} == {"progress"}
    assert progress[0][1]["phase"] == "asking"
    done = [told["done"] for _, told in progress]
    assert done == sorted(done)
    assert progress[-1][1] == {
        "phase": "downloading",
        "done": TOTAL,
        "total": TOTAL,
        "text": "complete",
    }
    assert (folder / BIG).read_bytes() == WEIGHTS
    assert not (folder / "transformer/run.py").exists()
    assert list(before) == [model.name for model in CATALOG]
    assert before["v1.1"]["size_bytes"] == 41_835_000_000
    assert (before[NAME]["state"], after[NAME]["state"]) == ("available", "pulled")
    assert (after[NAME]["folder"], after[NAME]["disk_bytes"]) == (str(folder), TOTAL)
    assert latest(client) == {
        "name": NAME,
        "status": "succeeded",
        "progress": progress[-1][1],
        "path": str(folder),
    }


def test_a_model_that_is_here_is_told_at_once(
    client: httpx2.Client, hub: Hub, tmp_path: Path
) -> None:
    pull(client)
    asked = len(hub.requests)

    assert pull(client) == [("pulled", {"path": str(tmp_path / "models" / NAME)})]
    assert len(hub.requests) == asked


def test_the_model_of_model_path_is_marked(
    make_service: MakeService, hub: Hub, tmp_path: Path
) -> None:
    with calling(make_service(), data_dir=tmp_path, model_path=NAME) as client:
        before = listed(client)[NAME]["runs"]
        pull(client)
        after = {name for name, model in listed(client).items() if model["runs"]}

    assert not before
    assert after == {NAME}


def test_the_newest_is_told_and_not_each_piece(client: httpx2.Client, hub: Hub) -> None:
    large = random.Random(1).randbytes(20_000_000)
    hub.repos[find_model(NAME).repos[0]][BIG] = large
    go_on = held_at(hub, 15_000_000)
    started = time.monotonic()
    with client.stream("POST", f"/api/models/{NAME}/pull") as stream:
        events = events_of(stream)
        heard = heard_of(events, 15_000_000)
        go_on.set()
        heard += events
    seconds = time.monotonic() - started

    assert 15_000_000 <= heard_of(iter(heard), 15_000_000)[-1][1]["done"] < 15_000_010
    assert heard[-2][1]["done"] == len(large) + 2
    assert len(heard) <= 4 + seconds / REPORT_S


def test_a_line_that_breaks_is_taken_up_again(
    client: httpx2.Client, hub: Hub, tmp_path: Path
) -> None:
    hub.faults[BIG] = repeat(Fault(cut_after=60_000), 3)

    assert pull(client)[-1][0] == "pulled"
    assert (tmp_path / "models" / NAME / BIG).read_bytes() == WEIGHTS
    assert hub.served[BIG] == len(WEIGHTS)


# --- several listeners, none, and stopping it -----------------------------------------------------


def test_leaving_does_not_stop_a_pull_and_coming_back_joins_it(
    client: httpx2.Client, hub: Hub, tmp_path: Path
) -> None:
    go_on = held_at(hub, 300_000)
    with client.stream("POST", f"/api/models/{NAME}/pull") as stream:
        heard_of(events_of(stream), 300_000)
    running = latest(client)
    with (
        client.stream("POST", f"/api/models/{NAME}/pull") as one,
        client.stream("POST", f"/api/models/{NAME}/pull") as two,
    ):
        first, second = events_of(one), events_of(two)
        heard_of(first, 300_000)
        heard_of(second, 300_000)
        go_on.set()
        ends = [list(first)[-1], list(second)[-1]]

    assert (running["status"], running["name"]) == ("running", NAME)
    assert ends == [("pulled", {"path": str(tmp_path / "models" / NAME)})] * 2
    assert [path for path, _ in hub.requests if path.startswith("/api/models/")] == [
        f"/api/models/{find_model(NAME).repos[0]}"
    ]


def test_a_pull_is_stopped_also_while_it_waits_and_the_next_one_goes_on(
    client: httpx2.Client, hub: Hub, tmp_path: Path
) -> None:
    hub.faults[BIG] = iter([Fault(cut_after=300_000), LONG_PAUSE])
    with client.stream("POST", f"/api/models/{NAME}/pull") as stream:
        events = events_of(stream)
        heard_of(events, 200_000)
        until(lambda: latest(client)["progress"]["text"] == "trying again in 60 s")
        stopped = client.delete(f"/api/models/{NAME}/pull")
        end = list(events)[-1]
    again = client.delete(f"/api/models/{NAME}/pull")
    begun = listed(client)[NAME]
    hub.served.clear()
    heard = pull(client)

    assert stopped.json()["status"] == "cancelled"
    PullAnswer.model_validate(stopped.json())
    assert end[0] == "cancelled"
    assert "the downloaded part is kept" in end[1]["message"]
    assert (again.status_code, again.json()["code"]) == (409, "job_conflict")
    assert "v1.2 is not being pulled" in again.json()["detail"]
    assert begun["state"] == "partial"
    assert begun["folder"] == str(tmp_path / "models" / f"{NAME}.partial")
    assert heard[-1][0] == "pulled"
    assert hub.served == {BIG: TOTAL - begun["disk_bytes"]}


def test_one_model_is_pulled_at_a_time(client: httpx2.Client, hub: Hub, tmp_path: Path) -> None:
    pull(client, OTHER)
    go_on = held_at(hub, 300_000)
    with client.stream("POST", f"/api/models/{NAME}/pull") as stream:
        events = events_of(stream)
        heard_of(events, 300_000)
        refused = client.post("/api/models/v1.1/pull")
        not_running = client.delete(f"/api/models/{OTHER}/pull")
        here = pull(client, OTHER)
        go_on.set()
        end = list(events)[-1]

    assert (refused.status_code, refused.json()["code"]) == (409, "job_conflict")
    assert "v1.2 is being pulled, and only one model is at a time" in refused.json()["detail"]
    assert not_running.status_code == 409
    assert here == [("pulled", {"path": str(tmp_path / "models" / OTHER)})]
    assert end[0] == "pulled"


def test_a_server_that_ends_stops_its_pull(
    make_service: MakeService, hub: Hub, tmp_path: Path
) -> None:
    hub.faults[BIG] = iter([Fault(cut_after=300_000), LONG_PAUSE])
    with calling(make_service(), data_dir=tmp_path) as client:
        with client.stream("POST", f"/api/models/{NAME}/pull") as stream:
            heard_of(events_of(stream), 200_000)
        until(lambda: latest(client)["progress"]["phase"] == "waiting")

    until(lambda: "pull" not in {thread.name for thread in threading.enumerate()})
    assert (tmp_path / "models" / f"{NAME}.partial" / BIG).stat().st_size > 200_000
    assert not (tmp_path / "models" / NAME).exists()


# --- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fault", "code", "told"),
    [
        (BIG, Fault(flip=True), "model_unavailable", "does not match its checksum"),
        (LISTING, Fault(401), "model_unavailable", "requires a valid token"),
        (LISTING, Fault(200, body=b"<html>"), "model_unavailable", "check HF_ENDPOINT"),
    ],
    ids=["flipped", "private", "no hub"],
)
def test_a_failure_is_one_sentence_and_leaves_no_model(
    client: httpx2.Client, hub: Hub, name: str, fault: Fault, code: str, told: str
) -> None:
    hub.faults[name] = repeat(fault)

    kind, error = pull(client)[-1]

    assert kind == "error"
    assert error.keys() == {"status", "error", "code"}
    assert (error["status"], error["code"]) == ("error", code)
    assert re.fullmatch(f"Cannot get model: .*{told}.*", error["error"])
    assert listed(client)[NAME]["state"] != "pulled"
    ended = latest(client)
    assert (ended["status"], ended["error"], ended["code"]) == ("failed", error["error"], code)

    hub.faults.clear()
    assert pull(client)[-1][0] == "pulled"


def test_too_small_a_disk_is_told_before_anything_is_fetched(
    client: httpx2.Client, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))

    kind, error = pull(client)[-1]

    assert (kind, error["code"]) == ("error", "no_space")
    assert "are missing" in error["error"]
    assert hub.served == {}


@pytest.mark.parametrize(
    "name", ["v9", "V1.2", "acme/tiny", "acme%2Ftiny", "..%2F..%2Fetc", "demo"]
)
@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_only_what_is_listed_can_be_named(
    client: httpx2.Client, hub: Hub, method: str, name: str
) -> None:
    answer = client.request(method, f"/api/models/{name}/pull")

    assert (answer.status_code, answer.json()["code"]) == (404, "model_not_found")
    assert "v1.0, v1.1, v1.1-diffusers, v1.2, v1.2-preview" in answer.json()["detail"]
    assert hub.requests == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": f"Bearer {TOKEN}", "Origin": "https://other.example"}, 403),
        ({"Authorization": f"Bearer {TOKEN}", "Host": "other.example"}, 421),
    ],
)
def test_who_may_not_come_in_fetches_nothing(
    make_service: MakeService, hub: Hub, headers: dict[str, str], status: int
) -> None:
    with serving(make_service()) as url:
        answers = [
            httpx2.request(method, f"{url}/api/models{path}", headers=headers, timeout=240)
            for method, path in (
                ("GET", ""),
                ("POST", f"/{NAME}/pull"),
                ("DELETE", f"/{NAME}/pull"),
            )
        ]

    refused = answers[1:] if status == 403 else answers  # reading is for the browser to refuse
    assert {answer.status_code for answer in refused} == {status}
    assert hub.requests == []


def test_pulls_that_begin_count_against_the_rate_limit(
    make_service: MakeService, hub: Hub, tmp_path: Path
) -> None:
    with calling(make_service(), data_dir=tmp_path, rate_limit=1) as client:
        pull(client)
        here = pull(client)
        refused = client.post(f"/api/models/{OTHER}/pull")

    assert here[-1][0] == "pulled"
    assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")


# --- the speed ------------------------------------------------------------------------------------


def test_the_speed_is_that_of_the_last_seconds() -> None:
    speed = Speed()
    speed.note(0.0, 1000)
    unknown = speed.bytes_per_s(0.0)
    for tenth in range(1, 101):
        speed.note(tenth / 10, 1000 + 10 * tenth)  # 100 B/s
    slow = speed.bytes_per_s(10.0)
    for tenth in range(101, 201):
        speed.note(tenth / 10, 2000 + 100 * (tenth - 100))  # 1000 B/s
    fast = speed.bytes_per_s(20.0)
    after_silence = speed.bytes_per_s(26.0)
    speed.note(21.0, 500)

    assert unknown is None
    assert slow == pytest.approx(100)
    assert fast == pytest.approx(1000)
    assert after_silence is None
    assert speed.bytes_per_s(21.0) is None
