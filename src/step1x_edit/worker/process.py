"""The worker: the child process that owns torch, the model and the device.

It handles one request at a time on its main thread, while a second thread listens to the engine,
so that a cancel takes effect at once. The engine starts this process when an edit is about to come,
so a third thread imports torch at once. When the pipe closes, the process exits, whatever it is
doing: the model must not outlive its engine. The worker knows nothing about users' files, queues or
callers.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, cast

from step1x_edit.channel import (
    Cancel,
    Channel,
    Denoise,
    Done,
    EditJob,
    Failed,
    Job,
    Offload,
    Painted,
    Phase,
    Prepare,
    Progress,
    Report,
    Request,
    Residence,
    Start,
    UpscaleJob,
    connect,
)
from step1x_edit.engine import host_memory
from step1x_edit.errors import (
    EditCancelledError,
    InternalError,
    OutOfMemoryError,
    Step1XEditError,
)
from step1x_edit.logs import log_to_stderr
from step1x_edit.worker.libraries import import_libraries
from step1x_edit.worker.memory import free_memory, is_out_of_memory
from step1x_edit.worker.opening import (
    MeasureHost,
    MeasureRates,
    chosen_device,
    open_chosen,
    place_of,
    plan_for,
)

if TYPE_CHECKING:
    from step1x_edit.checkpoints.arena import Check
    from step1x_edit.worker.edits import PipelineWorker
    from step1x_edit.worker.partner import Partner

log = logging.getLogger(__name__)

MODULE: Final = "step1x_edit.worker.process"
"""This one, also when it runs as a program."""


def leave(error: Exception) -> None:
    """End the process."""
    log.error("the worker leaves", exc_info=error)
    os._exit(1)


def load_worker(
    start: Start,
    measure: MeasureHost = host_memory.measure,
    measure_rates: MeasureRates | None = None,
    end: Callable[[Exception], None] = leave,
    module: str = MODULE,
) -> PipelineWorker:
    """Prepare a worker for the model, which the first edit loads.

    `end` is called, from any thread, if one of several processes of an edit is lost. The others
    run `module`.
    """
    import_libraries()
    from step1x_edit.worker.edits import PipelineWorker
    from step1x_edit.worker.partners import Partners
    from step1x_edit.worker.products import Products
    from step1x_edit.worker.residency import Residency
    from step1x_edit.worker.upscaling import Upscaler

    device = chosen_device(start)
    if start.gpus_per_edit > 1 and (memory := measure()) is not None:
        start = replace(start, host_bytes=memory.available // start.gpus_per_edit)
    place = place_of(device)
    plan = partial(plan_for, place)
    residency = Residency(partial(open_chosen, start, measure, measure_rates), place, plan=plan)
    # Without a folder to keep what is measured, a seed would not give the same picture again.
    products = Products(Path(start.data_dir)) if start.data_dir else None
    upscaler = Upscaler(start.upscale_model, place)
    partners = Partners(start, device, end, module)
    return PipelineWorker(
        residency, device, products=products, partners=partners, upscaler=upscaler
    )


def load_partner(start: Start, end: Callable[[Exception], None]) -> Partner:
    """Prepare the partner of a worker; `end` as above."""
    import_libraries()
    from step1x_edit.worker.partner import Partner

    return Partner(start, end)


class Model(Protocol):
    """Makes the edits of a `WorkerLoop`; `PipelineWorker` is one."""

    def edit(self, job: Job, check: Check) -> Generator[Progress | Painted, None, None]: ...

    def offload(self) -> None: ...

    def residence(self) -> Residence: ...


class Helper(Protocol):
    """Makes the steps of edits in a partner's `WorkerLoop`; `Partner` is one."""

    def help(self, request: Prepare | Denoise, check: Check) -> None: ...

    def offload(self) -> None: ...

    def residence(self) -> Residence: ...


