"""A worker process that needs no torch: `python -m toy_worker HANDLE`. The prompt is a command.

It inverts pictures through the real loop of `step1x_edit.worker.process`, so that the pipe, crashes
and hangs can be tested with real processes in milliseconds.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator

from fakes import STREAMED, inverted, predicted
from step1x_edit.channel import (
    Channel,
    EditJob,
    Job,
    Memory,
    Painted,
    Phase,
    Progress,
    Residence,
    Start,
    connect,
)
from step1x_edit.errors import OutOfMemoryError
from step1x_edit.worker.process import WorkerLoop


class ToyModel:
    """Does what the prompt says: die SIGKILL, wait in decoding, hang, fail, print, unknown."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._location = "Unloaded"

    def edit(
        self, job: Job, check: Callable[[], None]
    ) -> Generator[Progress | Painted, None, None]:
        assert isinstance(job, EditJob)
        word, _, rest = job.prompt.partition(" ")
        is_known = word != "unknown"
        for progress in (
            Progress(Phase.LOADING),
            Progress(Phase.ENCODING),
            *(
                Progress(Phase.DENOISING, k, job.num_steps, predicted(job, k), is_known)
                for k in range(1, job.num_steps + 1)
            ),
            Progress(Phase.DECODING),
        ):
            if progress.phase is Phase.ENCODING:
                self._location = "GPU"
            yield progress
            if job.prompt.removeprefix("unknown ") == f"wait in {progress.phase.value}":
                while True:
                    check()
                    threading.Event().wait(0.001)
        match word:
            case "die":
                os.kill(os.getpid(), getattr(signal, rest))
                signal.pause()
            case "hang":
                time.sleep(3600)
            case "fail":
                raise OutOfMemoryError("on purpose")
            case "stumble":
                raise ZeroDivisionError("secret")
            case "nan":
                raise FloatingPointError
            case "print":
                sys.stdout.write("a stray line\n")
                sys.stdout.flush()
                os.write(1, b"stray bytes\n")
        yield Painted(inverted(job), warning=f"{self._start.model_version} 雪 {sys.stdin.read()}")

    def offload(self) -> None:
        self._location = "CPU"

    def residence(self) -> Residence:
        if self._location == "Unloaded":
            return Residence()
        return Residence(
            self._location,  # type: ignore[arg-type]
            "toy",
            "cuda:0",
            Memory(0.5, 1.5),
            version="v1.2",
            placement=STREAMED,
        )


if __name__ == "__main__":
    WorkerLoop(Channel(connect(int(sys.argv[1]))), ToyModel).run()
