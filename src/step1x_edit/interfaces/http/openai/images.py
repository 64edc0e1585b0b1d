"""The face of OpenAI's Images: what their clients send is understood, what is told is true here.

What a request may hold is read by `openai_requests`; here is what is done and told. A request that
a client sends again because it heard nothing for long is not done again: `idempotency` knows how.
Failures leave as exceptions and get the form of this interface in `problems`.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias, TypeVar

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from step1x_edit.channel import Progress
from step1x_edit.errors import (
    InternalError,
    InvalidParameterError,
    ModelNotFoundError,
    ServerBusyError,
    Step1XEditError,
)
from step1x_edit.interfaces.http import problems, sse
from step1x_edit.interfaces.http.edits import FILE_DESCRIPTION, MASK_DESCRIPTION, in_one_text
from step1x_edit.interfaces.http.idempotency import (
    KEY,
    KEY_PARAMETER,
    REPLAYED,
    Run,
    Runs,
    Shelf,
    Tell,
    Work,
    identity_of,
    may_be_known,
    unless_gone,
)
from step1x_edit.interfaces.http.openai.requests import (
    EDITS_PATH,
    STEPFUN_MODEL,
    STEPS_OF,
    Sent,
    read_edit,
    read_generation,
    understood,
)
from step1x_edit.pictures import images
from step1x_edit.pictures.images import Picture, Pixels
from step1x_edit.pictures.output_formats import OUTPUT_FORMATS
from step1x_edit.schemas.requests import (
    MAX_SEED,
    PARAMETERS,
    SIDE_MULTIPLE,
    EditMetadata,
    GeneratePictureRequest,
    HowToEdit,
    ImageEditRequest,
    ImageGenerationRequest,
    OpenAIRequest,
    PictureRequest,
    parameters_of,
)
from step1x_edit.service.service import EditedPicture, EditService, with_seed
from step1x_edit.settings import Limits, Settings

log = logging.getLogger(__name__)

GENERATIONS_PATH: Final = "/v1/images/generations"
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
_OF_OPENAI: Final = ("gpt-image-", "chatgpt-image-", "dall-e-")
_FORMATS: Final = parameters_of(OpenAIRequest)["output_format"].choices
_NOTHING_COUNTED: Final = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


# --- what is asked for ----------------------------------------------------------------------------

_Asked: TypeAlias = ImageEditRequest | ImageGenerationRequest
_Own = TypeVar("_Own", PictureRequest, GeneratePictureRequest)


def check_model(service: EditService, name: str) -> None:
    """Take our own name, that of the version that runs, and those that OpenAI's clients need."""
    if name not in _names(service) and not name.startswith(_OF_OPENAI):
        raise ModelNotFoundError(f"{name!r}; {MODELS_PATH} lists what there is")


def _names(service: EditService) -> set[str]:
    version = service.status().gpu_status.model
    return {MODEL, STEPFUN_MODEL} if version is None else {MODEL, STEPFUN_MODEL, version}


def request_of(service: EditService, asked: ImageEditRequest) -> PictureRequest:
    """The same in our own words; the operator's defaults for what is left out, and a seed."""
    return with_seed(service.read_picture(_given(asked) | _level_of(asked)))


def _given(asked: _Asked) -> dict[str, object]:
    """The parameters of ours that were given."""
    ours = {"prompt", "negative_prompt", *HowToEdit.model_fields}
    given = asked.model_dump(include=ours, exclude_unset=True)
    return given | ({"num_steps": STEPS_OF[asked.quality]} if asked.quality in STEPS_OF else {})


def _level_of(asked: ImageEditRequest) -> dict[str, int]:
    """The working resolution, if StepFun's interface asks for it as the size."""
    if asked.model != STEPFUN_MODEL or "size_level" in asked.model_fields_set:
        return {}
    side = asked.size.partition("x")[0]
    return {"size_level": int(side)} if side in map(str, PARAMETERS["size_level"].choices) else {}


def _generation_of(service: EditService, asked: ImageGenerationRequest) -> GeneratePictureRequest:
    """The same in our own words, as `request_of` does."""
    width, height = _new_size(asked)
    size = {"width": width, "height": height}
    return with_seed(service.read_generate_picture(_given(asked) | size))


