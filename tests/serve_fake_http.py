"""The process of unified_server.py with a fake worker, whose edits continue until stopped.

A step prints "step" on stderr. The prompt "hang" makes it the last sign of life.
"""

import sys

from fakes import FakeWorker
from serve_fake import slow
from step1x_edit.interfaces import serving
from step1x_edit.interfaces.cli import app
from step1x_edit.service.service import EditService
from step1x_edit.service.wiring import build_service
from step1x_edit.settings import Settings


def build(settings: Settings) -> EditService:
    return build_service(settings, start=FakeWorker(before_step=slow))


serving.build_service = build  # type: ignore[attr-defined,assignment]  # a stand-in
app(["serve", *sys.argv[1:]])
