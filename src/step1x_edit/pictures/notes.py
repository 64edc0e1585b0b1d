"""The metadata of a picture: camera, credit, density, and the record of an edit.

An allow-list decides what is kept, so no place, serial number or thumbnail gets into a result. EXIF
stays EXIF. Credit from XMP or IPTC becomes XMP, in every format that supports it: it is written
once, so that no two copies can differ.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from PIL import ExifTags, Image, TiffTags
from pydantic import TypeAdapter

from step1x_edit.pictures.provenance import (
    DC,
    PHOTOSHOP,
    RIGHTS,
    SOURCE_TYPE,
    Credit,
    texts_of,
)
from step1x_edit.schemas.requests import Record


@dataclass(frozen=True)
class Notes:
    """The metadata that is kept through an edit."""

    exif: Mapping[int, Any] = field(default_factory=dict)
    """Harmless tags by number: author, time, camera; never the place."""
    credit: Credit = Credit()
    density: tuple[float, float] | None = None
    """Pixels per inch, across and down, of the upright picture."""
    source_type: str = ""
    """How the picture came to be, as its XMP says: a URI of the IPTC."""


def notes_of(image: Image.Image, exif: Mapping[int, Any]) -> Notes:
    """The notes of a picture as its decoder found them."""
    xmp = texts_of(image.info.get("xmp"))
    source_type = next(iter(xmp.get(SOURCE_TYPE, ())), "").strip()[:_MAX_CREATOR]
    credit, density = _credit(xmp, image.info), _density(image, exif)
    return Notes(_harmless(exif), credit, density, source_type)


# --- EXIF ----------------------------------------------------------------------------------------

_IMAGE_TAGS: Final = (
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.Copyright,
)
_PHOTO_TAGS: Final = (
    ExifTags.Base.DateTimeOriginal,
    ExifTags.Base.OffsetTimeOriginal,
    ExifTags.Base.ExposureTime,
    ExifTags.Base.FNumber,
    ExifTags.Base.ISOSpeedRatings,
    ExifTags.Base.FocalLength,
    ExifTags.Base.FocalLengthIn35mmFilm,
    ExifTags.Base.LensModel,
)
_MAX_TAG_LENGTH: Final = 200
_SRGB, _UNCALIBRATED = 1, 0xFFFF
_INCH, _CENTIMETRE = 2, 3
_UNKNOWN_DENSITY: Final = (72.0, 72.0)  # per inch: EXIF's value for unknown

# Required by EXIF besides the notes.
_REQUIRED: Final[Mapping[int, bytes]] = {
    ExifTags.Base.ExifVersion: b"0232",
    ExifTags.Base.FlashPixVersion: b"0100",
}
_COMPONENTS: Final = b"\1\2\3\0"  # Y, Cb, Cr
_CENTRED: Final = 1

# Pillow writes bytes of an unknown tag as BYTE; EXIF requires UNDEFINED.
for _tag in (ExifTags.Base.UserComment, ExifTags.Base.ComponentsConfiguration):
    TiffTags.TAGS_V2_GROUPS[ExifTags.IFD.Exif][_tag] = TiffTags.TagInfo(
        _tag, _tag.name, TiffTags.UNDEFINED, 1
    )


def exif_of(image: Image.Image) -> dict[int, Any]:
    """All readable tags of a picture; damaged EXIF counts as none.

    An orientation that only XMP states is ignored, as in browsers and other viewers.
    """
    if "exif" in image.info:
        return exif_in(image.info["exif"])
    xmp = image.info.pop("xmp", None)
    try:
        return _flat(image.getexif())
    except Exception:  # noqa: BLE001 - the picture is fine, its notes are not: see images._damaged
        return {}
    finally:
        image.info["xmp"] = xmp


def exif_in(data: bytes, leave_out: Collection[int] = ()) -> dict[int, Any]:
    """All readable tags of EXIF, or of the first directory of a TIFF, except those left out."""
    exif = Image.Exif()
    try:
        exif.load(data)
        return {tag: value for tag, value in _flat(exif).items() if tag not in leave_out}
    except Exception:  # noqa: BLE001 - as above
        return {}


def _flat(exif: Image.Exif) -> dict[int, Any]:
    tags = {**exif, **exif.get_ifd(ExifTags.IFD.Exif)}
    if ExifTags.IFD.Interop in tags:
        tags[ExifTags.IFD.Interop] = exif.get_ifd(ExifTags.IFD.Interop)
    return tags


def is_marked_adobe_rgb(exif: Mapping[int, Any]) -> bool:
    """Whether a camera states "Adobe RGB": by the option file of DCF, R03."""
    interop = exif.get(ExifTags.IFD.Interop, {})
    return (
        exif.get(ExifTags.Base.ColorSpace) == _UNCALIBRATED
        and str(interop.get(ExifTags.Interop.InteropIndex, "")).rstrip("\0") == "R03"
    )


def exif_with(
    notes: Notes, record: Record | None, *, has_profile: bool, byte_order: str = "big"
) -> Image.Exif | None:
    """EXIF with the notes and the record of the edit; None if there is nothing to store.

    The byte order, "big" or "little", is that of the file that will hold it.
    """
    image: dict[int, Any] = {tag: notes.exif[tag] for tag in _IMAGE_TAGS if tag in notes.exif}
    photo: dict[int, Any] = {tag: notes.exif[tag] for tag in _PHOTO_TAGS if tag in notes.exif}
    if record is not None:
        image[ExifTags.Base.Software] = record.software
        photo[ExifTags.Base.UserComment] = _comment(record, byte_order)
    if not image and not photo and notes.density is None:
        return None
    density = notes.density or _UNKNOWN_DENSITY
    image[ExifTags.Base.XResolution], image[ExifTags.Base.YResolution] = density
    image[ExifTags.Base.ResolutionUnit] = _INCH
    photo.update(_REQUIRED)
    photo[ExifTags.Base.ColorSpace] = _UNCALIBRATED if has_profile else _SRGB
    exif = Image.Exif()
    exif.update(image)
    exif.get_ifd(ExifTags.IFD.Exif).update(photo)
    return exif


def add_jpeg_tags(exif: Image.Exif, width: int, height: int) -> None:
    """Add the tags that EXIF requires in a JPEG only."""
    exif[ExifTags.Base.YCbCrPositioning] = _CENTRED
    exif.get_ifd(ExifTags.IFD.Exif).update(
        {
            ExifTags.Base.ComponentsConfiguration: _COMPONENTS,
            ExifTags.Base.ExifImageWidth: width,
            ExifTags.Base.ExifImageHeight: height,
        }
    )


def _harmless(exif: Mapping[int, Any]) -> dict[int, Any]:
    """The tags that may be written to the result."""
    return {
        int(tag): exif[tag]
        for tag in (*_IMAGE_TAGS, *_PHOTO_TAGS)
        if tag in exif and _is_writable(tag, exif[tag])
    }


def _is_writable(tag: int, value: Any) -> bool:
    """Whether the tag can be written back: checked now, not when the edited picture is saved."""
    exif = Image.Exif()
    exif[tag] = value
    try:
        return len(exif.tobytes()) <= _MAX_TAG_LENGTH
    except Exception:  # noqa: BLE001 - see images._damaged
        return False


# --- density -------------------------------------------------------------------------------------

_MAX_DENSITY: Final = 0xFFFF  # the limit of JPEG
_ROUNDING: Final = 0.02  # PNG counts whole pixels per metre


def _density(image: Image.Image, exif: Mapping[int, Any]) -> tuple[float, float] | None:
    """Pixels per inch as stored, before any rotation."""
    # In other formats Pillow derives `dpi` from the tags.
    is_stated = image.format in ("PNG", "BMP") or image.info.get("jfif_unit")
    found = (image.info.get("dpi") if is_stated else None) or _density_in(exif)
    if found is None:
        return None
    across, down = (_number(value) for value in found)
    if not all(1 <= value <= _MAX_DENSITY for value in (across, down)):
        return None
    return _tidy(across), _tidy(down)


def _density_in(exif: Mapping[int, Any]) -> tuple[float, float] | None:
    tags = ExifTags.Base.XResolution, ExifTags.Base.YResolution
    scale = {_INCH: 1.0, _CENTIMETRE: 2.54}.get(exif.get(ExifTags.Base.ResolutionUnit, _INCH))
    if scale is None or not all(tag in exif for tag in tags):
        return None
    across, down = (_number(exif[tag]) * scale for tag in tags)
    return None if (across, down) == _UNKNOWN_DENSITY else (across, down)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return math.nan


def _tidy(density: float) -> float:
    return float(round(density)) if abs(density - round(density)) <= _ROUNDING else density


# --- credit --------------------------------------------------------------------------------------

_MAX_TEXT: Final = 2000  # characters; all must fit into one JPEG segment
_MAX_CREATORS: Final = 20
_MAX_CREATOR: Final = 200


def _credit(xmp: Mapping[str, list[str]], info: Mapping[Any, Any]) -> Credit:
    """Credit from XMP, and from IPTC what XMP lacks."""
    iptc = _iptc_texts(_iptc(info))

    def texts(name: str) -> list[str]:
        return [text.strip() for text in xmp.get(name) or iptc.get(name) or () if text.strip()]

    def text(name: str) -> str:
        found = texts(name)
        return found[0] if found and len(found[0]) <= _MAX_TEXT else ""

    creators = [one for one in texts(f"{{{DC}}}creator") if len(one) <= _MAX_CREATOR]
    return Credit(
        tuple(creators[:_MAX_CREATORS]),
        text(f"{{{DC}}}rights"),
        text(f"{{{RIGHTS}}}UsageTerms"),
        text(f"{{{RIGHTS}}}WebStatement"),
        text(f"{{{PHOTOSHOP}}}Credit"),
    )


_IPTC_RESOURCE: Final = 0x0404
_IPTC_NAMES: Final = {
    80: f"{{{DC}}}creator",  # By-line
    116: f"{{{DC}}}rights",  # Copyright Notice
    110: f"{{{PHOTOSHOP}}}Credit",
}
_IPTC_UTF_8: Final = b"\x1b%G"


def _iptc(info: Mapping[Any, Any]) -> bytes:
    """The IPTC datasets: a Photoshop resource in a JPEG, a tag in a TIFF."""
    resources = info.get("photoshop")
    found = resources.get(_IPTC_RESOURCE) if isinstance(resources, dict) else info.get("iptc")
    return found if isinstance(found, bytes) else b""


def _iptc_texts(data: bytes) -> Mapping[str, list[str]]:
    """The texts that both IPTC and XMP define, by their names in XMP."""
    found: dict[str, list[str]] = {}
    is_utf_8 = False
    for record, dataset, value in _datasets(data):
        if (record, dataset) == (1, 90):
            is_utf_8 = value == _IPTC_UTF_8
        if record == 2 and dataset in _IPTC_NAMES:
            found.setdefault(_IPTC_NAMES[dataset], []).append(_decoded(value, is_utf_8=is_utf_8))
    return found


def _datasets(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    at = 0
    while at + 5 <= len(data) and data[at] == 0x1C:
        length = int.from_bytes(data[at + 3 : at + 5], "big")
        yield data[at + 1], data[at + 2], data[at + 5 : at + 5 + length]
        at += 5 + length


def _decoded(value: bytes, *, is_utf_8: bool) -> str:
    """Text that names its character set, or else UTF-8 if it is valid, or else Latin-1."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode("utf-8", "replace") if is_utf_8 else value.decode("latin-1")


# --- the record of an edit -----------------------------------------------------------------------
# PNG: an international text chunk. The others: the EXIF comment, which starts with the name of its
# character set; its UTF-16 has the byte order of the EXIF around it.

RECORD_KEY: Final = "step1x-edit"
_UNICODE: Final = b"UNICODE\0"
_RECORD: Final[TypeAdapter[Record]] = TypeAdapter(Record)


def written(record: Record) -> str:
    """The record as text."""
    return record.model_dump_json(exclude_none=True)


def _comment(record: Record, byte_order: str) -> bytes:
    return _UNICODE + written(record).encode("utf-16-be" if byte_order == "big" else "utf-16-le")


def record_of(image: Image.Image) -> Record:
    """The record in a picture; may raise almost any exception if there is no readable one."""
    text = image.info.get(RECORD_KEY) or _commented(exif_of(image))
    return _RECORD.validate_json(text)


def _commented(exif: Mapping[int, Any]) -> str:
    # A number has no such method, and bytes() would make that many zeros of it.
    comment: bytes = exif.get(ExifTags.Base.UserComment, b"").removeprefix(_UNICODE)
    return comment.decode("utf-16-be" if comment.startswith(b"\0") else "utf-16-le")  # of a brace
