"""The engine: order, bounds, cancellation, moves of the model, supervision and true status."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fakes import (
    FakeWorker,
    Gate,
    ManualClock,
    a_job,
    evaluated_steps,
    settled,
    slow_disk,
)
from step1x_edit.channel import EditJob, Memory, Phase, Progress, Report
from step1x_edit.engine.engine import HEARTBEAT_S, Engine, EngineStatus
from step1x_edit.errors import (
    DeadlineExceededError,
    EditCancelledError,
    ModelUnavailableError,
    OutOfMemoryError,
    ShuttingDownError,
    WorkerLostError,
)

MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def make(worker: FakeWorker, **options: object) -> Engine:
        engines.append(Engine(worker, **options))  # type: ignore[arg-type]
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


async def moved(future: object) -> EngineStatus:
    return await asyncio.wait_for(asyncio.wrap_future(future), 60)  # type: ignore[arg-type]


async def until(claim: Callable[[], bool]) -> None:
    """Wait for another thread to make a claim true; the test's timeout bounds it."""
    while not claim():
        await asyncio.to_thread(threading.Event().wait, 0.001)


async def reached(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.reached.wait, 60)


async def test_a_worker_that_cannot_be_started_is_tried_again_by_the_next_edit(
    make_engine: MakeEngine,
) -> None:
    worker, attempts = FakeWorker(), [OSError(12, "Cannot allocate memory")]

    def start(ended: Callable[[], None]) -> FakeWorker:
        if attempts:
            raise attempts.pop()
        return worker(ended)

    engine = make_engine(start)

    with pytest.raises(ModelUnavailableError, match=r"^Manager not initialized: .*allocate memory"):
        await engine.submit(a_job()).result()
    await engine.submit(a_job()).result()


@pytest.mark.parametrize("end", ["success", "failure", "cancellation"])
async def test_memory_is_measured_after_every_edit(make_engine: MakeEngine, end: str) -> None:
    worker = FakeWorker()
    engine = make_engine(worker)

    def step(job: EditJob, step: int) -> None:
        worker.held = Memory(allocated_gb=3.0)
        if end == "failure":
            raise OutOfMemoryError
        if end == "cancellation":
            edit.cancel()

    worker.before_step = step
    edit = engine.submit(a_job())
    await asyncio.gather(edit.result(), return_exceptions=True)
    await moved(engine.offload())  # means nothing here, but comes after the edit

    assert engine.status().residence.memory == Memory(allocated_gb=3.0)


def test_a_sign_of_life_comes_within_the_promised_five_seconds() -> None:
    assert HEARTBEAT_S <= 4.0


async def test_idle_time_counts_from_the_end_of_the_last_edit(make_engine: MakeEngine) -> None:
    clock = ManualClock()
    engine = make_engine(FakeWorker(before_step=lambda job, step: clock.advance(5)), clock=clock)
    assert engine.status().idle_time_s == 0.0

    await engine.submit(a_job()).result()
    clock.advance(7)

    assert engine.status().idle_time_s == 7.0


@pytest.mark.parametrize(
    ("num_steps", "previews", "expected"),
    [(10, 0, []), (10, 1, [5]), (28, 3, [7, 14, 21]), (10, 3, [2, 5, 7]), (3, 9, [1]), (1, 9, [])],
)
def test_previews_are_spread_evenly_and_leave_the_last_step_out(
    num_steps: int, previews: int, expected: list[int]
) -> None:
    job = replace(a_job(num_steps=num_steps), previews=previews)

    assert sorted(job.preview_steps) == expected


def test_few_steps_have_few_previews_and_as_many_as_a_stream_may_ask_for() -> None:
    """The page asks for 8 and a stream for 3, and an edit has at least 10 steps."""
    numbers = {
        steps: len(replace(a_job(num_steps=steps), previews=8).preview_steps)
        for steps in (10, 12, 23, 24, 50)
    }

    assert numbers == {10: 3, 12: 4, 23: 7, 24: 8, 50: 8}


