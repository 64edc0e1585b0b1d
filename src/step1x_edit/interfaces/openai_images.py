"""The face of OpenAI's Images: what their clients send is understood, what is told is true here.

Requests come as forms, or as JSON with the pictures in data URLs; nothing is ever fetched for a
caller. A field either has an effect, or a value that asks for nothing, or it is refused by name.
An edit that a client sends again because it heard nothing for long is not done again: `idempotency`
knows how. Failures leave as exceptions and get the form of this interface in `problems`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, TypeAlias

from fastapi import APIRouter
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from step1x_edit import images
from step1x_edit.channel import Progress
from step1x_edit.errors import (
    EditCancelledError,
    InternalError,
    InvalidParameterError,
    ModelNotFoundError,
    ServerBusyError,
    Step1XEditError,
)
from step1x_edit.images import OUTPUT_FORMATS, Limits, Picture, Pixels
from step1x_edit.interfaces import problems
from step1x_edit.interfaces.idempotency import (
    KEY,
    KEY_PARAMETER,
    REPLAYED,
    Run,
    Runs,
    Shelf,
    Tell,
    digest_of,
    identity_of,
    may_be_known,
    unless_gone,
)
from step1x_edit.interfaces.rest import FILE_DESCRIPTION, MASK_DESCRIPTION
from step1x_edit.schemas import (
    MAX_SEED,
    EditMetadata,
    ImageEditRequest,
    Parameter,
    PictureRequest,
    invalid_parameter,
    parameters_of,
)
from step1x_edit.service import EditedPicture, EditService, with_seed
from step1x_edit.settings import Settings

log = logging.getLogger(__name__)

EDITS_PATH: Final = "/v1/images/edits"
CONTENT_PATH: Final = "/v1/images/{image_id}/content"
MODELS_PATH: Final = "/v1/models"
MODEL: Final = "step1x-edit"
KEEP_ALIVE_S: Final = 10.0  # proxies and clients that wait for a sign want one every 15 s or so

_LINKED_S: Final = 3600.0
_LINKED_BYTES: Final = 256 * 1024 * 1024
_MOST_PICTURES: Final = 10  # of one answer, all of which can be fetched
_MOST_LINKED: Final = 1000
_UNTIL_HEARD_S: Final = 1.0  # between the head of a stream and the first who listens to it
_COME_BACK_S: Final = 1.0  # when the line is full in the middle of several pictures
_MAX_FILES: Final = 20  # theirs takes 16 pictures, and is to be told in words that we take one
MAX_FIELDS: Final = 40
MAX_FIELD_BYTES: Final = 64 * 1024

_PICTURES: Final = frozenset({"image", "image[]"})
_OF_OPENAI: Final = ("gpt-image-", "chatgpt-image-", "dall-e-")
_STEPS_OF: Final[Mapping[str, int]] = {"low": 10, "medium": 28, "high": 50}
_SAME: Final[Mapping[str, str]] = {
    "num_steps": "num_inference_steps",
    "true_cfg_scale": "guidance_scale",
}
_UNSUPPORTED: Final[Mapping[str, str]] = {
    "markup": "send a mask, or say in the prompt what to change",
    "complexity": "the model plans nothing",
    "frame_count": "the result is one picture",
    "frame_duration_ms": "the result is one picture",
    "svg": "the result is made of pixels",
    "url": "no URL is fetched; send the picture itself",
    "file_id": "no files are kept; send the picture itself",
}
_PARAMETERS: Final[Mapping[str, Parameter]] = parameters_of(ImageEditRequest)
_KNOWN: Final[Mapping[str, Parameter]] = {
    **_PARAMETERS,
    **{name: replace(_PARAMETERS[same], name=name) for name, same in _SAME.items()},
    **{name: Parameter(name, "", "", None) for name in ("image", "mask")},
}
_NOTHING_COUNTED: Final = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


# --- what is asked for ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sent:
    """What a caller has sent: the uploads, and the other fields as they came."""

    picture: bytes
    mask: bytes | None
    fields: Mapping[str, object]

    @property
    def digest(self) -> str:
        parts = [("image", self.picture), ("mask", self.mask or b"")]
        parts += [(name, json.dumps(value).encode()) for name, value in self.fields.items()]
        return digest_of(parts)


async def _read(request: Request) -> _Sent:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "application/json":
            return _read_json(await request.body())
        if kind == "multipart/form-data":
            return await _read_form(request)
    except ClientDisconnect:
        raise EditCancelledError from None
    raise HTTPException(415, "Send a form, as multipart/form-data, or JSON.")


async def _read_form(request: Request) -> _Sent:
    pictures: list[object] = []
    fields: dict[str, object] = {}
    try:
        async with request.form(
            max_files=_MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES
        ) as form:
            for name, value in form.multi_items():
                check_supported(name)
                if name in _PICTURES:
                    pictures.append(value)
                elif name in fields:
                    raise InvalidParameterError(f"{name!r} is given twice", param=name)
                elif isinstance(value, UploadFile) and name != "mask":
                    raise InvalidParameterError(f"{name!r} must be a text, not a file", param=name)
                else:
                    fields[name] = value
            picture = await _uploaded(_only(pictures, "image"), "image")
            mask = fields.pop("mask", None)
            return _Sent(picture, None if mask is None else await _uploaded(mask, "mask"), fields)
    except HTTPException as error:
        raise InvalidParameterError(f"the form cannot be read: {error.detail}") from None


async def _uploaded(value: object, name: str) -> bytes:
    if not isinstance(value, UploadFile):
        raise InvalidParameterError(
            f"{name} must be an uploaded file; no URL is fetched", param=name
        )
    return await value.read()


def json_fields(body: bytes) -> dict[str, object]:
    """The fields of a body in JSON; those that are null count as left out."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidParameterError("the body is no JSON that can be read") from None
    if not isinstance(values, dict):
        raise InvalidParameterError("the body must be a JSON object")
    fields = {name: value for name, value in values.items() if value is not None}
    for name in fields:
        check_supported(name)
    return fields


