"""Sudden deaths: whatever is killed, files are whole or absent and no process stays behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fastmcp import Client
from fastmcp.client.transports import PythonStdioTransport
from PIL import Image

from extent import by_extent

KILLS = by_extent(8, 25)
HERE = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")


def has_gone(pid: int, within_s: float = 5.0) -> bool:
    """Only its parent can wait for a process; of a stranger we can see no more than its absence."""
    limit = time.monotonic() + within_s
    while time.monotonic() < limit:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def a_life(picture: Path, folder: Path, seconds: float) -> list[Path]:
    """Start a server that edits without a pause, kill it, and return what it said was finished."""
    folder.mkdir()
    paths = os.pathsep.join([str(HERE), *sys.path])
    server = subprocess.Popen(
        [sys.executable, str(HERE / "toy_server.py"), str(picture), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert server.stdout is not None
    worker = int(server.stdout.readline())
    first = server.stdout.readline()

    time.sleep(seconds)  # not for anything: the moment of death is to be any
    server.kill()
    rest = server.stdout.read().splitlines(keepends=True)
    server.wait()

    assert has_gone(worker)
    return [Path(line.rstrip("\n")) for line in [first, *rest] if line.endswith("\n")]


@pytest.mark.timeout(600)
def test_a_server_that_is_killed_while_it_writes_leaves_whole_files_and_nothing_else(
    tmp_path: Path,
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    picture = tmp_path / "photo.png"
    Image.fromarray(pixels).save(picture)
    before = picture.read_bytes()
    moments = random.Random(7)
    folders = [tmp_path / f"life-{number}" for number in range(KILLS)]
    lives = [moments.uniform(0, 0.3) for _ in folders]

    finished = [a_life(picture, *life) for life in zip(folders, lives, strict=True)]

    for folder, told in zip(folders, finished, strict=True):
        found = {*folder.iterdir()}
        assert found >= {*told}, "what it said was finished is there"
        assert len(found) <= len(told) + 1, "one more may have been published but not told"
        for path in found:
            assert path.suffix == ".png", f"{path} was left behind"
            assert np.array_equal(np.asarray(Image.open(path)), 255 - pixels)
    assert picture.read_bytes() == before


def worker_in(folder: Path) -> int:
    """The worker process of the server that was started in this folder."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            is_worker = b"step1x_edit.worker.process" in (entry / "cmdline").read_bytes()
            if is_worker and (entry / "cwd").resolve() == folder.resolve():
                return int(entry.name)
        except OSError:  # it has gone meanwhile
            continue
    raise AssertionError("there is no worker")


@pytest.mark.timeout(300)
@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="needs /proc")
async def test_a_killed_worker_costs_its_client_one_edit(tmp_path: Path) -> None:
    Image.new("RGB", (96, 64), "orange").save(tmp_path / "photo.png")
    transport = PythonStdioTransport(
        HERE.parent / "mcp_server.py",
        python_cmd=sys.executable,
        args=["--standalone"],
        cwd=str(tmp_path),
        env={**os.environ, "MODEL_PATH": "", "DEFAULT_SIZE_LEVEL": "512"},
        keep_alive=False,
    )
    edit = {"image_path": "photo.png", "prompt": "make it night", "num_steps": 10}
    killed: list[int] = []

    async def kill_in_the_middle(progress: float, total: float | None, message: str | None) -> None:
        # Not each step is reported, but the first one is.
        if message == "denoising 1/10" and not killed:
            killed.append(worker_in(tmp_path))
            os.kill(killed[0], signal.SIGKILL)

    async with Client(transport) as client:
        lost = await client.call_tool(
            "edit_image", edit, progress_handler=kill_in_the_middle, raise_on_error=False
        )
        after_it = (await client.call_tool("get_gpu_status", {})).structured_content
        files_then = sorted(path.name for path in tmp_path.iterdir())
        again = await client.call_tool("edit_image", edit)
        second = worker_in(tmp_path)

    assert killed
    assert lost.is_error
    assert lost.structured_content["error"].startswith(
        "Worker process lost: it was ended by SIGKILL"
    )
    assert after_it["gpu_status"]["model_location"] == "Unloaded"
    assert files_then == ["photo.png"]
    assert again.structured_content["status"] == "success"
    assert second not in killed
    assert has_gone(second), "no worker outlives its server"
