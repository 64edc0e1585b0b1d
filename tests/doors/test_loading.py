"""What every door says while a large model is read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client
from typer.testing import CliRunner

from conftest import MakeService
from fakes import FakeWorker, HeldDisk, ManualClock, slow_disk
from http_server import TOKEN, calling, serving
from mcp_answers import answer_of
from step1x_edit.channel import Phase, Progress
from step1x_edit.interfaces.cli import app
from step1x_edit.interfaces.mcp.server import build_mcp
from step1x_edit.interfaces.page.progress import ProgressLine
from step1x_edit.service import job_store
from step1x_edit.service.service import EditService

HALF_READ = {"phase": "loading", "step": 20 * 10**9, "total": 40 * 10**9}


@pytest.fixture
def disk() -> HeldDisk:
    return HeldDisk(ManualClock())


@pytest.fixture
def service(make_service: MakeService, disk: HeldDisk) -> EditService:
    """Its first edit loads for 80 s, and an edit may take 60."""
    return make_service(FakeWorker(load=disk), clock=disk.clock, edit_timeout=60)


async def half_read(disk: HeldDisk) -> None:
    assert await asyncio.to_thread(disk.is_half_read.wait, 60)


async def test_mcp_notifies_of_what_is_read_and_its_tools_say_it_too(
    service: EditService, disk: HeldDisk, photo: Path
) -> None:
    heard: list[str | None] = []

    async def listen(progress: float, total: float | None, message: str | None) -> None:
        heard.append(message)

    async with Client(build_mcp(service, step_pause_s=0)) as client:

        async def told(tool: str, **arguments: object) -> dict[str, Any]:
            return answer_of(await client.call_tool(tool, arguments, progress_handler=listen))

        job = await told("submit_edit", image_path=str(photo), prompt="invert")
        waiting = asyncio.ensure_future(told("get_job", job_id=job["job_id"], wait_s=50))
        await half_read(disk)
        status = await told("get_gpu_status")
        running = await told("get_job", job_id=job["job_id"], wait_s=0)
        disk.open()
        answer = await waiting
        after = await told("get_gpu_status")

    assert status["gpu_status"]["loading"] == "reading 20.0 of 40.0 GB, about 40 s"
    assert running["message"].startswith("The edit continues (reading 20.0 of 40.0 GB, about 40 s)")
    assert {name: running[name] for name in HALF_READ} == HALF_READ
    assert answer["status"] == "success"
    assert "reading 30.0 of 40.0 GB, about 20 s" in heard
    assert "loading" not in after["gpu_status"]


def test_rest_has_the_bytes_in_events_and_the_words_in_the_state(
    service: EditService, disk: HeldDisk, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_store, "PROGRESS_INTERVAL_S", 0)
    words = "reading 20.0 of 40.0 GB, about 40 s"
    with calling(service) as client:
        form = {"files": {"file": photo.read_bytes()}, "data": {"prompt": "invert"}}
        job = client.post("/v1/jobs", **form).json()["id"]  # type: ignore[arg-type]
        assert disk.is_half_read.wait(60)
        health, status = client.get("/health").json(), client.get("/api/gpu/status").json()
        disk.open()
        events = client.get(f"/v1/jobs/{job}/events").text

    told = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: ")]
    loading = [event["progress"] for event in told if "progress" in event]
    assert (health["loading"], status["gpu_status"]["loading"]) == (words, words)
    assert {"phase": "loading"} in loading  # before anything is known
    assert HALF_READ in loading
    assert told[-1]["status"] == "succeeded"


@pytest.mark.parametrize("way", ["in process", "through a server"])
def test_the_command_line_prints_what_is_read(
    service: EditService, disk: HeldDisk, photo: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(job_store, "PROGRESS_INTERVAL_S", 0)
    monkeypatch.setattr("step1x_edit.service.wiring.build_service", lambda settings: service)
    disk.open()
    with contextlib.ExitStack() as stack:
        words = ["edit", str(photo), "invert", "--overwrite"]
        if way == "through a server":
            words += ["--url", stack.enter_context(serving(service)), "--api-key", TOKEN]
        done = CliRunner().invoke(app, words)

    assert done.exit_code == 0, done.stderr
    lines = done.stderr.splitlines()
    first = next(line for line in lines if "reading" in line)
    assert re.fullmatch(r"edit: reading \d0\.0 of 40\.0 GB", first)
    assert lines.index("edit: loading model") < lines.index(first) < lines.index("edit: encoding")


@pytest.mark.parametrize(
    ("language", "words"),
    [
        ("en", "Reading the model, 20.0 of 40.0 GB · about 40 s left"),
        ("zh-CN", "正在读取模型，20.0 / 40.0 GB · 约剩 40 秒"),
        ("zh-TW", "正在讀取模型，20.0 / 40.0 GB · 約剩 40 秒"),
        ("ja", "モデルを読み取り中（20.0 / 40.0 GB） · 残り約 40 秒"),
    ],
)
def test_the_page_says_it_in_the_language_of_the_visitor(language: str, words: str) -> None:
    clock = ManualClock()
    line = ProgressLine(language, now=clock.now)
    line.show(Progress(Phase.LOADING))
    shown = [
        line.show(Progress(Phase.LOADING, done, total)) for done, total in slow_disk(clock, 20)()
    ]

    assert words in shown[1]
    assert "width:50%" in shown[1].replace(" ", "")
