"""The engine: one line of edits in front of the one worker that owns the model.

Edits run one at a time, in order, on a thread of their own; callers wait on the event loop. The
model is loaded when the first edit asks for it. The engine knows nothing about files, pictures or
protocols and never imports torch: it is given a function that loads a `Worker`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Final

from step1x_edit.errors import (
    DeadlineExceededError,
    EditCancelledError,
    InternalError,
    ModelUnavailableError,
    OutOfMemoryError,
    ServerBusyError,
    ShuttingDownError,
    Step1XEditError,
)
from step1x_edit.schemas import Location
from step1x_edit.worker import EditJob, Memory, ModelInfo, Outcome, Phase, Progress, Worker

log = logging.getLogger(__name__)

HEARTBEAT_S: Final = 4.0  # a sign of life every 5 s is promised, and timers come late
_GUESSED_EDIT_S: Final = 10.0  # until the first edit has been timed


@dataclass(frozen=True)
class EngineStatus:
    """What the engine did and has, at one moment."""

    location: Location = "Unloaded"
    model: ModelInfo | None = None
    memory: Memory = Memory()
    is_editing: bool = False
    queue_length: int = 0
    idle_time_s: float = 0.0
    total_loads: int = 0
    gpu_to_cpu: int = 0
    cpu_to_gpu: int = 0
    full_releases: int = 0


class Edit:
    """An edit in the line: what its caller holds on to. Made by `Engine.submit`."""

    def __init__(self, engine: Engine, job: EditJob) -> None:
        self.job = job
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Progress | None] = asyncio.Queue()
        self._result: asyncio.Future[Outcome] = self._loop.create_future()
        # Whoever cancels may never look at the result; that is no reason for a warning.
        self._result.add_done_callback(lambda result: result.cancelled() or result.exception())
        self.stop_reason: Step1XEditError | None = None

    async def events(self, heartbeat_s: float = HEARTBEAT_S) -> AsyncIterator[Progress]:
        """Yield progress until the edit has ended; after a silence, the last event again."""
        last = Progress(Phase.QUEUED, step=1)
        # Not wait_for: before Python 3.12 it can swallow the cancellation of its caller.
        while True:
            getting = asyncio.ensure_future(self._events.get())
            try:
                while not (await asyncio.wait({getting}, timeout=heartbeat_s))[0]:
                    yield last
            finally:
                getting.cancel()
            if (event := getting.result()) is None:
                return
            last = event
            yield last

    async def result(self) -> Outcome:
        """Wait for the outcome, or raise the error that ended the edit."""
        return await asyncio.shield(self._result)

    def cancel(self) -> None:
        """Withdraw the edit: at once from the line, within one step from the model."""
        self._engine.withdraw(self)

    # The worker's thread speaks to the caller's event loop through these.

    def publish(self, event: Progress) -> None:
        """Tell the caller how far the edit has come."""
        self._call(self._events.put_nowait, event)

    def finish(self, outcome: Outcome | BaseException) -> None:
        """End the edit."""
        self._call(self._settle, outcome)

    def _settle(self, outcome: Outcome | BaseException) -> None:
        if self._result.done():
            return
        if isinstance(outcome, BaseException):
            self._result.set_exception(outcome)
        else:
            self._result.set_result(outcome)
        self._events.put_nowait(None)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to listen
            self._loop.call_soon_threadsafe(function, *args)


class Engine:
    """Runs edits one after the other with a model that it loads when first asked."""

    def __init__(
        self,
        load: Callable[[], Worker],
        *,
        max_queue: int = 32,
        edit_timeout_s: float = 900.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load = load
        self._max_queue = max_queue
        self._edit_timeout_s = edit_timeout_s
        self._clock = clock
        self._worker: Worker | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()  # guards the three below
        self._waiting: deque[Edit] = deque()
        self._running: Edit | None = None
        self._is_closed = False
        self._snapshot = EngineStatus()  # replaced whole, so that it can be read without waiting
        self._last_use: float | None = None
        self._last_edit_s = _GUESSED_EDIT_S

    def submit(self, job: EditJob) -> Edit:
        """Put a job at the end of the line; raises ServerBusyError when the line is full."""
        edit = Edit(self, job)
        with self._changed:
            self.check_room()
            self._waiting.append(edit)
            edit.publish(Progress(Phase.QUEUED, step=len(self._waiting)))
            self._start()
            self._changed.notify()
        return edit

    def check_room(self) -> None:
        """Raise what `submit` would raise now, for callers with work to do before it."""
        with self._changed:
            if self._is_closed:
                raise ShuttingDownError()
            if len(self._waiting) >= self._max_queue:
                raise self._busy()

    def withdraw(self, edit: Edit) -> None:
        """Take an edit out of the line, or stop it; does nothing if it has ended."""
        with self._changed:
            if edit in self._waiting:
                self._waiting.remove(edit)
                edit.finish(EditCancelledError())
                self._tell_positions()
            elif edit is self._running and edit.stop_reason is None:
                edit.stop_reason = EditCancelledError()

    def status(self) -> EngineStatus:
        """What the engine does and has right now; never waits."""
        snapshot, last_use = self._snapshot, self._last_use
        is_idle = last_use is not None and not snapshot.is_editing
        return replace(
            snapshot,
            queue_length=len(self._waiting),
            idle_time_s=self._clock() - last_use if is_idle and last_use is not None else 0.0,
        )

    def close(self, timeout_s: float = 5.0) -> None:
        """Refuse new edits, end the waiting ones, stop the running one and wait for it a while."""
        with self._changed:
            self._is_closed = True
            while self._waiting:
                self._waiting.popleft().finish(ShuttingDownError())
            if self._running is not None:
                self._running.stop_reason = ShuttingDownError()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _start(self) -> None:
        if self._thread is None:
            # A daemon: a model that hangs must not keep the process from leaving.
            self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
            self._thread.start()

    def _busy(self) -> ServerBusyError:
        wait_s = max(1, math.ceil(self._last_edit_s * (len(self._waiting) + 1)))
        return ServerBusyError(
            f"{len(self._waiting)} edits are waiting, try again in {wait_s} s",
            retry_after_s=wait_s,
        )

    def _tell_positions(self) -> None:
        for position, edit in enumerate(self._waiting, start=1):
            edit.publish(Progress(Phase.QUEUED, step=position))

    # --- on the worker's thread -----------------------------------------------------------------

    def _work(self) -> None:
        while (edit := self._next()) is not None:
            started = self._clock()
            outcome = self._outcome(edit)
            with self._changed:
                self._running = None
            self._last_use = self._clock()
            self._note(is_editing=False, memory=self._memory())
            if isinstance(outcome, Outcome):
                self._last_edit_s = self._last_use - started
            edit.finish(outcome)

    def _next(self) -> Edit | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            if self._is_closed:
                return None
            edit = self._running = self._waiting.popleft()
            self._tell_positions()
        self._note(is_editing=True)
        return edit

    def _outcome(self, edit: Edit) -> Outcome | Step1XEditError:
        try:
            return self._edit(edit, self._loaded(edit))
        except Step1XEditError as error:
            return error.with_traceback(None)  # its frames would keep the tensors alive
        except FloatingPointError:
            return InternalError(
                "the model produced values that are not numbers; try another seed or fewer steps"
            )
        except Exception as error:
            if _is_out_of_memory(error):
                log.warning("out of memory during an edit")
                return OutOfMemoryError("this edit needs more than is free; try a lower size_level")
            log.exception("edit failed")
            return InternalError("the edit failed unexpectedly; the server's log says more")

    def _memory(self) -> Memory:
        """What the worker holds after an edit, however it ended."""
        if self._worker is None:
            return Memory()
        try:
            return self._worker.memory()
        except Exception:  # a device that has failed; the edit has told its caller
            log.exception("the memory cannot be measured")
            return self._snapshot.memory

    def _loaded(self, edit: Edit) -> Worker:
        if self._worker is None:
            edit.publish(Progress(Phase.LOADING))
            started = self._clock()
            self._worker = self._load_or_explain()
            info = self._worker.info
            self._note(
                location=info.location,
                model=info,
                memory=self._worker.memory(),
                total_loads=self._snapshot.total_loads + 1,
            )
            log.info("disk → %s in %.1f s: %s", info.device, self._clock() - started, info.name)
        return self._worker

    def _load_or_explain(self) -> Worker:
        try:
            return self._load()
        except (Step1XEditError, MemoryError):
            raise
        except Exception as error:
            if _is_out_of_memory(error):
                raise
            log.exception("loading the model failed")
            raise ModelUnavailableError(f"the model cannot be loaded ({error})") from None

    def _edit(self, edit: Edit, worker: Worker) -> Outcome:
        deadline = self._clock() + self._edit_timeout_s
        self._check(edit, deadline)
        with contextlib.closing(worker.edit(edit.job)) as events:
            for event in events:
                if isinstance(event, Outcome):
                    return event
                self._check(edit, deadline)
                edit.publish(event)
        raise InternalError("the model ended without a picture")

    def _check(self, edit: Edit, deadline: float) -> None:
        if edit.stop_reason is not None:
            raise edit.stop_reason
        if self._clock() > deadline:
            raise DeadlineExceededError(
                f"the edit took longer than {self._edit_timeout_s:g} s; use fewer num_steps, "
                "a lower size_level, or a higher EDIT_TIMEOUT"
            )

    def _note(self, **changes: object) -> None:
        self._snapshot = replace(self._snapshot, **changes)  # type: ignore[arg-type]


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on the device; torch is known by its words only."""
    return (
        isinstance(error, MemoryError)
        or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
        or "DefaultCPUAllocator" in str(error)  # torch raises a plain RuntimeError for host memory
    )
