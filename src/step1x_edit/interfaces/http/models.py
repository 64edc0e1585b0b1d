"""The REST face of the published models: which are here, and fetching the others.

A pull is heard as server-sent events and goes on without its listeners. How models are pulled is
known to `pulls`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from step1x_edit.errors import EditCancelledError, Step1XEditError
from step1x_edit.hub.catalog import CATALOG
from step1x_edit.hub.pulls import Pull, Pulls
from step1x_edit.interfaces.http import problems
from step1x_edit.interfaces.http.guard import start_work
from step1x_edit.interfaces.http.sse import EVENT_STREAM, KEEP_ALIVE_S, kept_alive, named
from step1x_edit.schemas.requests import (
    ErrorAnswer,
    JobState,
    ModelsAnswer,
    PullAnswer,
    PulledModel,
    PullProgressAnswer,
)

if TYPE_CHECKING:
    from step1x_edit.hub.fetch import PullProgress

MODELS_PATH: Final = "/api/models"
_KEPT: Final = "what arrived is kept, and the next pull of this model goes on from there"
_ASKING: Final = PullProgressAnswer(phase="asking", done=0, total=0, text="asking the hub")

# What the description shows.
_FOLDER: Final = "/home/me/.local/share/step1x-edit/models/v1.1"
_PROGRESS: Final = PullProgressAnswer(
    phase="downloading",
    done=3_100_000_000,
    total=41_800_000_000,
    text="step1x-edit-v1p1-official.safetensors",
)
_RUNNING: Final = PullAnswer(name="v1.1", status=JobState.RUNNING, progress=_PROGRESS)
_STOPPED: Final = _RUNNING.model_copy(
    update={
        "status": JobState.CANCELLED,
        "error": str(EditCancelledError()),
        "code": EditCancelledError.code,
    }
)
_LISTED: Final = ModelsAnswer(
    models=[
        PulledModel(
            name="v1.1",
            version="v1.1",
            repos=["stepfun-ai/Step1X-Edit", "Qwen/Qwen2.5-VL-7B-Instruct"],
            size_bytes=41_800_000_000,
            state="partial",
            folder=f"{_FOLDER}.partial",
            disk_bytes=3_100_000_000,
            runs=False,
        )
    ],
    pull=_RUNNING,
)
_EVENTS: Final = (
    named("progress", _ASKING.to_dict())
    + named("progress", _PROGRESS.to_dict())
    + named("pulled", {"path": _FOLDER})
)
_EVENT_SCHEMA: Final = {
    "type": "object",
    "description": "Each of the events: `progress` has a `PullProgressAnswer`, `pulled` the path "
    "of the folder, `error` the sentence and its code, and `cancelled` a message",
    "required": ["event", "data"],
    "properties": {
        "event": {"type": "string", "enum": ["progress", "pulled", "error", "cancelled"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
_OF_MODEL: Final = {
    "parameters": [
        {
            "name": "name",
            "in": "path",
            "required": True,
            "description": "The name of the model in the list",
            "schema": {"type": "string", "enum": [model.name for model in CATALOG]},
            "example": "v1.1",
        }
    ]
}


def _example(answer: ModelsAnswer | PullAnswer) -> dict[str, Any]:
    return {"application/json": {"example": answer.to_dict()}}


def model_routes(
    pulls: Pulls, closing: asyncio.Event, keep_alive_s: float = KEEP_ALIVE_S
) -> APIRouter:
    """The routes under /api/models; who listens to a pull is let go when `closing` is set."""
    router = APIRouter(prefix=MODELS_PATH, tags=["Models"])

    @router.get(
        "",
        operation_id="list_published_models",
        summary="List the published models",
        description="Which there are, how much of each is on this disk and where, and the pull "
        "that runs or was the last one since the start of the server.",
        response_model=ModelsAnswer,
        responses={
            200: {"description": "The models", "content": _example(_LISTED)},
            **problems.described("internal"),
        },
    )
    async def list_models() -> Response:
        models = await asyncio.to_thread(pulls.models)
        pull = None if pulls.latest is None else pull_answer(pulls.latest)
        return JSONResponse(ModelsAnswer(models=models, pull=pull).to_dict())

    @router.post(
        "/{name:path}/pull",
        operation_id="pull_model",
        summary="Fetch a published model",
        description="Answers with server-sent events: `progress` up to four times a second, and "
        "at last `pulled` with the folder for `MODEL_PATH`, `error` or `cancelled`. To close the "
        "connection does not stop the pull; asked again, the answer goes on with what runs. What "
        "an earlier pull has left is gone on with, and a model that is here is not fetched again. "
        "One model is pulled at a time.",
        responses={
            200: {
                "description": "The events",
                "content": {EVENT_STREAM: {"schema": _EVENT_SCHEMA, "example": _EVENTS}},
            },
            **problems.described("model_not_found", "job_conflict", "rate_limited", "internal"),
        },
        response_class=StreamingResponse,
        openapi_extra=_OF_MODEL,
    )
    async def pull(request: Request) -> Response:
        name = _name_in(request)
        if pulls.running is None and pulls.folder_of(name) is None:
            start_work(request.scope)
        stream = kept_alive(_told(pulls.begin(name)), closing, keep_alive_s)
        return StreamingResponse(stream, media_type=EVENT_STREAM)

    @router.delete(
        "/{name:path}/pull",
        operation_id="stop_pull",
        summary="Stop fetching a model",
        description="Answers once the pull has ended, which takes some seconds where the hub is "
        "silent. What arrived is kept, and the next pull of this model goes on from there.",
        response_model=PullAnswer,
        responses={
            200: {"description": "How the pull ended", "content": _example(_STOPPED)},
            **problems.described("model_not_found", "job_conflict", "internal"),
        },
        openapi_extra=_OF_MODEL,
    )
    async def stop(request: Request) -> Response:
        return JSONResponse(pull_answer(await pulls.stop(_name_in(request))).to_dict())

    return router


def pull_answer(pull: Pull) -> PullAnswer:
    """A pull as it is now."""
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


async def _told(pull: Pull) -> AsyncIterator[str]:
    """How a pull goes on, and last what came of it."""
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
