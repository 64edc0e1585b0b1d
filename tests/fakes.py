"""Hand-written stand-ins for the slow parts: deterministic, driven by events, never sleeping."""

from __future__ import annotations

import dataclasses
import threading
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from step1x_edit.channel import (
    GIGA,
    Cancel,
    Done,
    EditJob,
    Failed,
    Job,
    Memory,
    Offload,
    Painted,
    Phase,
    Progress,
    Report,
    Residence,
    UpscaleJob,
    reasoning_of,
)
from step1x_edit.engine.engine import Clock
from step1x_edit.errors import (
    EditCancelledError,
    InvalidParameterError,
    Step1XEditError,
    WorkerLostError,
)
from step1x_edit.model.request import Pixels
from step1x_edit.model.steps import Evaluations, num_evaluated
from step1x_edit.schemas.answers import Location
from step1x_edit.schemas.plan import PlanStatus

STREAMED: Final = PlanStatus(
    resident_share=0.31,
    precision="bf16",
    streaming=True,
    slots=2,
    joint_branches=False,
    reason="31 % of the core stays on the device, the rest passes through 2 slots",
    predicted_peak_gb=7.4,
    measured_peak_gb=7.123,
    host_gb=39.0,
)
"""The placement of a large model on a small GPU."""


class ManualClock(Clock):
    """A monotonic clock that only a test moves; waiters wake when it moves."""

    def __init__(self) -> None:
        self._now = 100.0
        self._condition: threading.Condition | None = None
        self.is_waited_for = False
        """Whether something waits for time to pass, with nothing else to do."""

    def now(self) -> float:
        return self._now

    def wait(self, condition: threading.Condition, timeout_s: float | None) -> None:
        if self._condition is not condition:  # time may have moved before it was known
            self._condition = condition
            return
        self.is_waited_for = True
        condition.wait()
        self.is_waited_for = False

    def advance(self, seconds: float) -> None:
        self._now += seconds
        if self._condition is not None:
            with self._condition:
                self.is_waited_for = False
                self._condition.notify_all()


def settled(clock: ManualClock) -> None:
    """Wait until an engine has done everything that is due at this time."""
    while not clock.is_waited_for:
        threading.Event().wait(0.001)


def predicted(job: EditJob, step: int) -> Pixels | None:
    """The preview of a step, flat grey of the step's number, if the job requests one."""
    return np.full_like(canvas(job), step) if step in job.preview_steps else None


def canvas(job: EditJob) -> Pixels:
    """The picture to edit; if there is none, one of the requested size that depends on the job."""
    if job.image is not None:
        return job.image
    asked = (job.prompt, job.negative_prompt, job.num_steps, job.guidance_scale, job.seed)
    random = np.random.default_rng(zlib.crc32(repr(asked).encode()))
    return np.full((job.height, job.width, 3), random.integers(0, 256, 3), dtype=np.uint8)


def reads_nothing() -> Iterator[tuple[int, int]]:
    """How a fake worker loads by default."""
    yield from ()


def slow_disk(clock: ManualClock, seconds: float) -> Callable[[], Iterator[tuple[int, int]]]:
    """Loads of a fake worker that read 40 GB in quarters, each of which takes this long."""

    def load() -> Iterator[tuple[int, int]]:
        for quarter in range(1, 5):
            clock.advance(seconds)
            yield quarter * 10 * GIGA, 40 * GIGA

    return load


def inverted(job: EditJob) -> Pixels:
    """The default result of a fake worker for a picture."""
    return 255 - canvas(job)


def check_can_reason(job: EditJob, model: str) -> None:
    """Refuse what only v1.2 can do, in the words of the real worker."""
    for name in ("thinking", "reflection"):
        if getattr(job, name) and not model.endswith("v1.2"):
            raise InvalidParameterError(f"{name} needs Step1X-Edit v1.2; the model here is {model}")


def rounds_of(job: EditJob) -> int:
    """The number of rounds of a fake worker: two with reflection, if allowed."""
    return min(2, job.reflection_rounds) if job.reflection else 1


def evaluated_steps(job: EditJob) -> list[int]:
    """The steps in which a fake worker's network runs: the first two, and the others evenly."""
    number, steps = num_evaluated(job.mode, job.num_steps), job.num_steps
    if number == steps:
        return [*range(1, steps + 1)]
    others = number - 2
    return [1, 2, *sorted(steps - round(k * (steps - 2) / others) for k in range(others))]


