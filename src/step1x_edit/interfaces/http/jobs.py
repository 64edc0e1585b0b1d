"""The REST face of stored jobs: a picture in now, a picture out when somebody asks for it.

A job is an edit as `/api/edit` takes it, by the same form. What becomes of it is asked for by its
id, or heard as server-sent events. How jobs are kept is known to `jobs`, how pictures are edited to
the service; `job_operation` is where the two meet.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final

from fastapi import APIRouter
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from step1x_edit.channel import Phase, Progress
from step1x_edit.errors import (
    EditCancelledError,
    InvalidParameterError,
    JobNotFoundError,
    ShuttingDownError,
)
from step1x_edit.interfaces.http import problems
from step1x_edit.interfaces.http.edits import (
    METADATA,
    form_body,
    is_json,
    json_content,
    once,
    read_form,
    read_json,
    without_null,
)
from step1x_edit.interfaces.http.idempotency import (
    KEY_PARAMETER,
    REPLAYED,
    Runs,
    Tell,
    Work,
    digest_of,
    identity_of,
    may_be_known,
)
from step1x_edit.interfaces.http.sse import EVENT_STREAM, KEEP_ALIVE_S, kept_alive
from step1x_edit.schemas.requests import (
    GeneratePictureRequest,
    JobAnswer,
    JobEventAnswer,
    JobProgress,
    JobResult,
    JobsAnswer,
    JobsRequest,
    JobState,
    PictureRequest,
    read_request,
)
from step1x_edit.service.job_store import Job, JobEvent, JobInput, JobPage, JobStore, Operation
from step1x_edit.service.service import EditService, with_seed

log = logging.getLogger(__name__)

JOBS_PATH: Final = "/v1/jobs"

_LAST_EVENT_ID: Final = "Last-Event-ID"
_JOB_BYTES: Final = 8 * 1024  # of a job in memory, without its picture

# What the description shows.
_ID: Final = "0000000000078f14e45fceea167a5a36dedd4bea2543"
_REQUEST: Final = PictureRequest(prompt="change to night scene", seed=42)
_QUEUED: Final = JobAnswer(
    id=_ID, status=JobState.QUEUED, created_at=1767225600.0, position=1, request=_REQUEST
)
_RUNNING: Final = _QUEUED.model_copy(
    update={
        "status": JobState.RUNNING,
        "started_at": 1767225601.5,
        "position": None,
        "progress": JobProgress(phase="denoising", step=7, total=28),
    }
)
_SUCCEEDED: Final = _QUEUED.model_copy(
    update={
        "status": JobState.SUCCEEDED,
        "started_at": 1767225601.5,
        "finished_at": 1767225617.0,
        "position": None,
        "processing_time": 15.3,
        "metadata": METADATA,
    }
)
_CANCELLED: Final = _QUEUED.model_copy(
    update={
        "status": JobState.CANCELLED,
        "finished_at": 1767225602.0,
        "position": None,
        "error": str(EditCancelledError()),
        "code": EditCancelledError.code,
    }
)
_LISTED: Final = JobsAnswer(data=[_QUEUED], has_more=False, first_id=_ID, last_id=_ID)
_EVENTS: Final = (
    'id: 1\ndata: {"at": 1767225600.0, "status": "queued"}\n\n'
    'id: 2\ndata: {"at": 1767225601.5, "status": "running"}\n\n'
    ": still there\n\n"
    'id: 3\ndata: {"at": 1767225617.0, "status": "succeeded"}\n\n'
)

_JOB_ID: Final = {
    "name": "job_id",
    "in": "path",
    "required": True,
    "description": "The id that the job was accepted with",
    "schema": {"type": "string"},
    "example": _ID,
}
_EVENT_DATA: Final = JobEventAnswer.model_json_schema(ref_template=problems.SCHEMA_REFERENCE)
del _EVENT_DATA["$defs"]  # they are those of JobAnswer, which is described anyway
_EVENT_SCHEMA: Final = {
    "type": "object",
    "description": "Each of the events",
    "required": ["id", "data"],
    "properties": {
        "id": {"type": "string", "description": "Its number"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": _EVENT_DATA,
        },
    },
}
_OF_JOB: Final = {"parameters": [_JOB_ID]}


def _example(answer: JobAnswer | JobsAnswer) -> dict[str, Any]:
    return {"application/json": {"example": answer.to_dict()}}


# --- the work -------------------------------------------------------------------------------------


def job_operation(service: EditService) -> Operation:
    """What is done for a stored job: the same as for a caller who waits for it."""

    async def work(
        given: JobInput,
        request: Mapping[str, object],
        report: Callable[[Progress], Awaitable[None]],
    ) -> tuple[bytes, Mapping[str, object]]:
        if given.image:
            asked = service.read_picture(request)
            edited = await service.edit_picture(given.image, asked, report, mask=given.mask)
        else:
            new = service.read_generate_picture(request)
            edited = await service.generate_picture(new, report)
        result = JobResult(processing_time=edited.processing_time, metadata=edited.metadata)
        return edited.data, result.to_dict()

    return work


async def accept_job(
    service: EditService,
    store: JobStore,
    picture: bytes,
    arguments: Mapping[str, object],
    mask: bytes | None = None,
) -> Job:
    """Store a job, or raise what is wrong with what was given.

    A missing seed is drawn now, so that a job that has to be run again makes the same picture.
    """
    request = with_seed(service.read_picture(arguments))
    await service.check_picture(picture, mask)
    return await store.create(picture, request.model_dump(mode="json"), mask)


async def accept_generation(
    service: EditService, store: JobStore, arguments: Mapping[str, object]
) -> Job:
    """Store a job that makes a picture from words alone, or raise what is wrong with it."""
    request = with_seed(service.read_generate_picture(arguments))
    return await store.create(b"", request.model_dump(mode="json"))


# --- the routes -----------------------------------------------------------------------------------


def job_routes(
    service: EditService,
    store: JobStore,
    runs: Runs,
    closing: asyncio.Event,
    keep_alive_s: float = KEEP_ALIVE_S,
) -> APIRouter:
    """The routes under /v1/jobs, to be called while the store is open.

    A job that is created again with the same `Idempotency-Key` is one of `runs`.
    Who listens to events is let go when `closing` is set, and may come back to the next server.
    """
    router = APIRouter(prefix=JOBS_PATH, tags=["Stored jobs"])

    @router.post(
        "",
        operation_id="create_job",
        summary="Have a picture edited later",
        description="Takes the same form as `/api/edit` and answers as soon as the job is on the "
        "disk: from then on it is done even if the caller goes away or the server starts anew. "
        "`Location` is where it can be asked for. JSON instead of a form asks for a picture that "
        "is made from words alone, which needs Step1X-Edit v1.1.",
        status_code=202,
        response_model=JobAnswer,
        responses={
            202: {
                "description": "The job is accepted",
                "headers": {
                    "Location": {
                        "description": "The path of the job",
                        "schema": {"type": "string"},
                    }
                },
                "content": _example(_QUEUED),
            },
            **problems.described(
                "image_too_large",
                "unsupported_image",
                "invalid_parameter",
                "corrupt_image",
                "idempotency_key",
                "internal",
                "queue_full",
                "shutting_down",
                "no_space",
            ),
        },
        openapi_extra={"requestBody": _bodies(service.defaults), "parameters": [KEY_PARAMETER]},
    )
    async def create(request: Request) -> Response:
        if not may_be_known(request):
            await store.check_room()  # before the upload is read
        digest, accept = await _asked(request, service, store)
        run, was_there = runs.find(identity_of(request, digest), accept, lambda _: _JOB_BYTES)
        with run.heard():
            job = await run.result()
        headers = {"Location": f"{JOBS_PATH}/{job.id}", **(REPLAYED if was_there else {})}
        return JSONResponse(_answer(job).to_dict(), 202, headers)

    @router.get(
        "",
        operation_id="list_jobs",
        summary="List stored jobs",
        description="The newest first. Where `has_more` is true, `after` with the `last_id` of "
        "this answer lists the next ones.",
        response_model=JobsAnswer,
        responses={
            200: {"description": "Some jobs", "content": _example(_LISTED)},
            **problems.described("invalid_parameter", "internal", "shutting_down"),
        },
        openapi_extra={"parameters": _query()},
    )
    async def list_jobs(request: Request) -> Response:
        wanted = read_request(JobsRequest, once(request.query_params.multi_items()))
        page = await store.page(wanted.limit, wanted.after)
        return JSONResponse(_listed(page).to_dict())

    @router.get(
        "/{job_id}",
        operation_id="get_job",
        summary="Tell about a stored job",
        description="Its status is `queued`, `running`, or one of `succeeded`, `failed`, "
        "`cancelled` and `expired`, after which nothing happens any more. What went wrong stands "
        "in `error` and `code`, as every other door tells it.",
        response_model=JobAnswer,
        responses={
            200: {"description": "The job as it is now", "content": _example(_SUCCEEDED)},
            **problems.described("not_found", "internal", "shutting_down"),
        },
        openapi_extra=_OF_JOB,
    )
    async def get(request: Request) -> Response:
        return JSONResponse(_known_answer(await store.get(_id_in(request))).to_dict())

    @router.get(
        "/{job_id}/events",
        operation_id="get_job_events",
        summary="Listen to a stored job",
        description="Everything that has happened to the job and will happen, as server-sent "
        "events, up to its end. Who was cut off sends the number of the last event heard in "
        "`Last-Event-ID` and gets those after it; browsers do so by themselves. Where nothing is "
        "left to be told the answer is 204, after which they do not ask again.",
        responses={
            200: {
                "description": "The events",
                "content": {EVENT_STREAM: {"schema": _EVENT_SCHEMA, "example": _EVENTS}},
            },
            204: {"description": "The job has ended and all has been told"},
            **problems.described("not_found", "invalid_parameter", "internal", "shutting_down"),
        },
        response_class=StreamingResponse,
        openapi_extra={
            "parameters": [
                _JOB_ID,
                {
                    "name": _LAST_EVENT_ID,
                    "in": "header",
                    "description": "The number of the last event that was heard",
                    "schema": {"type": "integer", "minimum": 0, "maximum": 10**18 - 1},
                },
            ]
        },
    )
    async def events(request: Request) -> Response:
        job_id, last = _id_in(request), _last_event_id(request)
        job = await store.get(job_id)
        if job.state.is_final and not [event async for event in store.events_after(job_id, last)]:
            return Response(status_code=204)
        told = _told(store.events_after(job_id, last))
        stream = kept_alive(told, closing, keep_alive_s)
        return StreamingResponse(stream, media_type=EVENT_STREAM)

    @router.get(
        "/{job_id}/content",
        operation_id="get_job_content",
        summary="Fetch the picture of a stored job",
        description="The edited picture as PNG, once the job has succeeded.",
        responses={
            200: {
                "description": "The edited picture",
                "content": {
                    "image/png": {
                        "schema": {"type": "string", "format": "binary"},
                        "example": "(bytes)",
                    }
                },
            },
            **problems.described("not_found", "job_conflict", "internal", "shutting_down"),
        },
        response_class=Response,
        openapi_extra=_OF_JOB,
    )
    async def content(request: Request) -> Response:
        data = await store.read_result(_id_in(request))
        headers = {"Content-Disposition": 'inline; filename="edited.png"'}
        return Response(data, headers=headers, media_type="image/png")

    @router.post(
        "/{job_id}/cancel",
        operation_id="cancel_job",
        summary="Withdraw a stored job",
        description="A job that waits is not begun, one that runs stops within a step. A job that "
        "has ended stays as it is.",
        response_model=JobAnswer,
        responses={
            200: {"description": "The job as it is now", "content": _example(_CANCELLED)},
            **problems.described("not_found", "internal", "shutting_down", "no_space"),
        },
        openapi_extra=_OF_JOB,
    )
    async def cancel(request: Request) -> Response:
        return JSONResponse(_known_answer(await store.cancel(_id_in(request))).to_dict())

    @router.delete(
        "/{job_id}",
        operation_id="delete_job",
        summary="Forget a stored job",
        description="Removes the job with its pictures. One that runs has to be cancelled first.",
        status_code=204,
        responses={
            204: {"description": "There is no such job any more"},
            **problems.described(
                "not_found", "job_conflict", "internal", "shutting_down", "no_space"
            ),
        },
        openapi_extra=_OF_JOB,
    )
    async def delete(request: Request) -> Response:
        await store.delete(_id_in(request))
        return Response(status_code=204)

    return router


async def _asked(
    request: Request, service: EditService, store: JobStore
) -> tuple[str, Work[object, Job]]:
    """The digest of what a request asks for, and the work that accepts it."""
    if is_json(request):
        values = await read_json(request)
        parts = [(name, json.dumps(value).encode()) for name, value in values.items()]
        return digest_of(parts), lambda _: accept_generation(service, store, values)
    form = await read_form(request)

    async def accept(_: Tell[object]) -> Job:
        return await accept_job(service, store, form.picture, form.fields, form.mask)

    return digest_of(form.parts()), accept


def _bodies(defaults: Mapping[str, object]) -> dict[str, Any]:
    """What a job is asked for by, as OpenAPI describes it."""
    body = form_body(defaults)
    body["content"] |= json_content(
        GeneratePictureRequest, defaults, {"prompt": "a red fox in the snow", "seed": 42}
    )
    return body


def _id_in(request: Request) -> str:
    # Not a parameter of the route's function: its description would promise answers of FastAPI's.
    return str(request.path_params["job_id"])


def _last_event_id(request: Request) -> int:
    given = request.headers.get(_LAST_EVENT_ID, "0")
    if not re.fullmatch("[0-9]{1,18}", given):
        raise InvalidParameterError(f"{_LAST_EVENT_ID} must be the number of an event")
    return int(given)


async def _told(events: AsyncIterator[JobEvent]) -> AsyncIterator[str]:
    """The events as text, as long as there is somebody to tell them."""
    with contextlib.suppress(JobNotFoundError, ShuttingDownError):
        async for event in events:
            yield f"id: {event.number}\ndata: {json.dumps(_event(event).to_dict())}\n\n"


def _answer(job: Job) -> JobAnswer:
    kept = {name: value for name, value in (job.answer or {}).items() if name != "status"}
    return JobAnswer.model_validate(
        {
            "id": job.id,
            "status": job.state,
            "created_at": job.created_at,
            "started_at": job.started_at,
            "finished_at": job.finished_at,
            "position": job.position,
            "progress": _progress(job.progress) if job.state is JobState.RUNNING else None,
            "request": dict(job.request),
            **kept,
        }
    )


def _known_answer(job: Job) -> JobAnswer:
    """The same for a job that has been stored before; one that cannot be read counts as none."""
    try:
        return _answer(job)
    except ValidationError as error:
        log.error(
            "the stored job %s does not hold what a job holds (%d faults) and is left out",
            *(job.id, error.error_count()),
        )
        raise JobNotFoundError(job.id) from None


def _listed(page: JobPage) -> JobsAnswer:
    jobs = []
    for job in page.jobs:
        with contextlib.suppress(JobNotFoundError):
            jobs.append(_known_answer(job))
    return JobsAnswer(
        data=jobs,
        has_more=page.has_more,
        first_id=jobs[0].id if jobs else None,
        last_id=page.jobs[-1].id if page.jobs else None,
    )


def _event(event: JobEvent) -> JobEventAnswer:
    return JobEventAnswer(at=event.at, status=event.state, progress=_progress(event.progress))


def _progress(progress: Progress | None) -> JobProgress | None:
    if progress is None:
        return None
    phase = progress.phase.value
    if progress.phase is Phase.QUEUED:
        return JobProgress(phase=phase, position=progress.step)
    if not progress.total:
        return JobProgress(phase=phase)
    return JobProgress(phase=phase, step=progress.step, total=progress.total)


def _query() -> list[dict[str, Any]]:
    """The query of the list, as OpenAPI describes it."""
    properties = JobsRequest.model_json_schema()["properties"]
    return [
        {
            "name": name,
            "in": "query",
            "description": schema.pop("description"),
            "schema": without_null(schema),
        }
        for name, schema in properties.items()
    ]
