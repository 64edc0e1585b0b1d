"""Requests to OpenAI's Images: parses forms and JSON into our requests.

Each field has an effect, has a value without effect, or is refused by name. Pictures are uploads
or data URLs; no URL is fetched. StepFun's own interface to this model has the same routes; its
differences apply to requests that name its model.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from step1x_edit.errors import EditCancelledError, InvalidParameterError, ModelNotFoundError
from step1x_edit.interfaces import json_bodies
from step1x_edit.interfaces.http.forms import content_type, is_json, read_json
from step1x_edit.interfaces.http.idempotency import digest_of
from step1x_edit.model.request import Mode
from step1x_edit.schemas.complaints import invalid_parameter
from step1x_edit.schemas.openai import (
    ImageEditRequest,
    ImageGenerationRequest,
    OpenAIRequest,
)
from step1x_edit.schemas.parameters import Parameter, parameters_of
from step1x_edit.schemas.requests import (
    PARAMETERS,
    SIDE_MULTIPLE,
    GeneratePictureRequest,
    PictureRequest,
    given_in,
)
from step1x_edit.service.records import with_seed
from step1x_edit.service.service import EditService

EDITS_PATH: Final = "/v1/images/edits"
GENERATIONS_PATH: Final = "/v1/images/generations"
CONTENT_PATH: Final = "/v1/images/{image_id}/content"
MODELS_PATH: Final = "/v1/models"
MODEL: Final = "step1x-edit"
STEPFUN_MODEL: Final = "step-1x-edit"
"""The name of the model in StepFun's own interface."""
MODE_OF: Final[Mapping[str, Mode]] = {
    "low": "turbo",
    "medium": "fast",
    "high": "exact",
    "hd": "exact",
}
"""The mode of each `quality` that names one."""

_OF_OPENAI: Final = ("gpt-image-", "chatgpt-image-", "dall-e-")
_Request = TypeVar("_Request", bound=OpenAIRequest)

_MAX_FILES: Final = 20  # OpenAI's takes 16 pictures; the error says that this one takes one
_MAX_FIELDS: Final = 40
_MAX_FIELD_BYTES: Final = 64 * 1024

_PICTURE: Final = re.compile(r"image(\[[0-9]*\])?")  # in a list, some clients number the items
_CUT_OUT: Final = re.compile(r"data:[^,]*;base64,([0-9]{1,5})")  # see json_bodies
_LORAS: Final = "loras[]"  # how OpenAI's client sends a list in a form, once per item
_SAME: Final[Mapping[str, str]] = {
    "num_steps": "num_inference_steps",
    "steps": "num_inference_steps",
    "true_cfg_scale": "guidance_scale",
    "cfg_scale": "guidance_scale",
}
_EMPTY_MEANS_EMPTY: Final = frozenset({"prompt", "negative_prompt", "loras"})
_UNSUPPORTED: Final[Mapping[str, str]] = {
    "markup": "send a mask, or say in the prompt what to change",
    "complexity": "the model has no planning step",
    "frame_count": "the result is one picture",
    "frame_duration_ms": "the result is one picture",
    "svg": "the result is made of pixels",
    "url": "no URL is fetched; send the picture itself",
    "file_id": "no files are kept; send the picture itself",
}
_UNSUPPORTED_VALUES: Final[Mapping[tuple[str, str], str]] = {
    ("background", "transparent"): "the model adds no transparency; auto keeps that of the input",
    ("style", "natural"): "say in the prompt which style you want",
}


@dataclass(frozen=True)
class Sent:
    """The uploads and the other, unparsed fields of a request."""

    picture: bytes | None
    """None if a picture is made from the prompt alone."""
    mask: bytes | None
    fields: Mapping[str, object]

    @property
    def digest(self) -> str:
        """A digest of the uploads and fields."""
        parts = [("image", self.picture or b""), ("mask", self.mask or b"")]
        parts += [(name, json.dumps(value).encode()) for name, value in self.fields.items()]
        return digest_of(parts)


async def read_edit(request: Request) -> Sent:
    """Read the request of an edit."""
    if is_json(request):
        text, data = await json_bodies.read_with_data(request)
        return _pictures_of(_supported(await json_bodies.parse(text)), data)
    async with _form(request) as (pictures, fields):
        picture = await _uploaded(_only(pictures, "image"), "image")
        mask = fields.pop("mask", None)
        return Sent(picture, None if mask is None else await _uploaded(mask, "mask"), fields)


