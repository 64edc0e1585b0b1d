"""The REST routes of stored jobs: a picture in now, a picture out later.

A job takes the same form as `/api/edit`. Clients poll it by its id or receive server-sent events.
`jobs` knows how jobs are stored, the service how pictures are edited; `job_operation` joins them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Final

from fastapi import APIRouter
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from step1x_edit.channel import Phase, Progress
from step1x_edit.errors import (
    InvalidParameterError,
    JobNotFoundError,
    ShuttingDownError,
)
from step1x_edit.interfaces.http import openapi
from step1x_edit.interfaces.http.forms import is_json, once, read_form, read_json
from step1x_edit.interfaces.http.idempotency import (
    REPLAYED,
    Runs,
    digest_of,
    identity_of,
    may_be_known,
)
from step1x_edit.interfaces.http.openapi import LAST_EVENT_ID
from step1x_edit.interfaces.http.sse import EVENT_STREAM, KEEP_ALIVE_S, kept_alive
from step1x_edit.interfaces.pursuits import Notify, Work
from step1x_edit.schemas.answers import (
    JobAnswer,
    JobEventAnswer,
    JobProgress,
    JobResult,
    JobsAnswer,
    JobState,
)
from step1x_edit.schemas.requests import JobsRequest, read_request
from step1x_edit.service.editor import Reporter
from step1x_edit.service.job_runner import Operation
from step1x_edit.service.job_store import Job, JobEvent, JobInput, JobPage, JobStore
from step1x_edit.service.records import with_seed
from step1x_edit.service.service import EditService

log = logging.getLogger(__name__)

JOBS_PATH: Final = "/v1/jobs"

_JOB_BYTES: Final = 8 * 1024  # of a job in memory, without its picture


# --- the work -------------------------------------------------------------------------------------


def job_operation(service: EditService) -> Operation:
    """The work of a stored job: the same edit as for a client that waits for it."""

    async def work(
        given: JobInput,
        request: Mapping[str, object],
        report: Reporter,
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


# --- the routes -----------------------------------------------------------------------------------


def job_routes(
    service: EditService,
    store: JobStore,
    runs: Runs,
    closing: asyncio.Event,
    keep_alive_s: float = KEEP_ALIVE_S,
) -> APIRouter:
    """The routes under /v1/jobs, to be called while the store is open.

    A repeated request with the same `Idempotency-Key` finds its job through `runs`. Streams of
    events end if `closing` is set; their clients may continue with the next server.
    """
    jobs = _Jobs(service, store, runs, closing, keep_alive_s)
    router = APIRouter(prefix=JOBS_PATH, tags=["Stored jobs"])
    router.post("", **openapi.CREATE_JOB)(jobs.create)
    router.get("", **openapi.LIST_JOBS)(jobs.list_jobs)
    router.get("/{job_id}", **openapi.GET_JOB)(jobs.get)
    router.get("/{job_id}/events", **openapi.GET_JOB_EVENTS)(jobs.events)
    router.get("/{job_id}/content", **openapi.GET_JOB_CONTENT)(jobs.content)
    router.post("/{job_id}/cancel", **openapi.CANCEL_JOB)(jobs.cancel)
    router.delete("/{job_id}", **openapi.DELETE_JOB)(jobs.delete)
    return router


@dataclass(frozen=True)
class _Jobs:
    service: EditService
    store: JobStore
    runs: Runs
    closing: asyncio.Event
    keep_alive_s: float

    async def create(self, request: Request) -> Response:
        if not may_be_known(request):
            await self.store.check_room()  # before reading the upload
        digest, accept = await self._asked(request)
        run, was_there = self.runs.find(identity_of(request, digest), accept, lambda _: _JOB_BYTES)
        with run.heard():
            job = await run.result()
        headers = {"Location": f"{JOBS_PATH}/{job.id}", **(REPLAYED if was_there else {})}
        answer = _answer(job)
        warning = self.service.time_warning(answer.request)
        return JSONResponse(answer.model_copy(update={"warning": warning}).to_dict(), 202, headers)

    async def list_jobs(self, request: Request) -> Response:
        wanted = read_request(JobsRequest, once(request.query_params.multi_items()))
        page = await self.store.page(wanted.limit, wanted.after)
        return JSONResponse(_listed(page).to_dict())

    async def get(self, request: Request) -> Response:
        return JSONResponse(_known_answer(await self.store.get(_id_in(request))).to_dict())

    async def events(self, request: Request) -> Response:
        job_id, last = _id_in(request), _last_event_id(request)
        job = await self.store.get(job_id)
        if job.state.is_final and not [_ async for _ in self.store.events_after(job_id, last)]:
            return Response(status_code=204)
        events = _events_of(self.store.events_after(job_id, last))
        stream = kept_alive(events, self.closing, self.keep_alive_s)
        return StreamingResponse(stream, media_type=EVENT_STREAM)

    async def content(self, request: Request) -> Response:
        data = await self.store.read_result(_id_in(request))
        headers = {"Content-Disposition": 'inline; filename="edited.png"'}
        return Response(data, headers=headers, media_type="image/png")

    async def cancel(self, request: Request) -> Response:
        return JSONResponse(_known_answer(await self.store.cancel(_id_in(request))).to_dict())

    async def delete(self, request: Request) -> Response:
        await self.store.delete(_id_in(request))
        return Response(status_code=204)

    async def _asked(self, request: Request) -> tuple[str, Work[object, Job]]:
        """The digest of a request's content, and the work that stores it as a job.

        A missing seed is drawn when the job is stored, so that a job that runs again after a
        restart makes the same picture.
        """
        if is_json(request):
            values = await read_json(request)
            parts = [(name, json.dumps(value).encode()) for name, value in values.items()]

            async def accept_generation(_: Notify[object]) -> Job:
                asked = with_seed(self.service.read_generate_picture(values))
                self.service.check_time(asked)
                return await self.store.create(b"", asked.model_dump(mode="json"))

            return digest_of(parts), accept_generation
        form = await read_form(request)

        async def accept_edit(_: Notify[object]) -> Job:
            asked = with_seed(self.service.read_picture(form.fields))
            self.service.check_time(asked)
            await self.service.check_picture(form.picture, form.mask, asked)
            return await self.store.create(form.picture, asked.model_dump(mode="json"), form.mask)

        return digest_of(form.parts()), accept_edit


def _id_in(request: Request) -> str:
    # Not a parameter of the route's function: its description would promise answers of FastAPI's.
    return str(request.path_params["job_id"])


def _last_event_id(request: Request) -> int:
    given = request.headers.get(LAST_EVENT_ID, "0")
    if not re.fullmatch("[0-9]{1,18}", given):
        raise InvalidParameterError(f"{LAST_EVENT_ID} must be the number of an event")
    return int(given)


async def _events_of(events: AsyncIterator[JobEvent]) -> AsyncIterator[str]:
    """The events as text; the stream ends if the job is deleted or the server shuts down."""
    with contextlib.suppress(JobNotFoundError, ShuttingDownError):
        async for event in events:
            progress = _progress(event.progress)
            answer = JobEventAnswer(at=event.at, status=event.state, progress=progress)
            yield f"id: {event.number}\ndata: {json.dumps(answer.to_dict())}\n\n"


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
    """The same for a job read from the disk; raises JobNotFoundError if its record is damaged."""
    try:
        return _answer(job)
    except ValidationError as error:
        log.error(
            "the stored job %s is damaged (%d faults) and is left out",
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


def _progress(progress: Progress | None) -> JobProgress | None:
    if progress is None:
        return None
    phase = progress.phase.value
    if progress.phase is Phase.QUEUED:
        return JobProgress(phase=phase, position=progress.step)
    if not progress.total:
        return JobProgress(phase=phase)
    return JobProgress(phase=phase, step=progress.step, total=progress.total)