def _read_json(body: bytes) -> _Sent:
    fields = json_fields(body)
    pictures, mask = fields.pop("images", []), fields.pop("mask", None)
    if not isinstance(pictures, list):
        raise InvalidParameterError("images must be a list", param="images")
    picture = _in_data_url(_only(pictures, "images"), "images")
    return _Sent(picture, None if mask is None else _in_data_url(mask, "mask"), fields)


def _only(pictures: list[object], name: str) -> object:
    if not pictures:
        raise InvalidParameterError(f"{name} is missing", param=name)
    if len(pictures) > 1:
        raise InvalidParameterError(
            f"{name} must be one picture, got {len(pictures)}: the model takes no references",
            param=name,
        )
    return pictures[0]


def _in_data_url(value: object, name: str) -> bytes:
    """The bytes of `{"image_url": "data:image/png;base64,…"}`."""
    url = value.get("image_url") if isinstance(value, dict) and len(value) == 1 else None
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        raise InvalidParameterError(
            f"{name} must have an image_url that begins with 'data:' and holds base64, and nothing "
            "else; no other URL is fetched, and no files are kept",
            param=name,
        )
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidParameterError(f"{name} is no valid base64", param=name) from None


def check_supported(name: str) -> None:
    """Raise for a field that has a meaning elsewhere and none here."""
    if not name.isprintable():
        raise InvalidParameterError(f"{name[:60]!r} is unknown", param=name)
    why = _UNSUPPORTED.get(name.partition("[")[0])
    if why is not None:
        raise InvalidParameterError(f"{name!r} is not supported: {why}", param=name)


def understood(fields: Mapping[str, object]) -> ImageEditRequest:
    """The request that the fields make; complaints name a field as the caller did."""
    values: dict[str, object] = {}
    parameters = dict(_KNOWN)
    for name, value in fields.items():
        known = _SAME.get(name, name)
        if known in values:
            raise InvalidParameterError(f"{name} is given twice, by two names", param=name)
        values[known] = value
        if known in _PARAMETERS:
            parameters[known] = replace(_PARAMETERS[known], name=name)
    try:
        asked = ImageEditRequest.model_validate(values)
    except ValidationError as error:
        raise invalid_parameter(error, parameters) from None
    _check_together(asked)
    return asked


