"""Time from spawning a stdio server to its first answers, as an assistant's host sees it.

    python benchmarks/bench_startup.py [--repeat 9]

Three servers take turns, so that other work on the machine affects them alike: a bare fastmcp
server with five trivial tools, `mcp_server.py`, and `step1x-edit mcp`. Three moments on the same
clock: the handshake is answered, the tools are listed, the first call has returned. What bounds
them is the time Python needs to import fastmcp; nothing needs torch, because the model is loaded
when a client asks for an edit. A ratio is the median of the ratios within the turns. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

ROOT = Path(__file__).parent.parent

BARE = """
from fastmcp import FastMCP

server = FastMCP("bare")
for letter in "abcde":
    server.tool(lambda text: text, name=letter)
server.run(show_banner=False)
"""

SERVERS: Mapping[str, tuple[Sequence[str], str]] = {
    "bare": (("-c", BARE), "a"),
    "mcp_server.py": ((str(ROOT / "mcp_server.py"),), "get_gpu_status"),
    "step1x-edit mcp": (("-m", "step1x_edit.interfaces.cli", "mcp"), "get_gpu_status"),
}
"""The arguments for Python, and a tool that answers at once."""

MOMENTS = ("handshake", "tools_listed", "first_call")


async def moments(arguments: Sequence[str], tool: str) -> list[float]:
    started = time.perf_counter()
    server = StdioServerParameters(
        command=sys.executable, args=list(arguments), cwd=str(ROOT), env=dict(os.environ)
    )
    async with stdio_client(server) as (read, write), ClientSession(read, write) as session:
        await session.initialize()
        handshake = time.perf_counter() - started
        await session.list_tools()
        listed = time.perf_counter() - started
        await session.call_tool(tool, {"text": "x"} if tool == "a" else {})
        return [handshake, listed, time.perf_counter() - started]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=9)
    repeat = parser.parse_args().repeat
    runs: dict[str, list[list[float]]] = {name: [] for name in SERVERS}
    for turn in range(repeat + 1):
        for name, (arguments, tool) in SERVERS.items():
            run = asyncio.run(moments(arguments, tool))
            if turn > 0:  # the first turn compiles and fills the cache of files
                runs[name].append(run)
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for name in SERVERS:
        summary[name] = {}
        for index, moment in enumerate(MOMENTS):
            values = [run[index] for run in runs[name]]
            ratios = [
                run[index] / bare[index] for run, bare in zip(runs[name], runs["bare"], strict=True)
            ]
            found = {
                "median_s": round(statistics.median(values), 3),
                "worst_s": round(max(values), 3),
                "of_bare": round(statistics.median(ratios), 3),
            }
            summary[name][moment] = found
            print(
                f"{name:16} {moment:13} median {found['median_s']:.2f} s, worst "
                f"{found['worst_s']:.2f} s, {found['of_bare']:.2f} × bare"
            )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    print(json.dumps({"turns": repeat, "load": load, **summary}))


if __name__ == "__main__":
    main()
