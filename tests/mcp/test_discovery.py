"""One model per machine: a running server is found and joined, and nothing else is."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastmcp import Client, FastMCP
from fastmcp.client.transports import StdioTransport
from mcp_types import BlobResourceContents, ImageContent, PromptReference
from PIL import Image

from conftest import MakeService
from fakes import FakeWorker, Gate
from http_server import SECRET, TOKEN, announcing, listening, listening_stranger
from mcp_answers import answer_of, text_in, text_of
from step1x_edit.channel import EditJob
from step1x_edit.interfaces.discovery import (
    NOTE_NAME,
    announced,
    find_server,
    proof,
    start_of_process,
)
from step1x_edit.interfaces.mcp.client import OWN_SERVER
from step1x_edit.interfaces.mcp.server import build_mcp

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "mcp_server.py"


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> int:
    """A living process that is not the one that searches: a server never joins itself."""
    monkeypatch.setattr("os.getpid", os.getppid)
    return os.getppid()


@pytest.fixture
def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# --- finding --------------------------------------------------------------------------------------


def test_an_announcement_is_private_whole_and_gone_at_the_end(data_dir: Path) -> None:
    note = data_dir / NOTE_NAME
    with announced(data_dir, "http://127.0.0.1:8000/mcp", SECRET, TOKEN):
        content = json.loads(note.read_text())
        modes = (note.stat().st_mode & 0o777, data_dir.stat().st_mode & 0o777)

    assert content == {
        "url": "http://127.0.0.1:8000/mcp",
        "pid": os.getpid(),
        "secret": SECRET,
        "started": start_of_process(os.getpid()),
        "token": TOKEN,
    }
    assert modes == (0o600, 0o700)
    assert list(data_dir.iterdir()) == []


def test_the_announcement_of_the_first_server_is_left_alone(data_dir: Path) -> None:
    note = data_dir / NOTE_NAME
    with announced(data_dir, "http://127.0.0.1:8000/mcp", SECRET):
        with announced(data_dir, "http://127.0.0.1:8001/mcp", SECRET):
            while_both_run = json.loads(note.read_text())
        after_the_second = json.loads(note.read_text())

    assert while_both_run["url"] == "http://127.0.0.1:8000/mcp"
    assert after_the_second == while_both_run
    assert not note.exists()


def test_the_announcement_of_a_dead_server_is_replaced(data_dir: Path, gone: int) -> None:
    note = data_dir / NOTE_NAME
    with announced(data_dir, "http://127.0.0.1:8000/mcp", SECRET):
        left = json.loads(note.read_text())
    for stale in ({"pid": gone}, {"started": "long ago"}):  # the number may live again
        note.write_text(json.dumps(left | stale))
        note.chmod(0o600)
        with announced(data_dir, "http://127.0.0.1:8001/mcp", SECRET):
            assert json.loads(note.read_text())["url"] == "http://127.0.0.1:8001/mcp"


def test_a_note_without_the_start_of_its_process_does_not_stop_later_servers(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("step1x_edit.interfaces.discovery.start_of_process", lambda pid: None)
    note = data_dir / NOTE_NAME
    with announced(data_dir, "http://127.0.0.1:8000/mcp", SECRET):
        left = note.read_text()  # as a killed server leaves it on Windows, which has no `ps`
    note.write_text(left)
    note.chmod(0o600)

    with announced(data_dir, "http://127.0.0.1:8001/mcp", SECRET):
        assert json.loads(note.read_text())["url"] == "http://127.0.0.1:8001/mcp"


def test_a_server_that_cannot_announce_itself_says_so_and_serves(
    data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data_dir.write_text("a file")
    with announced(data_dir, "http://127.0.0.1:8000/mcp", SECRET):
        assert "other programs cannot find this server: DATA_DIR" in caplog.text


def test_two_processes_start_apart_though_they_share_a_number() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert start_of_process(other.pid) == start_of_process(other.pid) is not None
        assert start_of_process(other.pid) != start_of_process(os.getpid())


async def test_a_server_that_announces_itself_is_found(
    make_service: MakeService, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with announcing(make_service(), data_dir) as url:
        own = await find_server(data_dir)
        monkeypatch.setattr("os.getpid", os.getppid)
        found = await find_server(data_dir)

    assert own is None  # a server does not join itself
    assert found is not None
    assert (found.url, found.token) == (url, TOKEN)


async def test_a_damaged_announcement_is_ignored(data_dir: Path) -> None:
    data_dir.mkdir()
    for content in ("", "[" * 60_000, "{", "5"):
        (data_dir / NOTE_NAME).write_text(content)
        (data_dir / NOTE_NAME).chmod(0o600)
        assert await find_server(data_dir) is None


@pytest.mark.usefixtures("parent")
async def test_a_stale_or_foreign_announcement_is_ignored(
    make_service: MakeService, data_dir: Path, gone: int
) -> None:
    data_dir.mkdir()
    note = data_dir / NOTE_NAME
    with (
        listening(make_service()) as url,
        listening_stranger(FastMCP("something else")) as other,
        socket.socket() as silent,
    ):
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        mute = f"http://127.0.0.1:{silent.getsockname()[1]}/mcp"
        good = {
            "url": url,
            "pid": 1,
            "secret": SECRET,
            "started": start_of_process(1),
            "token": TOKEN,
        }
        for content, mode in [
            (good | {"pid": gone}, 0o600),
            (good | {"started": "long ago"}, 0o600),
            (good | {"started": None}, 0o600),
            (good | {"secret": "wrong"}, 0o600),
            (good | {"token": "wrong"}, 0o600),
            (good | {"token": None}, 0o600),
            (good | {"url": other}, 0o600),
            (good | {"url": mute}, 0o600),
            (good | {"url": "http://127.0.0.1:9/mcp"}, 0o600),
            (good | {"url": "http://example.com/mcp"}, 0o600),
            (good | {"url": 7}, 0o600),
            ({}, 0o600),
            (good, 0o644),
        ]:
            note.write_text(json.dumps(content))
            note.chmod(mode)
            found = await asyncio.wait_for(find_server(data_dir, timeout_s=0.5), 60)
            assert found is None, content
        note.write_text("{")
        assert await find_server(data_dir) is None
        note.unlink()
        assert await find_server(data_dir) is None
        elsewhere = data_dir / "elsewhere"
        elsewhere.write_text(json.dumps(good))
        elsewhere.chmod(0o600)
        note.symlink_to(elsewhere)
        assert await find_server(data_dir) is None
        note.unlink()
        elsewhere.rename(note)
        assert await find_server(data_dir) is not None  # nothing but the above was wrong


class Foreigner(socketserver.ThreadingTCPServer):
    """A listener that is not ours and keeps what it is sent; `answer` is what it says to that."""

    daemon_threads = True

    def __init__(self, answer: Callable[[bytes], bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Recorder)
        self.answer = answer
        self.heard: list[bytes] = []

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _Recorder(socketserver.BaseRequestHandler):
    server: Foreigner

    def handle(self) -> None:
        while sent := self.request.recv(1 << 16):
            self.server.heard.append(sent)
            self.request.sendall(self.server.answer(sent))


@contextlib.contextmanager
def foreign_listener(answer: Callable[[bytes], bytes]) -> Iterator[Foreigner]:
    with Foreigner(answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def livez(shown: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\nX-Proof: {shown}\r\nContent-Length: 3\r\n\r\nok\n".encode()


def passed_on(url: str) -> Callable[[bytes], bytes]:
    """What a listener answers that asks a server of ours what it has been asked itself."""

    def ask(sent: bytes) -> bytes:
        path = sent.split(b" ")[1].decode()
        return livez(
            httpx2.get(f"{url.removesuffix('/mcp')}{path}", timeout=240).headers["x-proof"]
        )

    return ask


@pytest.mark.parametrize("kind", ["mute", "plain", "wrong", "passed on"])
def test_a_foreign_listener_at_the_port_of_a_dead_server_gets_no_key(
    make_service: MakeService, data_dir: Path, kind: str
) -> None:
    answers: dict[str, Callable[[bytes], bytes]] = {
        "mute": lambda sent: b"",
        "plain": lambda sent: b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n",
        "wrong": lambda sent: livez(proof("another secret", "nonce", 8000)),
    }
    with (
        listening(make_service()) as url,  # which knows the secret, but listens elsewhere
        foreign_listener(answers.get(kind, passed_on(url))) as foreigner,
        announced(data_dir, f"http://127.0.0.1:{foreigner.port}/mcp", SECRET, TOKEN),
    ):
        status = subprocess.run(
            [sys.executable, "-m", "step1x_edit.interfaces.cli", "status", "--json"],
            env={**os.environ, "DATA_DIR": str(data_dir)},
            capture_output=True,
            timeout=60,
            check=False,
        )

    assert status.returncode == 0, status.stderr
    sent = b"".join(foreigner.heard)
    assert sent.startswith(b"GET /livez?nonce=")
    assert TOKEN.encode() not in sent
    assert b"authorization" not in sent.lower()


# --- joining --------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def joined(
    folder: Path,
    data_dir: Path,
    *flags: str,
    command: tuple[str, ...] = (str(SERVER),),
    mode: Any = "auto",
) -> AsyncIterator[Client[Any]]:
    """A client of a stdio server that was started in `folder`."""
    folder.mkdir(exist_ok=True)
    transport = StdioTransport(
        sys.executable,
        [*command, *flags],
        cwd=str(folder),
        env={
            **os.environ,
            "DATA_DIR": str(data_dir),
            "HOME": str(folder),
            "http_proxy": "http://127.0.0.1:9",  # which must not be asked for this machine
        },
        keep_alive=False,
    )
    async with Client(transport, mode=mode) as client:
        yield client


def start_server(folder: Path, data_dir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SERVER)],
        cwd=folder,
        env={**os.environ, "DATA_DIR": str(data_dir)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


async def test_two_stdio_servers_and_rest_share_the_one_model_of_a_running_server(
    make_service: MakeService, data_dir: Path, photo: Path, tmp_path: Path
) -> None:
    worker = FakeWorker()
    service = make_service(worker)
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "mine.png").write_bytes(photo.read_bytes())
        Image.new("L", (64, 48), 255).save(folder / "all.png")
    with announcing(service, data_dir) as url:
        async with (
            joined(first, data_dir) as one,
            joined(second, data_dir, mode="legacy") as other,
            httpx2.AsyncClient(headers={"Authorization": f"Bearer {TOKEN}"}, timeout=240) as rest,
        ):
            *results, sent = await asyncio.gather(
                one.call_tool(
                    "edit_image", {"image_path": "mine.png", "prompt": "a", "mask_path": "all.png"}
                ),
                other.call_tool(
                    "edit_image",
                    {"image_path": "~/mine.png", "prompt": "b", "mask_path": "~/all.png"},
                ),
                rest.post(
                    url.replace("/mcp", "/api/edit"),
                    files={"file": photo.read_bytes()},
                    data={"prompt": "d"},
                ),
            )
            batch = await other.call_tool(
                "batch_edit_images",
                {
                    "image_paths": json.dumps(["mine.png", "no.png"]),
                    "prompts": "c",
                    "output_dir": "new",
                },
            )
            unmasked = await one.call_tool(
                "edit_image",
                {"image_path": "mine.png", "prompt": "e", "mask_path": "no.png"},
                raise_on_error=False,
            )
            viewed = await one.call_tool("view_image", {"path": (first / "mine.png").as_uri()})
            (read,) = await one.read_resource((first / "mine.png").as_uri())

    assert [answer_of(result)["output_path"] for result in results] == [
        str(first / "mine_edited.png"),
        str(second / "mine_edited.png"),
    ]
    assert [answer_of(r)["metadata"]["changed_share"] for r in results] == [1, 1]
    assert answer_of(unmasked)["error"] == "Image file not found: no.png"
    answer = answer_of(batch)
    assert answer["results"][0]["result"]["output_path"] == str(second / "new" / "mine_edited.png")
    assert [item["input"] for item in answer["results"]] == ["mine.png", "no.png"]
    assert answer["results"][1]["result"]["error"] == "Image file not found: no.png"
    assert json.loads(text_of(batch)) == answer
    image = viewed.content[0]
    assert isinstance(image, ImageContent)
    assert image.mime_type == "image/jpeg"
    assert isinstance(read, BlobResourceContents)
    assert base64.b64decode(read.blob) == photo.read_bytes()
    assert sent.status_code == 200
    assert sorted(worker.started) == ["a", "b", "c", "d"]
    assert service.status().gpu_status.statistics.total_loads == 1


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_everything_comes_through_a_joined_server(
    make_service: MakeService, data_dir: Path, photo: Path, tmp_path: Path, mode: Any
) -> None:
    gate, worker, first_step_heard = Gate(at_step=3), FakeWorker(), threading.Event()

    def before_step(job: EditJob, step: int) -> None:
        if job.prompt == "stop":
            gate(job, step)
        elif step == 2:  # progress goes beside the answer, which must not overtake it
            assert first_step_heard.wait(60)

    worker.before_step = before_step
    service = make_service(worker)
    heard: list[tuple[float, float | None, str | None]] = []

    async def listen(progress: float, total: float | None, message: str | None) -> None:
        heard.append((progress, total, message))
        if message == "denoising 1/10":
            first_step_heard.set()

    reference = PromptReference(type="ref/prompt", name="restyle")
    with announcing(service, data_dir):
        async with Client(build_mcp(service)) as direct:
            tools = await direct.list_tools()
            instructions = direct.instructions
        async with joined(tmp_path, data_dir, mode=mode) as client:
            assert client.server_info is not None
            said = (client.instructions, client.server_info.name)
            joined_tools = await client.list_tools()
            resource = await client.read_resource("step1x://gpu/status")
            prompts = await client.list_prompts()
            completion = await client.complete(reference, {"name": "style", "value": "mosaic"})
            result = await client.call_tool(
                "edit_image",
                {"image_path": photo.name, "prompt": "go", "num_steps": 10},
                progress_handler=listen,
            )
            bad = await client.call_tool(
                "edit_image", {"image_path": "no.png", "prompt": "x"}, raise_on_error=False
            )
            call = asyncio.ensure_future(
                client.call_tool("edit_image", {"image_path": photo.name, "prompt": "stop"})
            )
            assert await asyncio.to_thread(gate.reached.wait, 60)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await client.call_tool("get_gpu_status", {})  # comes after the cancellation
            gate.open()
            await client.call_tool("release_gpu", {})  # runs once the worker is free

    assert said == (instructions, "step1x-edit")
    assert [tool.model_dump() for tool in joined_tools] == [tool.model_dump() for tool in tools]
    assert json.loads(text_in(resource[0]))["status"] == "success"
    assert len(prompts) == 3
    assert completion.values == ["a mosaic"]
    assert [block.type for block in result.content] == ["text", "image", "resource_link"]
    numbers = [progress for progress, _, _ in heard]
    assert all(later > earlier for earlier, later in pairwise(numbers))
    assert "denoising 1/10" in [message for _, _, message in heard]
    assert bad.is_error
    assert answer_of(bad)["error"] == "Image file not found: no.png"
    assert worker.stopped_at == {"stop": 3}


@pytest.mark.parametrize("end", ["eof", "SIGTERM"])
async def test_what_a_joined_server_had_asked_for_ends_with_it(
    make_service: MakeService, data_dir: Path, photo: Path, tmp_path: Path, end: str
) -> None:
    gate, worker = Gate(at_step=2), FakeWorker()
    worker.before_step = gate
    service = make_service(worker)
    with announcing(service, data_dir):
        process = start_server(tmp_path, data_dir)
        assert process.stdin is not None
        arguments = {"image_path": photo.name, "prompt": "x"}
        for message in (
            {
                "id": 1,
                "method": "initialize",
                "params": {
                    "protocolVersion": "2025-11-25",
                    "capabilities": {},
                    "clientInfo": {"name": "test", "version": "1"},
                },
            },
            {"method": "notifications/initialized"},
            {
                "id": 2,
                "method": "tools/call",
                "params": {"name": "edit_image", "arguments": arguments},
            },
        ):
            process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
        process.stdin.flush()
        assert await asyncio.to_thread(gate.reached.wait, 60)
        if end == "eof":
            process.stdin.close()
        else:
            process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 60) == 0
        gate.open()
        await service.release()  # runs once the worker is free

    assert worker.stopped_at == {"x": 2}


async def test_a_joined_server_that_has_gone_is_told_in_one_sentence(
    make_service: MakeService, data_dir: Path, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as running:
        running.enter_context(announcing(make_service(), data_dir))
        async with joined(tmp_path, data_dir) as client:
            running.close()
            results = [await client.call_tool("get_gpu_status", {}, raise_on_error=False)]
            results += [await client.call_tool("offload_gpu", {}, raise_on_error=False)]

    for result in results:
        assert result.is_error
        assert answer_of(result)["code"] == "model_unavailable"
        error = answer_of(result)["error"]
        assert error.startswith("Manager not initialized: the joined server")


@pytest.mark.parametrize("command", [(str(SERVER),), OWN_SERVER], ids=["script", "command"])
async def test_standalone_joins_nobody(
    make_service: MakeService, data_dir: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    service = make_service(gpu_idle_timeout=77)
    with announcing(service, data_dir):
        async with joined(tmp_path, data_dir, "--standalone", command=command) as client:
            status = await client.call_tool("get_gpu_status", {})

    assert answer_of(status)["gpu_status"]["idle_timeout"] == 60
