"""The engine: a queue of edits in front of the one worker process that owns the model.

Edits run one at a time, in order; callers wait on the event loop. One thread starts the worker for
the first edit, follows its reports, moves the model out when it is idle, and starts another worker
when one dies or hangs. The engine knows nothing about files, pictures or protocols and never
imports torch: it is given a function that starts a `Worker`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, Protocol, TypeAlias

from step1x_edit.channel import (
    Cancel,
    Done,
    EditJob,
    Failed,
    Job,
    Offload,
    Painted,
    Phase,
    Progress,
    Report,
    Residence,
    UpscaleJob,
)
from step1x_edit.engine.forecast import Forecast
from step1x_edit.engine.pace import Pace, Stopwatch
from step1x_edit.engine.watch import STEPS, TimeLimits, Watch
from step1x_edit.errors import (
    DeadlineExceededError,
    EditCancelledError,
    InternalError,
    ModelUnavailableError,
    ServerBusyError,
    ShuttingDownError,
    Step1XEditError,
    WorkerLostError,
    rebuild,
)
from step1x_edit.model.request import Pixels
from step1x_edit.time_left import TimeLeft
from step1x_edit.waiting import heartbeats

log = logging.getLogger(__name__)

HEARTBEAT_S: Final = 4.0  # an event every 5 s is promised, and timers are late
MAX_RESTARTS: Final = 3
RESTART_WINDOW_S: Final = 600.0

_GUESSED_EDIT_S: Final = 10.0  # until the first edit has been timed
_MOVE_S: Final = 60.0  # the model leaves the device in well under a second
_STOP_S: Final = 5.0


class Worker(Protocol):
    """A worker process as the engine sees it; `worker_process` has the real one.

    Only `cancel` and `kill` may be called from other threads than the engine's.
    """

    @property
    def is_alive(self) -> bool: ...

    def send(self, request: Job | Offload) -> None:
        """Send a request; raises WorkerLostError."""
        ...

    def receive(self, timeout_s: float) -> Report | None:
        """The next report; None after a silence or a cancel. Raises WorkerLostError."""
        ...

    def cancel(self, request: Cancel) -> None:
        """Ask it to stop an edit, and wake the caller that waits in `receive`."""
        ...

    def stop(self, timeout_s: float) -> None:
        """End the process and wait for it; kill it after the timeout."""
        ...

    def kill(self) -> None:
        """End the process at once."""
        ...


StartWorker: TypeAlias = Callable[[Callable[[], None]], Worker]
"""Starts a worker, which calls the given function when it has ended, from any thread."""


class Clock:
    """Monotonic time, and waiting."""

    def now(self) -> float:
        """Seconds since an arbitrary moment."""
        return time.monotonic()

    def wait(self, condition: threading.Condition, timeout_s: float | None) -> None:
        """Wait until the condition is notified or the time has passed; None waits for ever."""
        condition.wait(None if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX))


@dataclass(frozen=True)
class EngineStatus:
    """The state of the engine and its counts, at one moment."""

    residence: Residence = Residence()
    is_editing: bool = False
    loading: Progress | None = None
    """What has been read of the model, while an edit loads it."""
    is_monitoring: bool = False
    queue_length: int = 0
    idle_time_s: float = 0.0
    total_loads: int = 0
    gpu_to_cpu: int = 0
    cpu_to_gpu: int = 0
    full_releases: int = 0
    replicas: tuple[Replica, ...] = ()
    """Of an engine with several workers."""


@dataclass(frozen=True)
class Replica:
    """One of several workers, by its name; without a status while it starts."""

    name: str
    status: EngineStatus | None = None


class EngineLike(Protocol):
    """What the service needs of an engine, wherever that runs its edits."""

    @property
    def lanes(self) -> int:
        """How many edits can run at a time."""
        ...

    def prepare(self) -> None:
        """Begin with what the first edit would wait for; that one reports failures."""
        ...

    def submit(self, job: EditJob) -> Edit:
        """Put a job at the end of the queue.

        Raises ServerBusyError if the queue is full, and what `check_time` raises.
        """
        ...

    def submit_next(self, job: EditJob) -> Edit:
        """Put the next item of a batch at the end of the queue.

        A batch is accepted or refused with its first item; the later ones always have room.
        Raises what `check_time` raises.
        """
        ...

    def submit_end(self, job: UpscaleJob) -> Edit:
        """Put the end of an edit at the front of the queue: its caller has waited already."""
        ...

    def check_room(self) -> None:
        """Raise what `submit` would raise now, for callers that prepare a job first."""
        ...

    def check_time(self, job: EditJob) -> None:
        """Raise DeadlineExceededError if such edits have always taken far longer than they may.

        They may be tried again if none has run for a while.
        """
        ...

    def time_warning(self, job: EditJob) -> str | None:
        """A warning if such an edit is predicted to take longer than it may."""
        ...

    def predicted_s(self, job: EditJob) -> float | None:
        """How long such an edit would take with the model of the last edit; None if unknown."""
        ...

    def check_worker(self) -> None:
        """Raise ModelUnavailableError if there is no worker and none can be started."""
        ...

    def withdraw(self, edit: Edit) -> None:
        """Take an edit out of the queue, or stop it; does nothing if it has ended."""
        ...

    def offload(self) -> Future[EngineStatus]:
        """Move the model off the device before the next edit; the future holds the new status."""
        ...

    def release(self) -> Future[EngineStatus]:
        """Unload the model and free all its memory before the next edit."""
        ...

    def status(self) -> EngineStatus:
        """The current state and counts; never waits."""
        ...

    def close(self, timeout_s: float = ...) -> None:
        """Refuse new edits, end the queued ones and stop those that run."""
        ...


class Edit:
    """An edit in the queue, as its caller sees it. Made by the `submit` of an engine."""

    def __init__(self, engine: EngineLike, job: Job) -> None:
        self.job = job
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Progress | None] = asyncio.Queue()
        # Only the latest preview: unread ones must not pile up for a slow listener.
        self._preview: dict[Progress, Pixels] = {}
        self._result: asyncio.Future[EditResult] = self._loop.create_future()
        # A caller that cancels may never read the result; asyncio must not warn about that.
        self._result.add_done_callback(lambda result: result.cancelled() or result.exception())
        self.stop_reason: Step1XEditError | None = None
        self.warning: str | None = None
        """Reported with all progress from now on."""

    async def events(self, heartbeat_s: float = HEARTBEAT_S) -> AsyncIterator[Progress]:
        """Yield progress until the edit has ended; after a silence, the last event again.

        Each preview is yielded once.
        """
        last = Progress(Phase.QUEUED, step=1)
        async for event in heartbeats(self._delivered(), heartbeat_s):
            last = event or last
            yield replace(last, preview=self._preview.pop(last, None) if event else None)

    async def result(self) -> EditResult:
        """Wait for the picture, or raise the error that ended the edit."""
        return await asyncio.shield(self._result)

    def cancel(self) -> None:
        """Withdraw the edit: at once if it is queued, within one step if it is running."""
        self._engine.withdraw(self)

    # The engine's thread calls these; they hand over to the caller's event loop.

    def publish(self, event: Progress) -> None:
        """Send progress to the caller."""
        self._call(self._deliver, replace(event, warning=self.warning))

    def finish(self, result: EditResult | BaseException) -> None:
        """End the edit; does nothing if it has ended."""
        self._call(self._settle, result)

    async def _delivered(self) -> AsyncIterator[Progress]:
        while (event := await self._events.get()) is not None:
            yield event

    def _deliver(self, event: Progress) -> None:
        if self._result.done():
            return
        bare = replace(event, preview=None)
        if event.preview is not None:
            self._preview = {bare: event.preview}
        self._events.put_nowait(bare)

    def _settle(self, result: EditResult | BaseException) -> None:
        if self._result.done():
            return
        if isinstance(result, BaseException):
            self._result.set_exception(result)
        else:
            self._result.set_result(result)
        self._events.put_nowait(None)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and its listeners are gone
            self._loop.call_soon_threadsafe(function, *args)


@dataclass(frozen=True)
class EditResult:
    """The edited picture, and the model that made it."""

    painted: Painted
    residence: Residence
    pace: Pace | None = None
    """How long it took; None if it had too few steps."""


class _Move(Enum):
    OFFLOAD = "offload"
    RELEASE = "release"


@dataclass(frozen=True)
class _Order:
    """A move of the model, and the future of its caller; None if the idle timer ordered it."""

    move: _Move
    done: Future[EngineStatus] | None = None


class Engine:
    """Runs edits one after the other, with a worker that it starts for the first one."""

    lanes = 1

    def __init__(
        self,
        start: StartWorker,
        *,
        max_queue: int = 32,
        edit_timeout_s: float = 900.0,
        load_timeout_s: float = 3600.0,
        idle_timeout_s: float = 60.0,
        release_timeout_s: float = 0.0,
        min_patience_s: float = 10.0,
        clock: Clock | None = None,
    ) -> None:
        """Timeouts are in seconds; for the two of the idle model 0 means never.

        A worker that is silent for `min_patience_s` and for ten usual steps counts as dead.
        """
        self._start = start
        self._max_queue = max_queue
        self._limits = TimeLimits(edit_timeout_s, load_timeout_s)
        self._idle_timeout_s = idle_timeout_s
        self._release_timeout_s = release_timeout_s
        self._min_patience_s = min_patience_s
        self._clock = clock or Clock()
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self._changed = threading.Condition()  # guards the four below
        self._waiting: deque[Edit] = deque()
        self._orders: deque[_Order] = deque()
        self._running: Edit | None = None
        self._is_closed = False
        self._snapshot = EngineStatus(is_monitoring=idle_timeout_s > 0 or release_timeout_s > 0)
        self._last_use: float | None = None
        self._last_edit_s = _GUESSED_EDIT_S
        self._forecast = Forecast(edit_timeout_s)
        self._number = 0
        self._worker: Worker | None = None
        self._losses: deque[float] = deque()
        self._last_loss = ""

    # --- for callers, from any thread -----------------------------------------------------------

    def prepare(self) -> None:
        """Start the worker, because the first edit is about to come; that one reports failures."""
        with contextlib.suppress(ModelUnavailableError):
            self._check_process()
            self._ready_worker()

    def submit(self, job: EditJob) -> Edit:
        """Put a job at the end of the queue.

        Raises ServerBusyError if the queue is full, and what `check_time` raises.
        """
        self._check_process()
        self.check_time(job)
        with self._changed:
            self.check_room()
            return self._enqueue(job)

    def submit_next(self, job: EditJob) -> Edit:
        """Put the next item of a batch at the end of the queue.

        A batch is accepted or refused with its first item; the later ones always have room.
        Raises what `check_time` raises.
        """
        self._check_process()
        self.check_time(job)
        with self._changed:
            if self._is_closed:
                raise ShuttingDownError()
            return self._enqueue(job)

    def submit_end(self, job: UpscaleJob) -> Edit:
        """Put the end of an edit at the front of the queue: its caller has waited already."""
        self._check_process()
        with self._changed:
            if self._is_closed:
                raise ShuttingDownError()
            edit = self._numbered(job)
            self._waiting.appendleft(edit)
            self._publish_positions()
            self._wake()
            return edit

    def check_room(self) -> None:
        """Raise what `submit` would raise now, for callers that prepare a job first."""
        self._check_process()
        with self._changed:
            if self._is_closed:
                raise ShuttingDownError()
            if len(self._waiting) >= self._max_queue:
                raise self._busy()

    def check_time(self, job: EditJob) -> None:
        """Raise DeadlineExceededError if such edits have always taken far longer than they may."""
        self._forecast.check(job, self._clock.now())

    def time_warning(self, job: EditJob) -> str | None:
        """A warning if such an edit is predicted to take longer than it may."""
        return self._forecast.warning(job)

    def check_worker(self) -> None:
        """Raise ModelUnavailableError if the worker has ended too often to be started again."""
        with self._changed:
            if self._worker is not None and self._worker.is_alive:
                return
            now = self._clock.now()
            while self._losses and self._losses[0] <= now - RESTART_WINDOW_S:
                self._losses.popleft()
            if len(self._losses) <= MAX_RESTARTS:
                return
            wait_s = math.ceil(self._losses[0] + RESTART_WINDOW_S - now)
            raise ModelUnavailableError(
                f"the worker process has ended {len(self._losses)} times within 10 minutes "
                f"({self._last_loss}); try again in {wait_s} s",
                retry_after_s=wait_s,
            )

    def withdraw(self, edit: Edit) -> None:
        """Take an edit out of the queue, or stop it; does nothing if it has ended."""
        if self._process != os.getpid():
            return  # it is the parent's edit
        with self._changed:
            if edit in self._waiting:
                self._waiting.remove(edit)
                edit.finish(EditCancelledError())
                self._publish_positions()
            elif edit is self._running:
                self._stop(edit, EditCancelledError())

    def offload(self) -> Future[EngineStatus]:
        """Move the model off the device before the next edit; the future holds the new status."""
        return self._order(_Move.OFFLOAD)

    def release(self) -> Future[EngineStatus]:
        """End the worker process, and free all its memory, before the next edit."""
        return self._order(_Move.RELEASE)

    def status(self) -> EngineStatus:
        """The current state and counts; never waits."""
        snapshot, last_use = self._snapshot, self._last_use
        is_idle = last_use is not None and not snapshot.is_editing
        return replace(
            snapshot,
            queue_length=len(self._waiting),
            idle_time_s=self._clock.now() - last_use if is_idle and last_use is not None else 0.0,
        )

    def predicted_s(self, job: EditJob) -> float | None:
        """How long such an edit would take with the model of the last edit; None if unknown."""
        return self._forecast.seconds(job)

    def close(self, timeout_s: float = _STOP_S) -> None:
        """Refuse new edits, end the queued ones, stop the running one and end the worker.

        Does nothing in a forked child, which has none of these.
        """
        if self._process != os.getpid():
            return
        with self._changed:
            self._is_closed = True
            self._snapshot = replace(self._snapshot, is_monitoring=False)
            while self._waiting:
                self._waiting.popleft().finish(ShuttingDownError())
            while self._orders:
                _answer(self._orders.popleft(), ShuttingDownError())
            if self._running is not None:
                self._stop(self._running, ShuttingDownError())
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive() and self._worker is not None:
                self._worker.kill()
        elif self._worker is not None:  # it was prepared, and no edit came
            self._worker.kill()

    def _check_process(self) -> None:
        """Raise in a forked child: the thread and the worker stay with the parent.

        To be called before the lock is taken: in a child it may be held for ever.
        """
        if self._process != os.getpid():
            raise ModelUnavailableError(
                "this process was forked from the one that has the model; build a service in it"
            )

    # --- with the lock held ---------------------------------------------------------------------

    def _numbered(self, job: Job) -> Edit:
        self._number += 1
        return Edit(self, replace(job, number=self._number))

    def _enqueue(self, job: EditJob) -> Edit:
        edit = self._numbered(job)
        edit.warning = self.time_warning(job)
        self._waiting.append(edit)
        edit.publish(Progress(Phase.QUEUED, step=len(self._waiting)))
        self._wake()
        return edit

    def _order(self, move: _Move) -> Future[EngineStatus]:
        self._check_process()
        done: Future[EngineStatus] = Future()
        with self._changed:
            if self._is_closed:
                raise ShuttingDownError()
            self._orders.append(_Order(move, done))
            self._wake()
        return done

    def _wake(self) -> None:
        if self._thread is None:
            # A daemon, so that a worker that hangs does not keep the process alive.
            self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _stop(self, edit: Edit, reason: Step1XEditError) -> None:
        """End the running edit for its caller, who need not wait until the worker is free."""
        if edit.stop_reason is None:
            edit.stop_reason = reason
            edit.finish(reason)
            if self._worker is not None:
                self._worker.cancel(Cancel(edit.job.number))

    def _busy(self) -> ServerBusyError:
        wait_s = max(1, math.ceil(self._last_edit_s * (len(self._waiting) + 1)))
        number = len(self._waiting)
        waiting = "1 edit is waiting" if number == 1 else f"{number} edits are waiting"
        return ServerBusyError(f"{waiting}, try again in {wait_s} s", retry_after_s=wait_s)

    def _publish_positions(self) -> None:
        for position, edit in enumerate(self._waiting, start=1):
            edit.publish(Progress(Phase.QUEUED, step=position))

    # --- on the engine's thread -----------------------------------------------------------------

    def _work(self) -> None:
        try:
            while (turn := self._next()) is not None:
                match turn:
                    case Edit():
                        self._serve(turn)
                    case _Order():
                        self._carry_out(turn)
        finally:
            if self._worker is not None:
                self._worker.stop(_STOP_S)

    def _next(self) -> Edit | _Order | None:
        """Wait for work: moves of the model first, then edits; None ends the thread."""
        with self._changed:
            while not self._is_closed:
                if self._worker is not None and not self._worker.is_alive:
                    self._lose(WorkerLostError("it ended while idle"))
                if self._orders:
                    return self._orders.popleft()
                if self._waiting:
                    edit = self._running = self._waiting.popleft()
                    self._publish_positions()
                    self._note(is_editing=True)
                    return edit
                moment = self._next_move()
                if moment is not None and moment[0] <= self._clock.now():
                    return _Order(moment[1])
                wait_s = None if moment is None else moment[0] - self._clock.now()
                self._clock.wait(self._changed, wait_s)
            return None

    def _next_move(self) -> tuple[float, _Move] | None:
        """When the idle timer will move the model, and how."""
        if self._last_use is None or self._worker is None:
            return None
        moves = []
        if self._idle_timeout_s > 0 and self._snapshot.residence.location == "GPU":
            moves.append((self._last_use + self._idle_timeout_s, _Move.OFFLOAD))
        if self._release_timeout_s > 0:
            moves.append((self._last_use + self._release_timeout_s, _Move.RELEASE))
        return min(moves, key=lambda move: move[0], default=None)

    def _serve(self, edit: Edit) -> None:
        started = self._clock.now()
        result: EditResult | Step1XEditError
        try:
            result = self._follow(edit, self._ready_worker())
        except WorkerLostError as error:
            self._lose(error)
            result = WorkerLostError(f"{error}; try again")
        except Step1XEditError as error:
            result = error
        except Exception:
            log.exception("following an edit failed")
            self._lose(WorkerLostError("the engine could not follow it"))
            result = InternalError("the edit failed unexpectedly; the server's log says more")
        with self._changed:
            self._running = None
        self._last_use = self._clock.now()
        self._note(is_editing=False, loading=None)
        if isinstance(result, EditResult):
            self._last_edit_s = self._last_use - started
        edit.finish(edit.stop_reason or result)

    def _ready_worker(self) -> Worker:
        with self._changed:
            if self._worker is not None and not self._worker.is_alive:
                self._lose(WorkerLostError("it ended while idle"))
            if self._worker is None:
                self.check_worker()
                try:
                    self._worker = self._start(self._worker_ended)
                except OSError as error:
                    raise ModelUnavailableError(
                        f"the worker process cannot be started ({error.strerror})"
                    ) from None
            return self._worker

    def _worker_ended(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _lose(self, reason: WorkerLostError) -> None:
        """End and forget a worker that is lost."""
        if self._worker is None:
            return
        log.warning("%s", reason)
        self._last_loss = str(reason)
        self._losses.append(self._clock.now())
        self._worker.kill()
        self._worker = None
        self._note(residence=Residence())

    def _follow(self, edit: Edit, worker: Worker) -> EditResult:
        """Send the edit to the worker, publish its progress, and make sure that it ends."""
        worker.send(edit.job)
        # Only the pace of edits is learned.
        paced = edit.job if isinstance(edit.job, EditJob) else None
        watch = Watch(
            self._clock.now(),
            self._limits,
            self._min_patience_s,
            has_previews=paced is not None and bool(paced.preview_steps),
            is_loading=not self._snapshot.residence.is_ready,
        )
        stopwatch, left = Stopwatch(), TimeLeft(self._clock.now)
        if paced is not None:
            self._forecast.began(paced, self._clock.now())
        if edit.stop_reason is not None:  # it was stopped before there was a worker
            worker.cancel(Cancel(edit.job.number))
        while True:
            now = self._clock.now()
            if edit.stop_reason is None and now >= watch.deadline:
                with self._changed:
                    self._stop(edit, self._overrun(edit.job, watch))
            if edit.stop_reason is not None:
                watch.stopped(now)
            report = worker.receive(max(0.0, watch.limit - now))
            if report is None:
                if watch.hangs(now := self._clock.now()):
                    raise WorkerLostError(f"it was silent for {watch.silence(now):.0f} s")
                continue
            self._observe(report.residence)
            match report.event:
                case Progress() as progress:
                    watch.saw(progress, now := self._clock.now())
                    stopwatch.saw(progress, now)
                    done, total = progress.work
                    left.saw(progress.phase, done, total or None)
                    left_s = left.seconds
                    progress = replace(progress, left_s=left_s)
                    if progress.phase in STEPS and left_s is not None:
                        self._warn_if_late(edit, watch.deadline - now - left_s)
                    self._note(loading=progress if watch.is_loading else None)
                    edit.publish(progress)
                case Painted() as painted:
                    pace = None
                    if paced is not None:
                        now = self._clock.now()
                        pace = stopwatch.pace(paced, painted.evaluations, now)
                        self._forecast.learn(paced, report.residence, pace, now)
                    return EditResult(painted, report.residence, pace)
                case Failed(code, sentence):
                    raise rebuild(code, sentence)
                case Done():
                    raise InternalError("the model ended without a picture")

    def _warn_if_late(self, edit: Edit, spare_s: float) -> None:
        """Warn, once, if the rest of an edit will take longer than is left."""
        if spare_s < 0 and edit.warning is None:
            edit.warning = self._forecast.too_slow(edit.job, self._limits.edit_s - spare_s)

    def _overrun(self, job: Job, watch: Watch) -> DeadlineExceededError:
        if watch.is_loading:
            return DeadlineExceededError(
                f"loading the model took longer than {self._limits.load_s:g} s; keep it on a "
                "faster disk, or set a higher LOAD_TIMEOUT"
            )
        return DeadlineExceededError(
            f"the edit took longer than {self._limits.edit_s:g} s; use {job.quicker}, or a higher "
            "EDIT_TIMEOUT"
        )

    def _carry_out(self, order: _Order) -> None:
        if order.done is not None and not order.done.set_running_or_notify_cancel():
            return
        try:
            match order.move:
                case _Move.OFFLOAD:
                    self._offload()
                case _Move.RELEASE:
                    self._release()
        except Step1XEditError as error:
            if isinstance(error, WorkerLostError):
                self._lose(error)
            _answer(order, error)
        else:
            _answer(order, self.status())

    def _offload(self) -> None:
        if self._worker is None or self._snapshot.residence.location != "GPU":
            return
        self._worker.send(Offload())
        limit = self._clock.now() + _MOVE_S
        while (report := self._worker.receive(max(0.0, limit - self._clock.now()))) is None:
            if self._clock.now() >= limit:
                raise WorkerLostError(f"it did not offload within {_MOVE_S:.0f} s")
        self._observe(report.residence)
        if isinstance(report.event, Failed):
            raise rebuild(report.event.code, report.event.sentence)

    def _release(self) -> None:
        if self._worker is None:
            return
        self._worker.stop(_STOP_S)
        self._worker = None
        location = self._snapshot.residence.location
        self._note(residence=Residence())
        if location != "Unloaded":
            self._note(full_releases=self._snapshot.full_releases + 1)
            log.info("%s → Unloaded", location)

    def _observe(self, residence: Residence) -> None:
        """Record where the model is, and count its moves."""
        before, now = self._snapshot.residence.location, residence.location
        self._note(residence=residence)
        if before == now:
            return
        log.debug("%s → %s: %s on %s", before, now, residence.model, residence.device)
        counted = self._snapshot
        if now == "GPU" or (before == "Unloaded" and residence.device == "cpu"):
            self._note(total_loads=counted.total_loads + 1)
        if (before, now) == ("CPU", "GPU"):
            self._note(cpu_to_gpu=counted.cpu_to_gpu + 1)
        if (before, now) == ("GPU", "CPU"):
            self._note(gpu_to_cpu=counted.gpu_to_cpu + 1)

    def _note(self, **changes: object) -> None:
        self._snapshot = replace(self._snapshot, **changes)  # type: ignore[arg-type]


def _answer(order: _Order, answer: EngineStatus | Step1XEditError) -> None:
    match order.done, answer:
        case None, _:
            pass
        case done, Step1XEditError():
            done.set_exception(answer)
        case done, _:
            done.set_result(answer)
