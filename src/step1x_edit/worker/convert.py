"""The process that writes the codes of a model into a file; it may import torch.

`python -m step1x_edit.worker.convert` reads a worker's `Start` and a folder as JSON from stdin, and
writes lines of JSON to stdout: first the file, then what has been read, at the end an error if it
failed. Without a folder the file is written to `DATA_DIR/converted`, else it is linked from there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from filelock import FileLock, Timeout

from step1x_edit.cache import FOLDER as CACHE
from step1x_edit.channel import Start
from step1x_edit.checkpoints.converted import converted_folder, file_name
from step1x_edit.errors import (
    InternalError,
    JobConflictError,
    OutputNotWritableError,
    Step1XEditError,
)
from step1x_edit.worker.libraries import import_libraries


def convert(start: Start, folder: Path | None, answer: TextIO) -> None:
    """Write the file, and report. Raises Step1XEditError or OSError."""
    import_libraries()
    from step1x_edit.checkpoints.conversion import write_codes
    from step1x_edit.worker.opening import Opener

    opener = Opener(start)
    opened = opener.open_files(start.precision)
    name = file_name(opener.path, opened.checkpoint.version, start.precision)
    place = converted_folder(Path(start.data_dir))
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    link, earlier = place / name, (place / name).resolve()
    file = (place if folder is None else folder).resolve() / name
    _report(answer, file=str(file), model=opened.checkpoint.name)
    with contextlib.closing(write_codes(opened, file)) as writing:
        for read in writing:
            _report(answer, done=read.done, total=read.total)
    if earlier != file:
        earlier.unlink(missing_ok=True)
    if link.resolve() != file:
        link.unlink(missing_ok=True)
        link.symlink_to(file)


@contextlib.contextmanager
def _alone(data_dir: Path) -> Iterator[None]:
    """Lets one process at a time convert. Raises JobConflictError."""
    (data_dir / CACHE).mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with FileLock(data_dir / CACHE / "convert.lock", timeout=0):
            yield
    except Timeout:
        raise JobConflictError("another process is converting a model; wait for it") from None


def _fail(answer: TextIO, error: Step1XEditError) -> None:
    _report(answer, code=error.code, error=str(error))


def _report(answer: TextIO, **facts: object) -> None:
    answer.write(f"{json.dumps(facts)}\n")
    answer.flush()


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Answer on stdout, without anything that libraries print there."""
    signal.signal(signal.SIGTERM, _stop)
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    wish = json.load(sys.stdin)
    start, folder = Start(**wish["start"]), wish["folder"]
    with answer, contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        try:
            with _alone(Path(start.data_dir)):
                convert(start, None if folder is None else Path(folder), answer)
        except BrokenPipeError:  # the caller is gone
            raise
        except Step1XEditError as error:
            _fail(answer, error)
        except OSError as error:
            _fail(answer, OutputNotWritableError(f"{error.filename or folder}: {error.strerror}"))
        except Exception as error:  # noqa: BLE001 - the caller reports any error
            _fail(answer, InternalError(f"{type(error).__name__}: {error}"))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nothing is left to be stopped


if __name__ == "__main__":
    main()
