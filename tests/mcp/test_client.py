"""MCPClient: plain dictionaries, whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastmcp import FastMCP

from conftest import MakeService
from fakes import FakeWorker, Gate
from http_server import TOKEN, listening, listening_stranger
from step1x_edit import MCPClient

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "mcp_server.py"


@pytest.fixture(autouse=True)
def _start_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def children() -> set[int]:
    """The processes that this one has started and that live."""
    tasks = list(Path(f"/proc/{os.getpid()}/task").glob("*/children"))
    if not tasks:
        pytest.skip("no /proc to look at")
    found: set[int] = set()
    for task in tasks:
        with contextlib.suppress(OSError):  # a thread may end while we look
            found.update(map(int, task.read_text().split()))
    return found


async def test_our_own_server_is_started_with_our_environment_and_leaves_with_us(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GPU_IDLE_TIMEOUT", "300")
    before = children()
    client = MCPClient()
    first, second, unknown = await asyncio.gather(
        client.call_tool("get_gpu_status", {}),
        client.call_tool("edit_image", {"image_path": "no.png", "prompt": "x"}),
        client.call_tool("edit_video", {"video": 1}),
    )
    during = children() - before
    await client.close()

    assert first["gpu_status"]["idle_timeout"] == 300
    assert second == {
        "status": "error",
        "error": "Image file not found: no.png",
        "code": "file_not_found",
    }
    assert unknown["status"] == "error"
    assert unknown["error"] == "Invalid parameter: Unknown tool: 'edit_video'"
    assert len(during) == 1  # calls at the same time share one server
    assert children() == before


def test_threads_and_event_loops_share_one_server() -> None:
    before, client = children(), MCPClient()
    heard: list[int] = []

    async def ask() -> str:
        loop = asyncio.get_running_loop()

        async def listen(progress: float, total: float | None, message: str | None) -> None:
            assert asyncio.get_running_loop() is loop
            heard.append(threading.get_ident())

        answers = [await client.call_tool("get_gpu_status", {}, listen) for _ in range(2)]
        return " ".join(answer["status"] for answer in answers)

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: asyncio.run(ask()), range(8)))
    during = children() - before
    asyncio.run(client.close())

    assert answers == ["success success"] * 8
    assert len(during) == 1
    assert children() == before


async def test_progress_is_told_on_the_loop_of_the_caller(
    make_service: MakeService, photo: Path
) -> None:
    thread, heard = threading.get_ident(), []

    async def listen(progress: float, total: float | None, message: str | None) -> None:
        heard.append(threading.get_ident())

    with listening(make_service()) as url:
        async with MCPClient(url, TOKEN) as client:
            result = await client.call_tool(
                "edit_image", {"image_path": str(photo), "prompt": "x"}, listen
            )

    assert result["status"] == "success"
    assert set(heard) == {thread}


async def test_a_call_that_runs_when_the_client_is_closed_is_told_so(
    make_service: MakeService, photo: Path
) -> None:
    gate, worker = Gate(), FakeWorker()
    worker.before_step = gate
    with listening(make_service(worker)) as url:
        client = MCPClient(url, TOKEN)
        call = asyncio.ensure_future(
            client.call_tool("edit_image", {"image_path": str(photo), "prompt": "x"})
        )
        assert await asyncio.to_thread(gate.reached.wait, 60)
        await client.close()
        result = await asyncio.wait_for(call, 60)
        gate.open()

    assert result["status"] == "error"
    assert "does not answer" in result["error"]


FORKS = """
import asyncio, os
from step1x_edit import MCPClient

client = MCPClient()

def ask():
    return asyncio.run(client.call_tool("get_gpu_status"))["status"]

print(ask(), flush=True)
if not (child := os.fork()):
    print(ask(), flush=True)
    asyncio.run(client.close())
    os._exit(0)
