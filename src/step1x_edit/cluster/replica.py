"""A replica: a whole engine with its worker process, which edits one picture at a time.

It runs wherever Ray Serve starts it. What it takes and yields are plain dataclasses, which Ray
pickles: the members of a cluster trust each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step1x_edit.channel import Job, Progress, UpscaleJob
from step1x_edit.engine.engine import EditResult, EngineLike, EngineStatus, Replica, StartWorker
from step1x_edit.engine.local import local_engine
from step1x_edit.errors import CheckpointError, Step1XEditError
from step1x_edit.hub.pulled import resolve_model_path
from step1x_edit.settings import Settings


@dataclass(frozen=True)
class Said:
    """What a replica yields while it edits, and its state at that moment."""

    event: Progress | EditResult | Step1XEditError
    replica: Replica


class EngineReplica:
    """An engine that is called from another process."""

    def __init__(self, name: str, engine: EngineLike) -> None:
        self._name = name
        self._engine = engine

    async def run(self, job: Job) -> AsyncGenerator[Said, None]:
        """Edit, and yield the progress and then the picture or the error.

        Closing the generator, or cancelling the task that reads it, cancels the edit.
        """
        try:
            if isinstance(job, UpscaleJob):
                edit = self._engine.submit_end(job)
            else:
                edit = self._engine.submit(job)
        except Step1XEditError as error:
            yield self._said(error)
            return
        last = None
        try:
            async for event in edit.events():
                if event != last or event.preview is not None:  # otherwise it breaks a silence
                    yield self._said(event)
                last = event
            yield self._said(await edit.result())
        except Step1XEditError as error:
            yield self._said(error)
        finally:
            edit.cancel()  # does nothing to an edit that has ended

    async def look(self) -> Replica:
        """Its state."""
        return Replica(self._name, self._engine.status())

    async def offload(self) -> Replica:
        """Move the model off the device, and return the new state."""
        return await self._moved(self._engine.offload())

    async def release(self) -> Replica:
        """Unload the model and free all its memory, and return the new state."""
        return await self._moved(self._engine.release())

    async def _moved(self, move: Future[EngineStatus]) -> Replica:
        status = await asyncio.wrap_future(move)
        return Replica(self._name, status)

    def _said(self, event: Progress | EditResult | Step1XEditError) -> Said:
        return Said(event, Replica(self._name, self._engine.status()))


class ServedReplica(EngineReplica):
    """A replica with the hooks that Ray Serve calls."""

    def __init__(self, settings: Settings, start: StartWorker | None = None) -> None:
        """`start` replaces the usual way to start the worker.

        Raises an error, with which the deployment fails, if this node lacks the model or device.
        """
        from ray import serve

        path = resolve_model_path(settings.model_path, settings.data_dir)
        if path is not None and not Path(path).exists():
            raise CheckpointError(f"there is nothing at MODEL_PATH ({path}) on this node")
        name = serve.get_replica_context().replica_id.unique_id
        super().__init__(name, local_engine(settings, start))

    def check_health(self) -> None:
        """Raise if its worker has ended too often; Serve then starts another replica."""
        self._engine.check_worker()

    def record_routing_stats(self) -> dict[str, Any]:
        """Its state, through the only hook that a replica answers while it edits."""
        return {"replica": Replica(self._name, self._engine.status())}

    def __del__(self) -> None:
        """End the worker before Serve ends this process."""
        if hasattr(self, "_engine"):  # it was constructed
            self._engine.close()
