"""Stored jobs: accepted means durable, one end each, and nothing half done is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import multiprocessing
import os
import random
import shutil
import sqlite3
import stat
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import toy_jobs
from extent import by_extent
from step1x_edit.channel import Phase, Progress
from step1x_edit.errors import (
    DeadlineExceededError,
    EditCancelledError,
    InvalidParameterError,
    JobConflictError,
    JobNotFoundError,
    NoSpaceError,
    OutOfMemoryError,
    ServerBusyError,
    SettingsError,
    ShuttingDownError,
    Step1XEditError,
)
from step1x_edit.schemas.answers import JobState
from step1x_edit.service.job_runner import TIDY_INTERVAL_S, JobRunner
from step1x_edit.service.job_store import (
    DATABASE_NAME,
    LOST_NAME,
    Job,
    JobEvent,
    JobInput,
    JobStore,
)

REQUEST = {"prompt": "戴红帽子", "seed": 7}
Report = Callable[[Progress], Awaitable[None]]

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs modes and SIGKILL")


class WallClock:
    """Seconds since 1970 that pass when the test says so."""

    def __init__(self) -> None:
        self.time = 1_000_000.0

    def __call__(self) -> float:
        return self.time


def quick_folder() -> Path:
    """A folder in which syncing costs nothing, if there is one."""
    shared_memory = "/dev/shm"
    is_there = os.access(shared_memory, os.W_OK)
    return Path(tempfile.mkdtemp(dir=shared_memory if is_there else None))


@pytest.fixture
def data_dir() -> Iterator[Path]:
    folder = quick_folder()
    yield folder
    shutil.rmtree(folder)


async def events_of(store: JobStore, job_id: str, last: int = 0) -> list[JobEvent]:
    return [event async for event in store.events_after(job_id, last)]


async def all_jobs(store: JobStore) -> tuple[Job, ...]:
    return (await store.page(limit=1000)).jobs


def folders(data_dir: Path) -> set[str]:
    return {folder.name for folder in (data_dir / "jobs").iterdir()}


def killed(data_dir: Path) -> Path:
    """What a process that were killed at this moment would leave: a copy of it all."""
    image = data_dir.with_name(f"{data_dir.name}-{random.getrandbits(64):x}")
    shutil.copytree(data_dir, image)
    return image


# --- accepting ---


async def test_an_accepted_job_waits_with_its_input_and_its_request(data_dir: Path) -> None:
    clock = WallClock()
    async with JobStore(data_dir, now=clock) as store:
        first = await store.create(b"cat", REQUEST)
        second = await store.create(b"dog", {})
        assert (first.state, first.position, second.position) == ("queued", 1, 2)
        assert (first.request, first.created_at) == (REQUEST, clock.time)
        assert (first.answer, first.progress) == (None, None)
        assert (first.started_at, first.finished_at) == (None, None)
        assert await store.get(first.id) == first
        assert await store.read_input(second.id) == JobInput(b"dog")


async def test_a_mask_is_kept_with_its_job_and_counts_with_it(data_dir: Path) -> None:
    async with JobStore(data_dir, max_bytes=10) as store:
        job = await store.create(b"cat", REQUEST, b"mask")
        assert job.has_mask
        assert await store.read_input(job.id) == JobInput(b"cat", b"mask")
        with pytest.raises(ServerBusyError):
            await store.create(b"dog", {}, b"m")
        assert not (await store.create(b"dog", {})).has_mask
    operation = Operation()
    async with JobStore(data_dir) as store, JobRunner(store, operation):
        assert (await store.wait(job.id)).has_mask
    assert operation.masks[0] == b"mask"


async def test_a_job_whose_mask_is_gone_fails_and_is_not_done_without(data_dir: Path) -> None:
    operation = Operation()
    async with JobStore(data_dir) as store:
        job = await store.create(b"cat", {}, b"mask")
        (data_dir / "jobs" / job.id / "mask").unlink()
        async with JobRunner(store, operation):
            assert (await store.wait(job.id)).state == "failed"
    assert operation.seen == []


@posix
async def test_a_job_is_accepted_once_its_input_and_then_its_row_are_on_the_disk(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []
    sync = os.fsync

    def note_sync(descriptor: int) -> None:
        done.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def note_commit(connection: sqlite3.Connection, statement: str) -> None:
        if statement == "COMMIT":
            pragmas = [f"PRAGMA {name}" for name in ("journal_mode", "synchronous")]
            done.append([connection.execute(pragma).fetchone()[0] for pragma in pragmas])

    watch_statements(monkeypatch, note_commit)
    monkeypatch.setattr(os, "fsync", note_sync)
    async with JobStore(data_dir) as store:
        done.clear()
        job = await store.create(b"cat", {}, b"mask")
        folder = data_dir / "jobs" / job.id
        paths = (folder / "input", folder / "mask", folder, folder.parent)
        files = [path.stat().st_ino for path in paths]
        assert done == [*files, ["wal", 2]], "2 is FULL"


async def test_an_id_carries_128_random_bits(data_dir: Path) -> None:
    asked: list[int] = []

    def random_bytes(size: int) -> bytes:
        asked.append(size)
        return bytes([len(asked)] * size)

    async with JobStore(data_dir, random_bytes=random_bytes) as store:
        ids = [(await store.create(b"", {})).id for _ in range(2)]
    assert asked == [16, 16]
    assert [job_id[-32:] for job_id in ids] == ["01" * 16, "02" * 16]


@posix
async def test_what_is_stored_is_for_its_owner_only(data_dir: Path) -> None:
    before = os.umask(0)
    try:
        async with JobStore(data_dir) as store:
            job = await store.create(b"cat", {})
            await store.start_next()
            await store.succeed(job.id, b"hat", {})
            found = {path.name: path for path in data_dir.rglob("*")}
            modes = {name: stat.S_IMODE(path.stat().st_mode) for name, path in found.items()}
    finally:
        os.umask(before)
    assert modes == {
        "jobs": 0o700,
        job.id: 0o700,
        "accepted": 0o600,
        "input": 0o600,
        "result": 0o600,
        DATABASE_NAME: 0o600,
        f"{DATABASE_NAME}-wal": 0o600,
    }


@pytest.mark.parametrize("job_id", ["0" * 44, "", "../jobs", "a\0b", "\udc80", "0" * 43 + "\n"])
async def test_who_names_a_wrong_id_finds_nothing(data_dir: Path, job_id: str) -> None:
    async with JobStore(data_dir) as store:
        for ask in (store.get, store.read_input, store.read_result, store.cancel, store.delete):
            with pytest.raises(JobNotFoundError, match="Job not found"):
                await ask(job_id)
        with pytest.raises(JobNotFoundError):
            await events_of(store, job_id)
        assert not await store.succeed(job_id, b"", {})


async def test_a_full_queue_refuses_and_says_when_to_come_back(data_dir: Path) -> None:
    clock = WallClock()
    async with JobStore(data_dir, max_queued=2, now=clock) as store:
        done = await store.create(b"", {})
        await store.start_next()
        clock.time += 30
        await store.succeed(done.id, b"", {})
        for _ in range(2):
            await store.create(b"", {})
        with pytest.raises(ServerBusyError, match="2 jobs are waiting") as caught:
            await store.create(b"", {})
        assert caught.value.retry_after_s == 90
        assert len(folders(data_dir)) == 3


# --- listing ---


async def test_jobs_are_listed_newest_first_page_by_page(data_dir: Path) -> None:
    async with JobStore(data_dir) as store:
        ids = [(await store.create(b"", {})).id for _ in range(5)]
        first = await store.page(limit=2)
        assert [job.id for job in first.jobs] == [ids[4], ids[3]]
        assert first.has_more
        await store.delete(ids[3])  # a client that deletes what was listed can still continue
        rest = await store.page(limit=3, after=ids[3])
        assert [job.id for job in rest.jobs] == [ids[2], ids[1], ids[0]]
        assert not rest.has_more
        with pytest.raises(InvalidParameterError, match="after must be the id of a job, got 'x'"):
            await store.page(after="x")


async def test_the_order_of_acceptance_outlives_the_process(data_dir: Path) -> None:
    ids = []
    for _ in range(3):
        async with JobStore(data_dir) as store:
            ids.append((await store.create(b"", {})).id)
    async with JobStore(data_dir) as store:
        assert [job.id for job in await all_jobs(store)] == ids[::-1]
        assert [(await store.start_next()).id for _ in ids] == ids


# --- what happens to a job ---


async def test_events_are_numbered_and_can_be_read_again_from_any(data_dir: Path) -> None:
    clock = WallClock()
    async with JobStore(data_dir, now=clock) as store:
        job = await store.create(b"", {})
        await store.start_next()
        clock.time += 1
        await store.note(job.id, Progress(Phase.DENOISING, 1, 28))
        await store.succeed(job.id, b"hat", {"status": "success"})
        start = clock.time - 1
        assert await events_of(store, job.id) == [
            JobEvent(1, start, JobState.QUEUED, None),
            JobEvent(2, start, JobState.RUNNING, None),
            JobEvent(3, start + 1, JobState.RUNNING, Progress(Phase.DENOISING, 1, 28)),
            JobEvent(4, start + 1, JobState.SUCCEEDED, None),
        ]
        assert [event.number for event in await events_of(store, job.id, last=3)] == [4]
        assert await events_of(store, job.id, last=4) == await events_of(store, job.id, 99) == []


async def test_who_listens_is_told_what_comes_until_the_end(data_dir: Path) -> None:
    async with JobStore(data_dir) as store:
        job = await store.create(b"", {})
        listeners = [store.events_after(job.id), store.events_after(job.id, 1)]
        assert (await anext(listeners[0])).state == "queued"
        coming = [asyncio.ensure_future(anext(listener)) for listener in listeners]
        await store.start_next()
        assert [(await event).number for event in coming] == [2, 2]
        waiting = asyncio.ensure_future(store.wait(job.id))
        await store.end(job.id, OutOfMemoryError("too large"))
        for listener in listeners:
            assert [event.state async for event in listener] == ["failed"]
        assert (await waiting).state == "failed"


async def test_who_listens_to_a_deleted_job_hears_no_more(data_dir: Path) -> None:
    async with JobStore(data_dir) as store:
        job = await store.create(b"", {})
        listener = store.events_after(job.id)
        assert (await anext(listener)).state == "queued"
        waiting = asyncio.ensure_future(store.wait(job.id))
        await store.delete(job.id)
        assert [event async for event in listener] == []
        with pytest.raises(JobNotFoundError):
            await waiting


async def test_progress_is_kept_once_a_second_and_at_each_new_phase(data_dir: Path) -> None:
    clock = WallClock()
    async with JobStore(data_dir, now=clock) as store:
        job = await store.create(b"", {})
        await store.note(job.id, Progress(Phase.LOADING))  # it does not even run
        await store.start_next()
        for step in range(1, 31):
            await store.note(job.id, Progress(Phase.DENOISING, step, 30))
            clock.time += 0.25
        clock.time += 60
        await store.note(job.id, Progress(Phase.DENOISING, 29, 30))
        await store.note(job.id, Progress(Phase.DENOISING, 29, 30))  # only a sign of life
        clock.time -= 3600  # somebody sets the clock
        await store.note(job.id, Progress(Phase.DENOISING, 30, 30))
        await store.note(job.id, Progress(Phase.DECODING))
        assert (await store.get(job.id)).progress == Progress(Phase.DECODING)
        await store.cancel(job.id)
        await store.note(job.id, Progress(Phase.SAVING))
        noted = [event.progress for event in await events_of(store, job.id) if event.progress]
    assert [progress.step for progress in noted] == [1, 5, 9, 13, 17, 21, 25, 29, 30, 0]


async def test_a_job_that_waits_or_runs_can_be_cancelled(data_dir: Path) -> None:
    async with JobStore(data_dir) as store:
        running = await store.create(b"", {})
        waiting = await store.create(b"", {})
        await store.start_next()
        for job in (running, waiting):
            cancelled = await store.cancel(job.id)
            assert (cancelled.state, cancelled.position) == ("cancelled", None)
            assert cancelled.answer == {
                "status": "error",
                "error": "Cancelled",
                "code": "cancelled",
            }
            assert await store.cancel(job.id) == cancelled
        assert not await store.succeed(running.id, b"late", {})
        assert not await store.end(running.id, OutOfMemoryError())
        assert (await store.get(running.id)).state == "cancelled"
        assert not list(data_dir.rglob("result"))


async def test_of_cancel_and_completion_one_wins_and_the_files_agree(data_dir: Path) -> None:
    async with JobStore(data_dir, max_queued=100) as store:
        for number in range(60):
            job = await store.create(b"", {})
            await store.start_next()
            racers = [store.cancel(job.id), store.succeed(job.id, b"hat", {})]
            if number % 2:
                racers.reverse()
            await asyncio.gather(*racers)
            found = await store.get(job.id)
            assert found.state == ("succeeded" if number % 2 else "cancelled")
            has_result = (data_dir / "jobs" / job.id / "result").exists()
            assert has_result == (found.state == "succeeded")
            assert [event.state for event in await events_of(store, job.id)][2:] == [found.state]


async def test_only_a_job_that_succeeded_has_a_result(data_dir: Path) -> None:
    async with JobStore(data_dir) as store:
        job = await store.create(b"cat", {})
        with pytest.raises(JobConflictError, match=r"has no result, it is queued$"):
            await store.read_result(job.id)
        await store.start_next()
        await store.succeed(job.id, b"hat", {"seed": 7})
        assert await store.read_result(job.id) == b"hat"
        assert (await store.get(job.id)).answer == {"seed": 7}


async def test_a_deleted_job_leaves_nothing_and_a_running_one_stays(data_dir: Path) -> None:
    async with JobStore(data_dir) as store:
        job = await store.create(b"cat", {})
        await store.start_next()
        with pytest.raises(JobConflictError, match="is running; cancel it first"):
            await store.delete(job.id)
        await store.succeed(job.id, b"hat", {})
        await store.delete(job.id)
        assert folders(data_dir) == set()
        assert await all_jobs(store) == ()
        with pytest.raises(JobNotFoundError):
            await store.delete(job.id)


# --- what is forgotten ---


async def test_the_job_that_ended_first_makes_room_and_unfinished_ones_never_do(
    data_dir: Path,
) -> None:
    clock = WallClock()
    async with JobStore(data_dir, max_bytes=100, now=clock) as store:
        early, late, running, waiting = [await store.create(b"x" * 10, {}) for _ in range(4)]
        for _ in range(3):
            await store.start_next()
        for job in (late, early):  # the one that came first ends last
            clock.time += 1
            await store.succeed(job.id, b"x" * 20, {})
        await store.create(b"x" * 20, {})
        assert len(await all_jobs(store)) == 5, "100 bytes may be used"
        await store.create(b"x", {})
        with pytest.raises(JobNotFoundError):
            await store.get(late.id)
        await store.succeed(running.id, b"x" * 70, {})
        left = {job.id for job in await all_jobs(store)}
        assert early.id not in left
        assert left > {running.id, waiting.id}, "what has just ended is kept though it is too much"
        assert left >= folders(data_dir) == left


async def test_what_cannot_fit_is_refused_and_costs_no_history(data_dir: Path) -> None:
    async with JobStore(data_dir, max_bytes=100) as store:
        ended = await store.create(b"x" * 40, {})
        await store.cancel(ended.id)
        with pytest.raises(NoSpaceError, match="larger than the space for stored jobs"):
            await store.create(b"x" * 101, {})
        await store.create(b"x" * 60, {})
        with pytest.raises(ServerBusyError):
            await store.create(b"x" * 41, {})
        assert (await store.get(ended.id)).state == "cancelled"


async def test_ended_jobs_are_forgotten_when_they_are_old(data_dir: Path) -> None:
    clock = WallClock()
    async with JobStore(data_dir, max_age_s=100, now=clock) as store:
        old = await store.create(b"", {})
        running = await store.create(b"", {})
        await store.start_next()
        await store.end(old.id, OutOfMemoryError())
        await store.start_next()
        clock.time += 99
        await store.tidy()
        assert len(await all_jobs(store)) == 2
        clock.time += 1
        await store.tidy()
        assert [job.id for job in await all_jobs(store)] == [running.id]
        assert folders(data_dir) == {running.id}


async def test_a_job_that_has_waited_too_long_expires_instead_of_running(data_dir: Path) -> None:
    clock = WallClock()
    async with JobStore(data_dir, max_wait_s=60, now=clock) as store:
        old = await store.create(b"", {})
        clock.time += 60
        new = await store.create(b"", {})
        assert (await store.start_next()).id == new.id
        expired = await store.get(old.id)
        assert expired.state == "expired"
        assert expired.answer is not None
        assert expired.answer["error"] == "Deadline exceeded: the job has waited for 60 s"


# --- restarts ---


async def test_after_a_kill_waiting_jobs_wait_and_running_ones_are_interrupted(
    data_dir: Path,
) -> None:
    async with JobStore(data_dir) as store:
        running = await store.create(b"cat", {})
        waiting = await store.create(b"dog", REQUEST)
        await store.start_next()
        (data_dir / "jobs" / running.id / "result").write_bytes(b"half")
        image = killed(data_dir)
    async with JobStore(image) as store:
        found = await store.get(running.id)
        assert found.state == "failed"
        assert found.answer == {
            "status": "error",
            "error": "Job interrupted: the server ended while it was running",
            "code": "interrupted",
        }
        states = [event.state for event in await events_of(store, running.id)]
        assert states == ["queued", "running", "failed"]
        assert not list(image.rglob("result"))
        assert await store.start_next() == await store.get(waiting.id)
        assert await store.read_input(waiting.id) == JobInput(b"dog")
    shutil.rmtree(image)


async def test_a_start_sweeps_what_no_job_owns_and_nothing_else(data_dir: Path) -> None:
    async with JobStore(data_dir) as store:
        job = await store.create(b"cat", {})
    orphan = data_dir / "jobs" / ("0" * 44)
    orphan.mkdir()
    (orphan / "input").write_bytes(b"never accepted")
    (data_dir / "jobs" / "applications").mkdir()  # DATA_DIR may be somebody's home
    async with JobStore(data_dir):
        assert folders(data_dir) == {job.id, "applications"}
    assert not (data_dir / LOST_NAME).exists()


async def test_a_second_store_in_the_same_folder_is_refused(data_dir: Path) -> None:
    async with JobStore(data_dir) as store:
        with pytest.raises(SettingsError, match=f"{DATABASE_NAME} is in use by another process$"):
            await JobStore(data_dir).__aenter__()
        await store.create(b"", {})
    async with JobStore(data_dir) as store:
        assert len(await all_jobs(store)) == 1


async def test_a_store_of_a_newer_version_is_refused_and_left_alone(data_dir: Path) -> None:
    path = data_dir / DATABASE_NAME
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 3")
    with pytest.raises(SettingsError, match=r"by a newer step1x-edit \(version 3, this one knows"):
        await JobStore(data_dir).__aenter__()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)


async def test_what_a_store_of_version_1_has_accepted_is_done(data_dir: Path) -> None:
    async with JobStore(data_dir) as store:
        job = await store.create(b"cat", REQUEST)
    with contextlib.closing(sqlite3.connect(data_dir / DATABASE_NAME)) as connection:
        connection.execute("ALTER TABLE jobs DROP COLUMN has_mask")
        connection.execute("PRAGMA user_version = 1")
    operation = Operation()
    async with JobStore(data_dir) as store, JobRunner(store, operation):
        masked = await store.create(b"dog", {}, b"mask")
        assert (await store.wait(job.id)).request == REQUEST
        await store.wait(masked.id)
    async with JobStore(data_dir) as store:  # and once is enough
        assert await store.read_input(masked.id) == JobInput(b"dog", b"mask")
    assert operation.masks == [None, b"mask"]


async def test_a_folder_that_cannot_be_made_is_refused(data_dir: Path) -> None:
    (data_dir / "file").write_bytes(b"")
    with pytest.raises(SettingsError, match="cannot be written"):
        await JobStore(data_dir / "file").__aenter__()


async def test_a_closed_store_takes_nothing_and_lets_nobody_wait(data_dir: Path) -> None:
    async with JobStore(data_dir) as store:
        job = await store.create(b"", {})
        waiting = asyncio.ensure_future(store.wait(job.id))
        await store.get(job.id)
    with pytest.raises(ShuttingDownError):
        await waiting
    with pytest.raises(ShuttingDownError):
        await store.create(b"", {})


# --- running ---


class Operation:
    """Upper-cases; says when it was started, and waits to be let on if it is held."""

    def __init__(self, *raised: BaseException) -> None:
        self.raised = list(raised)
        self.seen: list[tuple[bytes, Mapping[str, object]]] = []
        self.masks: list[bytes | None] = []
        self.started = asyncio.Event()
        self.let_on = asyncio.Event()
        self.let_on.set()
        self.was_stopped = False

    async def __call__(
        self, given: JobInput, request: Mapping[str, object], report: Report
    ) -> tuple[bytes, Mapping[str, object]]:
        self.seen.append((given.image, request))
        self.masks.append(given.mask)
        await report(Progress(Phase.ENCODING))
        self.started.set()
        try:
            await self.let_on.wait()
        except asyncio.CancelledError:
            self.was_stopped = True
            raise
        if self.raised:
            raise self.raised.pop(0)
        return given.image.upper(), {"status": "success", "request": request}


class Pauses:
    """Notes how long a runner pauses for; only the long pause, between two tidyings, is one."""

    def __init__(self) -> None:
        self.taken: list[float] = []
        self.long = asyncio.Event()

    async def __call__(self, seconds: float) -> None:
        self.taken.append(seconds)
        if seconds == TIDY_INTERVAL_S:
            await self.long.wait()
            self.long.clear()
        else:
            await asyncio.sleep(0)


async def test_jobs_run_in_order_to_their_results(data_dir: Path) -> None:
    operation = Operation()
    async with JobStore(data_dir) as store:
        jobs = [await store.create(image, REQUEST) for image in (b"cat", b"dog")]
        async with JobRunner(store, operation):
            jobs.append(await store.create(b"owl", {}))
            ended = [await store.wait(job.id) for job in jobs]
        assert [job.state for job in ended] == ["succeeded"] * 3
        assert ended[0].answer == {"status": "success", "request": REQUEST}
        assert await store.read_result(jobs[2].id) == b"OWL"
        progress = [event.progress for event in await events_of(store, jobs[0].id)]
        assert progress == [None, None, Progress(Phase.ENCODING), None]
    assert operation.seen == [(b"cat", REQUEST), (b"dog", REQUEST), (b"owl", {})]


@pytest.mark.parametrize(
    ("raised", "state", "sentence"),
    [
        (OutOfMemoryError("try 512"), "failed", "CUDA out of memory: try 512"),
        (DeadlineExceededError("900 s"), "expired", "Deadline exceeded: 900 s"),
        (EditCancelledError(), "cancelled", "Cancelled"),
        (asyncio.CancelledError(), "cancelled", "Cancelled"),
        (RuntimeError("secret"), "failed", "Internal error: job {id} failed, see the log"),
    ],
)
async def test_what_goes_wrong_ends_the_job_and_not_the_runner(
    data_dir: Path, raised: BaseException, state: str, sentence: str
) -> None:
    async with JobStore(data_dir) as store, JobRunner(store, Operation(raised)):
        job = await store.create(b"cat", {})
        ended = await store.wait(job.id)
        assert ended.state == state
        assert ended.answer is not None
        assert ended.answer["error"] == sentence.format(id=job.id)
        following = await store.create(b"dog", {})
        assert (await store.wait(following.id)).state == "succeeded"


async def test_cancelling_a_running_job_stops_the_work_and_frees_the_runner(
    data_dir: Path,
) -> None:
    operation = Operation()
    operation.let_on.clear()
    async with JobStore(data_dir) as store, JobRunner(store, operation):
        job = await store.create(b"cat", {})
        following = await store.create(b"dog", {})
        await operation.started.wait()
        await store.cancel(job.id)
        operation.started.clear()
        await operation.started.wait()
        assert operation.was_stopped
        operation.let_on.set()
        assert (await store.wait(following.id)).state == "succeeded"
        assert (await store.get(job.id)).state == "cancelled"


async def test_a_job_that_runs_when_the_runner_is_left_waits_again(data_dir: Path) -> None:
    operation = Operation()
    operation.let_on.clear()
    async with JobStore(data_dir) as store:
        job = await store.create(b"cat", {})
        following = await store.create(b"dog", {})
        async with JobRunner(store, operation):
            await operation.started.wait()
        assert operation.was_stopped
        put_back = await store.get(job.id)
        assert (put_back.state, put_back.position, put_back.progress) == ("queued", 1, None)
    operation.let_on.set()
    async with JobStore(data_dir) as store, JobRunner(store, operation):
        assert (await store.wait(following.id)).state == "succeeded"
        states = [event.state for event in await events_of(store, job.id) if not event.progress]
        assert states == ["queued", "running", "queued", "running", "succeeded"]


async def test_an_operation_that_is_shutting_down_costs_no_job(data_dir: Path) -> None:
    operation = Operation(ShuttingDownError())
    async with JobStore(data_dir) as store:
        job = await store.create(b"cat", {})
        following = await store.create(b"dog", {})
        async with JobRunner(store, operation):
            await operation.started.wait()
        for waiting in (job, following):
            assert (await store.get(waiting.id)).state == "queued"


async def test_an_accepted_job_is_not_refused_by_a_full_line(data_dir: Path) -> None:
    pauses = Pauses()
    operation = Operation(ServerBusyError(retry_after_s=12.0), ServerBusyError(retry_after_s=7.0))
    async with JobStore(data_dir) as store, JobRunner(store, operation, pause=pauses):
        job = await store.create(b"cat", {})
        assert (await store.wait(job.id)).state == "succeeded"
    assert [pause for pause in pauses.taken if pause != TIDY_INTERVAL_S] == [12.0, 7.0]


async def test_old_jobs_are_forgotten_every_hour_though_nobody_calls(data_dir: Path) -> None:
    clock, pauses = WallClock(), Pauses()
    async with JobStore(data_dir, max_age_s=1, now=clock) as store:
        job = await store.create(b"cat", {})
        async with JobRunner(store, Operation(), pauses):
            await store.wait(job.id)
            clock.time += TIDY_INTERVAL_S
            forgotten = asyncio.ensure_future(gone(store, job.id))
            pauses.long.set()
            await forgotten
    assert set(pauses.taken) == {TIDY_INTERVAL_S}


async def gone(store: JobStore, job_id: str) -> None:
    with contextlib.suppress(JobNotFoundError):
        while True:
            await store.get(job_id)


# --- damage ---


def set_aside(data_dir: Path) -> set[str]:
    """The files that a start has kept because it did not understand them, by their last parts."""
    kept = [path for path in (data_dir / LOST_NAME).rglob("*") if path.is_file()]
    return {"/".join(path.parts[-2:]) for path in kept}


def damage(data_dir: Path, statement: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(data_dir / DATABASE_NAME)) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute(statement, values)
        connection.commit()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("id", "zzz"),
        ("state", "zzz"),
        ("state", "succeeded"),
        ("request", "{"),
        ("request", "[]"),
        ("request", "[" * 100_000),
        ("request", b"\xff\xfe"),
        ("answer", "{"),
        ("phase", "zzz"),
        ("created_at", "yesterday"),
        ("finished_at", "tomorrow"),
        ("size", "large"),
        ("request", "CAST(x'ff' AS TEXT)"),
    ],
)
async def test_a_row_that_cannot_be_read_costs_the_others_nothing(
    data_dir: Path, caplog: pytest.LogCaptureFixture, column: str, value: str | bytes
) -> None:
    async with JobStore(data_dir) as store:
        broken, whole = await store.create(b"cat", REQUEST), await store.create(b"dog", REQUEST)
    statement = f"UPDATE jobs SET {column} = ? WHERE id = ?"
    if isinstance(value, str) and value.startswith("CAST"):  # a text that is no UTF-8
        damage(data_dir, statement.replace("?", value, 1), broken.id)
    else:
        damage(data_dir, statement, value, broken.id)
    operation = Operation()
    async with JobStore(data_dir) as store, JobRunner(store, operation):
        assert [job.id for job in await all_jobs(store)] == [whole.id]
        assert (await store.wait(whole.id)).state == "succeeded"
        later = await store.create(b"cow", REQUEST)
        assert (await store.wait(later.id)).state == "succeeded"
    name = "zzz" if column == "id" else broken.id
    assert f"the stored job {name} cannot be read" in caplog.text
    assert f"{broken.id}/input" in set_aside(data_dir)
    assert any("/row-" in name for name in set_aside(data_dir))


async def test_what_the_log_of_the_database_has_lost_is_named_and_its_files_are_kept(
    data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with JobStore(data_dir) as store:
        kept = await store.create(b"cat", REQUEST)
    async with JobStore(data_dir) as store:
        lost = await store.create(b"dog", REQUEST)
        forgotten = await store.create(b"cow", REQUEST)
        await store.delete(forgotten.id)
        image = killed(data_dir)
    wal = image / f"{DATABASE_NAME}-wal"
    data = bytearray(wal.read_bytes())
    data[32 + 24 + 100] ^= 0xFF  # in the first page that was written since
    wal.write_bytes(data)
    async with JobStore(image) as store:
        assert [job.id for job in await all_jobs(store)] == [kept.id]
        assert folders(image) == {kept.id}
    assert set_aside(image) == {f"{lost.id}/input", f"{lost.id}/accepted"}
    assert lost.id in caplog.text
    assert forgotten.id not in caplog.text
    shutil.rmtree(image)


@pytest.mark.parametrize("cut", ["half", "garbage", "a page", "tables"])
async def test_a_damaged_database_is_set_aside_with_all_files_and_a_new_one_works(
    data_dir: Path, caplog: pytest.LogCaptureFixture, cut: str
) -> None:
    path = data_dir / DATABASE_NAME
    async with JobStore(data_dir) as store:
        job = await store.create(b"cat", REQUEST)
    data = path.read_bytes()
    match cut:
        case "half":
            path.write_bytes(data[: len(data) // 2])
        case "garbage":
            path.write_bytes(b"no database" * 1000)
        case "a page":
            path.write_bytes(data[:4096] + bytes(4096) + data[8192:])
        case "tables":
            damage(data_dir, "DROP TABLE jobs")
    async with JobStore(data_dir) as store, JobRunner(store, Operation()):
        new = await store.create(b"dog", REQUEST)
        assert (await store.wait(new.id)).state == "succeeded"
        assert [each.id for each in await all_jobs(store)] == [new.id]
    assert set_aside(data_dir) >= {f"{job.id}/input"}
    assert any(
        name.endswith(f"/{DATABASE_NAME}") or cut == "tables" for name in set_aside(data_dir)
    )
    assert "is lost" in caplog.text or "are lost" in caplog.text or "has lost" in caplog.text


async def test_a_result_whose_file_is_gone_is_no_failure_of_the_server(data_dir: Path) -> None:
    async with JobStore(data_dir) as store:
        job = await store.create(b"cat", {})
        await store.start_next()
        await store.succeed(job.id, b"hat", {})
        (data_dir / "jobs" / job.id / "result").unlink()
        with pytest.raises(JobConflictError, match="has no result any more"):
            await store.read_result(job.id)


# --- faults ---


class Disk:
    """Stands in front of every system call and statement of a store: `before` sees its number."""

    def __init__(self, patch: pytest.MonkeyPatch, before: Callable[[int], None]) -> None:
        self.count = 0
        self._before = before
        watch_statements(patch, self._statement)
        for name in ("open", "mkdir", "write", "fsync", "unlink"):
            patch.setattr(os, name, self._guarded(getattr(os, name)))

    def _guarded(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **options: Any) -> Any:
            self.step()
            return call(*arguments, **options)

        return guarded

    def _statement(self, connection: sqlite3.Connection, statement: str) -> None:
        try:
            if statement != "ROLLBACK":
                self.step()
        except OSError:
            raise sqlite3.OperationalError("database or disk is full") from None

    def step(self) -> None:
        self.count += 1
        self._before(self.count)


def watch_statements(
    patch: pytest.MonkeyPatch, before: Callable[[sqlite3.Connection, str], None]
) -> None:
    """Have `before` called with each statement that is about to be executed."""

    class Connection(sqlite3.Connection):
        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
            before(self, statement)
            return super().execute(statement, *values)

    connect = sqlite3.connect
    patch.setattr(
        sqlite3, "connect", lambda path, **options: connect(path, factory=Connection, **options)
    )


class Life:
    """A store that is used in every way, and what it has said about that."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.ended: dict[str, str] = {}
        self.errors: list[Step1XEditError] = []

    async def live(self, data_dir: Path) -> None:
        async with JobStore(data_dir, max_bytes=60) as store:
            for number in range(4):
                with self.noting_errors():
                    await self.one_job(store, number)

    async def one_job(self, store: JobStore, number: int) -> None:
        job = await store.create(b"x" * 5, {"number": number}, b"m" * 5)
        self.known.add(job.id)
        started = await store.start_next()
        await store.note(started.id, Progress(Phase.DENOISING, number, 4))
        if number == 1:
            await store.cancel(started.id)
            self.ended[started.id] = "cancelled"
            self.known.discard(started.id)  # from now on it may be forgotten
            del self.ended[started.id]
            await store.delete(started.id)
        elif number == 2:
            await store.end(started.id, OutOfMemoryError())
            self.ended[started.id] = "failed"
        else:
            await store.succeed(started.id, b"y" * 10, {})
            self.ended[started.id] = "succeeded"

    @contextlib.contextmanager
    def noting_errors(self) -> Iterator[None]:
        try:
            yield
        except Step1XEditError as error:
            self.errors.append(error)


