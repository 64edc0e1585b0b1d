"""The REST route of an edit: a picture in, a picture out.

`forms` reads the request; the service checks its fields. Failures are raised and rendered by
`problems`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Final

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from step1x_edit.interfaces.http import openapi
from step1x_edit.interfaces.http.forms import read_form
from step1x_edit.interfaces.http.idempotency import (
    REPLAYED,
    Runs,
    digest_of,
    identity_of,
    may_be_known,
    unless_gone,
)
from step1x_edit.interfaces.pursuits import Notify
from step1x_edit.pictures.output_formats import OUTPUT_FORMATS
from step1x_edit.schemas.answers import PictureAnswer, RoundPicture
from step1x_edit.service.service import EditedPicture, EditService

_JSON: Final = "application/json"
_SUFFIX_OF: Final = {
    output.media_type: suffix
    for suffix, output in OUTPUT_FORMATS.items()
    if suffix not in (".jpeg", ".tif")
}
_PNG: Final = "image/png"
_ANY_IMAGE: Final = frozenset({"*/*", "image/*", _PNG})
_ANY_JSON: Final = frozenset({"application/*", _JSON})


def edit_routes(service: EditService, runs: Runs) -> APIRouter:
    """The route /api/edit; a repeated request finds its edit through `runs`."""
    router = APIRouter(prefix="/api", tags=["Editing"])
    router.post("/edit", **openapi.EDIT_PICTURE)(_Edits(service, runs).edit)
    return router


@dataclass(frozen=True)
class _Edits:
    service: EditService
    runs: Runs

    async def edit(self, request: Request) -> Response:
        if not may_be_known(request):
            await self.service.check_room()  # before reading the upload
        wanted = _wanted(request.headers.get("accept", ""))
        form = await read_form(request)
        asked = self.service.read_picture(form.fields)

        async def work(_: Notify[object]) -> EditedPicture:
            suffix = _SUFFIX_OF.get(wanted, ".png")
            edited = await self.service.edit_picture(
                form.picture, asked, suffix=suffix, mask=form.mask
            )
            return replace(edited, source=None, original=None)  # not kept for a repeated request

        digest = digest_of([*form.parts(), ("accept", wanted.encode())])
        run, was_there = self.runs.find(identity_of(request, digest), work, _size)
        with run.heard():
            edited = await unless_gone(request, run.result())
        return _rendered(edited, wanted, REPLAYED if was_there else {})


def _rendered(edited: EditedPicture, wanted: str, headers: Mapping[str, str]) -> Response:
    """The picture as the requested kind of answer."""
    headers = {
        "X-Seed": str(edited.metadata.seed),
        "X-Processing-Time": f"{edited.processing_time:.2f}",
        "Vary": "Accept",
        **headers,
    }
    if edited.metadata.changed_share is not None:
        headers["X-Changed-Share"] = f"{edited.metadata.changed_share:.4f}"
    if wanted == _JSON:
        return JSONResponse(_answer(edited).to_dict(), headers=headers)
    name = f"edited{_SUFFIX_OF[wanted]}"
    headers["Content-Disposition"] = f'inline; filename="{name}"'
    return Response(edited.data, headers=headers, media_type=wanted)


def _size(edited: EditedPicture) -> int:
    return len(edited.data) + edited.picture.pixels.nbytes + sum(map(len, edited.rounds))


def _wanted(accept: str) -> str:
    """The kind of answer that the client prefers; raises 406 if it accepts none of ours."""
    named = []
    for part in accept.split(","):
        kind, _, parameters = part.partition(";")
        if kind.strip():
            named.append((_quality(parameters), kind.strip().lower()))
    if not named:
        return _PNG
    for quality, kind in sorted(named, key=lambda pair: -pair[0]):
        if quality <= 0:
            break
        if kind in _ANY_IMAGE:
            return _PNG
        if kind in _ANY_JSON:
            return _JSON
        if kind in _SUFFIX_OF:
            return kind
    raise HTTPException(
        HTTPStatus.NOT_ACCEPTABLE, f"Accept must name one of {', '.join([*_SUFFIX_OF, _JSON])}."
    )


def _quality(parameters: str) -> float:
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


def _answer(edited: EditedPicture) -> PictureAnswer:
    return PictureAnswer(
        processing_time=edited.processing_time,
        metadata=edited.metadata,
        media_type="image/png",
        image_base64=_base64(edited.data),
        rounds=[RoundPicture(image=_base64(small)) for small in edited.rounds] or None,
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