async def read_estimate(request: Request) -> dict[str, object]:
    """Read the fields of an edit without its picture."""
    if is_json(request):
        fields = _supported(await read_json(request))
        found: Collection[str] = fields
    else:
        async with _form(request) as (pictures, fields):
            found = [*fields, *(["image"] if pictures else [])]
    _refuse_pictures(found, "{name} is not accepted here: give the picture's width and height")
    return fields


async def read_generation(request: Request) -> Sent:
    """Read the request of a picture from a prompt without an input picture."""
    if not is_json(request):
        raise HTTPException(415, "Send JSON.")
    fields = _supported(await read_json(request))
    wrong = "{name!r} is not accepted here: pictures are edited at " + EDITS_PATH
    _refuse_pictures(fields, wrong)
    return Sent(None, None, fields)


def _refuse_pictures(found: Collection[str], sentence: str) -> None:
    """Raise the sentence, with the field's name, if a picture is among the fields."""
    for name in ("image", "images", "mask"):
        if name in found:
            raise InvalidParameterError(sentence.format(name=name), param=name)


def _supported(values: Mapping[str, object]) -> dict[str, object]:
    """The fields of a JSON body that have a value; raises for an unsupported one."""
    fields = {name: value for name, value in values.items() if value is not None}
    for name in fields:
        _check_supported(name)
    return fields


@contextlib.asynccontextmanager
async def _form(request: Request) -> AsyncIterator[tuple[list[object], dict[str, object]]]:
    """The pictures of a form and its other fields; uploads can be read within."""
    if content_type(request) != "multipart/form-data":
        raise HTTPException(415, "Send a form, as multipart/form-data, or JSON.")
    try:
        async with request.form(
            max_files=_MAX_FILES, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES
        ) as form:
            yield _pictures_and_fields(form)
    except ClientDisconnect:
        raise EditCancelledError from None
    except HTTPException as error:
        raise InvalidParameterError(f"the form cannot be read: {error.detail}") from None


def _pictures_and_fields(form: FormData) -> tuple[list[object], dict[str, object]]:
    pictures: list[object] = []
    loras: list[object] = []
    fields: dict[str, object] = {}
    for name, value in form.multi_items():
        _check_supported(name)
        if _PICTURE.fullmatch(name):
            pictures.append(value)
        elif name == _LORAS:
            loras.append(value)
        elif name in fields:
            raise InvalidParameterError(f"{name!r} is given twice", param=name)
        elif isinstance(value, UploadFile) and name != "mask":
            raise InvalidParameterError(
                f"{name!r} takes no file; upload the picture as 'image' and a mask as 'mask'",
                param=name,
            )
        else:
            fields[name] = value
    if loras and "loras" in fields:
        raise InvalidParameterError("'loras' is given twice", param="loras")
    if loras:
        fields["loras"] = loras
    return pictures, fields


async def _uploaded(value: object, name: str) -> bytes:
    if not isinstance(value, UploadFile):
        raise InvalidParameterError(
            f"{name} must be an uploaded file; no URL is fetched", param=name
        )
    return await value.read()


def _pictures_of(fields: dict[str, object], data: list[bytes | None]) -> Sent:
    """The pictures of a JSON body, and its other fields; `data` holds the decoded pictures."""
    given = {name: fields.pop(name) for name in ("images", "image") if name in fields}
    if len(given) > 1:
        raise InvalidParameterError("image and images mean the same; give one", param="image")
    name, value = next(iter(given.items()), ("images", []))
    pictures = value if isinstance(value, list) else [value]
    picture, mask = _in_data_url(_only(pictures, name), name, data), fields.pop("mask", None)
    if len(data) > 1 + (mask is not None):
        raise InvalidParameterError("only image, images and mask take data URLs, one each")
    return Sent(picture, None if mask is None else _in_data_url(mask, "mask", data), fields)


def _only(pictures: list[object], name: str) -> object:
    if not pictures:
        raise InvalidParameterError(f"{name} is missing", param=name)
    if len(pictures) > 1:
        raise InvalidParameterError(
            f"{name} must be one picture, got {len(pictures)}: the model takes no references",
            param=name,
        )
    return pictures[0]


def _in_data_url(value: object, name: str, data: list[bytes | None]) -> bytes:
    """The bytes of `"data:image/png;base64,0"`, or of an object that has it as its `image_url`."""
    url = value.get("image_url") if isinstance(value, dict) and len(value) == 1 else value
    found = _CUT_OUT.fullmatch(url) if isinstance(url, str) else None
    if found is None or int(found[1]) >= len(data):
        raise InvalidParameterError(
            f"{name} must be a data URL in base64 (data:image/png;base64,…), or an object with it "
            "as image_url and nothing else; no other URL is fetched, and no files are kept",
            param=name,
        )
    decoded = data[int(found[1])]
    if decoded is None:
        raise InvalidParameterError(f"{name} is not valid base64", param=name)
    return decoded


