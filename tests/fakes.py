"""Stand-ins for the slow parts, written by hand: deterministic, steered by events, never asleep."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import numpy as np

from step1x_edit.worker import EditJob, Memory, ModelInfo, Outcome, Phase, Progress


class ManualClock:
    """A monotonic clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class FakeWorker:
    """Inverts pictures, in as many steps as it is asked for.

    `before_step(job, k)` is called on the worker's thread before step k; it may wait or raise.
    """

    info: ModelInfo = ModelInfo(name="fake", device="cpu", location="CPU")
    before_step: Callable[[EditJob, int], None] = lambda job, step: None
    warning: str | None = None
    held: Memory = Memory()
    started: list[str] = field(default_factory=list)
    stopped_at: dict[str, int] = field(default_factory=dict)
    threads: set[int] = field(default_factory=set)

    def edit(self, job: EditJob) -> Generator[Progress | Outcome, None, None]:
        self.started.append(job.prompt)
        self.threads.add(threading.get_ident())
        step = 0
        try:
            yield Progress(Phase.ENCODING)
            for step in range(1, job.num_steps + 1):
                self.before_step(job, step)
                yield Progress(Phase.DENOISING, step, job.num_steps)
            yield Progress(Phase.DECODING)
        except GeneratorExit:
            self.stopped_at[job.prompt] = step
            raise
        yield Outcome(image=255 - job.image, model=self.info, warning=self.warning)

    def memory(self) -> Memory:
        return self.held


class Gate:
    """Holds a worker at a step until the test lets it through."""

    def __init__(self, at_step: int = 1) -> None:
        self._at_step = at_step
        self.reached = threading.Event()
        self._open = threading.Event()

    def __call__(self, job: EditJob, step: int) -> None:
        if step == self._at_step:
            self.reached.set()
            assert self._open.wait(timeout=60), "the test never opened the gate"

    def open(self) -> None:
        self._open.set()


def a_job(prompt: str = "invert", num_steps: int = 10) -> EditJob:
    """A small picture to edit."""
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    return EditJob(
        image=image,
        prompt=prompt,
        negative_prompt="",
        num_steps=num_steps,
        guidance_scale=6.0,
        size_level=512,
        seed=1,
    )
