"""Wires the parts together: settings, worker process, engine, files and service."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from step1x_edit.engine.engine import Clock, EngineLike, StartWorker
from step1x_edit.engine.local import local_engine
from step1x_edit.engine.machine import Survey
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

    Raises SettingsError if ENGINE cannot be used here.
    """
    engine = _engine(settings, start, clock)
    survey = take_survey or partial(current_survey, settings, SURVEY_S)
    files = FileAccess(settings.allowed_dirs, settings.max_bytes)
    return EditService(engine, files, settings, Estimator(engine, settings, survey))


def _engine(settings: Settings, start: StartWorker | None, clock: Clock | None) -> EngineLike:
    if settings.engine == "local":
        return local_engine(settings, start, clock)
    from step1x_edit.cluster.connection import RayCluster, check_installed
    from step1x_edit.cluster.ray_engine import RayEngine

    check_installed()
    return RayEngine(
        RayCluster(settings),
        lanes=settings.ray_max_replicas,
        max_queue=settings.max_queue,
        edit_timeout_s=settings.edit_timeout,
        clock=clock,
    )
