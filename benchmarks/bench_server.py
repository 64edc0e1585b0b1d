"""Edits per second through each interface of the server, and its latency meanwhile.

    python benchmarks/bench_server.py [--clients 1,8,64] [--edits 12] [--num-steps 10]

First the pipeline alone, then the server in a separate process with the demo checkpoint: for each
interface (POST /api/edit, edit_image over MCP, stored jobs) and number of clients, each client
repeatedly edits a picture of 512 until n edits are done in total; the rest is cancelled. Meanwhile
the status, the health and the page are requested 20 times a second. Bound by the network: one edit
runs at a time, so more clients do not raise the throughput, they only wait longer. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

# The pipeline called directly must have threads that spin as long as those of the worker.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import httpx2
from fastmcp import Client

from step1x_edit.checkpoints.read import read_checkpoint
from step1x_edit.model.request import NetworkRequest
from step1x_edit.pictures.images import decode
from step1x_edit.settings import Limits, inherited_environment

ROOT = Path(__file__).parent.parent
PHOTO = ROOT / "src" / "step1x_edit" / "interfaces" / "assets" / "coffee.jpg"
PROMPT = "change to night scene"
SIZE = 512
PROBES = {"status": "/api/gpu/status", "health": "/health", "page": "/"}
PROBE_PAUSE_S = 0.05
PATIENCE_S = 600

Edit = Callable[[], Awaitable[None]]
"""One edit through an interface, from the picture in the client's memory to the result there."""

NUMBERS = count()


def alone(num_steps: int, edits: int) -> float:
    """Edits per second of the pipeline, called directly."""
    pipeline = read_checkpoint().pipeline
    picture = decode(PHOTO.read_bytes(), Limits(2**25, 50_000_000)).pixels
    request = NetworkRequest(picture, PROMPT, num_steps=num_steps, size_level=SIZE)
    list(pipeline.edit(request))
    started = time.perf_counter()
    for _ in range(edits):
        list(pipeline.edit(request))
    return edits / (time.perf_counter() - started)


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """The unified server, and its address."""
    settings = {
        "PORT": "0",
        "DATA_DIR": str(folder / "data"),
        "ALLOWED_DIRS": f"{PHOTO.parent}{os.pathsep}{folder}",
        "MAX_QUEUE": "256",
        "RATE_LIMIT": "0",
        "MODEL_PATH": "",
        # As the pipeline alone, which keeps nothing; all edits are of one picture.
        "ARITHMETIC": "fp32",
        "EDIT_CACHE_MB": "0",
    }
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "unified_server.py")],
        env=inherited_environment(**settings),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "serving at " in line:
                threading.Thread(target=process.stderr.read, daemon=True).start()
                yield line.rpartition(" ")[2].strip()
                break
        else:
            raise RuntimeError("the server did not start")
    finally:
        process.terminate()
        process.wait()


# --- the interfaces ------------------------------------------------------------------------------


def form(num_steps: int) -> dict[str, Any]:
    return {
        "files": {"file": (PHOTO.name, PHOTO.read_bytes())},
        "data": {"prompt": PROMPT, "num_steps": str(num_steps), "size_level": str(SIZE)},
    }


@contextlib.asynccontextmanager
async def rest(url: str, num_steps: int, folder: Path) -> AsyncIterator[Edit]:
    async with http(url) as client:

        async def edit() -> None:
            answer = await client.post("/api/edit", **form(num_steps))
            answer.raise_for_status()

        yield edit


@contextlib.asynccontextmanager
async def mcp(url: str, num_steps: int, folder: Path) -> AsyncIterator[Edit]:
    async with Client(f"{url}/mcp") as client:

        async def edit() -> None:
            arguments = {
                "image_path": str(PHOTO),
                "output_path": str(folder / f"{next(NUMBERS)}.png"),
                "prompt": PROMPT,
                "num_steps": num_steps,
                "size_level": SIZE,
            }
            await client.call_tool("edit_image", arguments)

        yield edit


