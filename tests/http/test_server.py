"""The process of the unified server: how it starts, is found, stops, and what it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from fastmcp import Client

from conftest import MakeService
from fakes import FakeWorker, Gate
from http_server import TOKEN, calling, serving, until
from local_hub import Fault, running_hub
from server_process import FAKE, Process, started
from step1x_edit import MCPClient
from step1x_edit.engine.machine import has_gpu_driver
from step1x_edit.hub.catalog import find_model
from step1x_edit.interfaces import server
from step1x_edit.interfaces.discovery import NOTE_NAME, find_server
from step1x_edit.interfaces.page import files as page_files
from step1x_edit.service.job_store import DATABASE_NAME, FOLDER_NAME

ROOT = Path(__file__).parents[2]
REAL = ROOT / "unified_server.py"

STORED_JOBS = {DATABASE_NAME, FOLDER_NAME, page_files.FOLDER_NAME}
"""What a server leaves in its data folder."""


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Editing:
    """A request for an edit, sent in a separate thread."""

    def __init__(self, url: str, photo: Path, prompt: str = "x") -> None:
        self.answer: httpx2.Response | None = None
        self.failed: Exception | None = None
        self._thread = threading.Thread(target=self._post, args=(url, photo, prompt), daemon=True)
        self._thread.start()

    def _post(self, url: str, photo: Path, prompt: str) -> None:
        try:
            self.answer = httpx2.post(
                f"{url}/api/edit",
                files={"file": photo.read_bytes()},
                data={"prompt": prompt, "num_steps": "50"},
                timeout=240,
            )
        except httpx2.HTTPError as error:
            self.failed = error

    def join(self) -> None:
        self._thread.join(60)


# --- starting -------------------------------------------------------------------------------------


def test_the_real_server_starts_is_found_and_leaves(tmp_path: Path) -> None:
    with started(REAL, tmp_path, "--port", "0", API_KEY="secret-of-the-test") as process:
        url = process.url()
        found = asyncio.run(find_server(process.data_dir, timeout_s=30))
        live = httpx2.get(f"{url}/livez", timeout=240)
        refused = httpx2.get(f"{url}/health", timeout=240)
        healthy = health_check(url, "secret-of-the-test")
        locked_out = health_check(url, "another-key")
        process.popen.send_signal(signal.SIGTERM)
        code = process.ended()

    assert found is not None
    assert (found.url, found.token) == (f"{url}/mcp", "secret-of-the-test")
    assert (live.status_code, refused.status_code) == (200, 401)
    assert healthy == ""
    assert locked_out.startswith(f"{url}/readyz: 401")
    assert code == 0
    assert files_in(process.data_dir) == STORED_JOBS
    assert "secret-of-the-test" not in "".join(process.lines)


def health_check(url: str, key: str) -> str:
    """What the health check of the image says: nothing if the server is ready."""
    environment = {**os.environ, "PORT": url.rpartition(":")[2], "API_KEY": key}
    ended = subprocess.run(
        [sys.executable, ROOT / "deploy" / "healthcheck.py"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == (1 if ended.stderr else 0)
    return ended.stderr


def test_a_port_that_is_taken_is_told_in_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with started(REAL, tmp_path, PORT=port) as process:
            code = process.ended()

    assert code == 1
    assert process.lines == [
        f"Cannot listen on 127.0.0.1, port {port} (Address already in use): another program "
        "listens there; stop it, or choose another PORT\n"
    ]


def test_a_second_server_with_the_same_data_folder_is_told_so_in_one_sentence(
    tmp_path: Path,
) -> None:
    with started(FAKE, tmp_path) as first:
        url = first.url()
        with started(REAL, tmp_path) as second:
            code = second.ended()
        with started(FAKE, tmp_path, ENABLE_API="false", ENABLE_MCP="false") as third:
            without_jobs = httpx2.get(f"{third.url()}/v1/jobs", timeout=240).status_code
        jobs = httpx2.get(f"{url}/v1/jobs", timeout=240).json()

    assert code == 2
    assert second.lines == [
        f"Invalid settings: DATA_DIR: {first.data_dir / DATABASE_NAME} is in use by another "
        "process; give this server a separate DATA_DIR, or set ENABLE_API=false\n"
    ]
    assert without_jobs == 404
    assert jobs == {"object": "list", "data": [], "has_more": False}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"HOST": "0.0.0.0"}, "HOST 0.0.0.0 can be reached from other machines: set API_KEY"),
        ({"PORT": "eighty"}, "PORT must be a whole number between 0 and 65535, got 'eighty'"),
    ],
)
def test_settings_that_cannot_be_stop_the_start_with_one_sentence(
    tmp_path: Path, settings: dict[str, str], sentence: str
) -> None:
    with started(REAL, tmp_path, **settings) as process:
        code = process.ended()

    assert code != 0
    (line,) = process.lines
    assert line.startswith(f"Invalid settings: {sentence}")


@pytest.mark.skipif(sys.platform != "linux", reason="others have one loopback address only")
def test_it_listens_where_it_was_told_to(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with started(FAKE, tmp_path, "--port", str(port), HOST="127.0.0.2") as process:
        url = process.url()
        alive = httpx2.get(f"{url}/livez", timeout=240).status_code
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"http://127.0.0.1:{port}/livez", timeout=240)

    assert url == f"http://127.0.0.2:{port}"
    assert alive == 200


def test_it_is_announced_by_its_address_and_not_by_a_name(tmp_path: Path) -> None:
    """Under the name another program can have the other address of the same port."""
    with started(FAKE, tmp_path, HOST="localhost") as process:
        port = urlsplit(process.url()).port
        note = json.loads((process.data_dir / NOTE_NAME).read_text())

    assert note["url"] in (f"http://127.0.0.1:{port}/mcp", f"http://[::1]:{port}/mcp")


def test_a_server_without_mcp_is_not_announced(tmp_path: Path) -> None:
    with started(FAKE, tmp_path, ENABLE_MCP="false") as process:
        url = process.url()
        alive = httpx2.get(f"{url}/livez", timeout=240).status_code

    assert alive == 200
    assert not (process.data_dir / NOTE_NAME).exists()


@pytest.mark.skipif(os.name != "posix", reason="needs modes")
def test_only_a_file_of_settings_that_others_cannot_write_opens_the_server(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    file = tmp_path / ".env"
    file.write_text(f"API_KEY=known\nALLOWED_DIRS={elsewhere}\nRECEIVE_TIMEOUT=7\n")
    file.chmod(0o600)
    with started(FAKE, tmp_path) as process:
        process.heard(f"settings read from {file}")
        asks_for_the_key = httpx2.get(f"{process.url()}/health", timeout=240).status_code == 401
    file.chmod(0o666)
    with started(FAKE, tmp_path) as process:
        process.heard(f"{file} is not read: other users can write to {file} (chmod go-w)")
        status = httpx2.get(f"{process.url()}/health", timeout=240).status_code

    assert asks_for_the_key
    assert status == 200


@pytest.mark.skipif(has_gpu_driver(), reason="this machine has a driver for CUDA")
@pytest.mark.parametrize("script", [REAL, ROOT / "mcp_server.py"])
def test_a_device_without_a_driver_is_refused_at_the_start(tmp_path: Path, script: Path) -> None:
    with started(script, tmp_path, DEVICE="cuda") as process:
        code = process.ended()

    assert code != 0
    (line,) = process.lines
    assert line.startswith("Invalid settings: DEVICE is cuda, and this machine has no driver")


@pytest.mark.skipif(os.name != "posix", reason="needs HOME")
def test_without_a_home_only_what_has_to_be_stored_is_missed(tmp_path: Path) -> None:
    nowhere = {"HOME": "/dev/null/nobody", "DATA_DIR": "", "XDG_DATA_HOME": ""}
    with started(FAKE, tmp_path, **nowhere) as refused:
        code = refused.ended()
    stores_nothing = {"ENABLE_API": "false", "ENABLE_UI": "false"}
    with started(FAKE, tmp_path, **nowhere, **stores_nothing) as without_jobs:
        health = httpx2.get(f"{without_jobs.url()}/health", timeout=240).status_code
        without_jobs.heard("other programs cannot find this server: DATA_DIR /dev/null/")
        without_jobs.heard("there is no usable home folder (HOME: ")

    assert health == 200
    assert code == 2
    assert "need DATA_DIR" in refused.lines[0]
    assert "cannot be written" in refused.lines[-1]
    assert "separate DATA_DIR" in refused.lines[-1]
    assert not any("Traceback" in line for line in [*refused.lines, *without_jobs.lines])


def test_a_page_without_a_place_for_its_files_stops_the_start_in_one_sentence(
    tmp_path: Path,
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "page").write_text("a file")
    with started(FAKE, tmp_path, ENABLE_UI="true", ENABLE_API="false") as refused:
        code = refused.ended()

    assert code == 2
    assert refused.lines == [
        f"Invalid settings: DATA_DIR: {refused.data_dir / 'page'} cannot be written (File exists); "
        "give this server a separate DATA_DIR, or set ENABLE_UI=false\n"
    ]


def test_a_further_server_without_jobs_leaves_the_first_one_findable(tmp_path: Path) -> None:
    with started(FAKE, tmp_path) as first:
        url = first.url()
        with started(FAKE, tmp_path, ENABLE_API="false") as second:
            second.url()
            second.heard(f"other programs join the server at {url}/mcp")
            second.popen.send_signal(signal.SIGTERM)
            code = second.ended()
        found = asyncio.run(find_server(first.data_dir, timeout_s=30))

    assert code == 0
    assert found is not None
    assert found.url == f"{url}/mcp"


def test_over_http_only_the_start_folder_is_open(tmp_path: Path, photo: Path) -> None:
    start = tmp_path / "start"
    start.mkdir()
    (start / "in.png").write_bytes(photo.read_bytes())
    with started(FAKE, start, HOME=str(tmp_path)) as process:
        url = f"{process.url()}/mcp"

        async def view(path: Path) -> dict[str, object]:
            async with MCPClient(url) as client:
                return await client.call_tool("view_image", {"path": str(path)})

        inside = asyncio.run(view(start / "in.png"))
        outside = asyncio.run(view(photo))

    assert inside["status"] == "success"
    assert outside["code"] == "path_not_allowed"


# --- stopping -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)]
)
def test_a_signal_ends_the_running_edit_then_the_server(
    tmp_path: Path, photo: Path, number: signal.Signals, code: int
) -> None:
    with started(FAKE, tmp_path) as process:
        url = process.url()
        edit = Editing(url, photo)
        process.heard("step\n")
        process.popen.send_signal(number)
        found = process.ended()
        edit.join()

    assert found == code
    assert edit.answer is not None
    assert edit.answer.status_code == 503
    assert edit.answer.json()["code"] == "shutting_down"
    assert "retry-after" in edit.answer.headers
    assert files_in(process.data_dir) == STORED_JOBS
    assert files_in(process.data_dir / page_files.FOLDER_NAME) == {"0.lock"}
    assert not any("Traceback" in line for line in process.lines)


BLOCKED = """
import asyncio, logging, sys, time
from step1x_edit.interfaces.process import watch_signals

