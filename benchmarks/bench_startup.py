"""Time from spawning a stdio server to its first answers, as an assistant's host sees it.

    python benchmarks/bench_startup.py [--repeat 9] [--other OTHER_CHECKOUT/src]

Three servers alternate, so that other load affects them equally: a bare fastmcp server with five
trivial tools, `mcp_server.py`, and `step1x-edit mcp`. Three moments on one clock: the handshake
is answered, the tools are listed, the first call has returned. They are bound by the time Python
needs to import fastmcp; nothing needs torch, because the model is loaded when a client requests an
edit. A ratio is the median of the ratios within the turns.

With `--other` it also times `step1x-edit edit` from the start of the program to the first step of
the embedded model, here and with the sources of another checkout, alternating. This is bound by
importing torch. CPU seconds are those of the program and its worker process up to that moment; they
hardly depend on other load. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

ROOT = Path(__file__).parent.parent
PHOTO = ROOT / "src/step1x_edit/interfaces/assets/coffee.jpg"
EDIT_PROMPT = "make it night"

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


@dataclass(frozen=True)
class FirstStep:
    """The time from a cold start to the first step of an edit."""

    elapsed_s: float
    cpu_s: float | None  # None on a system without /proc


def first_step(source: Path, folder: Path) -> FirstStep:
    """Edit a picture with the embedded model in a new process, and stop after the first step."""
    # The smallest size: this measures the start and not the network.
    flags = ["--standalone", "--size-level", "512", "--output", str(folder / "edited.png")]
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "step1x_edit", "edit", str(PHOTO), EDIT_PROMPT, *flags],
        env={**os.environ, "PYTHONPATH": str(source), "DATA_DIR": str(folder), "MODEL_PATH": ""},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert process.stderr is not None
    with process:
        said = []
        for line in process.stderr:
            said.append(line)
            if "denoising 1/" in line:
                found = FirstStep(time.perf_counter() - started, cpu_seconds(process.pid))
                process.send_signal(signal.SIGINT)
                process.stderr.read()
                return found
    raise SystemExit(f"no step with {source}:\n{''.join(said)}")


def cpu_seconds(pid: int) -> float | None:
    """User and system time of a process and its current children."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for task in Path(f"/proc/{pid}/task").iterdir():
            if task.name != str(pid):
                children += (task / "children").read_text().split()
    except OSError:
        return None
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(cpu_seconds(int(child)) or 0 for child in children)


def compare_first_steps(other: Path, repeat: int) -> dict[str, object]:
    """Time the first step here and there, alternating, print both and return the summary."""
    sources = {"other": other, "ours": ROOT / "src"}
    runs: dict[str, list[FirstStep]] = {name: [] for name in sources}
    for turn in range(repeat + 1):
        for name, source in sources.items():
            with tempfile.TemporaryDirectory() as folder:
                run = first_step(source, Path(folder))
            if turn > 0:
                runs[name].append(run)
    summary: dict[str, object] = {}
    for name, found in runs.items():
        elapsed = [run.elapsed_s for run in found]
        cpu = [run.cpu_s for run in found if run.cpu_s is not None]
        summary[name] = row = {
            "median_s": round(statistics.median(elapsed), 3),
            "worst_s": round(max(elapsed), 3),
            "cpu_s": round(statistics.median(cpu), 3) if cpu else None,
        }
        print(f"first step, {name:5} {row}")
    pairs = list(zip(runs["ours"], runs["other"], strict=True))
    of_other = statistics.median(our.elapsed_s / their.elapsed_s for our, their in pairs)
    cpu_ratios = [
        our.cpu_s / their.cpu_s for our, their in pairs if our.cpu_s and their.cpu_s is not None
    ]
    summary["of_other"] = round(of_other, 3)
    summary["cpu_of_other"] = round(statistics.median(cpu_ratios), 3) if cpu_ratios else None
    print(f"first step: {of_other:.2f} × other, CPU time {summary['cpu_of_other']} × other")
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--other", type=Path, help="the `src` of another checkout")
    arguments_given = parser.parse_args()
    repeat: int = arguments_given.repeat
    other: Path | None = arguments_given.other
    runs: dict[str, list[list[float]]] = {name: [] for name in SERVERS}
    for turn in range(repeat + 1):
        for name, (arguments, tool) in SERVERS.items():
            run = asyncio.run(moments(arguments, tool))
            if turn > 0:  # the first turn compiles and fills the page cache
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
    steps = compare_first_steps(other.resolve(), repeat) if other else None
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    print(json.dumps({"turns": repeat, "load": load, **summary, "first_step": steps}))


if __name__ == "__main__":
    main()