def evaluations_of(job: EditJob) -> Evaluations:
    """How often the network of a real worker runs."""
    prompts = 2 if job.guidance_scale > 1 else 1
    done = prompts * len(evaluated_steps(job))
    return Evaluations(done, prompts * job.num_steps - done)


def reasoned(job: EditJob) -> dict[str, Any] | None:
    """The reasoning of a fake worker: a clearer prompt, and two rounds, the second good."""
    if not job.thinking and not job.reflection:
        return None
    rewritten = f"{job.prompt}, and nothing else" if job.thinking else None
    rounds: list[dict[str, Any]] = [{"prompt": rewritten or job.prompt, "from_round": 0}]
    if job.reflection:
        rounds[0] |= {
            "verdict": "<#Think> The hat is too small.<#Reflection> make the hat larger",
            "description": "The same picture with a hat.",
            "score": 6.5,
            "reason": "The hat is hard to see.",
            "edit_score": [6.0, 8.0],
            "quality_score": [8.0, 9.0],
            "value": 48.0,
        }
    if rounds_of(job) > 1:
        rounds += [
            {
                "prompt": "make the hat larger",
                "from_round": 1,
                "verdict": "<#Think> The hat fits.<#Success>",
                "description": "The same picture with a hat.",
                "score": 9.0,
                "reason": "Nothing is missing.",
                "edit_score": [9.0, 8.0],
                "quality_score": [8.0, 9.0],
                "value": 64.0,
            }
        ]
    return reasoning_of(rewritten, rounds, best=len(rounds))


NUMERICS = "cpu/avx2/2 threads/torch 2.13.0"