# --- moves of the model --------------------------------------------------------------------------


async def test_moves_without_a_model_do_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine(FakeWorker())

    assert (await moved(engine.offload())).residence.location == "Unloaded"
    assert await moved(engine.release()) == EngineStatus(is_monitoring=True)


@pytest.mark.parametrize("move", ["offload", "release"])
async def test_a_move_waits_for_the_running_edit_and_goes_before_the_waiting_ones(
    make_engine: MakeEngine, move: str
) -> None:
    gate, worker = Gate(), FakeWorker(device="cuda")
    worker.before_step = gate
    engine = make_engine(worker)
    running = engine.submit(a_job("running"))
    await reached(gate)
    waiting = engine.submit(a_job("waiting"))

    future = getattr(engine, move)()
    started_then: list[str] = []
    future.add_done_callback(lambda _: started_then.extend(worker.started))
    assert not future.done()
    assert engine.status().residence.location == "GPU"
    gate.open()
    status = await moved(future)

    assert status.residence.location == ("CPU" if move == "offload" else "Unloaded")
    assert started_then == ["running"]
    await asyncio.gather(running.result(), waiting.result())


async def test_an_idle_model_is_offloaded_and_later_released(make_engine: MakeEngine) -> None:
    clock, worker = ManualClock(), FakeWorker(device="cuda")
    worker.before_step = lambda job, step: clock.advance(40)  # longer than the timeouts
    engine = make_engine(worker, clock=clock, idle_timeout_s=60, release_timeout_s=300)
    await engine.submit(a_job()).result()
    await asyncio.to_thread(settled, clock)
    assert engine.status().residence.location == "GPU"

    clock.advance(59)
    await asyncio.to_thread(settled, clock)
    assert engine.status().residence.location == "GPU"
    clock.advance(1)
    await until(lambda: engine.status().residence.location == "CPU")
    assert engine.status().gpu_to_cpu == 1
    clock.advance(239)
    await asyncio.to_thread(settled, clock)
    assert engine.status().residence.location == "CPU"
    clock.advance(1)
    await until(lambda: engine.status().residence.location == "Unloaded")
    assert engine.status().full_releases == 1
    assert not worker.is_alive


async def test_without_timeouts_an_idle_model_stays_where_it_is(make_engine: MakeEngine) -> None:
    clock = ManualClock()
    engine = make_engine(FakeWorker(device="cuda"), clock=clock, idle_timeout_s=0)
    await engine.submit(a_job()).result()

    clock.advance(1e9)
    await asyncio.to_thread(settled, clock)

    assert engine.status().residence.location == "GPU"
    assert not engine.status().is_monitoring


# --- supervision ---------------------------------------------------------------------------------


def crash_once(worker: FakeWorker, at_step: int = 3) -> None:
    def before_step(job: EditJob, step: int) -> None:
        if step == at_step:
            worker.before_step = lambda job, step: None
            worker.crash()

    worker.before_step = before_step


async def test_a_crash_ends_the_running_edit_and_the_waiting_ones_go_on(
    make_engine: MakeEngine,
) -> None:
    worker = FakeWorker()
    crash_once(worker)
    engine = make_engine(worker)
    edits = [engine.submit(a_job(str(k))) for k in range(3)]

    first, *others = await asyncio.gather(*(e.result() for e in edits), return_exceptions=True)

    assert isinstance(first, WorkerLostError)
    assert str(first) == ("Worker process lost: it was ended by SIGSEGV; try again")
    assert not any(isinstance(other, Exception) for other in others)
    assert worker.started == ["0", "1", "2"]
    assert engine.status().full_releases == 0


