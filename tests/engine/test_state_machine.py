"""Engine and residency under every order of events that Hypothesis can think of.

The engine, its thread, `PipelineWorker` and `Residency` are the real ones, with real tensors and a
second copy in host memory as the device; only the network is a single layer, and the worker runs on
the engine's thread behind a turnstile, so that each step happens when a rule says so. Time is a
manual clock.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from extent import by_extent
from fakes import ManualClock, canvas
from step1x_edit.channel import Cancel, Done, EditJob, Failed, Job, Offload, Report
from step1x_edit.checkpoints.arena import Weight
from step1x_edit.checkpoints.read import Checkpoint, OpenedCheckpoint
from step1x_edit.engine.engine import Edit, EditResult, Engine, EngineStatus
from step1x_edit.errors import (
    EditCancelledError,
    ModelUnavailableError,
    OutOfMemoryError,
    ServerBusyError,
    Step1XEditError,
    WorkerLostError,
)
from step1x_edit.model.pipeline import Edited, EditRun, Plan, Step
from step1x_edit.worker.edits import PipelineWorker
from step1x_edit.worker.opening import STAND_IN
from step1x_edit.worker.residency import Residency, allocate_slab
from tiny import TINY

IDLE_S, RELEASE_S, MAX_QUEUE, NUM_STEPS = 60, 300, 3, 3
EXPECTED = (EditCancelledError, WorkerLostError, OutOfMemoryError, ModelUnavailableError)
TRUTH = torch.arange(16, dtype=torch.float32).reshape(4, 4)


class LayerPipeline:
    """A network of one layer; `faults` says how many of the next steps run out of memory."""

    def __init__(self, layer: torch.nn.Linear, faults: list[int]) -> None:
        self.layer = layer
        self.faults = faults
        self.transformer = SimpleNamespace(img_in=layer)
        self.vae = torch.nn.Identity()
        self.conditioner = SimpleNamespace(vlm=torch.nn.Identity())
        self.recogniser = None
        self.config = TINY
        self.profile = None

    def forget_tables(self) -> None:
        """It keeps none."""

    def forget(self) -> bool:
        return False

    def advance(self, run: EditRun, plan: Plan) -> Generator[Step | Edited, None, None]:
        yield Step("encoding", 0, 1)
        done: Any = run.state or 0
        for step in range(done + 1, NUM_STEPS + 1):
            if self.faults[0]:
                self.faults[0] -= 1
                raise MemoryError
            run.state = step  # type: ignore[assignment]
            yield Step("denoising", step, NUM_STEPS)
        yield Step("decoding", 0, 1)
        # The picture proves that the weights were where they should be.
        is_right = torch.equal(self.layer.weight, TRUTH)
        image = run.request.image
        assert image is not None
        yield Edited(255 - image if is_right else np.zeros_like(image))


class Turnstile:
    """Lets the worker continue one report at a time, and knows when it waits."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._permits = 0
        self.is_waited_at = False

    def pass_through(self) -> None:
        """Wait to be let on."""
        with self._changed:
            self.is_waited_at = True
            self._changed.wait_for(lambda: self._permits)
            self._permits -= 1

    def let_on(self) -> None:
        with self._changed:
            self.is_waited_at = False
            self._permits += 1
            self._changed.notify_all()


class LocalWorker:
    """A worker on the engine's thread: the real model code, and a death when a rule wants it."""

    def __init__(self, ended: Callable[[], None], machine: EngineMachine) -> None:
        self.ended = ended
        self.machine = machine
        self.is_alive = True
        self._cancelled = 0
        self._has_turnstile = False
        self._reports: Generator[Any, None, None] | None = None
        self.residency = Residency(self._open, torch.device("cpu"), self._allocate)
        self._model = PipelineWorker(self.residency, STAND_IN)

    def _open(self) -> OpenedCheckpoint:
        layer = torch.nn.Linear(4, 4, bias=False, device="meta")
        pipeline: Any = LayerPipeline(layer, self.machine.faults)
        weight = Weight("transformer.img_in.weight", layer, "weight", (4, 4), torch.float32, TRUTH)
        self.machine.loads += 1
        return OpenedCheckpoint(Checkpoint("layer", "test", pipeline), (weight,))

    def _allocate(self, size: int, device: torch.device) -> torch.Tensor:
        slab = allocate_slab(size, device)
        self.machine.placements += 1
        return slab

    def send(self, request: Job | Offload) -> None:
        self._check_alive()
        self._has_turnstile = isinstance(request, EditJob)
        self._reports = self._edit(request) if isinstance(request, EditJob) else self._offload()

    def receive(self, timeout_s: float) -> Report | None:
        if self._has_turnstile:
            self.machine.turnstile.pass_through()
        self._check_alive()
        assert self._reports is not None
        return Report(next(self._reports), self._model.residence())

    def cancel(self, request: Cancel) -> None:
        self._cancelled = request.number

    def stop(self, timeout_s: float) -> None:
        self.kill()

    def kill(self) -> None:
        self.is_alive = False

    def _check_alive(self) -> None:
        if not self.is_alive:
            raise WorkerLostError("it was ended by SIGKILL")

    def _edit(self, job: EditJob) -> Generator[Any, None, None]:
        def check() -> None:
            if self._cancelled == job.number:
                raise EditCancelledError()

        try:
            for event in self._model.edit(job, check):
                yield event
                check()
        except Step1XEditError as error:
            yield Failed(error.code, str(error))

    def _offload(self) -> Generator[Any, None, None]:
        self._model.offload()
        yield Done()


