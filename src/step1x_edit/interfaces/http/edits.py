"""The REST face of an edit: a picture in, a picture out.

Uploads are read into memory that spills into files without names, which end with the request. What
a form may hold is what `PictureRequest` says; its fields reach the service unread. Failures leave
as exceptions and become answers in `problems`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, TypeVar

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from step1x_edit.errors import (
    EditCancelledError,
    InvalidParameterError,
)
from step1x_edit.interfaces import json_bodies
from step1x_edit.interfaces.http import problems
from step1x_edit.interfaces.http.idempotency import (
    KEY_PARAMETER,
    REPLAYED,
    Runs,
    Tell,
    digest_of,
    identity_of,
    may_be_known,
    unless_gone,
)
from step1x_edit.pictures.output_formats import OUTPUT_FORMATS
from step1x_edit.schemas.requests import (
    EditMetadata,
    PictureAnswer,
    PictureRequest,
    RoundPicture,
)
from step1x_edit.service.service import EditedPicture, EditService

T = TypeVar("T")

FILE: Final = "file"
FILE_DESCRIPTION: Final = "The picture to edit: PNG, JPEG, WebP, AVIF, TIFF, BMP or GIF"
MASK: Final = "mask"
MASK_DESCRIPTION: Final = (
    "A picture of the same size: what is white (or, if it has transparency, transparent) may "
    "change, the rest keeps its exact pixels. Without it the whole picture may change"
)
_UPLOADS: Final = (FILE, MASK)
_MAX_FIELDS: Final = 20
_MAX_FIELD_BYTES: Final = 64 * 1024

_JSON: Final = "application/json"
_SUFFIX_OF: Final = {
    output.media_type: suffix
    for suffix, output in OUTPUT_FORMATS.items()
    if suffix not in (".jpeg", ".tif")
}
_PNG: Final = "image/png"
_ANY_IMAGE: Final = frozenset({"*/*", "image/*", _PNG})
_ANY_JSON: Final = frozenset({"application/*", _JSON})
_IMAGE: Final = {"schema": {"type": "string", "format": "binary"}}

_EDIT_DESCRIPTION: Final = """\
Edits the picture as the prompt says and answers with the result, in the size of the input; \
nothing is stored here. The answer is `image/png` unless `Accept` asks for another kind: \
`image/jpeg`, `image/webp`, `image/avif`, `image/tiff`, `image/bmp`, or `application/json` for \
the picture in base64 together with what it was made with. Any other kind is 406. The seed that \
repeats the picture is in `X-Seed`; with a `mask`, `X-Changed-Share` is the share of the pixels \
that changed. Closing the connection cancels the edit."""

# What the description shows.
METADATA: Final = EditMetadata(
    prompt="change to night scene",
    num_steps=28,
    guidance_scale=6.0,
    size_level=1024,
    seed=42,
    gpu_location="GPU",
    gpu_memory_gb=41.9,
    model="v1.1",
    device="cuda:0",
    width=1536,
    height=1024,
)
_EDITED: Final = PictureAnswer(
    processing_time=15.3,
    metadata=METADATA,
    media_type="image/png",
    image_base64="iVBORw0KGgo…",
)


def _example(answer: PictureAnswer) -> dict[str, Any]:
    return {_JSON: {"example": answer.to_dict()}}


# --- the picture ----------------------------------------------------------------------------------


def edit_routes(service: EditService, runs: Runs) -> APIRouter:
    """The routes under /api; an edit that is asked for again is one of `runs`."""
    router = APIRouter(prefix="/api")

    @router.post(
        "/edit",
        operation_id="edit_picture",
        summary="Edit a picture",
        description=_EDIT_DESCRIPTION,
        responses={
            200: {
                "model": PictureAnswer,
                "description": "The edited picture: a PNG, unless `Accept` asks for another kind",
                "headers": {
                    "X-Seed": {
                        "description": "The seed that repeats the picture",
                        "schema": {"type": "integer"},
                    },
                    "X-Processing-Time": {
                        "description": "Seconds that the edit took",
                        "schema": {"type": "number"},
                    },
                    "X-Changed-Share": {
                        "description": "Share of the pixels that changed, 0 to 1, if there was a "
                        "mask",
                        "schema": {"type": "number", "minimum": 0, "maximum": 1},
                    },
                },
                # The first is the default, and what generated clients expect.
                "content": {kind: dict(_IMAGE) for kind in _SUFFIX_OF} | _example(_EDITED),
            },
            **problems.described(
                "image_too_large",
                "unsupported_image",
                "invalid_parameter",
                "corrupt_image",
                "idempotency_key",
                "internal",
                "queue_full",
                "model_unavailable",
                "out_of_memory",
                "deadline_exceeded",
            ),
            **problems.described_status(HTTPStatus.NOT_ACCEPTABLE),
        },
        response_class=Response,
        tags=["Editing"],
        openapi_extra={
            "requestBody": form_body(service.defaults),
            "parameters": [KEY_PARAMETER],
        },
    )
    async def edit(request: Request) -> Response:
        if not may_be_known(request):
            await service.check_room()  # before the upload is read
        wanted = _wanted(request.headers.get("accept", ""))
        form = await read_form(request)
        suffix = _SUFFIX_OF.get(wanted, ".png")
        asked = service.read_picture(form.fields)

        async def work(tell: Tell[object]) -> EditedPicture:
            return await service.edit_picture(form.picture, asked, suffix=suffix, mask=form.mask)

        digest = digest_of([*form.parts(), ("accept", wanted.encode())])
        run, was_there = runs.find(identity_of(request, digest), work, _size)
        with run.heard():
            edited = await unless_gone(request, run.result())
        headers = {
            "X-Seed": str(edited.metadata.seed),
            "X-Processing-Time": f"{edited.processing_time:.2f}",
            "Vary": "Accept",
            **(REPLAYED if was_there else {}),
        }
        if edited.metadata.changed_share is not None:
            headers["X-Changed-Share"] = f"{edited.metadata.changed_share:.4f}"
        if wanted == _JSON:
            return JSONResponse(_answer(edited).to_dict(), headers=headers)
        headers["Content-Disposition"] = f'inline; filename="edited{suffix}"'
        return Response(edited.data, headers=headers, media_type=wanted)

    return router


@dataclass(frozen=True)
class Form:
    """What a caller has sent: the uploads, and the other fields as they came."""

    picture: bytes
    mask: bytes | None
    fields: dict[str, object]

    def parts(self) -> list[tuple[str, bytes]]:
        """Everything that a digest of the request covers."""
        texts = [(name, str(value).encode()) for name, value in self.fields.items()]
        return [(FILE, self.picture), (MASK, self.mask or b""), *texts]


async def read_form(request: Request) -> Form:
    """Read a form whose fields are given once each."""
    if content_type(request) != "multipart/form-data":
        raise HTTPException(415, "Send a form, as multipart/form-data.")
    try:
        async with request.form(
            max_files=3, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES
        ) as form:
            fields = _fields(form)
            picture = await _uploaded(fields.pop(FILE, None), FILE)
            mask = await _uploaded(fields.pop(MASK, None), MASK)
            if picture is None:
                raise InvalidParameterError(f"{FILE} is missing")
            return Form(picture, mask, fields)
    except ClientDisconnect:
        raise EditCancelledError from None
    except HTTPException as error:
        raise InvalidParameterError(f"the form cannot be read: {error.detail}") from None


def content_type(request: Request) -> str:
    """What the body says that it is, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def is_json(request: Request) -> bool:
    """Whether the body says that it is JSON."""
    return content_type(request) == _JSON


