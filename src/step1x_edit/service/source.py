"""The input of an edit: the picture, what may change of it, and the part that the network gets.

What the network returns is put back in its place: in the size, profile and colours of the input,
and only where the mask lets the picture change.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from step1x_edit.channel import Progress
from step1x_edit.errors import InvalidParameterError, about_the_mask
from step1x_edit.schemas.requests import HowToEdit, PictureRequest, Record
from step1x_edit.service.editor import Reporter
from step1x_edit.settings import Limits

if TYPE_CHECKING:  # deferred: a server starts to answer before numpy is imported
    from step1x_edit.pictures.images import Picture, Pixels
    from step1x_edit.pictures.regions import Box


@dataclass(frozen=True)
class Source:
    """The input of an edit; without a picture, one is generated."""

    picture: Picture | None = None
    """With the area that `outpaint` adds."""
    before: Picture | None = None
    """The same without this area."""
    sha256: str | None = None
    record: Record | None = None
    """How it was made, if it was made here."""
    mask: Pixels | None = None
    mask_sha256: str | None = None
    box: Box | None = None
    """The part that the network edits; None: all of it."""

    def seen(self) -> tuple[Pixels | None, Pixels | None]:
        """What the network edits: the picture or a part of it, in sRGB, and the mask of that."""
        if self.picture is None:
            return None, None
        if self.box is None or self.mask is None:
            return self.picture.in_srgb, self.mask
        from step1x_edit.pictures import regions

        left, top, right, bottom = self.box
        return regions.cropped(self.picture, self.box).in_srgb, self.mask[top:bottom, left:right]

    def restored(self, made: Pixels) -> tuple[Picture, float | None]:
        """What the network has made, in the picture, and the changed share if there was a mask."""
        from step1x_edit.pictures import images, regions

        if self.picture is None:
            return images.Picture(made), None
        if self.box is None:
            picture = images.restore(made, self.picture)
        else:
            picture = regions.pasted(made, self.picture, self.box)
        if self.mask is None:
            return picture, None
        picture = images.blend(picture, self.picture, self.mask)
        return picture, images.changed_share(self.picture.pixels, picture.pixels)

    def showing_whole(self, report: Reporter) -> Reporter:
        """Report previews as parts of the whole picture, if only a part of it is edited."""
        if self.picture is None or self.box is None:
            return report
        from step1x_edit.pictures import regions

        place = partial(regions.preview, source=self.picture, box=self.box)
        last: tuple[Pixels, Pixels] | None = None  # several events have the same preview

        async def report_whole(event: Progress) -> None:
            nonlocal last
            if event.preview is not None:
                if last is None or last[0] is not event.preview:
                    last = event.preview, await asyncio.to_thread(place, event.preview)
                event = replace(event, preview=last[1])
            await report(event)

        return report_whole


NO_INPUT: Final = Source()
"""Of a picture that is generated."""


def size_of_result(request: HowToEdit, width: int, height: int) -> tuple[int, int]:
    """The width and height of the result of editing a picture of this size."""
    from step1x_edit.pictures import regions

    width, height = regions.grown_size(request.outpaint, width, height)
    return request.upscale * width, request.upscale * height


def read_source(
    data: bytes, request: PictureRequest, mask: bytes | None, suffix: str, limits: Limits
) -> Source:
    """Read the input of a request whose result will be a file with this suffix.

    Raises an ImageError for files that cannot be edited or encoded, and InvalidParameterError for a
    request that does not fit them.
    """
    from step1x_edit.pictures import images, regions

    picture = before = images.decode(data, limits)
    size = picture.width, picture.height
    images.check_encodable(*size_of_result(request, *size), suffix)
    grown = regions.grown_size(request.outpaint, *size)
    sha256, record = hashlib.sha256(data).hexdigest(), images.read_record(data)
    may_change, mask_sha256, box = None, None, None
    if mask is not None:
        with about_the_mask():
            may_change = images.decode_mask(mask, limits, size)
        mask_sha256 = hashlib.sha256(mask).hexdigest()
    if request.outpaint:
        canvas = regions.grown(picture, may_change, request.outpaint, limits)
        picture, may_change, before = canvas.picture, canvas.mask, canvas.before
    images.check_enlarged(*grown, request.upscale, limits)
    if request.region == "full":
        if may_change is None:
            raise InvalidParameterError(
                "region full needs a mask, which says what may change, or outpaint",
                param="region",
            )
        box = regions.box_around(may_change, request.size_level)
    return Source(picture, before, sha256, record, may_change, mask_sha256, box)
