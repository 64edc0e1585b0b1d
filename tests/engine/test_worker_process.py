"""The worker process: what crosses its border, how it dies, and that it never outlives us."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fakes import canvas, predicted
from step1x_edit.channel import EditJob, Memory, Start
from step1x_edit.engine.engine import Engine
from step1x_edit.engine.worker_process import WorkerProcess
from step1x_edit.errors import (
    EditCancelledError,
    InternalError,
    OutOfMemoryError,
    Step1XEditError,
    WorkerLostError,
)

PATIENCE_S = 240

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


def a_job(prompt: str = "invert", num_steps: int = 3) -> EditJob:
    image = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return EditJob(image, prompt, "", num_steps, 6.0, 512, seed=1)


class ToyEngine(Engine):
    """An engine with toy workers; keeps the processes that it has started."""

    def __init__(self, **options: object) -> None:
        self.processes: list[WorkerProcess] = []
        self.max_stop_s = 10.0
        super().__init__(self._started, **options)  # type: ignore[arg-type]

    def _started(self, on_end: Callable[[], None]) -> WorkerProcess:
        worker = WorkerProcess(
            Start(model_version="v1.1"), on_end, "toy_worker", max_stop_s=self.max_stop_s
        )
        self.processes.append(worker)
        return worker


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[ToyEngine]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]))
    engine = ToyEngine()
    yield engine
    engine.close()
    assert not any(is_running(worker.pid) for worker in engine.processes)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def failure(engine: Engine, prompt: str) -> Step1XEditError:
    with pytest.raises(Step1XEditError) as raised:
        await engine.submit(a_job(prompt)).result()
    return raised.value


async def test_a_picture_crosses_the_border_and_comes_back(engine: ToyEngine) -> None:
    edit = engine.submit(job := a_job())

    texts = [event.text async for event in edit.events()]
    result = await edit.result()

    assert texts[1:] == [
        *("loading model", "loading model", "encoding"),
        *("denoising 1/3", "denoising 2/3", "denoising 3/3", "decoding"),
    ]
    assert np.array_equal(result.painted.image, 255 - canvas(job))
    assert result.painted.warning == "v1.1 雪 "  # what it read from stdin: nothing
    assert result.residence.memory == Memory(0.5, 1.5)
    assert engine.status().residence == result.residence


async def test_previews_cross_the_border_with_their_steps(engine: ToyEngine) -> None:
    edit = engine.submit(job := replace(a_job(), previews=1))

    previews = {event.text: event.preview async for event in edit.events()}

    assert [text for text, preview in previews.items() if preview is not None] == ["denoising 1/3"]
    preview, expected = previews["denoising 1/3"], predicted(job, 1)
    assert preview is not None
    assert expected is not None
    assert np.array_equal(preview, expected)


async def test_one_process_serves_all_edits_until_it_is_released(engine: ToyEngine) -> None:
    await engine.submit(a_job()).result()
    await engine.submit(a_job()).result()
    (process,) = engine.processes
    assert is_running(process.pid)

    offloaded = await asyncio.wrap_future(engine.offload())
    released = await asyncio.wrap_future(engine.release())

    assert offloaded.residence.location == "CPU"
    assert released.residence.location == "Unloaded"
    assert not is_running(process.pid)
    await engine.submit(a_job()).result()
    assert len(engine.processes) == 2


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL", "SIGABRT"])
async def test_a_death_ends_one_edit_and_a_new_process_does_the_next(
    engine: ToyEngine, name: str
) -> None:
    dying, next_one = engine.submit(a_job(f"die {name}")), engine.submit(a_job())

    with pytest.raises(WorkerLostError, match=f"it was ended by {name}"):
        await dying.result()
    await next_one.result()

    assert len(engine.processes) == 2


@pytest.mark.parametrize("phase", ["loading", "encoding", "denoising", "decoding"])
async def test_a_process_may_be_killed_in_any_phase(engine: ToyEngine, phase: str) -> None:
    edit = engine.submit(a_job(f"wait in {phase}", num_steps=1))
    async for event in edit.events():
        if event.phase.value == phase:
            with contextlib.suppress(ProcessLookupError):  # an earlier event has killed it
                os.kill(engine.processes[0].pid, signal.SIGKILL)

    with pytest.raises(WorkerLostError, match="SIGKILL, perhaps because memory ran out"):
        await edit.result()
    await engine.submit(a_job()).result()


@pytest.mark.parametrize("phase", ["loading", "encoding", "denoising", "decoding"])
async def test_a_cancel_frees_the_process_in_any_phase(engine: ToyEngine, phase: str) -> None:
    edit = engine.submit(a_job(f"wait in {phase}", num_steps=1))
    async for event in edit.events():
        if event.phase.value == phase:
            edit.cancel()

    with pytest.raises(EditCancelledError):
        await edit.result()
    await engine.submit(a_job()).result()
    assert len(engine.processes) == 1


async def test_an_edit_that_is_cancelled_before_the_process_is_up_never_runs(
    engine: ToyEngine,
) -> None:
    # Both messages wait for the process; a short edit could be done before it reads the second.
    edit = engine.submit(a_job("die SIGKILL", num_steps=200))
    edit.cancel()

    with pytest.raises(EditCancelledError):
        await edit.result()
    await engine.submit(a_job()).result()
    assert len(engine.processes) == 1


async def test_a_process_that_dies_idle_is_noticed(engine: ToyEngine) -> None:
    await engine.submit(a_job()).result()

    os.kill(engine.processes[0].pid, signal.SIGKILL)
    while engine.status().residence.location != "Unloaded":
        await asyncio.to_thread(threading.Event().wait, 0.001)

    await engine.submit(a_job()).result()


async def test_a_hanging_process_is_ended_when_the_engine_closes(engine: ToyEngine) -> None:
    edit = engine.submit(a_job("wait in decoding"))
    async for event in edit.events():
        if event.text == "decoding":
            os.kill(engine.processes[0].pid, signal.SIGSTOP)
            await asyncio.to_thread(engine.close, 0.2)

    assert (await asyncio.gather(edit.result(), return_exceptions=True))[0]
    assert engine.processes[0]._process.wait(PATIENCE_S) == -signal.SIGKILL


async def test_a_process_that_is_stopped_is_taken_for_dead(
    monkeypatch: pytest.MonkeyPatch, engine: ToyEngine
) -> None:
    impatient = ToyEngine(min_patience_s=0.3)
    edit = impatient.submit(a_job("wait in nothing", num_steps=100_000))
    async for event in edit.events():
        if event.text == "denoising 500/100000":
            os.kill(impatient.processes[0].pid, signal.SIGSTOP)

    with pytest.raises(WorkerLostError, match="it was silent for"):
        await edit.result()
    await impatient.submit(a_job()).result()
    impatient.close()


@pytest.mark.parametrize("phase", ["loading", "decoding"])
async def test_a_process_that_is_stopped_is_lost_in_any_phase(
    engine: ToyEngine, phase: str
) -> None:
    engine.max_stop_s = 0.3
    edit = engine.submit(a_job(f"wait in {phase}"))
    async for event in edit.events():
        if event.phase == phase:
            os.kill(engine.processes[0].pid, signal.SIGSTOP)

    with pytest.raises(WorkerLostError, match=r"it was stopped for 0\.3 s"):
        await edit.result()
    await engine.submit(a_job()).result()


async def test_a_process_that_is_stopped_for_a_moment_goes_on(engine: ToyEngine) -> None:
    edit = engine.submit(a_job("wait in loading"))
    async for event in edit.events(heartbeat_s=0.05):
        if event.phase == "loading":
            os.kill(engine.processes[0].pid, signal.SIGSTOP)
            os.kill(engine.processes[0].pid, signal.SIGCONT)
            edit.cancel()
    with pytest.raises(EditCancelledError):
        await edit.result()
    await engine.submit(a_job()).result()
    assert len(engine.processes) == 1


async def test_failures_cross_the_border_as_they_are(engine: ToyEngine) -> None:
    oom = await failure(engine, "fail")
    internal = await failure(engine, "stumble")
    nan = await failure(engine, "nan")

    assert isinstance(oom, OutOfMemoryError)
    assert str(oom) == "CUDA out of memory: on purpose"
    assert isinstance(internal, InternalError)
    assert "secret" not in str(internal)
    assert str(nan).startswith("Internal error: the model produced values that are not numbers")
    assert len(engine.processes) == 1


async def test_what_the_process_prints_goes_to_stderr(
    engine: ToyEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    await engine.submit(a_job("print")).result()
    await asyncio.to_thread(engine.close)

    out, err = capfd.readouterr()
    assert out == ""
    assert "a stray line" in err
    assert "stray bytes" in err


def test_a_process_whose_parent_ends_at_once_leaves_without_a_word() -> None:
    ours, theirs = multiprocessing.Pipe()
    with theirs:
        handle = theirs.fileno()
        command = [sys.executable, "-m", "step1x_edit.worker.process", str(handle)]
        process = subprocess.Popen(command, pass_fds=[handle], stderr=subprocess.PIPE)
    ours.close()

    _, stderr = process.communicate(timeout=60)

    assert (process.returncode, stderr) == (0, b"")


PARENT = """
import asyncio, numpy as np
from step1x_edit.channel import EditJob, Start
from step1x_edit.engine.engine import Engine
from step1x_edit.engine.worker_process import WorkerProcess

async def main():
    workers = []
    def start(on_end):
        workers.append(WorkerProcess(Start(), on_end, module="toy_worker"))
        return workers[-1]
    engine = Engine(start)
    edit = engine.submit(EditJob(np.zeros((4, 4, 3), np.uint8), "PROMPT", "", 1, 6.0, 512, 1))
    async for event in edit.events():
        if event.phase.value == "decoding":
            print(workers[0].pid, flush=True)
asyncio.run(main())
"""


@pytest.mark.parametrize("prompt", ["hang", "wait in decoding"])
def test_the_process_leaves_when_its_parent_is_killed(engine: ToyEngine, prompt: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.replace("PROMPT", prompt)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_running(pid)

    parent.kill()
    parent.wait()

    # Only its parent can wait for a process; of a stranger we can see no more than that it is gone.
    assert (
        subprocess.run(
            ["timeout", "5", "tail", f"--pid={pid}", "-f", os.devnull], check=False
        ).returncode
        == 0
    )