async def is_whole(data_dir: Path, known: set[str], ended: dict[str, str]) -> None:
    """Open what is left, and find all that was promised and nothing that is half done."""
    async with JobStore(data_dir) as store:
        jobs = {job.id: job for job in await all_jobs(store)}
        assert known <= jobs.keys()
        assert folders(data_dir) == jobs.keys()
        for job in jobs.values():
            if job.id in ended:
                assert job.state == ended[job.id]
            assert await store.read_input(job.id) == JobInput(b"x" * 5, b"m" * 5)
            if job.state == "succeeded":
                assert await store.read_result(job.id) == b"y" * 10
            else:
                assert not (data_dir / "jobs" / job.id / "result").exists()
        async with JobRunner(store, Operation()):
            for job_id in jobs:
                assert (await store.wait(job_id)).state.is_final
                events = await events_of(store, job_id)
                assert [event.number for event in events] == list(range(1, len(events) + 1))
                assert sum(event.state.is_final for event in events) == 1


async def test_whatever_call_fails_no_half_job_is_left(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in itertools.count(1):
        folder, life = data_dir / str(n), Life()

        def fail_once(number: int, n: int = n) -> None:
            if number == n:
                raise OSError(errno.ENOSPC, "no space")

        with monkeypatch.context() as patch:
            disk = Disk(patch, fail_once)
            with life.noting_errors():
                await life.live(folder)
        await is_whole(folder, life.known, life.ended)
        if disk.count < n:
            break
        assert all(isinstance(e, NoSpaceError | SettingsError) for e in life.errors), life.errors
    assert n > 100, "the calls are counted"


async def test_whenever_it_is_killed_no_half_job_is_left(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = Life()
    images: list[tuple[Path, set[str], dict[str, str]]] = []
    is_copying = False

    def keep_an_image(number: int) -> None:
        nonlocal is_copying
        if not is_copying and (data_dir / "life").exists():
            is_copying = True
            image = data_dir / f"killed-{number}"
            shutil.copytree(data_dir / "life", image)
            images.append((image, {*life.known}, {**life.ended}))
            is_copying = False

    with monkeypatch.context() as patch:
        Disk(patch, keep_an_image)
        await life.live(data_dir / "life")
    assert not life.errors
    assert len(images) > 100
    for image, known, ended in images:
        await is_whole(image, known, ended)


@pytest.mark.parametrize("way", ["end", "cancel"])
async def test_what_could_not_be_recorded_is_removed_at_once(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    is_full = False

    def refuse(connection: sqlite3.Connection, statement: str) -> None:
        if is_full and statement == "COMMIT":
            raise sqlite3.OperationalError("database or disk is full")

    watch_statements(monkeypatch, refuse)
    async with JobStore(data_dir) as store:
        job = await store.create(b"cat", {})
        await store.start_next()
        is_full = True
        with pytest.raises(NoSpaceError):
            await store.succeed(job.id, b"hat", {})
        with pytest.raises(NoSpaceError):
            await store.create(b"dog", {})
        is_full = False
        assert folders(data_dir) == {job.id}
        if way == "cancel":
            await store.cancel(job.id)
        else:
            await store.end(job.id, NoSpaceError())
        assert not list(data_dir.rglob("result"))


async def test_a_disk_that_was_full_for_a_while_costs_no_end(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_full = False
    pauses: list[float] = []

    def refuse(number: int) -> None:
        if is_full:
            raise OSError(errno.ENOSPC, "no space")

    async def pause(seconds: float) -> None:
        nonlocal is_full
        if seconds == TIDY_INTERVAL_S:
            await asyncio.Event().wait()
        pauses.append(seconds)
        is_full = len(pauses) < 3

    with monkeypatch.context() as patch:
        Disk(patch, refuse)
        operation = Operation()
        operation.let_on.clear()
        async with JobStore(data_dir) as store, JobRunner(store, operation, pause=pause):
            job = await store.create(b"cat", {})
            await operation.started.wait()
            listener = store.events_after(job.id, 2)
            assert (await anext(listener)).progress == Progress(Phase.ENCODING)
            is_full = True
            operation.let_on.set()
            assert [event.state async for event in listener] == ["failed"]
            ended = await store.get(job.id)
            assert ended.answer is not None
            assert ended.answer["code"] == "no_space"
            assert len(pauses) == 3
            assert not list(data_dir.rglob("result"))


# --- kills ---


StartLife = Callable[[Callable[..., None]], tuple[multiprocessing.process.BaseProcess, str]]


@pytest.fixture
def start_life(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> StartLife:
    """Starts another process with the store open; returns it and the job that it has accepted."""
    # Or each of them would import everything again: its server knows no other path, and pytest is
    # the main module.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy_jobs"])

    def start(target: Callable[..., None]) -> tuple[multiprocessing.process.BaseProcess, str]:
        hear, tell = context.Pipe(duplex=False)
        process = context.Process(target=target, args=(data_dir, tell))
        process.start()
        tell.close()
        return process, hear.recv()

    return start


@posix
async def test_every_job_is_known_whose_server_was_killed_right_after_accepting_it(
    data_dir: Path, start_life: StartLife
) -> None:
    accepted = []
    for number in range(20):
        started = number % 4 == 3
        target = toy_jobs.accept_and_start_one if started else toy_jobs.accept_one
        process, job_id = start_life(target)
        process.kill()
        process.join()
        accepted.append(job_id)

    operation = Operation()
    async with JobStore(data_dir) as store:
        assert [job.id for job in await all_jobs(store)] == accepted[::-1]
        async with JobRunner(store, operation):
            states = [(await store.wait(job_id)).state.value for job_id in accepted]
        assert sorted(states) == ["failed"] * 5 + ["succeeded"] * 15
        for job_id in accepted:
            events = await events_of(store, job_id)
            assert sum(event.state.is_final for event in events) == 1
    assert len(operation.seen) == 15, "nothing has run twice"


@posix
async def test_the_store_of_another_process_is_refused_until_it_ends(
    data_dir: Path, start_life: StartLife
) -> None:
    process, job_id = start_life(toy_jobs.accept_one)
    with pytest.raises(SettingsError, match="is in use by another process"):
        await JobStore(data_dir).__aenter__()
    process.kill()
    process.join()
    async with JobStore(data_dir) as store:
        assert (await store.get(job_id)).state == "queued"


# --- every order of events ---

MAX_QUEUED, MAX_BYTES, MAX_AGE_S, MAX_WAIT_S = 3, 60, 1000, 300
ERRORS = {
    "failed": OutOfMemoryError,
    "expired": DeadlineExceededError,
    "cancelled": EditCancelledError,
}


class Expected:
    """What the model knows of a job."""

    def __init__(self, size: int, now: float) -> None:
        self.state, self.size, self.created, self.ended = "queued", size, now, float("inf")
        self.result = b""

    @property
    def is_unfinished(self) -> bool:
        return self.state in ("queued", "running")

    def end(self, state: str, now: float) -> None:
        self.state, self.ended = state, now


class StoreMachine(RuleBasedStateMachine):
    """What callers, time and bad luck may do, in any order; the model is a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock = WallClock()
        self.root = quick_folder()
        self.data_dir = self.root / "store"
        self.jobs: dict[str, Expected] = {}
        self.store = self.opened()

    def do(self, awaitable: Awaitable[Any]) -> Any:
        return self.loop.run_until_complete(awaitable)

    def opened(self) -> JobStore:
        store = JobStore(
            self.data_dir,
            max_queued=MAX_QUEUED,
            max_bytes=MAX_BYTES,
            max_age_s=MAX_AGE_S,
            max_wait_s=MAX_WAIT_S,
            now=self.clock,
        )
        self.do(store.__aenter__())
        return store

    def in_state(self, *states: str) -> list[str]:
        return [job_id for job_id, job in self.jobs.items() if job.state in states]

    def size(self, *ids: str) -> int:
        return sum(self.jobs[job_id].size for job_id in ids)

    def expect_tidy(self, needed: int = 0, keep: str = "") -> None:
        now = self.clock.time
        for job in self.jobs.values():
            if job.state == "queued" and job.created + MAX_WAIT_S <= now:
                job.end("expired", now)
        for job_id, job in list(self.jobs.items()):
            if job.ended + MAX_AGE_S <= now:
                del self.jobs[job_id]
        ended = [job_id for job_id, job in self.jobs.items() if not job.is_unfinished]
        for job_id in sorted(ended, key=lambda job_id: (self.jobs[job_id].ended, job_id)):
            if self.size(*self.jobs) + needed > MAX_BYTES and job_id != keep:
                del self.jobs[job_id]

    @rule(size=st.integers(0, 25))
    def create(self, size: int) -> None:
        self.expect_tidy()
        unfinished = self.in_state("queued", "running")
        is_busy = len(self.in_state("queued")) >= MAX_QUEUED  # a job that was put back has room
        if is_busy or self.size(*unfinished) + size > MAX_BYTES:
            with pytest.raises(ServerBusyError):
                self.do(self.store.create(b"x" * size, {}))
            return
        self.expect_tidy(needed=size)
        job = self.do(self.store.create(b"x" * size, {}))
        self.jobs[job.id] = Expected(size, self.clock.time)

    @precondition(lambda self: self.in_state("queued"))
    @rule()
    def start(self) -> None:
        self.do(self.store.tidy())  # or the last one may expire, and the store wait for another
        self.expect_tidy()
        if waiting := self.in_state("queued"):
            assert self.do(self.store.start_next()).id == waiting[0]
            self.jobs[waiting[0]].state = "running"

    @precondition(lambda self: self.in_state("running"))
    @rule(data=st.data(), step=st.integers(1, 3))
    def note(self, data: st.DataObject, step: int) -> None:
        job_id = data.draw(st.sampled_from(self.in_state("running")))
        self.do(self.store.note(job_id, Progress(Phase.DENOISING, step, 3)))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), size=st.integers(0, 25))
    def succeed(self, data: st.DataObject, size: int) -> None:
        job_id = data.draw(st.sampled_from([*self.jobs]))
        job = self.jobs[job_id]
        is_running = job.state == "running"
        assert self.do(self.store.succeed(job_id, b"y" * size, {})) == is_running
        if is_running:
            job.end("succeeded", self.clock.time)
            job.result = b"y" * size
            job.size += size
            self.expect_tidy(keep=job_id)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), state=st.sampled_from([*ERRORS]))
    def end(self, data: st.DataObject, state: str) -> None:
        job_id = data.draw(st.sampled_from([*self.jobs]))
        job = self.jobs[job_id]
        is_running = job.state == "running"
        assert self.do(self.store.end(job_id, ERRORS[state]())) == is_running
        if is_running:
            job.end(state, self.clock.time)
            self.expect_tidy(keep=job_id)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from([*self.jobs]))
        if self.jobs[job_id].is_unfinished:
            self.jobs[job_id].end("cancelled", self.clock.time)
        assert self.do(self.store.cancel(job_id)).state == self.jobs[job_id].state

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from([*self.jobs]))
        if self.jobs[job_id].state == "running":
            with pytest.raises(JobConflictError):
                self.do(self.store.delete(job_id))
            return
        self.do(self.store.delete(job_id))
        del self.jobs[job_id]

    @rule()
    def put_back(self) -> None:
        self.do(self.store.put_back())
        for job_id in self.in_state("running"):
            self.jobs[job_id].state = "queued"

    @rule()
    def crash(self) -> None:
        image = self.root / str(len([*self.root.iterdir()]))
        shutil.copytree(self.data_dir, image)
        self.do(self.store.__aexit__())
        self.data_dir = image
        self.store = self.opened()
        for job_id in self.in_state("running"):
            self.jobs[job_id].end("failed", self.clock.time)
        self.expect_tidy()

    @rule(seconds=st.sampled_from([1, MAX_WAIT_S // 2, MAX_WAIT_S, MAX_AGE_S]))
    def time_passes(self, seconds: int) -> None:
        self.clock.time += seconds
        self.do(self.store.tidy())
        self.expect_tidy()

    @invariant()
    def the_store_is_as_the_model_says(self) -> None:
        found = self.do(self.store.page(limit=100)).jobs
        assert [(job.id, job.state.value) for job in found] == [
            (job_id, job.state) for job_id, job in reversed(self.jobs.items())
        ]
        queue = [job.position for job in reversed(found) if job.position is not None]
        assert queue == list(range(1, len(self.in_state("queued")) + 1))
        assert folders(self.data_dir) == self.jobs.keys()
        with_result = {path.parent.name for path in self.data_dir.glob("jobs/*/result")}
        assert with_result == {*self.in_state("succeeded")}

    def teardown(self) -> None:
        for found in self.do(self.store.page(limit=100)).jobs:
            self.do(self.store.cancel(found.id))
        for job_id in self.in_state("queued", "running"):
            self.jobs[job_id].end("cancelled", self.clock.time)
        for job_id, job in self.jobs.items():
            events = self.do(events_of(self.store, job_id))
            assert [event.number for event in events] == list(range(1, len(events) + 1))
            assert [event.state for event in events if event.state.is_final] == [job.state]
            if job.state == "succeeded":
                assert self.do(self.store.read_result(job_id)) == job.result
        self.do(self.store.__aexit__())
        self.loop.close()
        shutil.rmtree(self.root)


StoreMachine.TestCase.settings = settings(
    max_examples=by_extent(40, 200), stateful_step_count=16, deadline=None, print_blob=True
)
TestStoreMachine = StoreMachine.TestCase
