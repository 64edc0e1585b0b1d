"""The effect of expensive request bodies on the server: its response time and its memory.

    python benchmarks/bench_bodies.py [--doors /v1/jobs,/mcp]

The server runs in a separate process with the demo checkpoint; its page has been opened. Each body
is sent chunked, as fast as it is accepted, to each route that reads JSON; meanwhile a client in a
separate process polls /livez. Reported are the slowest response, the largest growth of the server's
memory while the body was read, and the status. Bound by copying. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import base64
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2

from bench_server import server
from step1x_edit.interfaces.discovery import NOTE_NAME

DOORS = (
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/jobs",
    "/v1/images/edits/estimate",
    "/gradio_api/queue/join",
    "/mcp",
)
PIECE = 256 * 1024
MEGA = 1_000_000
PROBE = """
import sys, time
import httpx2

with httpx2.Client(base_url=sys.argv[1], timeout=120, trust_env=False) as client:
    slowest = 0.0
    print("ready", flush=True)
    while sys.stdin.readable():
        started = time.perf_counter()
        client.get("/livez").raise_for_status()
        print(time.perf_counter() - started, flush=True)
        time.sleep(0.01)
"""


def bodies() -> dict[str, tuple[bytes, int]]:
    """Each body as its beginning and its total size in bytes."""
    picture = base64.b64encode(bytes(range(255)) * 1024)
    return {
        "5.7 MB of lists": (b'{"prompt":[[]' + b",[]" * (PIECE // 3), int(5.7 * MEGA)),
        "60 MB of lists": (b'{"prompt":[[]' + b",[]" * (PIECE // 3), 60 * MEGA),
        "48 MB of members": (b'{"a":0' + b',"abcdef":0' * (PIECE // 11), 48 * MEGA),
        "60 MB of letters": (b'{"prompt":["a"' + b',"a"' * (PIECE // 4), 60 * MEGA),
        "60 MB of depth": (b'{"prompt":' + b"[" * PIECE, 60 * MEGA),
        "60 MB of one text": (b'{"prompt":"' + picture, 60 * MEGA),
        "60 MB of one number": (b'{"prompt":1' + b"1" * PIECE, 60 * MEGA),
        "60 MB of a picture": (b'{"image":"data:image/png;base64,' + picture, 60 * MEGA),
    }


def pieces(start: bytes, length: int) -> Iterator[bytes]:
    sent, tail = len(start), start[-PIECE // 2 :]
    yield start
    while sent < length:
        yield tail
        sent += len(tail)
    yield b'"}'  # the end of a picture; the others are refused earlier


class Watch:
    """Measures how slow /livez and how large the server becomes, until it is stopped."""

    def __init__(self, url: str, pid: int) -> None:
        self._pid = pid
        self._is_over = threading.Event()
        self._probe = subprocess.Popen(
            [sys.executable, "-c", PROBE, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._probe.stdout is not None
        self._probe.stdout.readline()
        self._before = self.peak_mb = self._memory_mb()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def stop(self) -> tuple[float, float]:
        """The slowest response in milliseconds, and the growth of the server in MB."""
        time.sleep(0.3)
        self._is_over.set()
        self._thread.join()
        self._probe.terminate()
        said, _ = self._probe.communicate()
        slowest = max(float(line) for line in said.split()[:-1] or [b"nan"])
        return 1000 * slowest, self.peak_mb - self._before

    def _look(self) -> None:
        while not self._is_over.wait(0.005):
            self.peak_mb = max(self.peak_mb, self._memory_mb())

    def _memory_mb(self) -> float:
        for line in Path(f"/proc/{self._pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1000
        raise RuntimeError("the server has gone")


def send(client: httpx2.Client, door: str, start: bytes, length: int) -> str:
    headers = {
        "Content-Type": "application/json",
        "Accept": "application/json, text/event-stream",
    }
    try:
        return str(client.post(door, content=pieces(start, length), headers=headers).status_code)
    except httpx2.HTTPError:
        return "closed"  # before the rest was sent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--doors", default=",".join(DOORS))
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as url:
        pid = json.loads((Path(folder) / "data" / NOTE_NAME).read_text())["pid"]
        with httpx2.Client(base_url=url, timeout=300, trust_env=False) as client:
            client.get("/").raise_for_status()
            quiet = Watch(url, pid)
            time.sleep(3)
            print(f"nothing: /livez {quiet.stop()[0]:.0f} ms")
            for door in arguments.doors.split(","):
                for name, (start, length) in bodies().items():
                    watch = Watch(url, pid)
                    status = send(client, door, start, length)
                    slowest_ms, grown_mb = watch.stop()
                    print(
                        f"{door:28} {name:20} {status:>6} {slowest_ms:6.0f} ms {grown_mb:+6.0f} MB"
                    )
                    results.append([door, name, status, round(slowest_ms), round(grown_mb)])
    print(json.dumps({"bodies": results}))


if __name__ == "__main__":
    main()