def _check_supported(name: str) -> None:
    """Raise for a field that OpenAI or others know and this server does not support."""
    if not name.isprintable():
        raise InvalidParameterError(f"{name[:60]!r} is unknown", param=name)
    why = _UNSUPPORTED.get(name.partition("[")[0])
    if why is not None:
        raise InvalidParameterError(f"{name!r} is not supported: {why}", param=name)


def understood(kind: type[_Request], fields: Mapping[str, object]) -> _Request:
    """The request with these fields; errors name a field as the client did."""
    own = parameters_of(kind)
    values: dict[str, object] = {}
    parameters = {
        **own,
        **{name: replace(own[same], name=name) for name, same in _SAME.items()},
        **{name: Parameter(name, "", "", None) for name in ("image", "mask")},
    }
    for name, value in fields.items():
        known = _SAME.get(name, name)
        if value == "" and known in own and known not in _EMPTY_MEANS_EMPTY:
            continue  # a form field without a choice
        if known in values:
            raise InvalidParameterError(f"{name} is given twice, by two names", param=name)
        values[known] = value
        if known in own:
            parameters[known] = replace(own[known], name=name)
    for (name, value), why in _UNSUPPORTED_VALUES.items():
        if values.get(name) == value:
            raise InvalidParameterError(f"{name} {value!r} is not supported: {why}", param=name)
    if values.get("model") == STEPFUN_MODEL:
        values = _as_stepfun_means(values)
    try:
        asked = kind.model_validate(values)
    except ValidationError as error:
        raise invalid_parameter(error, parameters) from None
    _check_together(asked)
    return asked


def _as_stepfun_means(values: Mapping[str, object]) -> dict[str, object]:
    """The fields with the defaults of StepFun's interface."""
    default = {} if "stream" in values else {"response_format": "url"}
    is_drawn = values.get("seed") in (0, "0") and not isinstance(values.get("seed"), bool)
    return {**default, **values, **({"seed": None} if is_drawn else {})}


def _check_together(asked: OpenAIRequest) -> None:
    """Refuse fields that have no effect, or a contradictory one, beside the others."""
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
    if asked.quality in MODE_OF and "mode" in asked.model_fields_set:
        raise InvalidParameterError(
            "quality and mode both choose the mode; give one", param="quality"
        )


# --- our own requests -----------------------------------------------------------------------------


def check_model(service: EditService, name: str) -> None:
    """Raise ModelNotFoundError unless the name is ours, the version's, or one of OpenAI's."""
    if name not in names_of(service) and not name.startswith(_OF_OPENAI):
        raise ModelNotFoundError(f"{name!r}; {MODELS_PATH} lists what there is")


def names_of(service: EditService) -> set[str]:
    """The names under which the model is listed."""
    version = service.status().gpu_status.model
    return {MODEL, STEPFUN_MODEL} if version is None else {MODEL, STEPFUN_MODEL, version}


def request_of(service: EditService, asked: ImageEditRequest) -> PictureRequest:
    """The corresponding request of ours, with a seed and the operator's defaults."""
    return with_seed(service.read_picture(_given(asked) | _level_of(asked)))


def _given(asked: OpenAIRequest) -> dict[str, object]:
    """The given parameters that our requests have too."""
    given = given_in(asked, PictureRequest)
    return given | ({"mode": MODE_OF[asked.quality]} if asked.quality in MODE_OF else {})


def _level_of(asked: ImageEditRequest) -> dict[str, int]:
    """The working resolution, if StepFun's interface asks for it as the size."""
    if asked.model != STEPFUN_MODEL or "size_level" in asked.model_fields_set:
        return {}
    side = asked.size.partition("x")[0]
    return {"size_level": int(side)} if side in map(str, PARAMETERS["size_level"].choices) else {}


def generation_of(service: EditService, asked: ImageGenerationRequest) -> GeneratePictureRequest:
    """The corresponding request of ours, as in `request_of`."""
    width, height = new_size(asked)
    size = {"width": width, "height": height}
    return with_seed(service.read_generate_picture(_given(asked) | size))


def new_size(asked: ImageGenerationRequest) -> tuple[int | None, int | None]:
    """The requested width and height, or None if the server chooses."""
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
