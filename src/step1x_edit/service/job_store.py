"""Stored jobs: edits that survive the caller's connection and the server's process.

A job is accepted once it and its input are on disk. From then on it ends in exactly one of the
states `succeeded`, `failed`, `cancelled` and `expired`. Rows are kept in an SQLite database; inputs
and result are kept beside it in `jobs/<id>/`, under names that the store chooses. The history of a
job is kept as numbered events that can be read again and waited for. Rows that a start cannot read,
and files of jobs that are missing from the database, are moved to `jobs-lost/` and logged.

The store knows nothing about pictures, models or protocols: inputs are bytes, a request is JSON.
`job_runner` runs the jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import math
import os
import re
import secrets
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from step1x_edit import foreign_json
from step1x_edit.channel import Phase, Progress
from step1x_edit.errors import (
    DeadlineExceededError,
    EditCancelledError,
    InternalError,
    InvalidParameterError,
    JobConflictError,
    JobInterruptedError,
    JobNotFoundError,
    NoSpaceError,
    ServerBusyError,
    SettingsError,
    ShuttingDownError,
    Step1XEditError,
)
from step1x_edit.schemas.answers import ErrorAnswer, JobState
from step1x_edit.schemas.requests import JOB_ID_PATTERN
from step1x_edit.service.durable import O_CLOEXEC, sync_folder, write

log = logging.getLogger(__name__)

T = TypeVar("T")

SCHEMA_VERSION: Final = 2
DATABASE_NAME: Final = "jobs.sqlite3"
FOLDER_NAME: Final = "jobs"
LOST_NAME: Final = "jobs-lost"
PROGRESS_INTERVAL_S: Final = 1.0

_GUESSED_JOB_S: Final = 10.0  # until the first job was timed
_ID: Final = re.compile(JOB_ID_PATTERN)
_INPUT: Final = "input"
_MASK: Final = "mask"
_RESULT: Final = "result"
_ACCEPTED: Final = "accepted"
"""An empty file beside the input from acceptance until the job is deleted: if it exists and the
database does not know the job, the database has lost it."""
_NO_SPACE: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LOCKED: Final = "database is locked"  # Python 3.10 has no constants for SQLite's codes
_FULL: Final = "database or disk is full"


@dataclass(frozen=True)
class Job:
    """A job as it is at one moment; times in seconds since 1970."""

    id: str
    state: JobState
    request: Mapping[str, object]
    has_mask: bool
    created_at: float
    started_at: float | None
    finished_at: float | None
    progress: Progress | None
    position: int | None
    """The position in the queue, from 1, of a queued job."""
    answer: Mapping[str, object] | None
    """The answer of the operation, or an `ErrorAnswer`, once the state is final."""


@dataclass(frozen=True)
class JobInput:
    """The input of a job: the file of a picture, and that of a mask if there is one."""

    image: bytes
    """Empty if the picture is generated from a prompt alone."""
    mask: bytes | None = None


@dataclass(frozen=True)
class JobPage:
    """Some jobs, newest first, and whether there are older ones."""

    jobs: tuple[Job, ...]
    has_more: bool


@dataclass(frozen=True)
class JobEvent:
    """An event of a job: a new state, or progress within one."""

    number: int
    at: float
    state: JobState
    progress: Progress | None


# --- the database ---------------------------------------------------------------------------------
# An id begins with an increasing number, so that its order is the order of acceptance.

_VERSION_1: Final = (
    """CREATE TABLE jobs (
        id TEXT PRIMARY KEY,
        state TEXT NOT NULL CHECK (
            state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled', 'expired')
        ),
        request TEXT NOT NULL,
        answer TEXT,
        created_at REAL NOT NULL,
        started_at REAL,
        finished_at REAL,
        phase TEXT,
        step INTEGER,
        total INTEGER,
        size INTEGER NOT NULL
    ) WITHOUT ROWID""",
    "CREATE INDEX jobs_by_state ON jobs (state, id)",
    """CREATE TABLE events (
        job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        number INTEGER NOT NULL,
        at REAL NOT NULL,
        state TEXT NOT NULL,
        phase TEXT,
        step INTEGER,
        total INTEGER,
        PRIMARY KEY (job_id, number)
    ) WITHOUT ROWID""",
)
_VERSION_2: Final = ("ALTER TABLE jobs ADD COLUMN has_mask INTEGER NOT NULL DEFAULT 0",)
_VERSIONS: Final = (_VERSION_1, _VERSION_2)
"""The statements that migrate to each version from the previous one; 0 is an empty database."""

_GET: Final = """SELECT *, CASE state WHEN 'queued' THEN (
        SELECT count(*) FROM jobs AS other WHERE other.state = 'queued' AND other.id <= jobs.id
    ) END AS position FROM jobs """

# Each transition names the state it leaves: of two that race, the second changes no row.
_START: Final = """UPDATE jobs SET state = :state, started_at = :now
    WHERE id = :id AND state = 'queued'"""
_PUT_BACK: Final = """UPDATE jobs
    SET state = :state, started_at = NULL, phase = NULL, step = NULL, total = NULL
    WHERE id = :id AND state = 'running'"""
_NOTE: Final = """UPDATE jobs SET phase = :phase, step = :step, total = :total
    WHERE id = :id AND state = 'running'"""
_END: Final = """UPDATE jobs
    SET state = :state, finished_at = :now, answer = :answer, size = size + :size
    WHERE id = :id AND state = 'running'"""
_WITHDRAW: Final = """UPDATE jobs SET state = :state, finished_at = :now, answer = :answer
    WHERE id = :id AND state IN ('queued', 'running')"""
_EXPIRE: Final = """UPDATE jobs SET state = :state, finished_at = :now, answer = :answer
    WHERE id = :id AND state = 'queued'"""

_ADD_EVENT: Final = """INSERT INTO events VALUES (
        :id, (SELECT coalesce(max(number), 0) + 1 FROM events WHERE job_id = :id),
        :now, :state, :phase, :step, :total
    )"""


class JobStore:
    """Jobs and their history. Open while entered; to be used on the event loop that entered it.

    One thread with the only connection does all work, so calls take effect in order. Besides the
    errors documented at each call, they raise ShuttingDownError once the store is closed,
    NoSpaceError if the disk is full and InternalError if it fails otherwise.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        max_queued: int = 32,
        max_bytes: int = 2 * 1024**3,
        max_age_s: float = 7 * 86400.0,
        max_wait_s: float = 86400.0,
        now: Callable[[], float] = time.time,
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        """Ended jobs are deleted after `max_age_s`, or earlier if all need more than `max_bytes`.

        A job that has waited for `max_wait_s` expires and is not run.
        """
        self._data_dir = data_dir
        self._folder = data_dir / FOLDER_NAME
        self._max_queued = max_queued
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._max_wait_s = max_wait_s
        self._now = now
        self._random_bytes = random_bytes
        self._thread: ThreadPoolExecutor | None = None
        self._listeners: dict[str, set[asyncio.Event]] = {}
        self._arrived = asyncio.Event()

    async def __aenter__(self) -> JobStore:
        """Open the store; raises SettingsError if it is in use or was written by a newer version.

        Jobs that were running when the last process was killed end as interrupted; queued ones
        stay queued.
        """
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "job store")
        try:
            await asyncio.wrap_future(self._thread.submit(self._open))
        except BaseException:
            self._thread.shutdown(wait=False)
            self._thread = None
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        thread, self._thread = self._thread, None
        assert thread is not None
        for job_id in self._listeners:
            self._wake(job_id)
        self._arrived.set()
        await asyncio.wrap_future(thread.submit(self._connection.close))
        thread.shutdown(wait=False)

    # --- for callers ---

    async def create(
        self, image: bytes, request: Mapping[str, object], mask: bytes | None = None
    ) -> Job:
        """Accept a job: when this returns, the job is on disk.

        Raises ServerBusyError if the queue is full.
        """
        return await self._do(self._create, JobInput(image, mask), json.dumps(dict(request)))

    async def check_room(self) -> None:
        """Raise the error that `create` would raise now for any job, before a body is sent."""
        await self._do(self._check_room, 0)

    async def get(self, job_id: str) -> Job:
        """The job as it is now; raises JobNotFoundError."""
        return await self._do(self._get, job_id)

    async def page(self, limit: int = 20, after: str | None = None) -> JobPage:
        """The newest jobs, or those older than the job `after`, which may have been deleted.

        Raises InvalidParameterError if `after` cannot be an id.
        """
        return await self._do(self._page, limit, after)

    async def wait(self, job_id: str) -> Job:
        """The job once its state is final; raises JobNotFoundError, also if it is deleted."""
        with self._listening(job_id) as changed:
            while not (job := await self.get(job_id)).state.is_final:
                await changed.wait()
                changed.clear()
        return job

    async def events_after(self, job_id: str, last_event_id: int = 0) -> AsyncIterator[JobEvent]:
        """Yield the later events of a job, including future ones, up to its final one.

        Raises JobNotFoundError; ends early if the job is deleted meanwhile.
        """
        await self.get(job_id)
        with self._listening(job_id) as changed:
            while True:
                events, is_over = await self._do(self._events_after, job_id, last_event_id)
                for event in events:
                    last_event_id = event.number
                    yield event
                if is_over:
                    return
                await changed.wait()
                changed.clear()

    async def read_input(self, job_id: str) -> JobInput:
        """The input of the job; raises JobNotFoundError."""
        return await self._do(self._read_input, job_id)

    async def read_result(self, job_id: str) -> bytes:
        """The result of the job; raises JobNotFoundError, or JobConflictError if it has none."""
        return await self._do(self._read_result, job_id)

    async def cancel(self, job_id: str) -> Job:
        """Cancel a queued or running job, and return it; a job that has ended is unchanged."""
        return await self._do(self._cancel, job_id)

    async def delete(self, job_id: str) -> None:
        """Delete a job with all its files; raises JobConflictError while it is running."""
        await self._do(self._delete, job_id)

    async def tidy(self) -> None:
        """Expire jobs that waited too long; delete those that are too old or need too much space.

        Runs by itself when the store is opened and when a job is created or ends.
        """
        await self._do(self._tidy)

    # --- for the runner ---

    async def start_next(self) -> Job:
        """Take the job that has waited longest, now running; waits until there is one."""
        while (job := await self._do(self._start_next)) is None:
            await self._arrived.wait()
            self._arrived.clear()
        self._arrived.set()  # another runner that was woken may have found nothing
        return job

    async def note(self, job_id: str, progress: Progress) -> None:
        """Record the progress of a running job, about once a second and at each new phase."""
        await self._do(self._note, job_id, progress)

    async def succeed(self, job_id: str, result: bytes, answer: Mapping[str, object]) -> bool:
        """End a running job with its result; False, and nothing is kept, if it had ended before."""
        return await self._do(self._succeed, job_id, result, json.dumps(dict(answer)))

    async def end(self, job_id: str, error: Step1XEditError) -> bool:
        """End a running job with an error; False if it had already ended."""
        return await self._do(self._end, job_id, error)

    async def put_back(self) -> None:
        """Queue jobs marked as running again, in their old positions: no runner has them now."""
        await self._do(self._put_back)

    # --- between the event loop and the thread ---

    async def _do(self, work: Callable[..., T], *arguments: object) -> T:
        if self._thread is None:
            raise ShuttingDownError()
        return await asyncio.wrap_future(self._thread.submit(_in_our_words, work, *arguments))

    @contextlib.contextmanager
    def _listening(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set at each change of the job."""
        changed = asyncio.Event()
        listeners = self._listeners.setdefault(job_id, set())
        listeners.add(changed)
        try:
            yield changed
        finally:
            listeners.discard(changed)
            if not listeners:
                self._listeners.pop(job_id, None)

    def _wake(self, job_id: str) -> None:
        for listener in self._listeners.get(job_id, ()):
            listener.set()

    def _notify(self, wake: Callable[..., object], *arguments: object) -> None:
        """From the thread: one caller that has gone must not keep events from the others."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: no listener is left
            self._loop.call_soon_threadsafe(wake, *arguments)

    # --- opening, on the thread -------------------------------------------------------------------

    def _open(self) -> None:
        path = self._data_dir / DATABASE_NAME
        try:
            self._connect(path)
        except (OSError, sqlite3.Error) as error:
            raise SettingsError(f"DATA_DIR: {path} cannot be written ({_why(error)})") from None
        try:
            try:
                self._begin(path)
            except sqlite3.Error as error:
                if not _is_damage(error):
                    raise
                self._connection.close()
                self._start_over(path, error)
        except BaseException as error:
            self._connection.close()
            if not isinstance(error, OSError | sqlite3.Error):
                raise
            if str(error) == _LOCKED:
                raise SettingsError(f"DATA_DIR: {path} is in use by another process") from None
            raise SettingsError(f"DATA_DIR: {path} cannot be used ({_why(error)})") from None

    def _connect(self, path: Path) -> None:
        self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | O_CLOEXEC, 0o600))
        sync_folder(self._data_dir)
        self._connection = sqlite3.connect(path, timeout=0, isolation_level=None)

    def _begin(self, path: Path) -> None:
        self._prepare(path)
        self._set_rows_aside()
        (verdict,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        newest = self._connection.execute("SELECT max(id) FROM jobs").fetchone()[0]
        self._last_number = int(newest[:12], 16) if newest else 0
        self._interrupt()
        self._sweep()
        self._tidy()

    def _start_over(self, path: Path, error: sqlite3.Error) -> None:
        """Start with no jobs, because the database is damaged; everything is kept elsewhere."""
        folder = self._set_aside(
            self._folder, *(path.with_name(path.name + end) for end in ("", "-wal", "-shm"))
        )
        log.error(
            "%s is damaged (%s): all stored jobs are lost; what is left of them is in %s",
            *(path, _why(error), folder),
        )
        self._connect(path)
        self._begin(path)

    def _prepare(self, path: Path) -> None:
        self._connection.row_factory = sqlite3.Row
        self._connection.text_factory = _text
        for pragma in (
            # Nobody else may even read: the database itself is the lock, and a kill releases it.
            "locking_mode = EXCLUSIVE",
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
        ):
            self._connection.execute(f"PRAGMA {pragma}")
        with self._transaction():
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise SettingsError(
                    f"DATA_DIR: {path} was written by a newer step1x-edit "
                    f"(version {version}, this one knows {SCHEMA_VERSION})"
                )
            for statements in _VERSIONS[version:]:
                for statement in statements:
                    self._connection.execute(statement)
            if version != SCHEMA_VERSION:
                self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _interrupt(self) -> None:
        """End the job that was running when the last process was killed: it may be the cause."""
        error = JobInterruptedError("the server ended while it was running")
        for job_id in self._ids("SELECT id FROM jobs WHERE state = 'running'"):
            self._move(_END, job_id, JobState.FAILED, answer=_answer(error), size=0)

    def _sweep(self) -> None:
        """Remove files of jobs that were never accepted, and results that were never recorded."""
        lost = []
        for folder in self._folder.iterdir():
            if not _ID.fullmatch(folder.name):
                continue  # not ours
            job = self._find(folder.name)
            if job is None and (folder / _ACCEPTED).exists():
                lost.append(folder)
            elif job is None:
                _remove(folder)
            else:
                _mark_accepted(folder)  # missing after a kill or from an older version
                if job.state is not JobState.SUCCEEDED:
                    self._drop_result(job.id)
        if lost:
            kept = self._set_aside(*lost)
            names = ", ".join(folder.name for folder in lost)
            log.error("the database has lost stored jobs; their files are in %s: %s", kept, names)

    def _set_rows_aside(self) -> None:
        """Move rows that cannot be read out of the database, and keep them as files."""
        rows = self._connection.execute("SELECT *, NULL AS position FROM jobs").fetchall()
        for row in rows:
            try:
                _job(row)
            except ValueError as error:
                self._set_row_aside(row, error)

    def _set_row_aside(self, row: sqlite3.Row, error: ValueError) -> None:
        job_id = row["id"]
        events = self._connection.execute("SELECT * FROM events WHERE job_id = ?", (job_id,))
        kept = json.dumps({"job": dict(row), "events": [*map(dict, events)]}, default=repr)
        is_id = isinstance(job_id, str) and _ID.fullmatch(job_id)
        folder = self._set_aside(*([self._folder / job_id] if is_id else []))
        write(folder / f"row-{secrets.token_hex(8)}.json", kept.encode())
        self._connection.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
        log.error("the stored job %s cannot be read (%s); it is in %s", job_id, error, folder)

    def _set_aside(self, *paths: Path) -> Path:
        """Move unknown files and folders to a place where nothing is removed."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self._now()))
        folder = self._data_dir / LOST_NAME / f"{stamp}-{secrets.token_hex(4)}"
        folder.mkdir(mode=0o700, parents=True)
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                path.rename(folder / path.name)
        sync_folder(folder)
        return folder

    # --- reading, on the thread -------------------------------------------------------------------

    def _find(self, job_id: str) -> Job | None:
        if not _ID.fullmatch(job_id):
            return None  # and SQLite does not accept every text
        row = self._connection.execute(_GET + "WHERE id = ?", (job_id,)).fetchone()
        return None if row is None else _readable(row)

    def _get(self, job_id: str) -> Job:
        if (job := self._find(job_id)) is None:
            raise JobNotFoundError(job_id)
        return job

    def _page(self, limit: int, after: str | None) -> JobPage:
        if after is not None and not _ID.fullmatch(after):
            raise InvalidParameterError(f"after must be the id of a job, got {after!r}")
        jobs: list[Job] = []
        rows = self._connection.execute(
            _GET + "WHERE :after IS NULL OR id < :after ORDER BY id DESC", {"after": after}
        )
        while len(jobs) <= limit and (row := rows.fetchone()) is not None:
            if (job := _readable(row)) is not None:
                jobs.append(job)
        rows.close()
        return JobPage(tuple(jobs[:limit]), len(jobs) > limit)

    def _events_after(self, job_id: str, last: int) -> tuple[list[JobEvent], bool]:
        job = self._find(job_id)
        rows = self._connection.execute(
            "SELECT * FROM events WHERE job_id = ? AND number > ? ORDER BY number", (job_id, last)
        )
        events = [event for event in map(_event, rows) if event is not None]
        return events, job is None or job.state.is_final

    def _read_input(self, job_id: str) -> JobInput:
        job = self._get(job_id)
        folder = self._folder / job.id
        # The row decides: a mask whose file is missing must not be treated as no mask.
        mask = (folder / _MASK).read_bytes() if job.has_mask else None
        return JobInput((folder / _INPUT).read_bytes(), mask)

    def _read_result(self, job_id: str) -> bytes:
        job = self._get(job_id)
        if job.state is not JobState.SUCCEEDED:
            raise JobConflictError(f"job {job_id} has no result, it is {job.state.value}")
        try:
            return (self._folder / job.id / _RESULT).read_bytes()
        except FileNotFoundError:
            raise JobConflictError(f"job {job_id} has no result any more") from None

    def _ids(self, query: str, *values: object) -> list[str]:
        return [row["id"] for row in self._connection.execute(query, values)]

    def _number(self, query: str) -> float | None:
        number: float | None = self._connection.execute(query).fetchone()[0]
        return number

    # --- accepting and deleting, on the thread ----------------------------------------------------

    def _create(self, given: JobInput, request: str) -> Job:
        size = len(given.image) + len(given.mask or b"")
        self._tidy()
        self._check_room(size)  # do not delete history for a job that is refused
        self._tidy(needed=size)
        self._last_number += 1
        job_id = f"{self._last_number:012x}{self._random_bytes(16).hex()}"
        folder = self._folder / job_id
        try:
            folder.mkdir(mode=0o700)
            write(folder / _INPUT, given.image)
            if given.mask is not None:
                write(folder / _MASK, given.mask)
            sync_folder(folder)
            sync_folder(self._folder)
            with self._transaction():
                now = self._now()
                self._connection.execute(
                    """INSERT INTO jobs (id, state, request, created_at, size, has_mask)
                    VALUES (?, 'queued', ?, ?, ?, ?)""",
                    (job_id, request, now, size, given.mask is not None),
                )
                self._add_event(job_id, now, JobState.QUEUED)
        except BaseException:
            _remove(folder)
            raise
        _mark_accepted(folder)
        self._notify(self._arrived.set)
        return self._get(job_id)

    def _check_room(self, size: int) -> None:
        if size > self._max_bytes:
            raise NoSpaceError("the image is larger than the space for stored jobs")
        waiting = int(self._number("SELECT count(*) FROM jobs WHERE state = 'queued'") or 0)
        unfinished = self._number("SELECT sum(size) FROM jobs WHERE finished_at IS NULL") or 0
        if waiting < self._max_queued and unfinished + size <= self._max_bytes:
            return
        usual_s = self._number(
            """SELECT avg(finished_at - started_at) FROM (
                SELECT started_at, finished_at FROM jobs WHERE state = 'succeeded'
                ORDER BY id DESC LIMIT 10
            )"""
        )
        wait_s = max(1, math.ceil((usual_s or _GUESSED_JOB_S) * (waiting + 1)))
        raise ServerBusyError(
            f"{waiting} jobs are waiting, try again in {wait_s} s", retry_after_s=wait_s
        )

    def _delete(self, job_id: str) -> None:
        if self._get(job_id).state is JobState.RUNNING:
            raise JobConflictError(f"job {job_id} is running; cancel it first")
        self._forget([job_id])

    def _tidy(self, needed: int = 0, keep: str = "") -> None:
        """Free `needed` bytes, deleting the oldest ended jobs first, but not the job `keep`."""
        now = self._now()
        waited = DeadlineExceededError(f"the job has waited for {self._max_wait_s:g} s")
        for job_id in self._ids(
            "SELECT id FROM jobs WHERE state = 'queued' AND created_at <= ?", now - self._max_wait_s
        ):
            self._move(_EXPIRE, job_id, JobState.EXPIRED, answer=_answer(waited))
        self._forget(self._ids("SELECT id FROM jobs WHERE finished_at <= ?", now - self._max_age_s))
        surplus = (self._number("SELECT sum(size) FROM jobs") or 0) + needed - self._max_bytes
        too_much = []
        for row in self._connection.execute(
            "SELECT id, size FROM jobs WHERE finished_at IS NOT NULL ORDER BY finished_at, id"
        ):
            if surplus <= 0:
                break
            if row["id"] != keep:
                too_much.append(row["id"])
                surplus -= row["size"]
        self._forget(too_much)

    def _forget(self, job_ids: Iterable[str]) -> None:
        """Rows first: a kill in between leaves folders that the next start sweeps."""
        for job_id in job_ids:
            with contextlib.suppress(OSError):
                (self._folder / job_id / _ACCEPTED).unlink()
            with self._transaction():
                self._connection.execute(
                    "DELETE FROM jobs WHERE id = ? AND state != 'running'", (job_id,)
                )
            _remove(self._folder / job_id)
            self._notify(self._wake, job_id)

    # --- from state to state, on the thread -------------------------------------------------------

    def _start_next(self) -> Job | None:
        self._tidy()
        for job_id in self._ids("SELECT id FROM jobs WHERE state = 'queued' ORDER BY id LIMIT 1"):
            self._move(_START, job_id, JobState.RUNNING)
            return self._get(job_id)
        return None

    def _note(self, job_id: str, progress: Progress) -> None:
        row = self._connection.execute(
            """SELECT *, coalesce(
                (SELECT at FROM events WHERE job_id = id ORDER BY number DESC LIMIT 1), 0
            ) AS last_at FROM jobs WHERE id = ?""",
            (job_id,),
        ).fetchone()
        if row is not None and _is_news(progress, _progress(row), self._now() - row["last_at"]):
            self._move(_NOTE, job_id, JobState.RUNNING, progress)

    def _succeed(self, job_id: str, result: bytes, answer: str) -> bool:
        job = self._find(job_id)
        if job is None or job.state is not JobState.RUNNING:
            return False
        folder = self._folder / job.id
        write(folder / _RESULT, result)
        sync_folder(folder)
        is_first = self._move(_END, job_id, JobState.SUCCEEDED, answer=answer, size=len(result))
        self._tidy(keep=job_id)
        return is_first

    def _end(self, job_id: str, error: Step1XEditError) -> bool:
        match error:
            case EditCancelledError():
                state = JobState.CANCELLED
            case DeadlineExceededError():
                state = JobState.EXPIRED
            case _:
                state = JobState.FAILED
        if not self._move(_END, job_id, state, answer=_answer(error), size=0):
            return False
        self._drop_result(job_id)
        self._tidy(keep=job_id)
        return True

    def _cancel(self, job_id: str) -> Job:
        self._get(job_id)
        answer = _answer(EditCancelledError())
        if self._move(_WITHDRAW, job_id, JobState.CANCELLED, answer=answer):
            self._drop_result(job_id)
        return self._get(job_id)

    def _drop_result(self, job_id: str) -> None:
        """Delete a result that could not be recorded as such."""
        (self._folder / job_id / _RESULT).unlink(missing_ok=True)

    def _put_back(self) -> None:
        for job_id in self._ids("SELECT id FROM jobs WHERE state = 'running'"):
            self._move(_PUT_BACK, job_id, JobState.QUEUED)
        self._notify(self._arrived.set)

    def _move(
        self,
        statement: str,
        job_id: str,
        state: JobState,
        progress: Progress | None = None,
        **values: str | int,
    ) -> bool:
        """Change a job and record it as an event, both or none; False if its state forbids it."""
        now = self._now()
        with self._transaction():
            moved = self._connection.execute(
                statement,
                {
                    "id": job_id,
                    "state": state.value,
                    "now": now,
                    **_columns(progress),
                    **values,
                },
            )
            if moved.rowcount == 0:
                return False
            self._add_event(job_id, now, state, progress)
        self._notify(self._wake, job_id)
        return True

    def _add_event(
        self, job_id: str, now: float, state: JobState, progress: Progress | None = None
    ) -> None:
        self._connection.execute(
            _ADD_EVENT, {"id": job_id, "now": now, "state": state.value, **_columns(progress)}
        )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise


# --- rows -----------------------------------------------------------------------------------------


def _readable(row: sqlite3.Row) -> Job | None:
    """The job of a row; None, and a line in the log, if the row is damaged."""
    try:
        return _job(row)
    except ValueError as error:
        log.error("the stored job %s cannot be read (%s) and is left out", row["id"], error)
        return None


def _job(row: sqlite3.Row) -> Job:
    """The job of a row; raises ValueError if the store cannot have written the row."""
    for name in ("id", "state", "request"):
        _check_kind(row, name, str)
    for name in ("answer", "phase"):
        _check_kind(row, name, str, type(None))
    _check_kind(row, "created_at", float)
    for name in ("started_at", "finished_at"):
        _check_kind(row, name, float, type(None))
    for name in ("size", "has_mask"):
        _check_kind(row, name, int)
    if not _ID.fullmatch(row["id"]):
        raise ValueError("its id is not valid")
    state = JobState(row["state"])
    if state.is_final != (row["finished_at"] is not None):
        raise ValueError("its state and its times contradict each other")
    return Job(
        id=row["id"],
        state=state,
        request=_object(row["request"]),
        has_mask=bool(row["has_mask"]),
        created_at=row["created_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        progress=_progress(row),
        position=row["position"],
        answer=None if row["answer"] is None else _object(row["answer"]),
    )


def _check_kind(row: sqlite3.Row, name: str, *kinds: type) -> None:
    if not isinstance(row[name], kinds):
        raise ValueError(f"{name} has the wrong type")


def _object(text: str) -> dict[str, object]:
    found = foreign_json.parse(text)
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def _event(row: sqlite3.Row) -> JobEvent | None:
    try:
        _check_kind(row, "at", float)
        return JobEvent(row["number"], row["at"], JobState(row["state"]), _progress(row))
    except ValueError as error:
        log.error("an event of job %s cannot be read (%s)", row["job_id"], error)
        return None


def _progress(row: sqlite3.Row) -> Progress | None:
    if row["phase"] is None:
        return None
    for name in ("step", "total"):
        _check_kind(row, name, int, type(None))
    return Progress(Phase(row["phase"]), row["step"], row["total"])


def _text(data: bytes) -> str | bytes:
    """A text column; bytes if it is not valid text, so that the row is found damaged."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _is_damage(error: sqlite3.Error) -> bool:
    """Whether the database itself is damaged, rather than the disk full or the file locked."""
    words = ("no such ", "already exists", "duplicate column", "malformed")
    return type(error) is sqlite3.DatabaseError or any(word in str(error) for word in words)


def _columns(progress: Progress | None) -> dict[str, str | int | None]:
    if progress is None:
        return {"phase": None, "step": None, "total": None}
    return {"phase": progress.phase.value, "step": progress.step, "total": progress.total}


def _answer(error: Step1XEditError) -> str:
    return json.dumps(ErrorAnswer.of(error).to_dict())


def _is_news(progress: Progress, last: Progress | None, age_s: float) -> bool:
    if last is None or progress.phase is not last.phase:
        return True
    is_recent = 0 <= age_s < PROGRESS_INTERVAL_S  # the clock may have been set back
    return progress != last and not is_recent


# --- the disk -------------------------------------------------------------------------------------


def _in_our_words(work: Callable[..., T], *arguments: object) -> T:
    try:
        return work(*arguments)
    except (OSError, sqlite3.Error) as error:
        log.warning("stored jobs: %s", error)
        if str(error) == _FULL or (isinstance(error, OSError) and error.errno in _NO_SPACE):
            raise NoSpaceError("no space left for stored jobs") from None
        raise InternalError("stored jobs cannot be reached") from None


def _why(error: OSError | sqlite3.Error) -> str:
    is_system = isinstance(error, OSError) and error.errno
    return os.strerror(is_system).lower() if is_system else str(error)


def _mark_accepted(folder: Path) -> None:
    with contextlib.suppress(OSError):  # optional: it only helps to detect losses
        (folder / _ACCEPTED).touch(mode=0o600)


def _remove(folder: Path) -> None:
    """Remove a folder; the next start sweeps what cannot be removed now."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("%s cannot be removed (%s)", folder, error)