def _check_together(asked: ImageEditRequest) -> None:
    """Refuse what would have no effect, or two, beside the other fields."""
    if asked.output_format == "png" and asked.output_compression not in (None, 100):
        raise InvalidParameterError(
            "output_compression needs output_format jpeg, webp or avif: a PNG loses nothing",
            param="output_compression",
        )
    if asked.partial_images and not asked.stream:
        raise InvalidParameterError("partial_images needs stream=true", param="partial_images")
    if asked.stream and asked.n > 1:
        raise InvalidParameterError("n must be 1 with stream=true", param="n")
    if asked.stream and asked.response_format == "url":
        raise InvalidParameterError(
            "response_format must be b64_json with stream=true", param="response_format"
        )
    if asked.quality in _STEPS_OF and asked.num_inference_steps is not None:
        raise InvalidParameterError(
            "quality and num_inference_steps both choose the steps; give one", param="quality"
        )


def check_model(service: EditService, name: str) -> None:
    """Take our own name, that of the version that runs, and those that OpenAI's clients need."""
    if name not in _names(service) and not name.startswith(_OF_OPENAI):
        raise ModelNotFoundError(f"{name!r}; {MODELS_PATH} lists what there is")


def _names(service: EditService) -> set[str]:
    version = service.status().gpu_status.model
    return {MODEL} if version is None else {MODEL, version}


def request_of(service: EditService, asked: ImageEditRequest) -> PictureRequest:
    """The same in our own words; the operator's defaults for what is left out, and a seed."""
    return with_seed(
        service.read_picture(
            {
                "prompt": asked.prompt,
                "negative_prompt": asked.negative_prompt,
                "num_steps": _STEPS_OF.get(asked.quality, asked.num_inference_steps),
                "guidance_scale": asked.guidance_scale,
                "size_level": asked.size_level,
                "seed": asked.seed,
            }
        )
    )


# --- the work -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Made:
    """One picture of an answer."""

    image_id: str
    data: bytes
    media_type: str
    width: int
    height: int
    is_see_through: bool
    metadata: EditMetadata


