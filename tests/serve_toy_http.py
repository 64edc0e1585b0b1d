"""The process of unified_server.py with toy workers: real processes, whose model is a toy."""

import sys
from functools import partial

from step1x_edit.channel import Start
from step1x_edit.engine.worker_process import WorkerProcess
from step1x_edit.interfaces import serving
from step1x_edit.interfaces.cli import app
from step1x_edit.service.service import EditService
from step1x_edit.service.wiring import build_service
from step1x_edit.settings import Settings


def build(settings: Settings) -> EditService:
    start = Start(log_level=settings.log_level, log_format=settings.log_format)
    return build_service(settings, start=partial(WorkerProcess, start, module="toy_worker"))


serving.build_service = build  # type: ignore[attr-defined,assignment]  # a stand-in
app(["serve", *sys.argv[1:]])