async def main():
    logging.basicConfig()
    watch_signals(asyncio.get_running_loop().create_future(), float(sys.argv[1]))
    print("blocked", flush=True)
    time.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize(("patience_s", "is_repeated"), [("0.1", False), ("600", True)])
def test_a_signal_that_a_blocked_event_loop_cannot_hear_ends_the_process(
    patience_s: str, is_repeated: bool
) -> None:
    """After a time, or at once with the second one."""
    with subprocess.Popen(
        [sys.executable, "-c", BLOCKED, patience_s], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"blocked\n"
        process.send_signal(signal.SIGTERM)
        for _ in range(300 * is_repeated):  # two that come at the same time may count as one
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
                break
            process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)

    assert process.returncode == 128 + signal.SIGTERM
    assert b"the event loop is blocked" in said


def test_a_signal_that_is_ignored_from_the_start_stays_ignored(tmp_path: Path) -> None:
    """As by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = Process(FAKE, tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    process.url()
    process.popen.send_signal(signal.SIGHUP)
    process.popen.send_signal(signal.SIGINT)

    assert process.ended() == 130  # 0 after a SIGHUP that was heard


def test_a_stored_job_that_a_signal_stops_runs_when_the_server_is_back(
    tmp_path: Path, photo: Path
) -> None:
    with started(FAKE, tmp_path) as process:
        accepted = httpx2.post(
            f"{process.url()}/v1/jobs",
            files={"file": photo.read_bytes()},
            data={"prompt": "x"},
            timeout=240,
        )
        path = accepted.headers["location"]
        with httpx2.stream("GET", f"{process.url()}{path}/events", timeout=240) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            process.heard("step\n")
            process.popen.send_signal(signal.SIGTERM)
            heard = [first, *lines]  # to a proper end, not to a broken connection
        code = process.ended()
    with started(FAKE, tmp_path) as again:
        url = again.url()
        again.heard("step\n")
        job = httpx2.get(f"{url}{path}", timeout=240).json()

    assert code == 0
    assert not any("Traceback" in line or "ERROR" in line for line in process.lines)
    assert heard[0] == "id: 1"
    assert not any("succeeded" in line for line in heard)
    assert job["status"] == "running"


def test_an_accepted_job_is_known_after_a_kill(tmp_path: Path, photo: Path) -> None:
    with started(FAKE, tmp_path) as process:
        jobs = [
            httpx2.post(
                f"{process.url()}/v1/jobs",
                files={"file": photo.read_bytes()},
                data={"prompt": "x"},
                timeout=240,
            )
            for _ in range(2)
        ]
        process.heard("step\n")
        process.popen.kill()
        process.ended()
    with started(FAKE, tmp_path) as again:
        url = again.url()
        again.heard("step\n")
        found = [httpx2.get(f"{url}{job.headers['location']}", timeout=240).json() for job in jobs]

    assert [job["status"] for job in found] == ["failed", "running"]
    assert found[0]["code"] == "interrupted"


def test_a_worker_that_hangs_does_not_keep_the_server(tmp_path: Path, photo: Path) -> None:
    with started(FAKE, tmp_path) as process:
        Editing(process.url(), photo, "hang")
        process.heard("step\n")
        process.popen.send_signal(signal.SIGTERM)

        assert process.ended() == 0


def test_a_pull_from_a_silent_hub_does_not_keep_the_server(tmp_path: Path) -> None:
    with running_hub() as hub:
        weights = {"model_index.json": b"{}", "vae/a.safetensors": bytes(400_000)}
        hub.repos[find_model("v1.2").repos[0]] = weights
        hub.faults["vae/a.safetensors"] = iter([Fault(stall_after=300_000)])
        hub_settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DOWNLOAD_TIMEOUT": "240"}
        with started(FAKE, tmp_path, **hub_settings) as process:
            url = f"{process.url()}/api/models/v1.2/pull"
            with httpx2.stream("POST", url, timeout=240) as stream:
                lines = stream.iter_lines()
                while '"done": 300002' not in next(lines):
                    pass
                process.popen.send_signal(signal.SIGTERM)
                rest = list(lines)  # to a proper end, not to a broken connection
            code = process.ended()

    assert code == 0
    assert not any(line.startswith("event: ") for line in rest)
    assert not any("Traceback" in line or "ERROR" in line for line in process.lines)
    assert {path.name for path in (process.data_dir / "models").iterdir()} >= {"v1.2.partial"}
    assert not (process.data_dir / "models" / "v1.2").exists()


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_client_that_stays_connected_does_not_keep_the_server(
    tmp_path: Path, mode: str
) -> None:
    with started(FAKE, tmp_path) as process:
        url = process.url()
        client = Client(f"{url}/mcp", mode=mode)
        with contextlib.suppress(Exception):  # it may tell that its server has gone
            async with client:
                await client.call_tool("get_gpu_status", {})
                process.popen.send_signal(signal.SIGTERM)
                code = await asyncio.to_thread(process.ended)

    assert code == 0
    assert files_in(process.data_dir) == STORED_JOBS


def test_a_second_signal_ends_the_server_at_once(tmp_path: Path, photo: Path) -> None:
    with started(FAKE, tmp_path) as process:
        url = process.url()
        Editing(url, photo, "hang")
        process.heard("step\n")
        process.popen.send_signal(signal.SIGTERM)
        note = process.data_dir / NOTE_NAME
        until(lambda: not note.exists())  # the first has been heard
        process.popen.send_signal(signal.SIGTERM)

        assert process.ended() == -signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="looks into the process")
def test_a_kill_during_an_upload_leaves_no_file(tmp_path: Path) -> None:
    """The upload is large enough to lie in a file by then; that file has no name."""
    temp = tmp_path / "temp"
    temp.mkdir()
    with started(FAKE, tmp_path, TMPDIR=str(temp)) as process:
        address = urlsplit(process.url())
        before = files_in(temp)
        head = (
            f"POST /api/edit HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: 9000000\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
            'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        )
        assert address.port is not None
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(head.encode() + b"x" * 4_000_000)
            until(lambda: has_file_in(process.popen.pid, temp))
            during = files_in(temp)
            process.popen.kill()
            process.ended()

    assert during == files_in(temp) == before


def test_nothing_that_visitors_sent_is_left_when_a_killed_server_is_started_again(
    tmp_path: Path,
) -> None:
    with started(FAKE, tmp_path) as process:
        answer = httpx2.post(
            f"{process.url()}/gradio_api/upload",
            files={"files": ("a.png", b"a picture")},
            timeout=120,
        )
        process.popen.kill()
        process.ended()
        folder = process.data_dir / page_files.FOLDER_NAME
        left = folder / "0" / Path(answer.json()[0]).relative_to(page_files.SHOWN_FOLDER)
    assert left.read_bytes() == b"a picture"

    with started(FAKE, tmp_path) as process:
        process.url()
        assert files_in(folder) == {"0", "0.lock"}
        assert files_in(folder / "0") == set()


def has_file_in(pid: int, folder: Path) -> bool:
    """Whether a process has a file open in a folder, with a name or without."""
    opened = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
    return any(path.startswith(f"{folder}/") for path in opened)


# --- MCP over HTTP --------------------------------------------------------------------------------


def test_sessions_that_are_left_open_have_a_limit_and_end_by_themselves(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (server.MCP_SESSIONS, server.MCP_IDLE_S) == (1000, 300)
    monkeypatch.setattr(server, "MCP_SESSIONS", 2)
    monkeypatch.setattr(server, "MCP_IDLE_S", 0.5)
    initialize = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {
            "protocolVersion": "2025-06-18",
            "capabilities": {},
            "clientInfo": {"name": "test", "version": "1"},
        },
    }
    headers = {"Accept": "application/json, text/event-stream"}
    with calling(make_service()) as client:

        def opened() -> int:
            return client.post("/mcp", json=initialize, headers=headers).status_code

        until(lambda: opened() == 503)
        until(lambda: opened() == 200)


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_the_tools_are_there_in_both_eras(
    make_service: MakeService, photo: Path, mode: str
) -> None:
    heard: list[str | None] = []

    async def listen(progress: float, total: float | None, message: str | None) -> None:
        heard.append(message)

    with serving(make_service()) as url:
        async with Client(f"{url}/mcp", auth=TOKEN, mode=mode) as client:
            tools = await client.list_tools()
            result = await client.call_tool(
                "edit_image",
                {"image_path": str(photo), "prompt": "x"},
                progress_handler=listen,
            )

    assert {"edit_image", "batch_edit_images", "get_gpu_status"} < {tool.name for tool in tools}
    assert "denoising 1/28" in heard
    assert result.structured_content["status"] == "success"
    assert json.loads(result.content[0].text) == result.structured_content


async def test_tools_that_start_work_are_counted_and_others_are_not(
    make_service: MakeService, photo: Path
) -> None:
    worker = FakeWorker()
    call = {"image_path": str(photo), "prompt": "x", "num_steps": 10}
    with serving(make_service(worker), rate_limit=3) as url:
        async with Client(f"{url}/mcp", auth=TOKEN) as client:
            statuses = [await client.call_tool("get_gpu_status", {}) for _ in range(10)]
            first = await client.call_tool("edit_image", call)
            second = await client.call_tool("edit_image", call, raise_on_error=False)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        posted = httpx2.post(f"{url}/api/edit", headers=headers, timeout=240).status_code

    assert not any(status.is_error for status in statuses)
    assert first.structured_content["status"] == "success"
    assert second.structured_content["code"] == "rate_limited"
    assert second.structured_content["retry_after_s"] > 0
    assert posted == 429  # one limit for every door
    assert worker.started == ["x"]


async def test_the_mcp_answers_to_the_names_that_the_server_is_given(
    make_service: MakeService,
) -> None:
    names = {"allowed_hosts": "pictures.example", "allowed_origins": "https://app.example"}
    headers = {"Authorization": f"Bearer {TOKEN}", "Host": "pictures.example"}
    statuses = []
    with serving(make_service(), **names) as url:
        for origin in ("https://pictures.example", "https://app.example", "https://evil.example"):
            answer = httpx2.post(
                f"{url}/mcp",
                headers={
                    **headers,
                    "Origin": origin,
                    "Accept": "application/json, text/event-stream",
                },
                json={"jsonrpc": "2.0", "id": 1, "method": "ping"},
                timeout=240,
            )
            statuses.append(answer.status_code)

    assert statuses[:2] == [statuses[0]] * 2
    assert statuses[0] not in (401, 403, 421)
    assert statuses[2] == 403


CALLS = """
import asyncio, sys
from fastmcp import Client

async def main(url, token, photo):
    async with Client(url, auth=token) as client:
        await client.call_tool("edit_image", {"image_path": photo, "prompt": "stop"})

asyncio.run(main(*sys.argv[1:]))
"""


async def test_who_vanishes_ends_the_edit_within_a_step(
    make_service: MakeService, photo: Path
) -> None:
    gate, worker = Gate(at_step=2), FakeWorker()
    worker.before_step = gate
    service = make_service(worker)
    with serving(service) as url:
        caller = await asyncio.create_subprocess_exec(
            *[sys.executable, "-c", CALLS, f"{url}/mcp", TOKEN, str(photo)],
            stderr=subprocess.DEVNULL,
        )
        assert await asyncio.to_thread(gate.reached.wait, 60)
        caller.kill()
        await caller.wait()
        await asyncio.to_thread(until, lambda: service.outcomes.get("cancelled") == 1)
        gate.open()
        await service.release()  # runs once the worker is free

    assert worker.stopped_at == {"stop": 2}
