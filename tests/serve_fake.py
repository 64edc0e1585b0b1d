"""The process of mcp_server.py with a fake worker, whose edits continue until they are stopped.

A step prints "step" on stderr. The prompt "hang" makes it the last sign of life.
"""

import os

wire = os.dup(1)
os.dup2(2, 1)

import sys  # noqa: E402
import threading  # noqa: E402

from fakes import FakeWorker  # noqa: E402
from step1x_edit.channel import EditJob  # noqa: E402
from step1x_edit.interfaces.mcp import stdio  # noqa: E402
from step1x_edit.service.service import EditService  # noqa: E402
from step1x_edit.service.wiring import build_service  # noqa: E402
from step1x_edit.settings import Settings  # noqa: E402


def slow(job: EditJob, step: int) -> None:
    sys.stderr.write("step\n")
    sys.stderr.flush()
    threading.Event().wait(None if job.prompt == "hang" else 0.02)


def build(settings: Settings) -> EditService:
    return build_service(settings, start=FakeWorker(before_step=slow))


if __name__ == "__main__":
    stdio.build_service = build  # type: ignore[attr-defined,assignment]  # a stand-in
    stdio.main(wire, [])
