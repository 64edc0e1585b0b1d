"""Edits in the worker: the model is loaded and moved as they need it, with less and less of it on
the device when memory runs out.

This module knows nothing of channels, processes or users' files.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from step1x_edit.channel import (
    GIGA,
    EditJob,
    Job,
    Painted,
    Phase,
    Progress,
    Residence,
    UpscaleJob,
)
from step1x_edit.checkpoints.arena import Check
from step1x_edit.checkpoints.memory_plan import Use
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
from step1x_edit.model.request import Mode, NetworkRequest, Pixels
from step1x_edit.schemas.plan import PlanStatus
from step1x_edit.worker.arithmetic import arithmetic_of, numerics_of
from step1x_edit.worker.memory import free_memory, is_out_of_memory, keepable_bytes
from step1x_edit.worker.partners import ALONE, Partners
from step1x_edit.worker.products import Products, kind_of
from step1x_edit.worker.reasoning import reasoned_edit
from step1x_edit.worker.residency import Residency
from step1x_edit.worker.upscaling import TILES, Upscaler

log = logging.getLogger(__name__)

# Labels of a recogniser that are not edits: unknown wording, and the empty prompt.
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
"""Words for the labels that are not clear as they are."""

T = TypeVar("T")
E = TypeVar("E")


class PipelineWorker:
    """Makes edits with the model of a `Residency`, which it loads and moves when necessary."""

    def __init__(
        self,
        residency: Residency,
        device: str,
        sampling: Sampling | None = None,
        products: Products | None = None,
        partners: Partners = ALONE,
        upscaler: Upscaler | None = None,
    ) -> None:
        """`sampling` is how replies of a model that thinks are drawn; None: as published.

        Without `products` all modes compute with the weights as they are, and without `upscaler`
        no picture is enlarged.
        """
        self._residency = residency
        self._device = device
        self._sampling = sampling or Sampling()
        self._products = products
        self._partners = partners
        self._upscaler = upscaler or Upscaler(None, None)
        self._mode: Mode = "exact"  # of the last edit

    def edit(self, job: Job, check: Check) -> Generator[Progress | Painted, None, None]:
        """Yield progress and finally the picture; closing the iterator stops the work."""
        self._residency.begin_edit()
        if isinstance(job, UpscaleJob):
            yield from self._enlarge(job, check)
            return
        if job.upscale > 1:  # refused before the edit, not after it
            self._upscaler.check(job.upscale)
        self._mode = job.mode
        running = _RunningEdit(
            self._residency, job, check, self._sampling, self._products, self._partners
        )
        yield from running.run()

    def _enlarge(self, job: UpscaleJob, check: Check) -> Generator[Progress | Painted, None, None]:
        """Enlarge a picture; when memory runs out, in smaller tiles and without the model."""
        for tile in TILES:
            try:
                yield from self._upscaler.enlarge(job.image, job.upscale, tile, check)
                return
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                log.warning("out of memory in tiles of %d pixels", tile)
            self._residency.offload()
            free_memory()  # not above: while an exception is handled, its frames hold tensors
        raise OutOfMemoryError(f"enlarging needs more than is free; try {job.quicker}")

    def offload(self) -> None:
        """Move the model to host memory; does nothing if it is there already."""
        self._residency.offload()
        self._partners.offload()

    def residence(self) -> Residence:
        """The model, its location and the memory that it occupies, as measured."""
        checkpoint = self._residency.checkpoint
        if checkpoint is None:
            return Residence(memory=self._residency.memory())
        return Residence(
            location=self._residency.location,
            model=checkpoint.name,
            device=self._device,
            arithmetic=self._arithmetic(checkpoint),
            numerics=numerics_of(self._device, self._partners.size),
            memory=self._residency.memory(),
            version=checkpoint.version,
            size_multiple=checkpoint.pipeline.config.size_multiple,
            placement=self._placement(),
            loras=self._residency.loras,
            others=self._partners.memories,
        )

    def _placement(self) -> PlanStatus | None:
        """How the model is placed: the upscaler's weights are in host memory too, and two branches
        of processes run the prompts apart.
        """
        found = self._residency.placement()
        if found is None:
            return None
        if self._partners.size % 2 == 0:
            found = replace(found, joint_branches=False)
        if found.host_gb is None:
            return found
        return replace(found, host_gb=found.host_gb + self._upscaler.size / GIGA)

    def _arithmetic(self, checkpoint: Checkpoint) -> str | None:
        """What the last edit was computed with, as far as it has a name."""
        pipeline, parts = checkpoint.pipeline, []
        if self._device == "cpu":
            parts.append(arithmetic_of(pipeline.transformer.img_in.weight.dtype))
        if self._mode != "exact" and pipeline.coded is not None:
            parts.append(f"{kind_of(pipeline.coded)} products")
        return ", ".join(parts) or None


@dataclass(frozen=True)
class _RunningEdit:
    """One edit, which takes the model where it computes whenever it needs it.

    When memory runs out, it continues from where it is with a cheaper plan, and then with less
    and less of the model on the device.
    """

    residency: Residency
    job: EditJob
    check: Check
    sampling: Sampling
    products: Products | None
    partners: Partners

    def run(self) -> Generator[Progress | Painted, None, None]:
        """Yield progress and finally the picture."""
        job = self.job
        if job.image is None or not (job.thinking or job.reflection):
            return self._edit(job)
        return self._reason()

    def _edit(self, request: NetworkRequest) -> Generator[Progress | Painted, None, None]:
        """One picture."""
        run = EditRun(request)

        def advance(
            checkpoint: Checkpoint, plan: Plan
        ) -> Generator[Progress | Painted, None, None]:
            # Closed together with this iterator, which then stops the network at once.
            with contextlib.closing(checkpoint.pipeline.advance(run, plan)) as events:
                for event in events:
                    if isinstance(event, Edited):
                        yield Painted(
                            event.image,
                            _warning(event, checkpoint, request),
                            evaluations=event.evaluations,
                        )
                    else:
                        yield Progress(
                            Phase(event.phase),
                            event.step,
                            event.total,
                            event.preview,
                            is_known=run.label != UNKNOWN,
                            evaluated=event.evaluated,
                            to_evaluate=event.to_evaluate,
                        )

        yield from self._with_model(advance)

    def _reason(self) -> Generator[Progress | Painted, None, None]:
        """One picture or several rounds, with reasoning before and after."""

        def chat_model(
            checkpoint: Checkpoint, _: Plan
        ) -> Generator[Progress, None, tuple[ReasoningConfig, ChatModel]]:
            yield from ()
            config = checkpoint.pipeline.config.reasoning
            assert config is not None  # else the model was not accepted
            conditioner = checkpoint.pipeline.conditioner
            head = conditioner.vlm.get_submodule("lm_head")
            sampling, seed = self.sampling, self.job.seed
            return config, ChatModel(
                conditioner.vlm, head, conditioner.tokenizer, sampling=sampling, seed=seed
            )

        def say(images: Sequence[Pixels], prompt: Prompt) -> Generator[Progress | Said, None, str]:
            before = chat.rng.get_state()

            def reply(_: Checkpoint, __: Plan) -> Generator[Said, None, str]:
                chat.rng.set_state(before)  # also if memory ran out during an earlier attempt
                return (yield from chat.reply(images, prompt))

            return (yield from self._with_model(reply, "reply"))

        config, chat = yield from self._with_model(chat_model, "reply")
        yield from reasoned_edit(self.job, config, self._edit, say)

    def _with_model(
        self, work: Callable[[Checkpoint, Plan], Generator[E, None, T]], use: Use = "edit"
    ) -> Generator[E | Progress, None, T]:
        """Work with the model where it computes; when memory runs out, try the next plan."""
        for plan in self._plans():
            try:
                return (yield from self._attempt(work, plan, use))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                log.warning("out of memory with %s", plan)
            free_memory()  # not above: while an exception is handled, its frames hold tensors
        raise OutOfMemoryError(f"this edit needs more than is free; try {self.job.smaller}")

    def _plans(self) -> Iterator[Plan]:
        """The plans to try, each if memory ran out with the one before.

        What is kept of earlier edits goes first, and layers in codes: an exact result must not
        depend on it.
        """
        yield PLANS[0]
        if (checkpoint := self.residency.checkpoint) is not None:
            had_codes = self.products is not None and self.products.drop(checkpoint.pipeline)
            if checkpoint.pipeline.forget() or had_codes:
                yield PLANS[0]
        yield from PLANS[1:]
        while self.residency.shrink():
            log.warning("keeping less of the model on the device")
            yield PLANS[-1]

    def _attempt(
        self, work: Callable[[Checkpoint, Plan], Generator[E, None, T]], plan: Plan, use: Use
    ) -> Generator[E | Progress, None, T]:
        loras = self.job.loras
        if not (self.residency.is_ready(loras, use) and self.partners.are_ready(loras)):
            yield Progress(Phase.LOADING)
            yield from self._make_ready(use)
        is_fastest, placed = plan is PLANS[0], self.residency.plan
        if placed is not None and not placed.has_joint_branches:
            plan = replace(plan, has_joint_branches=False)
        if placed is not None and not placed.is_streaming:
            plan = replace(plan, keeps_prologues=False)
        with self.residency.on_device() as checkpoint, self._stoppable(checkpoint):
            self._accept(checkpoint)
            if is_fastest and self.job.mode != "exact":
                device = checkpoint.pipeline.transformer.img_in.weight.device
                if self.products and self.residency.is_whole:
                    room = keepable_bytes(device, placed)
                    for _ in self.products.making(checkpoint.pipeline, room, self.check):
                        yield Progress(Phase.LOADING)
                plan = replace(plan, keepable=keepable_bytes(device, placed))
            with self.partners.leading(checkpoint.pipeline):
                return (yield from work(checkpoint, plan))

    def _make_ready(self, use: Use) -> Iterator[Progress]:
        """Load the model with the LoRAs of the job, and move it to where it computes."""
        if self.residency.checkpoint is None:
            self.partners.forget()
        try:
            self.residency.use_loras(self.job.loras, self.check)
            for done, total in self.residency.loading(self.check, self._accept, use):
                yield Progress(Phase.LOADING, done, total)
        except (Step1XEditError, MemoryError):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            log.exception("loading the model failed")
            raise ModelUnavailableError("the model cannot be loaded; the log says why") from None
        self.residency.onload(self.check)
        for _ in self.partners.preparing(self.job.loras, self.residency.precision):
            yield Progress(Phase.LOADING)

    @contextlib.contextmanager
    def _stoppable(self, checkpoint: Checkpoint) -> Iterator[None]:
        """Let a cancel also end encoding and decoding; the core loop yields after each step."""

        def before_layer(*_: object) -> None:
            self.check()

        pipeline = checkpoint.pipeline
        with contextlib.ExitStack() as hooks:
            for part in (pipeline.vae, pipeline.conditioner.vlm):
                for module in part.modules():
                    # First of all: a layer that is not run needs no weights.
                    handle = module.register_forward_pre_hook(before_layer, prepend=True)
                    hooks.callback(handle.remove)
            yield

    def _accept(self, checkpoint: Checkpoint) -> None:
        """Refuse what this version of the model cannot do."""
        config = checkpoint.pipeline.config
        if self.job.image is None and not config.can_generate:
            raise InvalidParameterError(
                f"text to image needs Step1X-Edit v1.1; the model here is {checkpoint.name}"
            )
        for asked in ("thinking", "reflection"):
            if getattr(self.job, asked) and config.reasoning is None:
                raise InvalidParameterError(
                    f"{asked} needs Step1X-Edit v1.2; the model here is {checkpoint.name}",
                    param=asked,
                )
        if self.job.mode != "exact":
            try:
                checkpoint.pipeline.check_mode(self.job)
            except ValueError as error:
                raise InvalidParameterError(str(error), param="mode") from None


def _warning(edited: Edited, checkpoint: Checkpoint, request: NetworkRequest) -> str | None:
    """What the caller should know about how the prompt was read and how the picture was made."""
    found = (
        _cut(edited, checkpoint),
        _unknown(edited, checkpoint),
        _unmeasured(checkpoint, request),
    )
    return "; ".join(filter(None, found)) or None


def _cut(edited: Edited, checkpoint: Checkpoint) -> str | None:
    if not edited.cut:
        return None
    limit = checkpoint.pipeline.conditioner.config.text_length
    return (
        f"the end of the {' and of the '.join(edited.cut)} was cut: this checkpoint reads at most "
        f"{limit} tokens of picture and prompt"
    )


def _unmeasured(checkpoint: Checkpoint, request: NetworkRequest) -> str | None:
    profile = checkpoint.pipeline.profile
    return None if request.mode == "exact" or profile is None else profile.caveat


def _unknown(edited: Edited, checkpoint: Checkpoint) -> str | None:
    """The warning of a small checkpoint that recognises no edit that it has learned."""
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
