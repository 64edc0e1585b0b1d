"""The engine: order, bounds, cancellation, deadlines, errors and true status."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from fakes import FakeWorker, Gate, ManualClock, a_job
from step1x_edit.engine import HEARTBEAT_S, Engine
from step1x_edit.errors import (
    CheckpointError,
    DeadlineExceededError,
    EditCancelledError,
    InternalError,
    ModelUnavailableError,
    OutOfMemoryError,
    ServerBusyError,
    ShuttingDownError,
)
from step1x_edit.worker import EditJob, Memory, Worker

MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def make(worker: Worker | Callable[[], Worker], **options: object) -> Engine:
        load = worker if callable(worker) else lambda: worker
        engines.append(Engine(load, **options))  # type: ignore[arg-type]
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


async def reached(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.reached.wait, 60)


def raising(error: Exception) -> Callable[[EditJob, int], None]:
    def before_step(job: EditJob, step: int) -> None:
        raise error

    return before_step


async def test_an_edit_yields_every_step_and_then_the_picture(make_engine: MakeEngine) -> None:
    edit = make_engine(FakeWorker()).submit(job := a_job())

    texts = [event.text async for event in edit.events()]
    outcome = await edit.result()

    steps = [f"denoising {k}/10" for k in range(1, 11)]
    assert texts == ["queued, position 1", "loading model", "encoding", *steps, "decoding"]
    assert np.array_equal(outcome.image, 255 - job.image)


async def test_edits_run_in_order_on_one_thread(make_engine: MakeEngine) -> None:
    worker = FakeWorker()
    engine = make_engine(worker)

    edits = [engine.submit(a_job(prompt=str(k))) for k in range(5)]
    await asyncio.gather(*(edit.result() for edit in edits))

    assert worker.started == ["0", "1", "2", "3", "4"]
    assert len(worker.threads) == 1
    assert worker.threads != {threading.get_ident()}


async def test_the_model_is_loaded_by_the_first_edit_and_only_once(make_engine: MakeEngine) -> None:
    engine = make_engine(FakeWorker())
    assert engine.status().location == "Unloaded"

    await engine.submit(a_job()).result()
    second = engine.submit(a_job())
    texts = [event.text async for event in second.events()]

    assert "loading model" not in texts
    assert engine.status().location == "CPU"
    assert engine.status().total_loads == 1


async def test_a_full_line_refuses_at_once_and_says_when_to_come_back(
    make_engine: MakeEngine,
) -> None:
    gate = Gate()
    engine = make_engine(FakeWorker(before_step=gate), max_queue=1)
    running = engine.submit(a_job())
    await reached(gate)
    waiting = engine.submit(a_job())

    with pytest.raises(ServerBusyError, match=r"^Server busy: .*try again in") as refusal:
        engine.submit(a_job())

    assert refusal.value.retry_after_s is not None
    assert refusal.value.retry_after_s >= 1
    gate.open()
    await asyncio.gather(running.result(), waiting.result())


async def test_waiting_edits_learn_that_they_move_up(make_engine: MakeEngine) -> None:
    gate = Gate()
    engine = make_engine(FakeWorker(before_step=gate))
    running = engine.submit(a_job())
    await reached(gate)
    engine.submit(a_job())
    last = engine.submit(a_job())

    gate.open()
    texts = [event.text async for event in last.events()]

    assert texts[:2] == ["queued, position 2", "queued, position 1"]
    await running.result()


async def test_a_waiting_edit_that_is_cancelled_never_starts(make_engine: MakeEngine) -> None:
    gate, worker = Gate(), FakeWorker()
    worker.before_step = gate
    engine = make_engine(worker)
    running = engine.submit(a_job("running"))
    await reached(gate)
    waiting = engine.submit(a_job("waiting"))

    waiting.cancel()

    with pytest.raises(EditCancelledError):
        await waiting.result()
    gate.open()
    await running.result()
    assert worker.started == ["running"]


async def test_a_running_edit_that_is_cancelled_stops_within_one_step(
    make_engine: MakeEngine,
) -> None:
    gate, worker = Gate(at_step=3), FakeWorker()
    worker.before_step = gate
    engine = make_engine(worker)
    edit = engine.submit(a_job("endless", num_steps=10_000))
    await reached(gate)

    edit.cancel()
    gate.open()

    with pytest.raises(EditCancelledError):
        await edit.result()
    assert worker.stopped_at == {"endless": 3}
    worker.before_step = lambda job, step: None
    await engine.submit(a_job("next")).result()


async def test_cancelling_a_finished_edit_changes_nothing(make_engine: MakeEngine) -> None:
    edit = make_engine(FakeWorker()).submit(a_job())
    outcome = await edit.result()

    edit.cancel()

    assert await edit.result() is outcome


async def test_an_edit_beyond_its_deadline_ends(make_engine: MakeEngine) -> None:
    clock = ManualClock()
    worker = FakeWorker(before_step=lambda job, step: clock.advance(40))
    engine = make_engine(worker, edit_timeout_s=100, clock=clock)

    with pytest.raises(DeadlineExceededError, match="longer than 100 s"):
        await engine.submit(a_job()).result()
    assert worker.stopped_at == {"invert": 3}


@pytest.mark.parametrize(
    ("raised", "told", "beginning"),
    [
        (MemoryError(), OutOfMemoryError, "CUDA out of memory: "),
        (type("OutOfMemoryError", (RuntimeError,), {})("x"), OutOfMemoryError, "CUDA out of"),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), OutOfMemoryError, "CUDA out of"),
        (FloatingPointError(), InternalError, "Internal error: the model produced"),
        (ZeroDivisionError("secret"), InternalError, "Internal error: the edit failed"),
    ],
)
async def test_failures_become_one_sentence_and_the_next_edit_works(
    make_engine: MakeEngine, raised: Exception, told: type[Exception], beginning: str
) -> None:
    worker = FakeWorker(before_step=raising(raised))
    engine = make_engine(worker)

    with pytest.raises(told) as failure:
        await engine.submit(a_job()).result()

    assert str(failure.value).startswith(beginning)
    assert "secret" not in str(failure.value)
    worker.before_step = lambda job, step: None
    await engine.submit(a_job()).result()


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (CheckpointError("no config.json in /models"), CheckpointError),
        (OSError("disk on fire"), ModelUnavailableError),
        (MemoryError(), OutOfMemoryError),
    ],
)
async def test_a_model_that_cannot_be_loaded_is_tried_again_by_the_next_edit(
    make_engine: MakeEngine, raised: Exception, told: type[Exception]
) -> None:
    attempts: list[Exception] = [raised]

    def load() -> Worker:
        if attempts:
            raise attempts.pop()
        return FakeWorker()

    engine = make_engine(load)

    with pytest.raises(told) as failure:
        await engine.submit(a_job()).result()

    assert str(failure.value).startswith(("Manager not initialized: ", "CUDA out of memory: "))
    assert engine.status().location == "Unloaded"
    assert engine.status().total_loads == 0
    await engine.submit(a_job()).result()
    assert engine.status().total_loads == 1


async def test_status_answers_while_an_edit_runs(make_engine: MakeEngine) -> None:
    gate = Gate()
    engine = make_engine(FakeWorker(before_step=gate))
    running = engine.submit(a_job())
    await reached(gate)
    waiting = engine.submit(a_job())

    status = engine.status()

    assert status.is_editing
    assert status.queue_length == 1
    assert status.idle_time_s == 0.0
    gate.open()
    await asyncio.gather(running.result(), waiting.result())
    assert not engine.status().is_editing


@pytest.mark.parametrize("end", ["success", "failure", "cancellation"])
async def test_memory_is_measured_after_every_edit(make_engine: MakeEngine, end: str) -> None:
    worker = FakeWorker()
    engine = make_engine(worker)

    def step(job: EditJob, step: int) -> None:
        worker.held = Memory(allocated_gb=3.0)
        if end == "failure":
            raise ZeroDivisionError
        if end == "cancellation":
            edit.cancel()

    worker.before_step = step
    edit = engine.submit(a_job())
    await asyncio.gather(edit.result(), return_exceptions=True)

    assert engine.status().memory == Memory(allocated_gb=3.0)


async def test_memory_that_cannot_be_measured_stops_nothing(make_engine: MakeEngine) -> None:
    worker = FakeWorker()
    engine = make_engine(worker)
    await engine.submit(a_job()).result()

    def fail() -> Memory:
        raise RuntimeError("the device is lost")

    worker.memory = fail  # type: ignore[method-assign]
    await engine.submit(a_job()).result()

    assert (await engine.submit(a_job()).result()).model == worker.info


def test_a_sign_of_life_comes_within_the_promised_five_seconds() -> None:
    assert HEARTBEAT_S <= 4.0


async def test_idle_time_counts_from_the_end_of_the_last_edit(make_engine: MakeEngine) -> None:
    clock = ManualClock()
    engine = make_engine(FakeWorker(before_step=lambda job, step: clock.advance(5)), clock=clock)
    assert engine.status().idle_time_s == 0.0

    await engine.submit(a_job()).result()
    clock.advance(7)

    assert engine.status().idle_time_s == 7.0


async def test_silence_is_broken_by_repeating_the_last_event(make_engine: MakeEngine) -> None:
    gate = Gate(at_step=2)
    edit = make_engine(FakeWorker(before_step=gate)).submit(a_job())
    repeated = 0

    async for event in edit.events(heartbeat_s=0.01):
        repeated += event.text == "denoising 1/10"
        if repeated == 3:
            gate.open()

    assert repeated >= 3


async def test_closing_ends_every_edit_and_refuses_new_ones(make_engine: MakeEngine) -> None:
    gate = Gate()
    worker = FakeWorker(before_step=gate)
    engine = make_engine(worker)
    running = engine.submit(a_job("running"))
    await reached(gate)
    waiting = engine.submit(a_job("waiting"))

    closing = asyncio.ensure_future(asyncio.to_thread(engine.close))
    with pytest.raises(ShuttingDownError):
        await waiting.result()
    gate.open()
    await closing

    with pytest.raises(ShuttingDownError):
        await running.result()
    with pytest.raises(ShuttingDownError):
        engine.submit(a_job())
    assert worker.started == ["running"]


async def test_cancelling_in_a_storm_leaves_no_edit_without_an_end(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(FakeWorker(), max_queue=1000)
    ended = 0
    for _ in range(10):
        edits = [engine.submit(a_job(num_steps=10)) for _ in range(100)]
        for edit in edits[::2]:
            edit.cancel()
        results = await asyncio.gather(*(edit.result() for edit in edits), return_exceptions=True)
        ended += len(results)

    assert ended == 1000
    assert engine.status().queue_length == 0