async def test_a_crash_of_an_idle_worker_shows_in_the_status(make_engine: MakeEngine) -> None:
    worker = FakeWorker(device="cuda")
    engine = make_engine(worker)
    await engine.submit(a_job()).result()

    worker.crash()

    await until(lambda: engine.status().residence.location == "Unloaded")
    await engine.submit(a_job()).result()


async def test_a_worker_that_keeps_dying_is_restarted_three_times_in_ten_minutes(
    make_engine: MakeEngine,
) -> None:
    clock, worker = ManualClock(), FakeWorker()
    worker.before_step = lambda job, step: worker.crash()
    engine = make_engine(worker, clock=clock)

    for _ in range(4):
        with pytest.raises(WorkerLostError):
            await engine.submit(a_job()).result()
    with pytest.raises(ModelUnavailableError, match="has ended 4 times") as refusal:
        await engine.submit(a_job()).result()

    assert str(refusal.value).startswith("Manager not initialized: the worker process")
    assert "SIGSEGV" in str(refusal.value)
    assert refusal.value.retry_after_s == 600
    assert len(worker.started) == 4
    clock.advance(600)
    worker.before_step = lambda job, step: None
    await engine.submit(a_job()).result()


async def test_a_worker_that_falls_silent_for_ten_usual_steps_is_ended(
    make_engine: MakeEngine,
) -> None:
    clock, worker, waited = ManualClock(), FakeWorker(), []

    def silence(seconds: float) -> None:
        waited.append(seconds)
        clock.advance(seconds)

    def before_step(job: EditJob, step: int) -> None:
        clock.advance(2)
        if step == 5:
            worker.silent_for = silence

    worker.before_step = before_step
    engine = make_engine(worker, clock=clock, edit_timeout_s=900)

    with pytest.raises(WorkerLostError, match="it was silent for 20 s"):
        await engine.submit(a_job()).result()

    assert sum(waited) == 18  # and the 2 that the step has taken by then
    assert not worker.is_alive
    worker.silent_for, worker.before_step = None, lambda job, step: None
    await engine.submit(a_job()).result()


async def test_a_slow_preview_is_not_taken_for_silence(make_engine: MakeEngine) -> None:
    clock = ManualClock()

    class SlowPreviews(FakeWorker):
        late: Report | None = None

        def receive(self, timeout_s: float) -> Report | None:
            if self.late is not None:
                late, self.late = self.late, None
                return late
            report = super().receive(timeout_s)
            if report and isinstance(report.event, Progress) and report.event.preview is not None:
                clock.advance(min(60, timeout_s))
                self.late = report
                return None
            return report

    worker = SlowPreviews(before_step=lambda job, step: clock.advance(0.1))
    engine = make_engine(worker, clock=clock)

    await engine.submit(replace(a_job(), previews=2)).result()

    assert clock.now() > 220


async def test_a_worker_that_ignores_a_cancel_is_ended(make_engine: MakeEngine) -> None:
    clock, worker = ManualClock(), FakeWorker()

    def before_step(job: EditJob, step: int) -> None:
        clock.advance(0.1)
        if step == 5:
            worker.silent_for = clock.advance
            edit.cancel()

    worker.before_step = before_step
    engine = make_engine(worker, clock=clock)
    edit = engine.submit(a_job())

    with pytest.raises(EditCancelledError):
        await edit.result()

    await moved(engine.offload())  # comes after the edit
    assert not worker.is_alive
    assert clock.now() < 200


async def test_a_worker_that_hangs_while_it_loads_is_ended_at_the_limit_of_loading(
    make_engine: MakeEngine,
) -> None:
    clock = ManualClock()
    worker = FakeWorker()
    worker.silent_for = clock.advance
    engine = make_engine(worker, clock=clock, edit_timeout_s=10, load_timeout_s=2000)

    with pytest.raises(DeadlineExceededError, match="loading the model took longer than 2000 s"):
        await engine.submit(a_job()).result()

    await moved(engine.offload())  # comes after the edit
    assert not worker.is_alive
    assert clock.now() > 2000