def _new_size(asked: ImageGenerationRequest) -> tuple[int | None, int | None]:
    """Width and height as asked for, or None where that is left to us."""
    if asked.size == "auto":
        return None, None
    width, height = map(int, asked.size.split("x"))
    allowed = PARAMETERS["width"]
    assert allowed.minimum is not None
    assert allowed.maximum is not None
    for side in (width, height):
        if side % SIDE_MULTIPLE or not allowed.minimum <= side <= allowed.maximum:
            raise InvalidParameterError(
                f"size must be auto, or WIDTHxHEIGHT with multiples of {SIDE_MULTIPLE} "
                f"{allowed.range}, got {asked.size}",
                param="size",
            )
    return width, height


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

    async def edit(self, sent: Sent, asked: ImageEditRequest, tell: Tell[_Event]) -> _Answer:
        """Do all that is asked for; pictures that are to be linked can be fetched afterwards."""
        data = sent.picture
        assert data is not None
        size = await asyncio.to_thread(self._size, data, asked)
        first = request_of(self._service, asked)

        async def one(request: PictureRequest) -> EditedPicture:
            return await self._service.edit_picture(
                data,
                request,
                _Teller(asked, tell),
                suffix=_suffix(asked),
                mask=sent.mask,
                previews=asked.partial_images,
            )

        return await self._all(asked, first, one, size)

    async def generate(self, asked: ImageGenerationRequest, tell: Tell[_Event]) -> _Answer:
        """Make all that is asked for from words alone, as `edit` does."""
        first = _generation_of(self._service, asked)

        async def one(request: GeneratePictureRequest) -> EditedPicture:
            return await self._service.generate_picture(
                request, _Teller(asked, tell), _suffix(asked), previews=asked.partial_images
            )

        return await self._all(asked, first, one, None)

    async def _all(
        self,
        asked: _Asked,
        first: _Own,
        one: Callable[[_Own], Awaitable[EditedPicture]],
        size: tuple[int, int] | None,
    ) -> _Answer:
        started = time.monotonic()
        seed = first.seed or 0
        pictures = []
        for number in range(asked.n):
            request = first.model_copy(update={"seed": (seed + number) % (MAX_SEED + 1)})
            made = await self._in_turn(partial(one, request), may_wait=number > 0)
            pictures.append(await asyncio.to_thread(_finished, made, asked, size))
        if asked.response_format == "url":
            for picture in pictures:
                self._linked.put(
                    picture.image_id, (picture.data, picture.media_type), len(picture.data)
                )
        return _Answer(
            answer_id=f"{_words_of(asked).answer}_{secrets.token_hex(12)}",
            created=int(time.time()),
            seconds=round(time.monotonic() - started, 2),
            pictures=tuple(pictures),
        )

    async def _in_turn(
        self, work: Callable[[], Awaitable[EditedPicture]], may_wait: bool
    ) -> EditedPicture:
        """One picture, in its turn; a request that was let in is not refused in the middle."""
        while True:
            try:
                return await work()
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
        if asked.model == STEPFUN_MODEL:
            fitted = _of_area(picture, width * height)
        else:
            fitted = _within(picture, width, height)
        if math.prod(fitted) > self._limits.max_pixels:
            most = self._limits.max_pixels / 1e6
            raise InvalidParameterError(f"size may have {most:g} megapixels at most", param="size")
        return fitted


def _within(picture: Picture, width: int, height: int) -> tuple[int, int]:
    """The largest size with the ratio of the picture that fits into width and height."""
    off = abs(width * picture.height - height * picture.width)
    if off < max(picture.width, picture.height):
        return width, height  # as near to the ratio as whole pixels allow
    scale = min(width / picture.width, height / picture.height)
    return max(1, round(picture.width * scale)), max(1, round(picture.height * scale))


def _of_area(picture: Picture, pixels: int) -> tuple[int, int]:
    """The size with the ratio of the picture and about this many pixels."""
    scale = math.sqrt(pixels / (picture.width * picture.height))
    return max(1, round(picture.width * scale)), max(1, round(picture.height * scale))


class _Teller:
    """Tells of the progress of an edit what those who listen can show."""

    def __init__(self, asked: _Asked, tell: Tell[_Event]) -> None:
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


def _suffix(asked: _Asked) -> str:
    return f".{asked.output_format}"


def _encoded(picture: Picture, asked: _Asked) -> bytes:
    return images.encode(picture, _suffix(asked), quality=asked.output_compression)


def _finished(edited: EditedPicture, asked: _Asked, size: tuple[int, int] | None) -> _Made:
    """The picture as it was asked for."""
    picture, data, suffix = edited.picture, edited.data, _suffix(asked)
    if asked.background == "opaque" and picture.alpha is not None:
        picture = images.flattened(picture)
    if size is not None:
        picture = images.resized(picture, *size)
        images.check_encodable(picture, suffix)
    if picture is not edited.picture or asked.output_compression is not None:
        record = images.read_record(data)
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


