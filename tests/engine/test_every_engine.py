"""What every engine keeps: order, bounds, cancellation, moves of the model and true status."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from fake_cluster import FakeCluster
from fakes import FakeWorker, Gate, ManualClock, a_job, canvas, predicted
from step1x_edit.channel import EditJob, Memory, Phase
from step1x_edit.cluster.ray_engine import RayEngine
from step1x_edit.engine.engine import Engine, EngineLike, EngineStatus
from step1x_edit.errors import (
    DeadlineExceededError,
    EditCancelledError,
    OutOfMemoryError,
    ServerBusyError,
    ShuttingDownError,
)

MakeEngine = Callable[..., EngineLike]


@pytest.fixture(params=["local", "cluster"])
def make_engine(request: pytest.FixtureRequest) -> Iterator[MakeEngine]:
    engines: list[EngineLike] = []

    def make(worker: FakeWorker, **options: object) -> EngineLike:
        engine: EngineLike = Engine(worker, **options)  # type: ignore[arg-type]
        if request.param == "cluster":
            assert isinstance(engine, Engine)
            engine = RayEngine(FakeCluster(engine), lanes=1, **options)  # type: ignore[arg-type]
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


async def moved(future: object) -> EngineStatus:
    return await asyncio.wait_for(asyncio.wrap_future(future), 60)  # type: ignore[arg-type]


async def reached(gate: Gate, engine: EngineLike) -> None:
    """Wait until an edit stands at the gate, and the engine knows that it runs."""
    assert await asyncio.to_thread(gate.reached.wait, 60)
    while engine.status().queue_length:
        await asyncio.to_thread(threading.Event().wait, 0.001)


def usual(clock: ManualClock, step_s: float) -> FakeWorker:
    """A worker whose steps take this long."""
    return FakeWorker(before_step=lambda job, step: clock.advance(step_s))


TOO_SLOW = (
    "such an edit takes about {} s here, and EDIT_TIMEOUT is 150 s; use a faster mode, fewer "
    "num_steps, a lower size_level, or a higher EDIT_TIMEOUT"
)


async def test_an_edit_yields_every_step_and_then_the_picture(make_engine: MakeEngine) -> None:
    edit = make_engine(FakeWorker()).submit(job := a_job())

    texts = [event.text async for event in edit.events()]
    result = await edit.result()

    steps = [f"denoising {k}/10" for k in range(1, 11)]
    assert texts == ["queued, position 1", "loading model", "encoding", *steps, "decoding"]
    assert np.array_equal(result.painted.image, 255 - canvas(job))


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
    assert engine.status().residence.location == "Unloaded"

    await engine.submit(a_job()).result()
    second = engine.submit(a_job())
    texts = [event.text async for event in second.events()]

    assert "loading model" not in texts
    assert engine.status().residence.location == "CPU"
    assert engine.status().total_loads == 1


async def test_a_full_line_refuses_at_once_and_says_when_to_come_back(
    make_engine: MakeEngine,
) -> None:
    gate = Gate()
    engine = make_engine(FakeWorker(before_step=gate), max_queue=1)
    running = engine.submit(a_job())
    await reached(gate, engine)
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
    await reached(gate, engine)
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
    await reached(gate, engine)
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
    await reached(gate, engine)

    edit.cancel()

    with pytest.raises(EditCancelledError):
        await edit.result()  # its caller need not wait until the worker is free
    assert await asyncio.to_thread(worker.heard_cancel.wait, 60)  # a cluster takes a moment
    gate.open()
    worker.before_step = lambda job, step: None
    await engine.submit(a_job("next")).result()
    assert worker.stopped_at == {"endless": 3}


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
    await engine.submit(a_job("next", num_steps=2)).result()
    assert worker.stopped_at == {"invert": 4}


async def test_a_failure_ends_its_edit_and_the_next_one_works(make_engine: MakeEngine) -> None:
    def fail(job: EditJob, step: int) -> None:
        raise OutOfMemoryError("too large")

    worker = FakeWorker(before_step=fail)
    engine = make_engine(worker)

    with pytest.raises(OutOfMemoryError, match=r"^CUDA out of memory: too large$"):
        await engine.submit(a_job()).result()

    worker.before_step = lambda job, step: None
    await engine.submit(a_job()).result()
    assert engine.status().total_loads == 1


async def test_status_answers_while_an_edit_runs(make_engine: MakeEngine) -> None:
    gate = Gate()
    engine = make_engine(FakeWorker(before_step=gate))
    running = engine.submit(a_job())
    await reached(gate, engine)
    waiting = engine.submit(a_job())

    status = engine.status()

    assert status.is_editing
    assert status.queue_length == 1
    assert status.idle_time_s == 0.0
    gate.open()
    await asyncio.gather(running.result(), waiting.result())
    assert not engine.status().is_editing


async def test_silence_is_broken_by_repeating_the_last_event(make_engine: MakeEngine) -> None:
    gate = Gate(at_step=2)
    edit = make_engine(FakeWorker(before_step=gate)).submit(a_job())
    repeated = 0

    async for event in edit.events(heartbeat_s=0.01):
        repeated += event.text == "denoising 1/10"
        if repeated == 3:
            gate.open()

    assert repeated >= 3


async def test_a_preview_is_not_repeated_when_silence_is_broken(make_engine: MakeEngine) -> None:
    gate = Gate(at_step=6)
    edit = make_engine(FakeWorker(before_step=gate)).submit(replace(a_job(), previews=1))
    seen = []

    async for event in edit.events(heartbeat_s=0.01):
        if event.text == "denoising 5/10":
            seen.append(event.preview is not None)
        if len(seen) == 3:
            gate.open()

    assert seen[:3] == [True, False, False]
    assert not any(seen[3:])


async def test_a_slow_listener_finds_every_step_but_only_the_latest_preview(
    make_engine: MakeEngine,
) -> None:
    edit = make_engine(FakeWorker()).submit(replace(a_job(), previews=3))
    await edit.result()

    events = [event async for event in edit.events()]

    steps = [event.step for event in events if event.phase is Phase.DENOISING]
    assert steps == list(range(1, 11))
    (shown,) = (event for event in events if event.preview is not None)
    assert shown.step == 7
    assert isinstance(edit.job, EditJob)
    expected = predicted(edit.job, 7)
    assert shown.preview is not None
    assert expected is not None
    assert np.array_equal(shown.preview, expected)


async def test_closing_ends_every_edit_and_refuses_new_ones(make_engine: MakeEngine) -> None:
    gate = Gate()
    worker = FakeWorker(before_step=gate)
    engine = make_engine(worker)
    running = engine.submit(a_job("running"))
    await reached(gate, engine)
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


async def test_offload_takes_the_model_from_the_gpu_and_the_next_edit_brings_it_back(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(FakeWorker(device="cuda"))
    await engine.submit(a_job()).result()
    assert engine.status().residence.location == "GPU"

    first, again = await moved(engine.offload()), await moved(engine.offload())

    assert first.residence.location == again.residence.location == "CPU"
    assert (again.total_loads, again.gpu_to_cpu, again.cpu_to_gpu) == (1, 1, 0)
    await engine.submit(a_job()).result()
    status = engine.status()
    assert status.residence.location == "GPU"
    assert (status.total_loads, status.gpu_to_cpu, status.cpu_to_gpu) == (2, 1, 1)


async def test_release_ends_the_worker_and_the_next_edit_starts_another(
    make_engine: MakeEngine,
) -> None:
    worker = FakeWorker(device="cuda", held=Memory(allocated_gb=3.0))
    engine = make_engine(worker)
    await engine.submit(a_job()).result()

    status = await moved(engine.release())

    assert not worker.is_alive
    assert status.residence.location == "Unloaded"
    assert status.residence.memory == Memory()
    assert (await moved(engine.release())).full_releases == 1
    await engine.submit(a_job()).result()
    assert engine.status().total_loads == 2
    assert engine.status().cpu_to_gpu == 0


async def test_a_batch_that_was_let_in_keeps_its_place_in_a_full_line(
    make_engine: MakeEngine,
) -> None:
    gate = Gate()
    engine = make_engine(FakeWorker(before_step=gate), max_queue=1)
    running = engine.submit(a_job())
    await reached(gate, engine)
    waiting = engine.submit(a_job())

    item = engine.submit_next(a_job())

    with pytest.raises(ServerBusyError):
        engine.submit(a_job())
    gate.open()
    await asyncio.gather(running.result(), waiting.result(), item.result())


async def test_an_edit_with_previews_tells_how_long_one_without_them_takes(
    make_engine: MakeEngine,
) -> None:
    clock = ManualClock()
    worker = FakeWorker(before_step=lambda job, step: clock.advance(2))
    engine = make_engine(worker, clock=clock)
    before = engine.predicted_s(a_job())

    await engine.submit(replace(a_job(), previews=8)).result()

    assert before is None
    assert engine.predicted_s(a_job()) == 20


async def test_an_edit_that_cannot_end_in_time_is_refused_before_it_runs(
    make_engine: MakeEngine,
) -> None:
    clock = ManualClock()
    worker = usual(clock, step_s=10)
    engine = make_engine(worker, clock=clock, edit_timeout_s=150)
    await engine.submit(a_job("known")).result()

    for submit in (engine.submit, engine.submit_next):
        with pytest.raises(DeadlineExceededError) as refusal:
            submit(a_job(num_steps=28))

    assert str(refusal.value) == f"Deadline exceeded: {TOO_SLOW.format(280)}"
    assert worker.started == ["known"]
    await engine.submit(a_job(num_steps=14)).result()  # as it says


async def test_an_edit_that_may_just_take_too_long_runs_with_a_warning(
    make_engine: MakeEngine,
) -> None:
    clock = ManualClock()
    engine = make_engine(usual(clock, step_s=10), clock=clock, edit_timeout_s=150)
    await engine.submit(a_job()).result()

    edit = engine.submit(a_job(num_steps=20))
    warnings = {event.warning async for event in edit.events()}

    assert warnings == {TOO_SLOW.format(200)}
    with pytest.raises(DeadlineExceededError, match="longer than 150 s"):
        await edit.result()
