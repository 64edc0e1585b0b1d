"""A worker process that needs no torch and takes time: `python -m paced_worker HANDLE`.

The prompt `pace 0.1` makes each step take 0.1 s; a cancel is noticed within a step. Its status
names its process.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Generator
from dataclasses import replace

from step1x_edit.channel import Channel, EditJob, Job, Painted, Phase, Progress, Residence, connect
from step1x_edit.worker.process import WorkerLoop
from toy_worker import ToyModel


class PacedModel(ToyModel):
    """A toy model that waits in each step."""

    def edit(
        self, job: Job, check: Callable[[], None]
    ) -> Generator[Progress | Painted, None, None]:
        assert isinstance(job, EditJob)
        word, _, rest = job.prompt.partition(" ")
        pace_s = float(rest) if word == "pace" else 0.0
        for event in super().edit(job, check):
            if isinstance(event, Progress) and event.phase is Phase.DENOISING and pace_s:
                threading.Event().wait(pace_s)
                check()
            yield event

    def residence(self) -> Residence:
        return replace(super().residence(), numerics=f"process {os.getpid()}")


if __name__ == "__main__":
    WorkerLoop(Channel(connect(int(sys.argv[1]))), PacedModel).run()
