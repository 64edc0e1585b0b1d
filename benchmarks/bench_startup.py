"""Time from spawning a stdio server to its first answers, as an assistant's host sees it.

    python benchmarks/bench_startup.py [--repeat 9] [--other OTHER_CHECKOUT/src]

Three servers alternate, so that other load affects them equally: a bare fastmcp server with five
trivial tools, `mcp_server.py`, and `step1x-edit mcp`. Three moments on one clock: the handshake
is answered, the tools are listed, the first call has returned. They are bound by the time Python
needs to import fastmcp; nothing needs torch, because the model is loaded when a client requests an
edit. A ratio is the median of the ratios within the turns.

With `--other` it also times two commands here and with the sources of another checkout,
alternating: `step1x-edit edit` with the embedded model, from the start of the program to its first
step and to its end with the fewest steps of the smallest size, and `step1x-edit doctor`. They are
bound by importing torch. CPU seconds are those of the program and its child processes; they hardly
depend on other load. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
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
class Moment:
    """The time since a program was started, and the CPU time of it and its children."""

    elapsed_s: float
    cpu_s: float


def first_edit(source: Path, folder: Path) -> dict[str, Moment]:
    """Edit a picture with the embedded model in a new process."""
    # The fewest steps of the smallest size: this measures the start and not the network.
    flags = ["--standalone", "--size-level", "512", "--num-steps", "10"]
    started = time.perf_counter()
    process = program(
        ["edit", str(PHOTO), EDIT_PROMPT, *flags, "--output", str(folder / "edited.png")],
        source,
        folder,
    )
    assert process.stderr is not None
    said = []
    found = {}
    for line in process.stderr:
        said.append(line)
        if "denoising 1/" in line:
            elapsed_s = time.perf_counter() - started
            found["first step"] = Moment(elapsed_s, cpu_seconds(process.pid))
    found["first edit"] = ended(process, started)
    if process.returncode != 0 or len(found) < 2:
        raise SystemExit(f"no edit with {source}:\n{''.join(said)}")
    return found


def doctor(source: Path, folder: Path) -> dict[str, Moment]:
    """Run `doctor`, which may find what it kept in the folder."""
    started = time.perf_counter()
    process = program(["doctor"], source, folder)
    assert process.stderr is not None
    process.stderr.read()
    return {"doctor": ended(process, started)}


def program(arguments: Sequence[str], source: Path, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "step1x_edit.interfaces.cli", *arguments],
        env={**os.environ, "PYTHONPATH": str(source), "DATA_DIR": str(folder), "MODEL_PATH": ""},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def ended(process: subprocess.Popen[str], started: float) -> Moment:
    """Wait for the end of a process, and take the time of it and the children it waited for."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Moment(time.perf_counter() - started, usage.ru_utime + usage.ru_stime)


def cpu_seconds(pid: int) -> float:
    """User and system time of a running process and its current children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = [child for task in tasks for child in (task / "children").read_text().split()]
    return own + sum(cpu_seconds(int(child)) for child in children)


def compare(other: Path, repeat: int) -> dict[str, object]:
    """Run the commands here and there, alternating, print the times and return the summary."""
    sources = {"other": other, "ours": ROOT / "src"}
    runs: dict[str, list[dict[str, Moment]]] = {name: [] for name in sources}
    with tempfile.TemporaryDirectory() as folder:
        places = {name: Path(folder) / name for name in sources}
        for turn in range(repeat + 1):
            for name, source in sources.items():
                places[name].mkdir(exist_ok=True)
                run = first_edit(source, places[name]) | doctor(source, places[name])
                (places[name] / "edited.png").unlink()
                if turn > 0:
                    runs[name].append(run)
    summary: dict[str, object] = {}
    for what in runs["ours"][0]:
        for name, found in runs.items():
            elapsed = [run[what].elapsed_s for run in found]
            row = {
                "median_s": round(statistics.median(elapsed), 3),
                "worst_s": round(max(elapsed), 3),
                "cpu_s": round(statistics.median(run[what].cpu_s for run in found), 3),
            }
            summary[f"{what}, {name}"] = row
            print(f"{what}, {name:5} {row}")
        pairs = [
            (our[what], their[what]) for our, their in zip(runs["ours"], runs["other"], strict=True)
        ]
        elapsed_ratio = statistics.median(our.elapsed_s / their.elapsed_s for our, their in pairs)
        cpu_ratio = statistics.median(our.cpu_s / their.cpu_s for our, their in pairs)
        summary[f"{what}, of other"] = {
            "elapsed": round(elapsed_ratio, 3),
            "cpu": round(cpu_ratio, 3),
        }
        print(f"{what}: {elapsed_ratio:.2f} × other, CPU time {cpu_ratio:.2f} × other")
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
    commands = compare(other.resolve(), repeat) if other else None
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    print(json.dumps({"turns": repeat, "load": load, **summary, "commands": commands}))


if __name__ == "__main__":
    main()