@dataclass(frozen=True)
class _Words:
    """What answers to one kind of request are called."""

    event: str
    answer: str


def _words_of(asked: _Asked) -> _Words:
    if isinstance(asked, ImageGenerationRequest):
        return _Words(event="image_generation", answer="imggen")
    return _Words(event="image_edit", answer="imgedit")


def _told(answer: _Answer, asked: _Asked, base_url: str) -> dict[str, Any]:
    """The whole answer."""
    return {
        "created": answer.created,
        "data": [_told_of(made, asked, base_url) for made in answer.pictures],
        **_form_of(answer.pictures[0], asked),
        "usage": _NOTHING_COUNTED,
        **_about(answer),
    }


def _told_of(made: _Made, asked: _Asked, base_url: str) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if asked.response_format == "url":
        told["url"] = base_url + CONTENT_PATH.format(image_id=made.image_id)
    else:
        told["b64_json"] = _base64(made.data)
    if asked.model == STEPFUN_MODEL:
        told["finish_reason"] = "success"
    return told | _how(made)


def _how(made: _Made) -> dict[str, Any]:
    """What repeats a picture, and what there is to say about it."""
    metadata = made.metadata
    told = metadata.to_dict()
    names = ("seed", "changed_share", "warning", "reasoning")
    return {name: told[name] for name in names if name in told}


def _form_of(made: _Made, asked: _Asked) -> dict[str, Any]:
    form = {
        "output_format": asked.output_format,
        "size": f"{made.width}x{made.height}",
        "background": "transparent" if made.is_see_through else "opaque",
    }
    return form | ({"quality": asked.quality} if asked.quality in STEPS_OF else {})


def _about(answer: _Answer) -> dict[str, Any]:
    first = answer.pictures[0].metadata
    level = {} if first.size_level is None else {"size_level": first.size_level}
    loras = {} if first.loras is None else {"loras": first.loras}
    return {
        "id": answer.answer_id,
        "model": first.model,
        "num_inference_steps": first.num_steps,
        "guidance_scale": first.guidance_scale,
        **level,
        "inference_time_s": answer.seconds,
        **loras,
    }


def _told_partial(event: _Partial, asked: _Asked) -> str:
    return _sse(
        {
            "type": f"{_words_of(asked).event}.partial_image",
            "b64_json": _base64(event.data),
            "partial_image_index": event.index,
            "created_at": event.created,
            "size": f"{event.width}x{event.height}",
            "quality": asked.quality,
            "background": asked.background,
            "output_format": asked.output_format,
        }
    )