async def test_loading_does_not_count_in_the_time_of_an_edit(make_engine: MakeEngine) -> None:
    clock = ManualClock()
    worker = FakeWorker(lambda job, step: clock.advance(9), load=slow_disk(clock, 300))
    engine = make_engine(worker, clock=clock, edit_timeout_s=100, load_timeout_s=1201)

    await engine.submit(a_job()).result()

    assert clock.now() == 100 + 4 * 300 + 10 * 9


async def test_the_time_before_and_after_a_second_loading_counts_together(
    make_engine: MakeEngine,
) -> None:
    """As when memory runs out, and the model is placed again."""
    clock = ManualClock()

    class PlacesItAgain(FakeWorker):
        again: Report | None = None

        def receive(self, timeout_s: float) -> Report | None:
            if self.again is not None:
                again, self.again = self.again, None
                clock.advance(40)
                return again
            report = super().receive(timeout_s)
            if report and report.event == Progress(Phase.DENOISING, 5, 10):
                self.again = report
                return replace(report, event=Progress(Phase.LOADING))
            return report

    worker = PlacesItAgain(before_step=lambda job, step: clock.advance(10))
    engine = make_engine(worker, clock=clock, edit_timeout_s=100.5, load_timeout_s=50)

    await engine.submit(a_job()).result()

    engine = make_engine(worker, clock=clock, edit_timeout_s=95, load_timeout_s=50)
    with pytest.raises(DeadlineExceededError, match="the edit took longer than 95 s"):
        await engine.submit(a_job()).result()


async def test_loading_beyond_its_limit_ends_the_edit_and_the_next_one_loads_again(
    make_engine: MakeEngine,
) -> None:
    clock = ManualClock()
    disks = iter([slow_disk(clock, 300), slow_disk(clock, 100)])
    worker = FakeWorker(load=lambda: next(disks)())
    engine = make_engine(worker, clock=clock, load_timeout_s=700)
    late, waiting = engine.submit(a_job("late")), engine.submit(a_job("next"))

    with pytest.raises(DeadlineExceededError) as refusal:
        await late.result()

    assert str(refusal.value) == (
        "Deadline exceeded: loading the model took longer than 700 s; keep it on a faster disk, "
        "or set a higher LOAD_TIMEOUT"
    )
    await waiting.result()
    assert worker.started == ["late", "next"]
    assert worker.is_alive  # it was stopped, not lost


def usual(clock: ManualClock, step_s: float) -> FakeWorker:
    """A worker whose steps take this long."""
    return FakeWorker(before_step=lambda job, step: clock.advance(step_s))


TOO_SLOW = (
    "such an edit takes about {} s here, and EDIT_TIMEOUT is 150 s; use a faster mode, fewer "
    "num_steps, a lower size_level, or a higher EDIT_TIMEOUT"
)


async def test_a_busy_hour_does_not_refuse_what_was_possible_before(
    make_engine: MakeEngine,
) -> None:
    clock = ManualClock()
    worker = usual(clock, step_s=5)
    engine = make_engine(worker, clock=clock, edit_timeout_s=150)
    await engine.submit(a_job()).result()
    worker.before_step = lambda job, step: clock.advance(14)
    await engine.submit(a_job()).result()
    worker.before_step = lambda job, step: clock.advance(5)

    edit = engine.submit(a_job(num_steps=28))
    first = await anext(edit.events())
    await edit.result()

    assert first.warning == TOO_SLOW.format(392)


async def test_a_reflection_that_may_end_after_a_round_is_not_refused(
    make_engine: MakeEngine,
) -> None:
    clock = ManualClock()
    worker = usual(clock, step_s=7)
    worker.model = "v1.2"
    engine = make_engine(worker, clock=clock, edit_timeout_s=150)
    job = replace(a_job(), reflection=True)  # takes two rounds here, and may take three
    await engine.submit(job).result()

    edit = engine.submit(job)
    first = await anext(edit.events())
    await edit.result()

    assert first.warning == TOO_SLOW.format(210)


