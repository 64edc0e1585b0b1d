"""The time and memory of an edit, without running one.

If the model is not loaded, a separate process inspects the checkpoint; this can take a few
seconds, and its result is cached for some minutes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from step1x_edit.channel import GIGA, Residence
from step1x_edit.checkpoints.memory_plan import spared
from step1x_edit.engine.engine import EngineLike
from step1x_edit.engine.machine import Survey
from step1x_edit.errors import CheckpointError, ModelUnavailableError
from step1x_edit.model.config import DEMO, V1_1
from step1x_edit.model.sizes import fit_size
from step1x_edit.schemas.answers import EstimateAnswer
from step1x_edit.schemas.plan import PlanStatus
from step1x_edit.schemas.requests import PictureRequest
from step1x_edit.service.records import job_of, with_seed
from step1x_edit.settings import Settings

SURVEY_MAX_AGE_S: Final = 600.0
"""How long the survey of a checkpoint is cached; free memory changes."""
_UPSCALED: Final = "predicted_seconds is the time until the picture is enlarged"


class Estimator:
    """Estimates edits from the state of the engine and a survey of the machine."""

    def __init__(self, engine: EngineLike, settings: Settings, take_survey: Callable[[], Survey]):
        """`take_survey` inspects a model that is not loaded; it can take long."""
        self._engine = engine
        self._settings = settings
        self._take_survey = take_survey
        self._running: asyncio.Future[Survey] | None = None
        self._last: tuple[float, Survey] | None = None

    async def estimate(
        self, request: PictureRequest, size: tuple[int, int] | None, n: int, previews: int
    ) -> EstimateAnswer:
        """The time and memory of `n` such edits of a picture of this size (or of a square one).

        Raises the error that such a picture or the checkpoint would be refused with.
        """
        from step1x_edit.pictures import images, regions

        width, height = size or (request.size_level, request.size_level)
        width, height = regions.grown_size(request.outpaint, width, height)
        images.check_size(width, height, self._settings.limits)
        images.check_enlarged(width, height, request.upscale, self._settings.limits)
        status, note = self._engine.status(), None
        residence = status.residence
        if residence.placement is None:
            survey = await self._survey()
            if survey.torch_error is not None:
                note = self._settings.without_paths(survey.torch_error)
            residence = Residence(
                model=survey.checkpoint,
                device=survey.device,
                size_multiple=survey.size_multiple,
                placement=survey.placement,
            )
        placement = residence.placement
        multiple = residence.size_multiple or self._usual_multiple
        working = fit_size(width, height, request.size_level, multiple)
        job = job_of(with_seed(request), previews=previews)
        seconds = self._engine.predicted_s(job)
        upscaled = _UPSCALED if request.upscale > 1 else None
        notes = (note or self._engine.time_warning(job), upscaled)
        return EstimateAnswer(
            width=working[0],
            height=working[1],
            num_steps=request.num_steps,
            guidance_scale=request.guidance_scale,
            size_level=request.size_level,
            mode=request.mode,
            n=n,
            predicted_seconds=None if seconds is None else round(n * seconds, 1),
            predicted_peak_gb=_peak_at(placement, request.size_level) if placement else None,
            must_load=not status.residence.is_ready,
            queue_length=status.queue_length,
            model=residence.model,
            device=residence.device,
            reason=placement.reason if placement else None,
            note="; ".join(filter(None, notes)) or None,
        )

    @property
    def _usual_multiple(self) -> int:
        """The sides of a working size are multiples of this, unless a survey has found another."""
        return (DEMO if self._settings.model_path is None else V1_1).size_multiple

    async def _survey(self) -> Survey:
        """The survey of a model that is not loaded; concurrent callers wait for the same one.

        Raises an error if edits are not possible.
        """
        if self._last is None or self._last[0] < time.monotonic() - SURVEY_MAX_AGE_S:
            if self._running is None or self._running.done():
                self._running = asyncio.ensure_future(asyncio.to_thread(self._take_survey))
            survey = await asyncio.shield(self._running)
            if survey.torch_error is None:
                self._last = (time.monotonic(), survey)
        else:
            survey = self._last[1]
        if survey.device_error is not None:
            raise ModelUnavailableError(f"DEVICE {survey.device}: {survey.device_error}")
        if survey.checkpoint_error is not None:
            raise CheckpointError(survey.checkpoint_error)
        return survey


def _peak_at(plan: PlanStatus, size_level: int) -> float | None:
    """GB that an edit at this size level is expected to need on the device."""
    if plan.predicted_peak_gb is None:
        return None
    less = spared(size_level, plan.joint_branches)
    return round(plan.predicted_peak_gb - less / GIGA, 2)