class WorkerLoop:
    """Handles the requests from the channel one by one and reports their results."""

    def __init__(
        self, channel: Channel, load: Callable[[Start], Model | Helper] = load_worker
    ) -> None:
        """`load` returns a `Helper` for a partner."""
        self._channel = channel
        self._load = load
        self._requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._cancelled = 0  # number of the last edit that was cancelled
        self._model: Model | Helper | None = None
        self._start = Start()

    def run(self) -> None:
        """Handle requests until the engine is gone."""
        try:
            first = self._channel.receive()
        except (EOFError, OSError):  # the engine ended as soon as it had started this process
            os._exit(0)
        if not isinstance(first, Start):
            raise TypeError(f"the first message must be a Start, not {first}")
        self._start = first
        log_to_stderr(first.log_level, first.log_format, "worker")
        threading.Thread(target=self._listen, name="requests", daemon=True).start()
        while True:
            match self._requests.get():
                case (EditJob() | UpscaleJob()) as job:
                    self._answer(lambda job=job: self._edit(job))  # type: ignore[misc]
                case Offload():
                    self._answer(self._offload)
                case Prepare() | Denoise() as request:
                    self._answer(lambda request=request: self._help(request))  # type: ignore[misc]

    def _listen(self) -> None:
        """Receive requests and cancels; the end of the pipe ends the process, busy or not."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                match self._channel.receive():
                    case Cancel(number):
                        self._cancelled = number
                    case (EditJob() | UpscaleJob() | Offload() | Prepare() | Denoise()) as request:
                        self._requests.put(request)
        os._exit(0)

    def _answer(self, work: Callable[[], None]) -> None:
        """Handle a request, and report the error if it fails."""
        try:
            work()
            return
        except Exception as error:  # noqa: BLE001 - the loop continues after any error
            failed = _explain(error)
        # The exception is gone now, and with it the tensors that its frames kept alive.
        free_memory()
        self._report(failed)
        _leave_if_device_is_broken()

    def _edit(self, job: Job) -> None:
        check = partial(self._check, job.number)
        check()
        if self._model is None:
            self._report(Progress(Phase.LOADING))
            self._model = self._load(self._start)
        last: Progress | Painted | None = None
        with contextlib.closing(cast("Model", self._model).edit(job, check)) as events:
            for last in events:
                if isinstance(last, Progress):
                    self._report(last)
                    check()
        if not isinstance(last, Painted):
            raise InternalError("the model ended without a picture")
        self._report(last)

    def _help(self, request: Prepare | Denoise) -> None:
        if self._model is None:
            self._model = self._load(self._start)
        cast("Helper", self._model).help(request, partial(self._check, request.number))
        self._report(Done())

    def _check(self, number: int) -> None:
        """Raise EditCancelledError if this request was cancelled."""
        if self._cancelled == number:
            raise EditCancelledError()

    def _offload(self) -> None:
        if self._model is not None:
            self._model.offload()
        self._report(Done())

    def _report(self, event: Progress | Painted | Failed | Done) -> None:
        residence = Residence() if self._model is None else self._model.residence()
        self._channel.send(Report(event, residence))


def _explain(error: Exception) -> Failed:
    """The error that the caller sees for an exception, which may not be one of ours."""
    explained: Step1XEditError
    if isinstance(error, Step1XEditError):
        explained = error
    elif isinstance(error, FloatingPointError):
        explained = InternalError(
            "the model produced values that are not numbers; try another seed or fewer steps"
        )
    elif is_out_of_memory(error):
        explained = OutOfMemoryError("the model does not fit into the memory that is free")
    else:
        log.error("an edit failed", exc_info=error)
        explained = InternalError("the edit failed unexpectedly; the server's log says more")
    return Failed(explained.code, str(explained))


def _leave_if_device_is_broken() -> None:
    """Exit if the CUDA context is unusable, as it is after some errors: it takes a new process."""
    if "torch" not in sys.modules:
        return
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            log.exception("the device is broken; the worker leaves")
            os._exit(1)


def _report_and_leave(channel: Channel, error: Exception) -> None:
    """End the process, and with it its edit."""
    failed = _explain(error)
    log.error("the worker leaves: %s", failed.sentence)
    with contextlib.suppress(OSError):
        channel.send(Report(failed, Residence()))
    os._exit(1)


def _import_early() -> None:
    """Import the libraries before the first edit comes; if that fails, the edit reports it."""
    with contextlib.suppress(Exception):
        import_libraries()


def main(module: str = MODULE) -> None:
    """Run the worker on the pipe whose handle is the first argument; `module` calls this."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine stops this process
    threading.Thread(target=_import_early, name="libraries", daemon=True).start()
    channel = Channel(connect(int(sys.argv[1])))
    end = partial(_report_and_leave, channel)

    def load(start: Start) -> Model | Helper:
        if start.rank:
            return load_partner(start, end)
        return load_worker(start, end=end, module=module)

    WorkerLoop(channel, load).run()


if __name__ == "__main__":
    main()
