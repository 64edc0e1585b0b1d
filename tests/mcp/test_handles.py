"""Edits that continue by themselves: submitted, polled, cancelled, and forgotten in the end."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client
from fastmcp.apps import UI_EXTENSION_ID
from fastmcp.client.transports import StdioTransport, StreamableHttpTransport
from mcp.client.extension import ClientExtension, advertise
from mcp.shared.exceptions import MCPError

from conftest import MakeService
from fakes import FakeWorker, Gate
from fast_time import FastLoop
from http_server import TOKEN, announcing, listening
from mcp_answers import answer_of, text_of
from step1x_edit.channel import Phase, Progress
from step1x_edit.errors import EditCancelledError, JobNotFoundError, OutOfMemoryError
from step1x_edit.interfaces.mcp.client_config import ClientName, config_file, server_entry
from step1x_edit.interfaces.mcp.handles import Handles
from step1x_edit.interfaces.mcp.server import build_mcp
from step1x_edit.interfaces.pursuits import Notify, Pursuit
from step1x_edit.service.service import EditService
from step1x_edit.settings import Settings, inherited_environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _start_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])


async def told(client: Client[Any], tool: str, **arguments: Any) -> dict[str, Any]:
    """The answer of a tool, whatever it is; both halves must say the same."""
    result = await client.call_tool(tool, arguments, raise_on_error=False)
    answer = answer_of(result)
    assert json.loads(text_of(result)) == answer
    assert result.is_error == (answer["status"] == "error")
    return answer


def direct(url: str) -> StreamableHttpTransport:
    return StreamableHttpTransport(url, auth=TOKEN)


# --- over MCP -------------------------------------------------------------------------------------


@ERAS
async def test_a_submitted_edit_answers_at_once_and_ends_as_edit_image_does(
    make_service: MakeService, photo: Path, mode: Any
) -> None:
    gate = Gate(at_step=3)
    arguments = {"image_path": str(photo), "prompt": "x", "seed": 7, "num_steps": 10}
    async with Client(build_mcp(make_service(FakeWorker(before_step=gate))), mode=mode) as client:
        submitted = await told(client, "submit_edit", **arguments)
        job = {"job_id": submitted["job_id"]}
        assert await asyncio.to_thread(gate.reached.wait, 60)
        running = await told(client, "get_job", **job, wait_s=0)
        gate.open()
        result = await client.call_tool("get_job", {**job, "wait_s": 50})
        again = await told(client, "get_job", **job)
        plain = await client.call_tool("edit_image", arguments)

    assert submitted["status"] == "running"
    assert running == {
        "status": "running",
        **job,
        "message": "The edit continues (denoising 2/10); get_job has its result",
        "phase": "denoising",
        "step": 2,
        "total": 10,
    }
    answer = result.structured_content
    assert Path(answer["output_path"]).is_file()
    assert again == answer
    assert answer["metadata"] == plain.structured_content["metadata"]
    assert result.content[1] == plain.content[1]  # the preview
    assert result.content[2].name == Path(answer["output_path"]).name
    assert not result.is_error


async def test_an_edit_in_the_line_tells_its_position(
    make_service: MakeService, photo: Path
) -> None:
    gate = Gate()
    arguments = {"image_path": str(photo), "prompt": "x"}
    async with Client(build_mcp(make_service(FakeWorker(before_step=gate)))) as client:
        await told(client, "submit_edit", **arguments)
        assert await asyncio.to_thread(gate.reached.wait, 60)
        await told(client, "submit_edit", **arguments)
        last = await told(client, "submit_edit", **arguments)
        gate.open()

    assert (last["phase"], last["position"]) == ("queued", 2)
    assert "queued, position 2" in last["message"]


async def test_waiting_for_a_job_reports_progress_that_rises(
    make_service: MakeService, photo: Path
) -> None:
    gate = Gate(at_step=2)
    heard: list[tuple[float, str | None]] = []

    async def listen(progress: float, total: float | None, message: str | None) -> None:
        heard.append((progress, message))
        gate.open()

    server = build_mcp(make_service(FakeWorker(before_step=gate)), step_pause_s=0)
    async with Client(server) as client:
        job = await told(client, "submit_edit", image_path=str(photo), prompt="x", num_steps=10)
        assert await asyncio.to_thread(gate.reached.wait, 60)
        arguments = {"job_id": job["job_id"], "wait_s": 50}
        await client.call_tool("get_job", arguments, progress_handler=listen)

    numbers = [progress for progress, _ in heard]
    assert all(later > earlier for earlier, later in pairwise(numbers))
    assert [message for _, message in heard] == [
        *(f"denoising {step}/10" for step in range(1, 11)),
        "decoding",
        "saving",
    ]


async def test_a_caller_that_does_not_wait_gets_the_progress_of_this_moment_once(
    make_service: MakeService, photo: Path
) -> None:
    gate, heard = Gate(at_step=4), []

    async def listen(progress: float, total: float | None, message: str | None) -> None:
        heard.append(message)

    server = build_mcp(make_service(FakeWorker(before_step=gate)), step_pause_s=0)
    async with Client(server) as client:
        job = await told(client, "submit_edit", image_path=str(photo), prompt="x", num_steps=10)
        assert await asyncio.to_thread(gate.reached.wait, 60)
        arguments = {"job_id": job["job_id"], "wait_s": 0}
        answer = await client.call_tool("get_job", arguments, progress_handler=listen)
        gate.open()

    assert heard == ["denoising 3/10"]
    assert answer.structured_content["step"] == 3


async def test_what_cannot_be_started_is_told_by_submit(
    make_service: MakeService, photo: Path
) -> None:
    gate = Gate()
    good = {"image_path": str(photo), "prompt": "x"}
    worker = FakeWorker(before_step=gate)
    async with Client(build_mcp(make_service(worker, max_queue=1))) as client:
        wrong = [
            await told(client, "submit_edit", **(good | change))
            for change in ({"image_path": "no.png"}, {"num_steps": 5}, {"hat": "red"})
        ]
        await told(client, "submit_edit", **good)
        assert await asyncio.to_thread(gate.reached.wait, 60)
        await told(client, "submit_edit", **good)
        refused = await told(client, "submit_edit", **good)
        gate.open()

    assert [answer["error"].partition(", ")[0] for answer in wrong] == [
        "Image file not found: no.png",
        "Invalid parameter: num_steps must be between 10 and 50",
        "Invalid parameter: 'hat' is unknown",
    ]
    assert refused["code"] == "queue_full"
    assert refused["retry_after_s"] >= 1


async def test_an_unknown_job_and_bad_questions_are_told_in_one_sentence(
    make_service: MakeService,
) -> None:
    questions: list[tuple[str, dict[str, Any]]] = [
        ("get_job", {"job_id": "edit_of_nobody"}),
        ("cancel_job", {"job_id": "edit_of_nobody"}),
        ("get_job", {}),
        ("get_job", {"job_id": "x", "wait_s": 51}),
        ("get_job", {"job_id": "x", "wait_s": True}),
        ("get_job", {"job_id": "x", "wait_s": "nan"}),
        ("cancel_job", {"job_id": "x", "wait_s": 1}),
        ("cancel_job", {"job_id": ""}),
    ]
    async with Client(build_mcp(make_service())) as client:
        answers = [await told(client, tool, **arguments) for tool, arguments in questions]

    unknown = (
        "Job not found: 'edit_of_nobody' is not a job of this server; finished jobs are kept for "
        "60 minutes, and none survives a restart"
    )
    assert [answer["error"] for answer in answers] == [
        unknown,
        unknown,
        "Invalid parameter: job_id is missing",
        "Invalid parameter: wait_s must be between 0 and 50, got 51",
        "Invalid parameter: wait_s must be a number between 0 and 50, got true",
        "Invalid parameter: wait_s must be a number between 0 and 50, got nan",
        "Invalid parameter: 'wait_s' is unknown",
        "Invalid parameter: job_id must not be empty",
    ]
    assert answers[0]["code"] == "not_found"


async def test_the_error_of_an_edit_is_the_answer_of_its_job(
    make_service: MakeService, photo: Path
) -> None:
    def fail(job: object, step: int) -> None:
        raise OutOfMemoryError("use a smaller size_level")

    async with Client(build_mcp(make_service(FakeWorker(before_step=fail)))) as client:
        job = await told(client, "submit_edit", image_path=str(photo), prompt="x")
        answers = [await told(client, "get_job", job_id=job["job_id"]) for _ in range(2)]

    assert answers[0]["error"] == "CUDA out of memory: use a smaller size_level"
    assert answers[0]["code"] == "out_of_memory"
    assert answers[1] == answers[0]


async def test_a_job_that_is_cancelled_stops_the_model_and_leaves_no_file(
    make_service: MakeService, photo: Path
) -> None:
    gate, worker = Gate(at_step=2), FakeWorker()
    worker.before_step = gate
    async with Client(build_mcp(make_service(worker))) as client:
        job = await told(client, "submit_edit", image_path=str(photo), prompt="stop me")
        job = {"job_id": job["job_id"]}
        assert await asyncio.to_thread(gate.reached.wait, 60)
        cancelled = await told(client, "cancel_job", **job)
        answer = await told(client, "get_job", **job)
        again = await told(client, "cancel_job", **job)
        gate.open()
        await client.call_tool("release_gpu", {})  # runs once the worker is free

    assert cancelled == {"status": "success", "message": "Edit cancelled", **job}
    assert (answer["error"], answer["code"]) == ("Cancelled", "cancelled")
    assert again["message"] == "Nothing to cancel: the edit has ended"
    assert worker.stopped_at == {"stop me": 2}
    assert [path.name for path in photo.parent.iterdir()] == ["photo.png"]


@ERAS
async def test_a_call_that_has_waited_long_enough_leaves_its_edit_running(
    make_service: MakeService, photo: Path, mode: Any
) -> None:
    gate = Gate()
    server = build_mcp(make_service(FakeWorker(before_step=gate)), max_wait_s=0.05)
    async with Client(server, mode=mode) as client:
        running = await told(client, "edit_image", image_path=str(photo), prompt="x")
        gate.open()
        answer = await told(client, "get_job", job_id=running["job_id"], wait_s=50)

    assert running["status"] == "running"
    assert answer["status"] == "success"
    assert Path(answer["output_path"]).is_file()


def within_limit(
    service: EditService,
    limit_s: float,
    talk: Callable[[Client[Any], FastLoop], Awaitable[None]],
    max_wait_s: float = 0.0,
) -> None:
    """Talk to the tools as a client does that ends each call after `limit_s` seconds."""

    async def connected(loop: FastLoop) -> None:
        async with Client(build_mcp(service, max_wait_s=max_wait_s), timeout=limit_s) as client:
            await talk(client, loop)

    loop = FastLoop()
    try:
        loop.run_until_complete(connected(loop))
    finally:
        loop.close()


async def outcome(client: Client[Any], job_id: str) -> dict[str, Any]:
    """Ask for a job, as it is asked for without further arguments, until it has ended."""
    for _ in range(100):
        answer = await told(client, "get_job", job_id=job_id)
        if answer["status"] != "running":
            return answer
    raise AssertionError("it never ended")


def test_a_client_that_ends_calls_after_five_seconds_gets_its_edit(
    make_service: MakeService, photo: Path
) -> None:
    gate, arguments = Gate(at_step=3), {"image_path": str(photo), "prompt": "x"}

    async def talk(client: Client[Any], loop: FastLoop) -> None:
        job = await told(client, "submit_edit", **arguments)
        assert await asyncio.to_thread(gate.reached.wait, 60)
        with loop.hurry():
            with pytest.raises(MCPError, match=r"[Tt]imed out"):
                await client.call_tool("edit_image", {**arguments, "prompt": "lost"})
            running = await told(client, "get_job", job_id=job["job_id"])
        gate.open()
        answer = await outcome(client, job["job_id"])

        assert (running["status"], running["step"]) == ("running", 2)
        assert answer["status"] == "success"
        assert Path(answer["output_path"]).is_file()

    within_limit(make_service(FakeWorker(before_step=gate)), 5, talk)


@pytest.mark.parametrize("name", [ClientName.CODEX, ClientName.GOOSE, ClientName.GEMINI])
def test_a_client_that_knows_of_no_limit_gets_its_edit_with_what_its_file_says(
    make_service: MakeService, photo: Path, name: ClientName
) -> None:
    file = config_file(name)
    assert file.limit_s is not None
    entry = server_entry(Settings(_env_file=None), file)
    max_wait_s = int((entry.get("env") or entry["envs"])["MCP_MAX_WAIT"])
    gate = Gate()

    async def talk(client: Client[Any], loop: FastLoop) -> None:
        with loop.hurry():
            job = await told(client, "edit_image", image_path=str(photo), prompt="x")
        gate.open()

        assert job["status"] == "running"
        assert (await outcome(client, job["job_id"]))["status"] == "success"

    service = make_service(FakeWorker(before_step=gate))
    within_limit(service, file.limit_s, talk, max_wait_s)


async def test_what_a_model_reads_of_edit_image_names_the_way_around_a_limit(
    make_service: MakeService,
) -> None:
    async with Client(build_mcp(make_service())) as client:
        tools = {tool.name: tool for tool in await client.list_tools()}

    assert "submit_edit" in (tools["edit_image"].description or "")
    assert "get_job" in (tools["submit_edit"].description or "")
    assert tools["get_job"].input_schema["properties"]["wait_s"]["default"] == 4.0


async def test_a_call_that_is_cancelled_while_it_waits_takes_its_edit_along(
    make_service: MakeService, photo: Path
) -> None:
    gate, worker = Gate(), FakeWorker()
    worker.before_step = gate
    async with Client(build_mcp(make_service(worker), max_wait_s=600)) as client:
        edit = client.call_tool("edit_image", {"image_path": str(photo), "prompt": "x"})
        call = asyncio.ensure_future(edit)
        assert await asyncio.to_thread(gate.reached.wait, 60)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await client.call_tool("get_gpu_status", {})  # comes after the cancellation
        gate.open()
        await client.call_tool("release_gpu", {})  # runs once the worker is free

    assert worker.stopped_at == {"x": 1}


async def test_what_is_waited_for_outlives_whoever_waits(
    make_service: MakeService, photo: Path
) -> None:
    gate = Gate()
    heard = asyncio.Event()

    async def listen(progress: float, total: float | None, message: str | None) -> None:
        heard.set()

    async with Client(build_mcp(make_service(FakeWorker(before_step=gate)))) as client:
        job = await told(client, "submit_edit", image_path=str(photo), prompt="x")
        arguments = {"job_id": job["job_id"], "wait_s": 50}
        waiting = client.call_tool("get_job", arguments, progress_handler=listen)
        call = asyncio.ensure_future(waiting)
        await asyncio.wait_for(heard.wait(), 60)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await client.call_tool("get_gpu_status", {})  # comes after the cancellation
        gate.open()
        answer = await told(client, "get_job", **arguments)

    assert answer["status"] == "success"


async def test_what_still_runs_is_stopped_when_the_server_ends(
    make_service: MakeService, photo: Path
) -> None:
    gate, worker = Gate(at_step=2), FakeWorker()
    worker.before_step = gate
    service = make_service(worker)
    async with Client(build_mcp(service)) as client:
        await told(client, "submit_edit", image_path=str(photo), prompt="x")
        assert await asyncio.to_thread(gate.reached.wait, 60)
    gate.open()
    await service.release()  # runs once the worker is free

    assert worker.stopped_at == {"x": 2}


@ERAS
async def test_a_submitted_edit_outlives_its_connection(
    make_service: MakeService, photo: Path, mode: Any
) -> None:
    gate = Gate(at_step=2)
    with listening(make_service(FakeWorker(before_step=gate))) as url:
        async with Client(direct(url), mode=mode) as client:
            job = await told(client, "submit_edit", image_path=str(photo), prompt="x")
            assert await asyncio.to_thread(gate.reached.wait, 60)
        gate.open()
        async with Client(direct(url), mode=mode) as another:
            answer = await told(another, "get_job", job_id=job["job_id"], wait_s=50)

    assert answer["status"] == "success"


@ERAS
async def test_paths_of_a_submitted_edit_are_those_of_a_joined_servers_client(
    make_service: MakeService, photo: Path, tmp_path: Path, mode: Any
) -> None:
    folder = tmp_path / "of the client"
    folder.mkdir()
    (folder / "mine.png").write_bytes(photo.read_bytes())
    data_dir = tmp_path / "data"
    transport = StdioTransport(
        sys.executable,
        [str(ROOT / "mcp_server.py")],
        cwd=str(folder),
        env=inherited_environment(DATA_DIR=str(data_dir)),
        keep_alive=False,
    )
    with announcing(make_service(), data_dir):
        async with Client(transport, mode=mode) as client:
            job = await told(
                client, "submit_edit", image_path="mine.png", prompt="x", output_path="new.png"
            )
            result = await client.call_tool("get_job", {"job_id": job["job_id"], "wait_s": 50})
            missing = await told(client, "submit_edit", image_path="no.png", prompt="x")

    assert result.structured_content["output_path"] == str(folder / "new.png")
    assert [block.type for block in result.content] == ["text", "image", "resource_link"]
    assert missing["error"] == "Image file not found: no.png"


@ERAS
async def test_a_client_over_http_may_say_how_long_it_waits(
    make_service: MakeService, photo: Path, mode: Any
) -> None:
    gate = Gate()
    arguments = {"image_path": str(photo), "prompt": "x"}
    with listening(make_service(FakeWorker(before_step=gate))) as url:
        answers = []
        for wait in ("1", "soon"):
            transport = StreamableHttpTransport(url, auth=TOKEN, headers={"X-Max-Wait": wait})
            async with Client(transport, mode=mode) as client:
                answers.append(await told(client, "edit_image", **arguments))
        gate.open()

    running, refused = answers
    assert running["status"] == "running"
    assert refused["error"] == "Invalid parameter: X-Max-Wait must be whole seconds, got 'soon'"


@pytest.mark.parametrize(
    ("mode", "extensions"), [("auto", [advertise(UI_EXTENSION_ID)]), ("legacy", [])]
)
async def test_a_client_of_a_joined_server_is_answered_when_its_own_time_is_over(
    make_service: MakeService,
    photo: Path,
    tmp_path: Path,
    mode: Any,
    extensions: list[ClientExtension],
) -> None:
    """And gets the picture before the edit only if it has declared that it shows apps."""
    gate = Gate()
    data_dir = tmp_path / "data"
    transport = StdioTransport(
        sys.executable,
        [str(ROOT / "mcp_server.py")],
        cwd=str(tmp_path),
        env=inherited_environment(DATA_DIR=str(data_dir), MCP_MAX_WAIT="1"),
        keep_alive=False,
    )
    with announcing(make_service(FakeWorker(before_step=gate)), data_dir):
        async with Client(transport, mode=mode, extensions=extensions) as client:
            running = await told(client, "edit_image", image_path="photo.png", prompt="x")
            gate.open()
            result = await client.call_tool("get_job", {"job_id": running["job_id"], "wait_s": 50})

    assert running["status"] == "running"
    assert result.structured_content["output_path"] == str(tmp_path / "photo_edited.png")
    assert ("step1x-edit/before" in (result.meta or {})) == bool(extensions)


# --- the bookkeeping ------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def ended(result: int) -> Pursuit[Progress, int]:
    async def work(notify: Notify[Progress]) -> int:
        return result

    pursuit = Pursuit(work)
    await pursuit.begun()
    return pursuit


def endless() -> Pursuit[Progress, int]:
    async def work(notify: Notify[Progress]) -> int:
        await notify(Progress(Phase.ENCODING))
        await asyncio.Event().wait()
        return 0

    return Pursuit(work)


async def test_finished_jobs_are_forgotten_after_their_time_and_running_ones_never() -> None:
    clock = Clock()
    handles: Handles[Pursuit[Progress, int]] = Handles(kept=10, kept_s=60, now=clock)
    running, done = handles.add(endless()), handles.add(await ended(7))
    await asyncio.sleep(0)  # the end is noted in the loop's next turn

    clock.now = 59
    assert await handles.get(done).result() == 7
    clock.now = 60
    with pytest.raises(JobNotFoundError):
        handles.get(done)
    assert not handles.get(running).is_done
    await handles.close()


async def test_of_finished_jobs_only_the_last_are_kept() -> None:
    handles: Handles[Pursuit[Progress, int]] = Handles(kept=2, now=Clock())
    ids = [handles.add(endless())]
    for number in range(5):
        ids.append(handles.add(await ended(number)))
        await asyncio.sleep(0)

    found: list[Pursuit[Progress, int] | None] = []
    for job_id in ids:
        try:
            found.append(handles.get(job_id))
        except JobNotFoundError:
            found.append(None)
    assert [pursuit is not None for pursuit in found] == [True, False, False, False, True, True]
    assert len(set(ids)) == len(ids)
    await handles.close()


async def test_closing_stops_what_runs_and_keeps_what_has_ended() -> None:
    handles: Handles[Pursuit[Progress, int]] = Handles()
    running, done = endless(), await ended(3)
    handles.add(running)
    done_id = handles.add(done)

    await handles.close()

    with pytest.raises(EditCancelledError):
        await running.result()
    assert await handles.get(done_id).result() == 3


async def test_a_listener_hears_the_last_event_the_next_ones_and_the_end() -> None:
    step = asyncio.Event()

    async def work(notify: Notify[Progress]) -> int:
        await notify(Progress(Phase.LOADING))
        await notify(Progress(Phase.ENCODING))
        await step.wait()
        await notify(Progress(Phase.DECODING))
        return 1

    pursuit = Pursuit(work)
    await pursuit.begun()
    heard = []
    async for event in pursuit.latest_events():
        heard.append(event.phase)
        step.set()
    at_the_end = [event.phase async for event in pursuit.latest_events()]

    assert heard == [Phase.ENCODING, Phase.DECODING]
    assert at_the_end == [Phase.DECODING]
