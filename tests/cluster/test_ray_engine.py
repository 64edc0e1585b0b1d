"""The line in front of replicas: which one edits, and what happens when some are lost."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from fake_cluster import FakeCluster
from fakes import FakeWorker, Gate, ManualClock, a_job
from step1x_edit.channel import EditJob, Memory
from step1x_edit.cluster.ray_engine import RayEngine
from step1x_edit.engine.engine import Engine
from step1x_edit.errors import (
    DeadlineExceededError,
    EditCancelledError,
    ModelUnavailableError,
    ServerBusyError,
    WorkerLostError,
)


class Made:
    """An engine, its cluster and the workers of its replicas."""

    def __init__(self, workers: tuple[FakeWorker, ...], options: dict[str, object]) -> None:
        self.workers = workers
        self.cluster = FakeCluster(*(Engine(worker) for worker in workers))
        lanes = max(1, len(workers))
        self.engine = RayEngine(self.cluster, **{"lanes": lanes, **options})  # type: ignore[arg-type]

    @property
    def started(self) -> list[str]:
        """The prompts of the edits that replicas have begun."""
        return sorted(prompt for worker in self.workers for prompt in worker.started)


MakeCluster = Callable[..., Made]


@pytest.fixture
def make_cluster() -> Iterator[MakeCluster]:
    made: list[Made] = []

    def make(*workers: FakeWorker, **options: object) -> Made:
        made.append(Made(workers, options))
        return made[-1]

    yield make
    for each in made:
        each.engine.close()


async def until(claim: Callable[[], bool]) -> None:
    """Wait for another thread to make a claim true; the test's timeout bounds it."""
    while not claim():
        await asyncio.to_thread(threading.Event().wait, 0.001)


def running_at(cluster: Made, gates: list[Gate]) -> int:
    """The index of the replica whose worker stands at its gate."""
    return next(index for index, gate in enumerate(gates) if gate.reached.is_set())


def gated(count: int) -> tuple[list[Gate], list[FakeWorker]]:
    gates = [Gate(at_step=3) for _ in range(count)]
    return gates, [FakeWorker(before_step=gate) for gate in gates]


async def test_replicas_edit_at_the_same_time_and_a_burst_on_idle_ones_is_not_refused(
    make_cluster: MakeCluster,
) -> None:
    gates, workers = gated(3)
    made = make_cluster(*workers, max_queue=1)

    edits = [made.engine.submit(a_job(str(number))) for number in range(4)]
    await until(lambda: all(gate.reached.is_set() for gate in gates))

    with pytest.raises(ServerBusyError, match="1 edit is waiting"):
        made.engine.submit(a_job())
    for gate in gates:
        gate.open()
    await asyncio.gather(*(edit.result() for edit in edits))
    assert made.started == ["0", "1", "2", "3"]


async def test_an_edit_whose_replica_is_lost_runs_again_on_another(
    make_cluster: MakeCluster,
) -> None:
    gates, workers = gated(2)
    made = make_cluster(*workers)
    edit = made.engine.submit(a_job("precious"))
    texts: list[str] = []

    async for event in edit.events():
        texts.append(event.text)
        if event.text == "denoising 2/10" and texts.count(event.text) == 1:
            made.cluster.lose(f"replica-{running_at(made, gates)}")
            for gate in gates:
                gate.open()
    await edit.result()

    assert texts.count("queued, position 1") == texts.count("denoising 2/10") == 2
    assert texts[texts.index("denoising 2/10") + 1] == "queued, position 1"
    assert texts.count("denoising 10/10") == 1
    assert made.started == ["precious", "precious"]


async def test_an_edit_is_given_up_after_three_replicas(make_cluster: MakeCluster) -> None:
    gates, workers = gated(4)
    made = make_cluster(*workers)
    edit = made.engine.submit(a_job("unlucky"))

    lost: set[int] = set()
    for _ in range(3):
        await until(lambda: any(g.reached.is_set() for i, g in enumerate(gates) if i not in lost))
        number = next(i for i, g in enumerate(gates) if g.reached.is_set() and i not in lost)
        lost.add(number)
        made.cluster.lose(f"replica-{number}")
        gates[number].open()

    with pytest.raises(WorkerLostError, match=r"its replica is gone \(ActorDiedError\)"):
        await edit.result()
    assert made.started == ["unlucky"] * 3


async def test_an_edit_does_not_run_again_after_its_time(make_cluster: MakeCluster) -> None:
    gates, workers = gated(2)
    clock = ManualClock()
    made = make_cluster(*workers, clock=clock, edit_timeout_s=100)
    edit = made.engine.submit(a_job("late"))
    await until(lambda: any(gate.reached.is_set() for gate in gates))
    await until(lambda: made.engine.status().queue_length == 0)

    clock.advance(100)
    made.cluster.lose(f"replica-{running_at(made, gates)}")
    for gate in gates:
        gate.open()

    with pytest.raises(WorkerLostError):
        await edit.result()
    assert made.started == ["late"]


