"""The REST routes of the published models: those on this disk, and fetching the others.

A pull sends server-sent events and continues if its client disconnects. `pulls` downloads the
models.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from step1x_edit.errors import EditCancelledError, Step1XEditError
from step1x_edit.hub.pulls import Pull, Pulls
from step1x_edit.interfaces.http import openapi
from step1x_edit.interfaces.http.guard import start_work
from step1x_edit.interfaces.http.sse import EVENT_STREAM, KEEP_ALIVE_S, kept_alive, named
from step1x_edit.schemas.answers import (
    ErrorAnswer,
    ModelsAnswer,
    PullAnswer,
    PullProgressAnswer,
)

if TYPE_CHECKING:
    from step1x_edit.hub.fetch import PullProgress

MODELS_PATH: Final = "/api/models"
_KEPT: Final = "the downloaded part is kept, and the next pull of this model continues from there"
_ASKING: Final = PullProgressAnswer(phase="asking", done=0, total=0, text="asking the hub")


def model_routes(
    pulls: Pulls, closing: asyncio.Event, keep_alive_s: float = KEEP_ALIVE_S
) -> APIRouter:
    """The routes under /api/models; the events of a pull end early if `closing` is set."""
    models = _Models(pulls, closing, keep_alive_s)
    router = APIRouter(prefix=MODELS_PATH, tags=["Models"])
    router.get("", **openapi.LIST_PUBLISHED_MODELS)(models.list_models)
    router.post("/{name:path}/pull", **openapi.PULL_MODEL)(models.pull)
    router.delete("/{name:path}/pull", **openapi.STOP_PULL)(models.stop)
    return router


@dataclass(frozen=True)
class _Models:
    pulls: Pulls
    closing: asyncio.Event
    keep_alive_s: float

    async def list_models(self) -> Response:
        models = await asyncio.to_thread(self.pulls.models)
        pull = None if self.pulls.latest is None else pull_answer(self.pulls.latest)
        return JSONResponse(ModelsAnswer(models=models, pull=pull).to_dict())

    async def pull(self, request: Request) -> Response:
        name = _name_in(request)
        if self.pulls.running is None and self.pulls.folder_of(name) is None:
            start_work(request.scope)
        stream = kept_alive(_events_of(self.pulls.begin(name)), self.closing, self.keep_alive_s)
        return StreamingResponse(stream, media_type=EVENT_STREAM)

    async def stop(self, request: Request) -> Response:
        return JSONResponse(pull_answer(await self.pulls.stop(_name_in(request))).to_dict())


def pull_answer(pull: Pull) -> PullAnswer:
    """The current state of a pull."""
    outcome = pull.outcome
    failure = outcome if isinstance(outcome, Step1XEditError) else None
    return PullAnswer(
        name=pull.name,
        status=pull.state,
        progress=_progress(pull.progress),
        path=str(outcome) if isinstance(outcome, Path) else None,
        error=None if failure is None else str(failure),
        code=None if failure is None else failure.code,
    )


def _name_in(request: Request) -> str:
    # Not a parameter of the route's function: its description would promise answers of FastAPI's.
    return str(request.path_params["name"])


async def _events_of(pull: Pull) -> AsyncIterator[str]:
    """The progress of a pull, and last its outcome."""
    if pull.outcome is None and pull.progress is None:
        yield named("progress", _ASKING.to_dict())
    async for progress in pull.events():
        yield named("progress", _progress(progress).to_dict())
    match pull.outcome:
        case EditCancelledError():
            yield named("cancelled", {"message": _KEPT})
        case Step1XEditError() as error:
            yield named("error", ErrorAnswer.of(error).to_dict())
        case folder:
            yield named("pulled", {"path": str(folder)})


def _progress(progress: PullProgress | None) -> PullProgressAnswer:
    if progress is None:
        return _ASKING
    return PullProgressAnswer(
        phase=progress.phase, done=progress.done, total=progress.total, text=progress.text
    )