async def read_json(request: Request) -> dict[str, object]:
    """Read the fields of a JSON object."""
    return await json_bodies.parse(await json_bodies.read_text(request))


async def _uploaded(value: object, name: str) -> bytes | None:
    if value is None:
        return None
    if not isinstance(value, UploadFile):
        raise InvalidParameterError(f"{name} must be an uploaded file")
    return await value.read()


def once(items: Iterable[tuple[str, T]]) -> dict[str, T]:
    """The items by name; raises InvalidParameterError if one comes twice."""
    found: dict[str, T] = {}
    for name, value in items:
        if name in found:
            raise InvalidParameterError(f"{name!r} is given twice")
        found[name] = value
    return found


def _fields(form: FormData) -> dict[str, Any]:
    fields = once(form.multi_items())
    for name, value in fields.items():
        if name not in _UPLOADS and isinstance(value, UploadFile):
            raise InvalidParameterError(
                f"{name!r} takes no file; upload the picture as {FILE!r} and a mask as {MASK!r}"
            )
    return fields


def _size(edited: EditedPicture) -> int:
    return len(edited.data) + edited.picture.pixels.nbytes + sum(map(len, edited.rounds))


def _wanted(accept: str) -> str:
    """The kind to answer with, of those that the caller accepts; raises 406 if none is ours."""
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


def without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of something that is sent as text, where null is said by leaving it out."""
    kinds = schema.pop("anyOf", [])
    for kind in kinds:
        if kind != {"type": "null"}:
            schema |= kind
    return schema


def in_one_text(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field of a form, which holds a list as one text."""
    if schema.get("type") != "array":
        return schema
    description = f"{schema['description']}. In a form: separated by commas, or a list in JSON"
    return {"type": "string", "title": schema["title"], "description": description}


def form_body(defaults: Mapping[str, object]) -> dict[str, Any]:
    """The form, as OpenAPI describes it: the picture, and the fields of the schema."""
    schema = PictureRequest.model_json_schema()
    for name, default in defaults.items():
        schema["properties"][name]["default"] = default
    schema["properties"] = {
        name: in_one_text(without_null(field)) for name, field in schema["properties"].items()
    }
    schema["properties"] = {
        FILE: {"type": "string", "format": "binary", "description": FILE_DESCRIPTION},
        MASK: {"type": "string", "format": "binary", "description": MASK_DESCRIPTION},
        **schema["properties"],
    }
    schema["required"] = [FILE, *schema["required"]]
    schema["example"] = {"prompt": "change to night scene", "seed": 42}
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def json_content(
    kind: type[BaseModel], defaults: Mapping[str, object], example: Mapping[str, object]
) -> dict[str, Any]:
    """A body in JSON, as OpenAPI describes it."""
    schema = kind.model_json_schema()
    for name, default in defaults.items():
        if name in schema["properties"]:
            schema["properties"][name]["default"] = default
    return {_JSON: {"schema": {**schema, "example": dict(example)}}}