async def test_the_first_edit_warns_as_soon_as_its_steps_show_that_it_is_too_slow(
    make_engine: MakeEngine,
) -> None:
    clock = ManualClock()
    engine = make_engine(usual(clock, step_s=10), clock=clock, edit_timeout_s=150)

    edit = engine.submit(a_job(num_steps=28))
    warnings = {event.text: event.warning async for event in edit.events()}

    assert warnings["denoising 1/28"] is None
    assert warnings["denoising 2/28"] == warnings["denoising 15/28"] == TOO_SLOW.format(280)


async def test_steps_that_a_mode_skips_do_not_count_as_time(make_engine: MakeEngine) -> None:
    clock = ManualClock()

    def before_step(job: EditJob, step: int) -> None:
        clock.advance(13 if step in evaluated_steps(job) else 0)

    engine = make_engine(FakeWorker(before_step), clock=clock, edit_timeout_s=150)

    job = replace(a_job(num_steps=28), mode="turbo")
    edit = engine.submit(job)
    seen = [event async for event in edit.events() if event.phase is Phase.DENOISING]

    assert {event.warning for event in seen} == {None}
    assert seen[1].left_s == 13 * (len(evaluated_steps(job)) - 2)
    assert seen[2].left_s == seen[1].left_s  # the third step is skipped


async def test_a_worker_that_is_ready_has_no_time_for_loading(make_engine: MakeEngine) -> None:
    clock, worker = ManualClock(), FakeWorker()
    engine = make_engine(worker, clock=clock, edit_timeout_s=100)
    await engine.submit(a_job()).result()

    worker.silent_for = clock.advance

    with pytest.raises(DeadlineExceededError, match="the edit took longer than 100 s"):
        await engine.submit(a_job()).result()


async def test_an_edit_reports_what_is_read_and_how_long_the_rest_takes(
    make_engine: MakeEngine,
) -> None:
    clock = ManualClock()
    engine = make_engine(FakeWorker(load=slow_disk(clock, 20)), clock=clock)

    edit = engine.submit(a_job())
    texts = [event.text async for event in edit.events() if event.phase is Phase.LOADING]

    assert texts == [
        "loading model",
        "reading 10.0 of 40.0 GB",
        "reading 20.0 of 40.0 GB, about 40 s",
        "reading 30.0 of 40.0 GB, about 20 s",
        "loading model",
    ]
    assert engine.status().loading is None


async def test_closing_refuses_moves_and_ends_the_worker(make_engine: MakeEngine) -> None:
    worker = FakeWorker()
    engine = make_engine(worker)
    await engine.submit(a_job()).result()

    await asyncio.to_thread(engine.close)

    assert not worker.is_alive
    with pytest.raises(ShuttingDownError):
        engine.release()


FORKS = """
import asyncio, os
from fakes import FakeWorker, a_job
from step1x_edit.engine.engine import Engine

engine = Engine(FakeWorker())
unused = Engine(lambda on_end: print("a worker is started", flush=True))

async def edit():
    try:
        return (await engine.submit(a_job()).result()).residence.location
    except Exception as error:
        return str(error)

print(asyncio.run(edit()), flush=True)
if not (child := os.fork()):
    unused.prepare()
    print(asyncio.run(edit()), flush=True)
    engine.close()
    os._exit(0)
print(os.waitpid(child, 0)[1], asyncio.run(edit()))
engine.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_engine_refuses_at_once_in_a_forked_child_and_goes_on_in_the_parent() -> None:
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", FORKS],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    parent, child, parent_again = done.stdout.splitlines()

    assert (parent, parent_again) == ("CPU", "0 CPU"), done.stderr
    assert child.startswith("Manager not initialized: this process was forked from the one that")
