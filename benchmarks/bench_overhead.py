"""The overhead of an edit besides the network: through the service, and through MCP over stdio.

    python benchmarks/bench_overhead.py [--size 512] [--num-steps 28] [--repeat 7]

Three ways to the same picture alternate, so that other load affects them equally: the pipeline
called directly, the service with its worker process, an MCP client of `mcp_server.py`. The latter
two are bound by decoding and encoding the file, fsync, and sending the picture through the pipe and
back. Then the latency of the status during an edit, the time until the worker is free after a
cancel, and the time a picture takes through the pipe. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

# The pipeline called directly must have threads that spin as long as those of the worker.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import numpy as np
from fastmcp import Client
from fastmcp.client.transports import PythonStdioTransport

from step1x_edit.channel import Channel, EditJob, Phase, Start
from step1x_edit.checkpoints.read import read_checkpoint
from step1x_edit.engine.engine import Engine
from step1x_edit.engine.worker_process import WorkerProcess
from step1x_edit.model.pipeline import EditPipeline
from step1x_edit.model.request import NetworkRequest
from step1x_edit.pictures.images import decode
from step1x_edit.service.file_edits import FileEdits
from step1x_edit.service.service import EditService
from step1x_edit.service.wiring import build_service
from step1x_edit.settings import Limits, inherited_environment, load_settings

ROOT = Path(__file__).parent.parent
PHOTO = ROOT / "src" / "step1x_edit" / "interfaces" / "assets" / "coffee.jpg"
PROMPT = "change to night scene"


def directly(pipeline: EditPipeline, picture: np.ndarray, parameters: dict[str, Any]) -> float:
    """The pipeline alone, on a picture in memory."""
    started = time.perf_counter()
    list(pipeline.edit(NetworkRequest(picture, PROMPT, **parameters)))
    return time.perf_counter() - started


async def through_service(service: EditService, arguments: dict[str, Any]) -> float:
    started = time.perf_counter()
    await FileEdits(service, service.files).edit(service.read_edit(arguments))
    return time.perf_counter() - started


async def through_mcp(client: Client[Any], arguments: dict[str, Any]) -> float:
    started = time.perf_counter()
    await client.call_tool("edit_image", arguments)
    return time.perf_counter() - started


async def status_latency(client: Client[Any], arguments: dict[str, Any]) -> list[float]:
    """The latency of `get_gpu_status`, called 20 times a second during an edit."""
    edit = asyncio.ensure_future(client.call_tool("edit_image", arguments))
    found = []
    while not edit.done():
        started = time.perf_counter()
        await client.call_tool("get_gpu_status", {})
        found.append(time.perf_counter() - started)
        await asyncio.sleep(0.05)
    await edit
    return found


async def freed_after_cancel(picture: np.ndarray, repeat: int = 5) -> dict[str, float]:
    """Seconds from a cancel to a free worker, the worst of several per phase; and of one step."""
    engine = Engine(partial(WorkerProcess, Start()))
    job = EditJob(picture, PROMPT, "", 28, 6.0, 1024, seed=0)
    steps: list[float] = []
    last = 0.0
    async for event in engine.submit(job).events():
        now = time.perf_counter()
        if event.phase is Phase.DENOISING and event.step > 1:
            steps.append(now - last)
        last = now
    found = {"step_s": statistics.median(steps)}
    for phase in (Phase.ENCODING, Phase.DENOISING, Phase.DECODING):
        waits = []
        for attempt in range(repeat):
            edit = engine.submit(job)
            async for event in edit.events():
                if event.phase is phase:
                    await asyncio.sleep(attempt * found["step_s"] / repeat)
                    edit.cancel()
                    break
            started = time.perf_counter()
            while engine.status().is_editing:  # noqa: ASYNC110 - it is the status that is timed
                await asyncio.sleep(0.001)
            waits.append(time.perf_counter() - started)
        found[f"{phase.value}_s"] = max(waits)
    await asyncio.to_thread(engine.close)
    return found


def crossing(repeat: int = 20) -> float:
    """Seconds that one megapixel takes from one end of the pipe to the other."""
    ours, theirs = (Channel(end) for end in multiprocessing.Pipe())
    picture = np.zeros((1024, 1024, 3), np.uint8)
    job = EditJob(picture, "", "", 28, 6.0, 1024, seed=0)
    found = []
    for _ in range(repeat):
        reader = threading.Thread(target=theirs.receive)
        reader.start()
        started = time.perf_counter()
        ours.send(job)
        reader.join()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    parameters = {
        "num_steps": arguments.num_steps,
        "size_level": arguments.size,
        "guidance_scale": 6.0,
        "seed": 0,
    }
    pipeline = read_checkpoint().pipeline
    picture = decode(PHOTO.read_bytes(), Limits(2**25, 50_000_000)).pixels
    with tempfile.TemporaryDirectory() as folder:
        as_the_pipeline = {"arithmetic": "fp32", "edit_cache_mb": 0}
        settings = load_settings(
            {"model_path": None, "allowed_dirs": (Path("/"),), **as_the_pipeline}
        )
        service = build_service(settings)
        call = {"image_path": str(PHOTO), "prompt": PROMPT, **parameters}
        transport = PythonStdioTransport(
            ROOT / "mcp_server.py",
            python_cmd=sys.executable,
            args=["--standalone"],
            cwd=folder,
            env=inherited_environment(
                MODEL_PATH="",
                ALLOWED_DIRS="/",
                **{name.upper(): str(value) for name, value in as_the_pipeline.items()},
            ),
            keep_alive=False,
        )
        times: dict[str, list[float]] = {"pipeline": [], "service": [], "mcp": []}
        async with Client(transport) as client:
            for index in range(arguments.repeat + 1):
                output = {"output_path": f"{folder}/{index}_service.jpg"}
                taken = {
                    "pipeline": directly(pipeline, picture, parameters),
                    "service": await through_service(service, call | output),
                }
                output = {"output_path": f"{folder}/{index}_mcp.jpg"}
                taken["mcp"] = await through_mcp(client, call | output)
                if index:  # the first round loads the models
                    for name, seconds in taken.items():
                        times[name].append(seconds)
            last: dict[str, str | int] = {
                "output_path": f"{folder}/status.jpg",
                "size_level": 1024,
                "num_steps": 28,
            }
            latencies = sorted(await status_latency(client, call | last))
        await asyncio.to_thread(service.close)
    base = statistics.median(times["pipeline"])
    summary: dict[str, Any] = {"size": arguments.size, "num_steps": arguments.num_steps}
    for name, values in times.items():
        median = statistics.median(values)
        pairs = zip(values, times["pipeline"], strict=True)
        extra = statistics.median(mine - direct for mine, direct in pairs)
        summary[name] = {
            "median_s": round(median, 3),
            "extra_ms": round(1000 * extra, 1),
            "ratio": round(1 + extra / base, 3),
        }
        print(f"{name:9} {median:.3f} s, {1000 * extra:+.0f} ms, {100 * extra / base:+.1f} %")
    p50, p99 = (latencies[int(share * (len(latencies) - 1))] for share in (0.5, 0.99))
    print(f"status during an edit: p50 {1000 * p50:.1f} ms, p99 {1000 * p99:.1f} ms")
    freed = await freed_after_cancel(picture)
    for name, seconds in freed.items():
        what = "one step at 1024" if name == "step_s" else f"free after a cancel in {name[:-2]}"
        print(f"{what}: {1000 * seconds:.0f} ms")
    one_way = crossing()
    print(f"1 megapixel through the pipe: {1000 * one_way:.1f} ms")
    return summary | {
        "status_ms": {"p50": round(1000 * p50, 1), "p99": round(1000 * p99, 1)},
        "status_calls": len(latencies),
        "cancel": {name: round(seconds, 3) for name, seconds in freed.items()},
        "megapixel_one_way_ms": round(1000 * one_way, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--num-steps", type=int, default=28)
    parser.add_argument("--repeat", type=int, default=7)
    print(json.dumps(asyncio.run(measure(parser.parse_args()))))


if __name__ == "__main__":
    main()
