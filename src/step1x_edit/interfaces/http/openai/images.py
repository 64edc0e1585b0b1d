"""The routes of OpenAI's Images, for its clients.

`requests` parses the request, `edits` makes the pictures, `answers` renders them. A request that a
client repeats after a time-out is not run twice (`idempotency`). Failures are raised, and
`problems` renders them in OpenAI's form.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from step1x_edit.errors import ModelNotFoundError
from step1x_edit.interfaces.http import openapi, sse
from step1x_edit.interfaces.http.idempotency import (
    KEY,
    REPLAYED,
    Runs,
    identity_of,
    may_be_known,
    unless_gone,
)
from step1x_edit.interfaces.http.openai.answers import render, stream
from step1x_edit.interfaces.http.openai.edits import (
    Event,
    ImageEdits,
    ImageRequest,
    ImagesAnswer,
    Linked,
)
from step1x_edit.interfaces.http.openai.requests import (
    CONTENT_PATH,
    EDITS_PATH,
    GENERATIONS_PATH,
    MODEL,
    MODELS_PATH,
    Sent,
    check_model,
    names_of,
    new_size,
    read_edit,
    read_generation,
    understood,
)
from step1x_edit.interfaces.http.shelf import Shelf
from step1x_edit.interfaces.pursuits import Work
from step1x_edit.schemas.openai import ImageEditRequest, ImageGenerationRequest
from step1x_edit.service.service import EditService
from step1x_edit.settings import Settings

KEEP_ALIVE_S: Final = 10.0  # proxies and clients expect a heartbeat every 15 s

_LINKED_S: Final = 3600.0
_LINKED_BYTES: Final = 256 * 1024 * 1024
_MOST_PICTURES: Final = 10  # pictures of one answer, all of which can be downloaded
_MOST_LINKED: Final = 1000
_UNTIL_HEARD_S: Final = 1.0  # from the head of a stream until its client must read


def image_routes(
    service: EditService, settings: Settings, runs: Runs, keep_alive_s: float = KEEP_ALIVE_S
) -> APIRouter:
    """The routes under /v1/images and /v1/models; a repeated request finds its work in `runs`."""
    linked: Linked = Shelf(_LINKED_S, _LINKED_BYTES, _MOST_PICTURES, _MOST_LINKED)
    edits = ImageEdits(service, settings.limits, linked)
    images = _Images(service, edits, runs, keep_alive_s)
    models = _Models(service, int(time.time()))
    router = APIRouter(tags=["OpenAI Images"])
    router.post(EDITS_PATH, **openapi.EDIT_IMAGE_OPENAI)(images.edit)
    router.post(GENERATIONS_PATH, **openapi.GENERATE_IMAGE_OPENAI)(images.generate)
    router.get(CONTENT_PATH, **openapi.GET_IMAGE_CONTENT)(images.content)
    router.get(MODELS_PATH, **openapi.LIST_MODELS)(models.list_models)
    router.get(f"{MODELS_PATH}/{{model}}", **openapi.GET_MODEL)(models.get)
    return router


@dataclass(frozen=True)
class _Images:
    service: EditService
    edits: ImageEdits
    runs: Runs
    keep_alive_s: float

    async def edit(self, request: Request) -> Response:
        if not may_be_known(request):
            await self.service.check_room()  # before reading the upload
        sent = await read_edit(request)
        asked = understood(ImageEditRequest, sent.fields)
        return await self._answer(request, sent, asked, partial(self.edits.edit, sent, asked))

    async def generate(self, request: Request) -> Response:
        if not may_be_known(request):
            await self.service.check_room()
        sent = await read_generation(request)
        asked = understood(ImageGenerationRequest, sent.fields)
        new_size(asked)  # raises errors before the stream begins
        return await self._answer(request, sent, asked, partial(self.edits.generate, asked))

    async def content(self, request: Request) -> Response:
        found = self.edits.linked.get(str(request.path_params["image_id"]))
        if found is None:
            raise HTTPException(404, "There is no picture with this id, or it has expired.")
        data, media_type = found
        name = f"edited.{media_type.partition('/')[2]}"
        headers = {"Content-Disposition": f'inline; filename="{name}"'}
        return Response(data, headers=headers, media_type=media_type)

    async def _answer(
        self, request: Request, sent: Sent, asked: ImageRequest, work: Work[Event, ImagesAnswer]
    ) -> Response:
        """Do the work once, and answer with all pictures or with a stream of events."""
        check_model(self.service, asked.model)
        # OpenAI's clients repeat a request only before its stream begins, which is soon.
        is_named = KEY in request.headers or not asked.stream
        run, was_there = self.runs.find(
            identity_of(request, sent.digest) if is_named else None,
            work,
            lambda answer: answer.size,
            grace_s=_UNTIL_HEARD_S if asked.stream else 0.0,
        )
        headers = REPLAYED if was_there else {}
        with run.heard():
            if not asked.stream:
                answer = await unless_gone(request, run.result())
                # The guard has checked the Host.
                base_url = f"{request.url.scheme}://{request.headers['host']}"
                return JSONResponse(render(answer, asked, base_url), headers=headers)
            await unless_gone(request, run.begun())
        events = stream(run, asked, self.keep_alive_s)
        return StreamingResponse(events, media_type=sse.EVENT_STREAM, headers=headers)


@dataclass(frozen=True)
class _Models:
    service: EditService
    started: int

    async def list_models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(MODEL)]})

    async def get(self, request: Request) -> Response:
        name = str(request.path_params["model"])
        if name not in names_of(self.service):
            raise ModelNotFoundError(f"{name!r}; {MODELS_PATH} lists what there is")
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        status = self.service.status().gpu_status
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": MODEL,
            "version": status.model,
            "location": status.model_location,
        }
