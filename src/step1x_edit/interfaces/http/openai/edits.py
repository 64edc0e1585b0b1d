"""The work behind OpenAI's Images: the pictures of a request, in its format and size.

`requests` parses the request and `answers` renders the result.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias, TypeVar

from step1x_edit.channel import Progress
from step1x_edit.errors import InvalidParameterError, ServerBusyError
from step1x_edit.interfaces.http.openai.requests import (
    STEPFUN_MODEL,
    Sent,
    generation_of,
    request_of,
)
from step1x_edit.interfaces.http.shelf import Shelf
from step1x_edit.interfaces.pursuits import Notify
from step1x_edit.pictures import images
from step1x_edit.pictures.images import Picture, Pixels
from step1x_edit.pictures.output_formats import OUTPUT_FORMATS
from step1x_edit.schemas.answers import EditMetadata
from step1x_edit.schemas.openai import ImageEditRequest, ImageGenerationRequest
from step1x_edit.schemas.requests import (
    MAX_SEED,
    GeneratePictureRequest,
    PictureRequest,
)
from step1x_edit.service.service import EditedPicture, EditService
from step1x_edit.service.source import size_of_result
from step1x_edit.settings import Limits

ImageRequest: TypeAlias = ImageEditRequest | ImageGenerationRequest
_Own = TypeVar("_Own", PictureRequest, GeneratePictureRequest)

_RETRY_S: Final = 1.0  # if the queue is full between the pictures of a request


@dataclass(frozen=True)
class FinishedImage:
    """One picture of an answer, in the requested format and size."""

    image_id: str
    data: bytes
    media_type: str
    width: int
    height: int
    is_see_through: bool
    metadata: EditMetadata


@dataclass(frozen=True)
class ImagesAnswer:
    """The pictures of a request, before they are rendered."""

    answer_id: str
    created: int
    seconds: float
    pictures: tuple[FinishedImage, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(len(made.data) for made in self.pictures)


@dataclass(frozen=True)
class Begun:
    """The edit is queued: the request is valid."""


@dataclass(frozen=True)
class PartialImage:
    """A preview of the picture during the edit."""

    index: int
    created: int
    data: bytes
    width: int
    height: int


Event: TypeAlias = Begun | PartialImage
Linked: TypeAlias = Shelf[tuple[bytes, str]]


@dataclass(frozen=True)
class ImageEdits:
    """Makes the pictures of a request, one after the other."""

    service: EditService
    limits: Limits
    linked: Linked

    async def edit(
        self, sent: Sent, asked: ImageEditRequest, notify: Notify[Event]
    ) -> ImagesAnswer:
        """Make the `n` pictures of an edit; linked pictures can be downloaded afterwards."""
        data = sent.picture
        assert data is not None
        size = await asyncio.to_thread(self._size, data, asked)
        first = request_of(self.service, asked)

        async def one(request: PictureRequest) -> EditedPicture:
            return await self.service.edit_picture(
                data,
                request,
                _Reporter(asked, notify),
                suffix=_suffix(asked),
                mask=sent.mask,
                previews=asked.partial_images,
            )

        return await self._all(asked, first, one, size)

    async def generate(self, asked: ImageGenerationRequest, notify: Notify[Event]) -> ImagesAnswer:
        """Make the `n` pictures of a prompt without an input picture."""
        first = generation_of(self.service, asked)

        async def one(request: GeneratePictureRequest) -> EditedPicture:
            return await self.service.generate_picture(
                request, _Reporter(asked, notify), _suffix(asked), previews=asked.partial_images
            )

        return await self._all(asked, first, one, None)

    async def _all(
        self,
        asked: ImageRequest,
        first: _Own,
        one: Callable[[_Own], Awaitable[EditedPicture]],
        size: tuple[int, int] | None,
    ) -> ImagesAnswer:
        started = time.monotonic()
        seed = first.seed or 0
        pictures = []
        for number in range(asked.n):
            request = first.model_copy(update={"seed": (seed + number) % (MAX_SEED + 1)})
            made = await self._in_turn(partial(one, request), may_wait=number > 0)
            pictures.append(await asyncio.to_thread(self._finished, made, asked, size))
        if asked.response_format == "url":
            for picture in pictures:
                self.linked.put(
                    picture.image_id, (picture.data, picture.media_type), len(picture.data)
                )
        kind = "imggen" if isinstance(asked, ImageGenerationRequest) else "imgedit"
        return ImagesAnswer(
            answer_id=f"{kind}_{secrets.token_hex(12)}",
            created=int(time.time()),
            seconds=round(time.monotonic() - started, 2),
            pictures=tuple(pictures),
        )

    async def _in_turn(
        self, work: Callable[[], Awaitable[EditedPicture]], may_wait: bool
    ) -> EditedPicture:
        """One picture; a request whose first picture was accepted waits for room in the queue."""
        while True:
            try:
                return await work()
            except ServerBusyError:
                if not may_wait:
                    raise
                await asyncio.sleep(_RETRY_S)

    def _size(self, data: bytes, asked: ImageEditRequest) -> tuple[int, int] | None:
        """The size to which the result is resized, or None."""
        if asked.size == "auto":
            return None
        width, height = map(int, asked.size.split("x"))
        picture = images.decode(data, self.limits)
        made = size_of_result(asked, picture.width, picture.height)
        if (width, height) == made:
            return None
        if asked.model == STEPFUN_MODEL:
            fitted = _of_area(made, width * height)
        else:
            fitted = _within(made, width, height)
        if math.prod(fitted) > self.limits.max_pixels:
            most = self.limits.max_pixels / 1e6
            raise InvalidParameterError(f"size may have {most:g} megapixels at most", param="size")
        return fitted

    def _finished(
        self, edited: EditedPicture, asked: ImageRequest, size: tuple[int, int] | None
    ) -> FinishedImage:
        """The picture in the requested format, size and background."""
        picture, data, suffix = edited.picture, edited.data, _suffix(asked)
        if asked.background == "opaque" and picture.alpha is not None:
            picture = images.flattened(picture)
        if size is not None:
            picture = images.resized(picture, *size)
            images.check_encodable(*size, suffix)
        if picture is not edited.picture or asked.output_compression is not None:
            data = self.service.file_of(edited, picture, suffix, asked.output_compression)
        output = OUTPUT_FORMATS[suffix]
        return FinishedImage(
            image_id=f"img_{secrets.token_urlsafe(24)}",
            data=data,
            media_type=output.media_type,
            width=picture.width,
            height=picture.height,
            is_see_through=picture.alpha is not None and output.carries_alpha,
            metadata=edited.metadata,
        )


def _within(size: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """The largest size with the same ratio that fits into width and height."""
    off = abs(width * size[1] - height * size[0])
    if off < max(size):
        return width, height  # as close to the ratio as whole pixels allow
    return _scaled(size, min(width / size[0], height / size[1]))


def _of_area(size: tuple[int, int], pixels: int) -> tuple[int, int]:
    """The size with the same ratio and about this many pixels."""
    return _scaled(size, math.sqrt(pixels / math.prod(size)))


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    width, height = size
    return max(1, round(width * scale)), max(1, round(height * scale))


class _Reporter:
    """Turns the progress of an edit into events: its start, and its previews."""

    def __init__(self, asked: ImageRequest, notify: Notify[Event]) -> None:
        self._asked = asked
        self._notify = notify
        self._has_begun = False
        self._seen: Pixels | None = None
        self._count = 0

    async def __call__(self, progress: Progress) -> None:
        if not self._has_begun:
            self._has_begun = True
            await self._notify(Begun())
        preview = progress.preview
        if preview is None or preview is self._seen or self._count == self._asked.partial_images:
            return
        self._seen = preview
        data = await asyncio.to_thread(_encoded, Picture(preview), self._asked)
        height, width = preview.shape[:2]
        await self._notify(PartialImage(self._count, int(time.time()), data, width, height))
        self._count += 1


def _suffix(asked: ImageRequest) -> str:
    return f".{asked.output_format}"


def _encoded(picture: Picture, asked: ImageRequest) -> bytes:
    return images.encode(picture, _suffix(asked), quality=asked.output_compression)
