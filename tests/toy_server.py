"""A server to be killed: edits one picture repeatedly, and prints which files are finished.

`python toy_server.py PICTURE FOLDER` runs the real service, engine and file layer with toy workers.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

from step1x_edit.channel import Start
from step1x_edit.engine.worker_process import WorkerProcess
from step1x_edit.service.file_edits import FileEdits
from step1x_edit.service.wiring import build_service
from step1x_edit.settings import load_settings


def tell(line: object) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def start(on_end: Callable[[], None]) -> WorkerProcess:
    worker = WorkerProcess(Start(), on_end, module="toy_worker")
    tell(worker.pid)
    return worker


async def main(picture: str, folder: Path) -> None:
    settings = load_settings({"allowed_dirs": (folder.parent,)})
    service = build_service(settings, start)
    edits = FileEdits(service, service.files)
    for number in count():
        output = str(folder / f"{number}.png")
        request = service.read_edit(
            {"image_path": picture, "prompt": "", "output_path": output, "num_steps": 10}
        )
        tell((await edits.edit(request)).answer.output_path)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