@dataclass(frozen=True)
class _Answer:
    """All that came of a request, before it is put into words."""

    answer_id: str
    created: int
    seconds: float
    pictures: tuple[_Made, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(len(made.data) for made in self.pictures)


@dataclass(frozen=True)
class _Begun:
    """The edit is in the line: nothing is wrong with what was sent."""


@dataclass(frozen=True)
class _Partial:
    """What the picture looks like by now."""

    index: int
    created: int
    data: bytes
    width: int
    height: int


_Event: TypeAlias = _Begun | _Partial
_Linked: TypeAlias = Shelf[tuple[bytes, str]]


class _Edits:
    """Makes the pictures of a request, one after the other."""

    def __init__(self, service: EditService, limits: Limits, linked: _Linked) -> None:
        self._service = service
        self._limits = limits
        self._linked = linked

    async def make(self, sent: _Sent, asked: ImageEditRequest, tell: Tell[_Event]) -> _Answer:
        """Do all that is asked for; pictures that are to be linked can be fetched afterwards."""
        started = time.monotonic()
        size = await asyncio.to_thread(self._size, sent.picture, asked)
        first = request_of(self._service, asked)
        seed = first.seed or 0
        pictures = []
        for number in range(asked.n):
            request = first.model_copy(update={"seed": (seed + number) % (MAX_SEED + 1)})
            edited = await self._edit(sent, asked, request, tell, may_wait=number > 0)
            pictures.append(await asyncio.to_thread(_finished, edited, asked, size))
        if asked.response_format == "url":
            for made in pictures:
                self._linked.put(made.image_id, (made.data, made.media_type), len(made.data))
        return _Answer(
            answer_id=f"imgedit_{secrets.token_hex(12)}",
            created=int(time.time()),
            seconds=round(time.monotonic() - started, 2),
            pictures=tuple(pictures),
        )

    async def _edit(
        self,
        sent: _Sent,
        asked: ImageEditRequest,
        request: PictureRequest,
        tell: Tell[_Event],
        may_wait: bool,
    ) -> EditedPicture:
        """One edit, in its turn; a request that was let in is not refused in the middle."""
        while True:
            try:
                return await self._service.edit_picture(
                    sent.picture,
                    request,
                    _Teller(asked, tell),
                    suffix=_suffix(asked),
                    mask=sent.mask,
                    previews=asked.partial_images,
                )
            except ServerBusyError:
                if not may_wait:
                    raise
                await asyncio.sleep(_COME_BACK_S)

    def _size(self, data: bytes, asked: ImageEditRequest) -> tuple[int, int] | None:
        """What the result has to be resized to, if to anything."""
        if asked.size == "auto":
            return None
        width, height = map(int, asked.size.split("x"))
        picture = images.decode(data, self._limits)
        if (width, height) == (picture.width, picture.height):
            return None
        if width * height > self._limits.max_pixels:
            most = self._limits.max_pixels / 1e6
            raise InvalidParameterError(f"size may have {most:g} megapixels at most", param="size")
        # As near to the ratio as whole pixels allow.
        off = abs(width * picture.height - height * picture.width)
        if off >= max(picture.width, picture.height):
            fitting = max(1, round(width * picture.height / picture.width))
            raise InvalidParameterError(
                f"size must have the ratio of the picture, which is "
                f"{picture.width}x{picture.height}: auto, or {width}x{fitting}; got {asked.size}",
                param="size",
            )
        return width, height


class _Teller:
    """Tells of the progress of an edit what those who listen can show."""

    def __init__(self, asked: ImageEditRequest, tell: Tell[_Event]) -> None:
        self._asked = asked
        self._tell = tell
        self._has_begun = False
        self._seen: Pixels | None = None
        self._count = 0

    async def __call__(self, progress: Progress) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._tell(_Begun())
        preview = progress.preview
        if preview is None or preview is self._seen or self._count == self._asked.partial_images:
            return
        self._seen = preview
        data = await asyncio.to_thread(_encoded, Picture(preview), self._asked)
        height, width = preview.shape[:2]
        self._tell(_Partial(self._count, int(time.time()), data, width, height))
        self._count += 1


def _suffix(asked: ImageEditRequest) -> str:
    return f".{asked.output_format}"


def _encoded(picture: Picture, asked: ImageEditRequest) -> bytes:
    return images.encode(picture, _suffix(asked), quality=asked.output_compression)


def _finished(
    edited: EditedPicture, asked: ImageEditRequest, size: tuple[int, int] | None
) -> _Made:
    """The picture as it was asked for."""
    picture, data, suffix = edited.picture, edited.data, _suffix(asked)
    if asked.background == "opaque" and picture.alpha is not None:
        picture = images.flattened(picture)
    if size is not None:
        picture = images.resized(picture, *size)
        images.check_encodable(picture, suffix)
    if picture is not edited.picture or asked.output_compression is not None:
        record = images.read_edit_record(data)
        data = images.encode(picture, suffix, record, asked.output_compression)
    output = OUTPUT_FORMATS[suffix]
    return _Made(
        image_id=f"img_{secrets.token_urlsafe(24)}",
        data=data,
        media_type=output.media_type,
        width=picture.width,
        height=picture.height,
        is_see_through=picture.alpha is not None and output.carries_alpha,
        metadata=edited.metadata,
    )


# --- what is told ---------------------------------------------------------------------------------


def _told(answer: _Answer, asked: ImageEditRequest, base_url: str) -> dict[str, Any]:
    """The whole answer."""
    return {
        "created": answer.created,
        "data": [_told_of(made, asked, base_url) for made in answer.pictures],
        **_form_of(answer.pictures[0], asked),
        "usage": _NOTHING_COUNTED,
        **_about(answer),
    }


def _told_of(made: _Made, asked: ImageEditRequest, base_url: str) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if asked.response_format == "url":
        told["url"] = base_url + CONTENT_PATH.format(image_id=made.image_id)
    else:
        told["b64_json"] = _base64(made.data)
    return told | _how(made)


def _how(made: _Made) -> dict[str, Any]:
    """What repeats a picture, and what there is to say about it."""
    metadata = made.metadata
    told = {"seed": metadata.seed, "changed_share": metadata.changed_share}
    return {
        name: value
        for name, value in {**told, "warning": metadata.warning}.items()
        if value is not None
    }


def _form_of(made: _Made, asked: ImageEditRequest) -> dict[str, Any]:
    form = {
        "output_format": asked.output_format,
        "size": f"{made.width}x{made.height}",
        "background": "transparent" if made.is_see_through else "opaque",
    }
    return form | ({"quality": asked.quality} if asked.quality in _STEPS_OF else {})


def _about(answer: _Answer) -> dict[str, Any]:
    first = answer.pictures[0].metadata
    return {
        "id": answer.answer_id,
        "model": first.model,
        "num_inference_steps": first.num_steps,
        "guidance_scale": first.guidance_scale,
        "size_level": first.size_level,
        "inference_time_s": answer.seconds,
    }


def _told_partial(event: _Partial, asked: ImageEditRequest) -> str:
    return _sse(
        {
            "type": "image_edit.partial_image",
            "b64_json": _base64(event.data),
            "partial_image_index": event.index,
            "created_at": event.created,
            "size": f"{event.width}x{event.height}",
            "quality": asked.quality,
            "background": asked.background,
            "output_format": asked.output_format,
        }
    )


def _told_completed(answer: _Answer, asked: ImageEditRequest) -> str:
    made = answer.pictures[0]
    return _sse(
        {
            "type": "image_edit.completed",
            "b64_json": _base64(made.data),
            "created_at": answer.created,
            "quality": asked.quality,
            **_form_of(made, asked),
            "usage": _NOTHING_COUNTED,
            **_how(made),
            **_about(answer),
        }
    )


def _sse(event: Mapping[str, Any], name: str | None = None) -> str:
    return f"event: {name or event['type']}\ndata: {json.dumps(event)}\n\n"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


async def _stream(
    run: Run[_Event, _Answer], asked: ImageEditRequest, keep_alive_s: float
) -> AsyncIterator[str]:
    """The events of a run as text, and a comment whenever there was none for a while."""
    events = run.events()
    coming = asyncio.ensure_future(_next(events))
    with run.heard():
        try:
            while True:
                while not (await asyncio.wait({coming}, timeout=keep_alive_s))[0]:
                    yield ": still there\n\n"
                event = coming.result()
                if event is None:
                    break
                coming = asyncio.ensure_future(_next(events))
                if isinstance(event, _Partial):
                    yield _told_partial(event, asked)
            yield _told_completed(await run.result(), asked)
        except Step1XEditError as error:
            yield _sse(problems.openai_body(problems.of_error(error)), "error")
        except Exception:  # the head of the answer has left: nobody else can tell of it any more
            log.exception("a stream failed")
            unknown = InternalError("the request failed unexpectedly; the server's log says more")
            yield _sse(problems.openai_body(problems.of_error(unknown)), "error")
        finally:
            coming.cancel()


async def _next(events: AsyncIterator[_Event]) -> _Event | None:
    """The next event, or None if none comes any more."""
    return await anext(events, None)


async def _begun(run: Run[_Event, _Answer]) -> None:
    """Wait until nothing is wrong with a request any more, or raise what is."""
    async for _ in run.events():
        return
    await run.result()


# --- the routes -----------------------------------------------------------------------------------

_EDIT_DESCRIPTION: Final = """\
The interface of OpenAI's Images, for their clients: `OpenAI(base_url="http://127.0.0.1:8000/v1", \
api_key="none").images.edit(…)`. `image` (or `image[]`) is the one picture to edit; what is fully \
transparent in `mask`, or white where it has no transparency, may change. Instead of a form JSON \
is taken, with `images: [{"image_url": "data:…"}]`. `num_steps` and `true_cfg_scale` are other \
names of `num_inference_steps` and `guidance_scale`. Fields that cannot be honoured are refused by \
name. With `stream=true` the answer is a stream of `image_edit.partial_image` and \
`image_edit.completed`, or `error`. To close the connection stops the work, unless the request has \
an `Idempotency-Key`, or one of OpenAI's clients waits for a whole answer: these find it again \
for half a minute."""

_ABOUT: Final = {
    "id": "imgedit_0123456789abcdef01234567",
    "model": "v1.1",
    "num_inference_steps": 28,
    "guidance_scale": 6.0,
    "size_level": 1024,
    "inference_time_s": 15.3,
}
_EXAMPLE: Final = {
    "created": 1767225617,
    "data": [{"b64_json": "iVBORw0KGgo…", "seed": 42}],
    "output_format": "png",
    "size": "1536x1024",
    "background": "opaque",
    "usage": _NOTHING_COUNTED,
    **_ABOUT,
}
_STREAMED: Final = _sse(
    {
        "type": "image_edit.completed",
        "b64_json": "iVBORw0KGgo…",
        "created_at": 1767225617,
        "quality": "auto",
        "output_format": "png",
        "size": "1536x1024",
        "background": "opaque",
        "usage": _NOTHING_COUNTED,
        "seed": 42,
        **_ABOUT,
    }
)
_MODEL_EXAMPLE: Final = {
    "id": MODEL,
    "object": "model",
    "created": 1767225600,
    "owned_by": MODEL,
    "version": "v1.1",
    "location": "GPU",
}
TAGS: Final = ["OpenAI Images"]


def image_routes(
    service: EditService, settings: Settings, runs: Runs, keep_alive_s: float = KEEP_ALIVE_S
) -> APIRouter:
    """The routes under /v1/images and /v1/models; an edit asked for again is one of `runs`."""
    router = APIRouter(tags=list(TAGS))
    linked: _Linked = Shelf(_LINKED_S, _LINKED_BYTES, _MOST_PICTURES, _MOST_LINKED)
    edits = _Edits(service, Limits(settings.max_bytes, settings.max_pixels), linked)
    started = int(time.time())

    @router.post(
        EDITS_PATH,
        operation_id="edit_image_openai",
        summary="Edit a picture, as OpenAI's Images do",
        description=_EDIT_DESCRIPTION,
        responses={
            200: {
                "description": "The edited picture",
                "content": {
                    "application/json": {"schema": {"type": "object"}, "example": _EXAMPLE},
                    "text/event-stream": {"schema": {"type": "string"}, "example": _STREAMED},
                },
            },
            **problems.described(
                "invalid_parameter",
                "unsupported_image",
                "corrupt_image",
                "model_not_found",
                "idempotency_key",
                "image_too_large",
                "internal",
                "queue_full",
                "model_unavailable",
                "out_of_memory",
                "deadline_exceeded",
                path=EDITS_PATH,
            ),
            **problems.described_status(415, path=EDITS_PATH),
        },
        response_class=JSONResponse,
        openapi_extra={
            "requestBody": {"required": True, "content": _bodies(service.defaults)},
            "parameters": [KEY_PARAMETER],
        },
    )
    async def edit(request: Request) -> Response:
        if not may_be_known(request):
            service.check_room()  # before the upload is read
        sent = await _read(request)
        asked = understood(sent.fields)
        check_model(service, asked.model)
        # The clients try again before a stream begins, which is soon, and never afterwards.
        is_named = KEY in request.headers or not asked.stream
        run, was_there = runs.find(
            identity_of(request, sent.digest) if is_named else None,
            partial(edits.make, sent, asked),
            lambda answer: answer.size,
            grace_s=_UNTIL_HEARD_S if asked.stream else 0.0,
        )
        headers = REPLAYED if was_there else {}
        with run.heard():
            if not asked.stream:
                answer = await unless_gone(request, run.result())
                return JSONResponse(_told(answer, asked, _base_url(request)), headers=headers)
            await unless_gone(request, _begun(run))
        stream = _stream(run, asked, keep_alive_s)
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    @router.get(
        CONTENT_PATH,
        operation_id="get_image_content",
        summary="Fetch a picture by the link of an answer",
        description="What `response_format=url` links to. Links hold for an hour, or less where "
        "many are made, and end with the server.",
        responses={
            200: {
                "description": "The picture",
                "content": {
                    "image/png": {
                        "schema": {"type": "string", "format": "binary"},
                        "example": "(bytes)",
                    }
                },
            },
            **problems.described("internal", path=EDITS_PATH),
            **problems.described_status(404, path=EDITS_PATH),
        },
        response_class=Response,
        openapi_extra={"parameters": [_in_path("image_id", "img_0123456789abcdef", "picture")]},
    )
    async def content(request: Request) -> Response:
        found = linked.get(str(request.path_params["image_id"]))
        if found is None:
            raise HTTPException(404, "There is no picture of this id, or not any more.")
        data, media_type = found
        name = f"edited.{media_type.partition('/')[2]}"
        headers = {"Content-Disposition": f'inline; filename="{name}"'}
        return Response(data, headers=headers, media_type=media_type)

    @router.get(
        MODELS_PATH,
        operation_id="list_models",
        summary="List the models, as OpenAI does",
        description="There is one, whose version is known once it has been loaded.",
        responses={
            200: {
                "description": "The model",
                "content": {
                    "application/json": {
                        "schema": {"type": "object"},
                        "example": {"object": "list", "data": [_MODEL_EXAMPLE]},
                    }
                },
            },
            **problems.described("internal", path=MODELS_PATH),
        },
        response_class=JSONResponse,
    )
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service, MODEL, started)]})

    @router.get(
        f"{MODELS_PATH}/{{model}}",
        operation_id="get_model",
        summary="Tell about a model, as OpenAI does",
        description="By the name in the list, or by that of the version that is loaded.",
        responses={
            200: {
                "description": "The model",
                "content": {
                    "application/json": {"schema": {"type": "object"}, "example": _MODEL_EXAMPLE}
                },
            },
            **problems.described("model_not_found", "internal", path=MODELS_PATH),
        },
        response_class=JSONResponse,
        openapi_extra={"parameters": [_in_path("model", MODEL, "model")]},
    )
    async def model(request: Request) -> Response:
        name = str(request.path_params["model"])
        if name not in _names(service):
            raise ModelNotFoundError(f"{name!r}; {MODELS_PATH} lists what there is")
        return JSONResponse(_model(service, name, started))

    return router


