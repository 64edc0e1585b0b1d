"""Edits in the worker: the model is loaded and moved as they need it, with less and less of it on
the device when memory runs out.

This module knows nothing of channels, processes or users' files.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from step1x_edit.channel import EditJob, Outcome, Phase, Progress, Residence
from step1x_edit.checkpoints.arena import Check, never_stop
from step1x_edit.checkpoints.read import Checkpoint
from step1x_edit.errors import (
    InvalidParameterError,
    ModelUnavailableError,
    OutOfMemoryError,
    Step1XEditError,
)
from step1x_edit.model.config import ReasoningConfig
from step1x_edit.model.language_model import ChatModel, Said, Sampling
from step1x_edit.model.pipeline import PLANS, Edited, EditRun, Plan
from step1x_edit.model.reasoning import Prompt
from step1x_edit.model.request import NetworkRequest, Pixels
from step1x_edit.worker.memory import free_memory, is_out_of_memory
from step1x_edit.worker.reasoning import reasoned_edit
from step1x_edit.worker.residency import Residency

if TYPE_CHECKING:
    from step1x_edit.schemas.requests import Location

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


class PipelineWorker:
    """Edits with the model of a `Residency`, which it loads and moves as edits need it."""

    def __init__(self, residency: Residency, device: str, sampling: Sampling | None = None) -> None:
        """`sampling` is how replies of a model that thinks are drawn; else as published."""
        self._residency = residency
        self._sampling = sampling
        self._device = device
        self._workplace: Location = "CPU" if device == "cpu" else "GPU"
        self._check: Check = never_stop
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
        while self._residency.shrink():
            log.warning("keeping less of the model on the device")
            yield PLANS[-1]

    def _edit(self, request: NetworkRequest) -> Generator[Progress | Outcome, None, None]:
        """One edit."""
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
