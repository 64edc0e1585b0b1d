"""The file of a result: encoded, with its record, and marked.

Every interface gets its files here, so that none can leave out the mark. A server imports this
module before the first picture, so it imports neither numpy nor Pillow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from step1x_edit.pictures.output_formats import BMP, OUTPUT_FORMATS
from step1x_edit.schemas.requests import Record, without_prompts
from step1x_edit.settings import Settings

if TYPE_CHECKING:  # deferred: a server starts to answer before numpy is imported
    from step1x_edit.pictures.images import Picture


@dataclass(frozen=True)
class ResultFile:
    """The bytes of a file, and what the answer must say about it."""

    data: bytes
    warning: str | None = None


class ResultFiles:
    """Writes results as the operator wants them."""

    def __init__(self, settings: Settings) -> None:
        self._has_prompts = settings.record_prompt

    def write(
        self, picture: Picture, suffix: str, record: Record, quality: int | None = None
    ) -> ResultFile:
        """The file of a picture that was made as the record says; otherwise as `images.encode`."""
        from step1x_edit.pictures import images

        if not self._has_prompts:
            record = without_prompts(record)
        data = images.encode(picture, suffix, record, quality)
        is_marked = OUTPUT_FORMATS[suffix.lower()] is not BMP
        return ResultFile(data, None if is_marked else _NOT_MARKED)


_NOT_MARKED = "BMP cannot say that a model made the picture; save it as .png to have it marked"
