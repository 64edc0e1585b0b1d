"""The worker process as its parent sees it: started, sent requests, watched, ended.

The child shares one pipe and stderr with the parent and nothing else. It exits when the pipe
closes, so that it never outlives the parent, however that ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from enum import Enum
from multiprocessing.connection import Connection
from typing import Any, Final

from step1x_edit.channel import Cancel, Channel, Report, Request, Start
from step1x_edit.errors import WorkerLostError
from step1x_edit.settings import MEBI, Settings, inherited_environment

_PATIENT_THREADS: Final = {"GOMP_SPINCOUNT": "20000"}
"""OpenMP threads that wait for each other spin briefly and then sleep, unless the user sets this.
By default they spin longer, which is ruinous if other programs need the cores too."""

_HUGE_PAGES: Final = {"THP_MEM_ALLOC_ENABLE": "1"}
"""Torch takes memory for large tensors in huge pages. In pages of 4 KiB the system needs longer to
provide the memory of a tensor than the processor to fill it, and each layer takes new memory."""

_SEND_S: Final = 30.0
_POLL_S: Final = 1.0  # between two checks whether the process is stopped
_CAN_SEE_STOPS: Final = hasattr(os, "waitid")
_EXIT_S: Final = 5.0  # between the end of the pipe and the end of the process


def start_of(settings: Settings) -> Start:
    """The message that starts a worker: which model it runs, and how."""
    return Start(
        model_path=None if settings.model_path is None else str(settings.model_path),
        data_dir=str(settings.data_dir),
        model_version=settings.model_version,
        device=settings.device,
        log_level=settings.log_level,
        loras={str(path): strength for path, strength in settings.lora_path.items()},
        log_format=settings.log_format,
        precision=settings.precision,
        arithmetic=settings.arithmetic,
        edit_cache_bytes=settings.edit_cache_mb * MEBI,
        gpus_per_edit=settings.gpus_per_edit,
        upscale_model=None if settings.upscale_model is None else str(settings.upscale_model),
    )


class _Mark(Enum):
    """Marks in the queue of reports."""

    WAKE = "wake"
    END = "end"


class WorkerProcess:
    """One process that owns torch and the model; see `engine.Worker` for threads."""

    def __init__(
        self,
        start: Start,
        on_end: Callable[[], None],
        module: str = "step1x_edit.worker.process",
        max_stop_s: float = 10.0,
    ) -> None:
        """Start the process; `on_end` is called from another thread when it has ended.

        It runs `module`. If it is stopped for `max_stop_s`, it counts as lost. Raises OSError if
        it cannot be started.
        """
        ours, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = _spawn(module, theirs)
        self._channel = Channel(ours)
        self._on_end = on_end
        self._max_stop_s = max_stop_s
        self._reports: queue.SimpleQueue[Report | _Mark] = queue.SimpleQueue()
        self._has_ended = threading.Event()
        threading.Thread(target=self._listen, name="worker reports", daemon=True).start()
        with contextlib.suppress(OSError):  # the first `receive` raises
            self._channel.send(start)

    @property
    def pid(self) -> int:
        """The process id of the child."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it can still take requests."""
        return not self._has_ended.is_set()

    def send(self, request: Request) -> None:
        """Send a request; raises WorkerLostError."""
        patience = threading.Timer(_SEND_S, self.kill)  # a stopped process does not read
        patience.start()
        try:
            self._channel.send(request)
        except OSError:
            raise WorkerLostError(self._how_it_ended()) from None
        finally:
            patience.cancel()

    def receive(self, timeout_s: float) -> Report | None:
        """The next report; None after a silence or a cancel. Raises WorkerLostError.

        A stopped process counts as lost after some seconds, whatever it was doing: while it loads
        or decodes, nothing else distinguishes it from one that works.
        """
        report = self._next_report(time.monotonic() + timeout_s)
        if report is _Mark.END:
            raise WorkerLostError(self._how_it_ended())
        return report if isinstance(report, Report) else None

    def _next_report(self, until: float) -> Report | _Mark:
        stopped_at = None
        while self.is_alive:
            now = time.monotonic()
            if not self._is_stopped():
                stopped_at = None
            elif stopped_at is None:
                stopped_at = now
            elif now >= stopped_at + self._max_stop_s:
                raise WorkerLostError(f"it was stopped for {self._max_stop_s:g} s")
            with contextlib.suppress(queue.Empty):
                return self._reports.get(timeout=max(0.0, min(_POLL_S, until - now)))
            if time.monotonic() >= until:
                return _Mark.WAKE
        with contextlib.suppress(queue.Empty):
            return self._reports.get_nowait()
        return _Mark.END

    def _is_stopped(self) -> bool:
        """Whether a signal has stopped the process; does not consume its status."""
        if not _CAN_SEE_STOPS:
            return False
        with contextlib.suppress(OSError):  # it has ended
            found = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
            return found is not None
        return False

    def cancel(self, request: Cancel) -> None:
        """Ask it to stop an edit, and wake the caller that waits in `receive`."""
        with contextlib.suppress(OSError):  # `receive` raises
            self._channel.send(request)
        self._reports.put(_Mark.WAKE)

    def stop(self, timeout_s: float) -> None:
        """End the process and wait for it; kill it after the timeout."""
        self._channel.hang_up()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()

    def _listen(self) -> None:
        """Collect the reports until the pipe ends, and the process with it."""
        try:
            while isinstance(report := self._channel.receive(), Report):
                self._reports.put(report)
        except (EOFError, OSError):
            pass
        finally:
            self._has_ended.set()
            self._reports.put(_Mark.END)
            try:
                self._process.wait(_EXIT_S)
            except subprocess.TimeoutExpired:  # it closed the pipe but hangs
                self.kill()
                self._process.wait()
            self._channel.close()
            self._on_end()

    def _how_it_ended(self) -> str:
        """How it ended, for the sentence of an error."""
        try:
            code = self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        if code >= 0:
            return f"it ended with exit code {code}"
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            hint = ", perhaps because memory ran out" if name == "SIGKILL" else ""
            return f"it was ended by {name}{hint}"
        return f"it was ended by signal {-code}"


def _spawn(module: str, connection: Connection) -> subprocess.Popen[bytes]:
    """Start the child with its end of the pipe, and without our stdin and stdout."""
    options: dict[str, Any] = {}
    handle = connection.fileno()
    if sys.platform == "win32":
        os.set_handle_inheritable(handle, True)
        startup = subprocess.STARTUPINFO(lpAttributeList={"handle_list": [handle]})
        options = {"startupinfo": startup, "creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    else:
        # In a separate session, because Ctrl-C in the terminal is for the parent only.
        options = {"pass_fds": [handle], "start_new_session": True}
    return subprocess.Popen(  # noqa: S603 - our own interpreter and module
        [sys.executable, "-m", module, str(handle)],
        stdin=subprocess.DEVNULL,
        stdout=2,
        # A file torch.py in the current folder must not be imported instead of the library.
        env={**_PATIENT_THREADS, **_HUGE_PAGES, **inherited_environment(PYTHONSAFEPATH="1")},
        **options,
    )