def _told_completed(answer: _Answer, asked: _Asked) -> str:
    made = answer.pictures[0]
    return _sse(
        {
            "type": f"{_words_of(asked).event}.completed",
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
    return sse.named(name or event["type"], event)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


async def _stream(
    run: Run[_Event, _Answer], asked: _Asked, keep_alive_s: float
) -> AsyncIterator[str]:
    """The events of a run as text, and a comment whenever there was none for a while."""
    events = run.events()
    coming = asyncio.ensure_future(sse.next_of(events))
    with run.heard():
        try:
            while True:
                while not (await asyncio.wait({coming}, timeout=keep_alive_s))[0]:
                    yield ": still there\n\n"
                event = coming.result()
                if event is None:
                    break
                coming = asyncio.ensure_future(sse.next_of(events))
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
is taken, with `images: [{"image_url": "data:…"}]`; the data URL alone and `image` are understood \
too. `num_steps` and `steps` are other names of `num_inference_steps`, `true_cfg_scale` and \
`cfg_scale` of `guidance_scale`. Fields that cannot be honoured are refused by name. An empty text \
counts as left out. With the model `step-1x-edit` defaults and `size` are those of StepFun's own \
interface: links, and an area. With `stream=true` the answer is a stream of \
`image_edit.partial_image` and `image_edit.completed`, or `error`. Closing the connection cancels \
the edit, unless the request has an `Idempotency-Key`, or one of OpenAI's clients waits for a \
whole answer: these find it again for half a minute."""

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
_GENERATION_DESCRIPTION: Final = """\
Makes a picture from the prompt alone, which needs Step1X-Edit v1.1; the demo and the other \
versions only edit. The body is JSON, `OpenAI(base_url="http://127.0.0.1:8000/v1", \
api_key="none").images.generate(…)` sends it. Fields, answers, streams (of \
`image_generation.partial_image` and `image_generation.completed`) and what happens when the \
connection is closed are those of `/v1/images/edits`, but that there is no picture to send."""
_OF_GENERATION: Final = {
    "size": "1024x1024",
    "id": "imggen_0123456789abcdef01234567",
}
_GENERATION_EXAMPLE: Final = {
    name: value for name, value in {**_EXAMPLE, **_OF_GENERATION}.items() if name != "size_level"
}
_GENERATION_STREAMED: Final = _sse(
    {
        "type": "image_generation.completed",
        "b64_json": "iVBORw0KGgo…",
        "created_at": 1767225617,
        "quality": "auto",
        "output_format": "png",
        "background": "opaque",
        "usage": _NOTHING_COUNTED,
        "seed": 42,
        **{name: value for name, value in _ABOUT.items() if name != "size_level"},
        **_OF_GENERATION,
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
    edits = _Edits(service, settings.limits, linked)
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
                    sse.EVENT_STREAM: {
                        "schema": _stream_schema("image_edit"),
                        "example": _STREAMED,
                    },
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
            await service.check_room()  # before the upload is read
        sent = await read_edit(request)
        asked = understood(ImageEditRequest, sent.fields)
        return await answered(request, sent, asked, partial(edits.edit, sent, asked))

    @router.post(
        GENERATIONS_PATH,
        operation_id="generate_image_openai",
        summary="Make a picture from words, as OpenAI's Images do",
        description=_GENERATION_DESCRIPTION,
        responses={
            200: {
                "description": "The picture",
                "content": {
                    "application/json": {
                        "schema": {"type": "object"},
                        "example": _GENERATION_EXAMPLE,
                    },
                    sse.EVENT_STREAM: {
                        "schema": _stream_schema("image_generation"),
                        "example": _GENERATION_STREAMED,
                    },
                },
            },
            **problems.described(
                "invalid_parameter",
                "model_not_found",
                "idempotency_key",
                "image_too_large",
                "internal",
                "queue_full",
                "model_unavailable",
                "out_of_memory",
                "deadline_exceeded",
                path=GENERATIONS_PATH,
            ),
            **problems.described_status(415, path=GENERATIONS_PATH),
        },
        response_class=JSONResponse,
        openapi_extra={
            "requestBody": {"required": True, "content": _generation_body(service.defaults)},
            "parameters": [KEY_PARAMETER],
        },
    )
    async def generate(request: Request) -> Response:
        if not may_be_known(request):
            await service.check_room()
        sent = await read_generation(request)
        asked = understood(ImageGenerationRequest, sent.fields)
        _new_size(asked)  # what is wrong is told before a stream begins
        return await answered(request, sent, asked, partial(edits.generate, asked))

    async def answered(
        request: Request, sent: Sent, asked: _Asked, work: Work[_Event, _Answer]
    ) -> Response:
        """Do the work once, and answer with the whole of it or with a stream."""
        check_model(service, asked.model)
        # The clients try again before a stream begins, which is soon, and never afterwards.
        is_named = KEY in request.headers or not asked.stream
        run, was_there = runs.find(
            identity_of(request, sent.digest) if is_named else None,
            work,
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
        return StreamingResponse(stream, media_type=sse.EVENT_STREAM, headers=headers)

    @router.get(
        CONTENT_PATH,
        operation_id="get_image_content",
        summary="Fetch a picture by the link of an answer",
        description="What `response_format=url` links to. Links hold for an hour, or less where "
        "many are made, and end with the server.",
        responses={
            200: {
                "description": "The picture, in the `output_format` of its request",
                "content": {
                    OUTPUT_FORMATS[f".{name}"].media_type: {
                        "schema": {"type": "string", "format": "binary"},
                        "example": "(bytes)",
                    }
                    for name in _FORMATS
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


def _stream_schema(event: str) -> dict[str, Any]:
    """The events of a stream, as OpenAPI describes them."""
    return {
        "type": "object",
        "description": "Each of the events, whose data is the picture or the error as JSON",
        "required": ["event", "data"],
        "properties": {
            "event": {
                "type": "string",
                "enum": [f"{event}.partial_image", f"{event}.completed", "error"],
            },
            "data": {"type": "string", "contentMediaType": "application/json"},
        },
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
                "properties": {
                    **of_form,
                    **{name: in_one_text(field) for name, field in fields.items()},
                },
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


def _generation_body(defaults: Mapping[str, object]) -> dict[str, Any]:
    """The JSON of a generation, as OpenAPI describes it."""
    schema = ImageGenerationRequest.model_json_schema()
    fields = {name: plain(field) for name, field in schema["properties"].items()}
    fields["num_inference_steps"]["default"] = defaults["num_steps"]
    fields["guidance_scale"]["default"] = defaults["guidance_scale"]
    example = {"prompt": "a red fox in the snow", "seed": 42}
    return {"application/json": {"schema": {**schema, "properties": fields, "example": example}}}
