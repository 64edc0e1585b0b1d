"""The pulls of a server: published models being downloaded to this disk, one at a time.

A pull runs in a thread and continues until it ends or is stopped, with or without listeners. Only
models of the catalog can be pulled: callers choose from a list and never specify a source. The code
that talks to the hub is imported by the first pull.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from step1x_edit.errors import (
    CheckpointError,
    EditCancelledError,
    InternalError,
    JobConflictError,
    ModelNotFoundError,
    Step1XEditError,
)
from step1x_edit.hub.catalog import CATALOG, Model
from step1x_edit.hub.pulled import Kept, kept_models, models_folder, resolve_model_path
from step1x_edit.schemas.answers import JobState, PulledModel
from step1x_edit.settings import Settings

if TYPE_CHECKING:
    from step1x_edit.hub.fetch import PullProgress

log = logging.getLogger(__name__)

REPORT_S: Final = 0.25
"""The shortest interval between two reports to a listener."""
_GRACE_S: Final = 1.0  # for the piece being read when the server ends
_MEASURED_S: Final = 5.0

Outcome: TypeAlias = Path | Step1XEditError
"""The folder of the model, or why there is none: EditCancelledError if the pull was stopped."""


class Speed:
    """Bytes per second over the last seconds; the caller passes the time."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def note(self, at_s: float, done: int) -> None:
        """Record the number of bytes at a time."""
        if self._seen and done < self._seen[-1][1]:  # a wrong file is fetched again
            self._seen.clear()
        if not self._seen or at_s - self._seen[-1][0] >= REPORT_S:
            self._seen.append((at_s, done))
        while at_s - self._seen[0][0] > _MEASURED_S:
            self._seen.popleft()

    def bytes_per_s(self, at_s: float) -> float | None:
        """The speed at a time; None if there are too few records, or no recent ones."""
        seen = [each for each in self._seen.copy() if at_s - each[0] <= _MEASURED_S]
        if len(seen) < 2:
            return None
        (first_s, first), (last_s, last) = seen[0], seen[-1]
        return (last - first) / (last_s - first_s)