@dataclass
class FakeWorker:
    """Inverts pictures, in as many steps as it is asked for, on the engine's own thread.

    `before_step(job, k)` is called before step k; it may wait, raise, or crash the worker.
    """

    before_step: Callable[[EditJob, int], None] = lambda job, step: None
    paint: Callable[[EditJob], Pixels] = inverted
    predict: Callable[[EditJob, int], Pixels | None] = predicted
    load: Callable[[], Iterator[tuple[int, int]]] = reads_nothing
    """Yields the bytes that are read, and all; it may wait, advance a clock, raise or crash."""
    can_generate: bool = True
    device: str = "cpu"
    model: str = "fake"
    """Its name; only a model named v1.2 can think and reflect."""
    warning: str | None = None
    held: Memory = Memory()
    others: tuple[Memory, ...] = ()
    numerics: str = NUMERICS
    usual_loras: Mapping[str, float] = field(default_factory=dict)
    version: str | None = None
    size_multiple: int | None = None
    placement: PlanStatus | None = None
    started: list[str] = field(default_factory=list)
    stopped_at: dict[str, int] = field(default_factory=dict)
    threads: set[int] = field(default_factory=set)
    silent_for: Callable[[float], None] | None = None
    """If set, nothing is reported any more; it is called with the time the engine waits."""
    is_alive: bool = True
    heard_cancel: threading.Event = field(default_factory=threading.Event)
    """Set when an edit is cancelled."""
    residence: Residence = Residence()
    ended: Callable[[], None] = lambda: None
    _reports: Generator[Report, None, None] | None = None
    _cancelled: int = -1

    def __call__(self, ended: Callable[[], None]) -> FakeWorker:
        """Start: a fake can be passed to an engine in place of a function that starts one."""
        self.ended, self.is_alive, self.residence = ended, True, Residence()
        return self

    def send(self, request: Job | Offload) -> None:
        self._check_alive()
        self.threads.add(threading.get_ident())
        match request:
            case EditJob():
                self._reports = self._edit(request)
            case UpscaleJob():
                self._reports = self._enlarge(request)
            case Offload():
                self._reports = self._offload()

    def receive(self, timeout_s: float) -> Report | None:
        self._check_alive()
        if self.silent_for is not None:
            self.silent_for(timeout_s)
            return None
        assert self._reports is not None
        report = next(self._reports)
        self._check_alive()
        return report if self.silent_for is None else None

    def cancel(self, request: Cancel) -> None:
        self._cancelled = request.number
        self.heard_cancel.set()

    def stop(self, timeout_s: float) -> None:
        self.kill()

    def kill(self) -> None:
        self.is_alive, self.residence = False, Residence()

    def crash(self) -> None:
        """End like a process that nothing has asked to end."""
        self.kill()
        self.ended()

    def _stop_if_cancelled(self, job: EditJob) -> None:
        if self._cancelled == job.number:
            raise EditCancelledError()

    def _check_alive(self) -> None:
        if not self.is_alive:
            raise WorkerLostError("it was ended by SIGSEGV")

    def _edit(self, job: EditJob) -> Generator[Report, None, None]:
        self.started.append(job.prompt)
        step = 0
        try:
            if self.residence.location == "Unloaded":
                yield self._report(Progress(Phase.LOADING))
                for done, total in self.load():
                    yield self._report(Progress(Phase.LOADING, done, total))
                    self._stop_if_cancelled(job)
            location: Location = "CPU" if self.device == "cpu" else "GPU"
            loras = self.usual_loras if job.loras is None else job.loras
            self.residence = Residence(
                location,
                self.model,
                self.device,
                self.held,
                arithmetic="fp32 avx2" if self.device == "cpu" else None,
                numerics=self.numerics,
                version=self.version,
                size_multiple=self.size_multiple,
                placement=self.placement,
                loras=loras,
                others=self.others,
            )
            if job.image is None and not self.can_generate:
                raise InvalidParameterError(
                    "text to image needs Step1X-Edit v1.1; the model here is demo"
                )
            check_can_reason(job, self.model)
            if job.thinking:
                yield self._report(Progress(Phase.THINKING))
            evaluated = evaluated_steps(job)
            for _ in range(rounds_of(job)):
                yield self._report(Progress(Phase.ENCODING))
                for step in range(1, job.num_steps + 1):
                    self.before_step(job, step)
                    self._stop_if_cancelled(job)
                    preview = self.predict(job, step)
                    progress = Progress(Phase.DENOISING, step, job.num_steps, preview)
                    yield self._report(
                        dataclasses.replace(
                            progress,
                            evaluated=sum(one <= step for one in evaluated),
                            to_evaluate=len(evaluated),
                        )
                    )
                yield self._report(Progress(Phase.DECODING))
                if job.reflection:
                    yield self._report(Progress(Phase.REFLECTING))
        except Step1XEditError as error:
            self.stopped_at[job.prompt] = step
            yield self._report(Failed(error.code, str(error)))
        else:
            image = self.paint(job)
            rounds = np.stack([canvas(job), image][-rounds_of(job) :]) if job.reflection else None
            evaluations = evaluations_of(job)
            yield self._report(Painted(image, self.warning, reasoned(job), rounds, evaluations))

    def _enlarge(self, job: UpscaleJob) -> Generator[Report, None, None]:
        for tile in range(3):
            yield self._report(Progress(Phase.UPSCALING, tile, 2))
        enlarged = job.image.repeat(job.upscale, axis=0).repeat(job.upscale, axis=1)
        yield self._report(Painted(enlarged, upscaler_sha256="0" * 64))

    def _offload(self) -> Generator[Report, None, None]:
        if self.residence.location == "GPU":
            self.residence = dataclasses.replace(self.residence, location="CPU")
        yield self._report(Done())

    def _report(self, event: Progress | Painted | Failed | Done) -> Report:
        is_home = self.residence.location == ("CPU" if self.device == "cpu" else "GPU")
        held = self.held if is_home else Memory()
        return Report(event, dataclasses.replace(self.residence, memory=held))


class Gate:
    """Holds a worker at a step until the test opens it."""

    def __init__(self, at_step: int = 1) -> None:
        self._at_step = at_step
        self.reached = threading.Event()
        self._open = threading.Event()

    def __call__(self, job: EditJob, step: int) -> None:
        if step == self._at_step:
            self.reached.set()
            assert self._open.wait(timeout=240), "the test never opened the gate"

    def open(self) -> None:
        self._open.set()


class HeldDisk:
    """Loads of a fake worker that read 40 GB, 10 every 20 s, and are held when half is read."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.is_half_read = threading.Event()
        self._open = threading.Event()

    def __call__(self) -> Iterator[tuple[int, int]]:
        for quarter, report in enumerate(slow_disk(self.clock, 20)(), start=1):
            yield report
            if quarter == 2:
                self.is_half_read.set()
                assert self._open.wait(timeout=240), "the test never opened the disk"

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
