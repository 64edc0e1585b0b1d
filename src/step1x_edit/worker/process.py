"""The worker: the child process that owns torch, the model and the device.

It does one thing at a time on its main thread, while a second thread listens to the engine, so that
a cancel is heard at once. Torch is imported for the first edit and not before. When the pipe ends
the process leaves, whatever it is doing: the model must not outlive its engine. The worker knows
nothing about files of users, queues or callers.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import itertools
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from step1x_edit.channel import (
    Cancel,
    Channel,
    Done,
    EditJob,
    Failure,
    Offload,
    Outcome,
    Phase,
    Progress,
    Report,
    Residence,
    Start,
    connect,
)
from step1x_edit.engine import host_memory
from step1x_edit.errors import (
    EditCancelledError,
    InternalError,
    InvalidParameterError,
    ModelUnavailableError,
    OutOfMemoryError,
    Step1XEditError,
)
from step1x_edit.logs import log_to_stderr
from step1x_edit.worker.opening import (
    Look,
    chosen_device,
    import_libraries,
    open_chosen,
    place_of,
    plan_for,
)

if TYPE_CHECKING:
    from step1x_edit.checkpoints.read import Checkpoint
    from step1x_edit.model.config import ReasoningConfig
    from step1x_edit.model.language_model import ChatModel, Said, Sampling
    from step1x_edit.model.pipeline import Edited, Plan
    from step1x_edit.model.reasoning import Prompt
    from step1x_edit.model.request import NetworkRequest, Pixels
    from step1x_edit.schemas.requests import Location
    from step1x_edit.worker.residency import Residency

log = logging.getLogger(__name__)

# Labels of a recogniser that are not edits: wording it has not learned, and the empty prompt.
UNKNOWN: Final = "unknown"
UNCHANGED: Final = "identity"
_SPOKEN: Final = {
    "bw": "black and white",
    "bright": "brighter",
    "dark": "darker",
    "warm": "sunset",
    "cool": "winter",
    "contrast": "more contrast",
    "swap": "swap red and blue",
    "sketch": "pencil sketch",
    **{colour: f"{colour} tint" for colour in ("red", "green", "blue", "pink", "purple")},
}
"""Labels that would not be understood as they are."""

T = TypeVar("T")
Event = TypeVar("Event")

Check = Callable[[], None]
"""Called between small pieces of work; raises what is to end the work."""


class PipelineWorker:
    """Edits with the model of a `Residency`, which it loads and moves as edits need it."""

    def __init__(self, residency: Residency, device: str, sampling: Sampling | None = None) -> None:
        """`sampling` is how replies of a model that thinks are drawn; else as published."""
        self._residency = residency
        self._sampling = sampling
        self._device = device
        self._workplace: Location = "CPU" if device == "cpu" else "GPU"
        self._check: Check = _go_on
        self._accept: Callable[[Checkpoint], None] = lambda checkpoint: None
        self._smaller = ""

    def edit(self, job: EditJob, check: Check) -> Generator[Progress | Outcome, None, None]:
        """Yield progress and, last, the outcome; closing the iterator stops the work.

        When memory runs out, the edit goes on from where it is with the cheaper plan, and then
        with less and less of the model on the device.
        """
        self._check, self._accept, self._smaller = check, partial(_check_able, job), job.smaller
        self._residency.begin_edit()
        if job.image is not None and (job.thinking or job.reflection):
            yield from self._reason(job)
        else:
            yield from self._edit(job)

    def offload(self) -> None:
        """Take the model to host memory; does nothing if it is there already."""
        self._residency.offload()

    def residence(self) -> Residence:
        """Which model there is, where it is and what it occupies, as measured."""
        checkpoint = self._residency.checkpoint
        if checkpoint is None:
            return Residence(memory=self._residency.memory())
        return Residence(
            location=self._residency.location,
            model=checkpoint.name,
            device=self._device,
            memory=self._residency.memory(),
            version=checkpoint.version,
            size_multiple=checkpoint.pipeline.config.size_multiple,
            placement=self._residency.placement(),
            loras=self._residency.loras,
        )

    def _smaller_plans(self) -> Iterator[Plan]:
        from step1x_edit.model.pipeline import PLANS

        while self._residency.shrink():
            log.warning("keeping less of the model on the device")
            yield PLANS[-1]

    def _edit(self, request: NetworkRequest) -> Generator[Progress | Outcome, None, None]:
        """One edit."""
        from step1x_edit.model.pipeline import Edited, EditRun

        run = EditRun(request)

        def advance(
            checkpoint: Checkpoint, plan: Plan
        ) -> Generator[Progress | Outcome, None, None]:
            # Closed with us, so that whoever drops this iterator stops the network at once.
            with contextlib.closing(checkpoint.pipeline.advance(run, plan)) as events:
                for event in events:
                    if isinstance(event, Edited):
                        yield Outcome(event.image, _warning(event, checkpoint))
                    else:
                        yield Progress(
                            Phase(event.phase),
                            event.step,
                            event.total,
                            event.preview,
                            is_known=run.label != UNKNOWN,
                        )

        yield from self._persistently(advance, request.loras)

    def _reason(self, request: NetworkRequest) -> Generator[Progress | Outcome, None, None]:
        """An edit, or several, with thoughts before and after."""
        from step1x_edit.model.language_model import ChatModel, Sampling
        from step1x_edit.worker.reasoning import reasoned_edit

        def meet(
            checkpoint: Checkpoint, _: Plan
        ) -> Generator[Progress, None, tuple[ReasoningConfig, ChatModel]]:
            yield from ()  # it is quick
            pipeline = checkpoint.pipeline
            config = pipeline.config.reasoning
            assert config is not None  # else it was not accepted
            vlm, tokenizer = pipeline.conditioner.vlm, pipeline.conditioner.tokenizer
            head = vlm.get_submodule("lm_head")
            sampling = self._sampling or Sampling()
            return config, ChatModel(vlm, head, tokenizer, sampling=sampling, seed=request.seed)

        def say(images: Sequence[Pixels], prompt: Prompt) -> Generator[Progress | Said, None, str]:
            before = chat.rng.get_state()

            def reply(_: Checkpoint, __: Plan) -> Generator[Said, None, str]:
                chat.rng.set_state(before)  # also when memory has run out on the way
                return (yield from chat.reply(images, prompt))

            return (yield from self._persistently(reply, request.loras))

        config, chat = yield from self._persistently(meet, request.loras)
        yield from reasoned_edit(request, config, self._edit, say)

    def _persistently(
        self,
        work: Callable[[Checkpoint, Plan], Generator[Event, None, T]],
        loras: Mapping[str, float] | None,
    ) -> Generator[Event | Progress, None, T]:
        """Work with the model where it computes; when memory runs out, with less and less of it."""
        from step1x_edit.model.pipeline import PLANS

        for plan in itertools.chain(PLANS, self._smaller_plans()):
            try:
                return (yield from self._attempt(work, plan, loras))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                log.warning("out of memory with %s", plan)
            free_memory()  # only here: while an exception is handled its frames keep tensors alive
        raise OutOfMemoryError(f"this edit needs more than is free; try {self._smaller}")

    def _attempt(
        self,
        work: Callable[[Checkpoint, Plan], Generator[Event, None, T]],
        plan: Plan,
        loras: Mapping[str, float] | None,
    ) -> Generator[Event | Progress, None, T]:
        is_there = self._residency.location == self._workplace
        if not is_there or not self._residency.has_loras(loras):
            yield Progress(Phase.LOADING)
            self._bring(loras)
        placed = self._residency.plan
        if placed is not None and not placed.has_joint_branches:
            plan = replace(plan, has_joint_branches=False)
        with self._residency.on_device() as checkpoint:
            self._accept(checkpoint)
            return (yield from work(checkpoint, plan))

    def _bring(self, loras: Mapping[str, float] | None) -> None:
        """Have the model where it computes, with these LoRAs in it."""
        is_new = self._residency.location == "Unloaded"
        try:
            self._residency.use_loras(loras, self._check)
            self._residency.load(self._check, self._accept)
        except (Step1XEditError, MemoryError):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            log.exception("loading the model failed")
            raise ModelUnavailableError(f"the model cannot be loaded ({error})") from None
        if is_new:
            self._stop_between_layers()
        self._residency.onload(self._check)

    def _stop_between_layers(self) -> None:
        """Let a cancel end encoding and decoding too; the core loop yields after each step."""
        assert self._residency.checkpoint is not None
        pipeline = self._residency.checkpoint.pipeline

        def before_layer(*_: object) -> None:
            self._check()

        for part in (pipeline.vae, pipeline.conditioner.vlm):
            for module in part.modules():
                module.register_forward_pre_hook(before_layer)


def _check_able(job: EditJob, checkpoint: Checkpoint) -> None:
    """Refuse what this version of the model cannot do."""
    config = checkpoint.pipeline.config
    if job.image is None and not config.can_generate:
        raise InvalidParameterError(
            f"text to image needs Step1X-Edit v1.1; the model here is {checkpoint.name}"
        )
    for asked in ("thinking", "reflection"):
        if getattr(job, asked) and config.reasoning is None:
            raise InvalidParameterError(
                f"{asked} needs Step1X-Edit v1.2; the model here is {checkpoint.name}", param=asked
            )


def _warning(edited: Edited, checkpoint: Checkpoint) -> str | None:
    """What the caller should know about how the prompt was understood."""
    found = (_cut(edited, checkpoint), _unknown(edited, checkpoint))
    return "; ".join(filter(None, found)) or None


def _cut(edited: Edited, checkpoint: Checkpoint) -> str | None:
    if not edited.cut:
        return None
    limit = checkpoint.pipeline.conditioner.config.text_length
    return (
        f"the end of the {' and of the '.join(edited.cut)} was cut: this checkpoint reads at most "
        f"{limit} tokens of picture and prompt"
    )


def _unknown(edited: Edited, checkpoint: Checkpoint) -> str | None:
    """What to say if a small checkpoint recognised no edit that it has learned."""
    recogniser = checkpoint.pipeline.recogniser
    if edited.label != UNKNOWN or recogniser is None:
        return None
    labels = [label for label in recogniser.labels if label not in (UNKNOWN, UNCHANGED)]
    known = ", ".join(_SPOKEN.get(label, label) for label in labels)
    return (
        f"the {checkpoint.name} checkpoint does not know this edit and will have left the "
        f"picture nearly as it was; it knows: {known}. For the real model set MODEL_PATH to a "
        "Step1X-Edit checkpoint"
    )


def load_worker(start: Start, look: Look = host_memory.look) -> PipelineWorker:
    """Prepare a worker; its model is read by the first edit. `look` tells of the host's memory."""
    import_libraries()
    from step1x_edit.worker.residency import Residency

    device = chosen_device(start)
    place = place_of(device)
    plan = partial(plan_for, place)
    residency = Residency(partial(open_chosen, start, look), place, plan=plan)
    return PipelineWorker(residency, device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on the device."""
    return (
        isinstance(error, MemoryError)
        or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
        or "DefaultCPUAllocator" in str(error)  # torch raises a plain RuntimeError for host memory
    )


def free_memory() -> None:
    """Give back what nothing refers to."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        torch.cuda.empty_cache()  # does nothing without CUDA


def _go_on() -> None:
    """A check that finds no reason to stop."""


# --- the process ---------------------------------------------------------------------------------


class Model(Protocol):
    """What the loop below has edits made with; `PipelineWorker` is one."""

    def edit(self, job: EditJob, check: Check) -> Generator[Progress | Outcome, None, None]: ...

    def offload(self) -> None: ...

    def residence(self) -> Residence: ...


class WorkerLoop:
    """Takes requests from the channel one by one and reports what comes of them."""

    def __init__(self, channel: Channel, load: Callable[[Start], Model] = load_worker) -> None:
        self._channel = channel
        self._load = load
        self._requests: queue.SimpleQueue[EditJob | Offload] = queue.SimpleQueue()
        self._cancelled = 0  # the number of the edit that was cancelled last
        self._model: Model | None = None
        self._start = Start()

    def run(self) -> None:
        """Work until the engine is gone."""
        first = self._channel.receive()
        if not isinstance(first, Start):
            raise TypeError(f"the first message must be a Start, not {first}")
        self._start = first
        log_to_stderr(first.log_level, first.log_format, "worker")
        threading.Thread(target=self._listen, name="requests", daemon=True).start()
        while True:
            match self._requests.get():
                case EditJob() as job:
                    self._answer(lambda job=job: self._edit(job))  # type: ignore[misc]
                case Offload():
                    self._answer(self._offload)

    def _listen(self) -> None:
        """Hear requests and cancels; the end of the pipe ends the process, busy as it may be."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                match self._channel.receive():
                    case Cancel(number):
                        self._cancelled = number
                    case EditJob() | Offload() as request:
                        self._requests.put(request)
        os._exit(0)

    def _answer(self, work: Callable[[], None]) -> None:
        """Do something, and report the failure if it fails."""
        try:
            work()
            return
        except Step1XEditError as error:
            failure = Failure(error.code, str(error))
        except Exception as error:  # noqa: BLE001 - the worker's loop goes on whatever happens
            failure = _explain(error)
        # The exception is gone by now, and with it what its frames kept alive.
        free_memory()
        self._report(failure)
        _leave_if_device_is_broken()

    def _edit(self, job: EditJob) -> None:
        def check() -> None:
            if self._cancelled == job.number:
                raise EditCancelledError()

        check()
        if self._model is None:
            self._report(Progress(Phase.LOADING))
            self._model = self._load(self._start)
        last: Progress | Outcome | None = None
        with contextlib.closing(self._model.edit(job, check)) as events:
            for last in events:
                if isinstance(last, Progress):
                    self._report(last)
                    check()
        if not isinstance(last, Outcome):
            raise InternalError("the model ended without a picture")
        self._report(last)

    def _offload(self) -> None:
        if self._model is not None:
            self._model.offload()
        self._report(Done())

    def _report(self, event: Progress | Outcome | Failure | Done) -> None:
        residence = Residence() if self._model is None else self._model.residence()
        self._channel.send(Report(event, residence))


def _explain(error: Exception) -> Failure:
    """What the caller is told of an exception that nobody has foreseen, or nearly nobody."""
    told: Step1XEditError
    if isinstance(error, FloatingPointError):
        told = InternalError(
            "the model produced values that are not numbers; try another seed or fewer steps"
        )
    elif is_out_of_memory(error):
        told = OutOfMemoryError("the model does not fit into the memory that is free")
    else:
        log.error("an edit failed", exc_info=error)
        told = InternalError("the edit failed unexpectedly; the server's log says more")
    return Failure(told.code, str(told))


def _leave_if_device_is_broken() -> None:
    """After some errors a CUDA context answers nothing any more; only a new process helps."""
    if "torch" not in sys.modules:
        return
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            log.exception("the device is broken; the worker leaves")
            os._exit(1)


def main() -> None:
    """Run the worker on the pipe whose handle stands in the arguments."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the engine that stops us
    WorkerLoop(Channel(connect(int(sys.argv[1])))).run()


if __name__ == "__main__":
    main()
