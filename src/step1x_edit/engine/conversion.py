"""Converting a model in a separate process, so that torch is never imported in this one."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from step1x_edit.channel import Start
from step1x_edit.errors import InternalError, rebuild
from step1x_edit.settings import inherited_environment

_PARTIAL: Final = ".partial"
_END_S: Final = 30.0
"""Seconds for the process to end after it was told to: until the block in work is read."""


def convert(start: Start, folder: Path | None, show: Callable[[int, int], None]) -> Path:
    """Write the codes of a model, in the precision of `start`, and return the file.

    It is written to `DATA_DIR/converted`, or to another folder. `show` receives the bytes that
    have been read, and how many there are; if it raises, nothing of the file is left.

    Raises Step1XEditError.
    """
    wish = {
        "start": dataclasses.asdict(start),
        "folder": None if folder is None else str(folder.absolute()),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "step1x_edit.worker.convert"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=inherited_environment(PYTHONSAFEPATH="1"),
    )
    file: Path | None = None
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            json.dump(wish, process.stdin)
            process.stdin.close()
            for line in process.stdout:
                facts = json.loads(line)
                if "error" in facts:
                    raise rebuild(facts["code"], facts["error"])
                if "file" in facts:
                    file = Path(facts["file"])
                else:
                    show(facts["done"], facts["total"])
            if process.wait() != 0 or file is None:
                raise InternalError(f"the conversion ended with exit code {process.returncode}")
        finally:
            _end(process)
            if file is not None:  # if it could not do that itself
                file.with_name(file.name + _PARTIAL).unlink(missing_ok=True)
    return file


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
