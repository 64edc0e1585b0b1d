"""The command line around a fake worker, as a process to be interrupted or killed.

FAKE_LOG is a file that gets a line for each edit when it is begun; the edit number FAKE_HANG in it,
from 1, never ends.
"""

import os
import threading
from pathlib import Path

from fakes import FakeWorker
from step1x_edit.channel import EditJob
from step1x_edit.interfaces.cli import main
from step1x_edit.service import service

LOG = Path(os.environ["FAKE_LOG"])


def before_step(job: EditJob, step: int) -> None:
    if step == 1:
        with LOG.open("a") as log:
            log.write(f"{job.prompt}\n")
    if len(LOG.read_text().splitlines()) == int(os.environ.get("FAKE_HANG", "0")):
        threading.Event().wait(0.02 if step > 1 else 0)  # a worker hears of a cancel between steps
        while os.environ.get("FAKE_DEAF"):
            threading.Event().wait(0.02)


service.WorkerProcess = lambda start, ended: FakeWorker(before_step=before_step)(ended)  # type: ignore
main()
