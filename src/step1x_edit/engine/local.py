"""The engine of this process, as the settings describe it."""

from __future__ import annotations

from functools import partial

from step1x_edit.engine.engine import Clock, Engine, StartWorker
from step1x_edit.engine.machine import check_device
from step1x_edit.engine.worker_process import WorkerProcess, start_of
from step1x_edit.settings import Settings


def local_engine(
    settings: Settings, start: StartWorker | None = None, clock: Clock | None = None
) -> Engine:
    """An engine with one worker process; `start` replaces the usual way to start it.

    Raises SettingsError if the usual worker cannot use its DEVICE.
    """
    if start is None:
        check_device(settings.device, settings.gpus_per_edit)
    return Engine(
        start or partial(WorkerProcess, start_of(settings)),
        max_queue=settings.max_queue,
        edit_timeout_s=settings.edit_timeout,
        load_timeout_s=settings.load_timeout,
        idle_timeout_s=settings.gpu_idle_timeout,
        release_timeout_s=settings.gpu_release_timeout,
        clock=clock,
    )
