"""The partners of a worker: the processes that make the steps of its edits with it.

The worker is to them what the engine is to the worker: it starts them, sends them requests and
sees how they end. If one is lost, the worker reports that and ends, and the engine starts a new
one with new partners. They end with the worker, whose pipes they watch.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, NoReturn

from step1x_edit.channel import Cancel, Denoise, Failed, Memory, Offload, Prepare, Report, Start
from step1x_edit.engine.worker_process import WorkerProcess
from step1x_edit.errors import (
    InternalError,
    ModelUnavailableError,
    OutOfMemoryError,
    Step1XEditError,
    WorkerLostError,
    rebuild,
)
from step1x_edit.model.denoising import DenoiseState, Encoded
from step1x_edit.model.pipeline import EditPipeline, Plan
from step1x_edit.model.request import NetworkRequest
from step1x_edit.model.team import PartedError, Team
from step1x_edit.worker.group import End, Seat, leave_if_broken, message_of
from step1x_edit.worker.products import kind_of

if TYPE_CHECKING:
    from step1x_edit.schemas.requests import Precision

_POLL_S: Final = 0.5  # between two checks whether the edit was cancelled


class Partners:
    """Starts the partners, and leads them; there may be none. Each answers before the next request.

    All methods are called on one thread.
    """

    def __init__(self, start: Start, device: str, end: End, module: str) -> None:
        """`end` is called, from any thread, when one of them is lost. They run `module`."""
        self.size = start.gpus_per_edit
        self._end = end
        self._team = Team()
        self._number = self._load = 0
        self._waiting: set[int] = set()
        """The indices of those that have not answered."""
        self._loras: dict[int, Mapping[str, float] | None] = {}
        """The LoRAs of those whose model is where it computes."""
        self._memories = [Memory()] * (self.size - 1)
        self._processes: list[WorkerProcess] = []
        self._are_started = threading.Event()
        if self.size == 1:
            return
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        self._seat = Seat(0, self.size, device, port, listener.detach())
        try:
            for rank in range(1, self.size):
                its = replace(start, rank=rank, meeting=port)
                self._processes.append(WorkerProcess(its, partial(self._ended, rank - 1), module))
        except OSError as error:
            reason = f"a process of an edit cannot be started ({error.strerror})"
            end(ModelUnavailableError(reason))
        self._are_started.set()

    @property
    def memories(self) -> tuple[Memory, ...]:
        """The memory that each held when it answered last."""
        return tuple(self._memories)

    def are_ready(self, loras: Mapping[str, float] | None) -> bool:
        """Whether the model of each is where it computes, with these LoRAs."""
        return all(self._is_ready(index, loras) for index in self._all)

    def _is_ready(self, index: int, loras: Mapping[str, float] | None) -> bool:
        return index in self._loras and self._loras[index] == loras

    def forget(self) -> None:
        """Have them read the model again, as this process does."""
        self._load += 1
        self._loras.clear()

    def preparing(self, loras: Mapping[str, float] | None, precision: Precision) -> Iterator[None]:
        """Bring their models to where they compute; yields while that lasts.

        Closing the iterator stops it. Raises what stopped one of them.
        """
        self._number += 1
        for index in self._all:
            if not self._is_ready(index, loras):
                self._ask(index, Prepare(self._number, loras, precision, self._load))
        try:
            while self._waiting:
                for index in list(self._waiting):
                    report = self._processes[index].receive(_POLL_S)
                    if report is None:
                        yield
                    else:
                        self._answered(index, report)
                        self._loras[index] = loras
        except BaseException:
            for index in self._waiting:
                self._processes[index].cancel(Cancel(self._number))
            raise

    @contextlib.contextmanager
    def leading(self, pipeline: EditPipeline) -> Iterator[None]:
        """Let them take part in the steps of this pipeline's edits in here.

        Raises what stopped one of them. Ends the process if one may wait for it for ever.
        """

        def team_for(
            encoded: Encoded, state: DenoiseState, request: NetworkRequest, plan: Plan
        ) -> Team:
            code = None
            if request.mode != "exact" and pipeline.coded is not None:
                code = kind_of(pipeline.coded)
            self._number += 1
            message = message_of(self._number, encoded, state, request, plan, code)
            for rank in self._seat.ranks(len(encoded.branches))[1:]:
                self._ask(rank - 1, message)
            self._team = self._seat.team(len(encoded.branches))
            return self._team

        if not self._processes:
            yield
            return
        pipeline.team_for = team_for
        try:
            yield
        except PartedError:
            self._explain()
        except Exception as error:
            leave_if_broken(self._team, error, self._end)
            raise

    def offload(self) -> None:
        """Move their models to host memory."""
        for index in self._all:
            self._ask(index, Offload())
        for index in self._all:
            self._settle(index)
        self._loras.clear()

    @property
    def _all(self) -> range:
        return range(len(self._processes))

    def _ask(self, index: int, request: Prepare | Offload | Denoise) -> None:
        with contextlib.suppress(Step1XEditError, MemoryError):  # that was of another edit
            self._settle(index)
        self._processes[index].send(request)
        self._waiting.add(index)

    def _explain(self) -> NoReturn:
        """Raise what stopped the partner because of which the steps have ended."""
        for index in list(self._waiting):
            self._settle(index)
        raise InternalError("a process of the edit has stopped without a reason")

    def _settle(self, index: int) -> None:
        """Wait for an answer. Raises what it reports."""
        if index in self._waiting:
            while (report := self._processes[index].receive(_POLL_S)) is None:
                pass
            self._answered(index, report)

    def _answered(self, index: int, report: Report) -> None:
        self._waiting.discard(index)
        self._memories[index] = report.residence.memory
        if isinstance(report.event, Failed):
            self._loras.pop(index, None)
            if report.event.code == OutOfMemoryError.code:
                raise MemoryError(report.event.sentence)  # another plan may need less
            raise rebuild(report.event.code, report.event.sentence)

    def _ended(self, index: int) -> None:
        """One has ended: report why, and end."""
        self._are_started.wait()
        try:
            while True:
                report = self._processes[index].receive(0.0)
                if report is not None and isinstance(report.event, Failed):
                    raise rebuild(report.event.code, report.event.sentence)
        except WorkerLostError as error:
            which = f"process {index + 2} of {self.size}"
            self._end(WorkerLostError(f"{error} ({which})"))
        except Step1XEditError as error:
            self._end(error)


ALONE: Final = Partners(Start(), "", lambda _: None, "")
"""No partners."""