def _base_url(request: Request) -> str:
    """How the caller reaches us: by the Host that the guard has let pass."""
    return f"{request.url.scheme}://{request.headers['host']}"


def _model(service: EditService, name: str, created: int) -> dict[str, Any]:
    status = service.status().gpu_status
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": MODEL,
        "version": status.model,
        "location": status.model_location,
    }


def _in_path(name: str, example: str, what: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": f"The id of the {what}",
        "schema": {"type": "string"},
        "example": example,
    }


def plain(field: Mapping[str, Any]) -> dict[str, Any]:
    """A field that may be left out, described as what it is when it is there."""
    values = [each for each in field.get("anyOf", []) if each.get("type") != "null"]
    rest = {name: value for name, value in field.items() if name != "anyOf" and value is not None}
    return {**values[0], **rest} if values else rest


def described_fields(defaults: Mapping[str, object]) -> dict[str, Any]:
    """The fields beside the pictures, with the operator's defaults."""
    properties = ImageEditRequest.model_json_schema()["properties"]
    fields = {name: plain(field) for name, field in properties.items()}
    fields["num_inference_steps"]["default"] = defaults["num_steps"]
    for name in ("guidance_scale", "size_level"):
        fields[name]["default"] = defaults[name]
    return fields


def _bodies(defaults: Mapping[str, object]) -> dict[str, Any]:
    """The form and the JSON, as OpenAPI describes them."""
    schema = ImageEditRequest.model_json_schema()
    fields = described_fields(defaults)
    file = {"type": "string", "format": "binary"}
    link = {
        "type": "object",
        "properties": {
            "image_url": {"type": "string", "description": "A data URL: data:image/png;base64,…"}
        },
        "required": ["image_url"],
        "additionalProperties": False,
    }
    of_form = {
        "image": {**file, "description": FILE_DESCRIPTION},
        "mask": {**file, "description": MASK_DESCRIPTION},
    }
    of_json = {"images": {"type": "array", "items": link, "minItems": 1, "maxItems": 1}}
    values = {"prompt": "change to night scene", "seed": 42}
    data_url = {"image_url": "data:image/png;base64,iVBORw0KGgo…"}
    return {
        "multipart/form-data": {
            "schema": {
                **schema,
                "properties": {**of_form, **fields},
                "required": ["image", "prompt"],
                "example": values,
            }
        },
        "application/json": {
            "schema": {
                **schema,
                "properties": {**of_json, "mask": link, **fields},
                "required": ["images", "prompt"],
                "example": {**values, "images": [data_url]},
            }
        },
    }
