"""Replicas in a real Ray cluster, with toy workers: `make test-cluster` runs these.

The tests share one cluster, and the last one ends it.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes import a_job, inverted
from forked import RealPopen
from step1x_edit.channel import EditJob, Start
from step1x_edit.cluster.connection import RayCluster
from step1x_edit.cluster.deploying import ReplicaNeeds, deploy, remove, state_of
from step1x_edit.cluster.ray_engine import RayEngine
from step1x_edit.engine.engine import Edit, EngineStatus
from step1x_edit.engine.worker_process import WorkerProcess
from step1x_edit.errors import EditCancelledError, ModelUnavailableError
from step1x_edit.settings import Settings, keep_ray_quiet

pytestmark = [
    pytest.mark.timeout(170),
    pytest.mark.skipif("TEST_CLUSTER" not in os.environ, reason="a part of `make test-cluster`"),
]

HERE = Path(__file__).parents[1]
NEEDS = ReplicaNeeds(gpus=0, threads=1)
LONG = "pace 0.2"
"""The prompt of an edit that takes 0.2 s a step."""


def started_as(version: str) -> Callable[[Callable[[], None]], WorkerProcess]:
    """How replicas start their worker; its results name the version."""
    return partial(WorkerProcess, Start(model_version=version), module="paced_worker")


def settings_of(**options: Any) -> Settings:
    given = {"ray_min_replicas": 2, "ray_max_replicas": 2, "edit_timeout": 60, **options}
    return Settings(_env_file=None, engine="ray", **given)


@pytest.fixture(scope="module")
def ray_processes() -> Iterator[list[Any]]:
    """A cluster of one node in processes of its own; yields these."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(subprocess, "Popen", RealPopen)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent / "src")]))
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray writes a token to the home folder
        keep_ray_quiet()
        import ray

        ray.init(
            namespace="serve",
            num_cpus=6,
            include_dashboard=False,
            object_store_memory=80_000_000,
            log_to_driver=False,
            _temp_dir=folder,
            _node_ip_address="127.0.0.1",
        )
        node = ray._private.worker._global_node
        yield [info.process for infos in node.all_processes.values() for info in infos]
        for infos in node.all_processes.values():  # Ray's own end would wait for its dead parts
            for info in infos:
                info.process.kill()
        atexit.unregister(ray.shutdown)


@pytest.fixture(scope="module")
def engine(ray_processes: list[Any]) -> Iterator[RayEngine]:
    """The line in front of two replicas."""
    deploy(settings_of(), NEEDS, 120, started_as("old"))
    engine = RayEngine(RayCluster(settings_of()), lanes=2, max_queue=1)
    yield engine
    engine.close()


async def until(claim: Callable[[], bool]) -> None:
    """Wait for other processes to make a claim true; the test's timeout bounds it."""
    while not claim():
        await asyncio.to_thread(threading.Event().wait, 0.05)


def worker_of(status: EngineStatus) -> int | None:
    """The process id of a worker that edits."""
    for one in status.replicas:
        if one.status and one.status.is_editing and one.status.residence.numerics:
            return int(one.status.residence.numerics.removeprefix("process "))
    return None


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[1])


def has_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def refusal_of(engine: RayEngine) -> str:
    try:
        engine.check_worker()
    except ModelUnavailableError as error:
        return str(error)
    return ""


async def texts_of(edit: Edit, at_step: int, then: Callable[[], None]) -> list[str]:
    """The progress of an edit, during which something happens, once."""
    texts: list[str] = []
    async for event in edit.events():
        texts.append(event.text)
        if event.text.startswith(f"denoising {at_step}/") and texts.count(event.text) == 1:
            then()
    return texts


