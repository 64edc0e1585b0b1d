"""The worker: owner of the model, and the words that the engine and it exchange.

`EditJob` goes in; `Progress` and at last an `Outcome` come out. All of it is plain data, so that
it can cross a process border. Torch is imported when the model is loaded and not before: whoever
only waits for answers need not pay for it. The worker knows nothing about files, queues or callers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import numpy.typing as npt

from step1x_edit.errors import CheckpointError
from step1x_edit.schemas import Location

if TYPE_CHECKING:
    from step1x_edit.checkpoints.read import Checkpoint
    from step1x_edit.model.pipeline import Edited

GIB: Final = 1024**3

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

Pixels = npt.NDArray[np.uint8]  # (H, W, 3), upright RGB


class Phase(str, Enum):
    """What is being done for an edit, in order."""

    QUEUED = "queued"
    LOADING = "loading"
    ENCODING = "encoding"
    DENOISING = "denoising"
    DECODING = "decoding"
    SAVING = "saving"


@dataclass(frozen=True)
class Progress:
    """How far an edit has come: step `step` of `total` in its phase; in the queue, its position."""

    phase: Phase
    step: int = 0
    total: int = 0

    @property
    def text(self) -> str:
        """The same in words: "queued, position 2", "denoising 7/28"."""
        match self.phase:
            case Phase.QUEUED:
                return f"queued, position {self.step}"
            case Phase.LOADING:
                return "loading model"
            case Phase.DENOISING:
                return f"denoising {self.step}/{self.total}"
        return str(self.phase.value)


@dataclass(frozen=True)
class EditJob:
    """All the model needs to know of an edit."""

    image: Pixels
    prompt: str
    negative_prompt: str
    num_steps: int
    guidance_scale: float
    size_level: int
    seed: int


@dataclass(frozen=True)
class ModelInfo:
    """Which model is loaded, and where."""

    name: str
    device: str
    location: Location


@dataclass(frozen=True)
class Outcome:
    """The edited picture, in its working size, and who edited it."""

    image: Pixels
    model: ModelInfo
    warning: str | None = None
    """Set if the model does not know such an edit or did not read all of its prompt."""


@dataclass(frozen=True)
class Memory:
    """Device memory that the process holds, as the allocator reports it."""

    allocated_gb: float = 0.0
    reserved_gb: float = 0.0


class Worker(Protocol):
    """Who has a model and edits with it."""

    @property
    def info(self) -> ModelInfo: ...

    def edit(self, job: EditJob) -> Generator[Progress | Outcome, None, None]:
        """Yield progress and, last, the outcome; closing the iterator stops the work."""
        ...

    def memory(self) -> Memory: ...


class PipelineWorker:
    """A worker with a loaded checkpoint."""

    def __init__(self, checkpoint: Checkpoint, device: str) -> None:
        self._pipeline = checkpoint.pipeline
        self.info = ModelInfo(
            name=checkpoint.name,
            device=device,
            location="CPU" if device == "cpu" else "GPU",
        )

    def edit(self, job: EditJob) -> Generator[Progress | Outcome, None, None]:
        """Run one edit, in our words."""
        from step1x_edit.model.pipeline import Edited, EditRequest

        request = EditRequest(
            image=job.image,
            prompt=job.prompt,
            negative_prompt=job.negative_prompt,
            num_steps=job.num_steps,
            guidance_scale=job.guidance_scale,
            size_level=job.size_level,
            seed=job.seed,
        )
        # Closed with us, so that whoever drops this iterator stops the network at once.
        with contextlib.closing(self._pipeline.edit(request)) as events:
            for event in events:
                if isinstance(event, Edited):
                    yield Outcome(event.image, self.info, self._warning(event))
                else:
                    yield Progress(Phase(event.phase), event.step, event.total)

    def memory(self) -> Memory:
        """Ask the allocator; all zero where there is no GPU."""
        import torch

        if self.info.location != "GPU":
            return Memory()
        return Memory(
            allocated_gb=torch.cuda.memory_allocated(self.info.device) / GIB,
            reserved_gb=torch.cuda.memory_reserved(self.info.device) / GIB,
        )

    def _warning(self, edited: Edited) -> str | None:
        """What the caller should know about how the prompt was understood."""
        found = (self._cut(edited.is_prompt_cut), self._unknown(edited.label))
        return "; ".join(filter(None, found)) or None

    def _cut(self, is_prompt_cut: bool) -> str | None:
        if not is_prompt_cut:
            return None
        limit = self._pipeline.conditioner.config.text_length
        return (
            "the end of the prompt was cut: this checkpoint reads at most "
            f"{limit} tokens of picture and prompt"
        )

    def _unknown(self, label: str | None) -> str | None:
        """What to say if a small checkpoint recognised no edit that it has learned."""
        recogniser = self._pipeline.recogniser
        if label != UNKNOWN or recogniser is None:
            return None
        labels = [label for label in recogniser.labels if label not in (UNKNOWN, UNCHANGED)]
        known = ", ".join(_SPOKEN.get(label, label) for label in labels)
        return (
            f"the {self.info.name} checkpoint does not know this edit and will have left the "
            f"picture nearly as it was; it knows: {known}. For the real model set MODEL_PATH to a "
            "Step1X-Edit checkpoint"
        )


def load_worker(
    model_path: Path | None, model_version: str = "auto", device: str = "auto"
) -> Worker:
    """Load a checkpoint, the embedded one if there is no path, onto a device ("auto": the best).

    Raises CheckpointError if there is none, or one of another version than the one asked for.
    """
    import diffusers
    import torch
    import transformers

    from step1x_edit.checkpoints.read import read_checkpoint

    # Bars of ours tell the progress; theirs would fill the log of a server.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    version = None if model_version == "auto" else model_version
    checkpoint = read_checkpoint(model_path, device=device, version=version)
    if model_version not in ("auto", checkpoint.version):
        raise CheckpointError(
            f"MODEL_VERSION is {model_version}, but the checkpoint is {checkpoint.version}"
        )
    return PipelineWorker(checkpoint, device)
