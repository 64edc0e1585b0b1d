"""The engine of a cluster: one line of edits in front of replicas that run elsewhere.

The line is first come, first served. An edit leaves it when a lane is free, of which there are as
many as the cluster may have replicas, and returns to its head if its replica is lost. All work is
done on one event loop in a separate thread. Ray is not imported here: the engine is given a
`Cluster`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Final, Literal, Protocol, TypeAlias

from step1x_edit.channel import EditJob, Job, Phase, Progress, UpscaleJob
from step1x_edit.cluster.replica import Said
from step1x_edit.engine.engine import Clock, Edit, EditResult, EngineStatus, Replica
from step1x_edit.engine.forecast import Forecast
from step1x_edit.errors import (
    EditCancelledError,
    InternalError,
    ModelUnavailableError,
    ServerBusyError,
    ShuttingDownError,
    Step1XEditError,
    WorkerLostError,
)
from step1x_edit.waiting import drop, first_of

log = logging.getLogger(__name__)

MAX_RETRIES: Final = 2
_WORKER_RETRIES: Final = 1
"""An edit whose worker dies may be the cause, and must not visit all replicas."""

_LOOK_EVERY_S: Final = 2.0
_GONE_S: Final = 7.0
"""Without a sign of life for this time, the cluster counts as gone and new edits are refused."""
_LOST_S: Final = 30.0
"""After this time the edits that it runs are given up."""

_STOP_S: Final = 2.0  # for replicas to learn that their edits are cancelled
_GUESSED_EDIT_S: Final = 10.0  # until the first edit has been timed

Move: TypeAlias = Literal["offload", "release"]


class Cluster(Protocol):
    """Replicas as the engine sees them; all calls come from one event loop."""

    def run(self, job: Job) -> AsyncGenerator[Said, None]:
        """Edit on a replica as soon as one is free; closing the generator cancels the edit.

        Raises any exception if the replica is lost.
        """
        ...

    async def look(self) -> Sequence[Replica]:
        """The replicas as they are now. Raises an exception if nothing can run there."""
        ...

    async def move(self, move: Move) -> Sequence[Replica]:
        """Move the model of all replicas, each after the edit that it runs; their new states."""
        ...

    def close(self) -> None:
        """Leave the cluster."""
        ...


@dataclass
class _Turn:
    """An edit and its place."""

    edit: Edit
    told: Progress | None = None
    """What its caller knows while it waits."""
    has_begun: bool = False
    """Whether a replica has it."""
    since: float = math.inf
    """When a replica first had it."""
    retries: int = 0
    lost_workers: int = 0
    task: asyncio.Task[EditResult] | None = None


class RayEngine:
    """Runs edits on the replicas of a cluster."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        lanes: int,
        max_queue: int = 32,
        edit_timeout_s: float = 900.0,
        look_every_s: float = _LOOK_EVERY_S,
        gone_s: float = _GONE_S,
        lost_s: float = _LOST_S,
        clock: Clock | None = None,
    ) -> None:
        """`lanes` is the number of replicas that the cluster may have."""
        self._cluster = cluster
        self.lanes = lanes
        self._max_queue = max_queue
        self._edit_timeout_s = edit_timeout_s
        self._look_every_s = look_every_s
        self._gone_s = gone_s
        self._lost_s = lost_s
        self._clock = clock or Clock()
        self._forecast = Forecast(edit_timeout_s)
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()  # guards the rest
        self._waiting: deque[_Turn] = deque()
        self._running: dict[int, _Turn] = {}
        self._replicas: dict[str, Replica] = {}
        self._number = 0
        self._last_edit_s = _GUESSED_EDIT_S
        self._seen = math.inf  # when the cluster last answered, in the time of the loop
        self._has_looked = False
        self._trouble = ""
        self._is_closed = False

    # --- for callers, from any thread -----------------------------------------------------------

    def prepare(self) -> None:
        """Connect to the cluster, because the first edit is about to come."""
        with self._lock:
            if self._thread is None and not self._is_closed:
                self._seen = self._loop.time()
                self._thread = threading.Thread(target=self._work, name="cluster", daemon=True)
                self._thread.start()

    def submit(self, job: EditJob) -> Edit:
        """Put a job at the end of the queue.

        Raises ServerBusyError if the queue is full, and what `check_time` raises.
        """
        self.check_time(job)
        with self._lock:
            self.check_room()
            return self._enqueue(job)

    def submit_next(self, job: EditJob) -> Edit:
        """Put the next item of a batch at the end of the queue, which always has room for it."""
        self.check_time(job)
        with self._lock:
            self._check_open()
            return self._enqueue(job)

    def submit_end(self, job: UpscaleJob) -> Edit:
        """Put the end of an edit at the front of the queue: its caller has waited already."""
        with self._lock:
            self._check_open()
            edit = self._numbered(job)
            self._waiting.appendleft(_Turn(edit))
            self._dispatch()
            return edit

    def check_room(self) -> None:
        """Raise what `submit` would raise now, for callers that prepare a job first."""
        with self._lock:
            self._check_open()
            is_lane_free = len(self._running) < self.lanes
            if len(self._waiting) >= self._max_queue and not is_lane_free:
                raise self._busy()

    def check_time(self, job: EditJob) -> None:
        """Raise DeadlineExceededError if such edits have always taken far longer than they may."""
        self._forecast.check(job, self._clock.now())

    def time_warning(self, job: EditJob) -> str | None:
        """A warning if such an edit is predicted to take longer than it may."""
        return self._forecast.warning(job)

    def predicted_s(self, job: EditJob) -> float | None:
        """How long such an edit would take with the model of the last edit; None if unknown."""
        return self._forecast.seconds(job)

    def check_worker(self) -> None:
        """Raise ModelUnavailableError if the cluster has not answered for a while."""
        self.prepare()
        was_never_there = self._trouble and not self._has_looked
        if was_never_there or self._loop.time() - self._seen > self._gone_s:
            raise self._gone()

    def withdraw(self, edit: Edit) -> None:
        """Take an edit out of the queue, or stop it; does nothing if it has ended."""
        with self._lock:
            if (turn := self._running.get(edit.job.number)) is not None:
                self._stop(turn, EditCancelledError())
                return
            for turn in self._waiting:
                if turn.edit is edit:
                    self._waiting.remove(turn)
                    edit.finish(EditCancelledError())
                    self._tell_positions()
                    return

    def offload(self) -> Future[EngineStatus]:
        """Move the model of each replica off its device before its next edit."""
        return self._order("offload")

    def release(self) -> Future[EngineStatus]:
        """Unload the model of each replica before its next edit."""
        return self._order("release")

    def status(self) -> EngineStatus:
        """The sum over all replicas; the model and its memory are those of the first."""
        self.prepare()
        with self._lock:
            replicas = tuple(self._replicas[name] for name in sorted(self._replicas))
            num_begun = sum(turn.has_begun for turn in self._running.values())
            num_waiting = len(self._waiting) + len(self._running) - num_begun
        total = _sum_of(replicas)
        return replace(
            total,
            is_editing=total.is_editing or num_begun > 0,
            queue_length=num_waiting,
        )

    def close(self, timeout_s: float = 5.0) -> None:
        """Refuse new edits, end the queued ones, stop those that run and leave the cluster."""
        with self._lock:
            self._is_closed = True
            self._end_all(ShuttingDownError())
        if self._thread is not None:
            with contextlib.suppress(RuntimeError):  # it is closed
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout_s)

    # --- with the lock held ---------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._is_closed:
            raise ShuttingDownError()
        self.check_worker()

    def _numbered(self, job: Job) -> Edit:
        self._number += 1
        return Edit(self, replace(job, number=self._number))

    def _enqueue(self, job: EditJob) -> Edit:
        edit = self._numbered(job)
        edit.warning = self.time_warning(job)
        self._waiting.append(_Turn(edit))
        self._dispatch()
        return edit

    def _dispatch(self) -> None:
        """Give edits to the cluster while a lane is free, and tell the others where they stand."""
        while self._waiting and len(self._running) < self.lanes:
            turn = self._waiting.popleft()
            self._running[turn.edit.job.number] = turn
            self._loop.call_soon_threadsafe(self._begin, turn)
        self._tell_positions()

    def _tell_positions(self) -> None:
        """Tell the callers of edits that no replica has yet, if something has changed."""
        is_starting = self._has_looked and not any(one.status for one in self._replicas.values())
        ahead = [turn for turn in self._running.values() if not turn.has_begun]
        for position, turn in enumerate([*ahead, *self._waiting], start=1):
            progress = Progress(Phase.QUEUED, step=position)
            if is_starting and position <= len(ahead):
                progress = Progress(Phase.STARTING)
            if turn.told != progress:
                turn.told = progress
                turn.edit.publish(progress)

    def _stop(self, turn: _Turn, reason: Step1XEditError) -> None:
        """End a running edit for its caller, who need not wait until the replica is free."""
        if turn.edit.stop_reason is None:
            turn.edit.stop_reason = reason
            turn.edit.finish(reason)
            self._loop.call_soon_threadsafe(self._cancel, turn)

    def _end_all(self, reason: Step1XEditError) -> None:
        while self._waiting:
            self._waiting.popleft().edit.finish(reason)
        for turn in self._running.values():
            self._stop(turn, reason)

    def _busy(self) -> ServerBusyError:
        number = len(self._waiting)
        wait_s = max(1, math.ceil(self._last_edit_s * (number + 1) / self.lanes))
        waiting = "1 edit is waiting" if number == 1 else f"{number} edits are waiting"
        return ServerBusyError(f"{waiting}, try again in {wait_s} s", retry_after_s=wait_s)

    def _gone(self) -> ModelUnavailableError:
        reason = self._trouble or "it does not answer"
        return ModelUnavailableError(
            f"no edit can run in the Ray cluster: {reason}", retry_after_s=self._gone_s
        )

    def _order(self, move: Move) -> Future[EngineStatus]:
        with self._lock:
            self._check_open()
        return asyncio.run_coroutine_threadsafe(self._carry_out(move), self._loop)

    # --- on the event loop ----------------------------------------------------------------------

    def _work(self) -> None:
        asyncio.set_event_loop(self._loop)
        watching = self._loop.create_task(self._watch())
        try:
            self._loop.run_forever()
            rest = [task for task in asyncio.all_tasks(self._loop) if task is not watching]
            watching.cancel()
            self._loop.run_until_complete(asyncio.wait([watching, *rest], timeout=_STOP_S))
        finally:
            self._cluster.close()
            self._loop.close()

    def _begin(self, turn: _Turn) -> None:
        turn.task = self._loop.create_task(self._follow(turn))
        turn.task.add_done_callback(lambda task: self._ended(turn, task))

    def _cancel(self, turn: _Turn) -> None:
        if turn.task is not None:
            turn.task.cancel()

    async def _follow(self, turn: _Turn) -> EditResult:
        """Run an edit on a replica and publish its progress."""
        edit = turn.edit
        async with contextlib.aclosing(self._cluster.run(edit.job)) as sayings:
            async for said in sayings:
                now = self._clock.now()
                with self._lock:
                    self._replicas[said.replica.name] = said.replica
                    if not turn.has_begun:
                        turn.has_begun, turn.since = True, min(turn.since, now)
                        if isinstance(edit.job, EditJob):
                            self._forecast.began(edit.job, now)
                        self._tell_positions()
                match said.event:
                    case Progress(phase=Phase.QUEUED):
                        pass  # behind an edit that is being cancelled there
                    case Progress() as progress:
                        edit.warning = progress.warning or edit.warning
                        edit.publish(progress)
                    case EditResult() as result:
                        if isinstance(edit.job, EditJob):
                            self._forecast.learn(edit.job, result.residence, result.pace, now)
                        return result
                    case error:
                        raise error
        raise InternalError("the replica ended without a picture")

    def _ended(self, turn: _Turn, task: asyncio.Task[EditResult]) -> None:
        """End an edit, or put it back at the head of the line if its replica was lost."""
        outcome: EditResult | Step1XEditError
        if task.cancelled():  # by us, or by Ray with the replica
            outcome = WorkerLostError("its replica was stopped; try again")
        elif (error := task.exception()) is None:
            outcome = task.result()
        elif isinstance(error, Step1XEditError):
            outcome = error
        else:
            outcome = WorkerLostError(f"its replica is gone ({type(error).__name__}); try again")
        with self._lock:
            del self._running[turn.edit.job.number]
            if isinstance(outcome, EditResult):
                self._last_edit_s = self._clock.now() - turn.since
            if isinstance(outcome, WorkerLostError) and self._may_run_again(turn, task):
                log.warning("edit %d runs again: %s", turn.edit.job.number, outcome)
                turn.has_begun, turn.told = False, None
                self._waiting.appendleft(turn)
            else:
                turn.edit.finish(turn.edit.stop_reason or outcome)
            self._dispatch()

    def _may_run_again(self, turn: _Turn, task: asyncio.Task[EditResult]) -> bool:
        """Count the loss, and decide; never after the time that an edit may take."""
        turn.retries += 1
        is_worker = not task.cancelled() and isinstance(task.exception(), WorkerLostError)
        turn.lost_workers += is_worker
        return (
            turn.edit.stop_reason is None
            and not self._is_closed
            and turn.retries <= MAX_RETRIES
            and turn.lost_workers <= _WORKER_RETRIES
            and self._clock.now() - turn.since < self._edit_timeout_s
        )

    async def _carry_out(self, move: Move) -> EngineStatus:
        moving = asyncio.ensure_future(self._cluster.move(move))
        try:
            while not await first_of(moving, timeout_s=self._look_every_s):
                self.check_worker()
            moved = moving.result()
        finally:
            drop(moving)
        with self._lock:
            self._replicas.update({one.name: one for one in moved})
        return _sum_of(moved)

    async def _watch(self) -> None:
        while True:
            await self._look()
            await asyncio.sleep(self._look_every_s)

    async def _look(self) -> None:
        """Ask the cluster for its replicas; without an answer for too long, give up."""
        looking = asyncio.ensure_future(self._cluster.look())
        try:
            if not await first_of(looking, timeout_s=self._gone_s):
                raise ModelUnavailableError("it does not answer")
            found = looking.result()
        except Exception as error:  # noqa: BLE001 - of any kind, also of Ray; logged
            self._not_seen(error)
        else:
            self._saw(found)
        finally:
            drop(looking)

    def _saw(self, found: Sequence[Replica]) -> None:
        if self._trouble:
            log.warning("the Ray cluster answers again")
        with self._lock:
            self._seen, self._trouble, self._has_looked = self._loop.time(), "", True
            known = self._replicas
            self._replicas = {
                one.name: one if one.status else known.get(one.name, one) for one in found
            }
            self._tell_positions()

    def _not_seen(self, error: Exception) -> None:
        trouble = str(error).removeprefix(f"{ModelUnavailableError.beginning}: ")
        if trouble != self._trouble:
            log.warning("the Ray cluster: %s", trouble)
        with self._lock:
            self._trouble = trouble or type(error).__name__
            silence = self._loop.time() - self._seen
            if silence > self._gone_s:
                self._replicas = {}
            if silence > self._lost_s:
                self._end_all(self._gone())


def _sum_of(replicas: Sequence[Replica]) -> EngineStatus:
    """The counts of all replicas; the model and its memory are those of the first."""
    known = [one.status for one in replicas if one.status is not None]
    first = known[0] if known else EngineStatus()
    return replace(
        first,
        is_editing=any(one.is_editing for one in known),
        loading=next((one.loading for one in known if one.loading), None),
        queue_length=0,
        idle_time_s=min((one.idle_time_s for one in known), default=0.0),
        total_loads=sum(one.total_loads for one in known),
        gpu_to_cpu=sum(one.gpu_to_cpu for one in known),
        cpu_to_gpu=sum(one.cpu_to_gpu for one in known),
        full_releases=sum(one.full_releases for one in known),
        replicas=tuple(replicas),
    )