async def test_a_burst_runs_on_all_replicas_and_moves_reach_all(engine: RayEngine) -> None:
    jobs = [a_job("pace 0.05"), a_job("pace 0.05"), a_job("")]

    edits = [engine.submit(job) for job in jobs]  # one waits, and none is refused
    results = await asyncio.gather(*(edit.result() for edit in edits))
    more = [await engine.submit(a_job(str(number))).result() for number in range(3)]
    status = await asyncio.wrap_future(engine.offload())

    for result, job in zip([*results, *more], [*jobs, *(a_job() for _ in more)], strict=True):
        assert np.array_equal(result.painted.image, inverted(job))
    locations = [one.status and one.status.residence.location for one in status.replicas]
    assert locations == ["CPU", "CPU"]
    assert engine.predicted_s(a_job()) is not None


@pytest.mark.parametrize("whose", ["replica", "worker"])
async def test_an_edit_survives_the_kill_of_its(engine: RayEngine, whose: str) -> None:
    edit = engine.submit(a_job(LONG))
    workers: list[int] = []

    def kill() -> None:
        worker = worker_of(engine.status())
        assert worker is not None
        workers.append(worker)
        os.kill(worker if whose == "worker" else parent_of(worker), signal.SIGKILL)

    texts = await texts_of(edit, at_step=3, then=kill)
    result = await edit.result()

    assert isinstance(edit.job, EditJob)
    assert np.array_equal(result.painted.image, inverted(edit.job))
    assert texts[texts.index("denoising 3/10") + 1 :].count("queued, position 1") == 1
    await until(lambda: has_gone(workers[0]))


async def test_a_client_that_leaves_frees_the_replica(engine: RayEngine) -> None:
    edit = engine.submit(a_job("pace 0.1", num_steps=1000))
    await texts_of(edit, at_step=3, then=edit.cancel)

    with pytest.raises(EditCancelledError):
        await edit.result()

    await until(lambda: not any(r.status and r.status.is_editing for r in engine.status().replicas))


async def test_a_new_deployment_lets_an_edit_end_on_its_old_replica(engine: RayEngine) -> None:
    edit = engine.submit(a_job("pace 0.3"))
    deployed: list[asyncio.Future[Any]] = []

    def redeploy() -> None:
        redeploying = asyncio.to_thread(deploy, settings_of(), NEEDS, 120, started_as("new"))
        deployed.append(asyncio.ensure_future(redeploying))

    texts = await texts_of(edit, at_step=1, then=redeploy)
    old = await edit.result()
    await deployed[0]
    new = await engine.submit(a_job("")).result()

    assert texts.count("queued, position 1") == 1
    assert (old.painted.warning or "").startswith("old")
    assert (new.painted.warning or "").startswith("new")


async def test_an_edit_without_replicas_starts_one(engine: RayEngine) -> None:
    settings = settings_of(ray_app="idle", ray_min_replicas=0, ray_max_replicas=1)
    await asyncio.to_thread(deploy, settings, NEEDS, 60, started_as("new"))
    other = RayEngine(RayCluster(settings), lanes=1, look_every_s=0.1)

    edit = other.submit(a_job(""))
    texts = [event.text async for event in edit.events()]
    await edit.result()
    other.close()

    assert "starting" in texts
    assert await asyncio.to_thread(remove, settings)
    assert await asyncio.to_thread(state_of, settings) is None


def test_a_deployment_that_has_no_place_ends_with_a_sentence(engine: RayEngine) -> None:
    settings = settings_of(ray_app="elsewhere")

    with pytest.raises(ModelUnavailableError, match=r"each needs 9 GPUs .* has 0 GPUs and 6 CPUs"):
        deploy(settings, ReplicaNeeds(gpus=9, threads=1), 2, started_as("new"))

    remove(settings)


async def test_the_server_outlives_the_cluster_and_says_that_it_has_gone(
    engine: RayEngine, ray_processes: list[Any]
) -> None:
    await engine.submit(a_job("")).result()
    for process in ray_processes:
        process.kill()
    died = time.monotonic()

    await until(lambda: refusal_of(engine).startswith("Manager not initialized: no edit can run"))

    assert time.monotonic() - died < 10  # as promised to those who ask /readyz