class EngineMachine(RuleBasedStateMachine):
    """What callers, time and bad luck may do, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock = ManualClock()
        self.turnstile = Turnstile()
        self.faults = [0]  # steps that will run out of memory
        self.loads = 0  # from disk
        self.placements = 0  # on the device
        self.workers: list[LocalWorker] = []
        self.edits: list[Edit] = []
        self.moves: list[Future[EngineStatus]] = []
        self.engine = Engine(
            self._started,
            max_queue=MAX_QUEUE,
            edit_timeout_s=1e9,
            load_timeout_s=1e9,
            idle_timeout_s=IDLE_S,
            release_timeout_s=RELEASE_S,
            clock=self.clock,
        )

    def _started(self, ended: Callable[[], None]) -> LocalWorker:
        self.workers.append(LocalWorker(ended, self))
        return self.workers[-1]

    @property
    def living(self) -> LocalWorker | None:
        return self.workers[-1] if self.workers and self.workers[-1].is_alive else None

    @rule()
    def submit(self) -> None:
        image = np.full((2, 2, 3), len(self.edits), np.uint8)

        async def submitted() -> Edit:
            return self.engine.submit(EditJob(image, "", "", NUM_STEPS, 6.0, 512, seed=0))

        try:
            self.edits.append(self.loop.run_until_complete(submitted()))
        except ServerBusyError:
            assert self.engine.status().queue_length == MAX_QUEUE

    @rule(count=st.integers(1, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.settle()
            if self.turnstile.is_waited_at:
                self.turnstile.let_on()

    @precondition(lambda self: self.edits)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.edits)).cancel()

    @rule()
    def offload(self) -> None:
        self.moves.append(self.engine.offload())

    @rule()
    def release(self) -> None:
        self.moves.append(self.engine.release())

    @rule(seconds=st.sampled_from([1, IDLE_S - 1, IDLE_S, RELEASE_S]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(steps=st.integers(1, 2))
    def memory_will_run_out(self, steps: int) -> None:
        self.faults[0] = steps

    @precondition(lambda self: self.living is not None)
    @rule()
    def the_worker_dies(self) -> None:
        assert self.living is not None
        worker = self.living
        worker.kill()
        if self.turnstile.is_waited_at:
            self.turnstile.let_on()
        worker.ended()

    @rule()
    def many_ask_at_once(self) -> None:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: self.engine.status(), range(8)))
        assert all(status.total_loads >= status.cpu_to_gpu for status in found)

    def settle(self) -> None:
        """Wait until the engine's thread has nothing to do but wait for a rule."""
        self.clock.advance(0)
        while not (
            self.turnstile.is_waited_at
            or self.clock.is_waited_for
            or not (self.edits or self.moves)  # it has no thread yet
        ):
            threading.Event().wait(0.0002)

    @invariant()
    def status_is_true(self) -> None:
        self.settle()
        status = self.engine.status()
        location = "Unloaded" if self.living is None else self.living.residency.location
        assert status.residence.location == location
        assert status.total_loads == self.placements
        assert status.total_loads - status.cpu_to_gpu == self.loads
        assert status.cpu_to_gpu <= status.gpu_to_cpu <= status.total_loads
        assert status.full_releases <= self.loads
        if self.clock.is_waited_for:  # idle: no place is kept longer than its time
            assert not (location == "GPU" and status.idle_time_s >= IDLE_S)
            assert not (location != "Unloaded" and status.idle_time_s >= RELEASE_S)

    def teardown(self) -> None:
        while not self.clock.is_waited_for and (self.edits or self.moves):
            if self.turnstile.is_waited_at:
                self.turnstile.let_on()
            threading.Event().wait(0.0002)

        async def results_of_all() -> list[object]:
            ended = (edit.result() for edit in self.edits)
            return await asyncio.wait_for(asyncio.gather(*ended, return_exceptions=True), 240)

        results = self.loop.run_until_complete(results_of_all())
        for edit, result in zip(self.edits, results, strict=True):
            # A move under a lease would be an InternalError.
            if not isinstance(result, EXPECTED):
                assert isinstance(result, EditResult), result
                assert isinstance(edit.job, EditJob)
                assert np.array_equal(result.painted.image, 255 - canvas(edit.job))
        assert all(move.done() for move in self.moves)
        self.engine.close()
        self.loop.close()


EngineMachine.TestCase.settings = settings(
    max_examples=by_extent(100, 500), stateful_step_count=20, deadline=None, print_blob=True
)


@pytest.mark.timeout(600)
class TestEngineMachine(EngineMachine.TestCase):  # type: ignore[misc,valid-type]  # a property
    @classmethod
    def setUpClass(cls) -> None:
        gc.freeze()  # or every collection would go through all that torch has brought

    @classmethod
    def tearDownClass(cls) -> None:
        gc.unfreeze()