@contextlib.asynccontextmanager
async def jobs(url: str, num_steps: int, folder: Path) -> AsyncIterator[Edit]:
    async with http(url) as client:

        async def edit() -> None:
            answer = await client.post("/v1/jobs", **form(num_steps))
            answer.raise_for_status()
            job = f"/v1/jobs/{answer.json()['id']}"
            try:
                await client.get(f"{job}/events")  # the stream ends with the job
                (await client.get(f"{job}/content")).raise_for_status()
            except asyncio.CancelledError:
                await asyncio.shield(client.post(f"{job}/cancel"))
                raise

        yield edit


DOORS = {"rest": rest, "mcp": mcp, "jobs": jobs}


def http(url: str) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False)


# --- measuring ------------------------------------------------------------------------------------


async def probe(url: str, found: dict[str, list[float]]) -> None:
    """Request, again and again, what must be answered at once."""
    async with http(url) as client:
        while True:
            for name, path in PROBES.items():
                started = time.perf_counter()
                (await client.get(path)).raise_for_status()
                found[name].append(time.perf_counter() - started)
            await asyncio.sleep(PROBE_PAUSE_S)


async def crowd(
    url: str, door: str, clients: int, edits: int, num_steps: int, folder: Path
) -> dict[str, Any]:
    """Run this many clients on one interface until this many edits are done."""
    seconds: list[float] = []
    probed: dict[str, list[float]] = defaultdict(list)
    is_done = asyncio.Event()

    async def client(edit: Edit) -> None:
        while True:
            started = time.perf_counter()
            await edit()
            seconds.append(time.perf_counter() - started)
            if len(seconds) >= edits:
                is_done.set()

    async with contextlib.AsyncExitStack() as stack:
        opened = [
            await stack.enter_async_context(DOORS[door](url, num_steps, folder))
            for _ in range(clients)
        ]
        started = time.perf_counter()
        working = [asyncio.ensure_future(client(edit)) for edit in opened]
        working.append(asyncio.ensure_future(probe(url, probed)))
        done = asyncio.ensure_future(is_done.wait())
        await asyncio.wait([*working, done], return_when=asyncio.FIRST_COMPLETED)
        took = time.perf_counter() - started
        for task in (*working, done):
            if task.done() and task is not done:
                task.result()  # it has failed: clients and probes never end
            task.cancel()
        await asyncio.gather(*working, done, return_exceptions=True)
    return {
        "edits_per_s": round(edits / took, 3),
        "edit_s": spread(seconds, 1, 2),
        **{f"{name}_ms": spread(values, 1000, 1) for name, values in probed.items()},
    }


async def settled(url: str) -> None:
    """Wait until cancelled jobs have left the queue."""
    async with http(url) as client:
        while True:
            listed = (await client.get("/v1/jobs", params={"limit": 100})).json()["data"]
            if all(job["status"] not in ("queued", "running") for job in listed):
                break
            await asyncio.sleep(0.1)
        (await client.post("/api/gpu/offload")).raise_for_status()  # waits for the running edit


def spread(values: list[float], scale: float, digits: int) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50": round(scale * statistics.median(ordered), digits),
        "p99": round(scale * ordered[math.ceil(0.99 * len(ordered)) - 1], digits),
    }


async def measure(arguments: argparse.Namespace, url: str, folder: Path) -> dict[str, Any]:
    numbers = [int(number) for number in arguments.clients.split(",")]
    async with rest(url, arguments.num_steps, folder) as edit:
        await edit()  # loads the model
    found: dict[str, Any] = {}
    for door in DOORS:
        for clients in numbers:
            cell = await crowd(url, door, clients, arguments.edits, arguments.num_steps, folder)
            await settled(url)
            found[f"{door}x{clients}"] = cell
            print(f"{door:4} {clients:2} clients: {cell}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--edits", type=int, default=12)
    parser.add_argument("--num-steps", type=int, default=10)
    arguments = parser.parse_args()
    base = alone(arguments.num_steps, arguments.edits)
    print(f"pipeline alone: {base:.3f} edits per second", flush=True)
    with tempfile.TemporaryDirectory() as name, server(Path(name)) as url:
        found = asyncio.run(measure(arguments, url, Path(name)))
    for cell in found.values():
        cell["share_of_pipeline"] = round(cell["edits_per_s"] / base, 3)
    print(
        json.dumps(
            {
                "size": SIZE,
                "num_steps": arguments.num_steps,
                "pipeline_edits_per_s": round(base, 3),
                "doors": found,
                "cores": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main()