print(os.waitpid(child, 0)[1], ask())
asyncio.run(client.close())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_a_server_of_its_own() -> None:
    result = subprocess.run(
        [sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.stdout.split() == ["success", "success", "0", "success"], result.stderr


async def test_a_server_that_dies_is_told_and_started_anew() -> None:
    before = children()
    async with MCPClient(SERVER) as client:
        await client.call_tool("get_gpu_status")
        (server,) = children() - before
        os.kill(server, signal.SIGKILL)
        died = await client.call_tool("get_gpu_status")
        again = await client.call_tool("get_gpu_status")

    assert died["status"] == "error"
    assert died["error"].startswith(f"Manager not initialized: {SERVER} does not answer (")
    assert again["status"] == "success"


@pytest.mark.parametrize(
    ("target", "token", "beginning"),
    [
        (
            "http://127.0.0.1:9/mcp",
            None,
            "Manager not initialized: http://127.0.0.1:9/mcp does not",
        ),
        ("nowhere.py", None, "Manager not initialized: there is no server at nowhere.py; give"),
        ("quits.py", None, "Manager not initialized: quits.py does not answer ("),
    ],
)
async def test_a_server_that_is_not_there_is_told_in_one_sentence(
    tmp_path: Path, target: str, token: str | None, beginning: str
) -> None:
    (tmp_path / "quits.py").write_text("raise SystemExit('no')")
    async with MCPClient(target, token) as client:
        answer = await client.call_tool("get_gpu_status", {})

    assert answer["status"] == "error"
    assert answer["error"].startswith(beginning)
    assert "\n" not in answer["error"]
    assert len(answer["error"]) <= 500


async def test_a_listening_server_wants_its_token(make_service: MakeService, photo: Path) -> None:
    heard: list[str | None] = []

    async def listen(progress: float, total: float | None, message: str | None) -> None:
        heard.append(message)

    with listening(make_service()) as url:
        async with MCPClient(url, "wrong") as stranger, MCPClient(url, TOKEN) as friend:
            refused = await stranger.call_tool("get_gpu_status", {})
            result = await friend.call_tool(
                "edit_image", {"image_path": str(photo), "prompt": "x"}, on_progress=listen
            )
            picture = await friend.call_tool("view_image", {"path": str(photo)})

    assert refused["status"] == "error"
    assert refused["code"] == "model_unavailable"
    assert Path(result["output_path"]).exists()
    assert "denoising 1/28" in heard
    assert picture["status"] == "success"
    assert picture["content"][0]["mimeType"] == "image/jpeg"


async def test_cancelling_a_call_cancels_the_work(make_service: MakeService, photo: Path) -> None:
    gate, worker = Gate(at_step=2), FakeWorker()
    worker.before_step = gate
    service = make_service(worker)
    with listening(service) as url:
        async with MCPClient(url, TOKEN) as client:
            call = asyncio.ensure_future(
                client.call_tool("edit_image", {"image_path": str(photo), "prompt": "stop"})
            )
            assert await asyncio.to_thread(gate.reached.wait, 60)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await client.call_tool("get_gpu_status", {})  # comes after the cancellation
            gate.open()
            await client.call_tool("release_gpu", {})  # runs once the worker is free

    assert worker.stopped_at == {"stop": 2}


async def test_other_servers_are_understood_as_well() -> None:
    other = FastMCP("other")

    @other.tool
    def add(a: int, b: int) -> int:
        return a + b

    @other.tool
    def fail() -> str:
        raise ValueError("no\nway")

    with listening_stranger(other) as url:
        async with MCPClient(url, TOKEN) as client:
            added = await client.call_tool("add", {"a": 1, "b": 2})
            failed = await client.call_tool("fail", {})

    assert added == {"result": 3}
    assert failed["status"] == "error"
    assert "no way" in failed["error"]


LEAVES = """
import asyncio
from step1x_edit import MCPClient

client = MCPClient()

async def main():
    print((await client.call_tool("get_gpu_status", {}))["status"])

asyncio.run(main())
asyncio.run(main())  # in another event loop, with the same server
"""


def test_leaving_without_closing_neither_hangs_nor_leaves_a_process(tmp_path: Path) -> None:
    before = _servers()
    result = subprocess.run(
        [sys.executable, "-c", LEAVES], capture_output=True, text=True, timeout=240, check=False
    )

    assert result.stdout.split() == ["success", "success"]
    assert result.returncode == 0
    assert "Traceback" not in result.stderr
    assert _servers() <= before


def _servers() -> set[str]:
    """The processes that serve MCP for one of our clients, by number.

    Tests that run beside these ones have another data folder.
    """
    ours = os.environ["DATA_DIR"].encode()
    found = set()
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            is_server = b"step1x_edit.interfaces.cli\0mcp" in line.read_bytes()
            if is_server and ours in line.with_name("environ").read_bytes():
                found.add(line.parent.name)
    return found
