"""The command line with a fake worker, as a process that tests interrupt or kill.

FAKE_LOG is a file that gets a line when an edit starts; the edit with the line number FAKE_HANG,
from 1, never ends.
"""

import os
import threading
from pathlib import Path

from fakes import FakeWorker
from step1x_edit.channel import EditJob
from step1x_edit.engine import local
from step1x_edit.interfaces.cli import main

LOG = Path(os.environ["FAKE_LOG"])


def before_step(job: EditJob, step: int) -> None:
    if step == 1:
        with LOG.open("a") as log:
            log.write(f"{job.prompt}\n")
    if len(LOG.read_text().splitlines()) == int(os.environ.get("FAKE_HANG", "0")):
        threading.Event().wait(0.02 if step > 1 else 0)  # a cancel is checked between steps
        while os.environ.get("FAKE_DEAF"):
            threading.Event().wait(0.02)


local.WorkerProcess = lambda start, ended: FakeWorker(before_step=before_step)(ended)  # type: ignore
main()
