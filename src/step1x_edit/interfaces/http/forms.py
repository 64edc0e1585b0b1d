"""Requests over HTTP: forms with uploads, and JSON.

Uploads are read into memory that spills into unnamed files, which are removed at the end of the
request. The fields are passed on unparsed; the request's schema validates them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from step1x_edit.errors import EditCancelledError, InvalidParameterError
from step1x_edit.interfaces import json_bodies

T = TypeVar("T")

FILE: Final = "file"
MASK: Final = "mask"
_UPLOADS: Final = (FILE, MASK)
_MAX_FIELDS: Final = 20
_MAX_FIELD_BYTES: Final = 64 * 1024


@dataclass(frozen=True)
class SentForm:
    """The uploads and the other, unparsed fields of a request."""

    picture: bytes
    mask: bytes | None
    fields: dict[str, object]

    def parts(self) -> list[tuple[str, bytes]]:
        """Everything that a digest of the request covers."""
        texts = [(name, str(value).encode()) for name, value in self.fields.items()]
        return [(FILE, self.picture), (MASK, self.mask or b""), *texts]


async def read_form(request: Request) -> SentForm:
    """Read a form; raises InvalidParameterError if a field is given twice."""
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
            return SentForm(picture, mask, fields)
    except ClientDisconnect:
        raise EditCancelledError from None
    except HTTPException as error:
        raise InvalidParameterError(f"the form cannot be read: {error.detail}") from None


def content_type(request: Request) -> str:
    """The media type of the body, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def is_json(request: Request) -> bool:
    """Whether the body is declared as JSON."""
    return content_type(request) == "application/json"


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
