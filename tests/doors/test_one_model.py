"""One model for all clients on this machine: real processes, the real demo model, several doors."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from fastmcp import Client
from fastmcp.client.transports import StdioTransport, StreamableHttpTransport
from PIL import Image
from test_demo_edits import PROMPTS, distance, read

from demo_data import EDITS, HELD_OUT_PHOTOS, load_photo
from http_server import until
from step1x_edit.interfaces.discovery import NOTE_NAME

ROOT = Path(__file__).parents[2]
QUICK = {"size_level": 512, "num_steps": 10, "seed": 11}


def environment(data_dir: Path) -> dict[str, str]:
    settings = {"DATA_DIR": str(data_dir), "HOST": "127.0.0.1", "PORT": "0", "MODEL_PATH": ""}
    return {**os.environ, **settings}


def stdio_server(folder: Path, data_dir: Path, mode: Any) -> Client[StdioTransport]:
    transport = StdioTransport(
        sys.executable,
        [str(ROOT / "mcp_server.py")],
        cwd=str(folder),
        env=environment(data_dir),
        keep_alive=False,
    )
    return Client(transport, mode=mode)


def commands() -> dict[int, tuple[int, str]]:
    """The parent and the command of each process."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it has ended meanwhile
                continue
            found[int(folder.name)] = (parent, command)
    return found


def below(ancestor: int) -> list[str]:
    """The commands of all processes that a process has started, and those have."""
    processes, found, parents = commands(), [], {ancestor}
    while parents:
        children = {pid for pid, (parent, _) in processes.items() if parent in parents}
        found += [processes[pid][1] for pid in children]
        parents = children
    return found


def nearest_edit(after: Any, before: Any) -> str:
    """The name of the edit whose classical form is closest."""
    return min(EDITS, key=lambda name: distance(after, EDITS[name](before)))


@pytest.mark.timeout(600)  # imports torch
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells who has started what")
async def test_two_stdio_servers_http_and_rest_share_one_worker_and_one_model(
    tmp_path: Path,
) -> None:
    before = load_photo(*HELD_OUT_PHOTOS["coffee"])
    photo = tmp_path / "coffee.png"
    Image.fromarray((before * 255 + 0.5).astype(np.uint8)).save(photo)
    data_dir = tmp_path / "data"
    server = subprocess.Popen(  # noqa: ASYNC220 - returns at once
        [sys.executable, str(ROOT / "unified_server.py")],
        cwd=tmp_path,
        env=environment(data_dir),
        stderr=subprocess.DEVNULL,
    )
    try:
        note = data_dir / NOTE_NAME
        await asyncio.to_thread(until, note.exists)
        url = json.loads(note.read_text())["url"]

        def asked(name: str) -> dict[str, Any]:
            output = {"output_path": f"{name}.png"}
            return {"image_path": "coffee.png", "prompt": PROMPTS[name], **QUICK, **output}

        async with (
            stdio_server(tmp_path, data_dir, "auto") as one,
            stdio_server(tmp_path, data_dir, "legacy") as other,
            Client(StreamableHttpTransport(url)) as direct,
            httpx2.AsyncClient(timeout=300, trust_env=False) as rest,
        ):
            *results, sent, again = await asyncio.gather(
                one.call_tool("edit_image", asked("bw")),
                other.call_tool("edit_image", asked("invert")),
                direct.call_tool("edit_image", asked("night")),
                *(
                    rest.post(
                        url.replace("/mcp", "/api/edit"),
                        files={"file": photo.read_bytes()},
                        data={"prompt": PROMPTS[name], **{k: str(v) for k, v in QUICK.items()}},
                    )
                    for name in ("sepia", "bw")
                ),
            )
            stati = [
                (await client.call_tool("get_gpu_status", {})).structured_content["gpu_status"]
                for client in (one, other, direct)
            ]
            ours = below(os.getpid())
    finally:
        server.terminate()
        server.wait(60)

    for name, result in zip(["bw", "invert", "night"], results, strict=True):
        answer = result.structured_content
        assert answer["output_path"] == str(tmp_path / f"{name}.png")
        assert nearest_edit(read(Path(answer["output_path"])), before) == name
    assert nearest_edit(read(io.BytesIO(sent.content)), before) == "sepia"
    by_stdio, by_rest = (read(f) for f in (tmp_path / "bw.png", io.BytesIO(again.content)))
    assert np.array_equal(by_stdio, by_rest)
    assert [status["statistics"]["total_loads"] for status in stati] == [1, 1, 1]
    workers = [command for command in ours if "step1x_edit.worker.process" in command]
    servers = [command for command in ours if "mcp_server.py" in command]
    assert (len(workers), len(servers)) == (1, 2)
