"""Wires the parts together: settings, worker process, engine, files and service."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from step1x_edit.engine.engine import Clock, Engine, StartWorker
from step1x_edit.engine.machine import Survey, check_device
from step1x_edit.engine.worker_process import WorkerProcess, start_of
from step1x_edit.service.estimate import Estimator
from step1x_edit.service.files import FileAccess
from step1x_edit.service.kept_survey import current_survey
from step1x_edit.service.service import EditService
from step1x_edit.settings import Settings

SURVEY_S: Final = 60.0
"""How long an estimate waits for the process that inspects the checkpoint."""


def build_service(
    settings: Settings,
    start: StartWorker | None = None,
    clock: Clock | None = None,
    take_survey: Callable[[], Survey] | None = None,
) -> EditService:
    """Wire the service that all interfaces use; `start` replaces the usual way to start a worker.

    Raises SettingsError if the usual worker cannot use its DEVICE.
    """
    if start is None:
        check_device(settings.device, settings.gpus_per_edit)
    engine = Engine(
        start or partial(WorkerProcess, start_of(settings)),
        max_queue=settings.max_queue,
        edit_timeout_s=settings.edit_timeout,
        load_timeout_s=settings.load_timeout,
        idle_timeout_s=settings.gpu_idle_timeout,
        release_timeout_s=settings.gpu_release_timeout,
        clock=clock,
    )
    survey = take_survey or partial(current_survey, settings, SURVEY_S)
    files = FileAccess(settings.allowed_dirs, settings.max_bytes)
    return EditService(engine, files, settings, Estimator(engine, settings, survey))
