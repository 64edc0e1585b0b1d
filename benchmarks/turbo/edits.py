"""Edits of the demo by mode and number of steps, with their time, kept as files."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bench_demo import PROMPTS, fitted
from demo_data import HELD_OUT_PHOTOS, load_photo
from step1x_edit.checkpoints.read import Wanted, read_checkpoint
from step1x_edit.model.pipeline import Edited, EditPipeline, EditRun, Plan, Step
from step1x_edit.model.request import Mask, Mode, NetworkRequest, Pixels

ROOM = 2**30
"""Bytes for the keys and values of region steps."""
MODES: tuple[Mode, ...] = get_args(Mode)
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Way:
    """How an edit is made; `exact@14` is the naive way to save half of 28 steps."""

    mode: Mode
    steps: int

    def __str__(self) -> str:
        return f"{self.mode}@{self.steps}"


@dataclass(frozen=True)
class Figures:
    """What an edit took."""

    loop_s: float
    """CPU seconds from the end of encoding to the beginning of decoding."""
    evaluations: int
    """How often the transformer ran, once for each prompt of a step."""
    skipped: int
    edit_s: float
    """CPU seconds of the whole edit."""


@dataclass(frozen=True)
class Demo:
    """The demo checkpoint with one arithmetic, and pictures of one size."""

    arithmetic: str
    size: int
    folder: Path
    """Where pictures are kept. They belong to one build; those that are exact, to every build."""

    @cached_property
    def pipeline(self) -> EditPipeline:
        dtype = TYPES[self.arithmetic]
        return read_checkpoint(wanted=Wanted(dtype=dtype, vae_dtype=dtype)).pipeline

    def photo(self, name: str) -> Pixels:
        """A photograph that the demo was never trained on, at the working size."""
        return fitted(load_photo(*HELD_OUT_PHOTOS[name]), self.pipeline, self.size)

    def request(self, photo: str, edit: str, way: Way, mask: Mask | None = None) -> NetworkRequest:
        return NetworkRequest(
            self.photo(photo),
            PROMPTS[edit],
            num_steps=way.steps,
            size_level=self.size,
            mode=way.mode,
            mask=mask,
        )

    def kept(self, photo: str, edit: str, way: Way) -> tuple[Pixels, Figures]:
        """The picture of such an edit from its file, or made now."""
        file = self.folder / f"{photo}-{edit}-{way}-{self.size}-{self.arithmetic}.png"
        if not file.exists():
            picture, figures = timed(self.pipeline, self.request(photo, edit, way))
            notes = PngInfo()
            notes.add_text("figures", json.dumps(asdict(figures)))
            self.folder.mkdir(parents=True, exist_ok=True)
            whole = file.with_suffix(".part")
            Image.fromarray(picture).save(whole, "PNG", pnginfo=notes)
            whole.rename(file)  # a run that is stopped leaves no half picture
        with Image.open(file) as image:
            return np.asarray(image), Figures(**json.loads(image.info["figures"]))


def timed(pipeline: EditPipeline, request: NetworkRequest) -> tuple[Pixels, Figures]:
    """Run an edit; the time of the loop includes what is prepared for all steps."""
    clock = time.process_time
    started = clock()
    with torch.inference_mode():
        run = EditRun(request, encoded=pipeline.encode(request))
    progress = pipeline.advance(run, Plan(keepable=ROOM))
    encoded = clock()
    for step in progress:
        if isinstance(step, Step) and step.phase == "decoding":
            break
    denoised = clock()
    *_, last = progress
    assert isinstance(last, Edited)
    assert last.evaluations is not None
    done, skipped = last.evaluations.done, last.evaluations.skipped
    return last.image, Figures(denoised - encoded, done, skipped, clock() - started)
