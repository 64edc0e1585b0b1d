"""A server in a separate process, for the duration of a test, and its log."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

FAKE = Path(__file__).parent / "serve_fake_http.py"
"""The program of a server whose worker is a fake."""


class Process:
    """A server in a separate process and folder."""

    def __init__(self, script: Path, folder: Path, *flags: str, **settings: str) -> None:
        self.data_dir = folder / "data"
        own = {"DATA_DIR": str(self.data_dir), "PORT": "0", **settings}
        self.popen = subprocess.Popen(
            [sys.executable, str(script), *flags],
            cwd=folder,
            env={**os.environ, **own},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, args=(self.popen.stderr,), daemon=True)
        self._reader.start()

    def heard(self, text: str, timeout_s: float = 240) -> str:
        """Wait for a line on stderr with this text."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: any(text in line for line in self.lines), timeout_s
            ), self.lines
            return next(line for line in self.lines if text in line)

    def url(self) -> str:
        return self.heard("serving at ").rpartition(" ")[2].strip()

    def ended(self) -> int:
        code = self.popen.wait(240)
        self._reader.join(240)
        return code

    def _read(self, stderr: IO[str]) -> None:
        for line in stderr:
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()


@contextlib.contextmanager
def started(script: Path, folder: Path, *flags: str, **settings: str) -> Iterator[Process]:
    process = Process(script, folder, *flags, **settings)
    try:
        yield process
    finally:
        process.popen.kill()
        process.ended()
