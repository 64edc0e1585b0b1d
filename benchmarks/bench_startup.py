"""Time from spawning `python mcp_server.py` to its first answers, as an assistant's host sees it.

    python benchmarks/bench_startup.py [--repeat 5]

Three moments on the same clock: the handshake is answered, the tools are listed, the first status
has arrived. Nothing of it needs torch; the model is loaded when somebody asks for an edit. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path

from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

SERVER = Path(__file__).parent.parent / "mcp_server.py"


async def moments() -> dict[str, float]:
    started = time.perf_counter()
    server = StdioServerParameters(
        command=sys.executable, args=[str(SERVER)], cwd=str(SERVER.parent)
    )
    async with stdio_client(server) as (read, write), ClientSession(read, write) as session:
        await session.initialize()
        handshake = time.perf_counter() - started
        await session.list_tools()
        listed = time.perf_counter() - started
        await session.call_tool("get_gpu_status", {})
        status = time.perf_counter() - started
    return {"handshake_s": handshake, "tools_listed_s": listed, "first_status_s": status}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=5)
    runs = [asyncio.run(moments()) for _ in range(parser.parse_args().repeat)]
    summary = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        summary[name] = {
            "median": round(statistics.median(values), 2),
            "max": round(max(values), 2),
        }
        print(
            f"{name:16} median {summary[name]['median']:.2f} s, worst {summary[name]['max']:.2f} s"
        )
    print(json.dumps({"runs": len(runs), **summary}))


if __name__ == "__main__":
    main()
