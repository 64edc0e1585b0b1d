"""What every door says of an edit that takes longer than it may, before it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastmcp import Client
from typer.testing import CliRunner

from conftest import MakeService
from fakes import FakeWorker, ManualClock
from http_server import TOKEN, calling, serving
from mcp_answers import answer_of
from step1x_edit.channel import Phase, Progress
from step1x_edit.interfaces.cli import app
from step1x_edit.interfaces.mcp.server import build_mcp
from step1x_edit.interfaces.page.progress import ProgressLine
from step1x_edit.interfaces.page.texts import LANGUAGES, text
from step1x_edit.service.service import EditService

ADVICE = (
    "such an edit takes about {} s here, and EDIT_TIMEOUT is 150 s; use a faster mode, fewer "
    "num_steps, a lower size_level, or a higher EDIT_TIMEOUT"
)
REFUSAL = f"Deadline exceeded: {ADVICE.format(280)}"
WARNING = ADVICE.format(200)


@pytest.fixture
def worker() -> FakeWorker:
    return FakeWorker()


@pytest.fixture
def service(make_service: MakeService, worker: FakeWorker) -> EditService:
    """An edit may take 150 s, which is 15 steps."""
    clock = ManualClock()
    worker.before_step = lambda job, step: clock.advance(10)
    return make_service(worker, clock=clock, edit_timeout=150, default_num_steps=28)


def form(photo: Path, **fields: object) -> dict[str, Any]:
    return {"files": {"file": photo.read_bytes()}, "data": {"prompt": "x", **fields}}


async def test_mcp_refuses_at_once_and_warns_in_its_first_notification(
    service: EditService, worker: FakeWorker, photo: Path
) -> None:
    heard: list[str | None] = []

    async def listen(progress: float, total: float | None, message: str | None) -> None:
        heard.append(message)

    async with Client(build_mcp(service)) as client:

        async def told(tool: str, **more: object) -> dict[str, Any]:
            arguments = {"image_path": str(photo), "prompt": "x", **more}
            options: dict[str, Any] = {"raise_on_error": False, "progress_handler": listen}
            return answer_of(await client.call_tool(tool, arguments, **options))

        first = await told("edit_image", num_steps=10)
        refused = [await told("edit_image"), await told("submit_edit")]
        heard.clear()
        late = await told("edit_image", num_steps=20)

    assert first["status"] == "success"
    assert [each["error"] for each in refused] == [REFUSAL, REFUSAL]
    assert [each["code"] for each in refused] == ["deadline_exceeded"] * 2
    assert len(worker.started) == 2
    assert late["error"].startswith("Deadline exceeded: the edit took longer than 150 s")
    assert [message for message in heard if message and WARNING in message] == [
        f"queued, position 1; {WARNING}"
    ]


def test_rest_refuses_at_once_and_its_estimate_says_so(
    service: EditService, worker: FakeWorker, photo: Path
) -> None:
    def estimated(client: httpx2.Client, num_steps: int) -> dict[str, Any]:
        fields = {"prompt": "x", "num_steps": num_steps}
        answer = client.post("/v1/images/edits/estimate", json=fields).json()
        return {name: answer[name] for name in ("predicted_seconds", "note")}

    with calling(service) as client:
        first = client.post("/api/edit", **form(photo, num_steps=10))
        refused = [client.post(path, **form(photo)) for path in ("/api/edit", "/v1/jobs")]
        late = client.post("/v1/jobs", **form(photo, num_steps=20)).json()
        notes = [estimated(client, steps) for steps in (10, 20)]
        jobs = client.get("/v1/jobs").json()["data"]
        client.get(f"/v1/jobs/{late['id']}/events")

    assert first.status_code == 200
    assert [each.status_code for each in refused] == [504, 504]
    assert [each.json()["detail"] for each in refused] == [REFUSAL, REFUSAL]
    assert late["warning"] == WARNING
    assert [job["id"] for job in jobs] == [late["id"]]
    assert len(worker.started) == 2
    assert notes == [
        {"predicted_seconds": 100, "note": None},
        {"predicted_seconds": 200, "note": WARNING},
    ]


def test_after_a_while_a_refused_edit_is_tried_again_and_a_faster_machine_makes_it(
    make_service: MakeService, worker: FakeWorker, photo: Path
) -> None:
    clock, step_s = ManualClock(), 10.0
    worker.before_step = lambda job, step: clock.advance(step_s)
    service = make_service(worker, clock=clock, edit_timeout=150, default_num_steps=28)

    with calling(service) as client:

        def status_of(**fields: object) -> int:
            return client.post("/api/edit", **form(photo, **fields)).status_code

        first, refused = status_of(num_steps=10), status_of()
        clock.advance(901)
        in_vain, refused_again = status_of(), status_of()
        started = len(worker.started)
        clock.advance(901)
        step_s = 1.0
        made, made_again = status_of(), status_of()

    assert (first, refused, in_vain, refused_again) == (200, 504, 504, 504)
    assert started == 2
    assert (made, made_again) == (200, 200)


def test_the_command_line_warns_once_as_soon_as_steps_are_slow(
    service: EditService, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("step1x_edit.service.wiring.build_service", lambda settings: service)

    late = CliRunner().invoke(app, ["edit", str(photo), "x", "--num-steps=28"])

    assert late.exit_code == 1
    assert " ".join(late.stderr.split()).count(f"Warning: {ADVICE.format(280)}") == 1


def test_the_command_line_is_refused_or_warned_by_a_server_before_the_work(
    service: EditService, worker: FakeWorker, photo: Path
) -> None:
    with serving(service) as url:
        at = ["--url", url, "--api-key", TOKEN]
        words = ["edit", str(photo), "x", "--json", *at]
        first = CliRunner().invoke(app, [*words, "--num-steps=10"])
        refused = CliRunner().invoke(app, [*words, "--num-steps=28"])
        started = list(worker.started)
        late = CliRunner().invoke(app, [*words, "--num-steps=20", "--overwrite"])

    assert first.exit_code == 0, first.stderr
    assert refused.exit_code == 1
    assert json.loads(refused.stdout)["error"] == REFUSAL
    assert len(started) == 1
    assert f"Warning: {WARNING}" in " ".join(late.stderr.split())


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_warns_in_the_language_of_the_visitor(language: str) -> None:
    line = ProgressLine(language)

    shown = line.show(Progress(Phase.ENCODING, warning=WARNING))

    assert f'role="alert">{text("slow_edit", language)}<' in shown
