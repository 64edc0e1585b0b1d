"""How well the line of a cluster keeps its replicas busy: simulated replicas, no torch and no Ray.

    python benchmarks/bench_cluster.py --replicas 64 --edits 10000

Each replica is paced: an edit takes a random time from half to one and a half times the mean, in
steps. Clients submit the next edit when one of theirs has ended. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import numpy as np

from step1x_edit.channel import EditJob, Job, Painted, Phase, Progress, Residence
from step1x_edit.cluster.ray_engine import Move, RayEngine
from step1x_edit.cluster.replica import Said
from step1x_edit.engine.engine import EditResult, EngineStatus, Replica

_READY = EngineStatus(Residence("GPU", "paced", "cuda:0"))
_PICTURE = np.zeros((512, 512, 3), np.uint8)


class PacedCluster:
    """Replicas that only wait; each edit goes to the one that has been idle for longest."""

    def __init__(self, replicas: int, mean_s: float, steps: int) -> None:
        self._names = [f"replica-{number}" for number in range(replicas)]
        self._idle: asyncio.Queue[str] = asyncio.Queue()
        for name in self._names:
            self._idle.put_nowait(name)
        self._mean_s, self._steps = mean_s, steps
        self._random = random.Random(7)
        self.started: list[int] = []
        """The numbers of the edits in the order in which they began."""
        self.busy_s = 0.0

    async def run(self, job: Job) -> AsyncGenerator[Said, None]:
        name = await self._idle.get()
        begun = time.monotonic()
        self.started.append(job.number)
        replica = Replica(name, _READY)
        step_s = self._mean_s * self._random.uniform(0.5, 1.5) / self._steps
        try:
            for step in range(1, self._steps + 1):
                await asyncio.sleep(step_s)
                yield Said(Progress(Phase.DENOISING, step, self._steps), replica)
            yield Said(EditResult(Painted(_PICTURE.copy()), _READY.residence), replica)
        finally:
            self.busy_s += time.monotonic() - begun
            self._idle.put_nowait(name)

    async def look(self) -> Sequence[Replica]:
        return [Replica(name, _READY) for name in self._names]

    async def move(self, move: Move) -> Sequence[Replica]:
        return await self.look()

    def close(self) -> None:
        pass


def resident_mb() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * 4096 / 1e6


async def measure(options: argparse.Namespace) -> dict[str, object]:
    cluster = PacedCluster(options.replicas, options.mean, options.steps)
    clients = 2 * options.replicas
    engine = RayEngine(cluster, lanes=options.replicas, max_queue=clients)
    job = EditJob(_PICTURE, "paced", "", options.steps, 6.0, 512, 1)
    left = iter(range(options.edits))
    memory: list[float] = []

    async def client() -> None:
        for number in left:
            edit = engine.submit(job)
            async for _ in edit.events():
                pass
            await edit.result()
            if number % max(1, options.edits // 10) == 0:
                memory.append(round(resident_mb(), 1))

    cpu, begun = time.process_time(), time.monotonic()
    await asyncio.gather(*(client() for _ in range(clients)))
    took = time.monotonic() - begun
    overtaken = [place - (number - 1) for place, number in enumerate(cluster.started)]
    engine.close()
    return {
        "replicas": options.replicas,
        "edits": len(cluster.started),
        "seconds": round(took, 1),
        "busy": round(cluster.busy_s / (took * options.replicas), 4),
        "cpu_ms_per_edit": round(1000 * (time.process_time() - cpu) / options.edits, 2),
        "most_overtaken": max(overtaken),
        "memory_mb": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--edits", type=int, default=10_000)
    parser.add_argument("--mean", type=float, default=2.0, help="seconds of an edit")
    parser.add_argument("--steps", type=int, default=10)
    print(json.dumps(asyncio.run(measure(parser.parse_args()))))


if __name__ == "__main__":
    main()
