"""The file of a result: encoded, with its record, marked, and signed if there is a certificate.

Every interface gets its files here, so that none can leave out mark and signature. A server
imports this module before the first picture, so it imports neither numpy nor Pillow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from step1x_edit.pictures.output_formats import BMP, OUTPUT_FORMATS
from step1x_edit.schemas.requests import Record, without_prompts
from step1x_edit.settings import Settings

if TYPE_CHECKING:  # deferred: a server starts to answer before numpy is imported
    from step1x_edit.pictures.images import Picture
    from step1x_edit.pictures.manifests import Signatory


@dataclass(frozen=True)
class ResultFile:
    """The bytes of a file, and what the answer must say about it."""

    data: bytes
    warning: str | None = None


class ResultFiles:
    """Writes results as the operator wants them."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError if results cannot be signed as the settings say."""
        self._has_prompts = settings.record_prompt
        self._signatory: Signatory | None = None
        if settings.c2pa_cert is not None and settings.c2pa_key is not None:
            from step1x_edit.pictures.manifests import Signatory

            self._signatory = Signatory(settings.c2pa_cert, settings.c2pa_key)

    @property
    def are_signed(self) -> bool:
        """Whether files are signed, for which `write` needs the input of an edit."""
        return self._signatory is not None

    def write(
        self,
        picture: Picture,
        suffix: str,
        record: Record,
        original: bytes | None,
        quality: int | None = None,
    ) -> ResultFile:
        """The file of a picture that was made as the record says; otherwise as `images.encode`.

        `original` is the file of the input, if there was one.
        """
        from step1x_edit.pictures import images
        from step1x_edit.pictures.provenance import source_type_of

        if not self._has_prompts:
            record = without_prompts(record)
        data = images.encode(picture, suffix, record, quality)
        output = OUTPUT_FORMATS[suffix.lower()]
        if output is BMP:
            return ResultFile(data, _NOT_MARKED)
        if self._signatory is None:
            return ResultFile(data)
        source_type = source_type_of(record, picture.notes.source_type)
        signed = self._signatory.sign(data, output.media_type, record, source_type, original)
        return ResultFile(*signed)


_NOT_MARKED: Final = (
    "BMP cannot say that a model made the picture; save it as .png to have it marked"
)