@pytest.mark.parametrize("deaths", [1, 2])
async def test_an_edit_whose_worker_dies_runs_again_once(
    make_cluster: MakeCluster, deaths: int
) -> None:
    workers = [FakeWorker(), FakeWorker(), FakeWorker()]
    left = [deaths]

    def die(job: EditJob, step: int) -> None:
        if step == 3 and left[0]:
            left[0] -= 1
            next(worker for worker in workers if worker.is_alive and worker.started).crash()

    for worker in workers:
        worker.before_step = die
    made = make_cluster(*workers)

    edit = made.engine.submit(a_job("heavy"))
    if deaths == 1:
        await edit.result()
    else:
        with pytest.raises(WorkerLostError, match="SIGSEGV"):
            await edit.result()
    assert made.started == ["heavy", "heavy"]


async def test_other_failures_are_not_tried_again(make_cluster: MakeCluster) -> None:
    def fail(job: EditJob, step: int) -> None:
        raise DeadlineExceededError("on purpose")

    made = make_cluster(FakeWorker(fail), FakeWorker(fail))

    with pytest.raises(DeadlineExceededError, match="on purpose"):
        await made.engine.submit(a_job()).result()

    assert len(made.started) == 1


async def test_a_cancelled_edit_stops_on_its_replica_and_is_not_tried_again(
    make_cluster: MakeCluster,
) -> None:
    gates, workers = gated(2)
    made = make_cluster(*workers)
    edit = made.engine.submit(a_job("endless", num_steps=10_000))
    await until(lambda: any(gate.reached.is_set() for gate in gates))

    edit.cancel()

    with pytest.raises(EditCancelledError):
        await edit.result()
    await until(lambda: any(worker.heard_cancel.is_set() for worker in workers))
    for gate in gates:
        gate.open()
    await until(lambda: any(worker.stopped_at for worker in workers))
    assert made.started == ["endless"]
    assert [worker.stopped_at for worker in workers if worker.stopped_at] == [{"endless": 3}]


async def test_without_replicas_a_caller_learns_that_one_starts(make_cluster: MakeCluster) -> None:
    made = make_cluster(look_every_s=0.01)
    edit = made.engine.submit(a_job())
    texts: list[str] = []

    async for event in edit.events():
        texts.append(event.text)
        if event.text == "starting":
            made.cluster.add(FakeWorker())

    assert texts[:2] == ["queued, position 1", "starting"]
    assert texts[-1] == "decoding"


async def test_a_silent_cluster_refuses_edits_with_one_sentence_until_it_answers(
    make_cluster: MakeCluster,
) -> None:
    gate = Gate()
    made = make_cluster(FakeWorker(before_step=gate), look_every_s=0.01, gone_s=0.1, lost_s=0.2)
    edit = made.engine.submit(a_job("running"))
    await until(gate.reached.is_set)

    made.cluster.fall_silent()
    gate.open()

    with pytest.raises(ModelUnavailableError, match="no edit can run in the Ray cluster: it does"):
        await edit.result()
    for ask in (made.engine.check_worker, made.engine.check_room, made.engine.offload):
        with pytest.raises(ModelUnavailableError, match="it does not answer"):
            ask()
    assert made.engine.status().replicas == ()
    made.cluster.answer_again()
    await until(lambda: bool(made.engine.status().replicas))
    await made.engine.submit(a_job("next")).result()


async def test_the_status_names_each_replica_and_moves_reach_all(
    make_cluster: MakeCluster,
) -> None:
    gates, workers = gated(2)
    for worker in workers:
        worker.device, worker.held = "cuda", Memory(allocated_gb=3.0)
    made = make_cluster(*workers)
    edits = [made.engine.submit(a_job(str(number))) for number in range(2)]
    await until(lambda: all(gate.reached.is_set() for gate in gates))
    for gate in gates:
        gate.open()
    await asyncio.gather(*(edit.result() for edit in edits))

    before = made.engine.status()
    after = await asyncio.wait_for(asyncio.wrap_future(made.engine.offload()), 60)

    assert [one.name for one in before.replicas] == ["replica-0", "replica-1"]
    assert before.residence.location == "GPU"
    assert (before.total_loads, after.gpu_to_cpu) == (2, 2)
    locations = [one.status and one.status.residence.location for one in after.replicas]
    assert locations == ["CPU", "CPU"]


def test_ray_is_not_imported_by_a_server_that_does_not_need_it() -> None:
    code = (
        "import sys\n"
        "import step1x_edit.interfaces.serving, step1x_edit.interfaces.cli.program\n"
        "import step1x_edit.cluster.ray_engine, step1x_edit.cluster.connection\n"
        "import step1x_edit.cluster.deploying\n"
        "from step1x_edit.service.wiring import build_service\n"
        "from step1x_edit.settings import load_settings\n"
        "build_service(load_settings()).close()\n"
        "sys.exit('ray' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