class Pull:
    """A model being pulled; created within the event loop of its listeners.

    The pull of a model that is already here has ended from the start.
    """

    def __init__(self, model: Model, settings: Settings) -> None:
        self.name: Final = model.name
        self.progress: PullProgress | None = None
        """None until the hub has listed the files."""
        self._speed = Speed()
        self._settings = settings
        self._folder = models_folder(settings.data_dir) / model.folder_name
        self._stopping = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[Outcome] = self._loop.create_future()
        if self._folder.is_dir():
            self._ended.set_result(self._folder)
            return
        # Not a thread of the loop's pool: the process must not wait for it at exit.
        threading.Thread(target=self._run, name="pull", daemon=True).start()

    @property
    def state(self) -> JobState:
        """Running, or how it ended."""
        match self.outcome:
            case None:
                return JobState.RUNNING
            case EditCancelledError():
                return JobState.CANCELLED
            case Step1XEditError():
                return JobState.FAILED
        return JobState.SUCCEEDED

    @property
    def outcome(self) -> Outcome | None:
        """The outcome; None while it runs."""
        return self._ended.result() if self._ended.done() else None

    @property
    def is_stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self._stopping.is_set()

    @property
    def bytes_per_s(self) -> float | None:
        """The current speed, if known."""
        return self._speed.bytes_per_s(time.monotonic())

    async def events(self) -> AsyncGenerator[PullProgress, None]:
        """Yield the newest progress, at most once every `REPORT_S`, and finally the last one."""
        last = None
        while True:
            has_ended = self._ended.done()
            if self.progress is not None and self.progress != last:
                last = self.progress
                yield last
            if has_ended:
                return
            await self.wait(REPORT_S)

    async def wait(self, timeout_s: float | None = None) -> None:
        """Wait for its end, at most this many seconds."""
        await asyncio.wait({self._ended}, timeout=timeout_s)

    def stop(self) -> None:
        """Stop it after the current piece; received data is kept, and the next pull continues."""
        self._stopping.set()

    # --- in its thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        log.info("pulling %s into %s", self.name, self._folder)
        outcome: Outcome
        try:
            from step1x_edit.hub.fetch import pull

            with self._settings.naming_paths():
                outcome = pull(self.name, self._folder.parent, self._note, wait=self._pause)
            log.info("pulled %s", self.name)
        except Step1XEditError as error:
            log.info("the pull of %s ended: %s", self.name, error)
            outcome = error
        except Exception:
            log.exception("the pull of %s failed", self.name)
            outcome = InternalError("the pull failed unexpectedly; the server's log says more")
        with contextlib.suppress(RuntimeError):  # the loop ended first
            self._loop.call_soon_threadsafe(self._ended.set_result, outcome)

    def _note(self, progress: PullProgress) -> None:
        if self._stopping.is_set():
            raise EditCancelledError
        self.progress = progress
        self._speed.note(time.monotonic(), progress.done)

    def _pause(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise EditCancelledError


class Pulls:
    """The catalog with the local state, and the running or last pull.

    Entered as a context; leaving it stops the running pull.
    """

    def __init__(self, settings: Settings) -> None:
        self.latest: Pull | None = None
        self._settings = settings
        self._folder = models_folder(settings.data_dir)

    async def __aenter__(self) -> Pulls:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.running is not None:
            self.running.stop()
            await self.running.wait(_GRACE_S)

    @property
    def running(self) -> Pull | None:
        """The pull that has not ended."""
        pull = self.latest
        return pull if pull is not None and pull.state is JobState.RUNNING else None

    def models(self) -> list[PulledModel]:
        """The catalog, and how much of it is on this disk; reads the disk."""
        kept = {item.name: item for item in kept_models(self._folder)}
        return [
            _pulled_model(model, kept.get(model.name), self.runs(model.name)) for model in CATALOG
        ]

    def folder_of(self, name: str) -> Path | None:
        """The folder of a complete model. Raises ModelNotFoundError."""
        folder = self._folder / listed(name).folder_name
        return folder if folder.is_dir() else None

    def runs(self, name: str) -> bool:
        """Whether MODEL_PATH means this model. Raises ModelNotFoundError."""
        folder, chosen = self.folder_of(name), None
        with contextlib.suppress(CheckpointError):  # it names a model that is not here
            chosen = resolve_model_path(self._settings.model_path, self._settings.data_dir)
        return folder is not None and chosen is not None and chosen.resolve() == folder.resolve()

    def begin(self, name: str) -> Pull:
        """Pull a model, or join its running pull; if the model is here, the pull has ended at once.

        Raises ModelNotFoundError, and JobConflictError while another model is pulled.
        """
        model, running = listed(name), self.running
        if running is not None and running.name == model.name:
            return running
        if running is not None and self.folder_of(name) is None:
            raise JobConflictError(
                f"{running.name} is being pulled, and only one model is at a time; wait for it, "
                "or stop it"
            )
        pull = Pull(model, self._settings)
        if pull.outcome is None:
            self.latest = pull
        return pull

    async def stop(self, name: str) -> Pull:
        """Stop the pull of a model and wait for its end.

        Raises ModelNotFoundError, and JobConflictError if it is not being pulled.
        """
        model, running = listed(name), self.running
        if running is None or running.name != model.name:
            raise JobConflictError(f"{model.name} is not being pulled")
        running.stop()
        await running.wait()
        return running


def listed(name: str) -> Model:
    """The model of the catalog with this name. Raises ModelNotFoundError."""
    for model in CATALOG:
        if model.name == name:
            return model
    names = ", ".join(model.name for model in CATALOG)
    raise ModelNotFoundError(f"{name!r}; these can be pulled here: {names}")


def _pulled_model(model: Model, kept: Kept | None, runs: bool) -> PulledModel:
    return PulledModel(
        name=model.name,
        version=model.version,
        repos=list(model.repos),
        note=model.note or None,
        size_bytes=model.published_bytes,
        state=kept.state if kept else "available",
        folder=str(kept.folder) if kept else None,
        disk_bytes=kept.size if kept else None,
        runs=runs,
    )
